"""From probabilities to labels: nested regions, thresholds, and how to choose them."""

import numpy as np
import pandas as pd

from brats_utils.labels import ENCODED_REGIONS, LABELS, REGIONS, decode_labels

THRESHOLDS = np.round(np.arange(0.2, 0.81, 0.05), 2)
MIN_ET_VOXELS = (0, 25, 50, 100, 200, 400)
PLAIN = {"thresholds": [0.5, 0.5, 0.5], "min_et_voxels": 0}
LEAST_GAIN = 0.001  # of mean Dice: less is chance


def region_probabilities(probabilities):
    """Return the probabilities of WT, TC and ET, whatever a model's outputs are.

    Parameters
    ----------
    probabilities : (..., K) float array
        K = 3: of the regions themselves. K = 4: of the labels 0 to 3, which are added
        up over each region.

    Returns
    -------
    regions : (..., 3) float array

    Raises
    ------
    ValueError
        If K is neither.
    """
    probabilities = np.asarray(probabilities)
    n_channels = probabilities.shape[-1]
    if n_channels == len(ENCODED_REGIONS):
        return probabilities
    if n_channels != len(LABELS):
        raise ValueError(
            f"expected 4 channels (labels) or 3 (WT, TC, ET), got {n_channels}"
        )
    members = [
        probabilities[..., list(values)].sum(-1) for values in ENCODED_REGIONS.values()
    ]
    return np.stack(members, axis=-1)


def decode_probabilities(probabilities, *, thresholds=None, min_et_voxels=0):
    """Return the BraTS labels that a model's probabilities say.

    Parameters
    ----------
    probabilities : (..., K) float array
        K = 4: of the labels 0 to 3. K = 3: of the regions WT, TC and ET.
    thresholds : sequence of 3 float, optional
        A region counts where its probability is above its threshold, TC only within
        WT, and ET only within TC. By default the largest of four labels wins, and
        each of three regions counts above 0.5.
    min_et_voxels : int
        Where less enhancing tumour than this is found, call it core (label 1): a few
        stray voxels would cost the whole Dice of a case that has none.

    Returns
    -------
    segmentation : (...) uint8 array
        Values 0, 1, 2 and 4.

    Raises
    ------
    ValueError
        If K is neither.

    Examples
    --------
    >>> decode_probabilities([[0.9, 0.8, 0.2], [0.9, 0.2, 0.8], [0.1, 0.9, 0.9]])
    array([1, 2, 0], dtype=uint8)
    """
    if thresholds is None and np.shape(probabilities)[-1] == len(LABELS):
        segmentation = decode_labels(np.argmax(probabilities, axis=-1))
    else:
        regions = region_probabilities(probabilities)
        thresholds = PLAIN["thresholds"] if thresholds is None else thresholds
        above = regions > np.array(thresholds, regions.dtype)
        nested = np.logical_and.accumulate(above, axis=-1)
        # By how many regions a voxel lies in: oedema, core, enhancing tumour.
        segmentation = np.array([0, 2, 1, 4], np.uint8)[nested.sum(axis=-1)]
    if np.count_nonzero(segmentation == 4) < min_et_voxels:
        segmentation[segmentation == 4] = 1
    return segmentation


def _dice(found, truth):
    """Return the official Dice of two masks: 1 where both are empty."""
    size = np.count_nonzero(found) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(found & truth) / size if size else 1.0


def _mean_dice(cases, decoding):
    """Return the mean Dice of WT, TC and ET over cases, (3,), decoded so."""
    rows = []
    for probabilities, truth in cases:
        found = decode_probabilities(probabilities, **decoding)
        masks = ((np.isin(found, v), np.isin(truth, v)) for v in REGIONS.values())
        rows.append([_dice(*pair) for pair in masks])
    return np.mean(rows, axis=0)


def tune_decoding(cases):
    """Choose thresholds and the least enhancing volume by the mean Dice over cases.

    The threshold of WT first, then TC's, then ET's, then the volume. Tuned on few
    cases, and scored on the same, the gain is flattering.

    Parameters
    ----------
    cases : iterable of (probabilities, truth)
        (..., K) float as `decode_probabilities` takes them, and (...) integer labels
        0, 1, 2, 4. Of each case only the voxels that can matter are kept in memory.

    Returns
    -------
    decoding : dict
        "thresholds" and "min_et_voxels", keywords of `decode_probabilities`: 0.5 and 0
        wherever no other value is better; empty if nothing is better than to decode
        without them, as `decode_probabilities` does by default.
    gain : pandas.DataFrame
        Rows WT, TC and ET; mean Dice by default, "plain", and "tuned".
    """
    kept, plain = [], []
    for probabilities, truth in cases:
        regions = region_probabilities(probabilities)
        matters = (regions[..., 0] > THRESHOLDS[0]) | (truth > 0)
        kept.append((regions[matters], truth[matters]))
        plain.append(
            _mean_dice([(np.asarray(probabilities)[matters], truth[matters])], {})
        )
    plain = np.mean(plain, axis=0)
    best, tuned = PLAIN, _mean_dice(kept, PLAIN)
    for step in range(len(REGIONS) + 1):
        found = [(_mean_dice(kept, trial), trial) for trial in _trials(best, step)]
        dice, trial = max(found, key=lambda pair: pair[0].mean())
        if dice.mean() > tuned.mean() + LEAST_GAIN:
            best, tuned = trial, dice
    if tuned.mean() <= plain.mean() + LEAST_GAIN:
        best, tuned = {}, plain
    return best, pd.DataFrame({"plain": plain, "tuned": tuned}, index=list(REGIONS))


def _trials(decoding, step):
    """Yield a decoding with other values of one threshold, or last of the volume."""
    if step == len(REGIONS):
        yield from ({**decoding, "min_et_voxels": n} for n in MIN_ET_VOXELS)
        return
    for threshold in THRESHOLDS:
        thresholds = list(decoding["thresholds"])
        thresholds[step] = float(threshold)
        yield {**decoding, "thresholds": thresholds}

"""The official BraTS scores of predicted label maps, per case and region."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from brats_utils.cases import load_labels, read_grid
from brats_utils.labels import ENCODED_REGIONS, LABELS, encode_labels
from brats_utils.nifti import BratsDataError, read_header
from brats_utils.transforms import bounding_box

# The diagonal of BraTS's 240×240×155 mm grid: the official HD95 where only one of
# prediction and truth holds the region.
MISSED_REGION_MM = float(np.sqrt(240**2 + 240**2 + 155**2))
MANY_SURFACE_VOXELS = 400_000


def _ratio(hits, total, others):
    """Return hits / total; where total is 0, 1.0 if `others` is 0 too, else 0.0."""
    return float(hits / total) if total else float(others == 0)


def _surface(mask):
    """Return the mask of the voxels with a face neighbour outside `mask`."""
    padded = np.pad(mask, 1)
    core = mask.copy()
    for axis in range(3):
        for start in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(start, start + mask.shape[axis])
            core &= padded[tuple(window)]
    return mask & ~core


def _nearest_mm(start, goal, spacing_mm):
    """Return the distance from each voxel of mask `start` to the nearest of `goal`."""
    # The tree wins on tumours, the transform on the noise of an untrained model.
    if start.sum() + goal.sum() > MANY_SURFACE_VOXELS:
        return distance_transform_edt(~goal, sampling=spacing_mm)[start]
    spacing_mm = np.asarray(spacing_mm, float)
    tree = KDTree(np.argwhere(goal) * spacing_mm, balanced_tree=False)
    return tree.query(np.argwhere(start) * spacing_mm)[0]


def hd95(prediction, truth, spacing_mm=(1, 1, 1)):
    """Return the 95th percentile of the distances between two surfaces, in mm.

    The distances from each surface voxel to the nearest one of the other surface, both
    ways, are pooled before the percentile is taken, as medpy does. A surface voxel is
    one with a face neighbour outside the mask or the array.

    Parameters
    ----------
    prediction, truth : (X, Y, Z) bool array
        Masks of one region.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    distance : float
        0.0 if both masks are empty; `MISSED_REGION_MM`, 373.12866, if one is.

    Examples
    --------
    >>> mask = np.zeros((8, 8, 8), bool)
    >>> mask[2, 2, 2] = True
    >>> hd95(mask, np.roll(mask, 3, axis=0), spacing_mm=(2, 1, 1))
    6.0
    """
    prediction, truth = np.asarray(prediction, bool), np.asarray(truth, bool)
    if not prediction.any() or not truth.any():
        return MISSED_REGION_MM if prediction.any() or truth.any() else 0.0
    box = bounding_box(prediction | truth)
    ours, theirs = _surface(prediction[box]), _surface(truth[box])
    there = _nearest_mm(ours, theirs, spacing_mm)
    back = _nearest_mm(theirs, ours, spacing_mm)
    return float(np.percentile(np.concatenate([there, back]), 95))


def _confusion(prediction, truth, n_voxels):
    """Count the pairs (truth, prediction) of labels over all `n_voxels` voxels.

    The voxels outside the arrays given are background in both.
    """
    n = len(LABELS)
    pairs = np.bincount((truth * n + prediction).ravel(), minlength=n * n)
    pairs[0] += n_voxels - prediction.size
    return pairs.reshape(n, n)


def _mean_iou(confusion):
    """Return the mean over the labels present of intersection over union."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))


def _overlap_scores(confusion, values):
    """Return Dice, sensitivity and specificity of the labels `values` as one."""
    inside = np.isin(np.arange(len(confusion)), values)
    true_positive = confusion[np.ix_(inside, inside)].sum()
    false_positive = confusion[np.ix_(~inside, inside)].sum()
    false_negative = confusion[np.ix_(inside, ~inside)].sum()
    true_negative = confusion[np.ix_(~inside, ~inside)].sum()
    errors = false_positive + false_negative
    return {
        "dice": _ratio(2 * true_positive, 2 * true_positive + errors, 0),
        "sensitivity": _ratio(
            true_positive, true_positive + false_negative, false_positive
        ),
        "specificity": _ratio(
            true_negative, true_negative + false_positive, false_negative
        ),
    }


def score_case(prediction, truth, spacing_mm=(1, 1, 1)):
    """Return the official BraTS scores of one predicted label map.

    Parameters
    ----------
    prediction, truth : (X, Y, Z) integer array
        BraTS 2020 label maps of one grid, holding only the values 0, 1, 2 and 4.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    scores : dict of str to float
        `dice_WT`, `dice_TC`, `dice_ET`, then the same for `hd95` (in mm), `sensitivity`
        and `specificity`, and last `mean_iou`. Nothing is ever NaN:

        - a region empty in both maps has Dice 1 and HD95 0, one that is empty in one of
          them Dice 0 and HD95 373.12866;
        - the sensitivity to a region that the truth lacks follows the same rule: 1 if
          the prediction lacks it too, else 0. So does the specificity to one that fills
          the truth's grid;
        - `mean_iou` averages over the four labels, background included, leaving out
          those absent in both.

    Raises
    ------
    ValueError
        If the shapes differ or are not 3-D, or a value is no BraTS label.

    References
    ----------
    Bakas et al., 2018, arXiv:1811.02629, and the rules of the BraTS 2020 server.

    Examples
    --------
    >>> truth = np.array([[[0, 4, 4, 1]]])
    >>> score_case([[[0, 4, 2, 1]]], truth)["dice_TC"]
    0.8
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            "expected a 3-D prediction and truth of one shape, got "
            f"{prediction.shape} and {truth.shape}"
        )
    # All voxels outside the box are background in both: a hundredth of the work.
    box = bounding_box((prediction != 0) | (truth != 0))
    # Files store X fastest, numpy walks Z fastest: turned once, the rest is quick.
    ours, theirs = (
        encode_labels(np.ascontiguousarray(labels[box]))
        for labels in (prediction, truth)
    )
    confusion = _confusion(ours, theirs, truth.size)
    table = {}
    for region, values in ENCODED_REGIONS.items():
        table[region] = _overlap_scores(confusion, values)
        in_ours, in_theirs = np.isin(ours, values), np.isin(theirs, values)
        table[region]["hd95"] = hd95(in_ours, in_theirs, spacing_mm)
    names = ("dice", "hd95", "sensitivity", "specificity")
    scores = {f"{name}_{r}": table[r][name] for name in names for r in table}
    return {**scores, "mean_iou": _mean_iou(confusion)}


def summarise_scores(scores, *, n_resamples=2000, seed=0):
    """Return mean, median and a bootstrap 95 % interval of the mean of each score.

    Parameters
    ----------
    scores : pandas.DataFrame
        As `score_cases` returns it, a row per case.
    n_resamples : int
        How often cases are drawn with replacement.
    seed : int
        Of those draws.

    Returns
    -------
    summary : pandas.DataFrame
        A row per score: "mean", "median", "low", "high". The interval (percentiles)
        says how the mean would vary with other cases of the same kind; of a handful of
        cases it is too narrow.
    """
    values = scores.select_dtypes("number")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), (n_resamples, len(values)))
    means = values.to_numpy()[draws].mean(axis=1)  # (resamples, scores)
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return pd.DataFrame(
        {"mean": values.mean(), "median": values.median(), "low": low, "high": high}
    )


def check_submission(folder, cases):
    """List all for which the challenge's server would refuse a folder of label maps.

    Parameters
    ----------
    folder : path
        Should hold `<case id>.nii.gz` for each case and no other file: uint8, values 0,
        1, 2 and 4, shape and affine of the case's images.
    cases : sequence of Case
        All that are to be submitted.

    Returns
    -------
    problems : pandas.DataFrame
        A row for each: "file", "problem". Empty if the folder is ready.
    """
    rows, expected = [], {f"{case.id}.nii.gz": case for case in cases}
    entries = list(Path(folder).iterdir())
    there = {path.name: path for path in entries if path.is_file()}
    rows += [(name, "is missing") for name in expected.keys() - there.keys()]
    others = {path.name for path in entries} - expected.keys()
    rows += [(name, "is no case's name") for name in others]
    for name in sorted(there.keys() & expected.keys()):
        shape, affine, _ = read_grid(expected[name])
        try:
            header = read_header(there[name])
            load_labels(there[name])
        except BratsDataError as error:
            rows.append((name, error.problem))
            continue
        if header.get_data_dtype() != np.uint8:
            rows.append((name, f"holds {header.get_data_dtype()}, not uint8"))
        if header.get_data_shape() != shape:
            rows.append((name, f"has shape {header.get_data_shape()}, not {shape}"))
        if not np.allclose(header.get_best_affine(), affine, atol=1e-3):
            rows.append((name, "has another affine than its case"))
    return pd.DataFrame(sorted(rows), columns=["file", "problem"])


def _prediction_paths(folder, cases):
    """Return the predicted file of each case; raise naming those that lack one."""
    paths = {}
    for case in cases:
        names = (f"{case.id}.nii.gz", f"{case.id}.nii")
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            paths[case.id] = found[0]
    missing = [case.id for case in cases if case.id not in paths]
    if missing:
        raise ValueError(
            f"{folder} holds no prediction (<case id>.nii.gz) for {len(missing)} of "
            f"{len(cases)} cases: {', '.join(missing)}"
        )
    return paths


def _score_files(path, case):
    """Score the prediction in file `path`, which must lie on the grid of `case`."""
    prediction, affine = load_labels(path)
    truth, expected = load_labels(case.segmentation, case.labels)
    if prediction.shape != truth.shape or not np.allclose(affine, expected, atol=1e-3):
        raise ValueError(
            f"the prediction {path} does not lie on the grid of case {case.id}: shape "
            f"{prediction.shape} and affine {affine.tolist()}, expected {truth.shape} "
            f"and {expected.tolist()}"
        )
    spacing_mm = np.linalg.norm(expected[:3, :3], axis=0)
    return score_case(prediction, truth, spacing_mm)


def score_cases(predictions_dir, cases):
    """Score the predicted files of many cases.

    Parameters
    ----------
    predictions_dir : path
        Folder of `<case id>.nii.gz` (or `.nii`) files, values 0, 1, 2 and 4.
    cases : sequence of Case
        Cases with a segmentation.

    Returns
    -------
    scores : pandas.DataFrame
        A row per case, in the order of `cases`: column `case`, then `score_case`'s.
        `scores.mean(numeric_only=True)` is what a leaderboard shows.

    Raises
    ------
    ValueError
        If a case has no segmentation or no prediction (all are named), or a
        prediction lies on another grid than its case.
    """
    without = [case.id for case in cases if case.segmentation is None]
    if without:
        raise ValueError(
            f"{len(without)} cases have no segmentation to score against: "
            f"{', '.join(without)}"
        )
    paths = _prediction_paths(Path(predictions_dir), cases)
    return pd.DataFrame(
        [{"case": case.id, **_score_files(paths[case.id], case)} for case in cases]
    )

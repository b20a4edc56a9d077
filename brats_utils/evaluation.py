"""The official BraTS scores of predicted label maps, per case and region."""

import contextlib
import json
import zipfile
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import KDTree
from scipy.stats import bootstrap

from brats_utils import files, nifti
from brats_utils.cases import check_distinct, read_description, read_scan
from brats_utils.labels import ENCODED_REGIONS, REGIONS, encode_labels, label_table
from brats_utils.split import name_images
from brats_utils.volumes import bounding_box, dice, nonzero_statistics

# The values that `tune_decoding` tries.
THRESHOLDS = np.round(np.arange(0.2, 0.81, 0.05), 2)
MIN_ISLAND = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MIN_ET_VOXELS = (0, 25, 50, 100, 200, 400)
LEAST_GAIN = 0.001  # in mean Dice; smaller ones count as chance

# The diagonal of BraTS's 240×240×155 mm grid: the official HD95 if only one of
# prediction and truth contains the region.
MISSED_REGION_MM = float(np.sqrt(240**2 + 240**2 + 155**2))

# BraTS 2023: parts up to 6 mm apart are one lesion, and small lesions do not count.
DILATION, SMALL_LESION_MM3, MISSED_LESION_MM = 3, 50, 374.0
# Voxels count as neighbours if they share an edge (18) or at least a corner (26).
EDGES, CORNERS = (ndimage.generate_binary_structure(3, n) for n in (2, 3))


def _surface_mm(mask, spacing_mm):
    """Return the positions (n, 3) of the voxels with a face neighbour outside."""
    surface = mask & ~ndimage.binary_erosion(mask)
    return np.argwhere(surface) * np.asarray(spacing_mm, float)


def _nearest_mm(points, others):
    """Return the distance from each point to the nearest of the others."""
    # Build the tree quickly: a noisy map has a million surface voxels.
    return KDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0]


def _as_pair(prediction, truth, spacing_mm, dtype=bool):
    """Return both as arrays; raise unless they are 3-D and have the same shape."""
    first, second = np.asarray(prediction, dtype), np.asarray(truth, dtype)
    if first.shape != second.shape or second.ndim != 3:
        found = f"got {first.shape} and {second.shape}"
        raise ValueError(f"expected a 3-D prediction and truth of one shape, {found}")
    files.check_option("spacing_mm", spacing_mm, *files.SIZES_MM)
    return first, second


def _surface_distances(prediction, truth, spacing_mm):
    """Return the distance of each surface voxel to the other surface, (n,) in mm.

    This is a single 0 if both masks are empty, a single infinity if one of them is.
    """
    masks = _as_pair(prediction, truth, spacing_mm)
    n_present = sum(mask.any() for mask in masks)
    if n_present < 2:
        return np.array([np.inf if n_present else 0.0])
    box = bounding_box(masks[0] | masks[1])
    ours, theirs = (_surface_mm(mask[box], spacing_mm) for mask in masks)
    return np.concatenate([_nearest_mm(ours, theirs), _nearest_mm(theirs, ours)])


def hd95(prediction, truth, spacing_mm=(1, 1, 1)):
    """Return the 95th percentile of the distances between two surfaces, in mm.

    The distances from each surface voxel to the nearest one of the other surface, in
    both directions, are pooled before the percentile is taken, as in medpy. A surface
    voxel is one with a face neighbour outside the mask or outside the array.

    Parameters
    ----------
    prediction, truth : (X, Y, Z) bool array
        Masks of one region.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    distance : float
        0.0 if both masks are empty and `MISSED_REGION_MM`, 373.12866, if one is.

    Examples
    --------
    >>> mask = np.zeros((8, 8, 8), bool)
    >>> mask[2, 2, 2] = True
    >>> hd95(mask, np.roll(mask, 3, axis=0), spacing_mm=(2, 1, 1))
    6.0
    """
    distances = _surface_distances(prediction, truth, spacing_mm)
    distances[np.isinf(distances)] = MISSED_REGION_MM
    return float(np.percentile(distances, 95))


def surface_dice(prediction, truth, spacing_mm=(1, 1, 1), tolerance_mm=1.0):
    """Return the share of two surfaces that lies close to the other one (NSD).

    Parameters
    ----------
    prediction, truth, spacing_mm
        As in `hd95`.
    tolerance_mm : float
        Largest distance that counts as close, in mm.

    Returns
    -------
    share : float
        Share of the surface voxels of both masks. 1.0 if both are empty, 0.0 if one is.

    Examples
    --------
    >>> mask = np.zeros((8, 8, 8), bool)
    >>> mask[2, 2, 2] = True
    >>> surface_dice(mask, np.roll(mask, 1, axis=0))
    1.0
    """
    files.check_option("tolerance_mm", tolerance_mm, *files.number(0, 1e9))
    distances = _surface_distances(prediction, truth, spacing_mm)
    return float(np.mean(distances <= tolerance_mm))


def lesion_scores(prediction, truth, spacing_mm=(1, 1, 1)):
    """Return Dice and HD95 averaged over lesions, as in BraTS since 2023.

    Parts of the truth that touch after dilation by three voxels are one lesion. The
    predicted components that touch the dilated lesion belong to it. Lesions of at most
    50 mm³ do not count. A missed lesion, or a predicted component that belongs to no
    lesion, scores a Dice of 0 and a distance of 374 mm.

    Parameters
    ----------
    prediction, truth, spacing_mm
        As in `hd95`.

    Returns
    -------
    dice, distance : float
        1.0 and 0.0 if there is nothing to score.

    References
    ----------
    The rules of BraTS 2023, glioma.
    """
    prediction, truth = _as_pair(prediction, truth, spacing_mm)
    dilated = ndimage.binary_dilation(truth, EDGES, iterations=DILATION)
    zones, n_lesions = ndimage.label(dilated, CORNERS)
    components, n_components = ndimage.label(prediction, CORNERS)
    rows, matched, missed = [], set(), (0.0, MISSED_LESION_MM)
    for number in range(1, n_lesions + 1):
        zone = zones == number
        touching = set(components[zone & prediction].tolist())
        matched |= touching
        lesion = truth & zone
        if np.count_nonzero(lesion) * np.prod(spacing_mm) > SMALL_LESION_MM3:
            found = np.isin(components, [*touching])
            scores = dice(found, lesion), hd95(found, lesion, spacing_mm)
            rows.append(scores if touching else missed)
    rows += [missed] * (n_components - len(matched))  # false positives
    return tuple(np.mean(rows or [(1.0, 0.0)], axis=0).tolist())


def _share(part, whole, n_errors):
    """Return part / whole; if whole is 0, return 1.0 without errors, 0.0 with any."""
    return float(part / whole) if whole else float(n_errors == 0)


def _score_region(prediction, truth, n_voxels, spacing_mm):
    """Return the scores of one region, from masks cropped out of `n_voxels` voxels."""
    hits = np.count_nonzero(prediction & truth)
    false = np.count_nonzero(prediction) - hits
    missed = np.count_nonzero(truth) - hits
    outside = n_voxels - hits - missed
    return {
        "dice": float(dice(prediction, truth)),
        "hd95": hd95(prediction, truth, spacing_mm),
        "sensitivity": _share(hits, hits + missed, false),
        "specificity": _share(outside - false, outside, missed),
    }


def _mean_iou(prediction, truth, n_voxels):
    """Return the mean intersection over union of the labels that occur."""
    maps = truth[prediction == truth], prediction, truth
    counts = np.array([np.bincount(labels.ravel(), minlength=4) for labels in maps])
    counts[:, 0] += n_voxels - truth.size  # the voxels around the crop are background
    both, ours, theirs = counts
    union = ours + theirs - both
    return float(np.mean(both[union > 0] / union[union > 0]))


def score_case(prediction, truth, spacing_mm=(1, 1, 1), *, lesions=False):
    """Return the official BraTS scores of one predicted label map.

    Parameters
    ----------
    prediction, truth : (X, Y, Z) integer array
        BraTS 2020 label maps on the same grid, with only the values 0, 1, 2 and 4.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.
    lesions : bool
        Add the scores of newer challenges: `lesion_dice` and `lesion_hd95` of
        `lesion_scores` (BraTS 2023) and `nsd`, the `surface_dice` at 1 mm.

    Returns
    -------
    scores : dict of str to float
        `dice_WT`, `dice_TC`, `dice_ET`, then the same for `hd95` (in mm), `sensitivity`
        and `specificity`, and last `mean_iou`. No score is ever NaN:

        - a region that is empty in both maps has Dice 1 and HD95 0; a region that is
          empty in only one of them has Dice 0 and HD95 373.12866;
        - a region that is absent from the truth has sensitivity 1 if it is absent from
          the prediction too, else 0. A region that fills the whole grid in the truth
          has specificity 1 if it does so in the prediction too, else 0;
        - `mean_iou` is the mean over the four labels, background included, that occur
          in either map.

    Raises
    ------
    ValueError
        If the shapes differ or are not 3-D, or a value is not a BraTS label.

    References
    ----------
    Bakas et al., 2018, arXiv:1811.02629, and the rules of the BraTS 2020 server.

    Examples
    --------
    >>> truth = np.array([[[0, 4, 4, 1]]])
    >>> score_case([[[0, 4, 2, 1]]], truth)["dice_TC"]
    0.8
    """
    files.check_option("lesions", lesions, *files.BOOL)
    prediction, truth = _as_pair(prediction, truth, spacing_mm, dtype=None)
    # All voxels outside the box are background in both maps. Arrays from files are in
    # Fortran order; in C order, the masks take a fraction of the time.
    box = bounding_box((prediction != 0) | (truth != 0))
    ours = encode_labels(np.ascontiguousarray(prediction[box]))
    theirs = encode_labels(np.ascontiguousarray(truth[box]))
    table = {}
    for region, values in ENCODED_REGIONS.items():
        masks = np.isin(ours, values), np.isin(theirs, values)
        row = table[region] = _score_region(*masks, truth.size, spacing_mm)
        if lesions:
            row["lesion_dice"], row["lesion_hd95"] = lesion_scores(*masks, spacing_mm)
            row["nsd"] = surface_dice(*masks, spacing_mm)
    scores = {f"{name}_{r}": table[r][name] for name in table["WT"] for r in table}
    return {**scores, "mean_iou": _mean_iou(ours, theirs, truth.size)}


def summarise_scores(scores, *, n_resamples=2000):
    """Return mean, median and a 95 % confidence interval of the mean of each score.

    Parameters
    ----------
    scores : pandas.DataFrame
        As `score_cases` returns it, one row per case.
    n_resamples : int
        Number of bootstrap samples.

    Returns
    -------
    summary : pandas.DataFrame
        One row per score: "mean", "median", "low", "high". The interval (percentile
        bootstrap, with a fixed seed) shows how the mean would vary with other cases of
        the same kind. It is too narrow for a handful of cases and has no width for one.
    """
    files.check_option("n_resamples", n_resamples, *files.whole(1))
    files.check_option("scores", scores, lambda s: len(s.columns), "a table of scores")
    values = scores.select_dtypes("number")
    summary = pd.DataFrame({"mean": values.mean(), "median": values.median()})
    summary["low"] = summary["high"] = summary["mean"]
    if len(values) > 1:
        options = {"n_resamples": n_resamples, "random_state": np.random.default_rng(0)}
        resampled = bootstrap([values], np.mean, method="percentile", **options)
        summary["low"], summary["high"] = resampled.confidence_interval
    return summary


def _raise_for(case_ids, problem):
    """Raise an error that names all the cases with a problem, if there are any."""
    if case_ids:
        raise ValueError(f"{len(case_ids)} case(s) {problem}: {', '.join(case_ids)}")


def _check_labelled(cases):
    """Return the cases; raise unless there are some, all with a segmentation."""
    cases = check_distinct(cases, n_images=0)
    files.check_option("cases", cases, len, "one Case or more")
    _raise_for([c.id for c in cases if c.segmentation is None], "have no segmentation")
    return cases


def _find_prediction(folder, case):
    """Return the predicted file of a case, None if there is none."""
    names = [f"{case.id}{suffix}" for suffix in (".nii.gz", ".nii")]
    # macOS may write ü as two characters, and reads a file by either name.
    pairs = ([folder / normalize(form, n) for form in ("NFC", "NFD")] for n in names)
    found = [p for pair in pairs if (p := next(filter(Path.is_file, pair), None))]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{folder} holds two predictions, {names}: keep one of them")
    return found[0] if found else None


def _check_convention(folder, paths):
    """Raise if a `dataset.json` beside label maps gives their values other meanings.

    nnU-Net copies it there. A 4 that it does not list shows that they were converted.
    """
    stated = read_description(folder, {}, need_channels=False)[1]
    if not stated or "=" in stated[1]:  # no labels, or none that are understood
        return
    table = label_table(stated[1])
    others = [f"{v} for {x}" for v, x in table.items() if v in (1, 2, 4) and v != x]
    found = set().union(*nifti.threes_and_fours(paths)) - {*table}
    if others and 4 not in found:
        problem = f"by its names, label maps beside it use {' and '.join(others)}"
        advice = "Score them in a folder of their own, converted (see labels.relabel)"
        where = {"file": folder / "dataset.json", "advice": advice}
        raise nifti.BratsDataError(problem, **where)


def _score_file(path, case, lesions):
    """Return the scores of one file, which must be on the grid of its case."""
    prediction, affine = nifti.load_labels(path)
    truth, expected = nifti.load_labels(case.segmentation, case.labels)
    if prediction.shape != truth.shape or not np.allclose(affine, expected, atol=1e-3):
        problem = f"{path} is not on the grid of case {case.id}: it has shape "
        problem += f"{prediction.shape} and affine {affine.tolist()}, expected "
        raise ValueError(f"{problem}{truth.shape} and {expected.tolist()}")
    scores = score_case(prediction, truth, nifti.spacing_mm(expected), lesions=lesions)
    return {"case": case.id, **scores}


def score_cases(predictions_dir, cases, *, lesions=False):
    """Score the prediction files of many cases.

    Parameters
    ----------
    predictions_dir : path
        Folder of `<case id>.nii.gz` (or `.nii`) files, values 0, 1, 2 and 4.
    cases : sequence of Case
        Cases with a segmentation.
    lesions : bool
        As in `score_case`.

    Returns
    -------
    scores : pandas.DataFrame
        One row per case, in the order of `cases`: column `case`, then those of
        `score_case`. `scores.mean(numeric_only=True)` is what a leaderboard shows.

    Raises
    ------
    ValueError
        If cases have no segmentation or no prediction (the message lists them), or a
        prediction is outdated, edited or not on the grid of its case, or a
        `dataset.json` beside them states other labels.
    """
    cases = _check_labelled(cases)
    folder = files.check_path("predictions_dir", predictions_dir)
    found = [(case, _find_prediction(folder, case)) for case in cases]
    missing = [case.id for case, path in found if path is None]
    _raise_for(missing, f"have no prediction (<case id>.nii.gz) in {folder}")
    if (manifest := files.read_manifest(folder)).get("kind") == "predictions":
        states = {case.id: nifti.file_states(case.images.values()) for case in cases}
        stale = [i for i in states if manifest["cases"].get(i) != states[i]]
        problem = "not predicted by this folder's model from these scans: predict again"
        _raise_for(stale, f"{problem} (or they were moved, or their times changed)")
        recorded = {path.name: manifest["files"].get(path.name) for _, path in found}
        edited = files.find_changed(folder, recorded)
        problem = "changed since it was predicted: score it in a folder of its own"
        _raise_for(edited, f"{problem}, or predict again")
    _check_convention(folder, [path for _, path in found])
    return pd.DataFrame([_score_file(path, case, lesions) for case, path in found])


def _decoded_dice(probabilities, truth, decoding):
    """Return the Dice of WT, TC and ET for one case and one decoding."""
    from brats_utils.inference import decode_probabilities  # loads Keras

    predicted = decode_probabilities(probabilities, **decoding)
    return [dice(np.isin(predicted, v), np.isin(truth, v)) for v in REGIONS.values()]


def _candidates(decoding, step):
    """Return decodings that differ in one option: steps 0 to 2 are the thresholds."""
    if step == len(REGIONS):
        return [{**decoding, "min_island": share} for share in MIN_ISLAND]
    if step > len(REGIONS):
        return [{**decoding, "min_et_voxels": n} for n in MIN_ET_VOXELS]
    before, after = decoding["thresholds"][:step], decoding["thresholds"][step + 1 :]
    return [{**decoding, "thresholds": [*before, float(t), *after]} for t in THRESHOLDS]


def tune_decoding(cases):
    """Choose the keywords of `decode_probabilities` by the mean Dice over cases.

    Options are tuned one after the other: the thresholds of WT, TC and ET, then which
    islands to keep, then the smallest volume of enhancing tumour. The gain is measured
    on the same cases, so with few of them it is too optimistic.

    Parameters
    ----------
    cases : iterable of (probabilities, truth)
        (..., K) float as `decode_probabilities` takes them, and (...) integer labels
        0, 1, 2, 4. Only the box with any tumour, true or predicted, stays in memory.

    Returns
    -------
    decoding : dict
        "thresholds", "min_island" and "min_et_voxels", left at 0.5 and 0 where no other
        value is better. Empty if nothing is better than the default decoding of
        `decode_probabilities`.
    gain : pandas.DataFrame
        Mean Dice of WT, TC and ET (rows), "plain" (by default) and "tuned".
    """
    from brats_utils.inference import PLAIN, region_probabilities

    def mean_dice(decoding):  # of WT, TC and ET
        return np.mean([_decoded_dice(*crop, decoding) for crop in crops], axis=0)

    crops, plain = [], []
    files.check_option("cases", cases, iter, "pairs of probabilities and truth")
    for probabilities, truth in cases:
        regions = region_probabilities(probabilities)
        grid, shape = regions.shape[:-1], np.shape(truth)
        expected = f"{grid}, as of its probabilities"
        files.check_option("shape of truth", shape, grid.__eq__, expected)
        encode_labels(truth)  # raises if it holds other values
        # Outside this box there is no tumour, and no candidate predicts any.
        box = bounding_box((regions[..., 0] > THRESHOLDS[0]) | (truth > 0))
        crops.append((np.array(regions[box]), np.array(truth[box])))
        plain.append(_decoded_dice(np.asarray(probabilities)[box], truth[box], {}))
    files.check_option("cases", crops, len, "at least one case to tune on")
    plain = np.mean(plain, axis=0)
    best, tuned = PLAIN, mean_dice(PLAIN)
    for step in range(len(REGIONS) + 2):
        scored = [(mean_dice(each), each) for each in _candidates(best, step)]
        score, candidate = max(scored, key=lambda pair: pair[0].mean())
        if score.mean() > tuned.mean() + LEAST_GAIN:
            best, tuned = candidate, score
    if tuned.mean() <= plain.mean() + LEAST_GAIN:
        best, tuned = {}, plain
    return best, pd.DataFrame({"plain": plain, "tuned": tuned}, index=list(REGIONS))


def _check_writable(trained):
    """Raise unless a model comes from a file in which a description can be stored."""
    path = trained.path
    if not trained.description or path is None or path.suffix != ".keras":
        problem = "is no .keras file with a description, to store a decoding in"
        raise ValueError(f"{path} {problem}")


def store_description(trained):
    """Store a changed description in the model's file.

    Parameters
    ----------
    trained : TrainedModel
        From `load_model`, with a changed description.

    Raises
    ------
    ValueError
        If it has no description or is not from a `.keras` file, like the weights that
        come with the package.
    """
    from brats_utils.model import BEST, DESCRIPTION

    _check_writable(trained)
    path = trained.path
    of_run = path.name == BEST and files.read_manifest(path.parent).get("kind") == "run"
    run = files.OutputFolder(path.parent, "run") if of_run else contextlib.nullcontext()
    # The folder of a run also records the new checksum of its best model.
    with run, run.write(BEST) if of_run else files.atomic_write(path) as temporary:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
            for entry in old.infolist():
                if entry.filename != DESCRIPTION:
                    new.writestr(entry, old.read(entry))
            new.writestr(DESCRIPTION, json.dumps(trained.description, indent=1))


def _was_trained_on(case, description):
    """Return whether a model was trained on a case; by id if it lists no images."""
    images = {*map(str, description.get("train_images", ()))}
    if not images:
        return case.id in description.get("train_cases", ())
    modalities, row = description.get("modalities", ()), {}
    scan = read_scan(case, modalities, labelled=False)
    for name, volume in zip(modalities, scan.volumes, strict=True):
        row[f"{name}_raw_mean"], row[f"{name}_raw_sd"] = nonzero_statistics(volume)
    return bool(name_images(row) & images)


def tune_model(run_dir, cases, **options):
    """Tune the decoding of a trained model on validation cases, and store it.

    Parameters
    ----------
    run_dir : path
        The folder of a run, or a `.keras` file. Its description gets "decoding".
    cases : sequence of Case
        Cases with segmentations that the model was not trained on.
    **options
        `modalities`, `flips` and `patch_shape` of `predict_case`.

    Returns
    -------
    gain : pandas.DataFrame
        See `tune_decoding`.

    Raises
    ------
    ValueError
        If the file has no description, or the model was trained on one of the cases.
        The file is then unchanged.
    """
    from brats_utils.inference import check_options, load_model, predict_scan

    cases = _check_labelled(cases)
    trained = load_model(run_dir)
    check_options([trained], options, ("modalities", "flips", "patch_shape"))
    _check_writable(trained)
    known = [case.id for case in cases if _was_trained_on(case, trained.description)]
    _raise_for(sorted(known), "were used for training; tune on others")

    def predictions():  # one at a time, so that only crops stay in memory
        for case in cases:
            found = predict_scan([trained], case, **options)
            truth = read_scan(case, ()).segmentation
            yield found.probabilities, truth[found.box]

    trained.description["decoding"], gain = tune_decoding(predictions())
    store_description(trained)
    return gain

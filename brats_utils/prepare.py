"""From scans to npy volumes: scale, stack, crop, keep or drop, save, split."""

import contextlib
import importlib.metadata
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import splitfolders
from joblib import Parallel, delayed
from tqdm import tqdm

from brats_utils import __version__
from brats_utils.cases import (
    MODALITIES,
    BratsDataError,
    find_cases,
    load_case,
    read_grid,
    to_lps,
)
from brats_utils.files import write_json, write_npy
from brats_utils.labels import LABELS, encode_labels, region_volumes_ml

# The tutorial recipe's crop of a 240 x 240 x 155 scan, kept to compare with.
FIXED_WINDOW = (slice(56, 184), slice(56, 184), slice(13, 141))
# Voxels along X, Y and Z of the box round a large brain, to estimate disk space with.
TYPICAL_BRAIN_BOX = (145, 180, 150)


def _nonzero_statistics(volume):
    """Return mean and SD of the non-zero voxels, in float64; (0, 1) if none."""
    values = volume[volume != 0]
    if not values.size:
        return 0.0, 1.0
    mean = values.mean(dtype=np.float64)
    return float(mean), float(values.std(dtype=np.float64, mean=mean)) or 1.0


def _offset_and_divisor(volume, method):
    """Return the numbers of the affine step `(volume - offset) / divisor`."""
    if method == "minmax":
        low, high = float(volume.min()), float(volume.max())
        if not high > low:
            raise ValueError(f"a blank volume cannot be scaled: every voxel is {low:g}")
        return low, high - low
    if method == "zscore":
        return _nonzero_statistics(volume)
    raise ValueError(f"method is 'minmax' or 'zscore', not {method!r}")


def scale_volume(volume, method="minmax"):
    """Scale one modality of one scan, the whole volume by the same two numbers.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities; background 0.
    method : {"minmax", "zscore"}
        "minmax" maps the smallest voxel to 0 and the largest to 1, as scikit-learn's
        `MinMaxScaler` does on the volume as one column. "zscore" gives the non-zero
        voxels mean 0 and SD 1 and leaves the others 0.

    Returns
    -------
    scaled : (X, Y, Z) float32 array

    Raises
    ------
    ValueError
        If the volume holds NaN or infinity, "minmax" meets a blank volume, or the
        method is unknown.

    Examples
    --------
    >>> scale_volume(np.array([[[0, 50, 100]]])).tolist()
    [[[0.0, 0.5, 1.0]]]
    """
    volume = np.asarray(volume, np.float32)
    if not np.isfinite(volume).all():
        raise ValueError(
            "the volume holds NaN or infinity; nothing is put in its place"
        )
    offset, divisor = _offset_and_divisor(volume, method)
    scaled = (volume - np.float32(offset)) / np.float32(divisor)
    if method == "zscore":
        scaled[volume == 0] = 0
    return scaled


def standardise(image):
    """Give each channel mean 0 and SD 1 over its non-zero voxels; zeros stay zero.

    This is what a network sees, of a scan to be predicted as of the stored volumes.

    Parameters
    ----------
    image : (X, Y, Z, C) array
        A whole scan, raw intensities; a crop would have other means.

    Returns
    -------
    standardised : (X, Y, Z, C) float32 array
    """
    channels = [
        scale_volume(channel, "zscore") for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def brain_box(image):
    """Return the smallest box that holds all non-zero voxels.

    Parameters
    ----------
    image : (X, Y, Z) or (X, Y, Z, C) array
        Non-zero in any channel counts as brain.

    Returns
    -------
    box : tuple of 3 slices

    Raises
    ------
    ValueError
        If every voxel is zero.
    """
    brain = image.any(axis=-1) if image.ndim == 4 else image != 0
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(brain.any(axis=others))
        if not filled.size:
            raise ValueError("every voxel is zero: there is no brain to crop to")
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def _window_start(tumour, brain, size):
    """Return where a window of `size` holds most tumour, and then most brain.

    `tumour` and `brain` count the voxels of each plane along one axis.
    """
    starts = np.arange(max(1, len(brain) - size + 1))
    for counts in (tumour, brain):
        total = np.concatenate([[0], np.cumsum(counts)])
        held = total[np.minimum(starts + size, len(counts))] - total[starts]
        starts = starts[held == held.max()]
    return int(starts[len(starts) // 2])


def crop_box(image, segmentation=None, shape=(128, 128, 128)):
    """Choose the crop: all of the tumour if it fits, then as much brain as possible.

    Parameters
    ----------
    image : (X, Y, Z) or (X, Y, Z, C) array
        Background is 0.
    segmentation : (X, Y, Z) integer array, optional
        Non-zero is tumour. Without it only the brain counts.
    shape : tuple of 3 int or None
        Voxels along X, Y and Z. An axis shorter than that is taken whole. None gives
        the brain's whole box.

    Returns
    -------
    box : tuple of 3 slices

    Raises
    ------
    ValueError
        If every voxel of the image is zero, or `shape` is not three positive numbers.
    """
    if shape is None:
        return brain_box(image)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape is three positive numbers or None, not {shape}")
    brain = image.any(axis=-1) if image.ndim == 4 else image != 0
    if not brain.any():
        raise ValueError("every voxel is zero: there is no brain to crop to")
    tumour = np.zeros_like(brain) if segmentation is None else segmentation != 0
    box = []
    for axis, size in enumerate(shape):
        others = tuple(a for a in range(3) if a != axis)
        start = _window_start(tumour.sum(axis=others), brain.sum(axis=others), size)
        box.append(slice(start, min(start + size, brain.shape[axis])))
    return tuple(box)


def _pad_to(volume, shape, value):
    """Pad the spatial axes at their ends up to `shape`, where they are shorter."""
    if shape is None:
        return volume
    widths = [
        (0, max(0, n - have)) for n, have in zip(shape, volume.shape, strict=False)
    ]
    return np.pad(volume, widths, constant_values=value)


def _store_channel(volume, box, crop_shape, scaling):
    """Return one modality's crop as float16, with its statistics in stored units."""
    offset, divisor = _offset_and_divisor(volume, scaling)
    mean, sd = _nonzero_statistics(volume)
    # Where the smallest voxel is 0, as in all skull-stripped sets, this is 0.
    zero = 0.0 if scaling == "zscore" else (0 - offset) / divisor
    crop = (volume[box] - np.float32(offset)) / np.float32(divisor)
    if scaling == "zscore":
        crop[volume[box] == 0] = 0
    crop = _pad_to(crop, crop_shape, zero).astype(np.float16)
    return crop, {"mean": (mean - offset) / divisor, "sd": sd / divisor, "zero": zero}


def _losses(segmentation, box):
    """Return how much tumour the crop and the tutorial recipe's window leave out."""
    tumour = np.count_nonzero(segmentation)
    lost = tumour - np.count_nonzero(segmentation[box])
    window_lost = tumour - np.count_nonzero(segmentation[FIXED_WINDOW])
    return {
        "lost_voxels": lost,
        "lost_share": lost / max(1, tumour),
        "window_lost_share": window_lost / max(1, tumour),
    }


def prepare_case(
    case,
    out,
    *,
    crop_shape=(128, 128, 128),
    min_labelled=0.01,
    modalities=MODALITIES,
    scaling="minmax",
):
    """Scale, stack, crop and save one case, unless too little of it is labelled.

    Parameters
    ----------
    case : Case
        With a segmentation.
    out : path
        Gets `images/<case>.npy`, float16 (X, Y, Z, C), and `masks/<case>.npy`, uint8
        (X, Y, Z) with labels 0 to 3; in LPS order.
    crop_shape, min_labelled, modalities, scaling
        As in `prepare_dataset`.

    Returns
    -------
    row : dict
        What `cases.csv` says of the case: kept or not and why, the labelled share of
        the crop, tumour voxels that the crop and the tutorial recipe's fixed window
        lose, the regions' volumes, and for each channel the mean and SD of the whole
        scan's non-zero voxels and the value of background, in stored units.

    Raises
    ------
    BratsDataError
        If the case has no segmentation, or its files are not sound.
    """
    if case.segmentation is None:
        raise BratsDataError("no segmentation: it can only be predicted", case=case.id)
    image, segmentation, affine = load_case(case, modalities)
    image, segmentation = to_lps(image, affine), to_lps(segmentation, affine)
    box = crop_box(image, segmentation, crop_shape)
    mask = _pad_to(encode_labels(segmentation[box]), crop_shape, 0)
    share = np.count_nonzero(mask) / mask.size
    row = {
        "case": case.id,
        "kept": share >= min_labelled,
        "reason": "" if share >= min_labelled else f"labelled below {min_labelled:g}",
        "labelled_share": share,
        **_losses(segmentation, box),
        "shape": "x".join(map(str, mask.shape)),
    }
    volumes = region_volumes_ml(segmentation, read_grid(case)[2])
    row |= {f"{region}_ml": ml for region, ml in volumes.items()}
    channels = []
    for index, modality in enumerate(modalities):
        crop, statistics = _store_channel(image[..., index], box, crop_shape, scaling)
        channels.append(crop)
        row |= {f"{modality}_{name}": value for name, value in statistics.items()}
    if row["kept"]:
        write_npy(Path(out) / "images" / f"{case.id}.npy", np.stack(channels, axis=-1))
        write_npy(Path(out) / "masks" / f"{case.id}.npy", mask)
    return row


def estimate_disk_gb(n_cases, *, crop_shape=(128, 128, 128), modalities=MODALITIES):
    """Return the space that prepared cases take, in GB (10⁹ bytes).

    Parameters
    ----------
    n_cases : int
        How many are kept.
    crop_shape : tuple of 3 int or None
        None counts with a typical brain's box.
    modalities : sequence of str
        The channels, two bytes a voxel each; the mask takes one.

    Returns
    -------
    gigabytes : float

    Examples
    --------
    >>> round(estimate_disk_gb(369), 1)
    5.4
    """
    voxels = float(np.prod(crop_shape or TYPICAL_BRAIN_BOX))
    return n_cases * voxels * (2 * len(modalities) + 1) / 1e9


def _attempt(case, out, options):
    """Prepare a case; return its row, or the error with it."""
    try:
        return prepare_case(case, out, **options)
    except BratsDataError as error:
        return error


def _prepare_all(cases, out, options, jobs):
    """Prepare cases in threads; return their rows, or raise one error for all."""
    work = Parallel(jobs or os.cpu_count(), prefer="threads", return_as="generator")(
        delayed(_attempt)(case, out, options) for case in cases
    )
    # To stdout, as text: a widget's last state is lost when a notebook is saved.
    bar = {"total": len(cases), "desc": "preparing", "unit": "case"}
    rows = list(tqdm(work, file=sys.stdout, **bar))
    errors = [str(row) for row in rows if isinstance(row, BratsDataError)]
    if errors:
        raise BratsDataError(f"{len(errors)} cases are not sound: " + " ".join(errors))
    return rows


def _settings(raw, cases, options):
    """Return what `settings.json` holds: of what and how the volumes were made."""
    if isinstance(raw, list):
        raw = os.path.commonpath([case.images["flair"] for case in raw])
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "nibabel")}
    return {
        "raw": str(Path(raw).resolve()),
        **options,
        "labels": cases[0].labels,
        "label_map": {str(value): i for i, value in enumerate(LABELS)},
        "versions": {"brats_utils": __version__, **packages},
    }


def prepare_dataset(
    raw,
    out,
    *,
    crop_shape=(128, 128, 128),
    min_labelled=0.01,
    modalities=MODALITIES,
    scaling="minmax",
    jobs=None,
):
    """Prepare all cases of a folder; what an earlier call left in `out` is replaced.

    Parameters
    ----------
    raw : path or list of Case
        The downloaded set, or the cases that `find_cases` found in it.
    out : path
        Gets `images/`, `masks/`, `cases.csv` and `settings.json`.
    crop_shape : tuple of 3 int or None
        Voxels to keep, see `crop_box`; None keeps the brain's whole box.
    min_labelled : float
        A case is dropped where a smaller share of its crop is labelled.
    modalities : sequence of str
        The channels, in order.
    scaling : {"minmax", "zscore"}
        See `scale_volume`.
    jobs : int, optional
        Cases prepared at once, in threads; as many as there are cores by default. A
        surrounding `joblib.parallel_config` decides where they run.

    Returns
    -------
    report : pandas.DataFrame
        A row for each case, those without segmentation included, as not kept.

    Raises
    ------
    BratsDataError
        If no case has a segmentation, or files are not sound: one error lists them all.
    """
    cases = raw if isinstance(raw, list) else find_cases(raw)
    labelled = [case for case in cases if case.segmentation]
    if not labelled:
        raise BratsDataError(f"none of {len(cases)} cases has a segmentation to learn")
    out = Path(out)
    for name in ("images", "masks"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    options = {
        "crop_shape": crop_shape,
        "min_labelled": min_labelled,
        "modalities": tuple(modalities),
        "scaling": scaling,
    }
    rows = _prepare_all(labelled, out, options, jobs)
    unlabelled = [case.id for case in cases if not case.segmentation]
    rows += [
        {"case": i, "kept": False, "reason": "no segmentation"} for i in unlabelled
    ]
    report = pd.DataFrame(rows).sort_values("case", ignore_index=True)
    report.to_csv(out / "cases.csv", index=False)
    write_json(out / "settings.json", _settings(raw, cases, options))
    return report


def _choose_sides(case_ids, ratio, seed, workspace):
    """Return {"train": ids, "val": ids} as splitfolders chooses them."""
    # It copies files, so it is given empty ones: it decides, and no data moves.
    for kind in ("images", "masks"):
        (workspace / "staging" / kind).mkdir(parents=True)
        for case_id in case_ids:
            (workspace / "staging" / kind / f"{case_id}.npy").touch()
    chosen = workspace / "chosen"
    with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
        splitfolders.ratio(
            workspace / "staging", chosen, seed=seed, ratio=ratio, group="sibling"
        )
    return {
        side: sorted(path.stem for path in (chosen / side / "masks").glob("*.npy"))
        for side in ("train", "val")
    }


def _link_side(prepared, case_ids, folder, final):
    """Fill one side of a split, built in `folder` and meant to lie in `final`."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for case_id in case_ids:
            source = prepared.resolve() / kind / f"{case_id}.npy"
            link = folder / kind / source.name
            try:
                link.symlink_to(os.path.relpath(source, final.resolve() / kind))
            except OSError:  # Windows without the right to link, some network drives
                shutil.copyfile(source, link)
    report = pd.read_csv(prepared / "cases.csv", dtype={"case": str})
    report[report["case"].isin(case_ids)].to_csv(folder / "cases.csv", index=False)
    shutil.copyfile(prepared / "settings.json", folder / "settings.json")


def split_dataset(prepared, out, *, ratio=(0.75, 0.25), seed=42):
    """Split prepared cases into train and val with splitfolders, image and mask as one.

    Parameters
    ----------
    prepared : path
        What `prepare_dataset` wrote.
    out : path
        Gets `train/` and `val/`, each with `images/`, `masks/` (links, or copies where
        the system cannot link) and its rows of `cases.csv` and `settings.json`. A
        former split there is replaced whole, never added to.
    ratio : tuple of 2 float
        Shares of train and val; they sum to 1.
    seed : int
        Same seed and cases, same split.

    Returns
    -------
    ids : dict
        {"train": case ids, "val": case ids}, sorted.

    Raises
    ------
    BratsDataError
        If an image lacks its mask or the reverse, or a side would be empty.
    """
    prepared, out = Path(prepared), Path(out)
    images, masks = (
        {p.stem for p in (prepared / kind).glob("*.npy")}
        for kind in ("images", "masks")
    )
    if images ^ masks:
        raise BratsDataError(
            f"image without mask, or mask without image: {sorted(images ^ masks)[:5]}",
            file=prepared,
            advice="Run prepare_dataset again",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".split-", dir=out.parent) as workspace:
        workspace = Path(workspace)
        enough = len(images) > 1
        ids = _choose_sides(sorted(images), ratio, seed, workspace) if enough else {}
        if not (ids.get("train") and ids.get("val")):
            raise BratsDataError(
                f"{len(images)} kept cases cannot be split {ratio}: a side stays empty",
                file=prepared,
                advice="Give more cases, or lower min_labelled",
            )
        for side, case_ids in ids.items():
            _link_side(prepared, case_ids, workspace / "new" / side, out / side)
        if out.exists():
            out.rename(workspace / "old")
        (workspace / "new").rename(out)
    return ids

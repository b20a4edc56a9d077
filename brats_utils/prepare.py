"""From scans to npy volumes: scale, stack, crop, keep or drop, save."""

import errno
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from tqdm import tqdm

from brats_utils import __version__
from brats_utils.cases import (
    MODALITIES,
    BratsDataError,
    check_cases,
    find_cases,
    read_case,
)
from brats_utils.dataset import (
    KINDS,
    MARKERS,
    REPORT,
    SETTINGS,
    all_there,
    find_patients,
    read_marker,
    split_dataset,
)
from brats_utils.files import atomic_write, free_gb, sha256, write_json, write_npy
from brats_utils.labels import LABELS, encode_labels, region_volumes_ml
from brats_utils.layouts import short_name
from brats_utils.nifti import spacing_mm, to_lps
from brats_utils.transforms import (
    FIXED_WINDOW,
    bounding_box,
    brain_mask,
    check_shape,
    crop_box,
    crop_losses,
    pad_to,
    scale_volume,
    standardise,
    store_channel,
)

__all__ = [
    "FIXED_WINDOW",
    "crop_box",
    "estimate_disk_gb",
    "prepare_case",
    "prepare_dataset",
    "scale_volume",
    "split_dataset",
    "standardise",
]
# Voxels along X, Y and Z of the box round a large brain, to estimate disk space with.
TYPICAL_BRAIN_BOX = (145, 180, 150)
# More of the tumour than this outside our own crop is worth a warning.
LOSS_TO_WARN_OF = 0.05


def _made_of(case, options):
    """Return what a prepared case depends on: settings, version, its files' state."""
    paths = [*(case.images[m] for m in options["modalities"]), case.segmentation]
    stats = {short_name(path): path.stat() for path in paths}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    made_of = {**options, "labels": case.labels, "version": __version__, "files": files}
    return json.loads(json.dumps(made_of))


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

    A case that was finished before is left as it is, unless its files, the settings or
    this package have changed since.

    Parameters
    ----------
    case : Case
        With a segmentation.
    out : path
        Gets `images/<case>.npy`, float16 (X, Y, Z, C), and `masks/<case>.npy`, uint8
        (X, Y, Z) with labels 0 to 3, in LPS order; last `finished/<case>.json`.
    crop_shape, min_labelled, modalities, scaling
        As in `prepare_dataset`.

    Returns
    -------
    row : dict
        What `cases.csv` says of the case: kept or not and why, the labelled share of
        the crop, tumour voxels that the crop and the tutorial recipe's fixed window
        lose, the regions' volumes, for each channel the mean and SD of the whole
        scan's non-zero voxels and the value of background, in stored units, and the
        SHA-256 of image and mask.

    Raises
    ------
    BratsDataError
        If the case has no segmentation, or its files are not sound.
    """
    if case.segmentation is None:
        raise BratsDataError("no segmentation: it can only be predicted", case=case.id)
    out = Path(out)
    options = dict(crop_shape=crop_shape, min_labelled=min_labelled)
    options |= dict(modalities=tuple(modalities), scaling=scaling)
    marker, made_of = out / MARKERS / f"{case.id}.json", _made_of(case, options)
    before = read_marker(marker)
    if _is_finished(before, made_of, out):
        return before["row"]
    marker.unlink(missing_ok=True)
    image, mask, row, checksums = _crop_and_measure(case, options)
    if before.get("checksums", checksums) != checksums:
        print(f"{case.id}: its files have changed since it was prepared; prepared anew")
    sizes = {}
    for kind, volume in zip(KINDS, (image, mask), strict=True):
        path = out / kind / f"{case.id}.npy"
        if row["kept"]:
            write_npy(path, volume)
            sizes[f"{kind}/{path.name}"] = path.stat().st_size
            row[f"{kind}_sha256"] = sha256(path)
        else:
            path.unlink(missing_ok=True)
    done = {"made_of": made_of, "checksums": checksums, "sizes": sizes, "row": row}
    write_json(marker, done)
    return row


def _is_finished(done, made_of, out):
    """Tell whether what a marker notes is what is wanted, and is still there."""
    return done.get("made_of") == made_of and all_there(out, done["sizes"])


def _crop_and_measure(case, options):
    """Return a case's image and mask as stored, its report row, its files' SHA-256."""
    crop_shape, min_labelled = options["crop_shape"], options["min_labelled"]
    volumes, segmentation, affine, checksums = read_case(case, options["modalities"])
    volumes = [to_lps(volume, affine) for volume in volumes]
    segmentation = to_lps(segmentation, affine)
    box = crop_box(brain_mask(volumes), segmentation, crop_shape)
    mask = pad_to(encode_labels(segmentation[box]), crop_shape, 0)
    share = int(np.count_nonzero(mask)) / mask.size
    losses = crop_losses(segmentation, box)
    note = "" if segmentation.any() else "no voxel is labelled"
    if losses["lost_share"] > LOSS_TO_WARN_OF:
        note = f"the crop leaves out {losses['lost_share']:.0%} of the tumour"
    row = {
        "case": case.id,
        "kept": share >= min_labelled,
        "reason": "" if share >= min_labelled else f"labelled below {min_labelled:g}",
        "note": note,
        "labelled_share": share,
        **losses,
        "shape": "x".join(map(str, mask.shape)),
    }
    tumour = segmentation[bounding_box(segmentation)]
    sizes_ml = region_volumes_ml(tumour, spacing_mm(affine))
    row |= {f"{region}_ml": ml for region, ml in sizes_ml.items()}
    channels = []
    for modality, volume in zip(options["modalities"], volumes, strict=True):
        channel, found = store_channel(volume, box, crop_shape, options["scaling"])
        channels.append(channel)
        row |= {f"{modality}_{name}": value for name, value in found.items()}
    return _interleave(channels), np.ascontiguousarray(mask), row, checksums


def _interleave(channels):
    """Return volumes (X, Y, Z) of one type as one (X, Y, Z, C), in C order."""
    image = np.stack([channel.T for channel in channels], axis=-1)  # (Z, Y, X, C)
    # All channels of a voxel as one item: turned in half the time.
    voxels = image.view(f"V{image.itemsize * len(channels)}")[..., 0].T
    return np.ascontiguousarray(voxels)[..., None].view(image.dtype)


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
    check_shape(crop_shape)
    voxels = float(np.prod(crop_shape or TYPICAL_BRAIN_BOX))
    return n_cases * voxels * (2 * len(modalities) + 1) / 1e9


def _attempt(case, out, options):
    """Prepare a case; return its row, or the error with it."""
    try:
        return prepare_case(case, out, **options)
    except BratsDataError as error:
        return error


def _prepare_all(cases, out, options, jobs):
    """Prepare cases in threads; return a row or an error for each."""
    work = Parallel(jobs or os.cpu_count(), prefer="threads", return_as="generator")(
        delayed(_attempt)(case, out, options) for case in cases
    )
    # To stdout, as text: a widget's last state is lost when a notebook is saved.
    bar = {"total": len(cases), "desc": "preparing", "unit": "case"}
    try:
        return list(tqdm(work, file=sys.stdout, **bar))
    except KeyboardInterrupt:
        n_done = len(list((out / MARKERS).glob("*.json")))
        print(f"{n_done} of {len(cases)} cases are done; run again to go on")
        raise


def _check_space(cases, out, options):
    """Raise unless the disk has room for what unfinished cases add to what is there."""
    n_new = n_bytes = 0
    for case in cases:
        done = read_marker(out / MARKERS / f"{case.id}.json")
        if not _is_finished(done, _made_of(case, options), out):
            n_new += 1
            n_bytes += sum(done.get("sizes", {}).values())
    sizes = {name: options[name] for name in ("crop_shape", "modalities")}
    needed = estimate_disk_gb(n_new, **sizes) - n_bytes / 1e9
    if needed > free_gb(out):
        raise OSError(
            errno.ENOSPC,
            f"{n_new} cases need some {needed:.1f} GB, and {free_gb(out):.1f} GB are "
            "free; nothing was written. Make room, or choose another folder",
            str(out),
        )


def _remove_others(out, rows):
    """Remove what a former call left of cases that are in no row, or not kept."""
    kept = {row["case"] for row in rows if row["kept"]}
    prepared = {row["case"] for row in rows}
    for folder, ids in ((MARKERS, prepared), *((kind, kept) for kind in KINDS)):
        for path in (out / folder).iterdir():
            if path.stem not in ids:
                path.unlink()


def _settings(raw, cases, options):
    """Return what `settings.json` holds: of what and how the volumes were made."""
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "nibabel")}
    return {
        "raw": str(Path(raw).resolve()),
        **options,
        "labels": cases[0].labels,
        "label_map": {str(value): i for i, value in enumerate(LABELS)},
        "versions": {"brats_utils": __version__, **packages},
    }


def _find(raw, labels):
    """Return the folder, its cases, and those of them that have a segmentation."""
    cases = raw if isinstance(raw, list) else find_cases(raw, labels=labels)
    if isinstance(raw, list):
        raw = os.path.commonpath([case.images["flair"].parent for case in raw])
    labelled = [case for case in cases if case.segmentation]
    if not labelled:
        raise BratsDataError(f"none of {len(cases)} cases has a segmentation to learn")
    return raw, cases, labelled


def prepare_dataset(
    raw,
    out,
    *,
    crop_shape=(128, 128, 128),
    min_labelled=0.01,
    modalities=MODALITIES,
    scaling="minmax",
    jobs=None,
    skip_bad=False,
    labels="auto",
):
    """Prepare all cases of a folder; a call that was stopped goes on where it was.

    Names, headers and lengths of all files are checked before anything is written.
    Cases finished by a former call stay, unless their files, the settings or this
    package have changed; `cases.csv` and `settings.json` are there only once all cases
    are done alike.

    Parameters
    ----------
    raw : path or list of Case
        The downloaded set, or the cases that `find_cases` found in it.
    out : path
        Gets `images/`, `masks/`, `finished/`, `cases.csv` and `settings.json`.
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
    skip_bad : bool
        Leave unsound cases out, with the reason in the report, instead of raising.
    labels : {"auto", "0124", "0123", "0213"}
        As in `find_cases`, which reads all label maps to decide if not told.

    Returns
    -------
    report : pandas.DataFrame
        A row for each case, those without segmentation included, as not kept.

    Raises
    ------
    BratsDataError
        If no case has a segmentation, or files are not sound: one error lists them all.
    OSError
        If the disk has no room for the result.
    """
    raw, cases, labelled = _find(raw, labels)
    out = Path(out)
    options = dict(crop_shape=crop_shape, min_labelled=min_labelled)
    options |= dict(modalities=tuple(modalities), scaling=scaling)
    bad = _bad_headers(labelled)
    if bad and not skip_bad:
        _refuse(bad)
    sound = [case for case in labelled if case.id not in bad]
    _check_space(sound, out, options)
    for name in (REPORT, SETTINGS):  # nobody shall use what is only half done
        (out / name).unlink(missing_ok=True)
    for folder in (MARKERS, *KINDS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows = _prepare_all(sound, out, options, jobs)
    bad |= {e.case: str(e) for e in rows if isinstance(e, BratsDataError)}
    if bad and not skip_bad:
        _refuse(bad)
    rows = [row for row in rows if isinstance(row, dict)]
    _remove_others(out, rows)
    report = _report(rows, cases, bad)
    report.insert(1, "patient", report["case"].map(find_patients(cases, raw)))
    with atomic_write(out / REPORT) as temporary:
        report.to_csv(temporary, index=False)
    write_json(out / SETTINGS, _settings(raw, labelled, options))
    return report


def _report(rows, cases, bad):
    """Return the rows of prepared cases and those of the others, by id."""
    reasons = {case.id: "no segmentation" for case in cases if not case.segmentation}
    reasons |= {case_id: f"not sound: {text}" for case_id, text in bad.items()}
    rows += [{"case": i, "kept": False, "reason": why} for i, why in reasons.items()]
    return pd.DataFrame(rows).sort_values("case", ignore_index=True)


def _bad_headers(cases):
    """Return {case id: all that names, headers and lengths show to be wrong}."""
    problems = check_cases(cases, voxels=False)
    lines = (
        problems["file"] + ": " + problems["problem"] + ". " + problems["what to do"]
    )
    return lines.groupby(problems["case"]).agg("; ".join).to_dict()


def _refuse(bad):
    """Raise one error for all unsound cases, {id: what is wrong}."""
    raise BratsDataError(
        f"not sound ({len(bad)}): " + " | ".join(bad.values()).rstrip("."),
        advice="Mend them, or leave them out by skip_bad=True in prepare_dataset's "
        "options; check_cases lists all that is wrong, inside the files too",
    )

"""From scans to npy volumes: scale, stack, crop, keep or drop, save, split."""

import contextlib
import errno
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
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
    check_cases,
    find_cases,
    read_case,
)
from brats_utils.files import (
    atomic_write,
    free_gb,
    read_json,
    sha256,
    write_json,
    write_npy,
)
from brats_utils.labels import LABELS, encode_labels, region_volumes_ml
from brats_utils.nifti import spacing_mm, to_lps
from brats_utils.transforms import (
    FIXED_WINDOW,
    brain_box,
    crop_box,
    nonzero_statistics,
    offset_and_divisor,
    scale_volume,
    standardise,
)

__all__ = [
    "FIXED_WINDOW",
    "brain_box",
    "crop_box",
    "estimate_disk_gb",
    "prepare_case",
    "prepare_dataset",
    "scale_volume",
    "split_dataset",
    "standardise",
    "verify_dataset",
]
# Voxels along X, Y and Z of the box round a large brain, to estimate disk space with.
TYPICAL_BRAIN_BOX = (145, 180, 150)
KINDS, REPORT, SETTINGS, MARKERS = (
    ("images", "masks"),
    "cases.csv",
    "settings.json",
    "finished",
)
PREPARE_AGAIN = "Run prepare_dataset (notebook 01) again"
# More of the tumour than this outside our own crop is worth a warning.
LOSS_TO_WARN_OF = 0.05
# A patient's id, before the number of the visit: BraTS 2017-2019, and since 2023.
_VISITS = re.compile(r"(BraTS1[789]_.+_\d+)_\d+|(BraTS-\w+-\d+)-\d+", re.I)


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
    offset, divisor = offset_and_divisor(volume, scaling)
    mean, sd = nonzero_statistics(volume)
    # Where the smallest voxel is 0, as in all skull-stripped sets, this is 0.
    zero = 0.0 if scaling == "zscore" else (0 - offset) / divisor
    crop = (volume[box] - np.float32(offset)) / np.float32(divisor)
    if scaling == "zscore":
        crop[volume[box] == 0] = 0
    crop = _pad_to(crop, crop_shape, zero).astype(np.float16)
    return crop, {"mean": (mean - offset) / divisor, "sd": sd / divisor, "zero": zero}


def _losses(segmentation, box):
    """Return how much tumour the crop and the tutorial recipe's window leave out."""
    tumour, held, in_window = (
        int(np.count_nonzero(part))
        for part in (segmentation, segmentation[box], segmentation[FIXED_WINDOW])
    )
    return {
        "lost_voxels": tumour - held,
        "lost_share": (tumour - held) / max(1, tumour),
        "window_lost_share": (tumour - in_window) / max(1, tumour),
    }


def _made_of(case, options):
    """Return what a prepared case depends on: settings, version, its files' state."""
    paths = [*(case.images[m] for m in options["modalities"]), case.segmentation]
    stats = {path.name: path.stat() for path in paths}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    made_of = {**options, "labels": case.labels, "version": __version__, "files": files}
    return json.loads(json.dumps(made_of))


def _read_marker(path):
    """Return what the marker of a finished case says, or None if it is none."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(path)


def _all_there(out, sizes):
    """Return whether files of these sizes, {relative path: bytes}, lie in a folder."""
    paths = {out / name: size for name, size in sizes.items()}
    return all(p.is_file() and p.stat().st_size == n for p, n in paths.items())


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
    options = {
        "crop_shape": crop_shape,
        "min_labelled": min_labelled,
        "modalities": modalities,
        "scaling": scaling,
    }
    marker, made_of = out / MARKERS / f"{case.id}.json", _made_of(case, options)
    before = _read_marker(marker) or {}
    if before.get("made_of") == made_of and _all_there(out, before["sizes"]):
        return before["row"]
    marker.unlink(missing_ok=True)
    image, mask, row, checksums = _crop_and_measure(case, options)
    if before and before["checksums"] != checksums:
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


def _crop_and_measure(case, options):
    """Return a case's image and mask as stored, its report row, its files' SHA-256."""
    crop_shape, min_labelled = options["crop_shape"], options["min_labelled"]
    image, segmentation, affine, checksums = read_case(case, options["modalities"])
    image, segmentation = to_lps(image, affine), to_lps(segmentation, affine)
    box = crop_box(image, segmentation, crop_shape)
    mask = _pad_to(encode_labels(segmentation[box]), crop_shape, 0)
    share = int(np.count_nonzero(mask)) / mask.size
    losses = _losses(segmentation, box)
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
    volumes = region_volumes_ml(segmentation, spacing_mm(affine))
    row |= {f"{region}_ml": ml for region, ml in volumes.items()}
    channels = []
    for index, modality in enumerate(options["modalities"]):
        crop, statistics = _store_channel(
            image[..., index], box, crop_shape, options["scaling"]
        )
        channels.append(crop)
        row |= {f"{modality}_{name}": value for name, value in statistics.items()}
    return np.stack(channels, axis=-1), mask, row, checksums


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
    """Raise unless the disk has room for the cases that are not finished yet."""
    n_new = sum(not (out / MARKERS / f"{case.id}.json").exists() for case in cases)
    shape, modalities = options["crop_shape"], options["modalities"]
    needed = estimate_disk_gb(n_new, crop_shape=shape, modalities=modalities)
    if needed > free_gb(out):
        raise OSError(
            errno.ENOSPC,
            f"{n_new} cases need some {needed:.1f} GB, and {free_gb(out):.1f} GB are "
            "free; nothing was written. Make room, or choose another folder",
            str(out),
        )


def _patients(cases, raw):
    """Return {case id: patient}: by name_mapping.csv, by a visit's number, or the id.

    A patient scanned twice must not be learnt from and tested on.
    """
    patients = {}
    for case in cases:
        visit = _VISITS.fullmatch(case.id)
        patients[case.id] = (visit[1] or visit[2]) if visit else case.id
    for path in sorted(Path(raw).rglob("name_mapping*.csv")):
        for row in pd.read_csv(path, dtype=str).to_dict("records"):
            name = row.get("TCGA_TCIA_subject_ID")
            same = [value for value in row.values() if value in patients]
            patients |= {case_id: name for case_id in same if isinstance(name, str)}
    return patients


def _remove_others(out, kept):
    """Remove volumes and markers of cases that a former call left."""
    for kind in KINDS:
        for path in (out / kind).iterdir():
            if path.stem not in kept:
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
    cases = raw if isinstance(raw, list) else find_cases(raw)
    if isinstance(raw, list):
        raw = os.path.commonpath([case.images["flair"] for case in raw])
    labelled = [case for case in cases if case.segmentation]
    if not labelled:
        raise BratsDataError(f"none of {len(cases)} cases has a segmentation to learn")
    out = Path(out)
    options = {
        "crop_shape": crop_shape,
        "min_labelled": min_labelled,
        "modalities": tuple(modalities),
        "scaling": scaling,
    }
    bad = _bad_headers(labelled)
    if bad and not skip_bad:
        _refuse(bad)
    sound = [case for case in labelled if case.id not in bad]
    _check_space(sound, out, options)
    for name in (REPORT, SETTINGS):  # nobody shall use what is only half done
        (out / name).unlink(missing_ok=True)
    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    rows = _prepare_all(sound, out, options, jobs)
    bad |= {e.case: str(e) for e in rows if isinstance(e, BratsDataError)}
    if bad and not skip_bad:
        _refuse(bad)
    rows = [row for row in rows if isinstance(row, dict)]
    _remove_others(out, {row["case"] for row in rows if row["kept"]})
    reasons = {case.id: "no segmentation" for case in cases if not case.segmentation}
    reasons |= {case_id: f"not sound: {text}" for case_id, text in bad.items()}
    rows += [{"case": i, "kept": False, "reason": why} for i, why in reasons.items()]
    report = pd.DataFrame(rows).sort_values("case", ignore_index=True)
    report.insert(1, "patient", report["case"].map(_patients(cases, raw)))
    with atomic_write(out / REPORT) as temporary:
        report.to_csv(temporary, index=False)
    write_json(out / SETTINGS, _settings(raw, labelled, options))
    return report


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
        f"{len(bad)} cases are not sound: " + " | ".join(bad.values()),
        advice="Mend them, or leave them out with skip_bad=True",
    )


def verify_dataset(prepared):
    """Compare each prepared volume, and each scan it was made of, with its checksum.

    Parameters
    ----------
    prepared : path
        What `prepare_dataset` wrote.

    Returns
    -------
    problems : pandas.DataFrame
        A row for each file that is missing or has changed: "case", "file", "problem".
        Scans that are no longer where they were are passed over.
    """
    prepared, rows = Path(prepared), []
    raw = Path(read_json(prepared / SETTINGS)["raw"])
    scans = {path.name: path for path in raw.rglob("*.nii*")}
    for marker in sorted((prepared / MARKERS).glob("*.json")):
        done = read_json(marker)
        noted = {scans[n]: v for n, v in done["checksums"].items() if n in scans}
        for name in done["sizes"]:
            noted[prepared / name] = done["row"][f"{name.split('/')[0]}_sha256"]
        for path, checksum in noted.items():
            if not path.is_file():
                rows.append((marker.stem, str(path), "is missing"))
            elif sha256(path) != checksum:
                rows.append((marker.stem, str(path), "changed since it was prepared"))
    return pd.DataFrame(rows, columns=["case", "file", "problem"])


def _sides(report, ratio, seed, workspace):
    """Return {"train": ids, "val": ids} as splitfolders chooses among patients."""
    # Two cases with the same voxels are one patient, whatever their names.
    first = report.groupby("images_sha256")["patient"].transform("first")
    same = dict(zip(report["patient"], first, strict=True))
    groups = report["case"].groupby(report["patient"].map(same), sort=False).agg(list)
    # It copies files, so it is given empty ones: it decides, and no data moves.
    for kind in KINDS:
        (workspace / "staging" / kind).mkdir(parents=True)
        for number in range(len(groups)):
            (workspace / "staging" / kind / f"{number:06}.npy").touch()
    chosen = workspace / "chosen"
    with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
        splitfolders.ratio(
            workspace / "staging", chosen, seed=seed, ratio=ratio, group="sibling"
        )
    return {
        side: sorted(
            case_id
            for path in (chosen / side / "masks").glob("*.npy")
            for case_id in groups.iloc[int(path.stem)]
        )
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


def _kept(prepared):
    """Return the report's rows of the cases that are there, pairs and all."""
    if not ((prepared / REPORT).is_file() and (prepared / SETTINGS).is_file()):
        raise BratsDataError(
            "no finished preparation here", file=prepared, advice=PREPARE_AGAIN
        )
    report = pd.read_csv(prepared / REPORT, dtype={"case": str, "patient": str})
    report = report[report["kept"]]
    for kind in KINDS:
        odd = {p.stem for p in (prepared / kind).glob("*.npy")} ^ set(report["case"])
        if odd:
            raise BratsDataError(
                f"{kind} and {REPORT} disagree, so image without mask or a stray file: "
                f"{sorted(odd)[:5]}",
                file=prepared,
                advice=PREPARE_AGAIN,
            )
    return report


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
    report = _kept(prepared)
    workspace = out.parent / f".{out.name}-new"
    shutil.rmtree(workspace, ignore_errors=True)  # of a call that was killed
    workspace.mkdir(parents=True)
    try:
        enough = report["patient"].nunique() > 1
        ids = _sides(report, ratio, seed, workspace) if enough else {}
        if not (ids.get("train") and ids.get("val")):
            raise BratsDataError(
                f"{len(report)} kept cases of {report['patient'].nunique()} patients "
                f"cannot be split {ratio}: a side stays empty",
                file=prepared,
                advice="Give more cases, or lower min_labelled",
            )
        for side, case_ids in ids.items():
            _link_side(prepared, case_ids, workspace / "new" / side, out / side)
        if out.exists():
            out.rename(workspace / "old")
        (workspace / "new").rename(out)
    finally:
        shutil.rmtree(workspace)
    return ids

"""Convert scans to npy volumes: scale, stack, crop, select and save."""

import errno
import lzma
import math
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from brats_utils import __version__, files, labels, volumes
from brats_utils.cases import check_cases, check_distinct, find_cases, read_scan
from brats_utils.nifti import BratsDataError, check_spacing, file_states, spacing_mm
from brats_utils.split import KINDS, find_patients

REPORT = "cases.csv"
# Voxels along X, Y and Z of the box around a large brain, for estimating disk space.
TYPICAL_BRAIN_BOX = (145, 180, 150)
# Errors that zipfile raises for damaged archives.
_BAD = EOFError, OSError, UnicodeError, lzma.LZMAError, zipfile.BadZipFile, zlib.error
LOSS_TO_WARN_OF = 0.05  # share of the tumour outside our own crop


def _check_options(crop_shape, modalities, min_labelled=0, scaling="minmax"):
    """Check the options of a preparation, and return them as JSON values."""
    check, scalings = files.check_option, volumes.SCALINGS
    volumes.check_shape(crop_shape)
    check("min_labelled", min_labelled, *files.number(0, 1))
    check("scaling", scaling, scalings.__contains__, f"one of {scalings}")
    fit, known = labels.are_modalities, f"some of {labels.ALL_MODALITIES}, each once"
    check("modalities", modalities, lambda names: len(names) and fit(names), known)
    crop = None if crop_shape is None else [int(n) for n in crop_shape]
    options = {"crop_shape": crop, "min_labelled": float(min_labelled)}
    return {**options, "modalities": list(modalities), "scaling": scaling}


def _made_of(case, options):
    """Return what a prepared case depends on: settings, version, state of its files."""
    paths = [*map(case.images.get, options["modalities"]), case.segmentation]
    made_of = {**options, "labels": case.labels, "version": __version__}
    return {**made_of, "files": file_states(paths)}


def _volume_names(case_id):
    """Return the names of a prepared case's image and mask."""
    return [f"{kind}/{case_id}.npy" for kind in KINDS]


def _reuse(case_id, made_of, output):
    """Return whether a case is already in the output: intact, with the same `made_of`.

    If only the previous result holds it, the case is taken over from there.
    """
    places = (output.path, output.manifest), (output.final, output.former)
    for folder, manifest in places:
        record = manifest["cases"].get(case_id, {})
        if record.get("made_of") != made_of:
            continue
        names = _volume_names(case_id) if record["row"]["kept"] else ()
        recorded = {name: manifest["files"].get(name) for name in names}
        if not files.find_changed(folder, recorded):
            if folder != output.path:
                for name in names:
                    output.take_over(name)
                output.note_case(case_id, record)
            return True
    return False


def prepare_case(
    case,
    out,
    *,
    crop_shape=(128, 128, 128),
    min_labelled=0.01,
    modalities=labels.MODALITIES,
    scaling="minmax",
):
    """Scale, stack, crop and save one case, unless too little of it is labelled.

    A finished case is left as it is, unless its files, the settings or the version of
    this package have changed, or a volume is damaged.

    Parameters
    ----------
    case : Case
        Must have a segmentation.
    out : path
        Gets `images/<case>.npy`, float16 (X, Y, Z, C), and `masks/<case>.npy`, uint8
        (X, Y, Z) with labels 0 to 3, in LPS order. Must not hold a whole data set.
    crop_shape, min_labelled, modalities, scaling
        As in `prepare_dataset`.

    Returns
    -------
    row : dict
        The case's row, as in `cases.csv`: whether it was kept and if not, why; the
        labelled share of the crop; the tumour lost by the crop and by the tutorial
        recipe's fixed window; the volumes of the regions; and for each channel, the
        mean and SD of the whole scan's non-zero voxels and the background value, in
        stored units.

    Raises
    ------
    BratsDataError
        If the case has no segmentation, or its files are not valid.
    ValueError
        If an option is out of range, or `out` holds something else, or cases that were
        prepared with other options (except `min_labelled`).
    OSError
        If there is not enough disk space.
    """
    options = _check_options(crop_shape, modalities, min_labelled, scaling)
    check_distinct([case])
    if case.segmentation is None:
        raise BratsDataError("no segmentation; it can only be predicted", case=case.id)
    _refuse(_bad_headers([case], modalities), skip_bad=False)
    with files.OutputFolder(out, "prepared", inputs=_folders([case])) as output:
        if REPORT in output.former["files"]:
            problem = f"{out} holds a data set, which only prepare_dataset may change"
            raise ValueError(f"{problem}; choose another folder")
        for case_id, record in output.manifest["cases"].items():
            # Cases may differ in min_labelled; only options are compared.
            made_of = {**record["made_of"], "min_labelled": min_labelled}
            differ = files.find_differences(made_of, made_of | options)
            if differ and record["row"]["kept"] and case_id != case.id:
                problem = f"{out} holds cases with other options: {', '.join(differ)}"
                raise ValueError(f"{problem}; delete it, or choose another folder")
        _check_space([case], output, options)
        files_before = output.manifest["files"]
        rows, errors = _prepare_all([case], output, options, jobs=1)
        if errors:
            output.manifest["files"] = files_before  # without those just claimed
            raise errors[0]
        output.begin(options)
        if not rows[0]["kept"]:
            output.remove(_volume_names(case.id))  # other options may have kept it
    return rows[0]


def _folders(cases):
    """Return the folders that hold the files of cases."""
    paths = [p for c in cases for p in (*c.images.values(), c.segmentation) if p]
    return {path.absolute().parent for path in paths}


def _prepare(case, folder, options):
    """Prepare and save one case; return (row, records of its files), or the error."""
    try:
        image, mask, row = _crop_and_measure(case, options)
    except BratsDataError as error:
        return error
    records = {}
    if row["kept"]:
        for name, volume in zip(_volume_names(case.id), (image, mask), strict=True):
            with files.atomic_write(folder / name) as temporary:
                np.save(temporary, volume, allow_pickle=False)
                records[name] = files.describe_file(temporary)
    return row, records


def _prepare_all(cases, output, options, jobs):
    """Prepare the cases that cannot be reused; return all rows, and the errors."""
    output.claim(name for case in cases for name in _volume_names(case.id))
    made_of = {case.id: _made_of(case, options) for case in cases}
    # _reuse also takes over finished cases from the previous result.
    todo = [case for case in cases if not _reuse(case.id, made_of[case.id], output)]
    calls = (delayed(_prepare)(case, output.path, options) for case in todo)
    jobs = max(1, min(jobs or os.cpu_count(), len(todo)))
    pool = Parallel(jobs, prefer="threads", return_as="generator")
    style, errors = {"total": len(todo), "unit": "case", "disable": not todo}, []
    try:
        bar = files.progress_bar(pool(calls), desc="preparing", **style)
        for result, case in zip(bar, todo, strict=True):
            if isinstance(result, BratsDataError):
                errors.append(result)
                continue
            row, records = result
            output.manifest["files"] |= records
            output.note_case(case.id, {"made_of": made_of[case.id], "row": row})
    except KeyboardInterrupt:
        states = [record.get("made_of") for record in output.manifest["cases"].values()]
        n_done = sum(made_of[case.id] in states for case in cases)
        text = f"{n_done} of {len(cases)} cases are done; run again to resume"
        raise KeyboardInterrupt(text) from None
    failed, prepared = {error.case for error in errors}, output.manifest["cases"]
    return [prepared[c.id]["row"] for c in cases if c.id not in failed], errors


def _crop_and_measure(case, options):
    """Return a case's image and mask as stored, and its report row."""
    crop_shape, min_labelled = options["crop_shape"], options["min_labelled"]
    scan = read_scan(case, options["modalities"])
    check_spacing(scan.header, case.id)
    truth = scan.segmentation
    box = volumes.crop_box(scan.brain_mask, truth, crop_shape)
    mask = volumes.pad(labels.encode_labels(truth[box]), crop_shape)
    share = int(np.count_nonzero(mask)) / mask.size
    parts = truth, truth[box], truth[volumes.FIXED_WINDOW]
    tumour, inside, in_window = (int(np.count_nonzero(part)) for part in parts)
    lost = (tumour - inside) / max(1, tumour)
    notes = [*scan.doubts, "" if tumour else "no voxel is labelled"]
    if lost > LOSS_TO_WARN_OF:
        notes.append(f"the crop leaves out {lost:.0%} of the tumour")
    row = {
        "case": case.id,
        "kept": share >= min_labelled,
        "reason": "" if share >= min_labelled else f"labelled below {min_labelled:g}",
        "note": "; ".join(filter(None, notes)),
        "labelled_share": share,
        "lost_voxels": tumour - inside,
        "lost_share": lost,
        "window_lost_share": (tumour - in_window) / max(1, tumour),  # by the recipe
        "shape": "x".join(map(str, mask.shape)),
    }
    tumour_box = volumes.bounding_box(truth)  # same counts, but faster
    sizes_ml = labels.region_volumes_ml(truth[tumour_box], spacing_mm(scan.affine))
    row |= {f"{region}_ml": ml for region, ml in sizes_ml.items()}
    image = np.empty((*mask.shape, len(scan.volumes)), np.float16)  # (X, Y, Z, C)
    for channel, modality in enumerate(options["modalities"]):
        try:
            image[..., channel], statistics = volumes.scale_to_store(
                scan.volumes[channel], box, crop_shape, options["scaling"]
            )
        except BratsDataError as error:
            where = {"case": case.id, "file": case.images[modality]}
            problem = f"{modality}: {error.problem}"
            raise BratsDataError(problem, **where, advice=error.advice) from None
        row |= {f"{modality}_{name}": value for name, value in statistics.items()}
    return image, np.ascontiguousarray(mask), row


def estimate_disk_gb(
    n_cases, *, crop_shape=(128, 128, 128), modalities=labels.MODALITIES
):
    """Estimate the disk space that prepared cases take, in GB (10⁹ bytes).

    Parameters
    ----------
    n_cases : int
        Number of kept cases.
    crop_shape : tuple of 3 int or None
        None assumes the box around a large brain.
    modalities : sequence of str
        The channels, at two bytes per voxel; the mask takes one.

    Returns
    -------
    gigabytes : float

    Examples
    --------
    >>> round(estimate_disk_gb(369), 1)
    5.4
    """
    _check_options(crop_shape, modalities)
    files.check_option("n_cases", n_cases, *files.whole(0))
    shape = TYPICAL_BRAIN_BOX if crop_shape is None else crop_shape
    voxels = math.prod(map(float, shape))
    return n_cases * voxels * (2 * len(modalities) + 1) / 1e9


def _find_input(raw, label_option):
    """Return the folders of the sets, all input folders, all cases, and labelled cases.

    `raw` and `label_option` are `raw` and `labels` of `prepare_dataset`.
    """
    listed, expected = isinstance(raw, (list, tuple)), "a path or a list of cases"
    files.check_option("raw", raw, lambda r: listed or Path(r), expected)
    cases = raw if listed else find_cases(raw, labels=label_option, modalities=())
    check_distinct(cases)
    if listed and str(label_option) != "auto":
        code = labels.label_code(label_option)
        other = [f"{c.id} has {c.labels}" for c in cases if c.labels != code]
        expected = f"'auto', or what the cases say: {', '.join(other[:3])}"
        files.check_option("labels", code, lambda _: not other, expected)
    labelled, folders = [case for case in cases if case.segmentation], _folders(cases)
    if not labelled:
        raise BratsDataError(f"none of the {len(cases)} cases has a segmentation")
    # The folder of a set holds a folder for each case, or the files of all cases.
    # A single folder may lie anywhere, as among downloads.
    several, pairs = len(folders) > 1, ((f, c.id) for c in cases for f in _folders([c]))
    sets = {f.parent if several and f.name == case_id else f for f, case_id in pairs}
    roots = sets if listed else {files.check_path("raw", raw).resolve()}
    return roots, folders if listed else roots | folders, cases, labelled


def prepare_dataset(
    raw,
    out,
    *,
    crop_shape=(128, 128, 128),
    min_labelled=0.01,
    modalities=labels.MODALITIES,
    scaling="minmax",
    jobs=None,
    skip_bad=False,
    labels="auto",
):
    """Prepare all cases of a folder; an interrupted call resumes where it left off.

    All options, names, headers and mappings are checked before anything is written.
    The volumes are written to a folder next to `out`, which replaces a previous result
    in one step when all cases are done. Cases that are finished there or in `out` are
    reused, unless their files, the settings or the version of this package have
    changed, or a volume is damaged.

    Parameters
    ----------
    raw : path or list of Case
        The downloaded set, or the cases that `find_cases` found in it.
    out : path
        Gets `images/`, `masks/`, `cases.csv` and `manifest.json`.
    crop_shape : tuple of 3 int or None
        Voxels to keep, see `crop_box`; None keeps the box around the brain.
    min_labelled : float
        A case is dropped if a smaller share of its crop is labelled.
    modalities : sequence of str
        The channels, in order.
    scaling : {"minmax", "zscore"}
        See `scale_volume`.
    jobs : int, optional
        Number of cases prepared in parallel, in threads; by default, the number of
        cores. An enclosing `joblib.parallel_config` can choose another backend.
    skip_bad : bool
        Leave invalid cases out, with the reason in the report, instead of raising; one
        must be valid.
    labels : str or dict
        As in `find_cases`; "auto" has to read all label maps.

    Returns
    -------
    report : pandas.DataFrame
        One row per case; cases without a segmentation are included as not kept. Its
        `attrs["patients"]` says how many ids each mapping table matched.

    Raises
    ------
    BratsDataError
        If no case has a segmentation, or files are not valid: one error lists them all.
    ValueError
        If an option is out of range, or `out` holds something else or is an input.
    OSError
        If there is not enough disk space.
    """
    options = _check_options(crop_shape, modalities, min_labelled, scaling)
    files.check_option("jobs", 1 if jobs is None else jobs, *files.whole(1))
    files.check_option("skip_bad", skip_bad, *files.BOOL)
    roots, sources, cases, labelled = _find_input(raw, labels)
    bad = _bad_headers(labelled, modalities)
    _refuse(bad, skip_bad and len(bad) < len(labelled))
    patients, notes = find_patients(cases, *roots)
    codes = {case.labels for case in labelled}
    code = codes.pop() if len(codes) == 1 else "auto"
    common = os.path.realpath(os.path.commonpath(roots))
    made_from = {"raw": common, **options, "version": __version__, "labels": code}
    with files.OutputFolder(out, "prepared", inputs=sources, beside=True) as output:
        valid = [case for case in labelled if case.id not in bad]
        _check_space(valid, output, options)
        rows, errors = _prepare_all(valid, output, options, jobs)
        bad |= {error.case: str(error) for error in errors}
        _refuse(bad, skip_bad and len(bad) < len(labelled))
        output.begin(made_from)
        _remove_others(output, rows, patients)
        report = _report(rows, cases, bad, patients)
        output.claim([REPORT])
        with output.write(REPORT) as temporary:
            report.to_csv(temporary, index=False)
        for kind in KINDS:  # there even if no case is kept
            (output.path / kind).mkdir(exist_ok=True)
        output.put_in_place()
    report.attrs["patients"] = notes
    return report


def _remove_others(output, rows, patients):
    """Delete the volumes of other and dropped cases; record the patients of `rows`."""
    records, ids = output.manifest["cases"], [row["case"] for row in rows]
    output.manifest["cases"] = {i: {**records[i], "patient": patients[i]} for i in ids}
    kept = {name for row in rows if row["kept"] for name in _volume_names(row["case"])}
    output.remove(set(output.manifest["files"]) - kept)


def _check_space(cases, output, options):
    """Raise unless the disk has room for the volumes that will be written."""
    records = [*output.manifest["cases"].values(), *output.former["cases"].values()]
    done = [record.get("made_of") for record in records]
    n_new = sum(_made_of(case, options) not in done for case in cases)
    sizes = {name: options[name] for name in ("crop_shape", "modalities")}
    needed, free = estimate_disk_gb(n_new, **sizes), files.free_gb(output.final)
    if needed > free:
        problem = f"{n_new} cases need {needed:.1f} GB, but {free:.1f} GB are free"
        problem += "; nothing was changed. Make room, or choose another folder"
        raise OSError(errno.ENOSPC, problem, str(output.final))


def _report(rows, cases, bad, patients):
    """Return a table of the prepared cases and of the others, sorted by id."""
    reasons = {case.id: "no segmentation" for case in cases if not case.segmentation}
    reasons |= {case_id: f"not valid: {text}" for case_id, text in bad.items()}
    rows += [{"case": i, "kept": False, "reason": why} for i, why in reasons.items()]
    report = pd.DataFrame(rows).sort_values("case", ignore_index=True)
    report.insert(1, "patient", report["case"].map(patients))
    return report


def _bad_headers(cases, modalities):
    """Return {case id: all problems found in names, headers and lengths}."""
    table = check_cases(cases, voxels=False, modalities=modalities)
    lines = table["file"] + ": " + table["problem"] + ". " + table["what to do"]
    return lines.str.rstrip(". ").groupby(table["case"]).agg("; ".join).to_dict()


def _refuse(bad, skip_bad):
    """Raise one error for all invalid cases, {id: problem}, unless they are skipped."""
    if bad and not skip_bad:
        problem = f"not valid ({len(bad)}): " + " | ".join(bad.values()).rstrip(".")
        advice = "prepare_dataset(skip_bad=True) leaves them out; check_cases lists all"
        raise BratsDataError(problem, advice=advice)


def extract(archive, folder, *, max_gb=100):
    """Unpack a downloaded zip file, after checking all of it.

    Parameters
    ----------
    archive : path
        The zip file.
    folder : path
        A new or empty folder. It appears once the whole archive is unpacked.
    max_gb : float
        Maximum unpacked size, in GB (10⁹ bytes).

    Raises
    ------
    ValueError
        If the folder is not empty; if the archive is incomplete, damaged, encrypted or
        too large; or if an entry is a link or leads out of the folder.
    OSError
        If reading or writing fails.
    """
    files.check_option("max_gb", max_gb, *files.number(0, np.inf))
    archive = files.check_path("archive", archive)
    root = files.check_path("folder", folder).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} already exists; choose a new or empty folder")
    unpacked = files.OutputFolder(root, "unpacked", inputs=[archive], beside=True)
    try:
        with zipfile.ZipFile(archive) as zipped, unpacked as output:
            names = _check_archive(zipped, root, max_gb)
            output.start_over({"archive": Path(archive).name}, names)
            zipped.extractall(output.path)
            output.put_in_place()
    except _BAD as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # an error of the disk, not of the archive
        is_zip = str(archive).lower().endswith(".zip")
        advice = "download it again" if is_zip else "unpack it with tar or 7-Zip"
        raise ValueError(f"{archive}: {error}; {advice}") from None
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: {error}; unpack it with another tool") from None


def _check_archive(zipped, root, max_gb):
    """Return the names of an archive's files; raise unless all can be unpacked."""
    entries = zipped.infolist()
    size = sum(entry.file_size for entry in entries) / 1e9  # in GB, like `room`
    room = min(max_gb, files.free_gb(root))
    problems = [f"unpacks to {size:.1f} GB, over {room:.1f} GB"] if size > room else []
    for entry in entries:
        if "\\" in entry.filename:  # a separator only on Windows
            problems.append(f"{entry.filename!r} has backslashes; use another tool")
        outside = {"..", "/", "//"} & {*PurePosixPath(entry.filename).parts}
        if outside or stat.S_ISLNK(entry.external_attr >> 16):
            problems.append(f"{entry.filename!r} leads out of the folder")
    names = {str(PurePosixPath(e.filename)) for e in entries if not e.is_dir()}
    # An x is added so that the parents of a folder "a/" include "a" itself.
    folders = {str(f) for e in entries for f in PurePosixPath(f"{e.filename}x").parents}
    if mixed := (names & folders) | ({files.MANIFEST} & (names | folders)):
        problems.append(f"it cannot hold a file named {mixed.pop()!r}")
    if problems:
        raise ValueError(f"{zipped.filename}: {problems[0]}")
    if damaged := zipped.testzip():
        raise zipfile.BadZipFile(f"{damaged} is damaged")
    return names

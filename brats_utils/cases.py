"""Find the cases of a folder, check them, read them, write their label maps."""

import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from brats_utils import nifti
from brats_utils.files import atomic_write, read_json
from brats_utils.labels import LABELS, encode_labels, relabel
from brats_utils.nifti import BratsDataError, read_header, read_volume
from brats_utils.volumes import brain_mask, check_grey_levels

MODALITIES = ("flair", "t1ce", "t2")
ALL_MODALITIES = ("flair", "t1", "t1ce", "t2")
# BraTS 2017-2021 write <id>_t1ce.nii, BraTS 2023 <id>-t1c.nii.
_KEYS = {f"_{key}": key for key in (*ALL_MODALITIES, "seg")}
_KEYS |= {"-t2f": "flair", "-t1n": "t1", "-t1c": "t1ce", "-t2w": "t2", "-seg": "seg"}
# The Decathlon's Task01 keeps the four images of a case in one file, in this order.
_DECATHLON = dict.fromkeys(("imagesTr", "imagesTs"), ALL_MODALITIES)
_DECATHLON |= {"labelsTr": ("seg",)}
_DECATHLON_CHANNELS = ["flair", "t1w", "t1gd", "t2w"]
CONVENTIONS = ("0124", "0123", "0213")
_NAME = re.compile(rf"(.+)({'|'.join(_KEYS)})\.nii(\.gz)?", re.I)
WRITTEN_BY = "brats_utils"  # in the header of our label maps: those may be replaced
SPACING_MM = (1.0, 1.0, 1.0)  # of BraTS scans, and of what networks are trained on


@dataclass(frozen=True)
class Case:
    """One scan of a patient: where its files are and how its labels are written.

    Parameters
    ----------
    id : str
        Name of the case, for example `BraTS20_Training_001`.
    images : dict of str to Path
        A file for each of "flair", "t1", "t1ce" and "t2"; or one file for all four
        that holds them as channels in this order.
    segmentation : Path or None
        The label map; None for a case to be predicted.
    labels : {"0124", "0123", "0213"}
        How the label map writes background, necrotic core, oedema and enhancing tumour:
        BraTS until 2021, BraTS since 2023, the Decathlon.
    """

    id: str
    images: dict
    segmentation: Path | None = None
    labels: str = "0124"

    @property
    def channels(self):
        """Return how many images a file holds: 4 in the Decathlon's layout, else 1."""
        stacked = len(set(self.images.values())) < len(self.images)
        return len(self.images) if stacked else 1


@dataclass(frozen=True)
class Scan:
    """A case in memory, in LPS order, for preparing and for predicting.

    Parameters
    ----------
    case : Case
    volumes : list of (X, Y, Z) array
        Raw intensities in the files' own types, one for each modality asked for.
    segmentation : (X, Y, Z) uint8 array or None
        Values 0, 1, 2 and 4.
    header : nibabel.Nifti1Header
        Of the stored grid.
    """

    case: Case
    volumes: list
    segmentation: np.ndarray | None
    header: object

    @property
    def affine(self):
        """Return the (4, 4) affine of the stored grid."""
        return self.header.get_best_affine()

    @cached_property
    def brain_mask(self):
        """Return the (X, Y, Z) mask of voxels that are not zero in all modalities."""
        return brain_mask(self.volumes)

    def check_spacing(self):
        """Raise unless voxels are 1 mm wide, as in all BraTS scans."""
        spacing = np.round(nifti.spacing_mm(self.affine), 2).tolist()
        if not np.allclose(spacing, SPACING_MM, atol=0.05):
            problem = f"voxels of {spacing} mm; networks here know {SPACING_MM}"
            advice = "Resample the scan to 1 mm first"
            raise BratsDataError(problem, case=self.case.id, advice=advice)

    def restore(self, volume):
        """Return a volume (X, Y, Z) in the orientation of the stored grid."""
        return nifti.from_lps(volume, self.affine)


def file_states(paths):
    """Return what tells whether files have changed, without reading them.

    Parameters
    ----------
    paths : iterable of path

    Returns
    -------
    states : dict of str to list of int
        {resolved path: [bytes, modification time, change time]}, times in nanoseconds.
    """
    stats = {str(Path(path).resolve()): Path(path).stat() for path in paths}
    return {p: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in stats.items()}


def _nifti_files(root):
    """Yield every NIfTI file below `root`, sorted; hidden and macOS strays left out."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f != "__MACOSX"
        )
        for name in sorted(names):
            if name.lower().endswith((".nii", ".nii.gz")) and not name.startswith("."):
                yield Path(folder) / name


def _group_files(root):
    """Return {(folder, id): {key: path}} and {folder: [files of no known name]}."""
    groups, leftovers = {}, {}
    for path in _nifti_files(root):
        match = _NAME.fullmatch(path.name)
        if match:
            folder, case_id = path.parent, match[1]
            keys = (_KEYS[match[2].lower()],)
        elif keys := _DECATHLON.get(path.parent.name):
            folder = path.parent.parent
            case_id = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)
        else:
            leftovers.setdefault(path.parent, []).append(path)
            continue
        files = groups.setdefault((folder, case_id), {})
        for key in keys:
            if files.setdefault(key, path) != path:
                problem = f"two files for {key}: {files[key].name} and {path.name}"
                where = {"case": case_id, "file": path.parent}
                raise BratsDataError(problem, **where, advice="Keep one of them")
    return groups, leftovers


def _add_odd_segmentations(groups, leftovers):
    """Give each case without a label map the one file that must be it, if any.

    Returns {(folder, id): path} of those given.
    """
    lacking, given = {}, {}
    for folder, case_id in (key for key, files in groups.items() if "seg" not in files):
        lacking.setdefault(folder, []).append(case_id)
    for folder, case_ids in lacking.items():
        paths = [p for p in leftovers.get(folder, []) if "seg" in p.name.lower()]
        if len(paths) * len(case_ids) > 1:
            found = ", ".join(path.name for path in paths)
            problem = f"no {case_ids[0]}_seg file, and {found} might be that of "
            problem += ", ".join(case_ids)
            advice = f"Rename the right one to {case_ids[0]}_seg.nii"
            raise BratsDataError(problem, case=case_ids[0], file=folder, advice=advice)
        if paths:
            given[folder, case_ids[0]] = groups[folder, case_ids[0]]["seg"] = paths[0]
    return given


def _check_complete(root, groups):
    """Raise one error that lists all missing modalities and doubled case ids."""
    if not groups:
        here = ", ".join(sorted(p.name for p in Path(root).iterdir())[:8]) or "nothing"
        problem = f"no BraTS case (<id>_flair.nii, ...) in {root}; it holds: {here}"
        advice = "Pass the folder that holds the case folders, or one above it"
        raise BratsDataError(problem, advice=advice)
    problems, seen = [], {}
    for (folder, case_id), files in groups.items():
        missing = [m for m in ALL_MODALITIES if m not in files]
        if missing:
            problems.append(f"{case_id} ({folder}) lacks {', '.join(missing)}")
        other = seen.setdefault(case_id.lower(), folder)
        if other != folder:
            problems.append(f"{case_id} is there twice: {other} and {folder}")
    if problems:
        advice = "Download them again, or take those folders out"
        raise BratsDataError("; ".join(problems), advice=advice)


def find_cases(root, *, labels="auto"):
    """Find the BraTS cases in a folder, at any depth.

    Takes `.nii` and `.nii.gz`, the names of BraTS 2017 to 2021 (`<id>_t1ce`) and
    2023 (`<id>-t1c`), and the folders of the Medical Segmentation Decathlon's Task01
    (`imagesTr`, `imagesTs`, `labelsTr`). A segmentation with another name, such as that
    of folder 355 of the Kaggle set, is taken if it is the only file left with "seg" in
    its name, with a warning. Files of other kinds are ignored.

    Parameters
    ----------
    root : path
        The folder; nothing in it is changed.
    labels : {"auto", "0124", "0123", "0213"}
        How labels are written, see `Case`. "auto" takes the Decathlon's layout as
        "0213"; otherwise it reads all segmentations and decides for the whole set
        whether 4 or 3 is enhancing tumour.

    Returns
    -------
    cases : list of Case
        Sorted by id.

    Raises
    ------
    BratsDataError
        If the folder is missing or holds no case, a case lacks a modality, two cases
        share an id, or the set holds both label values 3 and 4, or two layouts.
    """
    root = Path(root)
    if not root.is_dir():
        advice = "Check the path; see data/README.md"
        raise BratsDataError(f"there is no folder {root}", advice=advice)
    if labels not in ("auto", *CONVENTIONS):
        raise ValueError(f"labels is 'auto' or one of {CONVENTIONS}, not {labels!r}")
    groups, leftovers = _group_files(root)
    _check_complete(root, groups)
    for (_, case_id), path in _add_odd_segmentations(groups, leftovers).items():
        warnings.warn(f"{case_id}: {path.name} is its segmentation", stacklevel=2)
    found = [
        Case(case_id, {m: files[m] for m in ALL_MODALITIES}, files.get("seg"))
        for (_, case_id), files in groups.items()
    ]
    if labels == "auto":
        labels = _decide_labels(root, found)
    found = [replace(case, labels=labels) for case in found]
    return sorted(found, key=lambda case: case.id)


def _decide_labels(root, cases):
    """Return the label convention of a set, by its layout or else by its label maps."""
    stacked = {case.channels > 1 for case in cases}
    if len(stacked) > 1:
        advice = "Keep sets apart"
        raise BratsDataError(f"two layouts of files in {root}", advice=advice)
    if stacked == {True}:
        for path in Path(root).rglob("dataset.json"):
            _check_decathlon(path)
        return "0213"
    paths = [case.segmentation for case in cases if case.segmentation]
    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(_threes_and_fours, paths))
    threes, fours = (
        [path for path, found in zip(paths, values, strict=True) if value in found]
        for value in (3, 4)
    )
    if threes and fours:
        problem = (
            f"label 3 in {threes[0].name} and label 4 in {fours[0].name}: two label"
        )
        problem += " conventions in one set, or labels that this project does not know"
        advice = "Keep sets apart, or say labels='0124' or labels='0123'"
        raise BratsDataError(problem, advice=advice)
    if threes:
        text = "label 3 and no label 4 in this set: 3 is read as enhancing tumour"
        warnings.warn(text, stacklevel=3)
    return "0123" if threes else "0124"


def _check_decathlon(path):
    """Raise if a `dataset.json` describes other channels than Task01's."""
    modality = read_json(path).get("modality", {})
    order = [str(modality[key]).lower() for key in sorted(modality)]
    if order not in ([], _DECATHLON_CHANNELS):
        problem = f"its channels are {order}, not {_DECATHLON_CHANNELS}"
        advice = "Only the Decathlon's Task01_BrainTumour is known here"
        raise BratsDataError(problem, file=path, advice=advice)


def _threes_and_fours(path):
    """Return which of the values 3 and 4 a label map holds."""
    try:
        volume = read_volume(path)[0]
    except BratsDataError:
        return set()  # found again, and reported, when the case is read
    return {value for value in (3, 4) if (volume == value).any()}


def rename_odd_segmentation(root):
    """Rename segmentations with another name to `<id>_seg`, as in Kaggle's folder 355.

    Nothing needs it, since `find_cases` takes the odd name too. A second call changes
    nothing.

    Parameters
    ----------
    root : path
        The folder with the cases; must be writable.

    Returns
    -------
    renamed : list of (Path, Path)
        Old and new path of each.

    Raises
    ------
    BratsDataError
        If it is not clear which file is the segmentation of which case.
    """
    groups, leftovers = _group_files(root)
    renamed = []
    for (folder, case_id), old in _add_odd_segmentations(groups, leftovers).items():
        suffix = ".nii.gz" if old.name.lower().endswith(".gz") else ".nii"
        separator = next(iter(groups[folder, case_id].values())).name[len(case_id)]
        renamed.append((old, old.rename(folder / f"{case_id}{separator}seg{suffix}")))
    return renamed


def load_labels(path, labels="0124"):
    """Read one label map.

    Parameters
    ----------
    path : path
        A NIfTI file of labels.
    labels : {"0124", "0123", "0213"}
        How the file writes its labels, see `Case`.

    Returns
    -------
    segmentation : (X, Y, Z) uint8 array
        Values 0, 1, 2 and 4, whatever the file's convention.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If the file cannot be read, or holds another value.
    """
    volume, header = read_volume(path)
    values = [int(value) for value in labels]
    try:
        segmentation = relabel(volume, dict(zip(values, LABELS, strict=True)))
    except ValueError as error:
        advice = "Check that this is a BraTS segmentation of the same year"
        raise BratsDataError(str(error), file=path, advice=advice) from None
    return segmentation, header.get_best_affine()


def _check_image(volume, path, *, grey_levels=False):
    """Raise if one modality is blank, holds NaN or Inf, or too few grey levels."""
    problem, advice = None, "Download it again, or leave this case out"
    with np.errstate(over="ignore"):  # float64 reaches further than float32
        floats = volume.dtype.kind == "f"
        finite = np.isfinite(volume.astype(np.float32, copy=False)) if floats else True
    if volume.min() == volume.max():
        problem = f"blank modality: every voxel is {volume.flat[0]:g}"
    elif not np.all(finite):
        bad = np.argwhere(~finite)
        problem = f"{len(bad)} voxels are NaN or infinite, first {bad[0].tolist()}"
    elif grey_levels:
        try:
            check_grey_levels(volume)
        except ValueError as error:
            problem, advice = str(error), "Correct that voxel, or leave this case out"
    if problem:
        raise BratsDataError(problem, file=path, advice=advice)


def _paths(case, modalities):
    """Return each file of a case: {path: the modalities asked for; () for labels}."""
    paths = {}
    for modality in modalities:
        path = case.images[modality]
        paths[path] = (*paths.get(path, ()), modality)
    return paths | ({case.segmentation: ()} if case.segmentation else {})


def _channel(volume, modality):
    """Return one modality (X, Y, Z) of what a file holds."""
    return volume[..., ALL_MODALITIES.index(modality)] if volume.ndim == 4 else volume


def _check_grid(header, path, first):
    """Raise if a volume lies on another grid than the case's first (path, header)."""
    name, other = first[0].name, first[1]
    shape, affine = header.get_data_shape(), header.get_best_affine()
    problem, advice = None, "All volumes of a case must lie on one grid; register them"
    if shape != other.get_data_shape():
        problem = f"shape {shape}, but {name} has {other.get_data_shape()}"
    elif not np.allclose(affine, other.get_best_affine(), atol=1e-3):
        problem = f"its grid (affine) differs from that of {name}"
    if problem:
        raise BratsDataError(problem, file=path, advice=advice)


def read_scan(case, modalities=MODALITIES, *, labelled=True):
    """Read a case into memory, verified, in LPS order.

    Parameters
    ----------
    case : Case
        From `find_cases`.
    modalities : sequence of str
        Which images, in order; may be empty.
    labelled : bool
        Whether to read the segmentation, if the case has one.

    Returns
    -------
    scan : Scan

    Raises
    ------
    BratsDataError
        As `load_case` does; the message names case and file.
    """
    case = case if labelled else replace(case, segmentation=None)
    volumes, segmentation = {}, None
    try:
        first = case.images["flair"], read_header(case.images["flair"], case.channels)
        affine = first[1].get_best_affine()
        for path, wanted in _paths(case, modalities).items():
            if not wanted:
                _check_grid(read_header(path), path, first)
                segmentation = nifti.to_lps(load_labels(path, case.labels)[0], affine)
                continue
            volume, header = read_volume(path, case.channels)
            _check_grid(header, path, first)
            for modality in wanted:
                volumes[modality] = nifti.to_lps(_channel(volume, modality), affine)
                _check_image(volumes[modality], path)
    except BratsDataError as error:
        raise error.of(case.id) from None
    return Scan(case, [volumes[m] for m in modalities], segmentation, first[1])


def load_case(case, modalities=MODALITIES):
    """Read a case's images and segmentation, on the grid they are stored in.

    Parameters
    ----------
    case : Case
        From `find_cases`.
    modalities : sequence of str
        Which images, and in which order, become the channels; may be empty.

    Returns
    -------
    image : (X, Y, Z, C) float32 array
        Raw intensities, a channel for each modality.
    segmentation : (X, Y, Z) uint8 array or None
        Values 0, 1, 2 and 4. None if the case has none.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If a file cannot be read, is blank, holds NaN or infinity or a wrong label, or
        if the files do not lie on one grid.
    """
    scan = read_scan(case, modalities)
    # Each channel is one block, as in its file: filled and read without jumps.
    shape = (*scan.header.get_data_shape(), len(scan.volumes))
    image = np.empty(shape, np.float32, order="F")  # (X, Y, Z, C)
    for channel, volume in enumerate(scan.volumes):
        image[..., channel] = scan.restore(volume)
    labels = scan.segmentation
    return image, None if labels is None else scan.restore(labels), scan.affine


def check_cases(cases, *, voxels=True):
    """Read every file of every case, and list all that is wrong; nothing is changed.

    Parameters
    ----------
    cases : list of Case
        From `find_cases`.
    voxels : bool
        False checks names, headers and lengths only, in milliseconds a case.

    Returns
    -------
    problems : pandas.DataFrame
        A row for each problem: "case", "file", "problem", "what to do". Empty if none.
    """
    import pandas as pd

    rows = []

    def note(case, path, check, *arguments, **options):
        try:
            return check(*arguments, **options)
        except BratsDataError as error:
            rows.append((case.id, str(path), error.problem, error.advice or ""))

    for case in cases:
        first = None
        for path, wanted in _paths(case, ALL_MODALITIES).items():
            channels = case.channels if wanted else 1
            header = note(case, path, read_header, path, channels)
            if header is None:
                continue
            first = first or (path, header)
            note(case, path, _check_grid, header, path, first)
            if voxels and not wanted:
                note(case, path, load_labels, path, case.labels)
            elif voxels and (read := note(case, path, read_volume, path, channels)):
                for modality in wanted:
                    volume = _channel(read[0], modality)
                    note(case, path, _check_image, volume, path, grey_levels=True)
    return pd.DataFrame(rows, columns=["case", "file", "problem", "what to do"])


def read_grid(case):
    """Return the grid of a case, from the header of its first image alone.

    Parameters
    ----------
    case : Case
        From `find_cases`.

    Returns
    -------
    shape : tuple of 3 int
        Voxels along X, Y and Z.
    affine : (4, 4) array
        Voxel indices to millimetres.
    spacing_mm : tuple of 3 float
        Voxel size along X, Y and Z.
    """
    header = read_header(case.images["flair"], case.channels)
    affine = header.get_best_affine()
    return header.get_data_shape(), affine, nifti.spacing_mm(affine)


def save_segmentation(segmentation, case, path):
    """Write a label map on the case's own grid, as the challenge wants it.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Values 0, 1, 2 and 4, in the shape of the case's images.
    case : Case
        The file takes the affine and the header geometry of its images.
    path : path
        Ends in `.nii` or `.nii.gz`; the file holds uint8. A label map that this
        function wrote is replaced; any other file is left as it is.

    Raises
    ------
    ValueError
        If the shape is not the case's, a value is no BraTS label, or a file is there
        that this function did not write.
    """
    path = Path(path)
    nifti.check_suffix(path)
    if path.exists() and read_header(path)["intent_name"] != WRITTEN_BY.encode():
        problem = f"{path} is there and was not written by this project"
        raise ValueError(f"{problem}; it is left as it is. Choose another path")
    header = read_header(case.images["flair"], case.channels)
    with atomic_write(path) as temporary:
        write_segmentation(segmentation, header, temporary)


def write_segmentation(segmentation, header, path):
    """Write a label map to the temporary path of an atomic write.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Values 0, 1, 2 and 4.
    header : nibabel.Nifti1Header
        Of the case's images.
    path : path
        Ends in `.nii` or `.nii.gz`.

    Raises
    ------
    ValueError
        If the shape is not the header's, or a value is no BraTS label.
    """
    segmentation, shape = np.asarray(segmentation), header.get_data_shape()
    if segmentation.shape != shape:
        found = f"the label map has shape {segmentation.shape}"
        raise ValueError(f"{found}, the case's images {shape}")
    encode_labels(segmentation)  # raises if a value is no label
    volume = segmentation.astype(np.uint8)
    nifti.save_volume(volume, path, like=header, name=WRITTEN_BY)

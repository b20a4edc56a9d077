"""Find the cases of a folder, in any of the layouts in which people have BraTS."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from brats_utils.files import read_json
from brats_utils.nifti import BratsDataError, read_volume

MODALITIES = ("flair", "t1ce", "t2")
ALL_MODALITIES = ("flair", "t1", "t1ce", "t2")
# BraTS 2017-2021 write <id>_t1ce.nii, BraTS 2023 <id>-t1c.nii.
_KEYS = {f"_{key}": key for key in (*ALL_MODALITIES, "seg")}
_KEYS |= {"-t2f": "flair", "-t1n": "t1", "-t1c": "t1ce", "-t2w": "t2", "-seg": "seg"}
# The Decathlon's Task01 keeps the four images of a case in one file, in this order.
_DECATHLON = {"imagesTr": ALL_MODALITIES, "imagesTs": ALL_MODALITIES}
_DECATHLON["labelsTr"] = ("seg",)
_DECATHLON_CHANNELS = ["flair", "t1w", "t1gd", "t2w"]
CONVENTIONS = ("0124", "0123", "0213")
_NAME = re.compile(rf"(.+)({'|'.join(_KEYS)})\.nii(\.gz)?", re.I)


@dataclass(frozen=True)
class Case:
    """One patient's scan: where its files are and how its labels are written.

    Parameters
    ----------
    id : str
        Name of the case, `BraTS20_Training_001`.
    images : dict of str to Path
        A file for each of "flair", "t1", "t1ce" and "t2"; one for all four, if it
        holds them as its channels in the order flair, t1, t1ce, t2.
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
        keys = _DECATHLON.get(path.parent.name)
        if match is None and keys:
            case_id = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)
            files = groups.setdefault((path.parent.parent, case_id), {})
            files.update(dict.fromkeys(keys, path))
        elif match is None:
            leftovers.setdefault(path.parent, []).append(path)
        else:
            files = groups.setdefault((path.parent, match[1]), {})
            _add_file(files, _KEYS[match[2].lower()], path, match[1])
    return groups, leftovers


def _add_file(files, key, path, case_id):
    """Note a case's file, unless there is another for the same image."""
    if key in files:
        raise BratsDataError(
            f"two files for {key}: {files[key].name} and {path.name}",
            case=case_id,
            file=path.parent,
            advice="Keep one of them",
        )
    files[key] = path


def _add_odd_segmentations(groups, leftovers):
    """Give each case that lacks a label map the one file that must be it, if any.

    Returns {(folder, id): path} of those given.
    """
    lacking, given = {}, {}
    for folder, case_id in (key for key, files in groups.items() if "seg" not in files):
        lacking.setdefault(folder, []).append(case_id)
    for folder, case_ids in lacking.items():
        paths = [p for p in leftovers.get(folder, []) if "seg" in p.name.lower()]
        if len(paths) * len(case_ids) > 1:
            raise BratsDataError(
                f"no {case_ids[0]}_seg file, and {', '.join(p.name for p in paths)} "
                f"might be that of {', '.join(case_ids)}",
                case=case_ids[0],
                file=folder,
                advice=f"Rename the right one to {case_ids[0]}_seg.nii",
            )
        if paths:
            given[folder, case_ids[0]] = groups[folder, case_ids[0]]["seg"] = paths[0]
    return given


def _check_complete(root, groups, leftovers):
    """Raise one error that lists all missing modalities and doubled case ids."""
    if not groups:
        here = ", ".join(sorted(p.name for p in Path(root).iterdir())[:8]) or "nothing"
        raise BratsDataError(
            f"no BraTS case (<id>_flair.nii, ...) in {root} or below; it holds: {here}",
            advice="Pass the folder that holds the case folders, or one above it",
        )
    problems, seen = [], {}
    for (folder, case_id), files in groups.items():
        missing = [m for m in ALL_MODALITIES if m not in files]
        if missing:
            problems.append(f"{case_id} ({folder}) lacks {', '.join(missing)}")
        other = seen.setdefault(case_id.lower(), folder)
        if other != folder:
            problems.append(f"{case_id} is there twice: {other} and {folder}")
    if problems:
        raise BratsDataError(
            "; ".join(problems), advice="Download them again, or take those folders out"
        )


def find_cases(root, *, labels="auto"):
    """Find the BraTS cases in a folder, at any depth.

    Takes `.nii` and `.nii.gz`, the names of BraTS 2017 to 2021 (`<id>_t1ce`) and
    2023 (`<id>-t1c`), and the folders of the Medical Segmentation Decathlon's Task01
    (`imagesTr`, `imagesTs`, `labelsTr`). A segmentation of another name, as that of
    folder 355 of the Kaggle set, is taken where it is the only file left with "seg" in
    its name, and a line is printed that says so. Files of other kinds are passed over.

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
        raise BratsDataError(
            f"there is no folder {root}", advice="Check the path; see data/README.md"
        )
    if labels not in ("auto", *CONVENTIONS):
        raise ValueError(f"labels is 'auto' or one of {CONVENTIONS}, not {labels!r}")
    groups, leftovers = _group_files(root)
    _check_complete(root, groups, leftovers)
    for (_, case_id), path in _add_odd_segmentations(groups, leftovers).items():
        print(f"{case_id}: taking {path.name} as its segmentation")
    found = [
        Case(case_id, {m: files[m] for m in ALL_MODALITIES}, files.get("seg"))
        for (_, case_id), files in groups.items()
    ]
    decathlon = _is_decathlon(root, found)
    if labels == "auto" and decathlon:
        labels = "0213"
    elif labels == "auto":
        labels = _decide_labels([c.segmentation for c in found if c.segmentation])
    found = [replace(case, labels=labels) for case in found]
    return sorted(found, key=lambda case: case.id)


def _is_decathlon(root, cases):
    """Tell whether a set is the Decathlon's Task01; raise if only a part of it is."""
    stacked = {case.channels > 1 for case in cases}
    if len(stacked) > 1:
        advice = "Keep sets apart"
        raise BratsDataError(f"two layouts of files in {root}", advice=advice)
    for path in Path(root).rglob("dataset.json") if True in stacked else ():
        said = read_json(path).get("modality", {})
        order = [str(said[key]).lower() for key in sorted(said)]
        if order not in ([], _DECATHLON_CHANNELS):
            raise BratsDataError(
                f"its channels are {order}, not {_DECATHLON_CHANNELS}",
                file=path,
                advice="Only the Decathlon's Task01_BrainTumour is known here",
            )
    return True in stacked


def _decide_labels(paths):
    """Return how the label maps at `paths` write enhancing tumour, as 4 or as 3."""

    def held(path):
        try:
            values = read_volume(path)[0]
        except BratsDataError:
            return set()  # found again, and reported, when the case is read
        return {value for value in (3, 4) if (values == value).any()}

    with ThreadPoolExecutor(2) as pool:
        found = list(zip(paths, pool.map(held, paths), strict=True))
    threes, fours = ([p for p, values in found if v in values] for v in (3, 4))
    if threes and fours:
        raise BratsDataError(
            f"label 3 in {threes[0].name} and label 4 in {fours[0].name}: two label "
            "conventions in one set, or labels that this project does not know",
            advice="Keep sets apart, or say labels='0124' or labels='0123'",
        )
    if threes:
        print("Label 3 and no label 4 in this set: 3 is read as enhancing tumour")
    return "0123" if threes else "0124"


def rename_odd_segmentation(root):
    """Rename segmentations of another name to `<id>_seg`, as in folder 355 of Kaggle's.

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


def short_name(path):
    """Return what a file is called among those of its case.

    Parameters
    ----------
    path : Path
        An image or a label map of a case.

    Returns
    -------
    name : str
        The file's name; the Decathlon's image and label map differ by folder only.
    """
    folder = path.parent.name
    return f"{folder}/{path.name}" if folder in _DECATHLON else path.name

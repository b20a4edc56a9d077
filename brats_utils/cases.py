"""Find, check and read the cases in a folder."""

import re
import unicodedata
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from brats_utils import labels, nifti
from brats_utils.files import BOOL, check_option, read_json
from brats_utils.labels import ALL_MODALITIES, MODALITIES, are_modalities, label_code
from brats_utils.nifti import BratsDataError, load_labels, save_segmentation, walk  # noqa: F401
from brats_utils.volumes import brain_mask, check_image, find_doubts

# Paths of the Decathlon and nnU-Net: kind of folder, file name without suffix, case id,
# channel number.
_TASK_PATH = re.compile(r"(images|labels)T[rs]/((.+?)(?:_(\d{4}))?)(?i:\.nii(?:\.gz)?)")
_ODD = re.compile(r"W\d+_.*Segm\.nii(\.gz)?", re.I)  # in folder 355 of the Kaggle set
_ID = re.compile(r"[^/\\\0]*[^/\\\0\s][^/\\\0]*")


@dataclass(frozen=True)
class Case:
    """One scan of a patient: its files and its label convention.

    Parameters
    ----------
    id : str
        Name of the case, for example `BraTS20_Training_001`.
    images : dict of str to Path
        A file for each available modality ("flair", "t1", "t1ce", "t2"); or one file
        for all, which holds them as channels in the order of this dictionary.
    segmentation : Path or None
        The label map; None for a case to be predicted.
    labels : str or dict
        The convention of the label map, see `find_cases`; stored as text.
    """

    id: str
    images: dict
    segmentation: Path | None = None
    labels: str = "0124"

    def __post_init__(self):
        """Convert paths given as text to Path, and a table of labels to text."""
        try:
            images = {name: Path(path) for name, path in (self.images or {}).items()}
            segmentation = Path(self.segmentation) if self.segmentation else None
        except (AttributeError, TypeError) as error:
            expected = "images={modality: path}, segmentation=path or None"
            raise ValueError(f"Case: {error}, expected {expected}") from None
        labels = label_code(self.labels)
        # The attributes of a frozen dataclass cannot be assigned.
        vars(self).update(images=images, segmentation=segmentation, labels=labels)

    @property
    def channels(self):
        """Return the number of images per file: 1, except in the Decathlon's layout."""
        return len(self.images) // len(set(self.images.values()))


def check_distinct(cases, n_images=1):
    """Return cases as a list; raise if a case is not valid or an id is repeated.

    Parameters
    ----------
    cases : iterable of Case
    n_images : int
        How many images each must have at least.

    Returns
    -------
    cases : list of Case

    Raises
    ------
    ValueError
        The message names the case, or the repeated id and both folders.
    """
    check_option("cases", cases, iter, "a list of Case")
    expected = "a Case as find_cases returns it: images, and an id without / or \\"
    seen, cases = {}, [*cases]
    for case in cases:
        fits = (lambda c: _ID.fullmatch(c.id) and len(c.images) >= n_images), expected
        check_option("case", case, *fits)
        folder = next(iter(case.images.values()), Path(case.segmentation or "")).parent
        if (other := seen.setdefault(case.id.lower(), folder)) is not folder:
            problem = f"cases is a list with {case.id} twice, in {other} and {folder}"
            raise ValueError(f"{problem}; expected each id once")
    return cases


@dataclass(frozen=True)
class Scan:
    """A case in memory, in LPS order, for preparation and prediction.

    Parameters
    ----------
    case : Case
    volumes : list of (X, Y, Z) array
        Raw intensities in the files' own types, one for each modality asked for.
    segmentation : (X, Y, Z) uint8 array or None
        Values 0, 1, 2 and 4.
    header : nibabel.Nifti1Header
        Header of the stored grid.
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
        """Return the (X, Y, Z) mask of voxels that are non-zero in any modality."""
        return brain_mask(self.volumes)

    @cached_property
    def doubts(self):
        """Return warnings about the case as a whole, a list of str."""
        found = find_doubts(self.volumes, self.brain_mask, self.segmentation)
        oriented = self.header["qform_code"] or self.header["sform_code"]
        return found if oriented else [*found, nifti.NO_ORIENTATION]

    def restore(self, volume):
        """Return a volume (X, Y, Z) in the orientation of the stored grid."""
        return nifti.from_lps(volume, self.affine)


def read_description(folder, descriptions, need_channels=True):
    """Return the channels and the naming that a folder's `dataset.json` states.

    Parameters
    ----------
    folder : Path
    descriptions : dict
        Caches {folder: (channels, naming)}.
    need_channels : bool
        If False, the file may be another program's: one that cannot be read is ignored.

    Returns
    -------
    channels : tuple of str
        Modalities; empty if they are not named or not needed.
    naming : tuple
        As in `labels.naming`, or () if the labels are not named; if their names are not
        understood, its second item is a hint for `labels=`.

    Raises
    ------
    BratsDataError
        If the channels are needed and the file cannot be read.
    """
    path = folder / "dataset.json"
    if folder in descriptions or not path.is_file():
        return descriptions.get(folder, ((), ()))
    try:
        content = read_json(path)
        channels = labels.read_channel_names(content) if need_channels else ()
        table = labels.read_label_names(content.get("labels") or {})
        code = label_code(table) if len(table) > 1 else "labels={1: ..., 2: ...}"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        if not need_channels:
            return (), ()
        raise BratsDataError(f"not as nnU-Net writes it: {e}", file=path) from None
    naming = ("dataset.json", code) if content.get("labels") else ()
    return descriptions.setdefault(folder, (channels, naming))


def _identify(path, descriptions):
    """Return the place (folder, case id) of a file's case, and the file's content.

    The content is a tuple of modalities, or ("seg",), or () if the name is unknown.
    `descriptions` is the cache of `read_description`.
    """
    root, match = path.parent.parent, _TASK_PATH.fullmatch("/".join(path.parts[-2:]))
    # In labelsTr, P1_T1 is the id of the images P1_T1_0000 and so on.
    first = match and path.name.replace(match[2], f"{match[2]}_0000", 1)
    is_id = match and (root / f"images{path.parent.name[-2:]}" / first).exists()
    place, key = labels.parse_path(path)
    if key and not is_id:
        return place, (key,)
    if not match:
        return None, ()
    kind, stem, case_id, number = match.groups()
    if kind == "labels":
        return (root, stem), ("seg",)
    channels = read_description(root, descriptions)[0]
    folder, suffix = root / f"labels{path.parent.name[-2:]}", path.name[len(stem) :]
    # Label maps have no channel number: if one is named a_0001, that is the case id.
    if (folder / path.name).exists() and not (folder / f"{case_id}{suffix}").exists():
        case_id, number = stem, None
    if not channels and not number and labels.naming(case_id)[1] == "0213":
        channels = ALL_MODALITIES  # the order of Task01
    if not channels or int(number or 0) >= len(channels):
        problem = f"cannot tell which modality {path.name} holds"
        advice = "Give dataset.json, with its channels in order, beside imagesTr"
        raise BratsDataError(problem, file=root, advice=advice)
    return (root, case_id), (channels[int(number)],) if number else channels


def _add_file(files, key, path, case_id):
    """Add a file to {modality or "seg": path} of a case, which must lack it."""
    if files.setdefault(key, path) != path:
        problem = f"two files for {key}: {files[key]} and {path}"
        raise BratsDataError(problem, case=case_id, advice="Keep one of them")


def _group_files(root):
    """Group the NIfTI files below a folder by case.

    Returns {place: {modality or "seg": path}} with places as in `_identify`, a list of
    the files that belong to no case, and the cache of `read_description`.
    """
    if not root.is_dir():
        unpack = "It is a file: unpack it with `prepare.extract`, or in notebook 01"
        advice = unpack if root.is_file() else "Check the path; see data/README.md"
        raise BratsDataError(f"there is no folder {root}", advice=advice)
    groups, leftovers, descriptions = {}, [], {}
    paths = (p for p in walk(root) if p.name.lower().endswith((".nii", ".nii.gz")))
    for path in paths:
        if str(path) != str(path).encode(errors="replace").decode():
            problem = f"the name {str(path.relative_to(root))!a} is not valid UTF-8"
            raise BratsDataError(problem, file=root, advice="Rename it, in UTF-8")
        place, keys = _identify(path, descriptions)
        leftovers += [path] if not keys else []
        # macOS may write ü as two characters: the same name is the same case.
        place = place and (place[0], unicodedata.normalize("NFC", place[1]))
        for key in keys:
            _add_file(groups.setdefault(place, {}), key, path, place[1])
    # Label maps without images in the same folder. UPENN-GBM has a separate folder for
    # them; elsewhere, they are other files with similar names, as `<id>_brain_segm`.
    lacking = [p for p, files in groups.items() if "seg" not in files]
    for place in [p for p, files in groups.items() if files.keys() == {"seg"}]:
        path, case_id = groups.pop(place)["seg"], place[1].lower()
        same = [p for p in lacking if p[1].lower() == case_id]
        parts = {part.lower() for part in path.relative_to(root).parts}
        if len(same) == 1 and parts & labels.FOLDERS:
            _add_file(groups[same[0]], "seg", path, place[1])
        else:
            leftovers.append(path)
    return groups, leftovers, descriptions


def _add_odd_segmentations(groups, leftovers):
    """Add the oddly named label map of folder 355 to its case; return {place: path}.

    `groups` and `leftovers`, from `_group_files`, are changed in place.
    """
    added = {}
    for path in [path for path in leftovers if _ODD.fullmatch(path.name)]:
        places = [p for p in groups if p[0] == path.parent and "seg" not in groups[p]]
        names = [p.name for p in leftovers if p.parent == path.parent]
        rivals = [name for name in names if "seg" in name.lower()]  # including `path`
        if places and len(places) + len(rivals) > 2:
            first, ids = places[0][1], ", ".join(p[1] for p in places)
            problem = f"no {first}_seg file; {', '.join(rivals)} may belong to {ids}"
            advice = f"Rename the right one to {first}_seg.nii"
            raise BratsDataError(problem, case=first, file=path.parent, advice=advice)
        for place in places:
            added[place] = groups[place]["seg"] = path
            leftovers.remove(path)
    return added


def _check_complete(root, groups, leftovers, modalities):
    """Raise one error that lists all missing modalities and duplicate case ids."""
    if not groups:
        here = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        problem = f"no BraTS case (<id>_flair.nii, ...) in {root}; it holds: {here}"
        raise BratsDataError(problem, advice="Pass the folder that holds the cases")
    problems, seen = [], {}
    for place, files in groups.items():
        folder, case_id = place
        unknown = [p.name for p in leftovers if p.parent == folder]
        if missing := [m for m in modalities if m not in files]:
            note = f"; not understood there: {', '.join(unknown)}" if unknown else ""
            problems.append(f"{case_id} ({folder}) lacks {', '.join(missing)}{note}")
        if (other := seen.setdefault(case_id.lower(), place)) != place:
            both = f"{other[1]} in {other[0]} and {case_id} in {folder}"
            problems.append(f"{case_id} appears twice: {both}")
    if problems:
        advice = "Complete, rename or remove them"
        raise BratsDataError("; ".join(problems), advice=advice)


def find_cases(root, *, labels="auto", modalities=MODALITIES):
    """Find the BraTS cases in a folder, at any depth.

    Accepts `.nii` and `.nii.gz` files named as in the public sets: BraTS 2017 to 2021
    (`<id>_t1ce`) and 2023 onwards (`<id>-t1c`), TCGA, UPENN-GBM and UCSF-PDGM, and the
    folders `imagesTr` and `labelsTr` of the Medical Segmentation Decathlon's Task01 and
    of nnU-Net. The oddly named label map in folder 355 of the Kaggle set is accepted
    with a warning. Files with other names are ignored, also with a warning.

    Parameters
    ----------
    root : path
        The folder; nothing in it is changed.
    labels : str or dict
        Label convention: "0124", "0123" or "0213" (the values of background, core,
        oedema and enhancing tumour), or a table such as {1: 1, 2: 2, 3: 4} from the
        files' values to 0, 1, 2 and 4. "auto" uses the case ids or the `dataset.json`
        of known sets, checks the values against them, and raises if the convention is
        not certain. For cases with unknown ids, the values in all their label maps
        decide whether 4 or 3 is enhancing tumour.
    modalities : sequence of str
        Images that each case must have; others are included if available.

    Returns
    -------
    cases : list of Case
        Sorted by id.

    Raises
    ------
    BratsDataError
        If the folder is missing or holds no case, a case lacks a modality, two cases
        share an id, or label maps contradict their names or are ambiguous.
    ValueError
        If `labels` or `modalities` is not valid.
    """
    check_option("modalities", modalities, are_modalities, f"some of {ALL_MODALITIES}")
    labels = labels if str(labels) == "auto" else label_code(labels)
    root = nifti.absolute(root)
    groups, leftovers, descriptions = _group_files(root)
    for (_, case_id), path in _add_odd_segmentations(groups, leftovers).items():
        warnings.warn(f"{case_id}: {path.name} is its segmentation", stacklevel=2)
    _check_complete(root, groups, leftovers, modalities)
    if leftovers:
        # Possible label maps come first.
        leftovers.sort(key=lambda path: "seg" not in path.name.lower())
        names = ", ".join(str(path.relative_to(root)) for path in leftovers[:5])
        text = f"{len(leftovers)} files that no case uses are ignored: {names}"
        warnings.warn(text, stacklevel=2)
    cases = []
    codes = _decide_labels(root, groups, descriptions, labels)
    for place, files in sorted(groups.items(), key=lambda pair: pair[0][1]):  # by id
        # The order of `images` is that of the channels in a file, see `Case`.
        order = *descriptions.get(place[0], [()])[0], *ALL_MODALITIES
        images = {m: files[m] for m in order if m in files}
        cases.append(Case(place[1], images, files.get("seg"), codes[place]))
    return cases


def _decide_labels(root, groups, descriptions, told):
    """Return {place: label code}, from descriptions, ids and values in the label maps.

    A `dataset.json` near the case takes precedence over its id. If neither says, the
    values in all such label maps decide together.
    """
    namings, codes = {}, {}
    for place, files in groups.items():
        folders = [place[0], *files.get("seg", root).parents]
        inside = [f for f in folders if f == place[0] or f.is_relative_to(root)]
        stated = [read_description(f, descriptions, False)[1] for f in inside]
        as_task01 = {f.name for f in folders} & {"labelsTr", "labelsTs"}
        namings[place] = next(filter(None, stated), labels.naming(place[1], as_task01))
    if told != "auto" and len({*namings.values()}) == 1:
        return dict.fromkeys(groups, told)  # users may know better than the names
    paths = [files.get("seg") for files in groups.values()]
    values = dict(zip(groups, nifti.threes_and_fours(paths), strict=True))
    if told != "auto":
        labelled = {p[1]: (namings[p], values[p]) for p in groups if "seg" in groups[p]}
        if problem := labels.find_misfit(told, labelled):
            advice = "Keep sets apart, with find_cases for each, and join the lists"
            raise BratsDataError(problem, file=root, advice=advice)
        return dict.fromkeys(groups, told)
    unnamed = [p for p in groups if "seg" in groups[p] and not namings[p][1]]
    found = set().union(*(values[place] for place in unnamed))
    default = "0123" if found == {3} else "0124"
    if unnamed and 4 not in found:  # a guess: only 4 is certain to be enhancing
        text = "label 3 and no label 4" if found else "neither label 3 nor label 4"
        text += " in this set: 1 is read as core, 2 as oedema, 3 as enhancing tumour; "
        warnings.warn(f"{text}pass labels= to find_cases if they are not", stacklevel=3)
    for place, (name, code) in namings.items():
        where = {"case": place[1], "file": groups[place].get("seg")}
        # A code with "=" is a hint: the naming does not settle the convention. Of those
        # in TOLD_TASK01, only 0124 has a 4.
        settled = code == labels.TOLD_TASK01 and {4} in values.values()
        if "=" in code and where["file"] and not settled:
            problem = f"what its labels mean is not certain ({name})"
            advice = f"Pass labels=, for example: {code}"
            raise BratsDataError(problem, **where, advice=advice)
        codes[place] = default if not code or "=" in code else code
        if others := values[place] - labels.label_table(codes[place]).keys():
            problem = f"label {others.pop()}, but {name} writes labels {codes[place]}"
            advice = "Keep sets apart, or pass labels= (see find_cases)"
            raise BratsDataError(f"{problem}: two conventions", **where, advice=advice)
    return codes


def rename_odd_segmentation(root):
    """Rename oddly named segmentations, as in Kaggle's folder 355, to `<id>_seg`.

    This is optional, because `find_cases` also accepts the odd name. A second call
    changes nothing.

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
    groups, leftovers, _ = _group_files(nifti.absolute(root))
    renamed = []
    for (folder, case_id), old in _add_odd_segmentations(groups, leftovers).items():
        suffix = ".nii.gz" if old.name.lower().endswith(".gz") else ".nii"
        renamed.append((old, old.rename(folder / f"{case_id}_seg{suffix}")))
    return renamed


def _files_to_read(case, modalities):
    """Return {path: the modalities to read from it, or ["seg"]} for a case.

    The first image is always included and comes first: the others must be on its grid.
    """
    known, expected = {*ALL_MODALITIES}.issuperset, f"some of {ALL_MODALITIES}"
    # `len` rejects iterators, which can be read only once.
    check_option("modalities", modalities, lambda m: len(m) > -1 and known(m), expected)
    if missing := [name for name in modalities if name not in case.images]:
        problem, advice = f"lacks {', '.join(missing)}", "Complete it, or leave it out"
        raise BratsDataError(problem, case=case.id, advice=advice)
    paths = {next(iter(case.images.values())): []}
    for modality in modalities:
        paths.setdefault(case.images[modality], []).append(modality)
    return paths | ({case.segmentation: ["seg"]} if case.segmentation else {})


def _attempt(problems, path, check, *arguments, **options):
    """Call a check; if it fails, add (path, error) to `problems` and return None."""
    try:
        return check(*arguments, **options)
    except BratsDataError as error:
        problems.append((path, error))


def _read_files(case, modalities, problems, *, voxels=True, thorough=False):
    """Return the volumes of a case, {modality or "seg": array}, and its grid.

    The grid is (path, header) of the first file that can be read. Errors are added to
    `problems` as (path, error).
    """
    volumes, first = {}, None
    for path, wanted in _files_to_read(case, modalities).items():
        channels = 1 if wanted == ["seg"] else case.channels
        header = _attempt(problems, path, nifti.read_header, path, channels)
        if not header:
            continue
        first = first or (path, header)
        _attempt(problems, path, nifti.check_grid, header, path, first)
        if voxels and wanted == ["seg"]:
            found = _attempt(problems, path, load_labels, path, case.labels)
            volumes["seg"] = found and found[0]
        elif voxels and wanted:
            found = _attempt(problems, path, nifti.read_volume, path, channels)
            for name in wanted if found else ():
                i = [*case.images].index(name)
                volumes[name] = volume = found[0][..., i] if channels > 1 else found[0]
                _attempt(problems, path, check_image, volume, path, thorough=thorough)
    return volumes, first


def read_scan(case, modalities=MODALITIES, *, labelled=True):
    """Read and check a case, and return it in LPS order.

    Parameters
    ----------
    case : Case
        From `find_cases`.
    modalities : sequence of str
        Images to read, in order; may be empty.
    labelled : bool
        Whether to read the segmentation, if the case has one.

    Returns
    -------
    scan : Scan

    Raises
    ------
    BratsDataError
        As in `load_case`; the message names the case and the file.
    """
    check_distinct([case])
    case, problems = case if labelled else replace(case, segmentation=None), []
    volumes, first = _read_files(case, modalities, problems)
    if problems:
        raise problems[0][1].of(case.id)
    affine = first[1].get_best_affine()
    lps = {key: nifti.to_lps(volume, affine) for key, volume in volumes.items()}
    return Scan(case, [lps[m] for m in modalities], lps.get("seg"), first[1])


def load_case(case, modalities=MODALITIES):
    """Read a case's images and segmentation, on the grid they are stored in.

    Parameters
    ----------
    case : Case
        From `find_cases`.
    modalities : sequence of str
        Images that become the channels, in this order; may be empty.

    Returns
    -------
    image : (X, Y, Z, C) float32 array
        Raw intensities, one channel per modality.
    segmentation : (X, Y, Z) uint8 array or None
        Values 0, 1, 2 and 4. None if the case has none.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If a file cannot be read, is blank, holds NaN, infinity or an invalid label, or
        if the files are not on the same grid.
    """
    scan = read_scan(case, modalities)
    # Each channel is one contiguous block, as in its file: faster to fill and to read.
    shape = (*scan.header.get_data_shape(), len(scan.volumes))
    image = np.empty(shape, np.float32, order="F")  # (X, Y, Z, C)
    for channel, volume in enumerate(scan.volumes):
        image[..., channel] = scan.restore(volume)
    stored = None if scan.segmentation is None else scan.restore(scan.segmentation)
    return image, stored, scan.affine


def check_cases(cases, *, voxels=True, modalities=None):
    """Check every file of every case, and list all problems; nothing is changed.

    Parameters
    ----------
    cases : list of Case
        From `find_cases`.
    voxels : bool
        If False, only check names, headers and lengths, in milliseconds per case.
    modalities : sequence of str, optional
        Images that each case must have and that are checked. By default, FLAIR, T1CE
        and T2 are required, and all images are checked.

    Returns
    -------
    problems : pandas.DataFrame
        One row per problem: "case", "file", "problem", "what to do". Empty if none.
    """
    import pandas as pd

    check_option("voxels", voxels, *BOOL)
    rows, required = [], MODALITIES if modalities is None else modalities
    for case in check_distinct(cases):
        problems, folder = [], next(iter(case.images.values())).parent
        _attempt(problems, folder, _files_to_read, case, required)
        wanted = ALL_MODALITIES if modalities is None else modalities
        names = [name for name in case.images if name in wanted]
        found, first = _read_files(case, names, problems, voxels=voxels, thorough=True)
        if first:
            _attempt(problems, first[0], nifti.check_spacing, first[1])
        images = [found[name] for name in names if name in found]
        if images and not problems:
            doubts = Scan(case, images, found.get("seg"), first[1]).doubts
            advice = "Look at the case, or leave it out"
            problems = [(folder, BratsDataError(d, advice=advice)) for d in doubts]
        rows += [(case.id, str(p), e.problem, e.advice or "") for p, e in problems]
    return pd.DataFrame(rows, columns=["case", "file", "problem", "what to do"])

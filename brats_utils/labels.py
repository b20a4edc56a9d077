"""Label values, tumour regions, names, colours, and the label conventions of files."""

import contextlib
import re
from collections import Counter

import numpy as np

LABELS = {
    0: "background",
    1: "necrotic and non-enhancing core",
    2: "oedema",
    4: "enhancing tumour",
}
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
REGION_NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
ENCODED_REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}  # in training labels
# Blue, yellow and vermilion from Okabe and Ito's palette, which is colour-blind safe.
COLOURS = {1: "#0072B2", 2: "#F0E442", 4: "#D55E00"}

MODALITIES = ("flair", "t1ce", "t2")
ALL_MODALITIES = ("flair", "t1", "t1ce", "t2")
# How file names continue after the case id in the public sets.
_FILES = {
    "flair": "(?:brain_)?(?:flair|t2f|t2[-_]?flair)",
    "t1": "(?:brain_)?(?:t1|t1n|t1w)",
    "t1ce": "(?:brain_)?(?:t1w?(?:-?c|post)|t1w?[-_]?(?:ce|gd)|ct1|ce-[a-z]+_t1w)",
    "t2": "(?:brain_)?(?:t2|t2w)",
    "seg": "(?:final_)?(?:segm?|tumor_segmentation|glistrboost_manuallycorrected)",
}
# Folders of label maps, in lower case.
FOLDERS = {"images_segm", "labelstr", "labels", "masks", "segmentations"}
_KEY = "|".join(f"(?P<{key}>{names})" for key, names in _FILES.items())
_NAME = re.compile(rf"(?:(.+?)[-_])??(?:{_KEY})\.nii(?:\.gz)?", re.I)
# A name that is only a visit or a date: the folder above it names the patient.
_DAY = r"(?:0[1-9]|1[0-2])[-._]?(?:0[1-9]|[12]\d|3[01])"
_DATE = rf"(?:19|20)\d\d[-._]?{_DAY}|{_DAY}-(?:19|20)\d\d(?:-.*)?"  # the last: NBIA's
_TIME = (
    r"(?:week|month|day|visit|ses(?:sion)?|tp|time(?:-?point)?)[-_ ]?\d+(?:-\d+)?"
    r"|fu\d\d?|(?:ses-)?(?:pre|post)(?:-?op)?|anat|baseline|follow-?up[-_ ]?\d*"
)
VISIT = re.compile(f"{_TIME}|{_DATE}", re.I)
# The values that files use for background, core, oedema and enhancing tumour.
CONVENTIONS = ("0124", "0123", "0213")
# Hints on what to pass as `labels=` if the case id does not settle the convention.
TOLD_GLI = "labels={1: 1, 2: 2, 3: 4, 4: 0} counts the cavity as background"
PED = "since 2024: 1 ET, 2 NET, 3 cyst, 4 oedema; in 2023: 1 core, 2 oedema, 3 ET"
TOLD_PED = "labels={1: 4, 2: 1, 3: 1, 4: 2}, which counts cysts as core, or '0123'"
TOLD_TASK01 = "labels='0213' if 1 is oedema, as there, or '0123' or '0124'"
# Pattern of the case ids in each set: (set, its convention or one of the hints above).
NAMINGS = {
    r"brats[-_]?(1[789]|20|2021)_|tcga-\w\w-\w{4}": ("BraTS 2017-2021", "0124"),
    r"upenn[-_]gbm[-_]|ucsf[-_]pdgm[-_]": ("UPENN-GBM and UCSF-PDGM", "0124"),
    r"brats[-_]gli[-_]\d+[-_]1\d\d": ("BraTS 2024, treated: 4 is a cavity", TOLD_GLI),
    r"brats[-_]ped": (f"BraTS-PED, {PED}", TOLD_PED),
    r"brats[-_](gli|ssa|men|met|goat)[-_]": ("BraTS 2023", "0123"),
    r"(?<!.)brats_\d{3}$": ("an id as in the Decathlon's Task01", "0213"),
}
# Patterns of label names in a `dataset.json`, and their labels; the first match counts.
_MEANINGS = {
    "background|^0$": 0,
    "o?edema|^ed$|snfh|hyper.?intens": 2,
    r"(?<![a-z])(no[nt]?|un)[\W_]*(contrast[\W_]*)?enhanc|necro|^ncr|^netc?$": 1,
    "^(?!.*without).*enhanc|^et$": 4,
}
# Words that identify nested regions, from the outermost to the innermost.
_REGION_WORDS = (
    r"(?i)whole|complete|(^|[\W_])wt",
    r"(?i)core|(^|[\W_])tc",
    r"(?i)enhanc|(^|[\W_])et",
)


def naming(case_id, as_task01=True):
    """Return the set and the label convention that a case id implies.

    Parameters
    ----------
    case_id : str
    as_task01 : bool
        Whether the label map is in `labelsTr` or `labelsTs`, as in the Decathlon; other
        sets use ids of the same form.

    Returns
    -------
    name, convention : str
        The name of the set; and one of `CONVENTIONS`, or a hint on what to pass if the
        id does not settle it, or "" if the id is unknown.
    """
    start = "(?i)(?:^|[-_])(?:"  # also matches `train_BraTS-GLI-...`
    known = (name for p, name in NAMINGS.items() if re.search(f"{start}{p})", case_id))
    name, code = next(known, ("the rest of this set", ""))
    return name, code if as_task01 or code != "0213" else TOLD_TASK01


def label_table(labels):
    """Return a table from the values in label maps to BraTS labels.

    Parameters
    ----------
    labels : str or dict
        One of `CONVENTIONS`, or {value in the file: 0, 1, 2 or 4}, also as text such as
        "1:1 2:2 3:4".

    Returns
    -------
    table : dict of int to int
        From value in the file to BraTS label; 0 is always background.

    Raises
    ------
    ValueError
        If `labels` is neither.
    """
    with contextlib.suppress(AttributeError, OverflowError, TypeError, ValueError):
        if isinstance(labels, dict):
            pairs = labels.items()
        elif labels in CONVENTIONS:
            pairs = zip(labels, LABELS, strict=True)
        else:
            pairs = (pair.split(":") for pair in labels.split())
        table = {0: 0} | {float(value): float(label) for value, label in pairs}
        # Fractions are rejected here, because these sets hold only whole numbers.
        valid = table.keys() <= {*range(256)} and {*table.values()} <= LABELS.keys()
        if valid and len(table) > 1 and table[0] == 0:
            return {int(value): int(label) for value, label in table.items()}
    problem = f"labels is {labels!r}, expected 'auto', one of {CONVENTIONS}, or a "
    problem += "table from the files' values to 0, 1, 2, 4, such as {1: 1, 2: 2, 3: 4}"
    raise ValueError(problem)


def label_code(labels):
    """Return a label table as text: one of `CONVENTIONS`, or pairs like "1:1 2:2 3:4".

    Parameters
    ----------
    labels : str or dict
        As in `label_table`.

    Returns
    -------
    code : str

    Raises
    ------
    ValueError
        If `labels` is not valid.
    """
    table = label_table(labels)
    known = [code for code in CONVENTIONS if label_table(code) == table]
    return known[0] if known else " ".join(f"{v}:{x}" for v, x in table.items() if v)


def parse_name(name, folder=""):
    """Parse a file name of the public sets into the case id and the content.

    Parameters
    ----------
    name : str
        For example `BraTS20_Training_001_t1ce.nii`, or just `t1c.nii.gz`.
    folder : str
        Name of the file's folder: the case id, if the file's name begins with it.

    Returns
    -------
    case_id, key : str
        The case id, and "flair", "t1", "t1ce", "t2" or "seg"; empty where the name does
        not say.
    """
    match, size = _NAME.fullmatch(name), len(folder)
    # Of P1_T2_flair in a folder P1_T2, the id is P1_T2: an id may end like an image.
    if _NAME.fullmatch(f"{folder}.nii") and name.lower().startswith(folder.lower()):
        rest = _NAME.fullmatch(name[size + 1 :])
        if rest and not rest[1] and name[size] in "-_":
            return name[:size], rest.lastgroup
    return (match[1] or "", match.lastgroup) if match else ("", "")


def parse_path(path):
    """Return the place of a file's case, and the file's content, by the file's path.

    Parameters
    ----------
    path : Path

    Returns
    -------
    place : (Path, str) or None
        The folder and the case id. An id that only says when the scan was made is
        preceded by the names of the folders above: P1/20190301/flair.nii.
    key : str
        As in `parse_name`.
    """
    for named in (path.parent, path):  # Kaggle has folders named like files, too
        folder = named.parent
        case_id, key = parse_name(named.name, folder.name)
        if key:
            case_id = name = case_id or folder.name
            parents = iter((folder if case_id == folder.name else named).parents)
            while VISIT.fullmatch(name):
                name = next(parents).name
                case_id = f"{name}_{case_id}"
            return (folder, case_id), key
    return None, ""


def are_modalities(names):
    """Return whether all names are known modalities, without repetition.

    Parameters
    ----------
    names : sequence of str
        May be empty.

    Returns
    -------
    known : bool
    """
    in_order = not isinstance(names, set | frozenset)
    # A str is not accepted either: its letters are not modalities.
    return in_order and len(names) == len({*names} & {*ALL_MODALITIES})


def find_misfit(labels, labelled):
    """Return what is wrong if one table is given for label maps of two conventions.

    Parameters
    ----------
    labels : str or dict
        As in `label_table`.
    labelled : dict of str to tuple
        {case id: (what `naming` returns, which of the labels 3 and 4 it holds)}.

    Returns
    -------
    problem : str
        Empty if the label maps are of one set, or if the table contradicts the names
        of all cases, or of none: users may know better than the names.
    """
    told, misfits = label_table(labels), []
    if len({name for name, _ in labelled.values()}) == 1:
        return ""  # one set, of which the user may know better
    for case_id, ((name, code), values) in labelled.items():
        settled = label_table(code) if code and "=" not in code else {}
        # Values that the name does not allow show that the name is wrong.
        found = {1, 2, *values} & settled.keys() if values <= settled.keys() else ()
        if any(told.get(value) != settled[value] for value in found):
            misfits.append(f"{case_id}: labels {code} by its name ({name})")
    if len(misfits) in (0, len(labelled)):
        return ""
    return f"{misfits[0]}, but labels={labels!r} is for all cases: two conventions"


def read_channel_names(described):
    """Return the modalities that a `dataset.json` names.

    Parameters
    ----------
    described : dict
        Its content, with {"0": "FLAIR", ...} under "modality" (Decathlon) or
        "channel_names" (nnU-Net).

    Returns
    -------
    channels : tuple of str
        Names from `ALL_MODALITIES`, in channel order; empty if none are given.

    Raises
    ------
    ValueError
        If a name is not a known modality.
    """
    names = described.get("channel_names") or described.get("modality") or {}
    names = [str(names[key]).lower() for key in sorted(names, key=int)]
    # Parsed as file names; a prefix may change the meaning, as in "post-contrast T1".
    parsed = [parse_name(re.sub("[- ]", "_", name) + ".nii") for name in names]
    channels = ["" if prefix else key for prefix, key in parsed]
    if not {*channels} <= {*ALL_MODALITIES}:
        raise ValueError(f"its channels are {names}, not {ALL_MODALITIES}")
    return tuple(channels)


def read_label_names(names):
    """Return the label table that the label names in a `dataset.json` describe.

    Parameters
    ----------
    names : dict
        {"1": "edema", ...} as in the Decathlon, {"edema": 1, ...} as in nnU-Net, or
        nnU-Net's nested regions {"whole tumor": [1, 2, 3], ...}.

    Returns
    -------
    table : dict of int to int
        See `label_table`; empty if a name is not understood.
    """
    # (name, value), whichever of the two is the key.
    pairs = [(v, k) if str(k).isdigit() else (k, v) for k, v in names.items()]
    if any(isinstance(values, list) for _, values in pairs):
        regions = {str(name): {*np.ravel(v).tolist()} for name, v in pairs if v != 0}
        outermost_first = sorted(regions, key=lambda name: -len(regions[name]))
        named = all(map(re.search, _REGION_WORDS, outermost_first))
        # Oedema (2) is in one region, necrotic core (1) in two, enhancing (4) in three.
        depths = Counter(value for region in regions.values() for value in region)
        sizes = sorted(map(len, regions.values()))
        nested = named and sizes == sorted(depths.values()) == [1, 2, 3]
        return {v: (2, 1, 4)[d - 1] for v, d in depths.items()} if nested else {}
    table = {}
    for name, value in pairs:
        found = (x for p, x in _MEANINGS.items() if re.search(p, str(name), re.I))
        table[int(value)] = next(found, None)
    doubtful = None in table.values() or [*table.values()].count(4) > 1
    return {} if doubtful else table


def relabel(values, table):
    """Replace values using a table that must contain all of them.

    Parameters
    ----------
    values : array, any shape
        Whole numbers from 0 to 255, of any type.
    table : dict of int to int
        From old to new value.

    Returns
    -------
    relabelled : uint8 array of the same shape

    Raises
    ------
    ValueError
        If a value is not in the table (nothing is rounded); the message has the counts.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"labels are {values!r:.60}, expected an array of numbers")
    known = sum(np.count_nonzero(values == old) for old in table)
    if known != values.size:
        found = zip(*np.unique(values, return_counts=True), strict=True)
        others = [f"{v:g} in {n} voxels" for v, n in found if v not in table]
        problem = f"expected only the labels {list(table)}, found "
        raise ValueError(problem + ", ".join(others[:5]))
    relabelled = values.astype(np.uint8)
    for old, new in table.items():
        if old != new:
            relabelled[values == old] = new
    return relabelled


def encode_labels(segmentation):
    """Convert a BraTS label map to the training labels 0, 1, 2, 3.

    Parameters
    ----------
    segmentation : integer array, any shape
        Holds only the values 0, 1, 2 and 4.

    Returns
    -------
    labels : uint8 array of the same shape
        The same map with 4 (enhancing tumour) as 3, so that the labels have no gap.

    Raises
    ------
    ValueError
        If `segmentation` holds another value; nothing is ever rounded.

    Examples
    --------
    >>> encode_labels([0, 1, 2, 4]).tolist()
    [0, 1, 2, 3]
    """
    return relabel(segmentation, {value: i for i, value in enumerate(LABELS)})


def decode_labels(labels):
    """Convert training labels to a BraTS label map: the inverse of `encode_labels`.

    Parameters
    ----------
    labels : integer array, any shape
        Holds only the values 0, 1, 2 and 3.

    Returns
    -------
    segmentation : uint8 array of the same shape
        The same map with 3 as 4.

    Raises
    ------
    ValueError
        If `labels` holds another value.

    Examples
    --------
    >>> decode_labels([0, 1, 2, 3]).tolist()
    [0, 1, 2, 4]
    """
    return relabel(labels, dict(enumerate(LABELS)))


def region_volumes_ml(segmentation, spacing_mm):
    """Return the volume of each BraTS region, in millilitres.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        BraTS 2020 label map, holding only the values 0, 1, 2 and 4.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    volumes : dict of str to float
        Millilitres of "WT", "TC" and "ET". A region with no voxel has volume 0.0.

    Raises
    ------
    ValueError
        If `segmentation` is not 3-D, or holds a value that is no BraTS label.

    References
    ----------
    Regions as scored in Bakas et al., 2018, arXiv:1811.02629.

    Examples
    --------
    >>> region_volumes_ml(np.full((10, 10, 10), 4), (1, 1, 2))
    {'WT': 2.0, 'TC': 2.0, 'ET': 2.0}
    """
    labels = encode_labels(segmentation)
    if labels.ndim != 3:
        raise ValueError(f"expected a 3-D label map, got shape {labels.shape}")
    sizes = np.asarray(spacing_mm, float)
    if sizes.shape != (3,) or not np.isfinite(sizes).all() or sizes.min() <= 0:
        problem = f"spacing_mm is {spacing_mm!r}, expected three numbers above 0"
        raise ValueError(problem)
    counts = np.array([np.count_nonzero(labels == i) for i in range(len(LABELS))])
    ml = float(np.prod(spacing_mm)) / 1000  # of a voxel
    return {r: float(counts[list(v)].sum()) * ml for r, v in ENCODED_REGIONS.items()}

"""Label values, tumour regions, their names and colours, and how files write them."""

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
# Blue, yellow and vermilion of Okabe and Ito's palette, told apart by all readers.
COLOURS = {1: "#0072B2", 2: "#F0E442", 4: "#D55E00"}

MODALITIES = ("flair", "t1ce", "t2")
ALL_MODALITIES = ("flair", "t1", "t1ce", "t2")
# What each file is called in the public sets, after the id of the case.
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
# A name that only says when a scan was made: the patient is its folder.
_DAY = r"(?:0[1-9]|1[0-2])[-._]?(?:0[1-9]|[12]\d|3[01])"
_DATE = rf"(?:19|20)\d\d[-._]?{_DAY}|{_DAY}-(?:19|20)\d\d(?:-.*)?"  # the last: NBIA's
_TIME = (
    r"(?:week|month|day|visit|ses(?:sion)?|tp|time-?point)[-_ ]?\d+(?:-\d+)?|fu\d\d?"
    r"|(?:ses-)?(?:pre|post)(?:-?op)?|anat|baseline|follow-?up[-_ ]?\d*"
)
VISIT = re.compile(f"{_TIME}|{_DATE}", re.I)
# How files write background, core, oedema and enhancing tumour, in this order.
CONVENTIONS = ("0124", "0123", "0213")
# What to pass as `labels=` where the id of a case does not settle the convention.
TOLD_GLI = "labels={1: 1, 2: 2, 3: 4, 4: 0} counts the cavity as background"
TOLD_PED = "labels={1: 4, 2: 1, 3: 1, 4: 2} counts cysts as core"
TOLD_TASK01 = "labels='0213' if 1 is oedema, as there, or '0123' or '0124'"
# Which set a case id belongs to: (set, convention, or one of the hints above).
NAMINGS = {
    r"brats[-_]?(1[789]|20|2021)_|tcga-\w\w-\w{4}": ("BraTS 2017-2021", "0124"),
    r"upenn[-_]gbm[-_]|ucsf[-_]pdgm[-_]": ("UPENN-GBM and UCSF-PDGM", "0124"),
    r"brats[-_]gli[-_]\d+[-_]1\d\d": ("BraTS 2024, treated: 4 is a cavity", TOLD_GLI),
    r"brats[-_]ped": ("BraTS-PED: 1 ET, 2 NET, 3 cyst, 4 oedema", TOLD_PED),
    r"brats[-_](gli|ssa|men|met|goat)[-_]": ("BraTS 2023", "0123"),
    r"(?<!.)brats_\d{3}$": ("an id as in the Decathlon's Task01", "0213"),
}
# The labels that the names in a `dataset.json` mean; the first that fits counts.
_MEANINGS = {
    "background|^0$": 0,
    "o?edema|^ed$|snfh|hyper.?intens": 2,
    r"(?<![a-z])(no[nt]?|un)[\W_]*(contrast[\W_]*)?enhanc|necro|^ncr|^netc?$": 1,
    "^(?!.*without).*enhanc|^et$": 4,
}
# What the names of nested regions hold, from the outermost to the innermost.
_REGION_WORDS = (
    r"(?i)whole|complete|(^|[\W_])wt",
    r"(?i)core|(^|[\W_])tc",
    r"(?i)enhanc|(^|[\W_])et",
)


def naming(case_id, as_task01=True):
    """Return what the id of a case says about its labels.

    Parameters
    ----------
    case_id : str
    as_task01 : bool
        Whether the label map lies in a folder `labelsTr`, as the Decathlon's do; others
        have ids like its ids.

    Returns
    -------
    name, convention : str
        The set of that naming, and one of `CONVENTIONS` or, if its labels cannot be
        told by the name, what to pass; empty if the naming is not known.
    """
    start = "(?i)(?:^|[-_])(?:"  # `train_BraTS-GLI-...` is of that set, too
    known = (name for p, name in NAMINGS.items() if re.search(f"{start}{p})", case_id))
    name, code = next(known, ("the rest of this set", ""))
    return name, code if as_task01 or code != "0213" else TOLD_TASK01


def label_table(labels):
    """Return how the values in label maps translate to BraTS labels.

    Parameters
    ----------
    labels : str or dict
        One of `CONVENTIONS`; or {value in the file: 0, 1, 2 or 4}, also written as
        "1:1 2:2 3:4".

    Returns
    -------
    table : dict of int to int
        Value in the file to BraTS label; 0 is always background.

    Raises
    ------
    ValueError
        If it is something else.
    """
    with contextlib.suppress(AttributeError, OverflowError, TypeError, ValueError):
        if isinstance(labels, dict):
            pairs = labels.items()
        elif labels in CONVENTIONS:
            pairs = zip(labels, LABELS, strict=True)
        else:
            pairs = (pair.split(":") for pair in labels.split())
        table = {0: 0} | {float(value): float(label) for value, label in pairs}
        # A fraction equals no whole number, so it is refused here.
        valid = table.keys() <= {*range(256)} and {*table.values()} <= LABELS.keys()
        if valid and len(table) > 1 and table[0] == 0:
            return {int(value): int(label) for value, label in table.items()}
    problem = f"labels is {labels!r}, expected 'auto', one of {CONVENTIONS}, or a "
    problem += "table from the files' values to 0, 1, 2, 4, such as {1: 1, 2: 2, 3: 4}"
    raise ValueError(problem)


def label_code(labels):
    """Return a label table as text: one of `CONVENTIONS`, or "1:1 2:2 3:4" and so on.

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
        If it is something else.
    """
    table = label_table(labels)
    known = [code for code in CONVENTIONS if label_table(code) == table]
    return known[0] if known else " ".join(f"{v}:{x}" for v, x in table.items() if v)


def parse_name(name):
    """Return whose file this is, and what it holds, by its name in the public sets.

    Parameters
    ----------
    name : str
        For example `BraTS20_Training_001_t1ce.nii`, or just `t1c.nii.gz`.

    Returns
    -------
    case_id, key : str
        The id of the case, and "flair", "t1", "t1ce", "t2" or "seg". Empty if the name
        does not say.
    """
    match = _NAME.fullmatch(name)
    return (match[1] or "", match.lastgroup) if match else ("", "")


def are_modalities(names):
    """Return whether all names are modalities, each there once.

    Parameters
    ----------
    names : sequence of str
        May be empty.

    Returns
    -------
    known : bool
    """
    in_order = not isinstance(names, set | frozenset)
    # Not a str either: its letters are no modalities.
    return in_order and len(names) == len({*names} & {*ALL_MODALITIES})


def read_channel_names(described):
    """Return the modalities that a `dataset.json` names.

    Parameters
    ----------
    described : dict
        With {"0": "FLAIR", ...} as "modality" (the Decathlon's) or "channel_names".

    Returns
    -------
    channels : tuple of str
        Of `ALL_MODALITIES`, in order; empty if it names none.

    Raises
    ------
    ValueError
        If a name is no modality.
    """
    names = described.get("channel_names") or described.get("modality") or {}
    names = [str(names[key]).lower() for key in sorted(names, key=int)]
    # Read as file names; a prefix may change the meaning, as in "post-contrast T1".
    parsed = [parse_name(re.sub("[- ]", "_", name) + ".nii") for name in names]
    channels = ["" if prefix else key for prefix, key in parsed]
    if not {*channels} <= {*ALL_MODALITIES}:
        raise ValueError(f"its channels are {names}, not {ALL_MODALITIES}")
    return tuple(channels)


def read_label_names(names):
    """Return the label table that names of labels describe.

    Parameters
    ----------
    names : dict
        {"1": "edema", ...} as in the Decathlon, {"edema": 1, ...} as in nnU-Net, or its
        nested regions {"whole tumor": [1, 2, 3], ...}.

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
        # In how many regions a value lies: 2 (oedema) in one, 1 in two, 4 in all three.
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
    """Return another value for each label, by a table that must know them all.

    Parameters
    ----------
    values : array, any shape
        Whole numbers from 0 to 255, of any type.
    table : dict of int to int
        Old value to new one.

    Returns
    -------
    relabelled : uint8 array of the same shape

    Raises
    ------
    ValueError
        If a value is not in the table, with how often it occurs; nothing is rounded.
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
    """Return the training labels 0, 1, 2, 3 of a BraTS label map.

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
    """Return the BraTS label map of training labels: the inverse of `encode_labels`.

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

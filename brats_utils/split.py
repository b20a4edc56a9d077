"""Split prepared cases into train and val: by patient, into links, in one step."""

import contextlib
import csv
import io
import itertools
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import splitfolders
from sklearn.model_selection import KFold

from brats_utils import files
from brats_utils.labels import VISIT
from brats_utils.nifti import BratsDataError, walk

KINDS, SIDES = ("images", "masks"), ("train", "val")
# A patient's id, before the number or the date of the visit.
_VISIT = re.compile(
    r"(?i)((?:.+[-_])?(?:brats1[789]_[^_]+_[^_]+|brats-[a-z]+-\d+"
    r"|brats_(?:gli|ssa|men|mets?|goat|peds?)_\d+"
    r"|(?:upenn[-_]gbm|ucs[fd][-_]p[a-z]+|rhuh(?:[-_]gbm)?)[-_]\d+|tcga-\w\w-\w{4})"
    r"|sub-[^_]+(?=_))[-_].+"
)
_DATED = re.compile(rf"(.*[^-_])[-_](?:{VISIT.pattern})", re.I)
_TABLE = re.compile(r"(?![.~]).*mapping.*\.(csv|tsv|txt|xlsx?)", re.I)
# Columns that name patients, and not what is known about them.
_NUMBER = (
    "(?:ids?|identi\\w*|n[or°]|num|numbers?|nummer|names?|codes?|keys?|uu?id|guid|barcode"
    "|label|index|hash|ref(?:erence)?|pseudonyms?|folder|in|study)"
)
_OF_PATIENTS = re.compile(
    r"(?i)(?!.*(site|instit|sex|gender|weight|surviv|(?<![a-z])age))"
    rf".*(subject|patient|person|participant|case|mrn)s?[\W_]*(?:{_NUMBER}[\W_]*)*\d*(\(.*)?"
    r"|(?!.*(site|instit|cent|hospital|scan|session|study|device|collect|cohort|visit"
    r"|rater|reader|series|protocol|data.?set|group|file)).*"
    r"(?<![a-z])ids?(?![a-z]).*|name|brats[\W_]?(?:20)?\d\d"  # not a doctor's name
)
_PERSON = re.compile(r"(?i).*(patient|person|participant|mrn)")
_SEED = "a whole number from 0 to 2**32 - 1"
_EMPTY = re.compile(
    r"(?i)[\W_]*(n/?a|nv|nan|nat|null|none|unknown|not available)?[\W_]*"
)


def find_patients(cases, *roots):
    """Return the patient of each case: scans of one patient stay together in a split.

    Scans are of one patient if their ids say so, where the set's naming counts visits,
    or if a table with "mapping" in its name does. Such tables are looked for in the
    folders, behind their links, and one level up.

    Parameters
    ----------
    cases : list of Case
        All of a set, or of several.
    *roots : path
        The folder of each set.

    Returns
    -------
    patients : dict of str to str
        {case id: patient}.
    notes : list of str
        For each table, how many ids it matched.

    Raises
    ------
    ValueError
        If a table cannot be read, or names none of the cases.
    """
    # 001 is 1 in a spreadsheet.
    ids = {c.id.lstrip("0") or "0": c.id for c in cases if c.id.isdigit()}
    ids |= {case.id.lower(): case.id for case in cases}
    links = {case.id: _links([case.id]) for case in cases}
    tables = _mapping_tables(cases, [*map(Path, roots)])
    matched = [(path.name, _link(links, ids, path)) for path in tables]
    groups, patients = unite(links), {}
    for case_ids, group in groups:
        # The shortest name that is no case's, such as TCGA's, or the id itself.
        names = [name for name in group if name.lower() not in ids]
        name = min(names, key=lambda n: (len(n), n), default=case_ids[0])
        patients |= dict.fromkeys(case_ids, name)
    several = sum(len(case_ids) > 1 for case_ids, _ in groups)
    told = f"of {len(cases)} ids matched, {several} patients with several scans"
    return patients, [f"{name}: {n} {told}" for name, n in matched]


def _links(names):
    """Return names of scans, and the patients they belong to."""
    found = [p.fullmatch(name) for name in names for p in (_VISIT, _DATED)]
    patients = {match[1] for match in found if match} - {*names}
    return {*names} | (_links(patients) if patients else set())


def _mapping_tables(cases, roots):
    """Return the tables that may say which scans are of one patient, each once."""
    roots = [root.absolute() for root in roots]
    folders = {f.parent for root in roots for f in (root, root.resolve())}
    around = Path(os.path.commonpath(roots))  # of several sets; it may be a whole disk
    folders |= {around, around.parent}
    for path in {path for case in cases for path in case.images.values()}:
        folders |= {*path.absolute().parents[1:3], *path.resolve().parents[1:3]}
    paths = itertools.chain(*map(walk, roots), *(f.glob("*.*") for f in folders))
    tables = (t for t in paths if _TABLE.fullmatch(t.name) and t.is_file())
    return sorted({table.resolve() for table in tables})


def _check_quotes(rows):
    """Raise if a cell's quotation marks never end: it would hold all that follows."""
    try:
        list(rows)
    except csv.Error as error:  # of others, such as 6" or "a" b, the text is clear
        if str(error).startswith("unexpected end"):
            raise csv.Error("its quotation marks do not match") from None


def read_csv(path):
    """Read a small table as text, as Excel and other programs save it.

    Parameters
    ----------
    path : path
        UTF-8 or UTF-16, else taken as Latin-1; columns separated by commas, semicolons
        or tabs, with a header line.

    Returns
    -------
    rows : list of dict of str to str
        A dictionary for each row. Nothing is converted: "NA" stays "NA".

    Raises
    ------
    ValueError
        If the file is not a text table; the message names it and what to do.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-16" if data[:1] in (b"\xff", b"\xfe") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = [line for line in re.split("\r\n|\r|\n", text) if line.strip()]
    lines = lines[1:] if lines and lines[0].startswith("sep=") else lines  # of Excel
    try:
        if "\0" in text or not lines:
            raise csv.Error("it is empty, or holds other data")
        form = {"delimiter": max(",;\t", key=lines[0].count)}
        _check_quotes(csv.reader(lines, strict=True, **form))
        names = [n.strip() for n in next(csv.reader(lines, **form))]
        twice = [name for name in names if names.count(name) > 1]
        if twice := [*filter(_OF_PATIENTS.fullmatch, twice)]:
            raise csv.Error(f"it has two columns named {twice[0]}")
        rows = [*csv.DictReader(lines, restval="", **form)]
        if long := [row for row in rows if any(row.get(None, ()))]:
            raise csv.Error(f"a row has more cells than the first: {long[0]}")
        if "" in names[1:] and any(row.get("") for row in rows):
            raise csv.Error(f"columns without names hold cells; is {names[0]} a title?")
    except csv.Error as error:
        problem = f"{path} is not a text table: {error}"
        raise ValueError(f"{problem}; save it as csv, or remove it") from None
    cells = [[(k, v) for k, v in row.items() if k is not None] for row in rows]
    return [{k.strip(): v.strip() for k, v in row} for row in cells]


def _link(links, ids, path):
    """Add what a table says to the links of the cases; return how many it names."""
    rows = [  # 1.0 is the patient 1, where a spreadsheet knew gaps in the column
        {k: re.sub(r"^(\d+)\.0+$", r"\1", v) for k, v in row.items()}
        for row in read_csv(path)
    ]
    # "NA" may be a case's id in the set's own column, and means nothing in others.
    names = {c: {r[c].lower() for r in rows} for c in (rows or [{}])[0]}
    hits = {c: len({ids[n] for n in names[c] if n in ids}) for c in names}
    known = [c for c in hits if _OF_PATIENTS.fullmatch(c)]
    own = max([*known, *hits], key=hits.get, default=None)  # the known, if equal
    columns = [c for c in hits if c == own or c in known]
    if columns == [own] and hits[own]:
        text = f"{path} has the ids in {own!r} and no column of patients that is known"
        warnings.warn(f"{text}: if there is one, call it patient_id", stacklevel=3)
    for column in filter(_PERSON.match, columns):
        ours = [r for r in rows if any(r[c].lower() in ids for c in columns)]
        blank = [r for r in ours if not r[column]]
        if blank and len(blank) < len(ours):
            named = next(filter(None, map(blank[0].get, columns)))
            problem = f"{path} leaves {column} empty for {named} (were cells merged?)"
            raise ValueError(f"{problem}: write the patient in each row, NA if unknown")
    matched, full = set(), {case_id.lower() for case_id in ids.values()}
    padded = any(name.startswith("0") and name.isdigit() for name in full)
    for row in rows:
        named = {c: n for c, n in row.items() if c == own or not _EMPTY.fullmatch(n)}
        # Patient 1 of one column is not number 1 of another; 001 may be a case's id.
        names = [
            f"{c} {n}" * (c != own and n.isdigit() and not (padded and n in full)) or n
            for c, n in named.items()  # of other columns, only the ids of cases
            if c in columns or (n.lower() in ids and not n.isdigit())
        ]
        same = {ids[name.lower()] for name in names if name.lower() in ids}
        for case_id in same:
            links[case_id] |= _links(names)
        matched |= same
    if not matched:
        problem = f"{path} names none of these cases ({next(iter(ids.values()))}, ...)"
        raise ValueError(f"{problem}: correct it, or remove it")
    return len(matched)


def unite(links):
    """Return groups of cases that are linked, directly or through others.

    Parameters
    ----------
    links : dict of str to set of str
        {case id: names}; cases with a name in common, whatever its case, are linked.

    Returns
    -------
    groups : list of (list of str, set of str)
        The case ids of a group, sorted, and all its names.
    """
    groups = []  # of (names in lower case, names, case ids)
    for case_id, names in links.items():
        keys, names, ids = {name.lower() for name in names}, set(names), [case_id]
        for group in [group for group in groups if group[0] & keys]:
            groups.remove(group)
            keys, names, ids = keys | group[0], names | group[1], ids + group[2]
        groups.append((keys, names, ids))
    return sorted((sorted(ids), names) for _, names, ids in groups)


def _read_prepared(prepared):
    """Return the manifest of a prepared data set, with the kept cases only."""
    manifest = files.read_manifest(prepared)
    where = {"file": prepared, "advice": "Run notebooks/01_prepare.ipynb again"}
    if manifest.get("kind") != "prepared" or not manifest["files"].get("cases.csv"):
        raise BratsDataError("no finished data set here", **where)
    cases = {i: each for i, each in manifest["cases"].items() if each["row"]["kept"]}
    names = [f"{kind}/{case_id}.npy" for case_id in cases for kind in KINDS]
    if missing := [name for name in names if not (prepared / name).is_file()]:
        problem = f"image without mask, or vice versa: {', '.join(missing[:5])} is"
        raise BratsDataError(f"{problem} missing", **where)
    return {**manifest, "cases": cases}


def name_images(row):
    """Return a name for each image of a prepared case; equal images have equal names.

    Parameters
    ----------
    row : dict
        Of the report of `prepare_dataset`.

    Returns
    -------
    names : set of str
        Made of the mean and SD of the whole scan, so that the crop does not matter.
    """
    names = [n.removesuffix("_mean") for n in row if n.endswith("_raw_mean")]
    return {f"{n} {row[n + '_mean']:.9g} {row[n + '_sd']:.9g}" for n in names}


def _group_by_patient(cases):
    """Return lists of case ids that must be on one side, sorted."""
    links = {}
    for case_id, record in cases.items():
        links[case_id] = {f"patient {record['patient']}", *name_images(record["row"])}
    return [ids for ids, _ in unite(links)]


def _choose_sides(groups, ratio, seed):
    """Return the numbers of the groups of each side, as splitfolders chooses."""
    # It copies files, so it is given empty ones: it decides, and no data moves.
    with tempfile.TemporaryDirectory() as workspace:
        staging, chosen = Path(workspace, "staging"), Path(workspace, "chosen")
        (staging / "groups").mkdir(parents=True)
        for number in range(len(groups)):
            (staging / "groups" / f"{number:06}").touch()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
            splitfolders.ratio(staging, chosen, seed=seed, ratio=ratio)
        return {s: [int(p.name) for p in chosen.glob(f"{s}/*/*")] for s in SIDES}


def _choose_folds(groups, folds, seed):
    """Return the numbers of the groups in "fold0/train", "fold0/val" and so on."""
    parts = KFold(folds, shuffle=True, random_state=seed).split(groups)
    names = (f"fold{fold}/{side}" for fold in range(folds) for side in SIDES)
    return dict(zip(names, itertools.chain(*parts), strict=True))


def _split(prepared, out, kind, choose, least, why, **choice):
    """Choose which groups of scans go into which folder; return {folder: case ids}.

    `choose` takes the groups, at least so many, and the choice.
    """
    prepared = files.check_path("prepared", prepared).resolve()
    manifest = _read_prepared(prepared)
    groups = _group_by_patient(manifest["cases"])
    numbers = choose(groups, **choice) if len(groups) >= least else {}
    ids = {f: sorted(i for n in numbers[f] for i in groups[n]) for f in numbers}
    if not ids or not all(ids.values()):
        n, advice = len(manifest["cases"]), "Provide more cases, or lower min_labelled"
        problem = f"{n} kept cases of {len(groups)} patients cannot be split {why}"
        raise BratsDataError(problem, file=prepared, advice=advice)
    _write_split(out, kind, prepared, manifest, ids, choice)
    return ids


def _write_split(out, kind, prepared, manifest, ids, choice):
    """Link the volumes of {folder within `out`: case ids} into an output folder."""
    made_from = {**choice, "prepared": str(prepared), "settings": manifest["made_from"]}
    names = [f"{f}/{part}/{i}.npy" for f in ids for part in KINDS for i in ids[f]]
    with files.OutputFolder(out, kind, inputs=[prepared], beside=True) as output:
        output.start_over(made_from, names)
        for name in names:
            source = "/".join(name.split("/")[-2:])  # in the prepared folder
            path, final = output.path / name, output.final / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.symlink_to(os.path.relpath(prepared / source, final.parent))
            except OSError:  # Windows without the right to link, some network drives
                shutil.copyfile(prepared / source, path)
            output.manifest["files"][name] = manifest["files"][source]
        cases = manifest["cases"].items()
        rows = {i: {**each["row"], "patient": each["patient"]} for i, each in cases}
        output.manifest["cases"] = rows
        output.put_in_place()


def _are_shares(ratio):
    return len(ratio) == 2 and all(r > 0 for r in ratio) and abs(sum(ratio) - 1) < 1e-6


def split_dataset(prepared, out, *, ratio=(0.75, 0.25), seed=42):
    """Split prepared cases into train and val with splitfolders, image and mask as one.

    Parameters
    ----------
    prepared : path
        A folder that `prepare_dataset` wrote.
    out : path
        Gets `train/` and `val/`, each with `images/` and `masks/` (links, or copies if
        the system cannot link). A former split there is replaced whole, in one step.
    ratio : tuple of 2 float
        Shares of train and val; they sum to 1.
    seed : int
        The same seed and cases give the same split.

    Returns
    -------
    ids : dict
        {"train": case ids, "val": case ids}, sorted.

    Raises
    ------
    BratsDataError
        If an image lacks its mask or vice versa, or a side would be empty.
    ValueError
        If `ratio` is not two shares, or `out` holds files that are not a split.
    """
    shares, why = "two shares above 0 that sum to 1", f"{ratio}: a side stays empty"
    files.check_option("ratio", ratio, _are_shares, shares)
    files.check_option("seed", seed, *files.whole(0))
    choice = {"ratio": [float(share) for share in ratio], "seed": int(seed)}
    return _split(prepared, out, "split", _choose_sides, 2, why, **choice)


def split_folds(prepared, out, *, folds=5, seed=42):
    """Split prepared cases for cross-validation: each is in `val` of just one fold.

    Parameters
    ----------
    prepared : path
        A folder that `prepare_dataset` wrote.
    out : path
        Gets `fold0/`, `fold1/`, ..., each as `split_dataset` makes it. Former folds are
        replaced whole, in one step.
    folds : int
        At least 2. Scans of one patient are in the same fold.
    seed : int
        The same seed and cases give the same folds.

    Returns
    -------
    ids : list of dict
        {"train": case ids, "val": case ids} of each fold, sorted.

    Raises
    ------
    BratsDataError
        If an image lacks its mask or vice versa, or there are fewer patients.
    ValueError
        If `folds` is less than 2, or `out` holds files that are not folds.
    """
    files.check_option("seed", seed, lambda n: files.is_whole(n) and n < 2**32, _SEED)
    files.check_option("folds", folds, *files.whole(2))
    choice = {"folds": int(folds), "seed": int(seed)}
    why = f"into {folds} folds"
    ids = _split(prepared, out, "folds", _choose_folds, folds, why, **choice)
    return [{side: ids[f"fold{n}/{side}"] for side in SIDES} for n in range(folds)]

"""Split prepared cases by patient into folders of links: train and val, or folds."""

import contextlib
import csv
import io
import itertools
import os
import re
import shutil
import tempfile
import unicodedata
import warnings
from pathlib import Path

import splitfolders
from sklearn.model_selection import KFold

from brats_utils import files
from brats_utils.labels import VISIT
from brats_utils.nifti import BratsDataError, walk

KINDS, SIDES = ("images", "masks"), ("train", "val")
# Scan ids. Group 1 is the patient, followed by the number or date of a visit.
_NUMBERED_ID = re.compile(
    r"(?i)((?:.+[-_])?(?:brats1[789]_[^_]+_[^_]+|brats-[a-z]+-\d+"
    r"|brats_(?:gli|ssa|men|mets?|goat|peds?)_\d+"
    r"|(?:upenn[-_]gbm|ucs[fd][-_]p[a-z]+|rhuh(?:[-_]gbm)?)[-_]\d+|tcga-\w\w-\w{4})"
    r"|sub-[^_]+(?=_))[-_].+"
)
_DATED_ID = re.compile(rf"(.*[^-_])[-_](?:{VISIT.pattern})", re.I)
# Spreadsheets are refused, not ignored: that would lose their links.
_TABLE_NAME = re.compile(
    r"(?![.~]).*mapping.*\.(csv|tsv|txt|xls\w?|ods|numbers)(\.(gz|bz2|xz|zip))?", re.I
)
# Headers of columns that name patients, not their age, sex, site and so on.
_ID_WORDS = (
    "(?:ids?|identi\\w*|n[or°]|num|numbers?|nummer|names?|codes?|keys?|uu?id|guid|barcode"
    "|label|index|hash|ref(?:erence)?|pseudonyms?|folder|in|study)"
)
_PATIENT_COLUMN = re.compile(
    r"(?i)(?!.*(site|instit|sex|gender|weight|surviv|(?<![a-z])age))"
    rf".*(subject|patient|person|participant|case|mrn)s?[\W_]*(?:{_ID_WORDS}[\W_]*)*\d*(\(.*)?"
    r"|(?!.*(site|instit|cent|hospital|scan|session|study|device|collect|cohort|visit"
    r"|rater|reader|series|protocol|data.?set|group|file|annotat|fold(?!er)|split|operator"
    r"|radiologist|review|grader|observer|expert|physician|clinician"
    r"|vendor|machine|batch|model|class|task|treat)).*"
    r"(?<![a-z])ids?(?![a-z]).*|name|brats[\W_]?(?:20)?\d\d"  # not a doctor's name
)
_PERSON_COLUMN = re.compile(r"(?i).*(patient|person|participant|mrn)")
# Headers of columns whose numbers are not those of scans.
_NO_SCAN_COLUMN = re.compile(
    rf"{_PERSON_COLUMN.pattern}|.*(subject|site|sex|gender|grade|weight|surviv)"
    "|(.*[^a-z])?(age|days?|weeks?|months?|years?|vol|size|score)(?![a-z])"
)
_SEED = "a whole number from 0 to 2**32 - 1"
_EMPTY = re.compile(
    r"(?i)[\W_]*(n[/.]?a|nv|nan|nat|null|none|unknown|missing|tba|tbd|to do"
    r"|not (available|known))?[\W_]*"
)


def find_patients(cases, *roots):
    """Return the patient of each case, to keep a patient's scans together in a split.

    Scans belong to the same patient if their ids say so, in sets whose ids include the
    visit, or if a table with "mapping" in its name says so. Such tables are searched
    for in the folders, following links, and one level up.

    Parameters
    ----------
    cases : list of Case
        All cases of one or several sets.
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
    # {name in lower case: case id}; a spreadsheet writes 001 as 1.
    ids = {c.id.lstrip("0") or "0": c.id for c in cases if c.id.isdigit()}
    ids |= {unicodedata.normalize("NFC", c.id).lower(): c.id for c in cases}
    links = {case.id: _with_patients([case.id]) for case in cases}
    matched = []
    for path in _find_tables(cases, [*map(Path, roots)]):
        matched.append((path.name, _apply_table(links, ids, path)))
    groups, patients = unite(links), {}
    for case_ids, group in groups:
        # The shortest name that is not a case id, such as TCGA-02-0006; or the id.
        names = [name for name in group if name.lower() not in ids]
        name = min(names, key=lambda n: (len(n), n), default=case_ids[0])
        patients |= dict.fromkeys(case_ids, name)
    several = sum(len(case_ids) > 1 for case_ids, _ in groups)
    summary = f"of {len(cases)} ids matched, {several} patients with several scans"
    return patients, [f"{name}: {n} {summary}" for name, n in matched]


def _with_patients(names):
    """Return the names of scans, and of the patients that these names contain."""
    names = {unicodedata.normalize("NFC", name) for name in names}  # as in tables
    found = [p.fullmatch(name) for name in names for p in (_NUMBERED_ID, _DATED_ID)]
    patients = {match[1] for match in found if match} - {*names}
    # A patient's name may end in another visit: <patient>_<week>_<date>.
    return {*names} | (_with_patients(patients) if patients else set())


def _find_tables(cases, roots):
    """Return the paths of tables that may map scans to patients."""
    roots = [root.absolute() for root in roots]
    folders = {f.parent for root in roots for f in (root, root.resolve())}
    # The common folder of several sets may be a whole disk, so it is not walked.
    common = Path(os.path.commonpath(roots))
    folders |= {common, common.parent}
    for path in {path for case in cases for path in case.images.values()}:
        folders |= {*path.absolute().parents[1:3], *path.resolve().parents[1:3]}
    paths = itertools.chain(*map(walk, roots), *(f.glob("*.*") for f in folders))
    tables = (t for t in paths if _TABLE_NAME.fullmatch(t.name) and t.is_file())
    return sorted({table.resolve() for table in tables})


def _check_quotes(rows):
    """Raise if a quotation mark is never closed: its cell would hold all that follows.

    `rows` is a strict reader. Other things that it rejects, like 6" or "a" b, are fine.
    """
    try:
        list(rows)
    except csv.Error as error:
        if str(error).startswith("unexpected end"):
            raise csv.Error("its quotation marks do not match") from None


def read_csv(path):
    """Read a small text table, as saved by Excel and other programs.

    Parameters
    ----------
    path : path
        In UTF-8, UTF-16 or else Latin-1, with a header line and columns separated by
        commas, semicolons or tabs.

    Returns
    -------
    rows : list of dict of str to str
        One dictionary per row. "NA" stays "NA". A name that comes again in the header
        gets a number.

    Raises
    ------
    ValueError
        If the file is not a text table; the message names it and says what to do.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-16" if data[:1] in (b"\xff", b"\xfe") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    text = unicodedata.normalize("NFC", text)  # as the ids of cases
    lines = [line for line in re.split("\r\n|\r|\n", text) if line.strip()]
    # Excel may put the separator in the first line, as "sep=;".
    lines = lines[1:] if lines and lines[0].startswith("sep=") else lines
    try:
        if "\0" in text or not lines:
            raise csv.Error("it is empty or no text")
        # The separator that makes most rows as long as the header, and the header long.
        sizes = {c: [len(r) for r in csv.reader(lines, delimiter=c)] for c in ",;\t"}
        fits = {c: sum(n == ns[0] > 1 for n in ns) for c, ns in sizes.items()}
        dialect = {"delimiter": max(sizes, key=lambda c: (fits[c], sizes[c][0]))}
        _check_quotes(csv.reader(lines, strict=True, **dialect))
        names = [n.strip() for n in next(csv.reader(lines, **dialect))]
        patient_columns = [name for name in names if _PATIENT_COLUMN.fullmatch(name)]
        if twice := [c for c in patient_columns if patient_columns.count(c) > 1]:
            raise csv.Error(f"it has two columns named {twice[0]}")
        # A name that comes again gets a number: DictReader keeps one of each name.
        keys = [f"{n} #{k}" if n in names[:k] else n for k, n in enumerate(names)]
        # The first row repeats the header.
        rows = [*csv.DictReader(lines, keys, restval="", **dialect)][1:]
        # DictReader puts the cells beyond the header under the key None.
        if too_long := [row for row in rows if any(row.get(None, ()))]:
            raise csv.Error(f"a row has more cells than the first: {too_long[0]}")
        unnamed = [keys[k] for k, name in enumerate(names) if k and not name]
        if any(row[key].strip() for row in rows for key in unnamed):
            raise csv.Error(f"unnamed columns hold values; is {names[0]} a title?")
    except csv.Error as error:
        problem = f"{path} is not a text table: {error}"
        raise ValueError(f"{problem}; save it as csv, or remove it") from None
    return [{k: v.strip() for k, v in r.items() if k is not None} for r in rows]


def _name_patients(case_ids):
    """Return {patient in lower case: case ids} of the patients that the ids contain."""
    patients = {}
    for case_id in case_ids:
        for name in _with_patients([case_id]) - {case_id}:
            patients.setdefault(name.lower(), set()).add(case_id)
    return patients


def _find_columns(rows, ids, patients):
    """Return a table's columns of scans, the main one first, and those of patients.

    The main one names the most cases or, failing that, the most patients of cases.
    """
    cells = {c: [row[c].lower() for row in rows] for c in (rows or [{}])[0]}
    hits = {}
    for column, names in cells.items():
        hits[column] = len({*names} & ids.keys()), len({*names} & patients.keys())
    named = [c for c in cells if _PATIENT_COLUMN.fullmatch(c)]
    # Of equals, max returns the first: numbers of patients may be numbers of cases.
    order = sorted([*named, *cells], key=lambda c: bool(_NO_SCAN_COLUMN.match(c)))
    id_columns = [max(order, key=hits.get)] if cells else []
    taken = {name for column in id_columns for name in cells[column]}
    for column in cells:  # more scans of the patient: other cases, each once
        names = [name for name in cells[column] if not _EMPTY.fullmatch(name)]
        other = {*names} - taken
        are_ids = len(other) == len(names) <= 2 * len(other & ids.keys())
        if names and are_ids and not _NO_SCAN_COLUMN.match(column):
            id_columns.append(column)
            taken |= other
    return id_columns, [column for column in named if column not in id_columns]


def _check_filled(rows, id_columns, patient_columns, path):
    """Raise if a column names the patients of some cases, and is empty for others."""
    for column in patient_columns:
        filled = [row[column] for row in rows if row[column]]
        # Merged cells: the first is filled, and no name comes twice. Ids of another set
        # may be missing, and so may those in one of several columns.
        merged = patient_columns == [column] and len({*filled}) == len(filled) > 0
        merged = merged and rows[0][column] and not re.match("(?i)brats|tcga", column)
        if merged or _PERSON_COLUMN.match(column):
            if blank := [row for row in rows if filled and not row[column]]:
                name = next(filter(None, map(blank[0].get, id_columns)))
                problem = f"{path} leaves {column} empty for {name} (merged cells?): "
                raise ValueError(f"{problem}write the patient in each row, or NA")


def _names_in(row, ids, number_ids, id_columns, patient_columns):
    """Return the names of scans and patients that a row of a table holds.

    `number_ids` are the numbers that are ids in any column.
    """
    names = set()
    for column, name in row.items():
        # "NA" may be a case id in the main column; elsewhere it is an empty cell.
        if not name or (_EMPTY.fullmatch(name) and column != id_columns[0]):
            continue
        if column in id_columns or (name.lower() in ids and not name.isdigit()):
            names.add(name)
        if column in patient_columns or column in id_columns[1:]:
            # Patient 1 in one column is not number 1 in another.
            is_number = name.isdigit() and name not in number_ids
            names.add(f"{column} {name}" if is_number else name)
    return names


def _apply_table(links, ids, path):
    """Add a table's names for the cases to `links`; return how many cases it matches.

    `links` is as in `unite`; `ids` is {name in lower case: case id}.
    """
    rows = [  # a spreadsheet writes patient 1 as 1.0 if the column has gaps
        {k: re.sub(r"^(\d+)\.0+$", r"\1", v) for k, v in row.items()}
        for row in read_csv(path)
    ]
    rows = [*{tuple(row.values()): row for row in rows}.values()]  # each one once
    patients = _name_patients(links)
    id_columns, patient_columns = _find_columns(rows, ids, patients)
    known = ids.keys() | patients.keys()
    ours = [row for row in rows if known & {row[c].lower() for c in id_columns}]
    if ours and not patient_columns and len(id_columns) == 1:
        text = f"{path} has the ids in {id_columns[0]!r} but no column of patients "
        text += "that is known: if there is one, call it patient_id"
        warnings.warn(text, stacklevel=3)
    _check_filled(ours, id_columns, patient_columns, path)
    # If some ids are written as 001, a number may be an id in any column.
    padded = any(i.isdigit() and i[0] == "0" for i in ids.values())
    matched, number_ids = set(), {*ids.values()} if padded else set()
    for row in rows:
        names = _names_in(row, ids, number_ids, id_columns, patient_columns)
        same = {ids[name.lower()] for name in names if name.lower() in ids}
        for column in id_columns:  # a row may be about all scans of a patient
            same |= patients.get(row[column].lower(), set())
        for case_id in same:
            links[case_id] |= _with_patients(names)
        matched |= same
    if not matched:
        problem = f"{path} has none of these cases ({next(iter(ids.values()))}, ...)"
        raise ValueError(f"{problem}: correct it, or remove it")
    return len(matched)


def unite(links):
    """Return groups of cases that are linked, directly or through others.

    Parameters
    ----------
    links : dict of str to set of str
        {case id: names}. Names are case-insensitive; cases that share one are linked.

    Returns
    -------
    groups : list of (list of str, set of str)
        The sorted case ids and all names of each group.
    """
    groups = []  # of (names in lower case, names, case ids)
    for case_id, names in links.items():
        lowered, names, ids = {name.lower() for name in names}, set(names), [case_id]
        # This case joins all groups that share a name with it into one.
        for group in [group for group in groups if group[0] & lowered]:
            groups.remove(group)
            lowered, names, ids = lowered | group[0], names | group[1], ids + group[2]
        groups.append((lowered, names, ids))
    return sorted((sorted(ids), names) for _, names, ids in groups)


def _read_prepared(prepared):
    """Return the manifest of a prepared data set, with the kept cases only."""
    manifest = files.read_manifest(prepared)
    where = {"file": prepared, "advice": "Run notebooks/01_prepare.ipynb again"}
    if manifest.get("kind") != "prepared" or not manifest["files"].get("cases.csv"):
        raise BratsDataError("no finished data set here", **where)
    report = {"cases.csv": manifest["files"]["cases.csv"]}
    if (prepared / "cases.csv").exists() and files.find_changed(prepared, report):
        text = f"{prepared / 'cases.csv'} was changed; it is a report that nothing "
        text += "reads. To leave cases out, prepare a list of the others"
        warnings.warn(text, stacklevel=4)
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
        Row of the report that `prepare_dataset` returns.

    Returns
    -------
    names : set of str
        Built from the mean and SD of the whole scan, so that the crop does not matter.
    """
    names = [n.removesuffix("_mean") for n in row if n.endswith("_raw_mean")]
    return {f"{n} {row[n + '_mean']:.9g} {row[n + '_sd']:.9g}" for n in names}


def _group_by_patient(cases):
    """Return groups of case ids that must stay together: same patient or same image."""
    links = {}
    for case_id, record in cases.items():
        links[case_id] = {f"patient {record['patient']}", *name_images(record["row"])}
    return [ids for ids, _ in unite(links)]


def _choose_sides(groups, ratio, seed):
    """Return {"train": indices of groups, "val": ...}, as splitfolders chooses them."""
    # splitfolders copies files, so each group is represented by an empty file.
    with tempfile.TemporaryDirectory() as workspace:
        staging, chosen = Path(workspace, "staging"), Path(workspace, "chosen")
        (staging / "groups").mkdir(parents=True)
        for number in range(len(groups)):
            (staging / "groups" / f"{number:06}").touch()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
            splitfolders.ratio(staging, chosen, seed=seed, ratio=ratio)
        return {s: [int(p.name) for p in chosen.glob(f"{s}/*/*")] for s in SIDES}


def _choose_folds(groups, folds, seed):
    """Return {"fold0/train": indices of groups, "fold0/val": ..., ...}."""
    parts = KFold(folds, shuffle=True, random_state=seed).split(groups)
    names = (f"fold{fold}/{side}" for fold in range(folds) for side in SIDES)
    return dict(zip(names, itertools.chain(*parts), strict=True))


def _split(prepared, out, kind, choose, least, why, **choice):
    """Split a prepared data set and write the result; return {folder: case ids}.

    `choose(groups, **choice)` returns {folder: indices of groups}; it needs at least
    `least` groups. `why` ends the error message if there are fewer, or a folder would
    be empty.
    """
    prepared = files.check_path("prepared", prepared).resolve()
    manifest = _read_prepared(prepared)
    groups = _group_by_patient(manifest["cases"])
    chosen = choose(groups, **choice) if len(groups) >= least else {}
    ids = {f: sorted(i for n in chosen[f] for i in groups[n]) for f in chosen}
    if not ids or not all(ids.values()):
        n, advice = len(manifest["cases"]), "Provide more cases, or lower min_labelled"
        problem = f"{n} kept cases of {len(groups)} patients cannot be split {why}"
        largest = max(groups, key=len, default=[])
        if 2 * len(largest) > n > 1:
            problem += f"; {', '.join(largest[:5])} ... are of one patient, or equal"
            advice = "If that is wrong, put the patient into each case's name or folder"
        raise BratsDataError(problem, file=prepared, advice=advice)
    _write_split(out, kind, prepared, manifest, ids, choice)
    return ids


def _write_split(out, kind, prepared, manifest, ids, choice):
    """Link volumes into an output folder; `ids` is {folder within `out`: case ids}."""
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
            # Windows without permission to link, or on another drive; network drives.
            except (OSError, ValueError):
                shutil.copyfile(prepared / source, path)
            output.manifest["files"][name] = manifest["files"][source]
        cases = manifest["cases"].items()
        rows = {i: {**each["row"], "patient": each["patient"]} for i, each in cases}
        output.manifest["cases"] = rows
        output.put_in_place()


def _are_shares(ratio):
    return len(ratio) == 2 and all(r > 0 for r in ratio) and abs(sum(ratio) - 1) < 1e-6


def split_dataset(prepared, out, *, ratio=(0.75, 0.25), seed=42):
    """Split prepared cases by patient into train and val, using splitfolders.

    Parameters
    ----------
    prepared : path
        A folder that `prepare_dataset` wrote.
    out : path
        Gets `train/` and `val/`, each with `images/` and `masks/` of the same cases (as
        links, or copies if links are not possible). An existing split is replaced in
        one step.
    ratio : tuple of 2 float
        Shares of train and val, which sum to 1.
    seed : int
        The same seed and cases give the same split.

    Returns
    -------
    ids : dict
        {"train": case ids, "val": case ids}, sorted.

    Raises
    ------
    BratsDataError
        If an image has no mask or vice versa, or train or val would be empty.
    ValueError
        If `ratio` is not valid, or `out` holds files that are not a split.
    """
    shares, why = "two shares above 0 that sum to 1", f"{ratio}: a side stays empty"
    files.check_option("ratio", ratio, _are_shares, shares)
    files.check_option("seed", seed, *files.whole(0))
    choice = {"ratio": [float(share) for share in ratio], "seed": int(seed)}
    return _split(prepared, out, "split", _choose_sides, 2, why, **choice)


def split_folds(prepared, out, *, folds=5, seed=42):
    """Split prepared cases for cross-validation: each is in `val` in exactly one fold.

    Parameters
    ----------
    prepared : path
        A folder that `prepare_dataset` wrote.
    out : path
        Gets `fold0/`, `fold1/`, ..., each laid out as in `split_dataset`. Existing
        folds are replaced in one step.
    folds : int
        Number of folds, at least 2. Scans of one patient stay in the same fold.
    seed : int
        The same seed and cases give the same folds.

    Returns
    -------
    ids : list of dict
        {"train": case ids, "val": case ids} of each fold, sorted.

    Raises
    ------
    BratsDataError
        If an image has no mask or vice versa, or there are fewer patients than folds.
    ValueError
        If `folds` is less than 2, or `out` holds files that are not folds.
    """
    files.check_option("seed", seed, lambda n: files.is_whole(n) and n < 2**32, _SEED)
    files.check_option("folds", folds, *files.whole(2))
    choice = {"folds": int(folds), "seed": int(seed)}
    why = f"into {folds} folds"
    ids = _split(prepared, out, "folds", _choose_folds, folds, why, **choice)
    return [{side: ids[f"fold{n}/{side}"] for side in SIDES} for n in range(folds)]

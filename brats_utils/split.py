"""Split prepared cases into train and val: by patient, into links, in one step."""

import contextlib
import csv
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import splitfolders
from sklearn.model_selection import KFold

from brats_utils.files import (
    OutputFolder,
    check_option,
    check_path,
    read_manifest,
    whole,
)
from brats_utils.nifti import BratsDataError, walk

KINDS = ("images", "masks")
# A patient's id, before the number or the date of the visit.
_VISIT = re.compile(
    r"(brats1[789]_[^_]+_[^_]+|brats-\w+-\d+|upenn-gbm-\d+|ucsf-pdgm-\d+"
    r"|tcga-\w\w-\w{4}|sub-[^_]+)[-_].+",
    re.I,
)
_TABLES = (".csv", ".tsv", ".txt", ".xls", ".xlsx")
_OF_PATIENTS = re.compile("id|subject|patient|case|name")  # columns that name them
_NOT_OF_PATIENTS = re.compile("site|instit|cent|hospital|scanner")
_EMPTY = ("", "na", "n/a", "nan", "none", "-")


def find_patients(cases, raw):
    """Return the patient of each case: scans of one patient stay together in a split.

    Scans are of one patient if their ids say so, where the set's naming counts visits,
    or if a table with "mapping" in its name does. Such tables are looked for in the
    folder, behind its links, and one level up.

    Parameters
    ----------
    cases : list of Case
        All of a set.
    raw : path
        Their folder.

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
    ids = {case.id.lower(): case.id for case in cases}
    links = {case.id: _links([case.id]) for case in cases}
    found = []
    for path in _mapping_tables(cases, Path(raw)):
        n_matched = _link(links, ids, path)
        found.append(f"{path.name}: {n_matched} of {len(ids)} ids matched")
    patients, several = {}, 0
    for group, case_ids in unite(links):
        # The shortest name that is no case's, such as TCGA's, or the id itself.
        names = {name.lower(): name for name in group if name.lower() not in ids}
        name = min(names.values(), key=lambda n: (len(n), n), default=case_ids[0])
        patients |= dict.fromkeys(case_ids, name)
        several += len(case_ids) > 1
    return patients, [
        f"{text}, {several} patients with several scans" for text in found
    ]


def _links(names):
    """Return names of scans, and the patients they belong to."""
    return {*names} | {m[1] for m in map(_VISIT.fullmatch, names) if m}


def _mapping_tables(cases, raw):
    """Return the tables that may say which scans are of one patient, each once."""
    paths = {path.absolute() for case in cases for path in case.images.values()}
    paths |= {path.resolve() for path in paths}
    folders = [Path(folder) for folder, _ in walk(raw)]
    folders += [raw.absolute().parent, raw.resolve().parent]
    folders += {p for path in paths for p in path.parents[1:3]}
    tables = {
        table.resolve()
        for folder in {folder.resolve() for folder in folders}
        for table in folder.glob("*.*")
        if "mapping" in table.name.lower() and table.suffix.lower() in _TABLES
    }
    return sorted(table for table in tables if not table.name.startswith((".", "~")))


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
        If the file is not a text table; the message names it.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-16" if data[:1] in (b"\xff", b"\xfe") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[1:] if lines and lines[0].startswith("sep=") else lines  # of Excel
    if "\0" in text or not lines:
        raise ValueError(f"{path} is not a text table")
    separator = max(",;\t", key=lines[0].count)
    rows = csv.DictReader(lines, delimiter=separator, restval="", restkey="more")
    try:
        return [
            {str(k).strip(): str(v).strip() for k, v in row.items()} for row in rows
        ]
    except csv.Error as error:
        raise ValueError(f"{path} is not a text table: {error}") from None


def _link(links, ids, path):
    """Add what a table says to the links of the cases; return how many it names."""
    try:
        rows = read_csv(path)
    except ValueError as error:
        raise ValueError(f"{error}; save it as csv, or remove it") from None
    columns = [c for c in rows[0] if _OF_PATIENTS.search(c.lower())] if rows else []
    columns = [c for c in columns if not _NOT_OF_PATIENTS.search(c.lower())]
    # "NA" may be a case's id in the set's own column, and means nothing in others.
    hits = {c: sum(row[c].lower() in ids for row in rows) for c in columns}
    own = max(hits, key=hits.get, default=None)
    matched = set()
    for row in rows:
        names = [row[c] for c in columns if c == own or row[c].lower() not in _EMPTY]
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
    groups : list of (set of str, list of str)
        All names of a group, and its case ids, sorted.
    """
    groups = []  # of (names in lower case, names, case ids)
    for case_id, names in links.items():
        keys, names, ids = {name.lower() for name in names}, set(names), [case_id]
        for group in [group for group in groups if group[0] & keys]:
            groups.remove(group)
            keys, names, ids = keys | group[0], names | group[1], ids + group[2]
        groups.append((keys, names, ids))
    return sorted(
        ((names, sorted(ids)) for _, names, ids in groups), key=lambda g: g[1]
    )


def _read_prepared(prepared):
    """Return the manifest of a prepared data set, with the kept cases only."""
    manifest, advice = read_manifest(prepared), "Run notebooks/01_prepare.ipynb again"
    if manifest.get("kind") != "prepared" or not manifest["files"].get("cases.csv"):
        raise BratsDataError("no finished data set here", file=prepared, advice=advice)
    cases = {i: each for i, each in manifest["cases"].items() if each["row"]["kept"]}
    missing = [
        name
        for name in (f"{kind}/{case_id}.npy" for case_id in cases for kind in KINDS)
        if not (prepared / name).is_file()
    ]
    if missing:
        raise BratsDataError(
            f"image without mask, or vice versa: {', '.join(missing[:5])} is missing",
            file=prepared,
            advice=advice,
        )
    return {**manifest, "cases": cases}


def _group_by_patient(manifest):
    """Return lists of case ids that must be on one side, sorted."""
    links = {}
    for case_id, record in manifest["cases"].items():
        row = record["row"]
        # Scans that share an image have the same mean and SD, whatever the crop.
        names = [
            name.removesuffix("_raw_sd") for name in row if name.endswith("raw_sd")
        ]
        pairs = [(row[f"{name}_raw_mean"], row[f"{name}_raw_sd"]) for name in names]
        images = {
            f"{n} {a:.9g} {b:.9g}" for n, (a, b) in zip(names, pairs, strict=True)
        }
        links[case_id] = {f"patient {record['patient']}", *images}
    return [ids for _, ids in unite(links)]


def _choose_sides(groups, ratio, seed):
    """Return {"train": ids, "val": ids} as splitfolders chooses among patients."""
    # It copies files, so it is given empty ones: it decides, and no data moves.
    with tempfile.TemporaryDirectory() as workspace:
        staging, chosen = Path(workspace, "staging"), Path(workspace, "chosen")
        for kind in KINDS:
            (staging / kind).mkdir(parents=True)
            for number in range(len(groups)):
                (staging / kind / f"{number:06}.npy").touch()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
            splitfolders.ratio(staging, chosen, seed=seed, ratio=ratio, group="sibling")
        return {
            side: _ids(groups, (int(p.stem) for p in chosen.glob(f"{side}/masks/*")))
            for side in ("train", "val")
        }


def _ids(groups, numbers):
    """Return the case ids of some groups, sorted."""
    return sorted(case_id for number in numbers for case_id in groups[number])


def _write_split(out, kind, prepared, manifest, sides, choice):
    """Link the volumes of {folder within `out`: case ids} into an output folder."""
    sources = {
        f"{side}/{part}/{case_id}.npy": f"{part}/{case_id}.npy"
        for side, case_ids in sides.items()
        for case_id in case_ids
        for part in KINDS
    }
    made_from = {**choice, "prepared": str(prepared)}
    made_from["settings"] = manifest["made_from"]
    with OutputFolder(out, kind, inputs=[prepared], beside=True) as output:
        output.clear()  # what a killed call left
        output.begin(made_from)
        output.claim(sources)
        for name, source in sources.items():
            path, final = output.path / name, output.final / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.symlink_to(os.path.relpath(prepared / source, final.parent))
            except OSError:  # Windows without the right to link, some network drives
                shutil.copyfile(prepared / source, path)
            output.manifest["files"][name] = manifest["files"][source]
        rows = {i: record["row"] for i, record in manifest["cases"].items()}
        output.manifest["cases"] = {i: rows[i] for ids in sides.values() for i in ids}
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
    check_option("ratio", ratio, _are_shares, "two shares above 0 that sum to 1")
    check_option("seed", seed, *whole(0))
    prepared = check_path("prepared", prepared).resolve()
    manifest = _read_prepared(prepared)
    groups = _group_by_patient(manifest)
    ids = _choose_sides(groups, ratio, int(seed)) if len(groups) > 1 else {}
    if not (ids.get("train") and ids.get("val")):
        _refuse(prepared, groups, f"{ratio}: a side stays empty")
    choice = {"ratio": list(ratio), "seed": int(seed)}
    _write_split(out, "split", prepared, manifest, ids, choice)
    return ids


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
    check_option("seed", seed, *whole(0))
    check_option("folds", folds, *whole(2))
    prepared = check_path("prepared", prepared).resolve()
    manifest = _read_prepared(prepared)
    groups = _group_by_patient(manifest)
    if len(groups) < folds:
        _refuse(prepared, groups, f"into {folds} folds")
    parts = KFold(int(folds), shuffle=True, random_state=int(seed)).split(groups)
    ids = [{"train": _ids(groups, a), "val": _ids(groups, b)} for a, b in parts]
    sides = {
        f"fold{i}/{side}": part[side] for i, part in enumerate(ids) for side in part
    }
    choice = {"folds": int(folds), "seed": int(seed)}
    _write_split(out, "folds", prepared, manifest, sides, choice)
    return ids


def _refuse(prepared, groups, why):
    """Raise: the kept cases are too few."""
    raise BratsDataError(
        f"{sum(map(len, groups))} kept cases of {len(groups)} patients cannot be split "
        f"{why}",
        file=prepared,
        advice="Provide more cases, or lower min_labelled",
    )

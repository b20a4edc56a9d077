"""Split prepared cases into train and val: by patient, into links, in one step."""

import contextlib
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import splitfolders
from sklearn.model_selection import KFold

from brats_utils.files import OutputFolder, check_option, read_csv, read_manifest
from brats_utils.nifti import BratsDataError

KINDS = ("images", "masks")
# A patient's id, before the number of the visit: BraTS 2017-2019, and since 2023.
_VISITS = re.compile(r"(BraTS1[789]_.+_\d+)_\d+|(BraTS-\w+-\d+)-\d+", re.I)


def find_patients(cases, raw):
    """Return the patient of each case: scans of one patient stay together in a split.

    Parameters
    ----------
    cases : list of Case
        All of a set.
    raw : path
        Their folder; a `name_mapping.csv` in it may name the patients. Otherwise the
        ids do, where the set's naming counts the visits, or each case is a patient.

    Returns
    -------
    patients : dict of str to str
        {case id: patient}.

    Raises
    ------
    ValueError
        If a mapping cannot be read.
    """
    patients = {}
    for case in cases:
        visit = _VISITS.fullmatch(case.id)
        patients[case.id] = (visit[1] or visit[2]) if visit else case.id
    for path in sorted(Path(raw).rglob("name_mapping*.csv")):
        for row in read_csv(path):
            name = row.get("TCGA_TCIA_subject_ID", "")
            same = [value for value in row.values() if value in patients]
            if name not in ("", "NA"):
                patients |= dict.fromkeys(same, name)
    return patients


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
            f"image without mask, or the reverse: {', '.join(missing[:5])} is missing",
            file=prepared,
            advice=advice,
        )
    return {**manifest, "cases": cases}


def _group_by_patient(manifest):
    """Return lists of case ids that must be on one side, sorted."""
    groups = []  # of (links, case ids): a link is a patient or a checksum of voxels
    for case_id, record in manifest["cases"].items():
        checksum = manifest["files"][f"images/{case_id}.npy"]["sha256"]
        links, ids = {record["patient"], checksum}, [case_id]
        for group in [group for group in groups if group[0] & links]:
            groups.remove(group)
            links, ids = links | group[0], ids + group[1]
        groups.append((links, ids))
    return sorted(sorted(ids) for _, ids in groups)


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
        If an image lacks its mask or the reverse, or a side would be empty.
    ValueError
        If `ratio` is not two shares, or `out` holds files that are not a split.
    """
    shares = "two shares above 0 that sum to 1"
    check_option("ratio", ratio, lambda r: min(r) > 0 and len(r) == 2, shares)
    check_option("ratio", ratio, lambda r: abs(sum(r) - 1) < 1e-6, shares)
    check_option("seed", seed, lambda n: n >= 0 and n == int(n), "0 or more")
    prepared = Path(prepared).resolve()
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
        If an image lacks its mask or the reverse, or there are fewer patients.
    ValueError
        If `folds` is less than 2, or `out` holds files that are not folds.
    """
    check_option("seed", seed, lambda n: n >= 0 and n == int(n), "0 or more")
    prepared = Path(prepared).resolve()
    check_option("folds", folds, lambda n: n >= 2 and n == int(n), "2 or more")
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
        advice="Give more cases, or lower min_labelled",
    )

"""A folder of prepared volumes: its parts, its checks, its split in train and val."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import splitfolders
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import KFold

from brats_utils.files import read_json, sha256
from brats_utils.layouts import short_name
from brats_utils.nifti import BratsDataError

KINDS = ("images", "masks")
REPORT, SETTINGS, MARKERS = "cases.csv", "settings.json", "finished"
PREPARE_AGAIN = "Run prepare_dataset (notebook 01) again"
# A patient's id, before the number of the visit: BraTS 2017-2019, and since 2023.
_VISITS = re.compile(r"(BraTS1[789]_.+_\d+)_\d+|(BraTS-\w+-\d+)-\d+", re.I)


def read_marker(path):
    """Read what was noted of a finished case.

    Parameters
    ----------
    path : path
        In `finished/`.

    Returns
    -------
    done : dict
        Empty where there is no marker, or a damaged one.
    """
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def all_there(folder, sizes):
    """Tell whether the files of a case are where they were, as long as they were.

    Parameters
    ----------
    folder : path
        What `prepare_dataset` wrote.
    sizes : dict of str to int
        Relative path to bytes.

    Returns
    -------
    there : bool
    """
    paths = {folder / name: size for name, size in sizes.items()}
    return all(p.is_file() and p.stat().st_size == n for p, n in paths.items())


def find_patients(cases, raw):
    """Tell which cases are scans of one patient, who must be on one side of a split.

    Parameters
    ----------
    cases : list of Case
        All of a set.
    raw : path
        Their folder, where `name_mapping.csv` may say whose they are. Otherwise the
        ids do, where the set's naming counts the visits; or each is a patient.

    Returns
    -------
    patients : dict of str to str
        {case id: patient}.
    """
    patients = {}
    for case in cases:
        visit = _VISITS.fullmatch(case.id)
        patients[case.id] = (visit[1] or visit[2]) if visit else case.id
    for path in sorted(Path(raw).rglob("name_mapping*.csv")):
        for row in pd.read_csv(path, dtype=str).to_dict("records"):
            name = row.get("TCGA_TCIA_subject_ID")
            same = [value for value in row.values() if value in patients]
            patients |= {case_id: name for case_id in same if isinstance(name, str)}
    return patients


def verify_dataset(prepared):
    """Compare each prepared volume, and each scan it was made of, with its checksum.

    Parameters
    ----------
    prepared : path
        What `prepare_dataset` wrote.

    Returns
    -------
    problems : pandas.DataFrame
        A row for each file that is missing or has changed: "case", "file", "problem".
        Scans that are no longer where they were are passed over.
    """
    prepared, rows = Path(prepared), []
    raw = Path(read_json(prepared / SETTINGS)["raw"])
    scans = {short_name(path): path for path in raw.rglob("*.nii*")}
    for marker in sorted((prepared / MARKERS).glob("*.json")):
        done = read_json(marker)
        noted = {scans[n]: v for n, v in done["checksums"].items() if n in scans}
        for name in done["sizes"]:
            noted[prepared / name] = done["row"][f"{name.split('/')[0]}_sha256"]
        for path, checksum in noted.items():
            if not path.is_file():
                rows.append((marker.stem, str(path), "is missing"))
            elif sha256(path) != checksum:
                rows.append((marker.stem, str(path), "changed since it was prepared"))
    return pd.DataFrame(rows, columns=["case", "file", "problem"])


def _groups(report):
    """Return lists of case ids that must be on one side: scans of one patient."""
    if report.empty:
        return []
    # Two cases with the same voxels are one patient, whatever their names: a case links
    # its patient to its voxels, and all that hangs together goes to one side.
    codes = [pd.factorize(report[c])[0] for c in ("patient", "images_sha256")]
    n = len(report)
    links = coo_array((np.ones(n), (codes[0], n + codes[1])), shape=(2 * n, 2 * n))
    component = connected_components(links, directed=False)[1][codes[0]]
    return report["case"].groupby(component, sort=False).agg(list).tolist()


def _sides(groups, ratio, seed, workspace):
    """Return {"train": ids, "val": ids} as splitfolders chooses among patients."""
    # It copies files, so it is given empty ones: it decides, and no data moves.
    for kind in KINDS:
        (workspace / "staging" / kind).mkdir(parents=True)
        for number in range(len(groups)):
            (workspace / "staging" / kind / f"{number:06}.npy").touch()
    chosen = workspace / "chosen"
    with contextlib.redirect_stderr(io.StringIO()):  # its bar counts copied files
        splitfolders.ratio(
            workspace / "staging", chosen, seed=seed, ratio=ratio, group="sibling"
        )
    return {
        side: _ids(groups, (int(p.stem) for p in (chosen / side).glob("masks/*.npy")))
        for side in ("train", "val")
    }


def _ids(groups, numbers):
    """Return the case ids of some groups, sorted."""
    return sorted(case_id for number in numbers for case_id in groups[number])


@contextlib.contextmanager
def _replacing(out):
    """Give a folder to work in, whose `new` takes the place of `out` in one step."""
    workspace = out.parent / f".{out.name}-new"
    shutil.rmtree(workspace, ignore_errors=True)  # of a call that was killed
    workspace.mkdir(parents=True)
    try:
        yield workspace
        if out.exists():
            out.rename(workspace / "old")
        (workspace / "new").rename(out)
    finally:
        shutil.rmtree(workspace)


def _link_side(prepared, case_ids, folder, final):
    """Fill one side of a split, built in `folder` and meant to lie in `final`."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for case_id in case_ids:
            source = prepared.resolve() / kind / f"{case_id}.npy"
            link = folder / kind / source.name
            try:
                link.symlink_to(os.path.relpath(source, final.resolve() / kind))
            except OSError:  # Windows without the right to link, some network drives
                shutil.copyfile(source, link)
    report = pd.read_csv(prepared / REPORT, dtype={"case": str})
    report[report["case"].isin(case_ids)].to_csv(folder / REPORT, index=False)
    shutil.copyfile(prepared / SETTINGS, folder / SETTINGS)


def _kept(prepared):
    """Return the report's rows of the cases that are there, pairs and all."""
    if not ((prepared / REPORT).is_file() and (prepared / SETTINGS).is_file()):
        raise BratsDataError(
            "no finished preparation here", file=prepared, advice=PREPARE_AGAIN
        )
    report = pd.read_csv(prepared / REPORT, dtype={"case": str, "patient": str})
    report = report[report["kept"]]
    for kind in KINDS:
        odd = {p.stem for p in (prepared / kind).glob("*.npy")} ^ set(report["case"])
        if odd:
            raise BratsDataError(
                f"{kind} and {REPORT} disagree, so image without mask or a stray file: "
                f"{sorted(odd)[:5]}",
                file=prepared,
                advice=PREPARE_AGAIN,
            )
    return report


def split_dataset(prepared, out, *, ratio=(0.75, 0.25), seed=42):
    """Split prepared cases into train and val with splitfolders, image and mask as one.

    Parameters
    ----------
    prepared : path
        What `prepare_dataset` wrote.
    out : path
        Gets `train/` and `val/`, each with `images/`, `masks/` (links, or copies where
        the system cannot link) and its rows of `cases.csv` and `settings.json`. A
        former split there is replaced whole, never added to.
    ratio : tuple of 2 float
        Shares of train and val; they sum to 1.
    seed : int
        Same seed and cases, same split.

    Returns
    -------
    ids : dict
        {"train": case ids, "val": case ids}, sorted.

    Raises
    ------
    BratsDataError
        If an image lacks its mask or the reverse, or a side would be empty.
    """
    prepared, out = Path(prepared), Path(out)
    groups = _groups(_kept(prepared))
    with _replacing(out) as workspace:
        ids = _sides(groups, ratio, seed, workspace) if len(groups) > 1 else {}
        if not (ids.get("train") and ids.get("val")):
            _refuse(prepared, groups, f"{ratio}: a side stays empty")
        for side, case_ids in ids.items():
            _link_side(prepared, case_ids, workspace / "new" / side, out / side)
    return ids


def split_folds(prepared, out, *, folds=5, seed=42):
    """Split prepared cases for cross-validation: each is in `val` of just one fold.

    Parameters
    ----------
    prepared : path
        What `prepare_dataset` wrote.
    out : path
        Gets `fold0/`, `fold1/`, ..., each as `split_dataset` makes it; what was there
        is replaced whole.
    folds : int
        At least 2. Scans of one patient are in the same fold.
    seed : int
        Same seed and cases, same folds.

    Returns
    -------
    ids : list of dict
        {"train": case ids, "val": case ids} of each fold, sorted.

    Raises
    ------
    BratsDataError
        If an image lacks its mask or the reverse, or there are fewer patients.
    """
    prepared, out = Path(prepared), Path(out)
    groups = _groups(_kept(prepared))
    if len(groups) < folds:
        _refuse(prepared, groups, f"into {folds} folds")
    parts = KFold(folds, shuffle=True, random_state=seed).split(groups)
    ids = [{"train": _ids(groups, a), "val": _ids(groups, b)} for a, b in parts]
    with _replacing(out) as workspace:
        for number, sides in enumerate(ids):
            for side, case_ids in sides.items():
                place = Path(f"fold{number}", side)
                _link_side(prepared, case_ids, workspace / "new" / place, out / place)
    return ids


def _refuse(prepared, groups, why):
    """Raise: the kept cases are too few."""
    raise BratsDataError(
        f"{sum(map(len, groups))} kept cases of {len(groups)} patients cannot be split "
        f"{why}",
        file=prepared,
        advice="Give more cases, or lower min_labelled",
    )

"""Write synthetic BraTS-like patients, in the data set's own folders and names.

What they look like is in `brats_utils.anatomy`; here is how they lie on the disk.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from scipy.special import ndtri

from brats_utils.anatomy import FULL_SHAPE, draw_patient
from brats_utils.cases import ALL_MODALITIES, Case
from brats_utils.nifti import save_volume

SETS = {
    "Training": Path("BraTS2020_TrainingData", "MICCAI_BraTS2020_TrainingData"),
    "Validation": Path("BraTS2020_ValidationData", "MICCAI_BraTS2020_ValidationData"),
}
MARKER = "PHANTOMS.txt"
ODD_NAME, ODD_INDEX = "W39_1998.09.19_Segm", 2


def _even_draws(seed, kind, index):
    """Return 20 standard normal draws, spread evenly over every eight cases."""
    rng = np.random.default_rng([seed, kind, 1, index // 8])
    eighths = rng.permuted(np.tile(np.arange(8), (20, 1)), axis=1)
    draws = ndtri((eighths + rng.random((20, 8))) / 8)
    return np.clip(draws[:, index % 8], -1.8, 1.8).tolist()


def _write_case(root, kind, index, seed, shape, suffix):
    """Draw and write one patient; return its Case."""
    number = int(kind == "Validation")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    case_id = f"BraTS20_{kind}_{index + 1:03}"
    folder = Path(root) / SETS[kind] / case_id
    paths = {k: folder / f"{case_id}_{k}{suffix}" for k in (*ALL_MODALITIES, "seg")}
    if index == ODD_INDEX:
        paths["seg"] = folder / f"{ODD_NAME}{suffix}"
    volumes = draw_patient(
        [seed, number, 0, index],
        _even_draws(seed, number, index),
        shape,
        enhances=not _is_low_grade(index),
        # One case in eight comes from a scanner with values some thirty times higher.
        brightness=25 if index % 8 == 3 else 1,
    )
    for key, volume in volumes:
        if kind == "Training" or key != "seg":
            save_volume(volume, paths[key], affine=affine)
    segmentation = paths.pop("seg")
    return Case(case_id, paths, segmentation if kind == "Training" else None)


def _write_tables(root, n_cases, seed):
    """Write stand-ins for the two tables that lie beside the training cases."""
    rng = np.random.default_rng([seed, 2])
    names = "BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID"
    mapping = [f"Grade,{names},BraTS_2019_subject_ID,BraTS_2020_subject_ID"]
    survival = ["Brats20ID,Age,Survival_days,Extent_of_Resection"]
    for index in range(n_cases):
        case_id = f"BraTS20_Training_{index + 1:03}"
        grade = "LGG" if _is_low_grade(index) else "HGG"
        mapping.append(f"{grade},NA,NA,NA,NA,{case_id}")
        age, days = rng.normal(60, 12), rng.lognormal(5.8, 0.8)
        survival.append(f"{case_id},{age:.3f},{days:.0f},NA")
    folder = Path(root) / SETS["Training"]
    (folder / "name_mapping.csv").write_text("\n".join(mapping) + "\n")
    (folder / "survival_info.csv").write_text("\n".join(survival) + "\n")


def _is_low_grade(index):
    """Say whether a case has no enhancing tumour: the 8th, 18th, 28th and so on."""
    return index % 10 == 7


def _check_arguments(n_cases, without_segmentation, shape):
    """Raise if a caller asks for what cannot be drawn."""
    if min(n_cases, without_segmentation) < 0 or n_cases + without_segmentation == 0:
        raise ValueError(
            "n_cases and without_segmentation count patients, one or more in all, not "
            f"{n_cases} and {without_segmentation}"
        )
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape is three sizes of 16 voxels or more, not {shape!r}")


def _clear(root):
    """Remove an earlier call's patients, and refuse to touch any others."""
    folders = [Path(root) / part.parts[0] for part in SETS.values()]
    there = [folder for folder in folders if folder.exists()]
    if there and not (Path(root) / MARKER).exists():
        raise ValueError(
            f"{there[0]} is there and was not written by write_phantom; pass another "
            "root, so that no real scan is lost"
        )
    for folder in there:
        shutil.rmtree(folder)


def write_phantom(
    root,
    n_cases,
    *,
    seed=0,
    shape=FULL_SHAPE,
    without_segmentation=0,
    compressed=False,
    jobs=None,
):
    """Write synthetic BraTS-like patients, in the Kaggle set's folders and names.

    The third training case has a segmentation of another name, as folder 355 of that
    set; the 8th, 18th, 28th... have no enhancing tumour. The same seed gives the same
    bytes, whatever `jobs`, and case i does not depend on how many are written.

    Parameters
    ----------
    root : path
        Folder to write to. Patients of an earlier call in it are replaced.
    n_cases : int
        Training patients, with segmentation.
    seed : int
        Another seed, other patients.
    shape : tuple of 3 int
        Voxels of a volume, 16 or more each; the anatomy is scaled to it.
    without_segmentation : int
        Validation patients, without segmentation, written besides.
    compressed : bool
        Write `.nii.gz` (slower) and not `.nii`.
    jobs : int, optional
        Patients drawn at once, in threads; as many as there are cores by default.

    Returns
    -------
    cases : list of Case
        Training cases, then validation cases, sorted by id.

    Raises
    ------
    ValueError
        If a count is negative or both are 0, `shape` is too small, or `root` holds a
        BraTS set that this function did not write.
    """
    _check_arguments(n_cases, without_segmentation, shape)
    _clear(root)
    Path(root).mkdir(parents=True, exist_ok=True)
    (Path(root) / MARKER).write_text("Synthetic patients, written by write_phantom.\n")
    suffix = ".nii.gz" if compressed else ".nii"
    wanted = [("Training", i) for i in range(n_cases)]
    wanted += [("Validation", i) for i in range(without_segmentation)]
    cases = Parallel(jobs or os.cpu_count(), prefer="threads")(
        delayed(_write_case)(root, kind, index, seed, tuple(shape), suffix)
        for kind, index in wanted
    )
    if n_cases:
        _write_tables(root, n_cases, seed)
    return cases

"""Write synthetic patients to disk, with the folders and file names of BraTS2020."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from scipy.special import ndtri

from brats_utils import __version__, files
from brats_utils.cases import Case
from brats_utils.labels import ALL_MODALITIES
from brats_utils.nifti import check_unedited, save_volume
from brats_utils.phantom.anatomy import FULL_SHAPE, draw_patient
from brats_utils.phantom.wide import draw_wide_patient

SET_FOLDER = "BraTS2020_{0}Data/MICCAI_BraTS2020_{0}Data"
# One segmentation has an odd name, as in folder 355 of the Kaggle data set.
ODD_NAME, ODD_INDEX = "W39_1998.09.19_Segm", 2


def _is_low_grade(index):
    """Return whether a case has no enhancing tumour: one in ten."""
    return index % 10 == 7


def _even_draws(seed, kind_number, index):
    """Return (5, 4) standard normal values, spread evenly over every eight cases."""
    rng = np.random.default_rng([seed, kind_number, 1, index // 8])
    eighths = rng.permuted(np.tile(np.arange(8), (20, 1)), axis=1)
    draws = ndtri((eighths + rng.random((20, 8))) / 8)
    return np.clip(draws[:, index % 8], -1.8, 1.8).reshape(5, 4).tolist()


def _plan_case(root, kind, index, suffix):
    """Return the case of a patient, with the paths to write to."""
    case_id = f"BraTS20_{kind}_{index + 1:03}"
    folder = Path(root, SET_FOLDER.format(kind), case_id)
    images = {m: folder / f"{case_id}_{m}{suffix}" for m in ALL_MODALITIES}
    stem = ODD_NAME if index == ODD_INDEX else f"{case_id}_seg"
    segmentation = folder / f"{stem}{suffix}" if kind == "Training" else None
    return Case(case_id, images, segmentation)


def _write_case(folder, root, case, index, seed, shape, wide):
    """Draw one patient and write its files."""
    kind_number = int(case.segmentation is None)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    if wide:
        volumes = draw_wide_patient([seed, kind_number, 3, index], shape)
    else:
        draws = _even_draws(seed, kind_number, index)
        # One case in eight is from a scanner with values about 25 times higher.
        look = {"brightness": 25 if index % 8 == 3 else 1}
        look |= {"enhances": not _is_low_grade(index)}
        volumes = draw_patient([seed, kind_number, 0, index], draws, shape, **look)
    paths = {**case.images, "seg": case.segmentation}
    for key, volume in volumes:
        if paths[key]:
            with folder.write(paths[key].relative_to(root).as_posix()) as temporary:
                save_volume(volume, temporary, affine=affine)


def _fill_tables(n_cases, seed):
    """Return {path: text} of the two tables that accompany the training cases."""
    rng = np.random.default_rng([seed, 2])
    names = "BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID"
    mapping = f"Grade,{names},BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
    survival = "Brats20ID,Age,Survival_days,Extent_of_Resection\n"
    for index in range(n_cases):
        case_id = f"BraTS20_Training_{index + 1:03}"
        mapping += f"{'LGG' if _is_low_grade(index) else 'HGG'},NA,NA,NA,NA,{case_id}\n"
        age, days = rng.normal(60, 12), rng.lognormal(5.8, 0.8)
        survival += f"{case_id},{age:.3f},{days:.0f},NA\n"
    tables = {"name_mapping.csv": mapping, "survival_info.csv": survival}
    folder = SET_FOLDER.format("Training")
    return {f"{folder}/{name}": text for name, text in tables.items()}


def _check_arguments(compressed, wide, jobs, shape, **numbers):
    """Validate the arguments and return them in a form that JSON can hold."""
    for name, value in numbers.items():
        files.check_option(name, value, *files.whole(0))
    total = numbers["n_cases"] + numbers["without_segmentation"]
    files.check_option("n_cases", total, bool, "at least one case")
    files.check_option("compressed", compressed, *files.BOOL)
    files.check_option("wide", wide, *files.BOOL)
    files.check_option("jobs", 1 if jobs is None else jobs, *files.whole(1))
    expected = "three whole numbers of at least 16"
    files.check_option("shape", shape, files.are(3, files.whole(16)[0]), expected)
    settings = {name: int(value) for name, value in numbers.items()}
    settings |= {"wide": True} if wide else {}
    settings |= {"shape": [int(n) for n in shape], "compressed": bool(compressed)}
    return {**settings, "version": __version__}


def _follow_renaming(case, root, noted):
    """Return a case as it is on disk: its odd segmentation may have been renamed.

    `noted`, the files in the manifest, is updated accordingly.
    """
    path = case.segmentation
    renamed = path and path.with_name(path.name.replace(ODD_NAME, f"{case.id}_seg"))
    if path is None or path.is_file() or not renamed.is_file():
        return case
    old, new = (p.relative_to(root).as_posix() for p in (path, renamed))
    if old in noted:
        noted[new] = noted.pop(old)
    return replace(case, segmentation=renamed)


def write_phantom(
    root,
    n_cases,
    *,
    seed=0,
    shape=FULL_SHAPE,
    without_segmentation=0,
    compressed=False,
    wide=False,
    jobs=None,
):
    """Write synthetic BraTS-like patients, laid out and named as in the Kaggle set.

    The segmentation of the third training case has an odd name, as in folder 355 of
    that set. The 8th, 18th, 28th case and so on have no enhancing tumour. The same seed
    gives identical files, whatever `jobs` is, and case i does not depend on how many
    cases are written. A second call with the same arguments keeps intact files.

    Parameters
    ----------
    root : path
        Folder to write to: absent, empty, or written by an earlier call. The files of
        that call are replaced; other files in the folder are kept.
    n_cases : int
        Number of training patients, which have a segmentation.
    seed : int
        Different seeds give different patients.
    shape : tuple of 3 int
        Voxels of a volume, at least 16 along each axis. The anatomy is scaled to it.
    without_segmentation : int
        Number of validation patients, which have no segmentation.
    compressed : bool
        Write `.nii.gz` files, which takes longer than `.nii`.
    wide : bool
        Draw patients that vary more than real ones, for pretraining; see
        `brats_utils.phantom.wide`.
    jobs : int, optional
        Number of patients to draw at once, in threads. By default, one per core.

    Returns
    -------
    cases : list of Case
        Training cases, then validation cases, sorted by id.

    Raises
    ------
    ValueError
        If an argument is invalid, no cases are requested, `root` holds only files of
        other origin, or writing would replace such a file or one that was edited
        since. Nothing is changed then.
    """
    root = files.check_path("root", root)
    numbers = {"n_cases": n_cases, "without_segmentation": without_segmentation}
    settings = _check_arguments(compressed, wide, jobs, shape, seed=seed, **numbers)
    suffix = ".nii.gz" if compressed else ".nii"
    patients = [("Training", i) for i in range(n_cases)]
    patients += [("Validation", i) for i in range(without_segmentation)]
    cases = [_plan_case(root, *patient, suffix) for patient in patients]
    paths = [path for c in cases for path in (*c.images.values(), c.segmentation)]
    tables = _fill_tables(n_cases, seed) if n_cases else {}
    names = [*tables, *(p.relative_to(root).as_posix() for p in paths if p)]
    with files.OutputFolder(root, "phantoms") as folder:
        noted = folder.manifest["files"]
        found = [_follow_renaming(case, root, noted) for case in cases]
        same = noted and folder.manifest["made_from"] == settings
        if same and not files.find_changed(folder.path, noted):
            return found
        check_unedited(folder.path, noted)
        folder.claim(names)  # refuses a user's file before anything is deleted
        folder.start_over(settings, names)
        jobs = min(jobs or -1, len(cases))  # -1: one per core
        Parallel(jobs, prefer="threads")(
            delayed(_write_case)(folder, root, case, index, seed, tuple(shape), wide)
            for case, (_, index) in zip(cases, patients, strict=True)
        )
        for name, text in tables.items():
            with folder.write(name) as temporary:
                temporary.write_text(text)
    return cases

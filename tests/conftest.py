"""Small synthetic cases that tests share: 24 x 24 x 16 voxels, a few KB each."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_utils.prepare import prepare_dataset
from brats_utils.volumes import NORMALISATION

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

SHAPE = (24, 24, 16)
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 23], [0, 0, 1, 0], [0, 0, 0, 1]])


def toy_volumes(seed=0, shape=SHAPE):
    """Return four raw images and a segmentation: a brain box with a tumour in it."""
    rng = np.random.default_rng(seed)
    brain = np.zeros(shape, bool)
    brain[3:-3, 2:-2, 1:-1] = True
    segmentation = np.zeros(shape, np.uint8)
    segmentation[8:16, 8:16, 4:10] = 2
    segmentation[10:14, 10:14, 5:9] = 1
    segmentation[11:13, 11:13, 6:8] = 4
    images = {}
    for name in ("flair", "t1", "t1ce", "t2"):
        image = rng.integers(50, 100, shape)
        image = (image + 40 * segmentation.astype(int)) * brain
        images[name] = image.astype(np.int16)
    return images, segmentation


def write_case(folder, case_id, *, seed=0, suffix=".nii", affine=AFFINE, **options):
    """Write a toy case; `seg_name` renames its label map, None leaves it out."""
    folder = Path(folder) / case_id
    folder.mkdir(parents=True)
    images, segmentation = toy_volumes(seed, options.get("shape", SHAPE))
    segmentation = options.get("segmentation", segmentation)
    for name, image in images.items():
        path = folder / f"{case_id}_{name}{suffix}"
        nib.save(nib.Nifti1Image(image, affine), path)
    seg_name = options.get("seg_name", f"{case_id}_seg{suffix}")
    if seg_name:
        nib.save(nib.Nifti1Image(segmentation, affine), folder / seg_name)
    return folder


@pytest.fixture
def tiny_weights(tmp_path, monkeypatch):
    """Replace the phantom weights by tiny ones with T1 as an optional channel."""
    import keras

    from brats_utils import model as models

    keras.utils.set_random_seed(3)
    network = {"filters": 2, "depth": 2, "stem_stride": 2}
    weights = models.unet((None, None, None, 4), **network).get_weights()
    names = ["flair", "t1", "t1ce", "t2"]
    description = {
        "modalities": names,
        "optional": ["t1"],
        "outputs": "labels 0..3",
        "normalisation": NORMALISATION,
        "orientation": "LPS",
        "about": "5 synthetic patients, no real scan",
    }
    record = json.dumps({"network": network, "description": description})
    arrays = {f"w{i:03}": array.astype(np.float16) for i, array in enumerate(weights)}
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, record=record, **arrays)
    monkeypatch.setattr(models, "PHANTOM_WEIGHTS", path)
    return path


@pytest.fixture
def toy_set(tmp_path):
    """Four labelled toy cases and one without segmentation; returns their root."""
    root = tmp_path / "raw"
    for number in range(1, 5):
        name = f"BraTS20_Training_{number:03}"
        write_case(root / "deep" / "er", name, seed=number)
    write_case(root / "validation", "BraTS20_Validation_001", seed=9, seg_name=None)
    return root


@pytest.fixture(scope="session")
def real_cases():
    """The first folder of real scans that `BRATS_REAL_CASES` names."""
    folder = os.environ.get("BRATS_REAL_CASES")
    if not folder:
        pytest.skip("BRATS_REAL_CASES is not set: no real scans here")
    return Path(folder.split(os.pathsep)[0])


def prepared_toys(toy_set, tmp_path, **options):
    """Prepare a set of toy cases; returns the folder and the report."""
    options = {"crop_shape": (16, 16, 8), **options}
    out = tmp_path / "prepared"
    return out, prepare_dataset(toy_set, out, **options)


def tree(folder):
    """Return {relative path: bytes, target of a link, or None of a folder}."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        content = path.read_bytes() if path.is_file() else None
        content = os.readlink(path) if path.is_symlink() else content
        found[path.relative_to(folder).as_posix()] = content
    return found

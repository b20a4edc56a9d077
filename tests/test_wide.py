"""Wide phantoms: what varies, and that the pretraining on them can be repeated."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from brats_utils.cases import check_cases, find_cases
from brats_utils.files import read_manifest
from brats_utils.phantom import write_phantom
from brats_utils.phantom.wide import _draw_contrasts, draw_wide_patient

SHAPE = (60, 60, 40)
MODALITIES = ("flair", "t1", "t1ce", "t2")
PRETRAIN = Path(__file__).parents[1] / "benchmarks" / "pretrain.py"


@pytest.fixture(scope="module")
def patients():
    return [dict(draw_wide_patient([1, i], SHAPE)) for i in range(60)]


def test_the_volumes_are_those_of_a_scan(patients):
    for volumes in patients[:5]:
        assert list(volumes) == ["seg", *MODALITIES]
        assert {volume.shape for volume in volumes.values()} == {SHAPE}
        assert {volumes[m].dtype for m in MODALITIES} == {np.dtype(np.int16)}
        brain = volumes["t1"] > 0
        assert all(((volumes[m] > 0) == brain).all() for m in MODALITIES)
        assert not volumes["seg"][~brain].any()


def test_the_same_seed_gives_the_same_patient(patients):
    again, other = (dict(draw_wide_patient([1, i], SHAPE)) for i in (3, 4))
    for name, volume in patients[3].items():
        np.testing.assert_array_equal(volume, again[name])
        assert (volume != other[name]).any() or name == "seg"


def test_tumours_are_of_every_kind(patients):
    maps = [volumes["seg"] for volumes in patients]
    counts = np.array([[np.count_nonzero(m == v) for v in (1, 2, 4)] for m in maps])
    ml = counts.sum(axis=1) * 1.0 * np.prod(np.divide((240, 240, 155), SHAPE)) / 1000
    ill = ml > 0
    assert 0.02 < np.mean(~ill) < 0.25  # healthy: a tenth
    assert 0.1 < np.mean(counts[ill, 2] == 0) < 0.45  # not enhancing: a quarter
    assert ml[ill].min() < 15 and ml.max() > 120 and ml.max() < 330
    core = (counts[:, 0] + counts[:, 2])[ill] / counts[ill].sum(axis=1)
    assert core.min() < 0.2 and core.max() > 0.8  # poor in core, poor in oedema
    corners = np.ones((3, 3, 3))
    foci = []
    for each in maps:
        parts = ndimage.label(each > 0, corners)[0]
        sizes = np.bincount(parts.ravel())[1:]
        foci.append(np.count_nonzero(sizes > 0.1 * sizes.max(initial=0)))
    assert {1, 2} <= {*foci}


def test_contrasts_vary_more_than_in_calibrated_phantoms(patients):
    contrasts = []
    for volumes in patients:
        labels, image = volumes["seg"], volumes["flair"].astype(float)
        brain = image > 0
        if np.count_nonzero(labels == 2) > 50:
            normal = image[brain & (labels == 0)]
            found = (image[labels == 2].mean() - normal.mean()) / image[brain].std()
            contrasts.append(found)
    assert np.std(contrasts) > 0.65  # real scans: 0.6, so are the calibrated phantoms
    assert np.mean(np.array(contrasts) > 0) > 0.8  # oedema still is mostly bright


def test_brains_differ_in_size_and_place(patients):
    masks = [volumes["t1"] > 0 for volumes in patients]
    sizes = np.array([np.count_nonzero(mask) for mask in masks])
    assert sizes.std() / sizes.mean() > 0.09  # real ones: 123 ml of 1471
    sides = [np.argwhere(mask).mean(axis=0) for mask in masks]
    assert (np.std(sides, axis=0) > 0.1).all()


def test_written_they_are_a_valid_data_set(tmp_path):
    cases = write_phantom(tmp_path / "a", 3, shape=(32, 32, 32), wide=True, jobs=1)
    with pytest.warns(UserWarning, match="W39"):
        assert find_cases(tmp_path / "a") == cases
    assert check_cases(cases).empty
    write_phantom(tmp_path / "b", 2, shape=(32, 32, 32), wide=True, jobs=2)
    paths = sorted((tmp_path / "b").rglob("*_00[12]_*.nii"))
    assert len(paths) == 10
    for path in paths:
        other = tmp_path / "a" / path.relative_to(tmp_path / "b")
        assert path.read_bytes() == other.read_bytes()
    assert read_manifest(tmp_path / "a")["made_from"]["wide"]
    with pytest.raises(ValueError, match="wide is 1"):
        write_phantom(tmp_path / "c", 1, wide=1)


def contrast(volumes, name, label):
    """Return how much brighter a label is than normal brain, in its SDs."""
    image, labels = volumes[name].astype(float), volumes["seg"]
    normal = image[(image > 0) & (labels == 0)]
    return (image[labels == label].mean() - normal.mean()) / normal.std()


def test_t1ce_shows_what_t1_does_and_enhancement(patients):
    pairs, added = [], []
    for volumes in patients:
        for label in (1, 2, 4):
            if np.count_nonzero(volumes["seg"] == label) > 50:
                pair = [contrast(volumes, name, label) for name in ("t1", "t1ce")]
                if label == 4:
                    added.append(pair[1] - pair[0])
                else:
                    pairs.append(pair)
    assert np.corrcoef(np.transpose(pairs))[0, 1] > 0.5
    assert np.mean(np.array(added) > 0.3) > 0.8


def test_t1ce_is_drawn_like_the_other_modalities_in_some_patients():
    draws = [_draw_contrasts(np.random.default_rng(seed), 1.0) for seed in range(300)]
    # The first of a row is shared by the classes; with T1, it is in the others.
    linked = [row[0] == 0 for _, _, row, _ in draws]
    assert 0.6 < np.mean(linked) < 0.8


@pytest.fixture
def script(monkeypatch):
    """Load pretrain.py, with a tiny network, patches and brains."""
    spec = importlib.util.spec_from_file_location("pretrain", PRETRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setenv("BRATS_SHAPE", "32,32,32")
    network = {"n_classes": 4, "filters": 2, "depth": 2, "stem_stride": 2}
    monkeypatch.setattr(script, "NETWORK", network)
    patches = {"batch_size": 1, "patch_shape": (16, 16, 16)}
    monkeypatch.setattr(script, "PATCHES", patches)
    return script


def test_pretraining_goes_on_from_the_weights_that_are_there(
    tmp_path, script, tiny_weights
):
    path = tmp_path / "weights-2.npz"
    call = {"start": "phantom", "modalities": MODALITIES}
    script.pretrain(tmp_path / "data", 17, 1, path, **call)
    with np.load(path) as saved:
        description = json.loads(saved["record"].item())["description"]
    assert description["about"] == "20 synthetic patients, no real scan"
    assert description["optional"] == ["t1"]
    history = script.pretrain(tmp_path / "data", 17, 1, path, **call)
    assert len(history) == 1  # finished: resumed, from the same file


def test_pretraining_again_gives_the_same_weights(tmp_path, script):
    for name in "ab":
        path = tmp_path / f"{name}.npz"
        history = script.pretrain(tmp_path / name, 17, 2, path)
        assert history["epoch"].tolist() == [1, 2]
    first, again = ((tmp_path / f"{name}.npz").read_bytes() for name in "ab")
    assert first == again
    with np.load(tmp_path / "a.npz") as saved:
        arrays = {name: saved[name] for name in saved.files}
    description = json.loads(arrays.pop("record").item())["description"]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    assert description["about"] == "15 synthetic patients, no real scan"
    assert "train_cases" not in description
    script.pretrain(tmp_path / "a", 17, 2, tmp_path / "again.npz")  # finished: resumed
    assert (tmp_path / "again.npz").read_bytes() == first

import hashlib
from pathlib import Path

import numpy as np
import pytest

from brats_utils.cases import find_cases, load_case, read_grid
from brats_utils.labels import REGIONS
from brats_utils.phantom import write_phantom

SHAPE = (24, 24, 16)


def checksums(root):
    return {
        path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return root, write_phantom(root, 10, shape=SHAPE, without_segmentation=1)


def test_writes_the_layout_and_names_of_the_data_set(small_set):
    root, cases = small_set
    folder = root / "BraTS2020_TrainingData" / "MICCAI_BraTS2020_TrainingData"
    first = folder / "BraTS20_Training_001"
    assert sorted(path.name for path in first.iterdir()) == [
        f"BraTS20_Training_001_{key}.nii"
        for key in ("flair", "seg", "t1", "t1ce", "t2")
    ]
    assert (folder / "name_mapping.csv").read_text().count("\n") == 11
    assert (folder / "survival_info.csv").read_text().startswith("Brats20ID,Age,")
    assert (folder / "BraTS20_Training_003" / "W39_1998.09.19_Segm.nii").is_file()
    assert find_cases(root) == cases
    assert [case.segmentation is None for case in cases] == [False] * 10 + [True]
    assert "MICCAI_BraTS2020_ValidationData" in str(cases[-1].images["t1"])


def test_a_phantom_is_stored_as_a_real_case_is(small_set):
    _, cases = small_set
    image, segmentation, affine = load_case(cases[0], ("flair", "t1", "t1ce", "t2"))
    assert read_grid(cases[0])[0] == SHAPE
    assert image.shape == (*SHAPE, 4)
    np.testing.assert_array_equal(np.diag(affine), [-1, -1, 1, 1])
    np.testing.assert_array_equal(affine[:3, 3], [0, 23, 0])
    brain = image[..., 0] > 0
    for channel in range(4):  # one brain mask, zero outside, never zero inside
        np.testing.assert_array_equal(image[..., channel] > 0, brain)
    assert 0.1 < brain.mean() < 0.25  # a real one: 1471 ml of 8928
    assert not segmentation[~brain].any()


def test_every_tumour_class_is_there_but_in_one_case_of_ten(small_set):
    for number, case in enumerate(small_set[1][:10], start=1):
        segmentation = load_case(case, ())[1]
        held = {region: np.isin(segmentation, v).any() for region, v in REGIONS.items()}
        assert held == {"WT": True, "TC": True, "ET": number != 8}


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path):
    for name, jobs in (("one", 1), ("two", 2)):
        write_phantom(tmp_path / name, 3, seed=5, shape=SHAPE, jobs=jobs)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_a_case_depends_on_seed_and_number_alone(tmp_path):
    write_phantom(tmp_path / "few", 1, seed=5, shape=SHAPE)
    write_phantom(tmp_path / "more", 2, seed=5, shape=SHAPE)
    write_phantom(tmp_path / "other", 1, seed=6, shape=SHAPE)
    few, more, other = (checksums(tmp_path / n) for n in ("few", "more", "other"))
    scans = [path for path in few if path.suffix == ".nii"]
    assert len(scans) == 5
    assert all(few[path] == more[path] for path in scans)
    assert all(few[path] != other[path] for path in scans)


def test_compressed_scans_hold_the_same_voxels(tmp_path, small_set):
    case = write_phantom(tmp_path, 1, shape=SHAPE, compressed=True)[0]
    assert all(p.name.endswith(".nii.gz") for p in case.images.values())
    for packed, plain in zip(load_case(case), load_case(small_set[1][0]), strict=True):
        np.testing.assert_array_equal(packed, plain)


def test_a_second_call_replaces_phantoms_and_spares_other_scans(tmp_path):
    write_phantom(tmp_path, 2, shape=SHAPE)
    write_phantom(tmp_path, 1, shape=SHAPE, compressed=True)
    assert len(find_cases(tmp_path)) == 1
    (tmp_path / "real" / "BraTS2020_TrainingData").mkdir(parents=True)
    with pytest.raises(ValueError, match="not written by write_phantom"):
        write_phantom(tmp_path / "real", 1, shape=SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cases": -1}, "count patients"),
        ({"n_cases": 0}, "one or more in all, not 0 and 0"),
        ({"n_cases": 1, "shape": (24, 24)}, "three sizes of 16"),
        ({"n_cases": 1, "shape": (240, 240, 8)}, "three sizes of 16"),
    ],
)
def test_impossible_wishes_are_refused_in_plain_words(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_phantom(tmp_path, **arguments)
    assert not any(tmp_path.iterdir())

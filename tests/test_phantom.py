import hashlib
from pathlib import Path

import numpy as np
import pytest

from brats_utils import __version__
from brats_utils.cases import find_cases, load_case, rename_odd_segmentation
from brats_utils.files import read_manifest
from brats_utils.labels import REGIONS
from brats_utils.nifti import file_states
from brats_utils.phantom import write, write_phantom

SHAPE = (24, 24, 16)
TRAINING = "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData"


def checksums(root):
    """Return {relative path: SHA-256} of all files; links are not followed."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


def scans(root):
    return {name: s for name, s in checksums(root).items() if ".nii" in name}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return root, write_phantom(root, 10, shape=SHAPE, without_segmentation=1)


def test_writes_the_layout_and_names_of_the_data_set(small_set):
    root, cases = small_set
    first = root / TRAINING / "BraTS20_Training_001"
    assert sorted(path.name for path in first.iterdir()) == [
        f"BraTS20_Training_001_{key}.nii"
        for key in ("flair", "seg", "t1", "t1ce", "t2")
    ]
    odd = root / TRAINING / "BraTS20_Training_003" / "W39_1998.09.19_Segm.nii"
    assert cases[2].segmentation == odd and odd.is_file()
    assert find_cases(root) == cases
    assert [case.segmentation is None for case in cases] == [False] * 10 + [True]
    assert "MICCAI_BraTS2020_ValidationData" in str(cases[-1].images["t1"])


def test_tables_have_a_row_for_each_training_case(small_set):
    folder = small_set[0] / TRAINING
    mapping = (folder / "name_mapping.csv").read_text().splitlines()
    assert mapping[0].startswith("Grade,") and len(mapping) == 11
    assert mapping[7:9] == [
        "HGG,NA,NA,NA,NA,BraTS20_Training_007",
        "LGG,NA,NA,NA,NA,BraTS20_Training_008",
    ]
    survival = (folder / "survival_info.csv").read_text().splitlines()
    assert survival[0] == "Brats20ID,Age,Survival_days,Extent_of_Resection"
    assert survival[10].startswith("BraTS20_Training_010,") and len(survival) == 11


def test_a_phantom_is_stored_as_a_real_case_is(small_set):
    _, cases = small_set
    image, segmentation, affine = load_case(cases[0], ("flair", "t1", "t1ce", "t2"))
    assert image.shape == (*SHAPE, 4)
    np.testing.assert_array_equal(np.diag(affine), [-1, -1, 1, 1])
    np.testing.assert_array_equal(affine[:3, 3], [0, 23, 0])
    brain = image[..., 0] > 0
    for channel in range(4):  # one brain mask, zero outside, never zero inside
        np.testing.assert_array_equal(image[..., channel] > 0, brain)
    assert 0.1 < brain.mean() < 0.25  # a real one: 1471 ml of 8928
    assert not segmentation[~brain].any()


def test_every_tumour_class_is_there_except_in_one_case_of_ten(small_set):
    for number, case in enumerate(small_set[1][:10], start=1):
        segmentation = load_case(case, ())[1]
        held = {region: np.isin(segmentation, v).any() for region, v in REGIONS.items()}
        assert held == {"WT": True, "TC": True, "ET": number != 8}


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path):
    for name, jobs in (("one", 1), ("two", 2)):
        write_phantom(tmp_path / name, 3, seed=5, shape=SHAPE, jobs=jobs)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_a_case_depends_only_on_seed_and_number(tmp_path):
    write_phantom(tmp_path / "few", 1, seed=5, shape=SHAPE)
    write_phantom(tmp_path / "more", 2, seed=5, shape=SHAPE)
    write_phantom(tmp_path / "other", 1, seed=6, shape=SHAPE)
    few, more, other = (scans(tmp_path / name) for name in ("few", "more", "other"))
    assert len(few) == 5
    assert few.items() <= more.items()
    assert few.keys() == other.keys() and not few.items() & other.items()


def test_compressed_scans_hold_the_same_voxels(tmp_path, small_set):
    case = write_phantom(tmp_path, 1, shape=SHAPE, compressed=True)[0]
    assert all(path.name.endswith(".nii.gz") for path in case.images.values())
    for packed, plain in zip(load_case(case), load_case(small_set[1][0]), strict=True):
        np.testing.assert_array_equal(packed, plain)


def test_the_manifest_lists_what_was_written_and_from_which_settings(small_set):
    root = small_set[0]
    manifest = read_manifest(root)
    assert manifest["kind"] == "phantoms"
    assert manifest["made_from"] == {
        "n_cases": 10,
        "without_segmentation": 1,
        "seed": 0,
        "shape": list(SHAPE),
        "compressed": False,
        "version": __version__,
    }
    files = manifest["files"].items()
    written = {name: noted["sha256"] for name, noted in files if noted}
    found = checksums(root)
    assert found.pop("manifest.json") and written == found


def test_a_second_call_deletes_only_the_files_of_the_first(tmp_path):
    root, fresh = tmp_path / "root", tmp_path / "fresh"
    write_phantom(root, 2, shape=SHAPE, without_segmentation=1)
    stray = {
        "notes.txt": "mine",
        f"{TRAINING}/BraTS20_Training_002/mask.nii": "mine too",
        "BraTS2020_ValidationData/x.nii": "and this",
    }
    for name, text in stray.items():
        (root / name).write_text(text)
    for folder in (root, fresh):
        write_phantom(folder, 1, seed=1, shape=SHAPE, compressed=True)
    assert {name: (root / name).read_text() for name in stray} == stray
    for name in stray:
        (root / name).unlink()
    assert checksums(root) == checksums(fresh)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_second_call_with_the_same_arguments_leaves_the_files(tmp_path, renamed):
    options = {"shape": SHAPE, "without_segmentation": 1}
    write_phantom(tmp_path, 3, **options)
    if renamed:
        rename_odd_segmentation(tmp_path)
    paths = sorted(tmp_path.rglob("*.nii"))
    before = file_states(paths)
    cases = write_phantom(tmp_path, 3, **options)
    assert file_states(paths) == before and sorted(tmp_path.rglob("*.nii")) == paths
    assert cases == find_cases(tmp_path)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_damaged_label_map_is_written_again_by_the_same_call(tmp_path, renamed):
    write_phantom(tmp_path, 3, shape=SHAPE)
    expected = scans(tmp_path)
    if renamed:
        rename_odd_segmentation(tmp_path)
    path = next((tmp_path / TRAINING / "BraTS20_Training_003").glob("*[Ss]eg*"))
    path.write_bytes(bytes(path.stat().st_size))
    write_phantom(tmp_path, 3, shape=SHAPE)
    if renamed:  # the manifest never listed this name as complete
        assert not path.exists()
    assert scans(tmp_path) == expected


def test_an_interrupted_call_can_be_repeated(tmp_path, monkeypatch):
    save_volume, written = write.save_volume, []

    def fail_at_the_seventh(volume, path, **options):
        written.append(path)
        if len(written) == 7:
            raise KeyboardInterrupt
        save_volume(volume, path, **options)

    monkeypatch.setattr(write, "save_volume", fail_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "root", 2, shape=SHAPE, jobs=1)
    monkeypatch.undo()
    for name in ("root", "fresh"):
        write_phantom(tmp_path / name, 1, shape=SHAPE)
    assert checksums(tmp_path / "root") == checksums(tmp_path / "fresh")


@pytest.mark.parametrize(
    "name",
    ["BraTS2020_TrainingData/x.nii", "notes.txt", "BraTS20_Training_001_t1.nii.gz"],
)
def test_a_folder_with_files_of_the_user_is_refused_and_kept(tmp_path, name):
    root = tmp_path / "raw"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("mine")
    with pytest.raises(ValueError, match="not a folder of this project"):
        write_phantom(root, 1, shape=SHAPE)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [root / name]
    assert (root / name).read_text() == "mine"


def test_a_scan_of_the_user_in_the_way_is_not_overwritten(tmp_path):
    write_phantom(tmp_path, 1, shape=SHAPE)
    scan = tmp_path / TRAINING / "BraTS20_Training_002" / "BraTS20_Training_002_t1.nii"
    scan.parent.mkdir()
    scan.write_text("mine")
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match="BraTS20_Training_002_t1.nii"):
        write_phantom(tmp_path, 2, seed=1, shape=SHAPE)
    assert checksums(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cases": -1}, "0 or more"),
        ({"n_cases": 0}, "at least one case"),
        ({"n_cases": 1.5}, "n_cases is 1.5"),
        ({"n_cases": "3"}, "n_cases is '3'"),
        ({"seed": -1}, "seed is -1"),
        ({"shape": (24, 24)}, "three whole numbers of at least 16"),
        ({"shape": (240, 240, 8)}, "three whole numbers of at least 16"),
        ({"shape": (24, 24, 16.0)}, "three whole numbers of at least 16"),
        ({"jobs": "two"}, "jobs is 'two'"),
        ({"jobs": 0}, "jobs is 0"),
        ({"compressed": "no"}, "True or False"),
    ],
)
def test_J4_wrong_arguments_leave_everything_as_it_was(tmp_path, arguments, message):
    write_phantom(tmp_path, 1, shape=SHAPE)
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_phantom(tmp_path, **{"n_cases": 1, "shape": SHAPE, **arguments})
    assert checksums(tmp_path) == before


def test_a_renamed_segmentation_does_not_outlive_its_patients(tmp_path):
    root, fresh = tmp_path / "root", tmp_path / "fresh"
    for seed in (1, 2):
        write_phantom(root, 3, shape=SHAPE, seed=seed)
        assert len(rename_odd_segmentation(root)) == 1
    write_phantom(fresh, 3, shape=SHAPE, seed=2)
    rename_odd_segmentation(fresh)
    found, expected = checksums(root), checksums(fresh)
    assert {**found, "manifest.json": ""} == {**expected, "manifest.json": ""}


def test_H2_a_patient_that_was_changed_by_hand_is_not_replaced(tmp_path):
    write_phantom(tmp_path / "root", 2, shape=SHAPE)
    next((tmp_path / "root").rglob("*_t2.nii")).write_bytes(b"changed")
    before = checksums(tmp_path / "root")
    with pytest.raises(ValueError, match="were changed"):
        write_phantom(tmp_path / "root", 2, shape=SHAPE, seed=1)
    assert checksums(tmp_path / "root") == before


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_H1_a_scan_that_was_edited_is_not_replaced(tmp_path, seed, renamed):
    write_phantom(tmp_path, 3, shape=SHAPE)
    if renamed:
        rename_odd_segmentation(tmp_path)
    path = next((tmp_path / TRAINING / "BraTS20_Training_003").glob("*[Ss]eg*"))
    edited = bytearray(path.read_bytes())
    edited[-1] = 4  # a voxel: as long as it was
    path.write_bytes(edited)
    before = scans(tmp_path)
    with pytest.raises(ValueError, match=f"{path.name} was changed after"):
        write_phantom(tmp_path, 3, shape=SHAPE, seed=seed)
    assert scans(tmp_path) == before


def test_J4_options_of_numpy_and_more_jobs_than_patients(tmp_path):
    options = {"shape": SHAPE, "compressed": np.True_, "wide": np.False_}
    write_phantom(tmp_path, 1, jobs=1, shape=SHAPE)
    [case] = write_phantom(tmp_path, 1, jobs=100_000, **options)
    assert case.images["t2"].name == "BraTS20_Training_001_t2.nii.gz"
    assert case.images["t2"].is_file()


def test_H1_a_table_that_was_edited_is_not_replaced(tmp_path):
    write_phantom(tmp_path, 3, shape=SHAPE)
    table = next(tmp_path.rglob("name_mapping.csv"))
    edited = table.read_text().replace("HGG", "LGG").replace("phantom", "PHANTOM")
    assert len(edited) == table.stat().st_size and edited != table.read_text()
    table.write_text(edited)
    for seed in (42, 43):
        with pytest.raises(ValueError, match="name_mapping.csv was changed after"):
            write_phantom(tmp_path, 3, shape=SHAPE, seed=seed)
    assert table.read_text() == edited

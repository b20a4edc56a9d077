"""Preparing: what is stored, what is refused, and that nothing is ever lost."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import AFFINE, prepared_toys, toy_volumes, tree, write_case

from brats_utils.cases import BratsDataError, find_cases
from brats_utils.files import OutputFolder, find_changed, read_manifest
from brats_utils.prepare import extract, prepare_case, prepare_dataset
from brats_utils.split import split_dataset
from brats_utils.volumes import bounding_box, standardise


def test_a_prepared_case_by_its_numbers(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    row = prepare_case(case, tmp_path / "out", crop_shape=(16, 16, 8))
    image = np.load(tmp_path / "out" / "images" / f"{case.id}.npy")
    mask = np.load(tmp_path / "out" / "masks" / f"{case.id}.npy")
    assert image.shape == (16, 16, 8, 3) and image.dtype == np.float16
    assert mask.shape == (16, 16, 8) and mask.dtype == np.uint8
    # The toy tumour is 8 x 8 x 6 voxels with a 4 x 4 x 4 core and 2 x 2 x 2 enhancing.
    assert np.bincount(mask.ravel()).tolist() == [2048 - 384, 56, 320, 8]
    assert row["labelled_share"] == 384 / 2048
    assert row["lost_voxels"] == 0
    assert (row["WT_ml"], row["TC_ml"], row["ET_ml"]) == (0.384, 0.064, 0.008)
    raw = toy_volumes(1)[0]["t1ce"]
    brain = raw[raw != 0]
    assert row["t1ce_mean"] == pytest.approx(brain.mean() / raw.max())
    assert row["t1ce_sd"] == pytest.approx(brain.std() / raw.max())
    assert row["t1ce_zero"] == 0


def test_stored_volumes_standardise_to_what_a_whole_scan_does(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    row = prepare_case(case, tmp_path / "out", crop_shape=None)
    stored = np.load(tmp_path / "out" / "images" / f"{case.id}.npy").astype(np.float32)
    raw = toy_volumes(1)[0]
    whole = standardise(np.stack([raw[m] for m in ("flair", "t1ce", "t2")], axis=-1))
    whole = whole[bounding_box(whole.any(axis=-1))]
    for channel, name in enumerate(("flair", "t1ce", "t2")):
        seen = (stored[..., channel] - row[f"{name}_mean"]) / row[f"{name}_sd"]
        seen[stored[..., channel] == row[f"{name}_zero"]] = 0
        np.testing.assert_allclose(seen, whole[..., channel], atol=5e-3)


def test_a_small_scan_is_padded_to_the_crop(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    prepare_case(case, tmp_path / "out", crop_shape=(32, 24, 16))
    image = np.load(tmp_path / "out" / "images" / f"{case.id}.npy")
    assert image.shape == (32, 24, 16, 3)
    assert not image[24:].any()


def test_the_report_says_who_is_dropped_and_why(toy_set, tmp_path):
    small = toy_volumes()[1]
    small[:] = 0
    small[12, 12, 8] = 4
    write_case(toy_set, "BraTS20_Training_099", segmentation=small)
    out, report = prepared_toys(toy_set, tmp_path)
    report = report.set_index("case")
    assert report["kept"].sum() == 4
    assert report.loc["BraTS20_Training_099", "reason"] == "labelled below 0.01"
    assert report.loc["BraTS20_Validation_001", "reason"] == "no segmentation"
    assert len(list((out / "images").iterdir())) == 4
    assert len(pd.read_csv(out / "cases.csv")) == 6
    made_from = read_manifest(out)["made_from"]
    assert made_from["crop_shape"] == [16, 16, 8] and made_from["raw"] == str(toy_set)


def test_a_second_run_replaces_the_first(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    out, report = prepared_toys(toy_set, tmp_path, min_labelled=0.9)
    assert not report["kept"].any()
    assert not list((out / "images").iterdir())


def test_all_invalid_cases_are_named_in_one_error(toy_set, tmp_path):
    for number in (2, 3):
        next(toy_set.rglob(f"*00{number}_flair.nii")).write_bytes(b"<html>")
    with pytest.raises(BratsDataError, match=r"not valid \(2\)") as error:
        prepare_dataset(toy_set, tmp_path / "out")
    assert "002_flair" in str(error.value) and "003_flair" in str(error.value)


def test_B05_nothing_to_learn_from_is_an_error(tmp_path):
    write_case(tmp_path / "raw", "BraTS20_Validation_001", seg_name=None)
    with pytest.raises(BratsDataError, match="none of the 1 cases has a seg"):
        prepare_dataset(tmp_path / "raw", tmp_path / "out")


def test_C01_killed_at_any_file_operation_it_ends_in_the_same_bytes(tmp_path):
    for number in range(1, 4):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, "prepare", tmp_path / "raw", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 140  # file operations, each of them a point to die at


def test_C11_ctrl_c_stops_at_once_and_says_how_to_resume(tmp_path):
    for number in range(1, 4):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    code = (
        "import sys, time; from brats_utils import files, prepare\n"
        "note = files.OutputFolder.note_case\n"
        "def slow(*arguments):\n"
        "    note(*arguments); print('one', flush=True); time.sleep(0.5)\n"
        "files.OutputFolder.note_case = slow\n"
        "prepare.prepare_dataset(sys.argv[1], sys.argv[2], jobs=1)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "raw", tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as child:
        assert any("one" in line for line in child.stdout)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=10)[1]
    assert "of 3 cases are done; run again to resume" in said
    assert child.returncode != 0
    assert not list(tmp_path.rglob(".writing-*")) and not list(tmp_path.glob("*.lock"))


def test_C01_finished_cases_are_not_read_again(toy_set, tmp_path, monkeypatch):
    out, first = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("brats_utils.prepare.read_scan", None)
    _, second = prepared_toys(toy_set, tmp_path)
    pd.testing.assert_frame_equal(first, second)
    next((out / "masks").iterdir()).write_bytes(b"cut")
    with pytest.raises(TypeError):  # now one must be read
        prepared_toys(toy_set, tmp_path)


def test_C02_too_little_room_is_said_before_anything_is_written(
    toy_set, tmp_path, monkeypatch
):
    monkeypatch.setattr("brats_utils.files.free_gb", lambda _: 1e-6)
    with pytest.raises(OSError, match="4 cases need 0.0 GB"):
        prepared_toys(toy_set, tmp_path)
    assert not (tmp_path / "prepared").exists()


def test_C02_a_full_disk_costs_no_finished_case(toy_set, tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"masks/BraTS20_Training_002.npy.* GB are"):
            prepared_toys(toy_set, tmp_path, jobs=1)
    assert (
        not list(tmp_path.rglob(".writing*")) and not (tmp_path / "prepared").exists()
    )
    (done,) = read_manifest(tmp_path / ".prepared-new")["cases"]
    assert done.endswith("001")
    assert prepared_toys(toy_set, tmp_path)[1]["kept"].sum() == 4


def test_C06_other_settings_are_never_mixed(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path, scaling="zscore")
    out, report = prepared_toys(toy_set, tmp_path, crop_shape=(16, 8, 8))
    shapes = {np.load(path).shape for path in (out / "masks").iterdir()}
    assert shapes == {(16, 8, 8)} and set(report["shape"].dropna()) == {"16x8x8"}


def test_A08_a_changed_scan_is_prepared_again(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    before = read_manifest(out)["files"]
    path = next(toy_set.rglob("*Training_001_flair.nii"))
    data = bytearray(path.read_bytes())
    data[352 + 2 * (12 + 24 * (12 + 24 * 7))] ^= 64  # within the tumour
    path.write_bytes(data)
    prepared_toys(toy_set, tmp_path)
    after = read_manifest(out)["files"]
    changed = [name for name in before if before[name] != after[name]]
    assert changed[0] == "cases.csv"
    assert changed[1:] == ["images/BraTS20_Training_001.npy"]
    assert not find_changed(out, after)


def test_bad_cases_are_left_out_when_told_to(toy_set, tmp_path):
    next(toy_set.rglob("*002_flair.nii")).write_bytes(b"<html>")
    wrong = toy_volumes()[1]
    wrong[0, 0, 0] = 7
    write_case(toy_set, "BraTS20_Training_007", segmentation=wrong)
    with pytest.raises(BratsDataError, match=r"not valid \(1\).*002_flair"):
        prepared_toys(toy_set, tmp_path)
    _, report = prepared_toys(toy_set, tmp_path, skip_bad=True)
    reasons = report.set_index("case")["reason"]
    assert "not valid" in reasons["BraTS20_Training_002"]
    assert "found 7 in 1 voxels" in reasons["BraTS20_Training_007"]
    assert report["kept"].sum() == 3


def test_B06_a_crop_that_loses_tumour_is_noted(toy_set, tmp_path):
    _, report = prepared_toys(toy_set, tmp_path, crop_shape=(4, 16, 8))
    assert report["note"][0] == "the crop leaves out 50% of the tumour"


def test_B04_a_case_without_a_label_is_kept_or_dropped_aloud(tmp_path):
    empty = np.zeros_like(toy_volumes()[1])
    write_case(tmp_path / "raw", "BraTS20_Training_001", segmentation=empty)
    _, report = prepared_toys(tmp_path / "raw", tmp_path)
    assert report["note"].tolist() == ["no voxel is labelled"]
    assert report["reason"].tolist() == ["labelled below 0.01"]
    _, report = prepared_toys(tmp_path / "raw", tmp_path, min_labelled=0)
    assert report["kept"].tolist() == [True]


def test_C02_room_is_needed_for_what_must_be_written(toy_set, tmp_path, monkeypatch):
    out, _ = prepared_toys(toy_set, tmp_path)
    before = tree(out)
    monkeypatch.setattr("brats_utils.files.free_gb", lambda _: 2e-6)
    prepared_toys(toy_set, tmp_path)  # all done: nothing more is needed
    with pytest.raises(OSError, match="4 cases need 0.0 GB"):
        prepared_toys(toy_set, tmp_path, scaling="zscore")
    assert tree(out) == before


def test_a_crop_shape_that_is_no_shape_is_refused_plainly(toy_set, tmp_path):
    for shape in (128, "128", (128, 128), (0, 4, 4)):
        with pytest.raises(ValueError, match="three whole numbers"):
            prepared_toys(toy_set, tmp_path, crop_shape=shape)


def test_H1_flat_scans_are_never_prepared_into_their_own_folder(toy_set, tmp_path):
    flat = tmp_path / "set"
    (flat / "images").mkdir(parents=True)
    for path in toy_set.rglob("*.nii"):
        path.rename(flat / "images" / path.name)
    before = tree(flat)
    cases = find_cases(flat)
    for raw in (flat, cases):
        for out in (flat, flat / "images", flat / "images" / "out", tmp_path):
            with pytest.raises(ValueError, match="choose another"):
                prepare_dataset(raw, out, crop_shape=(16, 16, 8))
    for out in (flat, flat / "images"):
        with pytest.raises(ValueError, match="choose another"):
            prepare_case(cases[0], out)
    link = tmp_path / "link"
    link.symlink_to(flat, target_is_directory=True)
    with pytest.raises(ValueError, match="choose another"):
        prepare_dataset(flat, link / "out")
    assert tree(flat) == before


def test_H1_a_folder_of_others_is_left_as_it_is(toy_set, tmp_path):
    (tmp_path / "prepared" / "images").mkdir(parents=True)
    (tmp_path / "prepared" / "images" / "mine.npy").write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="choose another"):
        prepared_toys(toy_set, tmp_path)
    with pytest.raises(ValueError, match="choose another"):
        prepare_case(find_cases(toy_set)[0], tmp_path / "prepared")
    assert tree(tmp_path) == before


def test_H1_a_folder_of_another_kind_is_left_as_it_is(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    split_dataset(prepared, tmp_path / "split")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="choose another"):
        prepare_dataset(toy_set, tmp_path / "split")
    with pytest.raises(ValueError, match="holds a data set"):
        prepare_case(find_cases(toy_set)[0], prepared)
    assert tree(tmp_path) == before


def test_H1_label_maps_in_a_folder_of_their_own_are_an_input_too(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    path = tmp_path / "labels" / "s.nii"
    path.parent.mkdir()
    case = replace(case, segmentation=case.segmentation.rename(path))
    with pytest.raises(ValueError, match="choose another"):
        prepare_case(case, path.parent / "out", crop_shape=(16, 16, 8))
    assert list(path.parent.iterdir()) == [path]


def test_H1_cases_of_two_sets_may_be_prepared_beside_them(toy_set, tmp_path):
    write_case(tmp_path / "more", "BraTS20_Training_101", seed=7)
    cases = [*find_cases(toy_set), *find_cases(tmp_path / "more")]
    assert prepared_toys(cases, tmp_path)[1]["kept"].sum() == 5


@pytest.mark.parametrize("name", ["images", "masks/BraTS20_Training_001.npy"])
def test_H1_a_users_link_or_file_in_the_place_of_ours(toy_set, tmp_path, name):
    out, _ = prepared_toys(toy_set, tmp_path, min_labelled=0.9)  # nothing is kept
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.npy").write_bytes(b"mine")
    if (out / name).is_dir():
        (out / name).rmdir()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).symlink_to(tmp_path / "disk")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=name):
        prepared_toys(toy_set, tmp_path)
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before


def test_H1_a_file_of_the_user_stays(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    (out / "images" / "mine.npy").write_bytes(b"mine")
    prepared_toys(toy_set, tmp_path, scaling="zscore")
    assert (out / "images" / "mine.npy").read_bytes() == b"mine"
    assert len(list((out / "images").iterdir())) == 5


WRONG = [
    {"scaling": "min-max"},
    {"crop_shape": (16, 16)},
    {"crop_shape": 128},
    {"min_labelled": 2},
    {"min_labelled": "none"},
    {"modalities": ("FLAIR",)},
    {"modalities": ("flair", "flair")},
    {"modalities": ()},
    {"modalities": None},
    {"jobs": "two"},
    {"labels": "4"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_H2_a_wrong_option_changes_nothing(toy_set, tmp_path, wrong):
    out, _ = prepared_toys(toy_set, tmp_path)
    before = tree(tmp_path)
    (name,) = wrong
    with pytest.raises(ValueError, match="shape" if "shape" in name else name):
        prepared_toys(toy_set, tmp_path, **wrong)
    assert tree(tmp_path) == before


def test_J4_numbers_of_numpy_are_taken(toy_set, tmp_path):
    _, expected = prepared_toys(toy_set, tmp_path)
    options = {"crop_shape": np.array([16, 16, 8]), "min_labelled": np.float32(0.01)}
    _, report = prepared_toys(toy_set, tmp_path, **options)
    assert report["case"].equals(expected["case"])


def test_J4_an_empty_list_of_cases_is_named(tmp_path):
    with pytest.raises(ValueError, match="case"):
        prepare_dataset([], tmp_path / "out")


def test_H2_a_bad_scan_costs_no_earlier_result(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    before = tree(out)
    folder = write_case(toy_set, "BraTS20_Training_009", seed=9)
    path = folder / f"{folder.name}_t2.nii"
    broken = toy_volumes(9)[0]["t2"].astype(np.float32)
    broken[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(broken, AFFINE), path)
    for options in ({}, {"scaling": "zscore"}):
        with pytest.raises(BratsDataError, match=r"009.*NaN"):
            prepared_toys(toy_set, tmp_path, **options)
        assert tree(out) == before
    report = prepared_toys(toy_set, tmp_path, skip_bad=True)[1]
    assert report["kept"].sum() == 4 and len(report) == 6
    assert not (tmp_path / ".prepared-new").exists()


def test_H2_an_unreadable_mapping_is_noticed_before_anything_is_prepared(
    toy_set, tmp_path, monkeypatch
):
    (toy_set / "name_mapping.csv").write_bytes(b"PK\3\4\0\0")
    monkeypatch.setattr("brats_utils.prepare.read_scan", None)
    with pytest.raises(ValueError, match="name_mapping.csv is not a text table"):
        prepared_toys(toy_set, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_H3_preparing_again_replaces_the_former_result_in_one_step(tmp_path):
    for number in range(1, 3):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, "reprepare", tmp_path / "raw", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 80  # file operations, each of them a point to die at


def test_H4_a_second_preparation_is_refused(toy_set, tmp_path):
    with OutputFolder(tmp_path / "prepared", "prepared", beside=True):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            prepared_toys(toy_set, tmp_path)
    assert prepared_toys(toy_set, tmp_path)[1]["kept"].sum() == 4


def test_H5_another_set_of_the_same_names_sizes_and_times_is_prepared(
    toy_set, tmp_path
):
    _, first = prepared_toys(toy_set, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(toy_set, other)
    for path in other.rglob("*_flair.nii"):
        times = path.stat()
        data = bytearray(path.read_bytes())
        data[352::2] = bytes(len(data[352::2]))  # of the same size
        data[352 + 2 * 5000 :: 2] = np.random.default_rng(0).bytes(
            len(data[352 + 2 * 5000 :: 2])
        )
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    _, second = prepared_toys(other, tmp_path)
    assert not first["flair_mean"].equals(second["flair_mean"])
    assert read_manifest(tmp_path / "prepared")["made_from"]["raw"] == str(other)


def test_H6_a_damaged_volume_is_repaired_by_running_again(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    good = tree(out)
    for path in (*(out / "images").iterdir(), out / "cases.csv"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (next((out / "masks").iterdir())).unlink()
    prepared_toys(toy_set, tmp_path)
    assert tree(out) == good


@pytest.mark.parametrize(
    ("values", "told"), [((1e12,), "1e.12"), ((3e38, -3e38), "3e.38")]
)
@pytest.mark.parametrize("scaling", ["minmax", "zscore"])
def test_J1_nothing_blank_or_infinite_is_stored(
    toy_set, tmp_path, values, told, scaling
):
    volume = toy_volumes(1)[0]["flair"].astype(np.float32)
    for number, value in enumerate(values):
        volume[5 + number, 6, 7] = value
    path = next(toy_set.rglob("*Training_001_flair.nii"))
    nib.save(nib.Nifti1Image(volume, AFFINE), path)
    with pytest.raises(BratsDataError, match=f"001_flair.*grey levels.*holds .?{told}"):
        prepared_toys(toy_set, tmp_path, scaling=scaling)
    assert not (tmp_path / "prepared").exists()


def test_J3_voxels_that_are_not_1_mm_are_refused_before_training(tmp_path):
    affine = AFFINE @ np.diag([2, 2, 2, 1])
    write_case(tmp_path / "raw", "BraTS20_Training_001", affine=affine)
    with pytest.raises(BratsDataError, match=r"001.*\[2.0, 2.0, 2.0\] mm.*Resample"):
        prepared_toys(tmp_path / "raw", tmp_path)


def test_a_case_taken_out_of_the_set_leaves_nothing(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    shutil.rmtree(next(toy_set.rglob("BraTS20_Training_002")))
    out, report = prepared_toys(toy_set, tmp_path)
    manifest = read_manifest(out)
    assert len(report) == 4 and not find_changed(out, manifest["files"])
    assert not any("002" in name for name in (*tree(out), *manifest["cases"]))


def test_H5_a_case_that_is_dropped_later_leaves_no_volumes(toy_set, tmp_path):
    case, out = find_cases(toy_set)[0], tmp_path / "one"
    assert prepare_case(case, out, min_labelled=0)["kept"]
    assert not prepare_case(case, out, min_labelled=0.9)["kept"]
    assert list(tree(out)) == ["manifest.json"]


def test_A22_two_cases_of_one_id_and_labels_that_the_cases_do_not_have(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        write_case(tmp_path / name, "P1", seed=seed)
    both = [find_cases(tmp_path / name, labels="0124")[0] for name in ("one", "two")]
    with pytest.raises(ValueError, match="P1 twice, in .*one.*two.*each id once"):
        prepare_dataset(both, tmp_path / "out", min_labelled=0)
    assert not (tmp_path / "out").exists()
    for told in ("garbage", "0213"):
        with pytest.raises(ValueError, match="labels is"):
            prepare_dataset(both[:1], tmp_path / "out", labels=told, min_labelled=0)
    options = {"crop_shape": None, "min_labelled": 0}
    report = prepare_dataset(both[:1], tmp_path / "out", labels="0124", **options)
    assert report["kept"].all()


def test_R4_a_home_directory_is_the_users(tmp_path, monkeypatch, toy_set):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = {"crop_shape": None, "min_labelled": 0}
    prepare_dataset(toy_set, "~/prepared", **options)
    assert (tmp_path / "home" / "prepared" / "images").is_dir()


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.7z", "set.zip"])
def test_R1_archives_of_other_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"no zip archive")
    advice = "download it again" if name.endswith("zip") else "tar or 7-Zip"
    with pytest.raises(ValueError, match=advice):
        extract(tmp_path / name, tmp_path / "out")


def test_I3_one_folder_holds_cases_of_one_kind(toy_set, tmp_path):
    first, second = find_cases(toy_set)[:2]
    out, kept = tmp_path / "out", {"crop_shape": (16, 16, 8), "min_labelled": 0}
    prepare_case(first, out, **kept)
    prepare_case(second, out, **{**kept, "min_labelled": 0.001})
    before = tree(out)
    for other in (
        {"modalities": ("t2", "flair", "t1ce")},
        {"scaling": "zscore"},
        {"crop_shape": (8, 8, 8)},
    ):
        with pytest.raises(ValueError, match=f"other options: {[*other][0]}"):
            prepare_case(second, out, **{**kept, **other})
        assert tree(out) == before


SMALL = {"crop_shape": (16, 16, 8), "min_labelled": 0}


def test_H2_a_failing_case_changes_nothing_and_scalings_are_not_mixed(
    toy_set, tmp_path
):
    first, second, third = find_cases(toy_set)[:3]
    out = tmp_path / "out"
    prepare_case(first, out, **SMALL)
    damaged = toy_volumes(1)[0]["t2"].astype(np.float32)
    damaged[3, 4, 5] = np.nan
    for case in (first, third):
        nib.save(nib.Nifti1Image(damaged, AFFINE), case.images["t2"])
    before = tree(out)
    with pytest.raises(BratsDataError, match="NaN"):
        prepare_case(first, out, **SMALL, scaling="zscore")
    with pytest.raises(BratsDataError, match="NaN"):
        prepare_case(third, out, **SMALL)
    assert tree(out) == before
    with pytest.raises(BratsDataError, match="NaN"):
        prepare_case(third, tmp_path / "new", **SMALL)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="other options: scaling"):
        prepare_case(second, out, **SMALL, scaling="zscore")
    assert prepare_case(second, out, **SMALL)["kept"]


def test_A01_H2_a_case_that_lacks_files_is_refused_before_anything(toy_set, tmp_path):
    case, out = find_cases(toy_set)[0], tmp_path / "deep" / "out"
    images = {name: path for name, path in case.images.items() if name != "flair"}
    gone = {**case.images, "t2": toy_set / "gone.nii"}
    for change, found in (
        ({"images": images}, "lacks flair"),
        ({"images": gone}, "gone.nii"),
        ({"segmentation": toy_set / "no_seg.nii"}, "no_seg.nii"),
    ):
        with pytest.raises(BratsDataError, match=found):
            prepare_case(replace(case, **change), out, **SMALL)
    assert not out.parent.exists()


def test_C02_room_for_one_case_is_checked_too(toy_set, tmp_path):
    case, out = find_cases(toy_set)[0], tmp_path / "out"
    with pytest.raises(OSError, match="1 cases need"):
        prepare_case(case, out, crop_shape=(100_000,) * 3)
    for shape in ((2_000_000, 2_000_000, 2_500_000), (10**200,) * 3):
        with pytest.raises(OSError, match="4 cases need"):
            prepare_dataset(toy_set, out, crop_shape=shape)
    assert not out.exists()


def test_J4_more_jobs_than_cases_and_a_table_of_labels(toy_set, tmp_path):
    cases = [replace(c, labels={1: 1, 2: 2, 4: 4}) for c in find_cases(toy_set)]
    told = {1: 1, 2: 2, 3: 4}
    with pytest.raises(ValueError, match="labels is .* what the cases say"):
        prepare_dataset(cases, tmp_path / "out", labels=told, **SMALL)
    options = {"labels": {1: 1, 2: 2, 4: 4}, "jobs": 100_000}
    assert (
        prepare_dataset(cases, tmp_path / "out", **options, **SMALL)["kept"].sum() == 4
    )


def test_I2_a_list_of_cases_is_of_the_sets_that_hold_them(tmp_path, monkeypatch):
    for n, name in enumerate(("a", "b")):
        write_case(tmp_path / name, f"BraTS20_Training_{n:03}", seed=n)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "label_mapping.csv").write_text("id,name\n0,cat\n")
    (tmp_path / "other" / "dead").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    first, second = find_cases("a")[0], find_cases(tmp_path / "b")[0]
    images = {m: os.path.relpath(path) for m, path in first.images.items()}
    first = replace(first, images=images, segmentation=first.segmentation)
    report = prepare_dataset([first, second], tmp_path / "out", **SMALL)
    assert report["kept"].all() and not report.attrs["patients"]
    (tmp_path / "b" / "meta").mkdir()
    (tmp_path / "b" / "meta" / "name_mapping.csv").write_text(
        "case_id,patient_id\nBraTS20_Training_000,P\nBraTS20_Training_001,P\n"
    )
    report = prepare_dataset([first, second], tmp_path / "out", **SMALL)
    assert {*report["patient"]} == {"P"}


def test_H1_volumes_that_were_moved_to_another_disk_are_not_exchanged(
    toy_set, tmp_path
):
    out, _ = prepared_toys(toy_set, tmp_path)
    (out / "images").rename(tmp_path / "disk")
    (out / "images").symlink_to(tmp_path / "disk")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="prepared/images; move"):
        prepared_toys(toy_set, tmp_path, scaling="zscore")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("folder", ["HGG", "PA/20190301"])
def test_I2_a_list_of_cases_finds_the_table_above_the_set(tmp_path, folder):
    for n, place in enumerate((folder, "LGG")):
        write_case(tmp_path / "set" / place, f"s{n}", seed=n)
    (tmp_path / "name_mapping.csv").write_text("case_id,patient_id\ns0,P\ns1,P\n")
    cases = find_cases(tmp_path / "set", labels="0124")
    report = prepare_dataset(cases, tmp_path / "out", **SMALL)
    assert {*report["patient"]} == {"P"}


def test_a_single_case_given_as_a_list_leaves_its_neighbours_alone(tmp_path):
    folder = write_case(tmp_path, "BraTS20_Training_001")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "other" / "deep" / "down").mkdir(parents=True)
    table = tmp_path / "other" / "deep" / "down" / "name_mapping.csv"
    table.write_text("patient,scan\nA,B\n")
    report = prepare_dataset(find_cases(folder), tmp_path / "out", min_labelled=0)
    assert report["kept"].all() and report.attrs["patients"] == []


def test_C11_cases_of_other_settings_are_not_counted_as_done(tmp_path, monkeypatch):
    for number in range(1, 4):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    note, noted = OutputFolder.note_case, []

    def stop(*arguments):
        note(*arguments)
        noted.append(arguments)
        if len(noted) in (2, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "note_case", stop)
    for scaling, done in (("minmax", 2), ("zscore", 1)):
        with pytest.raises(KeyboardInterrupt, match=f"{done} of 3 cases are done"):
            prepare_dataset(tmp_path / "raw", tmp_path / "out", scaling=scaling, jobs=1)


def test_H5_a_finished_set_stays_if_no_case_is_valid_any_more(toy_set, tmp_path):
    out, report = prepared_toys(toy_set, tmp_path)
    before = tree(out)
    for path in toy_set.rglob("*_t2.nii"):
        path.write_bytes(b"")
    with pytest.raises(BratsDataError, match="not valid"):
        prepared_toys(toy_set, tmp_path, skip_bad=True)
    assert report["kept"].any() and tree(out) == before

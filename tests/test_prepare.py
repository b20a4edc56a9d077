import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import prepared_toys, toy_volumes, write_case

from brats_utils.cases import BratsDataError, find_cases
from brats_utils.dataset import verify_dataset
from brats_utils.files import read_json
from brats_utils.prepare import prepare_case, prepare_dataset
from brats_utils.transforms import brain_box, standardise


def test_a_prepared_case_by_its_numbers(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    row = prepare_case(case, tmp_path, crop_shape=(16, 16, 8))
    image = np.load(tmp_path / "images" / f"{case.id}.npy")
    mask = np.load(tmp_path / "masks" / f"{case.id}.npy")
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
    row = prepare_case(case, tmp_path, crop_shape=None)
    stored = np.load(tmp_path / "images" / f"{case.id}.npy").astype(np.float32)
    raw = toy_volumes(1)[0]
    whole = standardise(np.stack([raw[m] for m in ("flair", "t1ce", "t2")], axis=-1))
    whole = whole[brain_box(whole)]
    for channel, name in enumerate(("flair", "t1ce", "t2")):
        seen = (stored[..., channel] - row[f"{name}_mean"]) / row[f"{name}_sd"]
        seen[stored[..., channel] == row[f"{name}_zero"]] = 0
        np.testing.assert_allclose(seen, whole[..., channel], atol=5e-3)


def test_a_small_scan_is_padded_to_the_crop(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    prepare_case(case, tmp_path, crop_shape=(32, 24, 16))
    image = np.load(tmp_path / "images" / f"{case.id}.npy")
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
    assert read_json(out / "settings.json")["crop_shape"] == [16, 16, 8]


def test_a_second_run_replaces_the_first(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    out, report = prepared_toys(toy_set, tmp_path, min_labelled=0.9)
    assert not report["kept"].any()
    assert not list((out / "images").iterdir())


def test_all_unsound_cases_are_named_in_one_error(toy_set, tmp_path):
    for number in (2, 3):
        next(toy_set.rglob(f"*00{number}_flair.nii")).write_bytes(b"<html>")
    with pytest.raises(BratsDataError, match=r"not sound \(2\)") as error:
        prepare_dataset(toy_set, tmp_path / "out")
    assert "002_flair" in str(error.value) and "003_flair" in str(error.value)


def test_B05_nothing_to_learn_from_is_an_error(tmp_path):
    write_case(tmp_path / "raw", "BraTS20_Validation_001", seg_name=None)
    with pytest.raises(BratsDataError, match="none of 1 cases has a segmentation"):
        prepare_dataset(tmp_path / "raw", tmp_path / "out")


def test_C01_killed_at_any_file_operation_it_ends_in_the_same_bytes(tmp_path):
    for number in range(1, 4):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, "prepare", tmp_path / "raw", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # file operations, each of them a point to die at


def test_C11_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path):
    for number in range(1, 4):
        write_case(tmp_path / "raw", f"BraTS20_Training_{number:03}", seed=number)
    code = (
        "import sys, time; from brats_utils import prepare, files\n"
        "work = prepare.write_json\n"
        "def slow(path, value):\n"
        "    work(path, value); print('one', flush=True); time.sleep(0.5)\n"
        "prepare.write_json = slow\n"
        "prepare.prepare_dataset(sys.argv[1], sys.argv[2], jobs=1)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "raw", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert any("one" in line for line in child.stdout)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=10)[0]
    assert "of 3 cases are done; run again to go on" in said
    assert child.returncode != 0
    assert not list((tmp_path / "out").rglob(".writing-*"))


def test_C01_finished_cases_are_not_read_again(toy_set, tmp_path, monkeypatch):
    out, first = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("brats_utils.prepare.read_case", None)
    _, second = prepared_toys(toy_set, tmp_path)
    pd.testing.assert_frame_equal(first, second)
    next((out / "masks").iterdir()).write_bytes(b"cut")
    with pytest.raises(TypeError):  # now one must be read
        prepared_toys(toy_set, tmp_path)


def test_C02_too_little_room_is_said_before_anything_is_written(
    toy_set, tmp_path, monkeypatch
):
    monkeypatch.setattr("brats_utils.prepare.free_gb", lambda _: 1e-6)
    with pytest.raises(OSError, match="4 cases need some 0.0 GB"):
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
    out = tmp_path / "prepared"
    assert not list(out.rglob(".writing*")) and not (out / "cases.csv").exists()
    assert [p.stem[-3:] for p in (out / "finished").iterdir()] == ["001"]
    assert prepared_toys(toy_set, tmp_path)[1]["kept"].sum() == 4


def test_C06_other_settings_are_never_mixed(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path, scaling="zscore")
    out, report = prepared_toys(toy_set, tmp_path, crop_shape=(16, 8, 8))
    shapes = {np.load(path).shape for path in (out / "masks").iterdir()}
    assert shapes == {(16, 8, 8)} and set(report["shape"].dropna()) == {"16x8x8"}


def test_A08_a_changed_scan_is_noticed_and_prepared_anew(toy_set, tmp_path, capsys):
    out, before = prepared_toys(toy_set, tmp_path)
    path = next(toy_set.rglob("*Training_001_flair.nii"))
    data = bytearray(path.read_bytes())
    data[352 + 2 * (12 + 24 * (12 + 24 * 7))] ^= 64  # within the tumour
    path.write_bytes(data)
    problems = verify_dataset(out)
    assert problems["file"].tolist() == [str(path)]
    assert problems["problem"].tolist() == ["changed since it was prepared"]
    after = prepared_toys(toy_set, tmp_path)[1]
    assert "001: its files have changed since" in capsys.readouterr().out
    changed = before["images_sha256"] != after["images_sha256"]
    assert after["case"][changed & after["kept"]].tolist() == ["BraTS20_Training_001"]
    assert verify_dataset(out).empty


def test_bad_cases_are_left_out_when_told_to(toy_set, tmp_path):
    next(toy_set.rglob("*002_flair.nii")).write_bytes(b"<html>")
    wrong = toy_volumes()[1]
    wrong[0, 0, 0] = 7
    write_case(toy_set, "BraTS20_Training_007", segmentation=wrong)
    with pytest.raises(BratsDataError, match=r"not sound \(1\).*002_flair"):
        prepared_toys(toy_set, tmp_path)
    _, report = prepared_toys(toy_set, tmp_path, skip_bad=True)
    reasons = report.set_index("case")["reason"]
    assert "not sound" in reasons["BraTS20_Training_002"]
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


def test_C02_room_is_needed_for_what_other_settings_add(toy_set, tmp_path, monkeypatch):
    prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("brats_utils.prepare.free_gb", lambda _: 2e-5)
    prepared_toys(toy_set, tmp_path)  # all done: nothing more is needed
    prepared_toys(toy_set, tmp_path, scaling="zscore")  # replaced by as much
    with pytest.raises(OSError, match="4 cases need some 0.0 GB"):
        prepared_toys(toy_set, tmp_path, crop_shape=(24, 24, 16))


def test_a_crop_shape_that_is_no_shape_is_refused_plainly(toy_set, tmp_path):
    for shape in (128, "128", (128, 128), (0, 4, 4)):
        with pytest.raises(ValueError, match="three positive numbers or None"):
            prepared_toys(toy_set, tmp_path, crop_shape=shape)

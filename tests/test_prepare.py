import numpy as np
import pandas as pd
import pytest
from conftest import toy_volumes, write_case

from brats_utils.cases import BratsDataError, find_cases
from brats_utils.files import read_json
from brats_utils.prepare import (
    brain_box,
    prepare_case,
    prepare_dataset,
    split_dataset,
    standardise,
)


def prepared_toys(toy_set, tmp_path, **options):
    options = {"crop_shape": (16, 16, 8), **options}
    out = tmp_path / "prepared"
    return out, prepare_dataset(toy_set, out, **options)


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
    with pytest.raises(BratsDataError, match="2 cases are not sound") as error:
        prepare_dataset(toy_set, tmp_path / "out")
    assert "002_flair" in str(error.value) and "003_flair" in str(error.value)


def test_nothing_to_learn_from_is_an_error(tmp_path):
    write_case(tmp_path / "raw", "BraTS20_Validation_001", seg_name=None)
    with pytest.raises(BratsDataError, match="none of 1 cases has a segmentation"):
        prepare_dataset(tmp_path / "raw", tmp_path / "out")


def test_the_split_parts_cases_and_keeps_pairs(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    ids = split_dataset(out, tmp_path / "split", seed=1)
    assert len(ids["train"]) == 3 and len(ids["val"]) == 1
    assert not set(ids["train"]) & set(ids["val"])
    for side, expected in ids.items():
        folder = tmp_path / "split" / side
        for kind in ("images", "masks"):
            files = sorted((folder / kind).iterdir())
            assert [path.stem for path in files] == expected
            assert np.load(files[0]).shape[:3] == (16, 16, 8)
        assert pd.read_csv(folder / "cases.csv")["case"].tolist() == expected
        assert read_json(folder / "settings.json")["scaling"] == "minmax"


def test_a_new_split_replaces_the_old_one_whole(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    for seed in range(20):
        split_dataset(out, tmp_path / "split", seed=seed)
        sides = [
            {p.stem for p in (tmp_path / "split" / side / "masks").iterdir()}
            for side in ("train", "val")
        ]
        assert len(sides[0] | sides[1]) == 4 and not sides[0] & sides[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prepared", "raw", "split"]


def test_a_split_without_links_copies(toy_set, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    out, _ = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    ids = split_dataset(out, tmp_path / "split")
    path = tmp_path / "split" / "val" / "images" / f"{ids['val'][0]}.npy"
    assert not path.is_symlink() and np.load(path).shape == (16, 16, 8, 3)


def test_a_split_needs_two_cases_and_whole_pairs(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    next((out / "masks").iterdir()).unlink()
    with pytest.raises(BratsDataError, match="image without mask"):
        split_dataset(out, tmp_path / "split")
    out, _ = prepared_toys(toy_set, tmp_path, min_labelled=0.9)
    with pytest.raises(BratsDataError, match="0 kept cases of 0 patients"):
        split_dataset(out, tmp_path / "split")

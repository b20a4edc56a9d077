import numpy as np
import pandas as pd
import pytest
from conftest import toy_volumes, write_case
from sklearn.preprocessing import MinMaxScaler

from brats_utils.cases import BratsDataError, find_cases
from brats_utils.files import read_json
from brats_utils.prepare import (
    brain_box,
    crop_box,
    prepare_case,
    prepare_dataset,
    scale_volume,
    split_dataset,
    standardise,
)


def prepared_toys(toy_set, tmp_path, **options):
    options = {"crop_shape": (16, 16, 8), **options}
    out = tmp_path / "prepared"
    return out, prepare_dataset(toy_set, out, **options)


def test_minmax_is_sklearns_scaler_on_the_whole_volume():
    volume = toy_volumes()[0]["flair"]
    column = volume.reshape(-1, 1).astype(np.float64)
    expected = MinMaxScaler().fit_transform(column).reshape(volume.shape)
    np.testing.assert_allclose(scale_volume(volume), expected, atol=1e-7)


def test_zscore_by_hand_leaves_background_alone():
    scaled = scale_volume(np.array([[[0, 2, 4, 6]]]), "zscore")
    # Non-zero voxels 2, 4, 6: mean 4, SD sqrt(8 / 3).
    sd = np.sqrt(8 / 3)
    np.testing.assert_allclose(scaled[0, 0], [0, -2 / sd, 0, 2 / sd], rtol=1e-6)


def test_scaling_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match="blank"):
        scale_volume(np.full((2, 2, 2), 7))
    with pytest.raises(ValueError, match="NaN"):
        scale_volume(np.array([[[0, np.nan]]]))
    with pytest.raises(ValueError, match="method is"):
        scale_volume(np.zeros((2, 2, 2)), "slicewise")


def test_the_crop_holds_the_tumour_then_the_most_brain():
    image = np.zeros((20, 20, 20))
    image[2:18, 2:18, 2:18] = 1
    segmentation = np.zeros((20, 20, 20), int)
    segmentation[15:17, 9, 9] = 2
    x, y, z = crop_box(image, segmentation, (8, 16, 30))
    # X: 8 voxels that hold 15 and 16 and lie in the brain (2..17): start 9 or 10.
    assert x in (slice(9, 17), slice(10, 18))
    assert y == slice(2, 18)
    assert z == slice(0, 20)
    assert crop_box(image, shape=None) == (slice(2, 18),) * 3
    assert brain_box(image) == (slice(2, 18),) * 3


def test_a_tumour_larger_than_the_crop_keeps_its_most_voxels():
    image = np.ones((10, 4, 4))
    segmentation = np.zeros((10, 4, 4), int)
    segmentation[1:9, 0, 0] = 2
    segmentation[5:9, 1:3, 1:3] = 2
    x = crop_box(image, segmentation, (4, 4, 4))[0]
    assert x == slice(5, 9)


def test_the_crop_refuses_an_empty_image_and_a_wrong_shape():
    with pytest.raises(ValueError, match="no brain"):
        crop_box(np.zeros((4, 4, 4)), shape=(2, 2, 2))
    with pytest.raises(ValueError, match="no brain"):
        brain_box(np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match="three positive"):
        crop_box(np.ones((4, 4, 4)), shape=(2, 2))


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
    with pytest.raises(BratsDataError, match="0 kept cases cannot be split"):
        split_dataset(out, tmp_path / "split")

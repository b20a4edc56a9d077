import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from brats_utils import evaluation
from brats_utils.cases import Case, find_cases
from brats_utils.evaluation import (
    MISSED_LESION_MM,
    MISSED_REGION_MM,
    hd95,
    lesion_scores,
    score_case,
    score_cases,
    summarise_scores,
    surface_dice,
)
from brats_utils.labels import REGIONS
from brats_utils.nifti import BratsDataError, load_labels, save_volume

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def blob(seed, shape=(30, 26, 22)):
    """Return a random lumpy mask of some thousand voxels, cut off by the border."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, 2) > 0.02


def write_case(folder, case_id, segmentation, labels="0124"):
    path = folder / f"{case_id}_seg.nii.gz"
    save_volume(np.asarray(segmentation, np.uint8), path, affine=AFFINE)
    return Case(case_id, {}, path, labels)


def test_scores_by_hand():
    truth = np.zeros((10, 1, 1), np.uint8)
    truth[:6, 0, 0] = [1, 1, 4, 4, 2, 2]
    prediction = np.zeros_like(truth)
    prediction[:7, 0, 0] = [1, 1, 4, 2, 2, 2, 2]
    scores = score_case(prediction, truth, spacing_mm=(3, 1, 1))
    assert list(scores)[:4] == ["dice_WT", "dice_TC", "dice_ET", "hd95_WT"]
    assert scores["dice_WT"] == 2 * 6 / (6 + 7)
    assert scores["dice_TC"] == 2 * 3 / (4 + 3)
    assert scores["dice_ET"] == 2 * 1 / (2 + 1)
    assert scores["sensitivity_TC"] == 3 / 4
    assert scores["specificity_WT"] == 3 / 4
    # In a line of voxels all are surface. ET: 0 in one direction, 0 and 3 mm back.
    assert scores["hd95_ET"] == np.percentile([0, 0, 3], 95)
    # Intersection over union: background 3/4, core 2/2, oedema 2/4, enhancing 1/2.
    assert scores["mean_iou"] == np.mean([3 / 4, 1, 2 / 4, 1 / 2])
    assert {type(score) for score in scores.values()} == {float}


def test_a_map_against_itself_is_perfect():
    truth = np.random.default_rng(0).choice([0, 1, 2, 4], size=(6, 5, 4))
    scores = score_case(truth, truth)
    assert all(v == (0 if k.startswith("hd95") else 1) for k, v in scores.items())


def test_F05_regions_empty_in_one_or_both():
    truth = np.zeros((5, 5, 5), np.uint8)
    nothing = score_case(truth, truth)
    assert nothing["dice_ET"] == 1 and nothing["hd95_ET"] == 0
    assert nothing["sensitivity_ET"] == 1 and nothing["specificity_ET"] == 1
    assert nothing["mean_iou"] == 1
    invented = truth.copy()
    invented[2, 2, 2] = 4
    for one, other in ((invented, truth), (truth, invented)):
        scores = score_case(one, other)
        assert scores["dice_ET"] == 0 and scores["sensitivity_ET"] == 0
        assert scores["hd95_ET"] == MISSED_REGION_MM
    assert MISSED_REGION_MM == pytest.approx(373.12866, abs=1e-5)


def test_a_region_that_fills_the_grid():
    truth = np.full((3, 3, 3), 4)
    assert score_case(truth, truth)["specificity_WT"] == 1
    missed = truth.copy()
    missed[0, 0, 0] = 0
    assert score_case(missed, truth)["specificity_WT"] == 0


def test_hd95_equals_medpy():
    binary = pytest.importorskip("medpy.metric.binary")
    spacing_mm = (0.9, 1.5, 3.0)
    for seed in range(4):
        one, other = blob(seed), blob(seed + 100)
        expected = binary.hd95(one, other, voxelspacing=spacing_mm)
        assert hd95(one, other, spacing_mm) == pytest.approx(expected, abs=1e-6)
        assert hd95(other, one, spacing_mm) == hd95(one, other, spacing_mm)


def numpy_dice(prediction, truth, values):
    """Return the Dice of one region, written a second time."""
    ours, theirs = np.isin(prediction, values), np.isin(truth, values)
    total = ours.sum() + theirs.sum()
    return 1.0 if total == 0 else 2 * (ours & theirs).sum() / total


def test_scores_equal_an_independent_implementation():
    binary = pytest.importorskip("medpy.metric.binary")
    spacing_mm = (1, 1, 1.5)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        coarse = rng.choice([0, 1, 2, 4], (2, 3, 3, 3), p=[0.7, 0.1, 0.1, 0.1])
        prediction, truth = np.kron(coarse, np.ones((1, 4, 4, 4), int))
        if seed % 4 == 0:
            prediction[prediction == 4] = 1  # ET is absent
        scores = score_case(prediction, truth, spacing_mm)
        for region, values in REGIONS.items():
            masks = np.isin(prediction, values), np.isin(truth, values)
            expected = MISSED_REGION_MM if any(mask.any() for mask in masks) else 0
            if all(mask.any() for mask in masks):
                expected = binary.hd95(*masks, voxelspacing=spacing_mm)
            assert scores[f"hd95_{region}"] == pytest.approx(expected, abs=1e-6)
            expected = numpy_dice(prediction, truth, values)
            assert scores[f"dice_{region}"] == pytest.approx(expected, abs=1e-6)


def test_score_case_rejects_other_shapes_and_labels():
    with pytest.raises(ValueError, match="one shape"):
        score_case(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="found 3 in 8"):
        score_case(np.full((2, 2, 2), 3), np.zeros((2, 2, 2)))


def test_score_cases_reads_files_of_both_conventions(tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:4, 2, 2] = 4
    cases = [
        write_case(tmp_path, "b", truth),
        write_case(tmp_path, "a", np.minimum(truth, 3), labels="0123"),
    ]
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    save_volume(truth, predictions / "a.nii.gz", affine=AFFINE)
    save_volume(np.roll(truth, 1, axis=2), predictions / "b.nii", affine=AFFINE)
    scores = score_cases(predictions, cases)
    assert scores.columns[0] == "case" and list(scores["case"]) == ["b", "a"]
    assert list(scores["dice_ET"]) == [0, 1]
    assert list(scores["hd95_ET"]) == [2, 0]  # voxels are 2 mm high


def test_score_cases_names_what_is_missing(tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    cases = [write_case(tmp_path, name, truth) for name in ("here", "gone", "lost")]
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    save_volume(truth, predictions / "here.nii.gz", affine=AFFINE)
    with pytest.raises(ValueError, match="2 .* no prediction .*: gone, lost"):
        score_cases(predictions, cases)
    with pytest.raises(ValueError, match="no segmentation.*blind"):
        score_cases(predictions, [Case("blind", {}, None)])


def test_score_cases_rejects_predictions_that_do_not_fit(tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    case = write_case(tmp_path, "toy", truth)
    path = tmp_path / "predictions" / "toy.nii.gz"
    path.parent.mkdir()
    save_volume(truth, path, affine=np.eye(4))
    with pytest.raises(ValueError, match="not on the grid of case toy"):
        score_cases(path.parent, [case])
    save_volume(truth[:5], path, affine=AFFINE)
    with pytest.raises(ValueError, match=r"not on the grid.* \(5, 6, 6\)"):
        score_cases(path.parent, [case])
    save_volume(truth + 3, path, affine=AFFINE)
    with pytest.raises(BratsDataError, match="found 3 in 216.*use 0, 1, 2 and 4"):
        score_cases(path.parent, [case])


NAMES = {"background": 0, "necrotic core": 1, "edema": 2, "enhancing tumor": 3}


@pytest.mark.parametrize(
    "changes, highest, refused",
    [
        ({"edema": 1, "necrotic core": 2}, 2, True),
        ({"edema": 1, "necrotic core": 2}, 4, False),  # only a converted map has a 4
        ({"edema": 4, "enhancing tumor": 1, "necrotic core": 2}, 4, True),
        ({}, 2, False),  # as in BraTS but for the 3
        ({"enhancing tumor": 4}, 4, False),
        ({"cavity": 4}, 2, False),  # not understood: another program's, perhaps
    ],
)
def test_I1_maps_of_nnunet_are_not_scored_as_if_1_were_core(
    tmp_path, changes, highest, refused
):
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:5, 2:4, 2], truth[2, 2, 2], truth[3, 2, 2] = 2, 1, highest
    case, out = write_case(tmp_path, "toy", truth), tmp_path / "predictions"
    out.mkdir()
    save_volume(truth, out / "toy.nii.gz", affine=AFFINE)
    (out / "dataset.json").write_text(json.dumps({"labels": {**NAMES, **changes}}))
    if refused:
        with pytest.raises(BratsDataError, match="dataset.json.*1 for .*converted"):
            score_cases(out, [case])
    else:
        assert score_cases(out, [case])["dice_WT"][0] == 1


def test_score_cases_on_real_scans(real_cases, tmp_path):
    case = find_cases(real_cases, labels="0124")[0]
    truth, affine = load_labels(case.segmentation)
    save_volume(
        np.roll(truth, 2, axis=0), tmp_path / f"{case.id}.nii.gz", affine=affine
    )
    scores = score_cases(tmp_path, [case])
    # No point of a map moved by 2 mm is further than that from the original.
    assert 1 <= scores["hd95_WT"][0] <= 2
    assert 0.8 < scores["dice_WT"][0] < 1


def test_summary_of_scores():
    dice, constant = [0.0, 0.8, 0.9, 1.0], [0.7] * 4
    scores = pd.DataFrame({"case": list("abcd"), "dice": dice, "same": constant})
    with warnings.catch_warnings(action="error"):
        summary = summarise_scores(scores)
    assert summary.index.tolist() == ["dice", "same"]
    row = summary.loc["dice"]
    assert (row["mean"], row["median"]) == pytest.approx((0.675, 0.85))
    assert 0 <= row["low"] < 0.45 < 0.85 < row["high"] <= 1
    assert summary.loc["same"].tolist() == pytest.approx([0.7] * 4)
    pd.testing.assert_frame_equal(summary, summarise_scores(scores))  # a fixed seed


def test_summary_of_a_single_case_has_no_interval():
    with warnings.catch_warnings(action="error"):
        summary = summarise_scores(pd.DataFrame({"case": ["a"], "dice": [0.8]}))
    assert summary.loc["dice"].tolist() == [0.8] * 4


def cube(*corners, size=4, shape=(60, 20, 20)):
    """Return a mask with a cube of `size` voxels at each corner."""
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(i, i + size) for i in corner)] = True
    return mask


def test_lesions_are_scored_one_by_one():
    truth = cube((3, 3, 3), (23, 3, 3), (43, 3, 3))
    # The first is found, the second is a voxel off, the third missed, one invented.
    found = cube((3, 3, 3), (24, 3, 3), (33, 13, 13))
    shifted = truth & cube((24, 3, 3)) | cube((23, 3, 3))
    overlap = 2 * 3 * 16 / (64 + 64)
    assert shifted.sum() == 64
    dice, distance = lesion_scores(found, truth)
    assert dice == pytest.approx((1 + overlap + 0 + 0) / 4)
    assert distance == pytest.approx((0 + 1 + 2 * MISSED_LESION_MM) / 4)


def test_near_parts_are_one_lesion():
    # Grown by 3 voxels each, parts with a gap of 6 touch, and with 7 at their faces
    # still do (26 neighbours); with 8 they do not.
    for gap, n_lesions in ((6, 1), (8, 2)):
        truth = cube((5, 5, 5), (9 + gap, 5, 5))
        dice, distance = lesion_scores(cube((5, 5, 5)), truth)
        if n_lesions == 1:
            assert dice == pytest.approx(2 * 64 / (64 + 128))
        else:
            assert dice == pytest.approx((1 + 0) / 2)
            assert distance == pytest.approx(MISSED_LESION_MM / 2)


def test_a_component_may_belong_to_several_lesions():
    truth = cube((5, 5, 5), (25, 5, 5))
    found = np.zeros_like(truth)
    found[5:29, 5:9, 5:9] = True
    dice, _ = lesion_scores(found, truth)
    assert dice == pytest.approx(2 * 64 / (64 + 24 * 16))


def test_small_lesions_do_not_count():
    small = cube((3, 3, 3), size=3)  # 27 mm³, or 54 mm³ with slices of 2 mm
    nothing = np.zeros_like(small)
    assert lesion_scores(nothing, small) == (1, 0)
    assert lesion_scores(nothing, small, (1, 1, 2)) == (0, MISSED_LESION_MM)
    # What touches a lesion that does not count is not invented either.
    assert lesion_scores(small, small) == (1, 0)
    assert lesion_scores(small, nothing) == (0, MISSED_LESION_MM)
    assert lesion_scores(nothing, nothing) == (1, 0)
    large = cube((30, 3, 3))
    assert lesion_scores(large, large | small) == (1, 0)


def test_surface_dice_by_hand():
    truth, shifted = cube((5, 5, 5)), cube((7, 5, 5))
    # Of the 56 surface voxels of each, 12 (layer 9 or 6) to 2 mm from the other one.
    near = surface_dice(truth, shifted)
    far = surface_dice(truth, shifted, tolerance_mm=2)
    assert near < far == 1
    points = [
        np.argwhere(mask & ~cube((i, 6, 6), size=2))
        for mask, i in ((truth, 6), (shifted, 8))
    ]
    gaps = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    distances = np.concatenate([gaps.min(0), gaps.min(1)])
    assert len(distances) == 2 * 56 and near == np.mean(distances <= 1)
    nothing = np.zeros_like(truth)
    assert surface_dice(nothing, nothing) == 1
    assert surface_dice(truth, nothing) == surface_dice(nothing, truth) == 0
    assert surface_dice(truth, truth, (1, 1, 3)) == 1


def test_the_newer_scores_stand_beside_those_of_2020():
    truth, found = np.zeros((2, 40, 20, 20), np.uint8)
    truth[3:8, 3:8, 3:8], truth[5, 5, 5] = 2, 4
    found[3:8, 3:8, 3:8] = 2
    found[30:35, 3:8, 3:8] = 1
    plain = score_case(found, truth)
    scores = score_case(found, truth, lesions=True)
    assert {k: scores[k] for k in plain} == plain
    assert scores["lesion_dice_WT"] == 1 / 2
    assert scores["lesion_hd95_WT"] == MISSED_LESION_MM / 2
    assert scores["lesion_dice_ET"] == 1  # a voxel in the truth, none found
    assert scores["nsd_WT"] == 2 / 3  # two surfaces of the three
    with pytest.raises(ValueError, match="lesions is 2"):
        score_case(found, truth, lesions=2)


def test_two_predictions_of_a_case_are_refused(tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    case = write_case(tmp_path, "toy", truth)
    (tmp_path / "predictions").mkdir()
    for suffix in (".nii", ".nii.gz"):
        save_volume(truth, tmp_path / "predictions" / f"toy{suffix}", affine=AFFINE)
    with pytest.raises(ValueError, match="two predictions, toy.nii.gz and toy.nii"):
        score_cases(tmp_path / "predictions", [case])


@pytest.mark.parametrize("degrees", [0, 3, 5, 7, 11, 13])
def test_a_tilted_grid_scores_as_a_straight_one(tmp_path, degrees):
    angle = np.radians(degrees)
    turn = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]
    affine = np.eye(4)
    affine[:2, :3] = turn
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[6:14, 6:14, 6:14] = 2
    (tmp_path / "predicted").mkdir()
    for name, volume in (("a_seg", truth), ("predicted/a", np.roll(truth, 1, axis=0))):
        save_volume(volume, tmp_path / f"{name}.nii.gz", affine=affine)
    case = Case("a", {}, tmp_path / "a_seg.nii.gz")
    scores = score_cases(tmp_path / "predicted", [case], lesions=True)
    assert scores["nsd_WT"].tolist() == [1]


def test_A21_a_prediction_is_found_by_its_name_of_macos(tmp_path, monkeypatch):
    name, written = (unicodedata.normalize(f, "Données_ü") for f in ("NFC", "NFD"))
    assert written != name
    case = write_case(tmp_path, name, np.full((3, 3, 3), 4))
    out = tmp_path / "out"
    out.mkdir()
    path = write_case(out, written, np.full((3, 3, 3), 4)).segmentation
    path.rename(out / f"{written}.nii.gz")
    assert score_cases(out, [case])["dice_WT"].tolist() == [1]
    is_file = Path.is_file

    def by_either_name(path):
        return is_file(path.with_name(unicodedata.normalize("NFD", path.name)))

    monkeypatch.setattr(Path, "is_file", by_either_name)  # as on a Mac
    assert evaluation._find_prediction(out, case) == out / f"{name}.nii.gz"

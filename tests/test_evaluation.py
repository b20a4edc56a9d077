import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from brats_utils.cases import Case, find_cases
from brats_utils.evaluation import (
    MISSED_REGION_MM,
    hd95,
    score_case,
    score_cases,
    summarise_scores,
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
    with pytest.raises(BratsDataError, match="found 3 in 216"):
        score_cases(path.parent, [case])


def test_score_cases_on_real_scans(tmp_path):
    root = os.environ.get("BRATS_REAL_CASES")
    if not root:
        pytest.skip("BRATS_REAL_CASES is unset")
    case = find_cases(Path(root), labels="0124")[0]
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

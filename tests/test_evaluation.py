import os
from pathlib import Path

import conftest
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from brats_utils import evaluation
from brats_utils.cases import Case, find_cases, load_labels, save_segmentation
from brats_utils.evaluation import (
    MISSED_REGION_MM,
    check_submission,
    hd95,
    score_case,
    score_cases,
    summarise_scores,
)
from brats_utils.labels import REGIONS
from brats_utils.nifti import save_volume

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def blob(seed, shape=(30, 26, 22)):
    """Return a random lumpy mask of some thousand voxels, cut off by the border."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, 2) > 0.02


def write_case(folder, case_id, segmentation, labels="0124"):
    path = folder / f"{case_id}_seg.nii.gz"
    save_volume(np.asarray(segmentation, np.uint8), path, affine=AFFINE)
    return Case(case_id, {}, path, labels)


def test_scores_derived_by_hand():
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
    # A line of single voxels is all surface. ET: 0 one way, 0 and 3 mm the other.
    assert scores["hd95_ET"] == np.percentile([0, 0, 3], 95)
    # Intersection over union: background 3/4, core 2/2, oedema 2/4, enhancing 1/2.
    assert scores["mean_iou"] == np.mean([3 / 4, 1, 2 / 4, 1 / 2])


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


@pytest.mark.parametrize("many", [0, 10**9])
@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_medpy(seed, many, monkeypatch):
    binary = pytest.importorskip("medpy.metric.binary")
    monkeypatch.setattr(evaluation, "MANY_SURFACE_VOXELS", many)
    spacing_mm = (0.9, 1.5, 3.0)
    one, other = blob(seed), blob(seed + 100)
    expected = binary.hd95(one, other, voxelspacing=spacing_mm)
    assert hd95(one, other, spacing_mm) == pytest.approx(expected, abs=1e-6)
    assert hd95(other, one, spacing_mm) == hd95(one, other, spacing_mm)


def test_score_case_refuses_other_shapes_and_labels():
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
    save_volume(truth, predictions / "here.nii.gz", affine=AFFINE)
    with pytest.raises(ValueError, match="2 of 3 cases: gone, lost"):
        score_cases(predictions, cases)
    with pytest.raises(ValueError, match="no segmentation.*blind"):
        score_cases(predictions, [Case("blind", {}, None)])
    save_volume(truth, predictions / "here.nii.gz", affine=np.eye(4))
    with pytest.raises(ValueError, match="grid of case here"):
        score_cases(predictions, cases[:1])


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
    # Surfaces of a map moved by 2 mm are nowhere further apart than that.
    assert 1 <= scores["hd95_WT"][0] <= 2
    assert 0.8 < scores["dice_WT"][0] < 1


def test_the_summary_of_scores():
    scores = pd.DataFrame({"case": list("abcd"), "dice_WT": [0.0, 0.8, 0.9, 1.0]})
    summary = summarise_scores(scores)
    assert summary.index.tolist() == ["dice_WT"]
    row = summary.loc["dice_WT"]
    assert (row["mean"], row["median"]) == pytest.approx((0.675, 0.85))
    assert 0 <= row["low"] < 0.45 < 0.85 < row["high"] <= 1
    pd.testing.assert_frame_equal(summary, summarise_scores(scores))


@pytest.fixture
def submission(tmp_path):
    """Return a folder of two sound predictions, and their cases."""
    for name in ("one", "two"):
        conftest.write_case(tmp_path / "raw", name, seg_name=None)
    cases = find_cases(tmp_path / "raw")
    for case in cases:
        path = tmp_path / "out" / f"{case.id}.nii.gz"
        save_segmentation(conftest.toy_volumes()[1], case, path)
    return tmp_path / "out", cases


def rewrite(path, *, dtype=np.uint8, affine=conftest.AFFINE, change=0):
    segmentation = conftest.toy_volumes()[1].astype(dtype)
    segmentation[0, 0, 0] = change
    nib.save(nib.Nifti1Image(segmentation, affine), path)


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.rename(path.with_name("1.nii.gz")), "is no case's name"),
        (lambda path: (path.parent / "1.nii.gz").mkdir(), "is no case's name"),
        (lambda path: rewrite(path, change=3), "3 in 1 voxels"),
        (lambda path: rewrite(path, dtype=np.float32), "float32, not uint8"),
        (lambda path: rewrite(path, affine=np.eye(4)), "another affine"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "end too early"),
    ],
)
def test_a_submission_is_checked_by_the_servers_rules(submission, spoil, problem):
    folder, cases = submission
    assert check_submission(folder, cases).empty
    spoil(folder / "one.nii.gz")
    found = check_submission(folder, cases)
    assert set(found["file"]) <= {"one.nii.gz", "1.nii.gz"}
    assert found["problem"].str.contains(problem).any()


def numpy_dice(prediction, truth, values):
    """Return the Dice of one region, written down once more."""
    ours, theirs = np.isin(prediction, values), np.isin(truth, values)
    total = ours.sum() + theirs.sum()
    return 1.0 if total == 0 else 2 * (ours & theirs).sum() / total


@pytest.mark.parametrize("seed", range(200))
def test_scores_equal_an_independent_implementation(seed):
    binary = pytest.importorskip("medpy.metric.binary")
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 1, 2, 4], (2, 3, 3, 3), p=[0.7, 0.1, 0.1, 0.1])
    fine = np.kron(coarse, np.ones((1, 4, 4, 4), int))
    if seed % 4 == 0:
        fine[seed % 8 // 4][fine[seed % 8 // 4] == 4] = 1  # one side lacks ET
    found, spacing = score_case(*fine, spacing_mm=(1, 1, 1.5)), (1, 1, 1.5)
    for region, values in REGIONS.items():
        masks = [np.isin(volume, values) for volume in fine]
        dice, distance = found[f"dice_{region}"], found[f"hd95_{region}"]
        assert dice == pytest.approx(numpy_dice(*fine, values), abs=1e-6)
        expected = MISSED_REGION_MM if any(mask.any() for mask in masks) else 0
        if all(mask.any() for mask in masks):
            expected = binary.hd95(*masks, voxelspacing=spacing)
        assert distance == pytest.approx(expected, abs=1e-6)

import math

import numpy as np
import pytest
from keras import ops

from brats_utils.losses import (
    batch_dice_cross_entropy_loss,
    cross_entropy_loss,
    dice_cross_entropy_loss,
    dice_focal_loss,
    dice_loss,
    focal_loss,
)

LOSSES = [
    dice_loss,
    focal_loss,
    cross_entropy_loss,
    dice_focal_loss,
    dice_cross_entropy_loss,
    batch_dice_cross_entropy_loss,
]
LABELS = np.array([0, 1, 2, 3], "uint8").reshape(1, 2, 2, 1, 1)  # one voxel of each
AS_LABELS = np.eye(4, dtype="float32")[LABELS[..., 0]]
AS_REGIONS = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]], "float32").reshape(
    1, 2, 2, 1, 3
)
UNSURE = {4: np.full_like(AS_LABELS, 0.25), 3: np.full_like(AS_REGIONS, 0.5)}


def value(loss, *arguments):
    result = np.asarray(loss(*arguments))
    assert result.shape == (1,) and result.dtype == np.float32
    return float(result[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("perfect", [AS_LABELS, AS_REGIONS], ids=["labels", "regions"])
def test_a_perfect_prediction_costs_nothing(loss, perfect):
    assert value(loss, LABELS, perfect) == 0


def test_labels_by_hand():
    # Each tumour map: Σpg = 0.25, Σp = 1, Σg = 1.
    assert value(dice_loss, LABELS, UNSURE[4]) == pytest.approx(1 - 1.5 / 3)
    assert value(cross_entropy_loss, LABELS, UNSURE[4]) == pytest.approx(math.log(4))
    focal = 0.75**2 * math.log(4)
    assert value(focal_loss, LABELS, UNSURE[4]) == pytest.approx(focal)


def test_regions_by_hand():
    # WT, TC, ET hold 3, 2 and 1 of the four voxels: Σpg = 1.5, 1, 0.5 and Σp = 2.
    dice = ((1 - 4 / 6) + (1 - 3 / 5) + (1 - 2 / 4)) / 3
    assert value(dice_loss, LABELS, UNSURE[3]) == pytest.approx(dice)
    assert value(cross_entropy_loss, LABELS, UNSURE[3]) == pytest.approx(math.log(2))
    assert value(focal_loss, LABELS, UNSURE[3]) == pytest.approx(0.25 * math.log(2))


@pytest.mark.parametrize("n_outputs", [4, 3])
def test_sums_are_sums(n_outputs):
    unsure = UNSURE[n_outputs]
    dice, focal, entropy = (value(loss, LABELS, unsure) for loss in LOSSES[:3])
    assert value(dice_focal_loss, LABELS, unsure) == pytest.approx(dice + focal)
    expected = pytest.approx(dice + entropy)
    assert value(dice_cross_entropy_loss, LABELS, unsure) == expected


def test_background_does_not_enter_the_dice():
    labels = np.zeros((1, 100, 1), "uint8")
    labels[0, 0] = 1
    nothing_found = np.eye(4)[np.zeros((1, 100), int)]
    # Label 1 is missed, 1 - 1/2; 2 and 3 are rightly absent, 0; 99 voxels do nothing.
    assert value(dice_loss, labels, nothing_found) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("false_alarm", [0, 1, 3])
def test_an_absent_region_costs_what_is_predicted_of_it(false_alarm):
    labels = np.zeros((1, 10, 1), "uint8")
    prediction = np.zeros((1, 10, 3))
    prediction[0, :false_alarm] = 1
    expected = pytest.approx(false_alarm / (false_alarm + 1))
    assert value(dice_loss, labels, prediction) == expected


def test_a_batch_is_one_volume_to_the_batch_dice():
    labels = np.concatenate([LABELS, 0 * LABELS])  # the second sample has no tumour
    both = np.concatenate([UNSURE[3], UNSURE[3]])
    found = np.asarray(batch_dice_cross_entropy_loss(labels, both))
    one = [np.concatenate([a[:1], a[1:]], axis=1) for a in (labels, both)]
    assert found.shape == (2,)
    assert found.mean() == pytest.approx(value(dice_cross_entropy_loss, *one))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "batch" not in str(loss)])
def test_each_sample_has_its_own_loss(loss):
    labels = np.concatenate([LABELS, np.zeros_like(LABELS)])
    both = np.concatenate([UNSURE[4], AS_LABELS])
    losses = np.asarray(loss(labels, both))
    assert losses[0] == pytest.approx(value(loss, LABELS, UNSURE[4]))
    assert losses[1] == pytest.approx(value(loss, labels[1:], AS_LABELS))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_labels_may_be_of_any_number_type(loss, dtype):
    expected = value(loss, LABELS, UNSURE[4])
    assert value(loss, LABELS.astype(dtype), UNSURE[4]) == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("right", [AS_LABELS, AS_REGIONS], ids=["labels", "regions"])
def test_certain_and_wrong_is_dear_but_finite(loss, right):
    wrong = 1 - right
    assert 0.5 < value(loss, LABELS, wrong) < 1 - math.log(1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss):
    # 2 ** 17 voxels would overflow a float16 sum.
    labels = np.ones((1, 2**17, 1), "uint8")
    prediction = np.full((1, 2**17, 4), 0.25, "float16")
    assert np.isfinite(value(loss, labels, prediction))


def test_focal_forgives_the_easy_voxels():
    labels = np.zeros((1, 1, 1), "uint8")
    easy = np.array([[[0.9, 0.1, 0, 0]]])
    ratio = value(focal_loss, labels, easy) / value(cross_entropy_loss, labels, easy)
    assert ratio == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_other_numbers_of_outputs_are_refused(loss):
    with pytest.raises(ValueError, match="4 outputs .* or 3 .*, got 2"):
        loss(LABELS, ops.zeros((1, 2, 2, 1, 2)))

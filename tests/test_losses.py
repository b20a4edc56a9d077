import math
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from brats_utils.losses import (
    RegionDice,
    batch_dice_cross_entropy_loss,
    check_loss,
    describe,
    dice_cross_entropy_loss,
    dice_focal_loss,
    dice_loss,
    focal_loss,
)
from brats_utils.model import unet

LOSSES = [
    dice_loss,
    focal_loss,
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


def test_losses_of_labels_by_hand():
    # Each tumour map: Σpg = 0.25, Σp = 1, Σg = 1. Each voxel: q = 0.25.
    dice, focal, entropy = 1 - 1.5 / 3, 0.75**2 * math.log(4), math.log(4)
    assert value(dice_loss, LABELS, UNSURE[4]) == pytest.approx(dice)
    assert value(focal_loss, LABELS, UNSURE[4]) == pytest.approx(focal)
    assert value(dice_focal_loss, LABELS, UNSURE[4]) == pytest.approx(dice + focal)
    for loss in (dice_cross_entropy_loss, batch_dice_cross_entropy_loss):
        assert value(loss, LABELS, UNSURE[4]) == pytest.approx(dice + entropy)


def test_losses_of_regions_by_hand():
    # WT, TC, ET hold 3, 2 and 1 of the four voxels: Σpg = 1.5, 1, 0.5 and Σp = 2.
    dice = ((1 - 4 / 6) + (1 - 3 / 5) + (1 - 2 / 4)) / 3
    focal, entropy = 0.25 * math.log(2), math.log(2)  # q = 0.5
    assert value(dice_loss, LABELS, UNSURE[3]) == pytest.approx(dice)
    assert value(focal_loss, LABELS, UNSURE[3]) == pytest.approx(focal)
    assert value(dice_focal_loss, LABELS, UNSURE[3]) == pytest.approx(dice + focal)
    for loss in (dice_cross_entropy_loss, batch_dice_cross_entropy_loss):
        assert value(loss, LABELS, UNSURE[3]) == pytest.approx(dice + entropy)


def test_the_background_is_left_out_of_the_dice():
    labels = np.zeros((1, 100, 1), "uint8")
    labels[0, 0] = 1
    nothing_found = np.eye(4)[np.zeros((1, 100), int)]
    # Label 1 is missed, 1 - 1/2; 2 and 3 are rightly absent, 0.
    assert value(dice_loss, labels, nothing_found) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("false_voxels", [0, 1, 3])
def test_dice_of_a_region_that_is_absent_from_the_truth(false_voxels):
    labels = np.zeros((1, 10, 1), "uint8")
    prediction = np.zeros((1, 10, 3))
    prediction[0, :false_voxels] = 1
    expected = pytest.approx(false_voxels / (false_voxels + 1))
    assert value(dice_loss, labels, prediction) == expected


def test_batch_dice_treats_a_batch_as_one_volume():
    labels = np.concatenate([LABELS, 0 * LABELS])  # the second sample has no tumour
    both = np.concatenate([UNSURE[3], UNSURE[3]])
    found = np.asarray(batch_dice_cross_entropy_loss(labels, both))
    one = [np.concatenate([a[:1], a[1:]], axis=1) for a in (labels, both)]
    assert found.shape == (2,)
    assert found.mean() == pytest.approx(value(dice_cross_entropy_loss, *one))


@pytest.mark.parametrize("loss", LOSSES[:-1])
def test_each_sample_has_its_own_loss(loss):
    labels = np.concatenate([LABELS, np.zeros_like(LABELS)])
    both = np.concatenate([UNSURE[4], AS_LABELS])
    losses = np.asarray(loss(labels, both))
    assert losses[0] == pytest.approx(value(loss, LABELS, UNSURE[4]))
    assert losses[1] == pytest.approx(value(loss, labels[1:], AS_LABELS))


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_any_number_type(loss):
    expected = value(loss, LABELS, UNSURE[4])
    for dtype in ("int32", "int64", "float32"):
        assert value(loss, LABELS.astype(dtype), UNSURE[4]) == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("right", [AS_LABELS, AS_REGIONS], ids=["labels", "regions"])
def test_certain_and_wrong_is_costly_but_finite(loss, right):
    assert 0.5 < value(loss, LABELS, 1 - right) < 1 - math.log(1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss):
    # 2 ** 17 voxels would overflow a float16 sum.
    labels = np.ones((1, 2**17, 1), "uint8")
    prediction = np.full((1, 2**17, 4), 0.25, "float16")
    assert np.isfinite(value(loss, labels, prediction))


def test_focal_reduces_easy_voxels_to_a_hundredth():
    labels = np.zeros((1, 1, 1), "uint8")
    easy = np.array([[[0.9, 0.1, 0, 0]]])
    assert value(focal_loss, labels, easy) == pytest.approx(-0.01 * math.log(0.9))


@pytest.mark.parametrize("loss", LOSSES)
def test_other_numbers_of_outputs_are_rejected(loss):
    with pytest.raises(ValueError, match="4 outputs .* or 3 .*, got 2"):
        loss(LABELS, ops.zeros((1, 2, 2, 1, 2)))


def test_saved_models_find_losses_and_metric_by_name():
    for loss in LOSSES:
        name = f"brats_utils>{loss.__name__}"
        assert keras.saving.get_registered_object(name) is loss
    config = keras.saving.serialize_keras_object(RegionDice("TC"))
    again = keras.saving.deserialize_keras_object(config)
    assert (again.region, again.name) == ("TC", "dice_TC")


# By argmax: 0, 3, 0, 3 for the labels 0, 1, 2, 3. WT: 2 found of 3, TC: 2 of 2,
# ET: 2 where 1 is.
FOUND = np.eye(4)[[0, 3, 0, 3]].reshape(1, 2, 2, 1, 4)
BY_HAND = {"WT": 4 / 5, "TC": 1.0, "ET": 2 / 3}


def region_dice(region, labels, prediction):
    metric = RegionDice(region)
    metric.update_state(labels, prediction)
    return float(metric.result())


@pytest.mark.parametrize("region", BY_HAND)
def test_region_dice_by_hand(region):
    expected = pytest.approx(BY_HAND[region])
    for dtype in ("uint8", "int32", "float32"):
        assert region_dice(region, LABELS.astype(dtype), FOUND) == expected
    # The same map as three sigmoids; a probability of exactly 0.5 is outside.
    sigmoids = np.where(FOUND[..., 3:] > 0, [0.9] * 3, [0.5] * 3)
    assert region_dice(region, LABELS, sigmoids) == expected


def test_region_dice_of_empty_regions():
    nothing, none_found = 0 * LABELS, np.eye(4)[0 * LABELS[..., 0]]
    assert region_dice("ET", nothing, none_found) == 1
    assert region_dice("ET", nothing, FOUND) == 0
    assert region_dice("ET", LABELS, none_found) == 0


def test_region_dice_is_a_mean_over_samples():
    metric = RegionDice("ET")
    metric.update_state(LABELS, FOUND)  # 2/3
    metric.update_state(np.repeat(LABELS, 3, 0), np.repeat(AS_LABELS, 3, 0))  # 1, 1, 1
    assert float(metric.result()) == pytest.approx((2 / 3 + 3) / 4)
    metric.reset_state()
    assert float(metric.result()) == 0


def test_an_unknown_region_is_rejected():
    with pytest.raises(ValueError, match="region is 'WM', expected WT, TC or ET"):
        RegionDice("WM")


def test_a_last_layer_that_only_changes_the_type_is_no_missing_activation():
    inputs = keras.Input((None, None, None, 3))
    outputs = keras.layers.Conv3D(4, 1, activation="softmax")(inputs)
    outputs = keras.layers.Activation("linear", dtype="float32")(outputs)
    check_loss("sparse_categorical_crossentropy", keras.Model(inputs, outputs))


@pytest.mark.parametrize("n_outputs", [1, 2, 5])
def test_J4_other_numbers_of_outputs_are_no_regions(n_outputs):
    labels = np.zeros((1, 2, 2, 2, 1), np.uint8)
    found = np.zeros((1, 2, 2, 2, n_outputs), np.float32)
    with pytest.raises(ValueError, match=f"expected 4 outputs .*got {n_outputs}"):
        RegionDice("ET").update_state(labels, found)


def test_an_object_that_cannot_be_described_is_named():
    class Odd:
        def __init__(self):
            self.table = {(0, 1): 2}

        def __call__(self, image, labels, rng):
            return image, labels

    for name in ("loss", "train_data"):
        described = {"modalities": ["flair"], name: {"augment": Odd()}}
        with pytest.raises(ValueError, match=f"{name} is .*Odd.*that JSON can hold"):
            describe(described)


def soft_dice(truth, found):
    overlap = 2 * keras.ops.sum(truth * found) + 1
    return 1 - overlap / (keras.ops.sum(truth) + keras.ops.sum(found) + 1)


@pytest.mark.parametrize("loss", ["dice", "tversky", "mse", "mae", "huber", soft_dice])
def test_J2_losses_that_take_labels_for_probabilities_are_refused(loss):
    model = unet((8, 8, 8, 3), n_classes=3, filters=2, depth=1)
    with pytest.raises(ValueError, match="loss is .*for the truth.* if all is enhanc"):
        check_loss(loss, model)


def test_I5_a_path_is_described_by_its_text():
    first, second = Path("a/b"), Path("a/b")
    assert str(first) and hash(first) and first == second  # fills its caches
    class_ = type("Change", (), {})
    changes = class_(), class_()
    changes[0].folder, changes[1].folder = first, second
    assert describe({"x": changes[0]}) == describe({"x": changes[1]})

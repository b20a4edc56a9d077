import keras
import numpy as np
import pytest

from brats_utils.metrics import RegionDice

LABELS = np.array([0, 1, 2, 3], "uint8").reshape(1, 4, 1)  # one voxel of each
# By argmax: 0, 3, 0, 3. WT: 2 found of 3, TC: 2 of 2, ET: 2 where 1 is.
AS_LABELS = np.eye(4)[[[0, 3, 0, 3]]]
BY_HAND = {"WT": 4 / 5, "TC": 1.0, "ET": 2 / 3}


def dice(region, labels, prediction):
    metric = RegionDice(region)
    metric.update_state(labels, prediction)
    return float(metric.result())


@pytest.mark.parametrize("region", BY_HAND)
def test_labels_by_hand(region):
    assert dice(region, LABELS, AS_LABELS) == pytest.approx(BY_HAND[region])


@pytest.mark.parametrize("region", BY_HAND)
def test_regions_by_hand(region):
    # The same map as three sigmoids; exactly 0.5 is not in.
    prediction = np.where([[[0] * 3, [1] * 3, [0] * 3, [1] * 3]], 0.9, 0.5)
    assert dice(region, LABELS, prediction) == pytest.approx(BY_HAND[region])


def test_empty_and_found_empty_is_one():
    nothing = np.eye(4)[np.zeros((1, 4), int)]
    assert dice("ET", np.zeros((1, 4, 1)), nothing) == 1
    assert dice("ET", np.zeros((1, 4, 1)), AS_LABELS) == 0
    assert dice("ET", LABELS, nothing) == 0


def test_averages_over_samples_not_batches_nor_voxels():
    metric = RegionDice("ET")
    metric.update_state(LABELS, AS_LABELS)  # 2/3
    perfect = np.eye(4)[LABELS[..., 0]]
    metric.update_state(np.repeat(LABELS, 3, 0), np.repeat(perfect, 3, 0))  # 1, 1, 1
    assert float(metric.result()) == pytest.approx((2 / 3 + 3) / 4)
    metric.reset_state()
    assert float(metric.result()) == 0


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_volumes_of_any_number_type(dtype):
    labels = LABELS.reshape(1, 2, 2, 1, 1).astype(dtype)
    prediction = AS_LABELS.reshape(1, 2, 2, 1, 4)
    assert dice("WT", labels, prediction) == pytest.approx(BY_HAND["WT"])


def test_survives_serialisation():
    config = keras.saving.serialize_keras_object(RegionDice("TC"))
    again = keras.saving.deserialize_keras_object(config)
    assert (again.region, again.name) == ("TC", "dice_TC")


def test_unknown_region_is_refused():
    with pytest.raises(ValueError, match="WT.*TC.*ET.*got 'WM'"):
        RegionDice("WM")

"""Decoding: always nested, and tuned to what is better."""

import numpy as np
import pytest

from brats_utils.decoding import decode_probabilities, tune_decoding
from brats_utils.labels import REGIONS


def test_softmax_and_sigmoids_decode_to_brats_labels():
    labels = np.eye(4)[[0, 1, 2, 3]]
    assert decode_probabilities(labels).tolist() == [0, 1, 2, 4]
    # Columns are WT, TC, ET; a region outside the one round it does not count.
    regions = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]]
    assert decode_probabilities(regions).tolist() == [0, 2, 1, 4, 0, 2]
    with pytest.raises(ValueError, match="got 5"):
        decode_probabilities(np.zeros((2, 5)))


@pytest.mark.parametrize("seed", range(200))
def test_regions_are_nested_whatever_the_probabilities(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((6, 6, 6, 3))
    probabilities[:3] = np.sort(probabilities[:3], axis=-1)  # p(ET) > p(TC) > p(WT)
    thresholds = rng.uniform(0.2, 0.8, 3)
    found = decode_probabilities(probabilities, thresholds=list(thresholds))
    above = probabilities > thresholds
    assert not (np.isin(found, REGIONS["ET"]) & ~above.all(axis=-1)).any()
    assert not (np.isin(found, REGIONS["TC"]) & ~above[..., :2].all(axis=-1)).any()
    np.testing.assert_array_equal(found > 0, above[..., 0])


def sure_case(truth, inside=0.9, outside=0.1):
    """Return probabilities of the regions that fit a truth, and the truth."""
    truth = np.asarray(truth)
    regions = [np.isin(truth, values) for values in REGIONS.values()]
    return np.where(np.stack(regions, -1), inside, outside), truth


def test_nothing_is_tuned_where_nothing_is_better():
    decoding, gain = tune_decoding([sure_case([0, 0, 1, 2, 4, 4])])
    assert decoding == {}
    assert (gain == 1).all(axis=None)


def test_a_threshold_follows_the_probabilities_of_its_region():
    probabilities, truth = sure_case([0, 0, 0, 1, 2, 4, 4, 4])
    probabilities[truth == 4, 2] = 0.4
    decoding, gain = tune_decoding([(probabilities, truth)])
    assert decoding["thresholds"][:2] == [0.5, 0.5]
    assert 0.1 < decoding["thresholds"][2] < 0.4
    assert gain.loc["ET"].tolist() == [0, 1]
    found = decode_probabilities(probabilities, **decoding)
    np.testing.assert_array_equal(found, truth)


def test_stray_enhancing_voxels_are_worth_a_least_volume():
    truth = np.repeat([0, 1, 2], 500)
    stray = sure_case(truth)[0]
    stray[500:530, 2] = 0.95
    many = sure_case(np.repeat([0, 1, 4], 500))
    decoding, gain = tune_decoding([(stray, truth), many])
    assert decoding["min_et_voxels"] == 50
    assert gain.loc["ET"].tolist() == [0.5, 1]


def test_labels_are_added_up_over_the_regions():
    labels = [[0.4, 0.3, 0.1, 0.2], [0.6, 0.2, 0.1, 0.1]]
    assert decode_probabilities(labels).tolist() == [0, 0]
    found = decode_probabilities(labels, thresholds=[0.5, 0.4, 0.3])
    assert found.tolist() == [1, 0]


def test_labels_are_tuned_against_the_decoding_that_they_have():
    # Background is the likeliest label of the last five voxels, and right, although the
    # other labels together, whole tumour, have more than one half.
    probabilities = np.tile([0.02, 0.01, 0.96, 0.01], (10, 1))
    probabilities[5:] = [0.45, 0.2, 0.15, 0.2]
    decoding, gain = tune_decoding([(probabilities, np.repeat([2, 0], 5))])
    assert decoding == {}
    assert (gain == 1).all(axis=None)
    # Here the tumour is less likely than background, but far more than elsewhere.
    hidden = np.tile([0.45, 0.3, 0.05, 0.2], (10, 1))
    hidden[5:] = [0.98, 0.01, 0.01, 0]
    decoding, gain = tune_decoding([(hidden, np.repeat([1, 0], 5))])
    assert decoding["thresholds"][1] < 0.5
    assert gain.loc["TC"].tolist() == [0, 1]


def test_of_two_better_thresholds_the_best_is_taken():
    # Four false voxels at 0.525, one at 0.775: the last gains less than LEAST_GAIN.
    likely = np.r_[np.full(1000, 0.95), [0.525, 0.525, 0.525, 0.525, 0.775]]
    regions = np.stack([likely] * 3, axis=-1)
    truth = np.r_[np.full(1000, 4), np.zeros(5)].astype(np.uint8)
    decoding, gain = tune_decoding([(regions, truth)])
    assert decoding["thresholds"][0] >= 0.8 and gain.loc["WT", "tuned"] == 1


def test_thresholds_may_be_an_array():
    regions = [[0.9, 0.6, 0.6]]
    assert decode_probabilities(regions, thresholds=np.full(3, 0.7)).tolist() == [2]

"""What is done to voxels: values by hand, edges, errors, and the way back."""

import numpy as np
import pytest
from conftest import toy_volumes
from sklearn.preprocessing import MinMaxScaler

from brats_utils.volumes import (
    background_problem,
    bounding_box,
    brain_mask,
    check_grey_levels,
    check_outliers,
    crop_box,
    dice,
    nonzero_statistics,
    pad,
    scale_to_store,
    scale_volume,
    standardise,
    surface_quads,
)


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
    with pytest.raises(ValueError, match="method is .*expected one of"):
        scale_volume(np.zeros((2, 2, 2)), "slicewise")


def test_statistics_are_of_non_zero_voxels():
    mean, sd = nonzero_statistics(np.array([[[0, 2, 4, 0]]], np.int16))
    assert (mean, sd) == (3, 1)
    assert nonzero_statistics(np.full((1, 1, 2), 7)) == (7, 1)
    assert nonzero_statistics(np.zeros((1, 1, 2))) == (0, 1)


@pytest.mark.parametrize("method", ["minmax", "zscore"])
@pytest.mark.parametrize("shift", [0, -60])  # -60: background is not the smallest
def test_what_is_stored_standardises_to_the_whole_scans_values(method, shift):
    volume = toy_volumes()[0]["flair"].astype(np.float32)
    volume[volume != 0] += shift
    box, shape = (slice(4, 20), slice(3, 20), slice(2, 14)), (16, 20, 12)
    stored, statistics = scale_to_store(volume, box, shape, method)
    assert stored.dtype == np.float16 and stored.shape == shape
    np.testing.assert_allclose(
        stored[:, :17], scale_volume(volume, method)[box], atol=2e-3
    )
    numbers = [[statistics[name]] for name in ("mean", "sd", "zero")]
    found = standardise(stored[..., None], numbers)[..., 0]
    expected = standardise(volume[..., None])[box][..., 0]
    np.testing.assert_allclose(found[:, :17], expected, atol=1e-2)
    assert not found[:, 17:].any()  # padded with background


def test_the_brain_is_where_any_volume_is_not_zero():
    first, second = np.zeros((2, 1, 3, 1))
    first[0, 0, 0], second[0, 1, 0] = 5, -5
    assert brain_mask([first, second]).ravel().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="no brain"):
        brain_mask([first * 0])
    empty = (slice(0, 0),) * 3
    assert bounding_box(first * 0) == empty
    assert bounding_box(second) == (slice(0, 1), slice(1, 2), slice(0, 1))


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
    assert bounding_box(image) == (slice(2, 18),) * 3


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
    with pytest.raises(ValueError, match="three whole"):
        crop_box(np.ones((4, 4, 4)), shape=(2, 2))


def test_standardise_takes_its_own_statistics_or_those_of_the_whole_scan():
    image = np.zeros((3, 2, 2, 2), np.float32)
    image[0, :, :, 0], image[1, :, :, 0] = 2, 4  # mean 3, SD 1
    image[0, :, :, 1], image[1, :, :, 1] = 10, 30  # mean 20, SD 10
    expected = np.zeros_like(image)
    expected[0], expected[1] = -1, 1
    np.testing.assert_array_equal(standardise(image), expected)
    statistics = np.array([[3, 20], [1, 10], [0, 0]])
    part = standardise(image[1:], statistics)
    np.testing.assert_array_equal(part, expected[1:])
    half = standardise(image.astype(np.float16), statistics)
    np.testing.assert_array_equal(half, expected)
    # Background of another value becomes exactly 0.
    shifted = standardise(image + 1, np.array([[4, 21], [1, 10], [1, 1]]))
    np.testing.assert_array_equal(shifted, expected)


def test_every_half_is_standardised_as_numpy_converts_it():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    finite = finite[: finite.size // 8 * 8].reshape(2, 2, -1, 2)
    found = standardise(finite, np.array([[0, 0], [1, 1], [0, 0]]))
    np.testing.assert_array_equal(found, finite.astype(np.float32))


def test_pad_adds_at_the_ends_and_leaves_what_is_long_enough():
    volume = np.ones((2, 3, 4))
    padded = pad(volume, (3, 2, 6), 7)
    assert padded.shape == (3, 3, 6)
    np.testing.assert_array_equal(padded[:2, :, :4], 1)
    assert padded.sum() == 24 + 7 * (54 - 24)
    assert pad(volume, None) is volume and pad(volume, (1, 1, 1)) is volume
    assert pad(volume[..., None], (3, 3, 4)).shape == (3, 3, 4, 1)


def test_J1_grey_levels_are_counted_as_they_are_stored():
    volume = np.arange(200.0).reshape(10, 5, 4)
    check_grey_levels(volume)
    volume[9, 4, 3] = 1e9
    with pytest.raises(ValueError, match=r"voxel \[9, 4, 3\] holds 1e\+09"):
        check_grey_levels(volume)
    stored = np.full((2, 2, 2), np.inf, np.float16)
    with pytest.raises(ValueError, match="grey levels"):
        check_grey_levels(np.ones((2, 2, 2)), stored)


def test_dice_by_hand():
    first, second = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert dice(first, second) == 0.5
    assert dice(first, first) == 1 and dice(first, ~first) == 0
    assert dice(first & False, second & False) == 1


def test_surface_quads_enclose_the_mask_and_face_outwards():
    mask = np.zeros((6, 5, 4), bool)
    mask[1:5, 1:4, 1:3] = True
    quads = surface_quads(mask, rounds=0)
    assert len(quads) == 2 * (4 * 3 + 3 * 2 + 4 * 2)
    assert quads.min(axis=(0, 1)).tolist() == [1, 1, 1]
    assert quads.max(axis=(0, 1)).tolist() == [5, 4, 3]

    def volume(quads):  # by the divergence theorem: of cones from the origin
        normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]) / 2
        return (quads.mean(axis=1) * normals).sum() / 3

    assert volume(quads) == pytest.approx(mask.sum())
    assert 0 < volume(surface_quads(mask)) < mask.sum()  # the edges are rounded off
    assert surface_quads(np.zeros((2, 2, 2), bool)).shape == (0, 4, 3)


def test_J2_zeros_around_it_do_not_make_a_background_of_noise():
    rng = np.random.default_rng(0)
    volume = np.zeros((80, 40, 40))
    volume[20:60, 10:30, 10:30] = rng.uniform(50, 150, (40, 20, 20))
    assert background_problem(volume) == ""
    noisy = np.where(volume == 0, rng.uniform(1e-4, 1e-3, volume.shape), volume)
    shifted = volume - 5
    for other in (noisy, shifted):
        other[:5] = 0  # 6 % of the voxels
        assert "apply the brain mask" in background_problem(other)


def test_J2_zeros_within_a_standardised_brain_are_no_noise():
    rng = np.random.default_rng(0)
    volume = rng.normal(0, 1, (60, 60, 60))  # a crop: mean 0 over the brain
    volume[:24] = 0
    assert background_problem(volume) == ""


def test_J1_a_high_offset_is_no_outlier():
    volume = np.zeros((40, 40, 40), np.float32)
    brain = np.random.default_rng(0).uniform(32668, 32868, (20, 20, 20))
    volume[10:30, 10:30, 10:30] = brain
    check_outliers(volume)


def test_J1_one_hot_voxel_is_refused_when_a_scan_is_stored():
    volume = np.zeros((64, 64, 64), np.float32)
    rng = np.random.default_rng(0)
    volume[8:56, 8:56, 8:56] = rng.uniform(50, 200, (48, 48, 48))
    box = (slice(None),) * 3
    scale_to_store(volume, box, None, "minmax")
    volume[40, 40, 30] = 1e7
    with pytest.raises(ValueError, match="SD from the brain's mean"):
        scale_to_store(volume, box, None, "minmax")


def test_J2_noise_in_a_part_of_the_background_is_told():
    rng, brain = np.random.default_rng(0), np.zeros((40, 40, 40), bool)
    brain[12:28, 12:28, 12:28] = True
    volume = np.where(brain, rng.normal(500, 80, brain.shape), 0.0)
    assert not background_problem(volume)
    shell = np.zeros_like(brain)
    shell[9:31, 9:31, 9:31] = True
    volume[shell & ~brain] = rng.uniform(0.1, 5, brain.shape)[shell & ~brain]
    assert (volume == 0).mean() > 0.8
    assert "noise around the brain" in background_problem(volume)


def test_J1_the_darkest_voxel_of_int16_is_named():
    volume = toy_volumes()[0]["flair"].copy()
    volume[5, 5, 5] = -32768
    stored = np.zeros(volume.shape, np.float16)
    with pytest.raises(ValueError, match=r"voxel \[5, 5, 5\] holds -32768"):
        check_grey_levels(volume, stored)


def test_J2_a_frequent_value_in_a_brain_is_no_background():
    volume = np.zeros((40, 40, 40))
    volume[10:30, 10:30, 10:30] = np.random.default_rng(0).uniform(50, 255, (20,) * 3)
    volume[volume > 150] = 150  # clipped: half of the brain
    assert not background_problem(volume)
    assert not background_problem(np.eye(1, 8000, 1).reshape(20, 20, 20))  # one voxel


# Computed in float64, 0 would round to another float16 here than the stored voxels.
EXTREMES = [
    (-280.96417236328125, 1049.08984375),
    (-322.3995361328125, 2058.03955078125),
]


@pytest.mark.parametrize(("low", "high"), EXTREMES)
def test_the_background_is_recognised_however_it_is_rounded(low, high):
    volume = np.zeros((2, 12, 12), np.float32)
    volume[1] = np.linspace(low, high, 144).reshape(12, 12)
    stored, statistics = scale_to_store(volume, (slice(None),) * 3, None, "minmax")
    numbers = [[statistics[name]] for name in ("mean", "sd", "zero")]
    assert not standardise(stored[..., None], numbers)[0].any()

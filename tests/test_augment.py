"""Augmentation: image and labels stay together, background stays background."""

import numpy as np
import pytest

from brats_utils import augment as module
from brats_utils.augment import (
    augment,
    change_intensities,
    flip,
    lose_detail,
    turn_and_zoom,
)

SHAPE = (6, 5, 4)


class Fixed:
    """A generator that draws the given rotation and the given zoom."""

    def __init__(self, degrees, zoom):
        self.draws = iter([np.array(degrees), zoom])

    def uniform(self, *_):
        return next(self.draws)


def patch(seed=0, shape=SHAPE):
    """Return a two-channel image, half of it background, and its labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, shape, np.uint8)
    image = rng.standard_normal((*shape, 2), np.float32)
    image[: shape[0] // 2] = 0
    return image, labels


def test_the_same_generator_state_gives_the_same_change(monkeypatch):
    monkeypatch.setattr(module, "TURN_CHANCE", 0.5)
    image, labels = patch()
    kept = image.copy(), labels.copy()
    results = [
        [augment(image, labels, np.random.default_rng([seed])) for seed in range(20)]
        for _ in range(2)
    ]
    for (x1, y1), (x2, y2) in zip(*results, strict=True):
        assert x1.shape == image.shape and x1.dtype == np.float32
        assert y1.shape == labels.shape and y1.dtype == np.uint8
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)
    assert len({x.tobytes() for x, _ in results[0]}) > 15
    np.testing.assert_array_equal(image, kept[0])
    np.testing.assert_array_equal(labels, kept[1])


def test_flips_keep_image_and_labels_together():
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    seen = set()
    for seed in range(60):
        image, flipped = flip(labels[..., None], labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(image[..., 0], flipped)
        assert np.shares_memory(flipped, labels)
        seen.add(int(flipped[0, 0, 0]))
    # The corner becomes any of the eight: 0 or 5 rows, 0 or 4 columns, 0 or 3 slices.
    assert seen == {20 * x + 4 * y + z for x in (0, 5) for y in (0, 4) for z in (0, 3)}


def test_zero_degrees_and_zoom_1_change_nothing():
    image, labels = patch()
    same = turn_and_zoom(image, labels, Fixed((0, 0, 0), 1.0))
    np.testing.assert_array_equal(same[0], image)
    np.testing.assert_array_equal(same[1], labels)


@pytest.mark.parametrize("axis, axes", [(0, (2, 1)), (1, (2, 0)), (2, (1, 0))])
def test_a_right_angle_turns_as_rot90_does(axis, axes):
    image, labels = patch(shape=(5, 5, 5))
    degrees = np.eye(3)[axis] * 90
    turned, turned_labels = turn_and_zoom(image, labels, Fixed(degrees, 1.0))
    np.testing.assert_allclose(turned, np.rot90(image, axes=axes), atol=1e-5)
    np.testing.assert_array_equal(turned_labels, np.rot90(labels, axes=axes))


def test_a_zoom_by_two_about_the_middle():
    image = np.zeros((5, 1, 1, 1), np.float32)
    image[:, 0, 0, 0] = [1, 2, 4, 8, 16]
    labels = np.array([0, 1, 2, 3, 0], np.uint8).reshape(5, 1, 1)
    zoomed, zoomed_labels = turn_and_zoom(image, labels, Fixed((0, 0, 0), 2.0))
    # Positions 0..4 show positions 1, 1.5, 2, 2.5 and 3 of the original.
    assert zoomed.ravel().tolist() == [2, 3, 4, 6, 8]
    assert zoomed_labels.ravel()[::2].tolist() == [1, 2, 3]


def test_turned_labels_lie_on_the_turned_image():
    shape = (17, 17, 17)
    labels = np.zeros(shape, np.uint8)
    labels[3:14, 3:14, 3:14] = 2
    labels[6:11, 6:11, 6:11] = 3
    image = labels[..., None].astype(np.float32)
    for seed in range(5):
        turned, mask = turn_and_zoom(image, labels, np.random.default_rng(seed))
        assert turned.shape == image.shape and turned.dtype == np.float32
        assert set(np.unique(mask)) <= {0, 2, 3} and mask.dtype == np.uint8
        assert mask[8, 8, 8] == 3
        # Where no two values were interpolated, image and labels agree.
        pure = np.isin(turned[..., 0], (2, 3)) & (turned[..., 0] == mask)
        assert pure.sum() > 0.5 * (mask > 0).sum()


def test_each_intensity_change_by_hand(monkeypatch):
    monkeypatch.setattr(module, "INTENSITY_CHANCE", 1)
    monkeypatch.setattr(module, "NOISE_SD", 0)
    for name, value in (("BRIGHTNESS", 2), ("CONTRAST", 0.5), ("GAMMA", 2)):
        monkeypatch.setattr(module, name, (value, value))
    image = np.array([0, 1, 2, 3], np.float32).reshape(1, 1, 4, 1)
    changed = change_intensities(image, np.random.default_rng(0))
    # 1 2 3 -> brightness 2 4 6 -> contrast 3 4 5 -> share 0 1/2 1 squared -> 3 3.5 5.
    np.testing.assert_allclose(changed.ravel(), [0, 3, 3.5, 5], rtol=1e-6)
    assert image.ravel().tolist() == [0, 1, 2, 3]


def test_channels_change_independently_and_background_stays(monkeypatch):
    monkeypatch.setattr(module, "INTENSITY_CHANCE", 0.2)
    image, _ = patch()
    one_of_two = 0
    for seed in range(30):
        changed = change_intensities(image, np.random.default_rng(seed))
        assert changed.dtype == np.float32 and np.isfinite(changed).all()
        assert not changed[:3].any()
        equal = (changed == image).all(axis=(0, 1, 2))
        one_of_two += equal[0] != equal[1]
    assert one_of_two > 5  # about half of the time


def test_noise_has_the_standard_deviation_drawn():
    class OnlyNoise:
        def random(self, n):
            return np.array([1, 1, 1, 0.0])

        def uniform(self, low, high):
            assert (low, high) == (0, 0.1)
            return high

        standard_normal = np.random.default_rng(0).standard_normal

    image = np.ones((20, 20, 20, 1), np.float32)
    noise = change_intensities(image, OnlyNoise()) - image
    assert noise.std() == pytest.approx(0.1, rel=0.03)  # 8000 draws


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_channel_stays_finite(value, monkeypatch):
    monkeypatch.setattr(module, "INTENSITY_CHANCE", 1)
    image = np.full((*SHAPE, 1), value, np.float32)
    changed = change_intensities(image, np.random.default_rng(0))
    assert np.isfinite(changed).all() and (changed.any() or not value)


def test_less_detail_changes_the_brain_only_and_keeps_its_mean(monkeypatch):
    monkeypatch.setattr(module, "DETAIL_CHANCE", 1)
    image, _ = patch(shape=(24, 24, 24))
    changed = lose_detail(image, np.random.default_rng(0))
    assert changed.dtype == np.float32 and not changed[:12].any()
    inner = (slice(15, -3), slice(3, -3), slice(3, -3))
    assert changed[inner].std() < 0.6 * image[inner].std()
    assert changed[inner].mean() == pytest.approx(image[inner].mean(), abs=0.05)


def test_a_smooth_image_survives_a_lower_resolution(monkeypatch):
    monkeypatch.setattr(module, "DETAIL_CHANCE", 1)
    monkeypatch.setattr(module, "BLUR_SD", (1e-3, 1e-3))
    monkeypatch.setattr(module, "RESOLUTION", (0.5, 0.5))
    ramp = np.broadcast_to(np.arange(1.0, 25.0), (8, 8, 24))[..., None]
    changed = lose_detail(ramp.astype(np.float32), np.random.default_rng(0))
    # Every second voxel is kept, and the others are interpolated.
    assert np.abs(changed - ramp)[:, :, 2:-2].max() <= 0.5 + 1e-5
    assert np.abs(changed - ramp).max() > 0


def test_with_a_chance_of_0_no_detail_is_lost(monkeypatch):
    monkeypatch.setattr(module, "DETAIL_CHANCE", 0)
    image, _ = patch()
    np.testing.assert_array_equal(lose_detail(image, np.random.default_rng(0)), image)

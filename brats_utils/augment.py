"""Random changes of a patch that keep its meaning: flips, turns, other scanners."""

import numpy as np
from scipy import ndimage

# Chances and strengths after nnU-Net's for BraTS (arXiv:2011.00848).
FLIP_CHANCE = 0.5
TURN_CHANCE = 0.2
TURN_DEGREES = 30.0
ZOOM = (0.7, 1.4)
INTENSITY_CHANCE = 0.15
BRIGHTNESS = (0.75, 1.25)
CONTRAST = (0.75, 1.25)
GAMMA = (0.7, 1.5)
NOISE_SD = 0.1
DETAIL_CHANCE = 0.1  # of each channel, as half of the channels of every fifth patch
BLUR_SD = (0.5, 1.0)  # voxels
RESOLUTION = (0.5, 1.0)


def flip(image, labels, rng):
    """Mirror each axis with a chance of one half.

    Parameters
    ----------
    image : (X, Y, Z, C) array
        Any values.
    labels : (X, Y, Z) array
        On the same grid.
    rng : numpy.random.Generator

    Returns
    -------
    image, labels : views, no voxel copied
    """
    axes = tuple(axis for axis in range(3) if rng.random() < FLIP_CHANCE)
    return np.flip(image, axes), np.flip(labels, axes)


def _rotation(degrees):
    """Return the (3, 3) matrix that turns by three angles about the three axes."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        first, second = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def turn_and_zoom(image, labels, rng):
    """Turn by up to 30 degrees about each axis, and zoom by 0.7 to 1.4.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Interpolated linearly; zeros come in from outside.
    labels : (X, Y, Z) integer array
        Takes the nearest voxel's.
    rng : numpy.random.Generator

    Returns
    -------
    image, labels : arrays of the same shapes and types
    """
    degrees = rng.uniform(-TURN_DEGREES, TURN_DEGREES, 3)
    matrix = _rotation(degrees) / rng.uniform(*ZOOM)
    middle = (np.array(labels.shape) - 1) / 2
    offset = middle - matrix @ middle
    # No spline is fitted below order 2: the prefilter would only copy.
    place = {"matrix": matrix, "offset": offset, "prefilter": False}
    channels = [
        ndimage.affine_transform(channel, order=1, **place)
        for channel in np.moveaxis(image, -1, 0)
    ]
    turned = np.stack(channels, axis=-1)  # (X, Y, Z, C)
    return turned, ndimage.affine_transform(labels, order=0, **place)


def change_intensities(image, rng):
    """Change brightness, contrast, gamma and noise of each channel, each by chance.

    Background, exactly 0, stays so: a scanner does not change where there is no head.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised; not changed.
    rng : numpy.random.Generator

    Returns
    -------
    image : (X, Y, Z, C) float32 array
    """
    image = np.array(image)
    for channel in np.moveaxis(image, -1, 0):
        chances = rng.random(4) < INTENSITY_CHANCE
        if not chances.any():
            continue
        brain = channel != 0
        values = channel[brain]
        if not values.size:
            continue
        if chances[0]:
            values = values * np.float32(rng.uniform(*BRIGHTNESS))
        if chances[1]:
            mean = values.mean()
            values = (values - mean) * np.float32(rng.uniform(*CONTRAST)) + mean
        if chances[2]:
            low, high = values.min(), values.max()
            share = (values - low) / max(high - low, 1e-6)
            gamma = np.float32(np.exp(rng.uniform(*np.log(GAMMA))))
            values = share**gamma * (high - low) + low
        if chances[3]:
            noise = rng.standard_normal(values.size, np.float32)
            values = values + np.float32(rng.uniform(0, NOISE_SD)) * noise
        channel[brain] = values
    return image


def lose_detail(image, rng):
    """Blur channels, or show them as if scanned more coarsely, each by chance.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised, background exactly 0, and so it stays; not changed.
    rng : numpy.random.Generator

    Returns
    -------
    image : (X, Y, Z, C) float32 array
    """
    image = np.array(image)
    for channel in np.moveaxis(image, -1, 0):
        blurred, coarse = rng.random(2) < DETAIL_CHANCE
        changed = channel
        if blurred:
            changed = ndimage.gaussian_filter(changed, rng.uniform(*BLUR_SD))
        if coarse:
            grid = {"mode": "nearest", "grid_mode": True}
            few = ndimage.zoom(changed, rng.uniform(*RESOLUTION), order=0, **grid)
            back = np.divide(channel.shape, few.shape)
            changed = ndimage.zoom(few, back, order=1, **grid)
        if blurred or coarse:
            channel[...] = changed * (channel != 0)
    return image


def augment(image, labels, rng):
    """Change a patch at random: flips always, the rest by chance.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised, background exactly 0; not changed.
    labels : (X, Y, Z) integer array
        Values 0 to 3; not changed.
    rng : numpy.random.Generator
        The same generator state gives the same change.

    Returns
    -------
    image : (X, Y, Z, C) float32 array
    labels : (X, Y, Z) integer array

    References
    ----------
    Isensee et al., 2020, nnU-Net for Brain Tumor Segmentation, arXiv:2011.00848.
    """
    if rng.random() < TURN_CHANCE:
        image, labels = turn_and_zoom(image, labels, rng)
    image, labels = flip(image, labels, rng)
    return lose_detail(change_intensities(image, rng), rng), labels

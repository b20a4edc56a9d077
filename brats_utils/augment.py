"""Random augmentation of patches: flips, rotation, zoom, intensity and resolution."""

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, zoom

# Probabilities and ranges follow nnU-Net for BraTS (arXiv:2011.00848).
TURN_CHANCE = 0.2
TURN_DEGREES = 30.0
ZOOM = (0.7, 1.4)
INTENSITY_CHANCE = 0.15
BRIGHTNESS = CONTRAST = (0.75, 1.25)
GAMMA = (0.7, 1.5)
NOISE_SD = 0.1
DETAIL_CHANCE = 0.1  # per channel; nnU-Net: half of the channels, in 20 % of patches
BLUR_SD = (0.5, 1.0)  # voxels
RESOLUTION = (0.5, 1.0)
GRID = {"mode": "nearest", "grid_mode": True}  # voxels are cubes, not points


def flip(image, labels, rng):
    """Flip each axis with a probability of 0.5.

    Parameters
    ----------
    image : (X, Y, Z, C) array
    labels : (X, Y, Z) array
    rng : numpy.random.Generator

    Returns
    -------
    image, labels : views of the same shapes
    """
    axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
    return np.flip(image, axes), np.flip(labels, axes)


def rotation(angles):
    """Return the matrix of a rotation about X, Y and Z.

    Parameters
    ----------
    angles : (3,) array
        Angles about the three axes, in radians.

    Returns
    -------
    matrix : (3, 3) array
    """
    (cos_x, cos_y, cos_z), (x, y, z) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cos_x, -x], [0, x, cos_x]])
    about_y = np.array([[cos_y, 0, -y], [0, 1, 0], [y, 0, cos_y]])
    about_z = np.array([[cos_z, -z, 0], [z, cos_z, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def turn_and_zoom(image, labels, rng):
    """Rotate by up to 30 degrees about each axis, and zoom by a factor of 0.7 to 1.4.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Interpolated linearly, with zeros outside.
    labels : (X, Y, Z) integer array
        Interpolated by nearest neighbour.
    rng : numpy.random.Generator

    Returns
    -------
    image, labels : arrays of the same shapes and types
    """
    degrees = rng.uniform(-TURN_DEGREES, TURN_DEGREES, 3)
    matrix = rotation(np.radians(degrees)) / rng.uniform(*ZOOM)
    middle = (np.array(labels.shape) - 1) / 2
    offset = middle - matrix @ middle
    channels = np.moveaxis(image, -1, 0)
    turned = [affine_transform(c, matrix, offset, order=1) for c in channels]
    labels = affine_transform(labels, matrix, offset, order=0)
    return np.stack(turned, axis=-1), labels


def change_intensities(image, rng):
    """Change brightness, contrast, gamma and noise of each channel at random.

    The background, where the value is exactly 0, is not changed.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised. It is not modified in place.
    rng : numpy.random.Generator

    Returns
    -------
    image : (X, Y, Z, C) float32 array
    """
    image = np.array(image)
    for channel in np.moveaxis(image, -1, 0):
        chances = rng.random(4) < INTENSITY_CHANCE
        if not (chances.any() and channel.any()):
            continue
        brain = channel != 0
        values = channel[brain]
        if chances[0]:
            values = values * np.float32(rng.uniform(*BRIGHTNESS))
        if chances[1]:
            mean = values.mean()
            values = (values - mean) * np.float32(rng.uniform(*CONTRAST)) + mean
        if chances[2]:
            low, span = values.min(), np.ptp(values)
            gamma = np.float32(np.exp(rng.uniform(*np.log(GAMMA))))
            values = ((values - low) / max(span, 1e-6)) ** gamma * span + low
        if chances[3]:
            noise = rng.standard_normal(values.size, np.float32)
            values = values + np.float32(rng.uniform(0, NOISE_SD)) * noise
        channel[brain] = values
    return image


def lose_detail(image, rng):
    """Blur channels or reduce their resolution at random.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised. Background voxels, exactly 0, stay 0. Not modified in place.
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
            changed = gaussian_filter(changed, rng.uniform(*BLUR_SD))
        if coarse:
            few = zoom(changed, rng.uniform(*RESOLUTION), order=0, **GRID)
            changed = zoom(few, np.divide(channel.shape, few.shape), order=1, **GRID)
        if blurred or coarse:
            channel[...] = changed * (channel != 0)
    return image


def augment(image, labels, rng):
    """Augment a patch with random flips and, less often, the other transforms.

    Parameters
    ----------
    image : (X, Y, Z, C) float32 array
        Standardised, background exactly 0. It is not modified in place.
    labels : (X, Y, Z) integer array
        Values 0 to 3.
    rng : numpy.random.Generator
        The same generator state gives the same result.

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

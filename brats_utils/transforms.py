"""Scale and crop one scan: what is done to its voxels, whatever file they are in."""

import numpy as np

NORMALISATION = "mean 0, SD 1 over each modality's non-zero voxels"  # by standardise
# The tutorial recipe's crop of a 240 x 240 x 155 scan, kept to compare with.
FIXED_WINDOW = (slice(56, 184), slice(56, 184), slice(13, 141))


def nonzero_statistics(volume):
    """Return what standardising a volume takes away and divides by.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Background is 0.

    Returns
    -------
    mean, sd : float
        Of the non-zero voxels, in float64; 0 and 1 where there are none.
    """
    values = volume[volume != 0]
    if not values.size:
        return 0.0, 1.0
    mean = values.mean(dtype=np.float64)
    return float(mean), float(values.std(dtype=np.float64, mean=mean)) or 1.0


def offset_and_divisor(volume, method):
    """Return the two numbers of the affine step `(volume - offset) / divisor`.

    Parameters
    ----------
    volume, method
        As in `scale_volume`.

    Returns
    -------
    offset, divisor : float

    Raises
    ------
    ValueError
        If "minmax" meets a blank volume, or the method is unknown.
    """
    if method == "minmax":
        low, high = float(volume.min()), float(volume.max())
        if not high > low:
            raise ValueError(f"a blank volume cannot be scaled: every voxel is {low:g}")
        return low, high - low
    if method == "zscore":
        return nonzero_statistics(volume)
    raise ValueError(f"method is 'minmax' or 'zscore', not {method!r}")


def scale_volume(volume, method="minmax"):
    """Scale one modality of one scan, the whole volume by the same two numbers.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities; background 0.
    method : {"minmax", "zscore"}
        "minmax" maps the smallest voxel to 0 and the largest to 1, as scikit-learn's
        `MinMaxScaler` does on the volume as one column. "zscore" gives the non-zero
        voxels mean 0 and SD 1 and leaves the others 0.

    Returns
    -------
    scaled : (X, Y, Z) float32 array

    Raises
    ------
    ValueError
        If the volume holds NaN or infinity, "minmax" meets a blank volume, or the
        method is unknown.

    Examples
    --------
    >>> scale_volume(np.array([[[0, 50, 100]]])).tolist()
    [[[0.0, 0.5, 1.0]]]
    """
    volume = np.asarray(volume, np.float32)
    if not np.isfinite(volume).all():
        raise ValueError(
            "the volume holds NaN or infinity; nothing is put in its place"
        )
    offset, divisor = offset_and_divisor(volume, method)
    scaled = (volume - np.float32(offset)) / np.float32(divisor)
    if method == "zscore":
        scaled[volume == 0] = 0
    return scaled


def standardise(image):
    """Give each channel mean 0 and SD 1 over its non-zero voxels; zeros stay zero.

    This is what a network sees, of a scan to be predicted as of the stored volumes.

    Parameters
    ----------
    image : (X, Y, Z, C) array
        A whole scan, raw intensities; a crop would have other means.

    Returns
    -------
    standardised : (X, Y, Z, C) float32 array
    """
    channels = [
        scale_volume(channel, "zscore") for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def brain_box(image):
    """Return the smallest box that holds all non-zero voxels.

    Parameters
    ----------
    image : (X, Y, Z) or (X, Y, Z, C) array
        Non-zero in any channel counts as brain.

    Returns
    -------
    box : tuple of 3 slices

    Raises
    ------
    ValueError
        If every voxel is zero.
    """
    brain = image.any(axis=-1) if image.ndim == 4 else image != 0
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(brain.any(axis=others))
        if not filled.size:
            raise ValueError("every voxel is zero: there is no brain to crop to")
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def _window_start(tumour, brain, size):
    """Return where a window of `size` holds most tumour, and then most brain.

    `tumour` and `brain` count the voxels of each plane along one axis.
    """
    starts = np.arange(max(1, len(brain) - size + 1))
    for counts in (tumour, brain):
        total = np.concatenate([[0], np.cumsum(counts)])
        held = total[np.minimum(starts + size, len(counts))] - total[starts]
        starts = starts[held == held.max()]
    return int(starts[len(starts) // 2])


def crop_box(image, segmentation=None, shape=(128, 128, 128)):
    """Choose the crop: all of the tumour if it fits, then as much brain as possible.

    Parameters
    ----------
    image : (X, Y, Z) or (X, Y, Z, C) array
        Background is 0.
    segmentation : (X, Y, Z) integer array, optional
        Non-zero is tumour. Without it only the brain counts.
    shape : tuple of 3 int or None
        Voxels along X, Y and Z. An axis shorter than that is taken whole. None gives
        the brain's whole box.

    Returns
    -------
    box : tuple of 3 slices

    Raises
    ------
    ValueError
        If every voxel of the image is zero, or `shape` is not three positive numbers.
    """
    if shape is None:
        return brain_box(image)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape is three positive numbers or None, not {shape}")
    brain = image.any(axis=-1) if image.ndim == 4 else image != 0
    if not brain.any():
        raise ValueError("every voxel is zero: there is no brain to crop to")
    tumour = np.zeros_like(brain) if segmentation is None else segmentation != 0
    box = []
    for axis, size in enumerate(shape):
        others = tuple(a for a in range(3) if a != axis)
        start = _window_start(tumour.sum(axis=others), brain.sum(axis=others), size)
        box.append(slice(start, min(start + size, brain.shape[axis])))
    return tuple(box)


def pad_to(volume, shape, value):
    """Pad a volume at its ends, where it is shorter than a shape.

    Parameters
    ----------
    volume : (X, Y, Z) array
        What to pad.
    shape : tuple of 3 int or None
        None changes nothing.
    value : float
        What is added.

    Returns
    -------
    padded : (X, Y, Z) array
    """
    sizes = zip(shape or volume.shape, volume.shape, strict=True)
    widths = [(0, max(0, wanted - have)) for wanted, have in sizes]
    return np.pad(volume, widths, constant_values=value)


def store_channel(volume, box, shape, method):
    """Scale a volume, and crop it as it is stored.

    Parameters
    ----------
    volume : (X, Y, Z) array
        One modality of a whole scan, raw intensities.
    box : tuple of 3 slices
        What to keep, from `crop_box`.
    shape : tuple of 3 int or None
        What a shorter crop is padded to.
    method : {"minmax", "zscore"}
        See `scale_volume`.

    Returns
    -------
    crop : (X, Y, Z) float16 array
    statistics : dict
        "mean" and "sd" of the whole scan's non-zero voxels and "zero", the value of
        background, in stored units.
    """
    offset, divisor = offset_and_divisor(volume, method)
    mean, sd = nonzero_statistics(volume)
    # Where the smallest voxel is 0, as in all skull-stripped sets, this is 0.
    zero = 0.0 if method == "zscore" else (0 - offset) / divisor
    crop = (volume[box] - np.float32(offset)) / np.float32(divisor)
    if method == "zscore":
        crop[volume[box] == 0] = 0
    crop = pad_to(crop, shape, zero).astype(np.float16)
    return crop, {"mean": (mean - offset) / divisor, "sd": sd / divisor, "zero": zero}

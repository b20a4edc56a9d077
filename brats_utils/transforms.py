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
    values = volume.ravel(order="K")  # as it lies in memory: a third of the time
    values = values[values != 0]
    if not values.size:
        return 0.0, 1.0
    mean = values.mean(dtype=np.float64)
    return float(mean), float(values.std(dtype=np.float64, mean=mean)) or 1.0


def _offset_and_divisor(volume, method):
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
    return _apply(volume, *_offset_and_divisor(volume, method), method)


def _apply(volume, offset, divisor, method):
    """Return `(volume - offset) / divisor` in float32; "zscore" leaves zeros zero."""
    scaled = volume.astype(np.float32)
    scaled -= np.float32(offset)
    scaled /= np.float32(divisor)
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


def bounding_box(mask):
    """Return the smallest box that holds all non-zero voxels.

    Parameters
    ----------
    mask : array of any rank
        Non-zero counts.

    Returns
    -------
    box : tuple of slices
        One for each axis; all empty, `slice(0, 0)`, where nothing counts.
    """
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(0, 0))
        mask = mask[(slice(None),) * axis + (box[-1],)]  # the next axis has less to do
    return tuple(box)


def brain_mask(volumes):
    """Return where any of a scan's volumes is not zero.

    Parameters
    ----------
    volumes : sequence of (X, Y, Z) array
        The modalities of one scan.

    Returns
    -------
    mask : (X, Y, Z) bool array

    Raises
    ------
    ValueError
        If every voxel is zero.
    """
    mask = volumes[0] != 0
    for volume in volumes[1:]:
        mask |= volume != 0
    if not mask.any():
        raise ValueError("every voxel is zero: there is no brain to crop to")
    return mask


def _brain(image):
    return brain_mask([image] if image.ndim == 3 else np.moveaxis(image, -1, 0))


def brain_box(image):
    """Return the smallest box that holds all non-zero voxels of a scan.

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
    return bounding_box(_brain(image))


def _plane_counts(mask):
    """Return, for each axis, how many voxels each plane across it holds."""
    columns = mask.sum(axis=2, dtype=np.int32)  # (X, Y)
    return columns.sum(axis=1), columns.sum(axis=0), mask.sum(axis=(0, 1))


def check_shape(shape):
    """Raise unless a shape is three positive numbers, or None.

    Parameters
    ----------
    shape : tuple of 3 int or None
        Voxels along X, Y and Z.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if shape is not None and (np.shape(shape) != (3,) or min(shape) < 1):
        raise ValueError(f"a shape is three positive numbers or None, not {shape!r}")


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
    check_shape(shape)
    brain = _brain(image)
    tumour = np.zeros_like(brain) if segmentation is None else segmentation != 0
    starts = map(_window_start, _plane_counts(tumour), _plane_counts(brain), shape)
    return tuple(
        slice(start, min(start + size, n))
        for start, size, n in zip(starts, shape, brain.shape, strict=True)
    )


def crop_losses(segmentation, box):
    """Return how much tumour a crop, and the tutorial recipe's window, leave out.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Of the whole scan; non-zero is tumour.
    box : tuple of 3 slices
        The crop, from `crop_box`.

    Returns
    -------
    losses : dict
        "lost_voxels" and "lost_share" of the crop, "window_lost_share" of the window;
        shares of the tumour's voxels, 0 where there is none.
    """
    tumour, held, in_window = (
        int(np.count_nonzero(part))
        for part in (segmentation, segmentation[box], segmentation[FIXED_WINDOW])
    )
    return {
        "lost_voxels": tumour - held,
        "lost_share": (tumour - held) / max(1, tumour),
        "window_lost_share": (tumour - in_window) / max(1, tumour),
    }


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
    offset, divisor = _offset_and_divisor(volume, method)
    mean, sd = nonzero_statistics(volume)
    # Where the smallest voxel is 0, as in all skull-stripped sets, this is 0.
    zero = 0.0 if method == "zscore" else (0 - offset) / divisor
    crop = pad_to(_apply(volume[box], offset, divisor, method), shape, zero)
    statistics = {"mean": (mean - offset) / divisor, "sd": sd / divisor, "zero": zero}
    return crop.astype(np.float16), statistics

"""Scale, standardise, crop, pad and check arrays of voxels."""

import itertools

import numpy as np
from scipy import ndimage

from brats_utils.files import are, check_option, whole
from brats_utils.nifti import BratsDataError

# The tutorial recipe's crop of a 240 x 240 x 155 scan, kept for comparison.
FIXED_WINDOW = (slice(56, 184), slice(56, 184), slice(13, 141))
NORMALISATION = "mean 0, SD 1 over each modality's non-zero voxels"  # see standardise
SCALINGS = ("minmax", "zscore")
LEAST_GREY_LEVELS = 64  # in a stored brain; fewer show next to nothing
MOST_SD = 200  # a voxel's distance from the mean; at most 18 in eleven real scans
MOST_OFF_BRAIN = 0.05  # share of the labelled voxels; none in eleven real scans
LEAST_BACKGROUND = 0.05  # share of voxels that are exactly 0; BraTS scans have 0.8
SURELY_BACKGROUND = 0.5  # with less, the zeros may be padding around a whole head


def nonzero_statistics(volume):
    """Return the mean and the SD of a volume's non-zero voxels.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Background is 0.

    Returns
    -------
    mean, sd : float
        Computed in float64; 0 and 1 if there are no such voxels, SD 1 if they are all
        equal.
    """
    values = volume.ravel(order="K")  # in memory order: a third of the time
    values = values[values != 0]
    if not values.size:
        return 0.0, 1.0
    mean = values.mean(dtype=np.float64)
    return float(mean), float(values.std(dtype=np.float64, mean=mean)) or 1.0


def _offset_and_divisor(volume, method):
    """Return offset and divisor of `scaled = (volume - offset) / divisor`."""
    if method == "zscore":
        return nonzero_statistics(volume)
    low, high = float(volume.min()), float(volume.max())
    if not high > low:
        raise ValueError(f"a blank volume cannot be scaled: every voxel is {low:g}")
    return low, high - low


def _scale(volume, offset, divisor, method):
    """Return `(volume - offset) / divisor` in float32; "zscore" leaves zeros zero."""
    scaled = volume.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked later
        scaled -= np.float32(offset)
        scaled /= np.float32(divisor)
    if method == "zscore":
        scaled[volume == 0] = 0
    return scaled


def scale_volume(volume, method="minmax"):
    """Scale one modality of a scan, using the same two numbers for the whole volume.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities; background 0.
    method : {"minmax", "zscore"}
        "minmax" maps the smallest voxel to 0 and the largest to 1, as scikit-learn's
        `MinMaxScaler` does with the volume as one column. "zscore" gives the non-zero
        voxels mean 0 and SD 1 and leaves the others 0.

    Returns
    -------
    scaled : (X, Y, Z) float32 array

    Raises
    ------
    ValueError
        If the volume holds NaN or infinity, if it is blank and the method is "minmax",
        or if the method is unknown.

    Examples
    --------
    >>> scale_volume(np.array([[[0, 50, 100]]])).tolist()
    [[[0.0, 0.5, 1.0]]]
    """
    check_option("method", method, SCALINGS.__contains__, f"one of {SCALINGS}")
    numbers = "an array of numbers (X, Y, Z)"
    check_option("volume", volume, lambda v: np.asarray(v, np.float32).ndim, numbers)
    volume = np.asarray(volume, np.float32)
    if not np.isfinite(volume).all():
        raise ValueError("the volume holds NaN or infinity; check the scan")
    return _scale(volume, *_offset_and_divisor(volume, method), method)


def scale_to_store(volume, box, shape, method):
    """Scale a volume as a whole, and return the crop to be stored.

    Parameters
    ----------
    volume : (X, Y, Z) array
        One modality of a whole scan, raw intensities.
    box : tuple of 3 slices
        The crop, from `crop_box`.
    shape : tuple of 3 int or None
        The shape to which a smaller crop is padded.
    method : {"minmax", "zscore"}
        See `scale_volume`.

    Returns
    -------
    stored : (X, Y, Z) float16 array
    statistics : dict
        "mean" and "sd" of the whole scan's non-zero voxels and "zero", the background
        value, all in stored units, as `standardise` needs them. "raw_mean" and "raw_sd"
        are in the file's units and serve to recognise equal images.

    Raises
    ------
    BratsDataError
        If a voxel is an extreme outlier, or the stored values are not finite or have
        too few grey levels.
    """
    offset, divisor = _offset_and_divisor(volume, method)
    mean, sd = nonzero_statistics(volume)
    # Background after scaling: 0 if it is the minimum, as in skull-stripped scans.
    zero = float(_scale(np.zeros(1), offset, divisor, method)[0])  # as in the crop
    crop = pad(_scale(volume[box], offset, divisor, method), shape, zero)
    stored = crop.astype(np.float16)
    check_outliers(volume, statistics=(mean, sd))
    check_grey_levels(volume, stored)
    statistics = {"mean": (mean - offset) / divisor, "sd": sd / divisor, "zero": zero}
    return stored, {**statistics, "raw_mean": mean, "raw_sd": sd}


def check_grey_levels(volume, stored=None, *, path=None):
    """Raise if a volume has too few grey levels when stored in half precision.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities, finite and not blank.
    stored : (X, Y, Z) float16 array, optional
        The scaled volume; computed here with "minmax" if not given.
    path : path, optional
        Its file, for the message.

    Raises
    ------
    BratsDataError
        The message names the voxel that compresses the grey scale.
    """
    if stored is None:
        stored = scale_volume(volume).astype(np.float16)
    levels = np.unique(stored[::8, ::8, ::8]).size - 1  # without the background
    if levels < LEAST_GREY_LEVELS:  # slow, so only if needed
        levels = np.unique(stored).size - 1
    if levels < LEAST_GREY_LEVELS or not np.isfinite(stored).all():
        extreme = max(volume.min(), volume.max(), key=lambda v: abs(float(v)))
        place = [int(index[0]) for index in np.nonzero(volume == extreme)]
        problem = f"scaled and stored, {levels} grey levels are left of it, at least "
        problem += f"{LEAST_GREY_LEVELS} finite ones are needed: voxel {place} holds "
        advice = "Correct that voxel, or leave this case out"
        raise BratsDataError(f"{problem}{extreme:g}", file=path, advice=advice)


def check_outliers(volume, path=None, *, statistics=None):
    """Raise if a voxel is so bright or dark that it compresses the grey scale.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities of one modality.
    path : path, optional
        Its file, for the message.
    statistics : (2,) tuple of float, optional
        Its `nonzero_statistics`, if already known.

    Raises
    ------
    BratsDataError
        The message says how many SD the voxel is from the mean.
    """
    mean, sd = statistics or nonzero_statistics(volume)
    furthest = max(float(volume.max()) - mean, mean - float(volume.min()))
    if furthest > MOST_SD * sd:  # again without background, which takes longer
        values = volume[volume != 0]
        furthest = max(float(values.max()) - mean, mean - float(values.min()))
    if furthest > MOST_SD * sd > 0:
        problem = f"a voxel lies {furthest / sd:.0f} SD from the brain's mean"
        advice = "Correct this voxel: it compresses the scale of all others"
        raise BratsDataError(problem, file=path, advice=advice)


def standardise(image, statistics=None):
    """Give each channel mean 0 and SD 1 over its non-zero voxels; zeros stay zero.

    This is what a network sees, in training and in prediction.

    Parameters
    ----------
    image : (X, Y, Z, C) array
        A whole scan with raw intensities; or any part of a stored volume, with the
        whole scan's `statistics`.
    statistics : sequence of 3 (C,) array, optional
        Mean, SD and background value of each channel. By default those of the image,
        with background 0.

    Returns
    -------
    standardised : (X, Y, Z, C) float32 array
        Background is exactly 0.
    """
    check_option("image", image, lambda i: np.ndim(i) == 4, "an array (X, Y, Z, C)")
    image = np.asarray(image)
    if statistics is None:
        pairs = [nonzero_statistics(channel) for channel in np.moveaxis(image, -1, 0)]
        statistics = (*zip(*pairs, strict=True), np.zeros(image.shape[-1]))
    expected, shape = "mean, SD and zero of each channel", (3, image.shape[-1])
    check_option("statistics", statistics, lambda s: np.shape(s) == shape, expected)
    result = np.empty(image.shape, np.float32)
    for channel, (mean, sd, zero) in enumerate(np.transpose(statistics)):
        values = image[..., channel].astype(np.float32)
        zero = np.float32(zero).astype(image.dtype)  # rounded like the image
        brain = values != np.float32(zero)
        values = (values - np.float32(mean)) / np.float32(sd)
        result[..., channel] = values * brain
    return result


def bounding_box(mask):
    """Return the smallest box that holds all non-zero voxels.

    Parameters
    ----------
    mask : array of any rank
        Non-zero voxels count.

    Returns
    -------
    box : tuple of slices
        One for each axis; all empty, `slice(0, 0)`, if every voxel is zero.
    """
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(0, 0))
    return tuple(box)


def bounding_boxes(masks):
    """Return the box of each mask, or of their union if they all have the same shape.

    Parameters
    ----------
    masks : list of bool array

    Returns
    -------
    boxes : list of tuple of slices
        One for each mask; the whole grid if no voxel is set.
    """
    if len({mask.shape for mask in masks}) == 1:
        masks = [np.logical_or.reduce(masks)] * len(masks)
    return [bounding_box(m if m.any() else np.ones_like(m)) for m in masks]


def best_slice(segmentation, axis=2):
    """Return the index of the slice with the most tumour.

    Parameters
    ----------
    segmentation : (X, Y, Z) array
        Non-zero is tumour.
    axis : int
        The axis perpendicular to the slices: 2 is axial, 1 coronal, 0 sagittal.

    Returns
    -------
    index : int
        The first one if several are equal; the middle slice where there is no tumour.

    Examples
    --------
    >>> segmentation = np.zeros((4, 4, 9))
    >>> segmentation[1:3, 1, 6] = 2
    >>> best_slice(segmentation)
    6
    """
    others = tuple(a for a in range(3) if a != axis)
    counts = np.count_nonzero(segmentation, axis=others)
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def surface_quads(mask, rounds=3):
    """Return the smoothed surface of a mask as quadrilaterals, for plotting in 3D.

    It consists of the faces between voxels inside and outside. Each smoothing round
    moves every corner to the mean centre of the faces around it.

    Parameters
    ----------
    mask : (X, Y, Z) bool array
    rounds : int
        Number of smoothing rounds; 0 keeps the voxel faces.

    Returns
    -------
    quads : (n, 4, 3) float array
        In voxels: voxel 0 extends from 0 to 1. Seen from outside, the corners are in
        counterclockwise order.

    Examples
    --------
    >>> surface_quads(np.ones((2, 1, 1), bool), rounds=0).shape
    (10, 4, 3)
    """
    padded = np.pad(np.asarray(mask, np.int8), 1)
    steps, quads = np.eye(3, dtype=int), []
    for axis in range(3):
        change = np.diff(padded, axis=axis)
        along, second, third = np.roll(steps, -axis, axis=0)
        for sign, corners in ((-1, (second, third)), (1, (third, second))):
            start = np.argwhere(change == sign) + along - 1  # the padding is 1 voxel
            first, last = corners
            round_the_face = [start, start + first, start + first + last, start + last]
            quads.append(np.stack(round_the_face, axis=1))
    quads = np.concatenate(quads)
    points, index = np.unique(quads.reshape(-1, 3), axis=0, return_inverse=True)
    index, points = index.reshape(-1, 4), points.astype(float)
    for _ in range(rounds):
        sums = np.zeros_like(points)
        np.add.at(sums, index, points[index].mean(axis=1, keepdims=True))
        points = sums / np.bincount(index.ravel(), minlength=len(points))[:, None]
    return points[index]


def brain_mask(volumes):
    """Return the mask of voxels that are non-zero in any modality of a scan.

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


def background_problem(volume):
    """Describe what is wrong with a volume whose background is not exactly 0.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities of one modality.

    Returns
    -------
    problem : str
        Empty if at least 5 % of the voxels are exactly 0, and neither the values near 0
        nor any other value make up 5 %. If at least half are 0, other values may.
    """
    share = 1 - np.count_nonzero(volume) / volume.size
    sample = np.asarray(volume[::3, ::3, ::3], np.float64).ravel()
    values, counts = np.unique(sample[sample != 0], return_counts=True)
    small = 0.02 * np.percentile(abs(sample), 99)
    near_zero = np.mean((abs(sample) < small) & (sample != 0))
    if np.mean(sample < -small) > LEAST_BACKGROUND:  # scaled so that 0 is mid-brain
        near_zero = 0.0
    # If half of the scan is 0, a frequent value is not the background's.
    plateau = counts.max() / sample.size if share < SURELY_BACKGROUND else 0.0
    if share >= LEAST_BACKGROUND and max(plateau, near_zero) < LEAST_BACKGROUND:
        return ""
    todo = "set all voxels outside the brain to exactly 0 (apply the brain mask)"
    if plateau > LEAST_BACKGROUND:
        found = f"the background is {values[counts.argmax()]:g}: it was scaled; {todo}"
    # A head fills more of its scan than a brain does.
    elif near_zero > 0.4 or share >= SURELY_BACKGROUND:
        found = "noise around the brain: it was resampled or filtered "
        found += f"({near_zero:.1%} are near 0); {todo}"
    else:
        found = "not skull-stripped: remove the skull first, for example with HD-BET"
    return f"{share:.1%} of its voxels are exactly 0, in BraTS scans 80 %: {found}"


def find_doubts(volumes, brain, segmentation=None):
    """Describe what is suspicious about the volumes of a scan, taken together.

    Parameters
    ----------
    volumes : sequence of (X, Y, Z) array
        Its modalities, raw intensities.
    brain : (X, Y, Z) bool array
        Their `brain_mask`.
    segmentation : (X, Y, Z) integer array, optional
        Its label map.

    Returns
    -------
    doubts : list of str
        Empty if the background is 0, no two modalities are equal, and the labels lie
        in the brain.
    """
    found = [problem for problem in map(background_problem, volumes) if problem][:1]
    pairs = itertools.combinations(volumes, 2)
    if any(a is not b and np.array_equal(a, b) for a, b in pairs):
        found.append("two of its modalities are the same image")
    if segmentation is not None:
        off = np.count_nonzero(segmentation * ~brain)
        if off > MOST_OFF_BRAIN * np.count_nonzero(segmentation):
            found.append(f"{off} labelled voxels lie outside the brain")
    return found


@np.errstate(over="ignore")  # float64 values may exceed the range of float32
def check_image(volume, path, *, thorough=False):
    """Raise if a scan's modality cannot be used.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Raw intensities.
    path : path
        Its file, for the message.
    thorough : bool
        Also check for outliers, too few grey levels and a background that is not 0.

    Raises
    ------
    BratsDataError
        If it is blank, holds NaN or infinity, or fails a thorough check.
    """
    problem, low, high = "", volume.min(), volume.max()
    if low == high:
        problem = f"blank modality: every voxel is {low:g}"
    elif not np.isfinite(np.float32([low, high])).all():
        bad = np.argwhere(~np.isfinite(volume.astype(np.float32)))
        problem = f"{len(bad)} voxels are NaN or infinite, first {bad[0].tolist()}"
    elif thorough:
        check_grey_levels(volume, path=path)
        check_outliers(volume, path)
        problem = background_problem(volume)
    if problem:
        advice = "Correct the scan, or leave this case out"
        raise BratsDataError(problem, file=path, advice=advice)


def dice(first, second):
    """Return the Dice coefficient of two masks, 2 |A ∩ B| / (|A| + |B|).

    Parameters
    ----------
    first, second : bool array
        Masks of the same shape.

    Returns
    -------
    dice : float
        1.0 if both masks are empty.
    """
    size = np.count_nonzero(first) + np.count_nonzero(second)
    return float(2 * np.count_nonzero(first & second) / size) if size else 1.0


def drop_islands(segmentation, share):
    """Remove the components of a label map that are small compared with its largest.

    Parameters
    ----------
    segmentation : integer array
        Changed in place. Non-zero voxels that share a corner are connected.
    share : float
        Smallest size to keep, relative to the largest component.
    """
    corners = np.ones((3,) * segmentation.ndim)
    islands, n_islands = ndimage.label(segmentation, corners)
    sizes = np.bincount(islands.ravel(), minlength=2)[1:]
    is_kept = np.r_[True, sizes >= share * sizes.max()]  # by component; 0 is background
    segmentation[~is_kept[islands]] = 0


def check_shape(shape, name="crop_shape"):
    """Raise unless a shape is three whole numbers, or None.

    Parameters
    ----------
    shape : sequence of 3 int or None
        Voxels along X, Y and Z.
    name : str
        Name of the option, for the message.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if shape is not None:
        expected = "three whole numbers of at least 1, or None"
        check_option(name, shape, are(3, whole(1)[0]), expected)


def _plane_counts(mask):
    """Return, for each axis, the voxel counts of the planes perpendicular to it."""
    columns = mask.sum(axis=2, dtype=np.int32)  # (X, Y)
    return columns.sum(axis=1), columns.sum(axis=0), mask.sum(axis=(0, 1))


def _window(tumour, brain, size):
    """Return the slice of length `size` with the most tumour; brain decides ties.

    `tumour` and `brain` count the voxels of each plane along one axis.
    """
    size = min(size, len(brain))
    starts = np.arange(len(brain) - size + 1)
    for counts in (tumour, brain):
        sums = np.convolve(counts, np.ones(size, int), "valid")[starts]
        starts = starts[sums == sums.max()]
    start = int(starts[len(starts) // 2])  # the middle one if several are equal
    return slice(start, start + size)


def crop_box(image, segmentation=None, shape=(128, 128, 128)):
    """Choose the crop: all of the tumour if it fits, then as much brain as possible.

    Parameters
    ----------
    image : (X, Y, Z) or (X, Y, Z, C) array
        Background is 0.
    segmentation : (X, Y, Z) integer array, optional
        Non-zero is tumour. Without it only the brain counts.
    shape : tuple of 3 int or None
        Voxels along X, Y and Z. A shorter axis is taken whole. None gives the smallest
        box that holds the brain.

    Returns
    -------
    box : tuple of 3 slices

    Raises
    ------
    ValueError
        If every voxel of the image is zero, or `shape` is not three positive numbers.
    """
    check_shape(shape)
    spatial = "an array (X, Y, Z) or (X, Y, Z, C)"
    check_option("image", image, lambda i: np.ndim(i) in (3, 4), spatial)
    image = np.asarray(image)
    segmentation = None if segmentation is None else np.asarray(segmentation)
    ok = segmentation is None or segmentation.shape == image.shape[:3]
    expected = f"None, or an array of the image's shape {image.shape[:3]}"
    check_option("segmentation", segmentation, lambda _: ok, expected)
    brain = brain_mask([image] if image.ndim == 3 else np.moveaxis(image, -1, 0))
    if shape is None:
        return bounding_box(brain)
    tumour = np.zeros_like(brain) if segmentation is None else segmentation != 0
    return tuple(map(_window, _plane_counts(tumour), _plane_counts(brain), shape))


def pad(volume, shape, value=0):
    """Pad a volume at the end of each axis that is shorter than in `shape`.

    Parameters
    ----------
    volume : (X, Y, Z) or (X, Y, Z, C) array
    shape : sequence of 3 int or None
        None changes nothing.
    value : float
        The value of the new voxels.

    Returns
    -------
    padded : array
        The volume itself if no padding is needed.
    """
    sizes = zip(shape or (), volume.shape, strict=False)  # channels are not padded
    widths = [(0, max(0, wanted - have)) for wanted, have in sizes]
    if not any(after for _, after in widths):
        return volume
    widths += [(0, 0)] * (volume.ndim - 3)
    return np.pad(volume, widths, constant_values=value)

"""Slices of volumes in grey, with boxes and coloured classes laid over them.

Volumes are expected in LPS order, as BraTS stores them and `to_lps` makes them: the
patient's right is then on the picture's left, the front or the head on top.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from brats_utils.labels import COLOURS, LABELS, encode_labels
from brats_utils.transforms import bounding_box

PLANES = ("sagittal", "coronal", "axial")
PANEL_WIDTH_INCHES = 2.6
MARGIN_VOXELS = 4
LABEL_COLOURS = {LABELS[value]: colour for value, colour in COLOURS.items()}


def best_slice(segmentation, axis=2):
    """Return the index of the slice that holds most tumour.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Non-zero is tumour.
    axis : int
        Across which axis to slice: 2 is axial, 1 coronal, 0 sagittal.

    Returns
    -------
    index : int
        The first of equal ones; the middle slice where there is no tumour.

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


def _upright(plane, axis):
    """Turn a plane across `axis` into (rows, columns) with the front or head on top."""
    return plane.T if axis == 2 else plane.T[::-1]


def take_slice(volume, index, axis):
    """Return one slice of a volume as it is drawn.

    Parameters
    ----------
    volume : (X, Y, Z) array
        In LPS order.
    index, axis : int
        Which slice, across which axis.

    Returns
    -------
    plane : (rows, columns) array
        The front or the head on top.
    """
    return _upright(np.take(volume, index, axis=axis), axis)


def _grey_window(volume):
    """Return the 1st and 99th percentile of the non-zero voxels; (0, 1) if none."""
    some = np.asarray(volume[::2, ::2, ::2], np.float32)
    some = some[some != 0]
    if not some.size:
        return 0.0, 1.0
    low, high = np.percentile(some, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _extent(plane, margin):
    """Return the rows and columns, as slices, that hold all of a mask's pixels."""
    box = bounding_box(plane if plane.any() else np.ones_like(plane))
    return tuple(
        slice(max(0, part.start - margin), min(n, part.stop + margin))
        for part, n in zip(box, plane.shape, strict=True)
    )


def find_frames(volumes, boxes, axis):
    """Return the part of each picture that is worth showing: where it is not empty.

    Parameters
    ----------
    volumes : sequence of (X, Y, Z) array
        Those of one shape share one frame.
    boxes : sequence of tuple of 3 slices or None
        What else must be seen of each volume.
    axis : int
        Across which axis they are sliced.

    Returns
    -------
    frames : list of (slice, slice)
        Rows and columns.
    """
    filled = {}
    for volume, box in zip(volumes, boxes, strict=True):
        plane = np.any(volume != 0, axis=axis)
        if box is not None:
            plane[tuple(np.delete(np.array(box, object), axis))] = True
        filled[volume.shape] = filled.get(volume.shape, False) | plane
    return [_extent(_upright(filled[v.shape], axis), MARGIN_VOXELS) for v in volumes]


def make_row(axes, n, frame, axis, spacing_mm):
    """Return a row of axes: those given, or new ones in the proportions of a frame.

    Parameters
    ----------
    axes : sequence of matplotlib axes or None
        None makes a new figure.
    n : int
        How many are needed.
    frame : (slice, slice)
        Rows and columns of a picture, as `find_frames` returns them.
    axis : int
        Across which axis it is sliced.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    axes : array of n matplotlib axes

    Raises
    ------
    ValueError
        If fewer are given.
    """
    if axes is None:
        across, up = (spacing_mm[a] for a in range(3) if a != axis)
        rows, columns = (part.stop - part.start for part in frame)
        height = PANEL_WIDTH_INCHES * (rows * up) / (columns * across) + 0.6
        size = (n * PANEL_WIDTH_INCHES, height)
        axes = plt.subplots(1, n, figsize=size, squeeze=False, layout="constrained")[1]
    axes = np.ravel(axes)
    if len(axes) < n:
        raise ValueError(f"{n} pictures need as many axes, got {len(axes)}")
    return axes[:n]


def _show_grey(axes, volume, index, axis, spacing_mm, frame):
    """Draw one slice in grey, black where the volume is exactly 0."""
    low, high = _grey_window(volume)
    picture = take_slice(volume, index, axis).astype(np.float32)
    # Standardised scans have their background, 0, in the middle of the brain's range.
    picture = np.where(picture == 0, low, picture)
    across, up = (spacing_mm[a] for a in range(3) if a != axis)
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=up / across)
    rows, columns = frame
    axes.set_xlim(columns.start - 0.5, columns.stop - 0.5)
    axes.set_ylim(rows.stop - 0.5, rows.start - 0.5)
    axes.set_axis_off()


def show_classes(axes, classes, colours, alpha):
    """Fill the pixels of each class with its colour; those of class 0 stay clear.

    Parameters
    ----------
    axes : matplotlib axes
        That show a slice already.
    classes : (rows, columns) integer array
        From 0 to the number of colours.
    colours : dict of str to str
        Name and colour of class 1, 2 and so on.
    alpha : float
        Opacity, 0 to 1.
    """
    axes.imshow(
        np.ma.masked_equal(classes, 0),
        cmap=ListedColormap(list(colours.values())),
        vmin=1,
        vmax=len(colours),
        alpha=alpha,
        interpolation="nearest",
        aspect=axes.get_aspect(),
    )


def add_legend(figure, colours):
    """Name colours below the pictures, unless the figure has a legend already.

    Parameters
    ----------
    figure : matplotlib figure
    colours : dict of str to str
        Name to colour.
    """
    if not figure.legends:
        patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
        style = {"ncols": len(colours), "frameon": False, "fontsize": "small"}
        figure.legend(handles=patches, loc="outside lower center", **style)


def _mark_place(axes, index, axis):
    """Write the slice's index and the patient's sides into a picture."""
    style = {"color": "0.7", "fontsize": "small", "transform": axes.transAxes}
    axes.text(0.02, 0.02, f"{PLANES[axis]} {index}", va="bottom", **style)
    left, right = ("front", "back") if axis == 0 else ("R", "L")
    axes.text(0.02, 0.98, left, va="top", **style)
    axes.text(0.98, 0.98, right, va="top", ha="right", **style)


def _draw_box(axes, box, shape, axis):
    """Draw the outline of a box of 3 slices, in a slice of a volume of `shape`."""
    inside = np.zeros(shape, bool)
    inside[box] = True
    rows, columns = _extent(_upright(inside.any(axis=axis), axis), 0)
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    outline = Rectangle(corner, *size, fill=False, edgecolor="#56B4E9", linewidth=1.5)
    axes.add_patch(outline)


def plot_slices(
    volumes,
    titles=None,
    *,
    segmentations=None,
    boxes=None,
    index=None,
    axis=2,
    spacing_mm=(1, 1, 1),
    axes=None,
):
    """Show the same slice of several volumes in a row.

    Parameters
    ----------
    volumes : sequence of (X, Y, Z) array
        In LPS order; they may differ in shape. Each is drawn in grey between the 1st
        and 99th percentile of its own non-zero voxels.
    titles : sequence of str, optional
        One for each volume.
    segmentations : sequence of (X, Y, Z) integer array or None, optional
        A BraTS label map (values 0, 1, 2, 4) to lay over each volume.
    boxes : sequence of tuple of 3 slices or None, optional
        A box to outline in each volume, as `crop_box` returns it.
    index : int or sequence of int, optional
        Which slice, or one for each volume. The one with most tumour of the first
        label map by default, else the middle one.
    axis : int
        Across which axis to slice: 2 is axial, 1 coronal, 0 sagittal.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.
    axes : sequence of matplotlib axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    axes : array of matplotlib axes

    Raises
    ------
    ValueError
        If there are fewer axes, or a label map holds a value that is no BraTS label.
    """
    n = len(volumes)
    titles = titles or [""] * n
    segmentations = segmentations or [None] * n
    boxes = boxes or [None] * n
    frames = find_frames(volumes, boxes, axis)
    axes = make_row(axes, n, frames[0], axis, spacing_mm)
    labelled = [s for s in segmentations if s is not None]
    if index is None:
        index = best_slice(labelled[0] if labelled else np.zeros_like(volumes[0]), axis)
    indices = np.broadcast_to(index, n)
    for i, each in enumerate(axes):
        _show_grey(each, volumes[i], indices[i], axis, spacing_mm, frames[i])
        if segmentations[i] is not None:
            classes = encode_labels(take_slice(segmentations[i], indices[i], axis))
            show_classes(each, classes, LABEL_COLOURS, 0.5)
        if boxes[i] is not None:
            _draw_box(each, boxes[i], volumes[i].shape, axis)
        each.set_title(titles[i], fontsize="medium")
        if i == 0 or indices[i] != indices[0]:
            _mark_place(each, indices[i], axis)
    if labelled:
        add_legend(axes[0].figure, LABEL_COLOURS)
    return axes

"""Pictures: slices with overlays, predictions with their errors, training curves.

Volumes are expected in LPS order, as BraTS stores them and `to_lps` makes them: the
patient's right is then on the picture's left, the front or the head on top.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from brats_utils.cases import ALL_MODALITIES, MODALITIES
from brats_utils.labels import COLOURS, LABELS, REGION_NAMES, encode_labels
from brats_utils.transforms import bounding_box

PLANES = ("sagittal", "coronal", "axial")
PANEL_WIDTH_INCHES = 2.6
MARGIN_VOXELS = 4
# More of Okabe and Ito's palette, so that errors are not taken for labels.
ERRORS = {"missed": "#CC79A7", "invented": "#009E73", "wrong label": "#E69F00"}
LABEL_COLOURS = {LABELS[value]: colour for value, colour in COLOURS.items()}
REGION_COLOURS = {"WT": "#009E73", "TC": COLOURS[1], "ET": COLOURS[4]}


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


def _picture(volume, index, axis):
    """Return one slice of a volume as (rows, columns), upright."""
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


def _frames(volumes, boxes, axis):
    """Return the rows and columns of each picture: what is not empty, and its box.

    Volumes of one shape share one frame.
    """
    filled = {}
    for volume, box in zip(volumes, boxes, strict=True):
        plane = np.any(volume != 0, axis=axis)
        if box is not None:
            plane[tuple(np.delete(np.array(box, object), axis))] = True
        filled[volume.shape] = filled.get(volume.shape, False) | plane
    return [_extent(_upright(filled[v.shape], axis), MARGIN_VOXELS) for v in volumes]


def _row_of_axes(axes, n, frame, axis, spacing_mm):
    """Return the axes given, or new ones in the proportions of a frame."""
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
    picture = _picture(volume, index, axis).astype(np.float32)
    # Standardised scans have their background, 0, in the middle of the brain's range.
    picture = np.where(picture == 0, low, picture)
    across, up = (spacing_mm[a] for a in range(3) if a != axis)
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=up / across)
    rows, columns = frame
    axes.set_xlim(columns.start - 0.5, columns.stop - 0.5)
    axes.set_ylim(rows.stop - 0.5, rows.start - 0.5)
    axes.set_axis_off()


def _show_classes(axes, classes, colours, alpha):
    """Fill the pixels of class 1, 2, ... with `colours`; class 0 stays clear."""
    axes.imshow(
        np.ma.masked_equal(classes, 0),
        cmap=ListedColormap(list(colours.values())),
        vmin=1,
        vmax=len(colours),
        alpha=alpha,
        interpolation="nearest",
        aspect=axes.get_aspect(),
    )


def _add_legend(figure, colours):
    """Name colours below the pictures, unless the figure has a legend already."""
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
    frames = _frames(volumes, boxes, axis)
    axes = _row_of_axes(axes, n, frames[0], axis, spacing_mm)
    labelled = [s for s in segmentations if s is not None]
    if index is None:
        index = best_slice(labelled[0] if labelled else np.zeros_like(volumes[0]), axis)
    indices = np.broadcast_to(index, n)
    for i, each in enumerate(axes):
        _show_grey(each, volumes[i], indices[i], axis, spacing_mm, frames[i])
        if segmentations[i] is not None:
            classes = encode_labels(_picture(segmentations[i], indices[i], axis))
            _show_classes(each, classes, LABEL_COLOURS, 0.5)
        if boxes[i] is not None:
            _draw_box(each, boxes[i], volumes[i].shape, axis)
        each.set_title(titles[i], fontsize="medium")
        if i == 0 or indices[i] != indices[0]:
            _mark_place(each, indices[i], axis)
    if labelled:
        _add_legend(axes[0].figure, LABEL_COLOURS)
    return axes


def _channels(image):
    """Return the channels of an image (X, Y, Z, C) or (X, Y, Z), and their names."""
    image = image[..., None] if image.ndim == 3 else image
    known = {len(MODALITIES): MODALITIES, len(ALL_MODALITIES): ALL_MODALITIES}
    names = known.get(image.shape[-1], [f"channel {c}" for c in range(image.shape[-1])])
    return list(np.moveaxis(image, -1, 0)), [name.upper() for name in names]


def plot_case(image, segmentation=None, *, titles=None, **view):
    """Show one slice of each modality, with the tumour's labels laid over it.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order; raw, scaled or standardised.
    segmentation : (X, Y, Z) integer array, optional
        BraTS label map, values 0, 1, 2 and 4.
    titles : sequence of str, optional
        Names of the channels. Three are taken for FLAIR, T1CE, T2, and four for
        FLAIR, T1, T1CE, T2.
    **view
        `index`, `axis`, `spacing_mm` and `axes`, as in `plot_slices`.

    Returns
    -------
    axes : array of matplotlib axes
        One for each channel.
    """
    channels, names = _channels(image)
    labels = [segmentation] * len(channels)
    return plot_slices(channels, titles or names, segmentations=labels, **view)


def _error_classes(truth, prediction):
    """Return 0 where two label maps agree, else the number of the kind of error."""
    kinds = [truth == prediction, prediction == 0, truth == 0]
    return np.select(kinds, [0, 1, 2], default=3)


def plot_prediction(
    image,
    truth,
    prediction,
    *,
    channel=0,
    index=None,
    axis=2,
    spacing_mm=(1, 1, 1),
    axes=None,
):
    """Show a scan, its true labels, the predicted ones, and where the two differ.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    truth, prediction : (X, Y, Z) integer array
        BraTS label maps, values 0, 1, 2 and 4.
    channel : int
        Which modality to show; the first, FLAIR, by default.
    index : int, optional
        Which slice. The one with most true tumour by default, or with most predicted
        tumour where there is none.
    axis, spacing_mm
        As in `plot_slices`.
    axes : sequence of 4 matplotlib axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    axes : array of 4 matplotlib axes
        Errors are tumour that was missed, invented, or given a wrong label.
    """
    channels, names = _channels(image)
    scan, truth, prediction = channels[channel], *map(np.asarray, (truth, prediction))
    if index is None:
        index = best_slice(truth if truth.any() else prediction, axis)
    frame = _frames([scan], [None], axis)[0]
    axes = _row_of_axes(axes, 4, frame, axis, spacing_mm)
    # Before plot_slices adds the shorter one.
    _add_legend(axes[0].figure, LABEL_COLOURS | ERRORS)
    plot_slices(
        [scan] * 4,
        [names[channel], "truth", "prediction", "errors"],
        segmentations=[None, truth, prediction, None],
        index=index,
        axis=axis,
        spacing_mm=spacing_mm,
        axes=axes,
    )
    truth, prediction = (_picture(x, index, axis) for x in (truth, prediction))
    _show_classes(axes[3], _error_classes(truth, prediction), ERRORS, 0.85)
    return axes


def plot_uncertainty(image, prediction, spread, *, channel=0, index=None, axis=2):
    """Show a scan with its predicted labels, and where they are not to be trusted.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    prediction : (X, Y, Z) integer array
        BraTS label map, values 0, 1, 2 and 4.
    spread : (X, Y, Z) float array
        Standard deviation of the probabilities, as `predict_case` returns it: up to
        0.5, the same colours in every figure.
    channel : int
        Which modality to show; the first, FLAIR, by default.
    index, axis
        As in `plot_slices`.

    Returns
    -------
    axes : array of 2 matplotlib axes
    """
    channels, names = _channels(image)
    if index is None:
        index = best_slice(prediction, axis)
    axes = plot_slices(
        [channels[channel]] * 2,
        [f"{names[channel]}, prediction", "standard deviation"],
        segmentations=[prediction, None],
        index=index,
        axis=axis,
    )
    shown = np.ma.masked_less(_picture(spread, index, axis), 0.05)
    options = {"aspect": axes[1].get_aspect(), "interpolation": "nearest"}
    picture = axes[1].imshow(shown, cmap="plasma", vmin=0, vmax=0.5, **options)
    axes[1].figure.colorbar(picture, ax=axes[1], shrink=0.7)
    return axes


def plot_history(history, axes=None):
    """Show how loss and Dice went from epoch to epoch.

    Parameters
    ----------
    history : pandas.DataFrame
        What `train` returns: columns `loss`, `val_loss`, `dice_WT`, `val_dice_WT` and
        so on, and `epoch`; those it lacks are left out, as are epochs without a value.
    axes : sequence of 2 matplotlib axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    axes : array of 2 matplotlib axes
        Loss and Dice. Training is dashed, validation solid.
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    axes = np.ravel(axes)
    lines = [(axes[0], "loss", "", "0.2")] + [
        (axes[1], f"dice_{region}", f"{name}, ", REGION_COLOURS[region])
        for region, name in REGION_NAMES.items()
    ]
    epochs = history.get("epoch", history.index.to_series())
    sides = (("", "training", ".--"), ("val_", "validation", ".-"))
    for each, column, name, colour in lines:
        for prefix, side, style in sides:
            if prefix + column in history:
                values = history[prefix + column].dropna()
                at = epochs[values.index]
                each.plot(at, values, style, c=colour, ms=4, label=f"{name}{side}")
    for each, title in zip(axes, ("Loss", "Dice per region"), strict=True):
        each.set_title(title, fontsize="medium")
        each.set_xlabel("epoch")
        each.xaxis.get_major_locator().set_params(integer=True)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False, fontsize="small")
    axes[1].set_ylim(0, 1)
    return axes


def browse(image, segmentation=None, prediction=None, *, axis=2, spacing_mm=(1, 1, 1)):
    """Show a case as a still picture and, in a live notebook, with a slider beside it.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    segmentation : (X, Y, Z) integer array, optional
        True BraTS labels.
    prediction : (X, Y, Z) integer array, optional
        Predicted BraTS labels. With both, the errors are shown too.
    axis, spacing_mm
        As in `plot_slices`.
    """
    from IPython.display import display

    labels = prediction if segmentation is None else segmentation
    if segmentation is None or prediction is None:
        draw, arrays = plot_case, (image, labels)
    else:
        draw, arrays = plot_prediction, (image, segmentation, prediction)

    def picture(index):
        figure = draw(*arrays, index=index, axis=axis, spacing_mm=spacing_mm)[0].figure
        plt.close(figure)
        return figure

    start = best_slice(np.zeros(image.shape[:3]) if labels is None else labels, axis)
    display(picture(start))
    try:
        from ipywidgets import Image, IntSlider, VBox
    except ImportError:
        return

    def png(index):
        with io.BytesIO() as file:
            picture(index).savefig(file, format="png")
            return file.getvalue()

    # A picture that is exchanged, not an Output widget: those stall headless runners.
    shown = Image(value=png(start), format="png")
    slider = IntSlider(start, 0, image.shape[axis] - 1, continuous_update=False)
    slider.description = PLANES[axis]
    slider.observe(lambda change: setattr(shown, "value", png(change["new"])), "value")
    display(VBox([slider, shown]))

"""Pictures of cases, predictions and their errors, of training; a slice browser.

Volumes are expected in LPS order, as BraTS stores them and `to_lps` makes them: the
patient's right is then on the picture's left, the front or the head on top.
"""

import importlib.util
import io

import matplotlib.pyplot as plt
import numpy as np

from brats_utils.cases import ALL_MODALITIES, MODALITIES
from brats_utils.labels import COLOURS, REGION_NAMES, encode_labels
from brats_utils.slices import (
    LABEL_COLOURS,
    PLANES,
    add_legend,
    best_slice,
    find_frames,
    make_row,
    plot_slices,
    show_classes,
    take_slice,
)

# More of Okabe and Ito's palette, so that errors are not taken for labels.
ERRORS = {"missed": "#CC79A7", "invented": "#009E73", "wrong label": "#E69F00"}
REGION_COLOURS = {"WT": "#009E73", "TC": COLOURS[1], "ET": COLOURS[4]}
LEAST_SPREAD = 0.05  # what is surer than this is not coloured


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
    return np.select(kinds, np.arange(3, dtype=np.uint8), default=np.uint8(3))


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
    frame = find_frames([scan], [None], axis)[0]
    axes = make_row(axes, 4, frame, axis, spacing_mm)
    # Before plot_slices adds the shorter one.
    add_legend(axes[0].figure, LABEL_COLOURS | ERRORS)
    plot_slices(
        [scan] * 4,
        [names[channel], "truth", "prediction", "errors"],
        segmentations=[None, truth, prediction, None],
        index=index,
        axis=axis,
        spacing_mm=spacing_mm,
        axes=axes,
    )
    truth, prediction = (take_slice(x, index, axis) for x in (truth, prediction))
    show_classes(axes[3], _error_classes(truth, prediction), ERRORS, 0.85)
    return axes


def _show_layer(axes, plane, colours, alpha):
    """Lay a slice of classes over a scan or, without colours, one of SDs."""
    if colours:
        return show_classes(axes, plane, colours, alpha)
    return axes.imshow(
        np.ma.masked_less(plane, LEAST_SPREAD),
        cmap="plasma",
        vmin=0,
        vmax=0.5,
        alpha=alpha,
        interpolation="nearest",
        aspect=axes.get_aspect(),
    )


def plot_uncertainty(
    image, prediction, spread, *, channel=0, index=None, axis=2, spacing_mm=(1, 1, 1)
):
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
    index, axis, spacing_mm
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
        spacing_mm=spacing_mm,
    )
    picture = _show_layer(axes[1], take_slice(spread, index, axis), {}, 1.0)
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


def _layers(segmentation, prediction, spread):
    """Return what can be laid over a scan: {name: (volume, colours)}."""
    layers = {"nothing": (None, {})}
    if spread is not None:
        layers["uncertainty"] = spread, {}
    if segmentation is not None and prediction is not None:
        layers["errors"] = _error_classes(segmentation, prediction), ERRORS
    for name, labels in (("truth", segmentation), ("prediction", prediction)):
        if labels is not None:
            layers[name] = encode_labels(labels), LABEL_COLOURS
    return layers


def _still(image, segmentation, prediction, spread=None, **view):
    """Return a figure of one slice; it needs no widgets."""
    labels = prediction if segmentation is None else segmentation
    if segmentation is not None and prediction is not None:
        axes = plot_prediction(image, segmentation, prediction, **view)
    elif prediction is not None and spread is not None:
        axes = plot_uncertainty(image, labels, spread, **view)
    else:
        axes = plot_case(image, labels, **view)
    plt.close(axes[0].figure)
    return axes[0].figure


def _png(channel, layer, colours, opacity, where, view):
    """Return the picture of one slice, with a layer over it, as PNG."""
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    plot_slices([channel], axes=[axes], **where, **view)
    if layer is not None:
        _show_layer(axes, take_slice(layer, **where), colours, opacity)
    if colours:
        add_legend(figure, colours)
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        plt.close(figure)
        return file.getvalue()


def _viewer(image, segmentation, prediction, spread=None, *, axis=2, **view):
    """Return the widgets that walk through a case: a picture, what it shows beside."""
    import ipywidgets as widgets

    channels, names = _channels(image)
    layers = _layers(segmentation, prediction, spread)
    tumour = prediction if segmentation is None else segmentation
    tumour = np.zeros(image.shape[:3], np.uint8) if tumour is None else tumour
    late = {"continuous_update": False}  # a picture when it is let go, none before
    plane = widgets.ToggleButtons(options=[(PLANES[a], a) for a in (2, 1, 0)])
    index = widgets.IntSlider(description="slice", max=max(image.shape), **late)
    jump = widgets.Button(description="most tumour")
    scan = widgets.Dropdown(description="scan", options=names)
    overlay = widgets.Dropdown(description="overlay", options=list(layers))
    opacity = widgets.FloatSlider(0.5, min=0, max=1, step=0.1, **late)
    opacity.description = "opacity"
    # A picture that is exchanged, not an Output widget: those stall headless runners.
    shown = widgets.Image(format="png")

    def draw(_):
        layer = layers[overlay.value]
        where = {"index": index.value, "axis": plane.value}
        shown.value = _png(channels[scan.index], *layer, opacity.value, where, view)

    def jump_to_tumour(_):
        index.max = image.shape[plane.value] - 1
        index.value = best_slice(tumour, plane.value)

    plane.value, overlay.value = axis, list(layers)[-1]
    jump_to_tumour(None)
    draw(None)
    jump.on_click(jump_to_tumour)
    plane.observe(jump_to_tumour, "value")
    for control in (plane, index, scan, overlay, opacity):
        control.observe(draw, "value")
    controls = widgets.VBox([plane, index, jump, scan, overlay, opacity])
    return widgets.HBox([shown, controls])


def _has_widgets():
    """Say whether ipywidgets is installed."""
    return importlib.util.find_spec("ipywidgets") is not None


def _display_live(widget):
    """Show widgets; in a saved notebook, where none can run, a line in their place."""
    from IPython.display import display

    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    text = "In a running notebook a slice browser stands here."
    bundle = {"application/vnd.jupyter.widget-view+json": view, "text/plain": text}
    display(bundle, raw=True)


def browse(
    image,
    segmentation=None,
    prediction=None,
    spread=None,
    *,
    axis=2,
    spacing_mm=(1, 1, 1),
):
    """Show a case as a still picture and, in a live notebook, a browser below it.

    The browser has a slider over the slices of each plane, a button to the slice with
    most tumour, the modalities, and what to lay over them, how opaque.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    segmentation : (X, Y, Z) integer array, optional
        True BraTS labels.
    prediction : (X, Y, Z) integer array, optional
        Predicted BraTS labels. With both, the errors are shown too.
    spread : (X, Y, Z) float array, optional
        Standard deviation of the probabilities, as `predict_case` returns it; the
        still picture is then `plot_uncertainty`'s, unless there are errors to show.
    axis, spacing_mm
        As in `plot_slices`; the plane with which to begin.
    """
    from IPython.display import display

    view = {"axis": axis, "spacing_mm": spacing_mm}
    display(_still(image, segmentation, prediction, spread, **view))
    if _has_widgets():
        _display_live(_viewer(image, segmentation, prediction, spread, **view))


def _close(widget):
    """Close a widget and all in it: what is left open keeps its volumes in memory."""
    looks = [getattr(widget, name, None) for name in ("layout", "style")]
    for part in (*getattr(widget, "children", ()), *filter(None, looks)):
        _close(part)
    widget.unobserve_all()
    widget.close()


def browse_cases(scores, load, **view):
    """Show the cases of a table of results, the worst first, each in a browser.

    Without widgets, and in a saved notebook, a still picture of the worst is shown.

    Parameters
    ----------
    scores : pandas.Series
        A score for each case id, higher is better: mean Dice, say.
    load : callable
        Takes a case id; returns what `browse` takes: image, segmentation, prediction
        and, if there is one, spread, in LPS order.
    **view
        `axis` and `spacing_mm`, as in `plot_slices`.
    """
    from IPython.display import display

    ranking = scores.sort_values()
    display(_still(*load(ranking.index[0]), **view))
    if not _has_widgets():
        return
    from ipywidgets import Dropdown, VBox

    options = [
        (f"{case_id}: {score:.2f}", case_id) for case_id, score in ranking.items()
    ]
    chooser, box = Dropdown(description="case", options=options), VBox()

    def show(_):
        for old in box.children[1:]:
            _close(old)
        box.children = chooser, _viewer(*load(chooser.value), **view)

    chooser.observe(show, "value")
    show(None)
    _display_live(box)

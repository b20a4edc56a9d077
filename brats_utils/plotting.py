"""All pictures of the notebooks: slices and overlays, training curves, a slice browser.

Volumes are in LPS order, as BraTS stores them and `to_lps` returns them. Slices are
drawn in the radiological convention: the patient's right is on the left of the picture.
The edges are marked R, L (right, left), A, P (front, back) and S, I (head, feet).
"""

from dataclasses import dataclass, replace
from itertools import product

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython import display
from IPython.core.pylabtools import print_figure
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from brats_utils.cases import ALL_MODALITIES, MODALITIES
from brats_utils.files import SIZES_MM, are, check_option, is_whole, whole
from brats_utils.labels import COLOURS, LABELS, REGION_NAMES, encode_labels
from brats_utils.volumes import best_slice, bounding_box, bounding_boxes, surface_quads

PLANES = ("sagittal", "coronal", "axial")
EDGES = ("APSI", "RLSI", "RLAP")  # left, right, top and bottom of each plane
# 9 voxels on either side of a slice(start, stop); pixel 0 extends from -0.5 to 0.5.
MARGIN = np.array([-9.5, 8.5])
LABEL_COLOURS = {LABELS[value]: colour for value, colour in COLOURS.items()}
# Labels, errors, boxes and regions have different colours, so that they are not mixed
# up. Enhancing tumour has one colour, because the label and the region are the same.
ERRORS = {"missed": "#CC79A7", "false positive": "#009E73", "wrong label": "#00E5FF"}
BOX_COLOUR = "#FFFFFF"
REGION_COLOURS = {"WT": "#332288", "TC": "#882255", "ET": COLOURS[4]}
SD_LIMITS = (0.05, 0.5)  # smaller SDs have no colour; a probability has at most 0.5


@dataclass(frozen=True, eq=False)
class Overlay:
    """A volume to draw over a scan, and how to colour it.

    Parameters
    ----------
    volume : (X, Y, Z) array
        Classes (whole numbers, 0 is background) or standard deviations, in LPS order.
    colours : dict of str to str
        Name and colour of class 1, 2 and so on, for a legend. Empty for standard
        deviations: they get a colour bar, and the scan below them is dimmed.
    opacity : float
        0 to 1.
    """

    volume: np.ndarray
    colours: dict
    opacity: float = 0.5

    def draw(self, axes, index, axis):
        """Draw one slice over the slice that the axes already show.

        Parameters
        ----------
        axes : matplotlib axes
            Already show the same slice of a scan.
        index, axis : int
            Index of the slice, and its axis.
        """
        colours, cmap, (low, high) = [*self.colours.values()], "plasma", SD_LIMITS
        if colours:
            cmap, (low, high) = ListedColormap(colours), (1, len(colours))
        else:  # dim the scan: twice the grey window makes it half as bright
            black, white = axes.images[0].get_clim()
            axes.images[0].set_clim(black, 2 * white - black)
        plane = np.ma.masked_less(np.take(self.volume, index, axis).T, low)
        style = {"cmap": cmap, "alpha": self.opacity, "interpolation": "nearest"}
        axes.imshow(plane, vmin=low, vmax=high, aspect=axes.get_aspect(), **style)


def _overlay(labels):
    """Return the overlay of a BraTS label map, or None if there is no map."""
    if labels is not None:
        return Overlay(encode_labels(labels), LABEL_COLOURS)


def _comparison(truth=None, prediction=None, spread=None):
    """Return the overlays to choose from, by name; the first is "nothing"."""
    overlays = {"truth": _overlay(truth), "prediction": _overlay(prediction)}
    if all(overlays.values()):
        truth, prediction = (overlay.volume for overlay in overlays.values())
        check_option("prediction", prediction.shape, truth.shape.__eq__, truth.shape)
        # 0 is no error; 1, 2 and 3 are those of ERRORS.
        kinds = [truth == prediction, prediction == 0, truth == 0]
        errors = np.select(kinds, np.arange(3, dtype=np.uint8), default=np.uint8(3))
        overlays["errors"] = Overlay(errors, ERRORS, 0.85)
    if spread is not None:
        check_option("spread", spread, lambda s: s.ndim == 3, "an array (X, Y, Z)")
        overlays["uncertainty"] = Overlay(spread, {}, 1.0)
    return {"nothing": None} | {name: o for name, o in overlays.items() if o}


def _best_slice_of(overlays, shape, axis):
    """Return the best slice of the first filled overlay of a shape, or the middle."""
    filled = [v for o in overlays if o and (v := o.volume).shape == shape and v.any()]
    return best_slice(filled[0], axis) if filled else shape[axis] // 2


def _slice_indices(index, sizes):
    """Return the slice index for each volume; raise if one is out of range."""
    indices, last = np.broadcast_to(index, len(sizes)), np.array(sizes) - 1
    fits = indices.dtype.kind in "iu" and ((indices >= 0) & (indices <= last)).all()
    check_option("index", index, lambda _: fits, f"a slice from 0 to {last.min()}")
    return indices


def _in_plane(values, axis):
    """Return the values for the two axes that a slice shows, given one per axis."""
    return [value for a, value in enumerate(values) if a != axis]


def _find_frames(volumes, boxes):
    """Return the limits of the part of each volume to show, (3, 2) in pixels.

    This part contains all non-zero voxels, the box if there is one, and a margin.
    Volumes of the same shape share one frame.
    """
    masks = [volume != 0 for volume in volumes]
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            mask[box] = True
    return [MARGIN + [(s.start, s.stop) for s in box] for box in bounding_boxes(masks)]


def _make_axes(axes, n, size):
    """Return the first n of the given axes, or a new row (size in inches)."""
    if axes is None:
        axes = plt.subplots(1, n, figsize=size, squeeze=False, layout="constrained")[1]
    axes = np.ravel(axes)[:n]
    check_option("axes", axes, are(n, lambda a: a.imshow), f"{n} matplotlib axes")
    return axes


def _show_grey(axes, volume, index, axis, spacing_mm, frame, window):
    """Draw one slice in grey; where it is exactly 0, the black background shows."""
    if window is None:  # the 1st to the 99th percentile
        some = np.asarray(volume[::2, ::2, ::2], np.float32)
        window = np.nanpercentile(some[some != 0], (1, 99)) if some.any() else (0, 1)
    low, high = window
    picture = np.ma.masked_equal(np.take(volume, index, axis).T, 0)
    across, up = _in_plane(spacing_mm, axis)
    style = {"cmap": "gray", "vmin": min(low, high - 1e-6), "vmax": high}
    axes.imshow(picture, aspect=up / across, **style)
    columns, rows = _in_plane(frame, axis)
    # Row 0 is the front of an axial slice, and goes on top; in others it is the feet.
    axes.set(xlim=columns, ylim=rows[::-1] if axis == 2 else rows)
    axes.set(xticks=[], yticks=[], facecolor="black")


def _draw_box(axes, box, axis):
    """Draw the outline of a box of 3 slices."""
    across, up = _in_plane(box, axis)
    corner = across.start - 0.5, up.start - 0.5
    size = across.stop - across.start, up.stop - up.start
    axes.add_patch(Rectangle(corner, *size, fill=False, ec=BOX_COLOUR, lw=1.5))


def _annotate(axes, index, axis, sides):
    """Write plane and index in a corner, and letters for the sides at the edges.

    `sides` is True for the letters of the plane, False for none, or the four letters.
    """
    style = {"color": "0.8", "fontsize": "small", "transform": axes.transAxes}
    style["path_effects"] = [withStroke(linewidth=2, foreground="black")]
    axes.text(0.02, 0.02, f"{PLANES[axis]} {index}", va="bottom", **style)
    if sides:
        style |= {"ha": "center", "va": "center"}
        positions = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
        letters = EDGES[axis] if sides is True else sides
        for letter, position in zip(letters, positions, strict=True):
            axes.text(*position, letter, **style)


def _add_legend(axes, overlays):
    """Add a colour bar for values, and one legend for all classes of a figure."""
    figure, swatches = axes[0].figure, {}
    for each, overlay in zip(axes, overlays, strict=True):
        for name, colour in overlay.colours.items() if overlay else ():
            # Blended with light grey, as over a tumour, which is bright on most images.
            colour = 0.7 + overlay.opacity * (np.array(to_rgb(colour)) - 0.7)
            swatches[name] = Patch(color=colour, label=name)
        if overlay and not overlay.colours:
            bar = {"ax": list(axes), "shrink": 0.8, "label": "standard deviation"}
            figure.colorbar(each.images[-1], **bar).ax.set_facecolor("0.2")
    if swatches and not figure.legends:
        columns = int(figure.get_figwidth() / 1.7) or 1  # inches for each name
        style = {"ncols": columns, "frameon": False, "fontsize": "small"}
        figure.legend(handles=[*swatches.values()], loc="outside lower center", **style)


def _check_view(n, axis, spacing_mm, window, **lists):
    """Validate the options; return the lists, with None replaced by [None] * n."""
    check_option("axis", axis, lambda a: is_whole(a) and a < 3, "0, 1 or 2")
    check_option("spacing_mm", spacing_mm, *SIZES_MM)
    check_option("window", window, lambda w: w is None or np.diff(w) >= 0, "low, high")
    lists = {name: [None] * n if x is None else x for name, x in lists.items()}
    for name, items in lists.items():
        check_option(name, items, lambda x: len(x) == n, f"a list of length {n}")
    fits = are(n, lambda side: isinstance(side, bool) or len(side) == 4)
    check_option("sides", lists["sides"], fits, "True, False or 4 letters each")
    fits = are(n, lambda box: box is None or are(3, lambda s: s.start < s.stop)(box))
    check_option("boxes", lists["boxes"], fits, "3 slices or None each")
    return lists.values()


def plot_slices(
    volumes,
    titles=None,
    *,
    overlays=None,
    boxes=None,
    index=None,
    axis=2,
    spacing_mm=(1, 1, 1),
    sides=True,
    window=None,
    axes=None,
):
    """Show the same slice of several volumes in a row.

    Parameters
    ----------
    volumes : sequence of (X, Y, Z) array
        In LPS order; their shapes may differ. Each is drawn in grey, from the 1st to
        the 99th percentile of its own non-zero voxels.
    titles : sequence of str, optional
        One for each volume.
    overlays : sequence of (X, Y, Z) integer array, Overlay or None, optional
        What to draw over each volume: a BraTS label map (values 0, 1, 2, 4), or
        anything else as an `Overlay`.
    boxes : sequence of tuple of 3 slices or None, optional
        A box to outline in each volume, as `crop_box` returns it.
    index : int or sequence of int, optional
        Index of the slice, or one for each volume. By default the slice with the most
        tumour in the first label map of the volume's shape that has any, otherwise the
        middle slice.
    axis : int
        The axis across which to slice: 2 is axial, 1 coronal, 0 sagittal.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.
    sides : bool or str, or sequence of them
        Mark the patient's sides at the edges. For a volume that was flipped, give the
        letters at its left, right, upper and lower edge, such as "LRAP", or False.
    window : (float, float), optional
        The values drawn as black and white in all panels, to make them comparable.
    axes : sequence of matplotlib axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    axes : array of matplotlib axes

    Raises
    ------
    ValueError
        If an option is invalid, an overlay does not have the shape of its volume,
        or a label map holds a value that is not a BraTS label.
    """
    check_option("volumes", volumes, lambda v: {x.ndim for x in v} == {3}, "3-D arrays")
    n = len(volumes)
    sides = [sides] * n if isinstance(sides, bool | str) else sides
    lists = {"titles": titles, "overlays": overlays, "boxes": boxes, "sides": sides}
    titles, overlays, boxes, sides = _check_view(n, axis, spacing_mm, window, **lists)
    overlays = [o if isinstance(o, Overlay) else _overlay(o) for o in overlays]
    for scan, o in zip(volumes, overlays, strict=True):
        if o and o.volume.shape != scan.shape:
            raise ValueError(f"expected labels of {scan.shape}, got {o.volume.shape}")
    if index is None:
        index = [_best_slice_of(overlays, volume.shape, axis) for volume in volumes]
    indices = _slice_indices(index, [volume.shape[axis] for volume in volumes])
    frames = _find_frames(volumes, boxes)
    across, up = _in_plane(np.ptp(frames[0], axis=1) * spacing_mm, axis)
    axes = _make_axes(axes, n, (n * 2.6, 2.6 * up / across + 0.6))
    for i, panel in enumerate(axes):
        _show_grey(panel, volumes[i], indices[i], axis, spacing_mm, frames[i], window)
        if overlays[i]:
            overlays[i].draw(panel, indices[i], axis)
        if boxes[i] is not None:
            _draw_box(panel, boxes[i], axis)
        _annotate(panel, indices[i], axis, sides[i])
        panel.set_title("" if titles[i] is None else titles[i], fontsize="medium")
    _add_legend(axes, overlays)
    return axes


def _channels(image):
    """Return the channels of an image (X, Y, Z, C) or (X, Y, Z), by name."""
    image = np.asarray(image)
    if image.ndim not in (3, 4):
        raise ValueError(f"image has shape {image.shape}, expected (X, Y, Z, C)")
    image = image[..., None] if image.ndim == 3 else image
    numbered = [f"channel {c}" for c in range(image.shape[-1])]
    names = {3: MODALITIES, 4: ALL_MODALITIES}.get(len(numbered), numbered)
    return {name.upper(): image[..., c] for c, name in enumerate(names)}


def plot_case(image, segmentation=None, *, titles=None, **view):
    """Show one slice of each modality, with the tumour's labels drawn over it.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order; raw, scaled or standardised.
    segmentation : (X, Y, Z) integer array, optional
        BraTS label map, values 0, 1, 2 and 4.
    titles : sequence of str, optional
        Names of the channels. By default three channels are FLAIR, T1CE, T2, and four
        are FLAIR, T1, T1CE, T2.
    **view
        `index`, `axis`, `spacing_mm`, `sides` and `axes`, as in `plot_slices`.

    Returns
    -------
    axes : array of matplotlib axes
        One for each channel.
    """
    scans = _channels(image)
    overlays = [_overlay(segmentation)] * len(scans)
    return plot_slices([*scans.values()], titles or [*scans], overlays=overlays, **view)


def _plot_overlays(image, overlays, channel=0, **view):
    """Show one channel under each of the overlays."""
    names, scans = zip(*_channels(image).items(), strict=True)
    last = f"0 to {len(names) - 1}"
    check_option("channel", channel, lambda c: is_whole(c) and names[c], last)
    titles = [names[channel], *list(overlays)[1:]]
    volumes = [scans[channel]] * len(overlays)
    return plot_slices(volumes, titles, overlays=[*overlays.values()], **view)


def plot_prediction(image, truth, prediction, *, channel=0, **view):
    """Show a scan, its true labels, the predicted ones, and where the two differ.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    truth, prediction : (X, Y, Z) integer array
        BraTS label maps, values 0, 1, 2 and 4.
    channel : int
        Which modality to show; the first, FLAIR, by default.
    **view
        `index`, `axis`, `spacing_mm`, `sides` and `axes`, as in `plot_slices`. The
        default slice has the most true tumour or, without any, the most predicted.

    Returns
    -------
    axes : array of 4 matplotlib axes
        Errors are tumour that was missed, tumour predicted where there is none, and
        tumour with the wrong label.
    """
    return _plot_overlays(image, _comparison(truth, prediction), channel, **view)


def plot_uncertainty(image, prediction, spread, *, channel=0, **view):
    """Show a scan, its predicted labels, and how uncertain the prediction is.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    prediction : (X, Y, Z) integer array
        BraTS label map, values 0, 1, 2 and 4.
    spread : (X, Y, Z) float array
        Standard deviation of the probabilities, as `predict_case` returns it. The
        colour scale is 0.05 to 0.5 in every figure; smaller values have no colour.
    channel : int
        Which modality to show; the first, FLAIR, by default.
    **view
        `index`, `axis`, `spacing_mm`, `sides` and `axes`, as in `plot_slices`.

    Returns
    -------
    axes : array of 3 matplotlib axes
    """
    return _plot_overlays(image, _comparison(None, prediction, spread), channel, **view)


def plot_surfaces(segmentations, titles, *, spacing_mm=(1, 1, 1), step=2):
    """Show label maps in 3D, from the front: core and enhancing tumour inside oedema.

    Parameters
    ----------
    segmentations : sequence of (X, Y, Z) integer array
        BraTS label maps on the same grid, values 0, 1, 2 and 4, in LPS order.
    titles : sequence of str
        One for each label map.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.
    step : int
        Draw every n-th voxel only, which takes 1/n² of the time and may miss structures
        thinner than that.

    Returns
    -------
    axes : array of matplotlib 3D axes
        All have the same limits.
    """
    check_option("spacing_mm", spacing_mm, *SIZES_MM)
    check_option("step", step, *whole(1))
    expected = "a list of label maps of the same shape"
    check_option("segmentations", segmentations, lambda m: np.ndim(m) == 4, expected)
    maps = [encode_labels(each) for each in segmentations]
    check_option("titles", titles, lambda t: len(t) == len(maps), "one for each map")
    box, n = bounding_box(np.any(maps, axis=0)), len(maps)
    size_mm = spacing_mm * np.array([max(1, s.stop - s.start) for s in box])
    options = {"subplot_kw": {"projection": "3d"}, "figsize": (4 * n, 4.5)}
    figure, axes = plt.subplots(1, n, squeeze=False, layout="constrained", **options)
    solid = dict(zip(LABEL_COLOURS.items(), (1, 0.12, 1), strict=True))
    for each, encoded, title in zip(axes[0], maps, titles, strict=True):
        labels, parts, colours = encoded[box][::step, ::step, ::step], [], []
        for value, ((_, colour), opacity) in enumerate(solid.items(), 1):
            mask = labels > 0 if value == 2 else labels == value
            parts.append(surface_quads(mask) * step * np.array(spacing_mm))
            colours += [(*to_rgb(colour), opacity)] * len(parts[-1])
        if len(quads := np.concatenate(parts)):
            solids = Poly3DCollection(quads, facecolors=colours, shade=True)
            each.add_collection3d(solids)
        each.set(title=title, xlabel="R – L, mm")
        each.set_ylabel("A – P, mm", labelpad=10)
        each.set_zlabel("I – S, mm", labelpad=8)
        each.set(xlim=(0, size_mm[0]), ylim=(0, size_mm[1]), zlim=(0, size_mm[2]))
        each.set_box_aspect(size_mm, zoom=0.85)
        each.locator_params(nbins=3)
        each.view_init(elev=15, azim=-70)
    keys = [Patch(color=c, alpha=max(a, 0.3), label=n) for (n, c), a in solid.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    return axes[0]


def plot_history(history, axes=None):
    """Show loss and Dice by epoch.

    Parameters
    ----------
    history : pandas.DataFrame
        As `train` returns it: columns `loss`, `val_loss`, `dice_WT`, `val_dice_WT` and
        so on, and `epoch`. Missing columns and epochs without a value are left out.
    axes : sequence of 2 matplotlib axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    axes : array of 2 matplotlib axes
        Loss and Dice. Training is dashed, validation solid.
    """
    check_option("history", history, lambda h: [h.columns], "what train returns")
    axes = _make_axes(axes, 2, (9, 3.2))
    curves = [(axes[0], "loss", "", "0.2")]
    for region, name in REGION_NAMES.items():
        curves.append((axes[1], f"dice_{region}", f"{name}, ", REGION_COLOURS[region]))
    history = history.set_index("epoch") if "epoch" in history else history
    parts = (("", "training", ".--"), ("val_", "validation", ".-"))
    for (each, column, name, colour), (prefix, part, line) in product(curves, parts):
        if prefix + column in history:
            values = history[prefix + column].dropna()
            each.plot(values.index, values, line, c=colour, ms=4, label=name + part)
    for each, quantity in zip(axes, ("loss", "Dice"), strict=True):
        each.set(xlabel="epoch", ylabel=quantity)
        each.xaxis.get_major_locator().set_params(integer=True)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False, fontsize="small")
    axes[1].set_ylim(0, 1)
    return axes


class _Browser:
    """Widgets for browsing the slices of one or more cases.

    All cases share one set of widgets, so only the volumes of the case on display are
    in memory.
    """

    def __init__(self, load, cases, axis=2, spacing_mm=(1, 1, 1)):
        self.load, self.spacing_mm = load, spacing_mm
        self.case = widgets.Dropdown(description="case", options=cases)
        self.open_case()
        view = {"axis": axis, "spacing_mm": spacing_mm}
        self.still = _plot_overlays(self.image, self.overlays, **view)[0].figure
        self.still.suptitle(self.case.label)  # empty if there is only one case
        plt.close(self.still)
        planes = [(PLANES[a], a) for a in (2, 1, 0)]
        late = {"continuous_update": False}  # draw when the slider is released
        self.plane = widgets.ToggleButtons(options=planes, value=axis)
        self.index = widgets.IntSlider(description="slice", **late)
        self.scan = widgets.Dropdown(description="scan", options=[*self.channels])
        self.layer = widgets.Dropdown(description="overlay", options=[*self.overlays])
        self.layer.index = min(2, len(self.overlays) - 1)  # the prediction, if any
        self.opacity = widgets.FloatSlider(0.5, max=1, description="opacity", **late)
        # Not an Output widget: it sometimes stalls a notebook run without a browser.
        self.picture = widgets.Image(format="png")
        self.go_to_tumour()
        self.draw()
        jump = widgets.Button(description="most tumour")
        jump.on_click(self.go_to_tumour)
        controls = [self.plane, self.index, self.scan, self.layer, self.opacity]
        for control in (self.case, *controls):
            control.observe(self.update, "value")
        shown = [self.case, *controls] if len(cases) > 1 else controls
        self.box = widgets.HBox([self.picture, widgets.VBox([*shown, jump])])

    def open_case(self):
        """Load the selected case."""
        self.image, *labels = self.load(self.case.value)
        self.channels, self.overlays = _channels(self.image), _comparison(*labels)

    def go_to_tumour(self, _=None):
        """Go to the slice of this plane with the most tumour."""
        shape, axis = np.shape(self.image)[:3], self.plane.value
        self.index.max = shape[axis] - 1
        self.index.value = _best_slice_of(self.overlays.values(), shape, axis)

    def update(self, change):
        """Redraw the slice after any control has changed."""
        if change.owner is self.case:
            self.open_case()
        if change.owner in (self.case, self.plane):
            self.go_to_tumour()
        self.draw()

    def draw(self):
        """Draw the slice that the controls describe."""
        overlay = self.overlays.get(self.layer.value)
        overlay = overlay and replace(overlay, opacity=self.opacity.value)
        figure = plt.Figure(figsize=(6, 5.4), layout="constrained")
        view = {"index": self.index.value, "axis": self.plane.value}
        view |= {"spacing_mm": self.spacing_mm, "axes": figure.subplots()}
        plot_slices([self.channels[self.scan.value]], overlays=[overlay], **view)
        self.picture.value = print_figure(figure, bbox_inches=None)

    def show(self):
        """Show a still picture, which a saved notebook keeps, and the widgets."""
        display.display(self.still)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        text = "A slice browser is shown here while the notebook is running."
        bundle = {"application/vnd.jupyter.widget-view+json": view, "text/plain": text}
        display.display(bundle, raw=True)


def browse(image, segmentation=None, prediction=None, spread=None, **view):
    """Show a case as a still picture and, in a running notebook, a browser below it.

    The browser has a slider for the slices of each plane, a button that jumps to the
    slice with the most tumour, and controls for modality, overlay and opacity.

    Parameters
    ----------
    image : (X, Y, Z, C) or (X, Y, Z) array
        In LPS order.
    segmentation : (X, Y, Z) integer array, optional
        True BraTS labels.
    prediction : (X, Y, Z) integer array, optional
        Predicted BraTS labels. If both are given, the errors can be shown too.
    spread : (X, Y, Z) float array, optional
        Standard deviation of the probabilities, as `predict_case` returns it.
    **view
        `axis`, the initial plane, and `spacing_mm`, as in `plot_slices`.
    """
    _Browser(lambda _: (image, segmentation, prediction, spread), [""], **view).show()


def browse_cases(scores, load, **view):
    """Show a browser for a series of scored cases, worst first.

    The still picture that a saved notebook keeps shows the worst case.

    Parameters
    ----------
    scores : pandas.Series
        A score for each case id, where higher is better, such as the mean Dice. The
        name of the Series is shown, if it has one.
    load : callable
        Takes a case id and returns what `browse` takes: image, segmentation, prediction
        and, if there is one, spread, in LPS order.
    **view
        `axis` and `spacing_mm`, as in `plot_slices`.
    """
    check_option("load", load, callable, "a function of a case id")
    check_option("scores", scores, lambda s: len(s.sort_values() + 0), "a Series")
    ranking, unit = scores.sort_values(), scores.name or ""
    cases = [(f"{i}: {score:.2f} {unit}".strip(), i) for i, score in ranking.items()]
    _Browser(load, cases, **view).show()

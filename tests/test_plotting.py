import gc
import weakref

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from mpl_toolkits.mplot3d import proj3d  # noqa: E402

from brats_utils import plotting  # noqa: E402
from brats_utils.labels import COLOURS, LABELS  # noqa: E402
from brats_utils.plotting import (  # noqa: E402
    browse,
    browse_cases,
    plot_case,
    plot_history,
    plot_prediction,
    plot_slices,
    plot_surfaces,
    plot_uncertainty,
)
from brats_utils.volumes import best_slice  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def toy():
    """Return an image of 20 x 16 x 12 with a margin of 2, and its labels."""
    image = np.zeros((20, 16, 12, 3), np.float32)
    image[2:-2, 2:-2, 2:-2] = np.random.default_rng(0).normal(100, 10, (16, 12, 8, 3))
    segmentation = np.zeros((20, 16, 12), np.uint8)
    segmentation[5:10, 5:10, 4:6] = 2
    segmentation[6:9, 6:9, 5] = 4
    segmentation[7, 7, 5:8] = 1
    return image, segmentation


def drawn(axes, layer):
    return axes.images[layer].get_array()


def pixel_of(axes, column, row):
    """Return where a pixel is in its picture, 0 to 1 from the left and the bottom."""
    position = axes.transData.transform((column, row))
    return axes.transAxes.inverted().transform(position)


def test_best_slice_by_content(toy):
    segmentation = toy[1]
    assert best_slice(segmentation, axis=2) == 4
    assert best_slice(segmentation, axis=0) == 7
    assert best_slice(np.zeros((4, 6, 9)), axis=1) == 3


@pytest.mark.parametrize(
    ("axis", "letters"), [(0, "A P S I"), (1, "R L S I"), (2, "R L A P")]
)
def test_each_end_of_a_plane_is_on_the_side_of_its_letter(axis, letters):
    """LPS: the first voxel of each axis is right, front and foot."""
    volume = np.ones((5, 6, 7), np.float32)
    first = [edge for edge, a in (("R", 0), ("A", 1), ("I", 2)) if a != axis]
    (axes,) = plot_slices([volume], axis=axis)
    # The letters follow the text of the slice's index.
    places = {text.get_text(): text.get_position() for text in axes.texts[1:]}
    assert " ".join(places) == letters
    corner = pixel_of(axes, 0, 0)
    for edge, i in zip(first, (0, 1), strict=True):
        assert (places[edge][i] < 0.5) == (corner[i] < 0.5)


def test_a_flipped_volume_is_not_marked(toy):
    scan = toy[0][..., 0]
    axes = plot_slices([scan, scan[::-1]], sides=[True, False], index=[5, 6])
    assert [text.get_text() for text in axes[0].texts] == ["axial 5", *"RLAP"]
    assert [text.get_text() for text in axes[1].texts] == ["axial 6"]


def test_plot_slices_outlines_a_box_and_keeps_it_in_view(toy):
    volume = toy[0][..., 0]
    box = (slice(0, 20), slice(3, 9), slice(0, 10))
    axes = plot_slices([volume, volume], ["box", "no box"], boxes=[box, None], axis=1)
    (outline,) = axes[0].patches
    assert outline.get_xy() == (-0.5, -0.5)
    assert (outline.get_width(), outline.get_height()) == (20, 10)
    assert axes[1].get_xlim() == axes[0].get_xlim() == (-9.5, 28.5)
    assert not axes[1].patches


def test_volumes_of_other_shapes_have_frames_of_their_own():
    axes = plot_slices([np.ones((4, 5, 6)), np.ones((8, 9, 6)), np.zeros((3, 3, 6))])
    assert [each.get_xlim()[1] for each in axes] == [12.5, 16.5, 11.5]


def test_plot_case_draws_every_channel_and_its_labels(toy):
    axes = plot_case(*toy, spacing_mm=(1, 2, 3), axis=0)
    assert [each.get_title() for each in axes] == ["FLAIR", "T1CE", "T2"]
    overlay = axes[1].images[1]
    # Label 4 is the third colour; sagittal slice 7, with Z as rows and Y as columns.
    assert overlay.get_array()[5, 6] == 3
    assert overlay.get_array().mask[0, 0]
    assert matplotlib.colors.to_hex(overlay.cmap(2)) == COLOURS[4].lower()
    assert axes[0].get_aspect() == 3 / 2
    legend = axes[0].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == list(LABELS.values())[1:]


def test_grey_window_is_of_brain_voxels_and_background_is_black(toy):
    standardised = np.where(toy[0] == 0, 0, (toy[0] - 100) / 10)
    axes = plot_case(standardised, index=6)
    low, high = axes[0].images[0].get_clim()
    assert -3 < low < -1.5 and 1.5 < high < 3
    assert drawn(axes[0], 0).mask[0, 0] and axes[0].get_facecolor() == (0, 0, 0, 1)
    assert not axes[0].figure.legends


def test_plot_prediction_tells_errors_apart(toy):
    image, truth = toy
    prediction = truth.copy()
    prediction[5, 5, 5] = 0
    prediction[11, 7, 5] = 2
    prediction[6, 6, 5] = 1
    axes = plot_prediction(image, truth, prediction, index=5)
    errors = drawn(axes[3], 1)
    assert (errors[5, 5], errors[7, 11], errors[6, 6]) == (1, 2, 3)
    assert errors.count() == 3
    names = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert names[3:] == ["missed", "false positive", "wrong label"]
    assert len(axes[0].images) == 1 and len(axes[1].images) == 2


def test_no_colour_means_two_things():
    colours = [*plotting.LABEL_COLOURS.values(), *plotting.ERRORS.values()]
    colours += [plotting.BOX_COLOUR, *plotting.REGION_COLOURS.values()]
    assert plotting.REGION_COLOURS["ET"] == COLOURS[4]  # the same voxels
    assert len(set(colours)) == len(colours) - 1


def test_plot_uncertainty_has_one_scale_for_all_figures_on_a_dimmed_scan(toy):
    image, prediction = toy
    spread = np.zeros(prediction.shape, np.float32)
    spread[6, 5, 5] = 0.3
    axes = plot_uncertainty(image, prediction, spread, index=5)
    sd = axes[2].images[1]
    assert sd.get_clim() == (0.05, 0.5)
    assert sd.get_array().count() == 1 and drawn(axes[2], 1)[5, 6] == np.float32(0.3)
    low, high = axes[0].images[0].get_clim()
    assert axes[2].images[0].get_clim() == (low, high + (high - low))
    bar = axes[0].figure.axes[3]
    assert bar.get_ylabel() == "standard deviation" and bar.get_ylim() == (0.05, 0.5)


def test_plot_prediction_finds_the_slice_where_nothing_is_true(toy):
    image, prediction = toy
    axes = plot_prediction(image, np.zeros_like(prediction), prediction)
    assert drawn(axes[3], 1).count() == 25  # the whole of slice 4 is a false positive


def test_plots_use_the_axes_given(toy):
    figure, axes = plt.subplots(2, 4)
    for row in axes:
        assert plot_prediction(*toy, toy[1], axes=row)[0] is row[0]
    assert len(figure.legends) == 1 and plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="expected 3 matplotlib axes"):
        plot_case(*toy, axes=axes[0, :2])


def test_what_does_not_fit_is_refused(toy):
    image, segmentation = toy
    with pytest.raises(ValueError, match="found 3 in 3840"):
        plot_case(image, np.full((20, 16, 12), 3))
    with pytest.raises(ValueError, match=r"of \(20, 16, 12\), got \(20, 16, 11\)"):
        plot_case(image, segmentation[..., 1:])
    with pytest.raises(
        ValueError, match=r"prediction is \(20, 16, 11\), expected \(20, 16"
    ):
        plot_prediction(image, segmentation, segmentation[..., 1:])
    with pytest.raises(ValueError, match="image has shape"):
        plot_case(image[None], segmentation)
    assert not plt.get_fignums()


def test_plot_history_skips_what_is_missing():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "loss": [3.0, 2.0, 1.0],
            "dice_ET": [0.1, 0.2, 0.3],
            "val_dice_ET": [np.nan, 0.4, np.nan],
        }
    )
    loss, dice = plot_history(history)
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2, 1]]
    assert list(dice.lines[1].get_xdata()) == [2]
    assert dice.lines[1].get_label() == "enhancing tumour, validation"
    assert (dice.get_xlabel(), dice.get_ylabel()) == ("epoch", "Dice")
    assert len(plot_history(history.drop(columns="epoch"))[1].lines) == 2


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed: figures and mime bundles."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda each, **_: shown.append(each))
    return shown


@pytest.fixture
def browsers(monkeypatch):
    """The browsers that are made."""
    made, show = [], plotting._Browser.show
    monkeypatch.setattr(
        plotting._Browser, "show", lambda self: (made.append(self), show(self))
    )
    return made


def test_browse_shows_a_still_picture_then_a_browser(toy, displayed, browsers):
    spread = np.where(toy[1] != 0, np.float32(0.3), np.float32(0))
    browse(*toy, toy[1], spread)
    still, live = displayed
    titles = [axes.get_title() for axes in still.axes[:5]]
    assert titles == ["FLAIR", "truth", "prediction", "errors", "uncertainty"]
    assert not plt.get_fignums()
    # A saved notebook, where no widgets can run, holds a line in their place.
    assert live["text/plain"].startswith("A slice browser is shown here")
    (browser,) = browsers
    shown = live["application/vnd.jupyter.widget-view+json"]
    assert shown["model_id"] == browser.box.model_id
    assert (browser.index.value, browser.index.max) == (4, 11)
    assert browser.layer.options == ("nothing", *titles[1:])


def test_every_control_of_a_browser_changes_the_picture(toy, displayed, browsers):
    browse(*toy, toy[1], np.where(toy[1] != 0, np.float32(0.3), np.float32(0)))
    (browser,) = browsers
    picture, controls = browser.box.children
    changes = [("index", 5), ("layer", "nothing"), ("layer", "uncertainty")]
    changes += [("opacity", 1.0), ("scan", "T2"), ("plane", 0)]
    for name, value in changes:
        before = bytes(picture.value)
        assert before.startswith(b"\x89PNG")
        control = getattr(browser, name)
        assert control in controls.children
        control.value = value
        assert bytes(picture.value) != before, name
    assert not plt.get_fignums()


def test_a_browser_goes_to_the_slice_with_most_tumour(toy, displayed, browsers):
    browse(*toy)
    (browser,) = browsers
    jump = browser.box.children[1].children[-1]
    for axis in (0, 1, 2):
        browser.plane.value = axis
        assert browser.index.value == best_slice(toy[1], axis)
        browser.index.value = 0
        jump.click()
        assert browser.index.value == best_slice(toy[1], axis)
        assert browser.index.max == toy[1].shape[axis] - 1


def test_browse_cases_begins_with_the_worst_and_keeps_one_case(
    toy, displayed, browsers
):
    scores = pd.Series({"good": 0.9, "bad": 0.1, "fair": 0.5}, name="Dice")
    loaded = []

    def load(case_id):
        # The next case has fewer slices, and no prediction.
        size = 12 - len(loaded)
        image = toy[0][..., :size, :].copy()
        loaded.append((case_id, weakref.ref(image)))
        label_map = toy[1][..., :size]
        return (image, label_map, label_map) if len(loaded) == 1 else (image, label_map)

    browse_cases(scores, load)
    (browser,) = browsers
    chooser = browser.box.children[1].children[0]
    assert chooser.options == (
        ("bad: 0.10 Dice", "bad"),
        ("fair: 0.50 Dice", "fair"),
        ("good: 0.90 Dice", "good"),
    )
    assert [case_id for case_id, _ in loaded] == ["bad"] and len(displayed[0].axes) == 4
    displayed.clear()  # the still picture shows views of the first case
    browser.index.value = 11
    before = bytes(browser.picture.value)
    chooser.value = "fair"
    assert loaded[-1][0] == "fair" and browser.index.max == 10
    assert bytes(browser.picture.value) != before
    gc.collect()
    assert [image() is None for _, image in loaded] == [True, False]


def test_maps_given_as_lists_are_compared_as_arrays_are(toy):
    image, segmentation = toy
    changed = np.where(segmentation == 2, 0, segmentation)
    arrays = plot_prediction(image, segmentation, changed)[3].images[-1].get_array()
    maps = segmentation.tolist(), changed.tolist()
    lists = plot_prediction(image, *maps)[3].images[-1].get_array()
    np.testing.assert_array_equal(lists, arrays)
    assert lists.count()


def test_each_volume_has_its_own_slice():
    assert len(plot_slices([np.ones((9, 9, 9))], index=np.uint8(5))) == 1
    volumes = [np.ones((9, 9, 9)), np.ones((4, 4, 4))]
    axes = plot_slices(volumes, index=[8, 3])
    assert len(axes) == 2
    with pytest.raises(ValueError, match="index is .8, 4., expected a slice from 0"):
        plot_slices(volumes, index=[8, 4])
    tumour = np.zeros((9, 9, 9), np.uint8)
    tumour[4, 4, 7] = 2
    axes = plot_slices([*volumes, volumes[0]], overlays=[None, None, tumour])
    assert [each.texts[0].get_text()[-1] for each in axes] == ["7", "2", "7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 3}, "axis is 3, expected 0, 1 or 2"),
        ({"axis": "axial"}, "axis is 'axial'"),
        ({"index": 12}, "index is 12, expected a slice from 0 to 11"),
        ({"index": -1}, "index is -1"),
        ({"index": 1.5}, "index is 1.5"),
        ({"channel": 3}, "channel is 3, expected 0 to 2"),
        ({"channel": "flair"}, "channel is 'flair'"),
    ],
)
def test_J4_impossible_views_are_refused(toy, options, message):
    image, segmentation = toy
    with pytest.raises(ValueError, match=message):
        plot_prediction(image, segmentation, segmentation, **options)
    for wrong in (None, 5, "image"):
        with pytest.raises(ValueError, match="image has shape"):
            plot_case(wrong)
        with pytest.raises(ValueError, match="history is"):
            plot_history(wrong)
    plt.close("all")


def test_surfaces_share_limits_and_show_what_there_is(toy):
    truth = toy[1]
    prediction = np.where(truth == 2, 2, 0)
    axes = plot_surfaces([truth, prediction], ["a", "b"], spacing_mm=(1, 1, 2), step=1)
    as_lists = plot_surfaces([truth.tolist()], ["a"], spacing_mm=(1, 1, 2), step=1)
    np.testing.assert_array_equal(
        as_lists[0].collections[0].get_facecolor(),
        axes[0].collections[0].get_facecolor(),
    )
    colours = [np.unique(each.collections[0].get_facecolor()[:, 3]) for each in axes]
    assert [list(found.round(2)) for found in colours] == [[0.12, 1], [0.12]]
    assert axes[0].get_zlim() == axes[1].get_zlim() == (0, 8)
    assert [each.get_title() for each in axes] == ["a", "b"]
    (empty,) = plot_surfaces([truth * 0], ["nothing"])
    assert not empty.collections


def test_the_front_of_a_surface_has_the_patients_right_on_the_left(toy):
    """X runs to the patient's left and Z to the head: rightwards and up."""
    (axes,) = plot_surfaces([toy[1]], ["a"])
    axes.figure.canvas.draw()
    project = lambda *point: proj3d.proj_transform(*point, axes.get_proj())  # noqa: E731
    assert project(1, 0, 0)[0] > project(0, 0, 0)[0]
    assert project(0, 0, 1)[1] > project(0, 0, 0)[1]
    assert project(0, 0, 0)[2] < project(0, 1, 0)[2]  # the front is nearer


def is_drawn(axes):
    axes.figure.canvas.draw()
    grey = np.asarray(axes.figure.canvas.buffer_rgba())[..., :3]
    box = axes.get_window_extent()
    rows = slice(int(grey.shape[0] - box.y1), int(grey.shape[0] - box.y0))
    inside = grey[rows, int(box.x0) : int(box.x1)]
    return (inside.min(axis=-1) > 100).mean() > 0.05


@pytest.mark.parametrize("kind", ["a NaN voxel", "NaN around it", "a mask", "constant"])
def test_volumes_with_nan_or_one_value_are_drawn(toy, kind):
    volume = toy[0][..., 0].copy()
    if kind == "a NaN voxel":
        volume[8, 8, 6] = np.nan
    elif kind == "NaN around it":
        volume[volume == 0] = np.nan
    else:
        volume = volume > 0 if kind == "a mask" else (volume > 0) * np.float32(700)
    assert is_drawn(plot_case(volume)[0])

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from brats_utils.labels import COLOURS, LABELS  # noqa: E402
from brats_utils.plotting import (  # noqa: E402
    best_slice,
    browse,
    browse_cases,
    plot_case,
    plot_history,
    plot_prediction,
    plot_uncertainty,
)


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


def test_plot_case_draws_every_channel_and_its_labels(toy):
    axes = plot_case(*toy, spacing_mm=(1, 2, 3), axis=0)
    assert [each.get_title() for each in axes] == ["FLAIR", "T1CE", "T2"]
    overlay = axes[1].images[1]
    # Label 4 is the third colour; sagittal slice 7, seen from the head downwards.
    assert overlay.get_array()[11 - 5, 6] == 3
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
    assert drawn(axes[0], 0)[0, 0] == np.float32(low)
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
    assert len(axes[0].figure.legends[0].get_texts()) == 6
    assert len(axes[0].images) == 1 and len(axes[1].images) == 2


def test_plot_uncertainty_has_one_scale_for_all_figures(toy):
    image, prediction = toy
    spread = np.zeros(prediction.shape, np.float32)
    spread[6, 5, 5] = 0.3
    axes = plot_uncertainty(image, prediction, spread, index=5)
    doubt = axes[1].images[1]
    assert doubt.get_clim() == (0, 0.5)
    assert doubt.get_array().count() == 1 and drawn(axes[1], 1)[5, 6] == np.float32(0.3)
    index = best_slice(prediction)
    assert f"axial {index}" in plot_uncertainty(*toy, spread)[0].texts[0].get_text()


def test_plot_prediction_finds_the_slice_where_nothing_is_true(toy):
    image, prediction = toy
    axes = plot_prediction(image, np.zeros_like(prediction), prediction)
    assert drawn(axes[3], 1).count() == 25  # the whole of slice 4 is invented


def test_plots_use_the_axes_given(toy):
    figure, axes = plt.subplots(2, 4)
    for row in axes:
        assert plot_prediction(*toy, toy[1], axes=row)[0] is row[0]
    assert len(figure.legends) == 1 and plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="got 2"):
        plot_case(*toy, axes=axes[0, :2])


def test_training_labels_are_refused(toy):
    with pytest.raises(ValueError, match="found 3 in 320"):
        plot_case(toy[0], np.full((20, 16, 12), 3))


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
    assert len(plot_history(history.drop(columns="epoch"))[1].lines) == 2


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr("brats_utils.plotting._display_live", shown.append)
    return shown


def controls_of(viewer):
    """Return the picture and {name: widget} of a viewer."""
    picture, (plane, index, jump, scan, overlay, opacity) = (
        viewer.children[0],
        viewer.children[1].children,
    )
    names = {"plane": plane, "index": index, "jump": jump, "scan": scan}
    return picture, names | {"overlay": overlay, "opacity": opacity}


def test_browse_shows_a_still_picture_then_a_viewer(toy, displayed):
    spread = np.where(toy[1] != 0, np.float32(0.3), np.float32(0))
    browse(*toy, toy[1], spread)
    still, viewer = displayed
    assert len(still.axes) == 4 and not plt.get_fignums()
    picture, controls = controls_of(viewer)
    index, overlay = controls["index"], controls["overlay"]
    assert (index.value, index.max) == (4, 11)
    assert overlay.options == (
        *("nothing", "uncertainty", "errors", "truth", "prediction"),
    )
    changes = [("index", 5), ("overlay", "nothing"), ("overlay", "uncertainty")]
    changes += [("opacity", 1.0), ("scan", "T2"), ("plane", 0)]
    for name, value in changes:
        before = bytes(picture.value)
        assert before.startswith(b"\x89PNG")
        controls[name].value = value
        assert bytes(picture.value) != before, name
    assert not plt.get_fignums()


def test_the_still_picture_of_a_spread_is_of_the_spread(toy, displayed):
    browse(toy[0], prediction=toy[1], spread=np.ones(toy[1].shape, np.float32))
    titles = [axes.get_title() for axes in displayed[0].axes]
    assert titles[:2] == ["FLAIR, prediction", "standard deviation"]


def test_the_viewer_goes_to_the_slice_with_most_tumour(toy, displayed):
    browse(*toy)
    _, controls = controls_of(displayed[1])
    for axis in (0, 1, 2):
        controls["plane"].value = axis
        controls["index"].value = 0
        controls["jump"].click()
        assert controls["index"].value == best_slice(toy[1], axis)
        assert controls["index"].max == toy[1].shape[axis] - 1


def widgets_alive():
    return len(ipywidgets.widgets.widget._instances)


def test_browse_cases_begins_with_the_worst(toy, displayed):
    scores = pd.Series({"good": 0.9, "bad": 0.1, "fair": 0.5})
    loaded = []

    def load(case_id):
        loaded.append(case_id)
        return *toy, toy[1]

    browse_cases(scores, load)
    still, box = displayed
    chooser, viewer = box.children
    assert [case_id for _, case_id in chooser.options] == ["bad", "fair", "good"]
    assert set(loaded) == {"bad"} and len(still.axes) == 4
    (picture, _), every = viewer.children, widgets_alive()
    chooser.value = "fair"
    assert loaded[-1] == "fair" and box.children[1] is not viewer
    # What was left open would keep its volumes in memory.
    assert widgets_alive() == every and picture.comm is None


def test_a_saved_notebook_holds_a_line_in_the_place_of_widgets(toy, monkeypatch):
    bundles = []
    monkeypatch.setattr(
        "IPython.display.display", lambda each, **_: bundles.append(each)
    )
    browse(*toy)
    live = bundles[1]
    assert live["text/plain"] == "In a running notebook a slice browser stands here."
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"]


def test_without_ipywidgets_there_is_a_still_picture(toy, displayed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    browse(toy[0])
    browse_cases(pd.Series({"one": 1.0}), lambda case_id: (*toy, None))
    assert [len(figure.axes) for figure in displayed] == [3, 3]

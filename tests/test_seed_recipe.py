import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import prepared_toys

from brats_utils.labels import encode_labels
from brats_utils.split import split_dataset, split_folds

PATH = Path(__file__).parents[1] / "benchmarks" / "seed_recipe.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("seed_recipe", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_network_has_the_published_size(recipe):
    model = recipe.tutorial_unet()
    assert model.count_params() == 5_645_828
    assert model.output_shape == (None, 128, 128, 128, 4)


def test_each_axial_slice_is_scaled_separately(recipe):
    volume = np.array([[[0, 10], [5, 20]], [[10, 30], [2, 50]]])
    # Slice 0 spans 0..10, slice 1 spans 10..50: a 10 becomes 1 in one, 0 in the other.
    expected = [[[0, 0], [0.5, 0.25]], [[1, 0.5], [0.2, 1]]]
    np.testing.assert_allclose(recipe.scale_slicewise(volume), expected, atol=1e-12)


def test_window_loses_tumour_outside_it(recipe):
    segmentation = np.zeros((240, 240, 155), np.uint8)
    segmentation[50:60, 100, 100] = 4  # six of ten voxels lie before index 56
    segmentation[183:185, 100, 140] = 1  # one lies beyond 183
    segmentation[100, 100, 140:142] = 2  # one lies above 140
    window = recipe.cut_window(encode_labels(segmentation))
    assert window.shape == (128, 128, 128)
    back = recipe.paste_window(window)
    lost = segmentation != back
    assert [int(np.sum(segmentation[lost] == v)) for v in (1, 2, 4)] == [1, 1, 6]
    np.testing.assert_array_equal(
        recipe.cut_window(back), recipe.cut_window(segmentation)
    )


def test_window_is_for_whole_scans(recipe):
    with pytest.raises(ValueError, match="240, 240, 155"):
        recipe.cut_window(np.zeros((24, 24, 16)))


def test_loss_of_a_perfect_prediction_is_three_quarters(recipe):
    perfect = np.eye(4, dtype="float32").reshape(1, 2, 2, 1, 4)
    assert float(recipe.tutorial_loss(perfect, perfect)) == pytest.approx(0.75)


def test_batches_keep_the_order_and_include_the_last_case(recipe, tmp_path):
    for i in "abc":
        np.save(tmp_path / f"image_{i}.npy", np.full(2, ord(i)))
        np.save(tmp_path / f"mask_{i}.npy", np.full(2, -ord(i)))
    drawn = recipe.batches(tmp_path, ["a", "b", "c"])
    firsts = [next(drawn)[0][:, 0].tolist() for _ in range(4)]
    assert firsts == [[97, 98], [99]] * 2


def test_clock_stops_within_an_epoch(recipe):
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    clock = recipe.Clock(minutes=0)
    x = np.zeros((8, 1))
    model.fit(x, x, batch_size=1, epochs=5, callbacks=[clock], verbose=0)
    assert clock.steps == 1


def test_cases_are_those_of_the_split(recipe, toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    splits = {tmp_path / "split": split_dataset(prepared, tmp_path / "split")}
    folds = split_folds(prepared, tmp_path / "folds", folds=2)
    splits[tmp_path / "folds/fold1"] = folds[1]
    for folder, ids in splits.items():
        found = recipe.split_cases(folder)
        assert [[case.id for case in side] for side in found] == list(ids.values())
        assert found[0][0].segmentation.is_relative_to(toy_set)


def test_missing_split_says_what_to_run(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="01_prepare"):
        recipe.split_cases(tmp_path)

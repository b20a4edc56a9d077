import zipfile

import keras
import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, SHAPE, toy_volumes, write_case
from keras import layers

from brats_utils.cases import BratsDataError, find_cases, load_case, load_labels
from brats_utils.files import write_json
from brats_utils.inference import (
    load_model,
    predict_case,
    predict_cases,
    predict_probabilities,
    tune_models,
)
from brats_utils.model import size_factor, unet
from brats_utils.nifti import to_lps
from brats_utils.transforms import NORMALISATION


def pointwise_model(kernel, bias, *, size=None, activation="softmax"):
    """Return a 1x1x1 convolution: its output at a voxel is known from that voxel."""
    kernel = np.asarray(kernel, np.float32)
    inputs = keras.Input((size, size, size, len(kernel)))
    conv = layers.Conv3D(kernel.shape[1], 1, activation=activation)
    model = keras.Model(inputs, conv(inputs))
    conv.set_weights([kernel[None, None, None], np.asarray(bias, np.float32)])
    return model


def oracle(output=4):
    """Return a model that calls the toy's brightest voxels of FLAIR a tumour."""
    kernel = np.zeros((3, output))
    kernel[0] = {4: [0, 2, 3, 5], 3: [9, 9, 9]}[output]
    bias = {4: [0, -1, -3, -9], 3: [-5, -9, -18]}[output]
    return pointwise_model(
        kernel, bias, activation="softmax" if output == 4 else "sigmoid"
    )


def sided_model():
    """Return a model whose output depends on where left, back and up are."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, None, None, 3))
    x = layers.Conv3D(4, 3, padding="same", kernel_initializer="glorot_normal")(inputs)
    return keras.Model(inputs, layers.Softmax()(4 * x))


@pytest.fixture
def case(tmp_path):
    write_case(tmp_path / "raw", "toy", seed=3)
    return find_cases(tmp_path / "raw")[0]


@pytest.mark.parametrize("shape", [(11, 9, 8), (5, 8, 17), (3, 3, 3)])
def test_sliding_window_equals_one_pass_of_a_pointwise_model(shape):
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 4)), rng.normal(size=4)
    image = rng.normal(size=(*shape, 2)).astype(np.float32)
    model = pointwise_model(kernel, bias)
    by_hand = np.exp(image @ kernel + bias)
    by_hand /= by_hand.sum(-1, keepdims=True)
    whole = predict_probabilities(model, image)
    slid = predict_probabilities(model, image, patch_shape=(8, 4, 6))
    fixed = predict_probabilities(pointwise_model(kernel, bias, size=8), image)
    flipped = predict_probabilities(model, image, flips=True)
    for probabilities in (whole, slid, fixed, flipped):
        np.testing.assert_allclose(probabilities, by_hand, atol=1e-5)


def test_flips_average_mirror_images_into_a_symmetric_answer():
    image = np.random.default_rng(0).normal(size=(6, 5, 4, 3)).astype(np.float32)
    answer = predict_probabilities(sided_model(), image, flips=True)
    mirrored = predict_probabilities(sided_model(), image[::-1], flips=True)
    np.testing.assert_allclose(mirrored[::-1], answer, atol=1e-6)
    plain = predict_probabilities(sided_model(), image)
    assert np.abs(plain - answer).max() > 0.01


@pytest.mark.parametrize(
    "options, factor",
    [
        ({"depth": 2}, 2),
        ({"depth": 3, "stem_stride": 2}, 8),
        ({"depth": 6, "stem_stride": 2}, 64),
    ],
)
def test_one_pass_pads_to_what_the_unet_needs(options, factor):
    model = unet((None, None, None, 3), filters=2, **options)
    assert size_factor(model) == factor
    image = np.zeros((9, 17, 5, 3), np.float32)
    assert predict_probabilities(model, image).shape == (9, 17, 5, 4)


def test_predict_case_standardises_and_pastes_on_the_stored_grid(case):
    image, _, _ = load_case(case)
    flair = image[..., 0]
    brain = image.any(axis=-1)
    values = flair[flair != 0]
    scaled = (flair - values.mean()) / values.std()
    # The sides of the softmax cross where scaled FLAIR is 1: label 2 above, 0 below.
    model = pointwise_model([[0, 0, 9, 0], [0] * 4, [0] * 4], [0, -99, -9, -99])
    segmentation = predict_case(model, case)
    assert segmentation.dtype == np.uint8 and segmentation.shape == SHAPE
    np.testing.assert_array_equal(segmentation, np.where(brain & (scaled > 1), 2, 0))


def test_nothing_is_found_outside_the_brain(case):
    everywhere = pointwise_model(np.zeros((3, 4)), [0, 0, 9, 0])
    image, _, _ = load_case(case)
    expected = np.where(image.any(axis=-1), 2, 0)
    np.testing.assert_array_equal(predict_case(everywhere, case), expected)


def write_turned(folder, volumes, affine):
    (folder / "toy").mkdir(parents=True)
    for name, volume in zip(("flair", "t1", "t1ce", "t2", "seg"), volumes, strict=True):
        path = folder / "toy" / f"toy_{name}.nii"
        nib.save(nib.Nifti1Image(volume, affine), path)
    return find_cases(folder)[0]


def test_F04_all_stored_orientations_give_the_same_voxels(tmp_path):
    """Write one scan as 8 mirror images, and one with its axes swapped."""
    images, segmentation = toy_volumes(seed=5)
    written = [*images.values(), segmentation]
    turns = [(np.arange(3), [n >> axis & 1 for axis in range(3)]) for n in range(8)]
    turns.append((np.array([2, 0, 1]), [0, 1, 0]))
    expected = None
    for number, (order, mirrored) in enumerate(turns):
        # Voxel (i, j, k) of the stored volume is voxel turn @ (i, j, k, 1) of the toy.
        turn = np.diag([0.0, 0, 0, 1])
        for axis, source in enumerate(order):
            turn[source, axis] = -1 if mirrored[axis] else 1
            turn[source, 3] = SHAPE[source] - 1 if mirrored[axis] else 0
        flips = tuple(np.flatnonzero(mirrored))
        stored = [np.flip(v.transpose(order), flips) for v in written]
        folder = tmp_path / str(number)
        case = write_turned(folder, stored, AFFINE @ turn)
        segmentation = predict_case(sided_model(), case)
        assert segmentation.shape == stored[0].shape
        upright = to_lps(segmentation, AFFINE @ turn)
        expected = upright if expected is None else expected
        np.testing.assert_array_equal(upright, expected)
    assert set(np.unique(expected)) == {0, 1, 2, 4}


def test_small_enhancing_tumour_becomes_core(case):
    found = predict_case(oracle(), case)
    n = np.count_nonzero(found == 4)
    assert n > 0
    np.testing.assert_array_equal(predict_case(oracle(), case, min_et_voxels=n), found)
    without = predict_case(oracle(), case, min_et_voxels=n + 1)
    np.testing.assert_array_equal(without, np.where(found == 4, 1, found))


def test_an_ensemble_is_a_mean_and_its_spread_an_sd():
    rng = np.random.default_rng(1)
    models = [
        pointwise_model(rng.normal(size=(2, 3)), rng.normal(size=3)) for _ in range(3)
    ]
    image = rng.normal(size=(4, 5, 6, 2)).astype(np.float32)
    each = [predict_probabilities(model, image, flips=True) for model in models]
    mean, spread = predict_probabilities(models, image, flips=True, spread=True)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_allclose(spread, np.std(each, axis=0).max(-1), atol=1e-3)


def test_uncertainty_is_written_on_the_scans_grid(tmp_path, case):
    predict_cases(sided_model(), [case], tmp_path, flips=True, uncertainty=True)
    written = nib.load(tmp_path / "uncertainty" / "toy.nii.gz")
    segmentation, spread = predict_case(
        sided_model(), case, flips=True, uncertainty=True
    )
    np.testing.assert_array_equal(written.affine, load_case(case)[2])
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), spread)
    np.testing.assert_array_equal(load_labels(tmp_path / "toy.nii.gz")[0], segmentation)
    assert 0 < spread.max() <= 0.5  # the model prefers a side, its mirror the other
    outside = ~load_case(case)[0].any(axis=-1)
    assert outside.any() and not spread[outside].any()
    same = predict_case(oracle(), case, flips=True, uncertainty=True)[1]
    assert same.max() < 1e-3  # a voxel alone has no side


def test_a_tuned_decoding_is_noted_and_heeded(tmp_path, case):
    """A shy model: its tumour lies below 0.5 and is found by lower thresholds."""
    kernel, bias = np.zeros((3, 3)), np.full(3, -2.0)
    kernel[0] = 0.35
    shy = pointwise_model(kernel, bias, activation="sigmoid")
    shy.save(tmp_path / "best.keras")
    description = {"modalities": ["flair", "t1ce", "t2"], "outputs": "WT, TC, ET"}
    description |= {"normalisation": NORMALISATION, "orientation": "LPS"}
    description["keras"] = keras.__version__
    write_json(tmp_path / "model.json", description)
    before = predict_case(tmp_path, case)
    gain = tune_models([tmp_path], [[case]])
    assert gain["tuned"].mean() > gain["plain"].mean() + 0.1
    noted = load_model(tmp_path).description["decoding"]
    assert min(noted["thresholds"]) < 0.5
    after = predict_case(tmp_path, case)
    assert (after > 0).sum() > (before > 0).sum()
    plain = predict_case(tmp_path, case, thresholds=(0.5, 0.5, 0.5), min_et_voxels=0)
    np.testing.assert_array_equal(plain, before)


def test_F06_predict_cases_writes_files_that_lie_over_the_scans(tmp_path, case):
    write_case(tmp_path / "raw", "blind", seed=4, seg_name=None, suffix=".nii.gz")
    cases = find_cases(tmp_path / "raw")
    oracle(output=3).save(tmp_path / "model.keras")
    paths = predict_cases(tmp_path / "model.keras", cases, tmp_path / "out", flips=True)
    assert [path.name for path in paths] == ["blind.nii.gz", "toy.nii.gz"]
    for one, path in zip(cases, paths, strict=True):
        segmentation, affine = load_labels(path)
        np.testing.assert_array_equal(affine, load_case(one)[2])
        np.testing.assert_array_equal(segmentation, predict_case(oracle(output=3), one))


def test_models_that_do_not_fit_are_refused(case):
    five = pointwise_model(np.zeros((5, 4)), np.zeros(4))
    with pytest.raises(ValueError, match="5 channels; say which"):
        predict_case(five, case)
    four = pointwise_model(np.zeros((4, 4)), np.zeros(4))
    assert predict_case(four, case).shape == SHAPE
    with pytest.raises(ValueError, match="4 channels"):
        predict_case(four, case, modalities=("flair", "t1"))
    fixed = pointwise_model(np.zeros((3, 4)), np.zeros(4), size=8)
    with pytest.raises(ValueError, match="takes patches"):
        predict_case(fixed, case, patch_shape=(4, 4, 4))
    with pytest.raises(ValueError, match="expected .batch, X, Y, Z, 3."):
        predict_probabilities(unet((8, 8, 3), depth=2), np.zeros((8, 8, 8, 3)))
    with pytest.raises(ValueError, match="toy: the model's output is NaN"):
        predict_case(pointwise_model(np.full((3, 4), np.nan), np.zeros(4)), case)


def test_load_model_takes_a_file_or_a_run_folder(tmp_path):
    oracle().save(tmp_path / "best.keras")
    assert load_model(tmp_path).output_shape == oracle().output_shape
    assert not load_model(str(tmp_path / "best.keras")).jit_compile


def test_F01_load_model_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="train one first"):
        load_model(tmp_path / "none.keras")
    with pytest.raises(ValueError, match="convert it"):
        load_model(tmp_path / "old.h5")
    page = tmp_path / "page.keras"
    page.write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="HTML page"):
        load_model(page)
    page.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="damaged or no Keras model"):
        load_model(page)
    with zipfile.ZipFile(page, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(page)


def test_F02_load_model_runs_no_code(tmp_path):
    target = tmp_path / "written"

    def write(x, path=str(target)):
        open(path, "w").close()
        return x

    inputs = keras.Input((2,))
    model = keras.Model(inputs, layers.Lambda(write)(inputs))
    assert target.exists()
    target.unlink()
    model.save(tmp_path / "code.keras")
    with pytest.raises(ValueError, match="holds code"):
        load_model(tmp_path / "code.keras")
    assert not target.exists()


def test_F01_two_hundred_damaged_models_are_refused_or_equal(tmp_path):
    path = tmp_path / "model.keras"
    model = unet((8, 8, 8, 3), filters=2, depth=1)
    model.save(path)
    good, refused = path.read_bytes(), 0
    rng = np.random.default_rng(1)
    for n in range(200):
        damaged = bytearray(good)
        place = int(rng.integers(len(good)))
        if n % 4:
            damaged[place] ^= 1 << rng.integers(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        try:
            found = load_model(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        for value, expected in zip(
            found.get_weights(), model.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(value, expected)
    assert refused > 100  # the others hit what nothing reads, such as dates


DESCRIPTION = {
    "modalities": ["flair", "t1ce", "t2"],
    "outputs": "labels 0..3",
    "normalisation": NORMALISATION,
    "orientation": "LPS",
    "keras": keras.__version__,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ["flair", "t1"]}, "channels in: 2, found 3"),
        ({"outputs": "WT, TC, ET"}, "channels out: 3, found 4"),
        ({"normalisation": "0..255"}, "normalisation: 0..255"),
        ({"keras": "2.15.0"}, "install keras==2.15.0"),
    ],
)
def test_F03_a_model_that_its_description_does_not_fit(tmp_path, change, message):
    oracle().save(tmp_path / "best.keras")
    write_json(tmp_path / "model.json", DESCRIPTION | change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_F03_the_modalities_are_fed_in_the_order_noted(tmp_path, case, capsys):
    oracle().save(tmp_path / "best.keras")
    noted = {"modalities": ["t2", "flair", "t1"], "keras": "3.0.0"}
    write_json(tmp_path / "model.json", DESCRIPTION | noted)
    model = load_model(tmp_path)
    assert "made by Keras 3.0.0" in capsys.readouterr().out
    expected = predict_case(oracle(), case, modalities=("t2", "flair", "t1"))
    np.testing.assert_array_equal(predict_case(model, case), expected)
    assert not np.array_equal(expected, predict_case(oracle(), case))


def test_F04_another_spacing_is_refused(tmp_path):
    affine = AFFINE @ np.diag([2, 1, 1, 1])
    write_case(tmp_path, "wide", affine=affine)
    with pytest.raises(BratsDataError, match=r"wide: voxels of \[2.0, 1.0, 1.0\] mm"):
        predict_case(oracle(), find_cases(tmp_path)[0])


def test_windows_are_of_the_shape_that_is_noted_beside_the_model(tmp_path, case):
    write_json(tmp_path / "model.json", {**DESCRIPTION, "patch_shape": [8, 8, 8]})
    sided_model().save(tmp_path / "best.keras")
    model = load_model(tmp_path)
    windows = predict_case(sided_model(), case, patch_shape=(8, 8, 8))
    np.testing.assert_array_equal(predict_case(model, case), windows)
    whole = predict_case(sided_model(), case)
    assert (whole != windows).any()
    np.testing.assert_array_equal(
        predict_case(model, case, patch_shape=(24, 24, 16)), whole
    )

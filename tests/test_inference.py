"""Prediction: on the scan's own grid, by a model that knows its channels."""

import json
import shutil
import zipfile
from dataclasses import replace

import keras
import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, SHAPE, toy_volumes, tree, write_case
from keras import layers

from brats_utils import files
from brats_utils.cases import BratsDataError, find_cases, load_case
from brats_utils.evaluation import (
    score_cases,
    store_description,
    tune_decoding,
    tune_model,
)
from brats_utils.inference import (
    TrainedModel,
    decode_probabilities,
    load_model,
    predict_case,
    predict_cases,
    predict_probabilities,
    predict_scan,
)
from brats_utils.labels import REGIONS
from brats_utils.model import read_model, size_factor, unet, write_model
from brats_utils.nifti import load_labels, read_volume, save_volume, to_lps
from brats_utils.prepare import prepare_case
from brats_utils.split import name_images
from brats_utils.volumes import NORMALISATION

DESCRIPTION = {
    "modalities": ["flair", "t1ce", "t2"],
    "outputs": "labels 0..3",
    "normalisation": NORMALISATION,
    "orientation": "LPS",
    "keras": keras.__version__,
}


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
    whole, _ = predict_probabilities(model, image)
    slid, _ = predict_probabilities(model, image, patch_shape=(8, 4, 6))
    fixed, _ = predict_probabilities(pointwise_model(kernel, bias, size=8), image)
    flipped, _ = predict_probabilities(model, image, flips=True)
    for probabilities in (whole, slid, fixed, flipped):
        np.testing.assert_allclose(probabilities, by_hand, atol=1e-5)


def test_flips_average_mirror_images_into_a_symmetric_answer():
    image = np.random.default_rng(0).normal(size=(6, 5, 4, 3)).astype(np.float32)
    answer, _ = predict_probabilities(sided_model(), image, flips=True)
    mirrored, _ = predict_probabilities(sided_model(), image[::-1], flips=True)
    np.testing.assert_allclose(mirrored[::-1], answer, atol=1e-6)
    plain, _ = predict_probabilities(sided_model(), image)
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
    assert predict_probabilities(model, image)[0].shape == (9, 17, 5, 4)


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
    each = [predict_probabilities(model, image, flips=True)[0] for model in models]
    mean, spread = predict_probabilities(models, image, flips=True)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_allclose(spread, np.std(each, axis=0).max(-1), atol=1e-3)


def test_uncertainty_is_written_on_the_scans_grid(tmp_path, case):
    out = tmp_path / "out"
    predict_cases(sided_model(), [case], out, flips=True, uncertainty=True)
    written = nib.load(out / "uncertainty" / "toy.nii.gz")
    segmentation, spread = predict_case(
        sided_model(), case, flips=True, uncertainty=True
    )
    np.testing.assert_array_equal(written.affine, load_case(case)[2])
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), spread)
    np.testing.assert_array_equal(load_labels(out / "toy.nii.gz")[0], segmentation)
    assert 0 < spread.max() <= 0.5  # the model prefers a side, its mirror the other
    outside = ~load_case(case)[0].any(axis=-1)
    assert outside.any() and not spread[outside].any()
    same = predict_case(oracle(), case, flips=True, uncertainty=True)[1]
    assert same.max() < 1e-3  # a voxel alone has no side


def test_a_tuned_decoding_is_stored_and_used(tmp_path, case):
    """A shy model: its tumour lies below 0.5 and is found by lower thresholds."""
    kernel, bias = np.zeros((3, 3)), np.full(3, -2.0)
    kernel[0] = 0.35
    shy = pointwise_model(kernel, bias, activation="sigmoid")
    path = tmp_path / "shy.keras"
    write_model(shy, path, {**DESCRIPTION, "outputs": "WT, TC, ET"})
    before = predict_case(path, case)
    predict_cases(path, [case], tmp_path / "out")
    gain = tune_model(path, [case])
    assert gain["tuned"].mean() > gain["plain"].mean() + 0.1
    noted = load_model(path).description["decoding"]
    assert min(noted["thresholds"]) < 0.5
    after = predict_case(path, case)
    assert (after > 0).sum() > (before > 0).sum()
    (written,) = predict_cases(path, [case], tmp_path / "out")
    np.testing.assert_array_equal(load_labels(written)[0], after)
    plain = predict_case(path, case, thresholds=(0.5, 0.5, 0.5), min_et_voxels=0)
    np.testing.assert_array_equal(plain, before)


def test_F06_predict_cases_writes_files_that_lie_over_the_scans(tmp_path, case):
    write_case(tmp_path / "raw", "blind", seed=4, seg_name=None, suffix=".nii.gz")
    cases = find_cases(tmp_path / "raw")
    described = {**DESCRIPTION, "outputs": "WT, TC, ET"}
    write_model(oracle(output=3), tmp_path / "model.keras", described)
    paths = predict_cases(tmp_path / "model.keras", cases, tmp_path / "out", flips=True)
    assert [path.name for path in paths] == ["blind.nii.gz", "toy.nii.gz"]
    for one, path in zip(cases, paths, strict=True):
        segmentation, affine = load_labels(path)
        np.testing.assert_array_equal(affine, load_case(one)[2])
        np.testing.assert_array_equal(segmentation, predict_case(oracle(output=3), one))


def test_models_that_do_not_fit_are_refused(case):
    five = pointwise_model(np.zeros((5, 4)), np.zeros(4))
    with pytest.raises(ValueError, match="5 channels.*say which"):
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
    assert load_model(tmp_path).model.output_shape == oracle().output_shape
    assert not load_model(str(tmp_path / "best.keras")).model.jit_compile


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
    with pytest.raises(ValueError, match="contains code"):
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
            found.model.get_weights(), model.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(value, expected)
    assert refused > 100  # the others hit what nothing reads, such as dates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ["flair", "t1"]}, "channels in: 2, found 3"),
        ({"outputs": "WT, TC, ET"}, "channels out: 3, found 4"),
        ({"normalisation": "0..255"}, "normalisation: 0..255"),
        ({"modalities": None}, "channels in: 0, found 3"),
    ],
)
def test_F03_a_model_that_its_description_does_not_fit(tmp_path, change, message):
    write_described(oracle(), tmp_path / "best.keras", DESCRIPTION | change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_F03_a_model_of_another_keras(tmp_path):
    old = DESCRIPTION | {"keras": "2.15.0"}
    write_described(oracle(), tmp_path / "best.keras", old)
    with pytest.raises(ValueError, match="install keras==2.15.0"):
        load_model(tmp_path)


def test_F03_the_modalities_are_fed_in_the_described_order(tmp_path, case):
    described = {"modalities": ["t2", "flair", "t1"], "keras": "3.0.0"}
    write_described(oracle(), tmp_path / "best.keras", DESCRIPTION | described)
    with pytest.warns(UserWarning, match="made by Keras 3.0.0"):
        model = load_model(tmp_path)
    expected = predict_case(oracle(), case, modalities=("t2", "flair", "t1"))
    np.testing.assert_array_equal(predict_case(model, case), expected)
    assert not np.array_equal(expected, predict_case(oracle(), case))


def test_F04_another_spacing_is_refused(tmp_path):
    affine = AFFINE @ np.diag([2, 1, 1, 1])
    write_case(tmp_path, "wide", affine=affine)
    with pytest.raises(BratsDataError, match=r"its voxel size is \[2.0, 1.0, 1.0\] mm"):
        predict_case(oracle(), find_cases(tmp_path)[0])


def test_windows_are_of_the_shape_in_the_description(tmp_path, case):
    described = {**DESCRIPTION, "patch_shape": [8, 8, 8]}
    write_model(sided_model(), tmp_path / "best.keras", described)
    model = load_model(tmp_path)
    windows = predict_case(sided_model(), case, patch_shape=(8, 8, 8))
    np.testing.assert_array_equal(predict_case(model, case), windows)
    assert not np.array_equal(windows, predict_case(sided_model(), case))


def write_described(model, path, description):
    """Write a model whose file describes it, Keras's version included, as given."""
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("brats.json", json.dumps(description))


def test_I4_a_model_file_copied_alone_knows_what_it_needs(tmp_path, case):
    described = {
        **DESCRIPTION,
        "modalities": ["t1", "t1ce", "t2"],
        "train_cases": ["a"],
    }
    write_model(oracle(), tmp_path / "best.keras", described)
    (tmp_path / "elsewhere").mkdir()
    path = shutil.copy(tmp_path / "best.keras", tmp_path / "elsewhere" / "mine.keras")
    expected = predict_case(oracle(), case, modalities=("t1", "t1ce", "t2"))
    np.testing.assert_array_equal(predict_case(path, case), expected)
    assert load_model(path).description["train_cases"] == ["a"]
    keras.models.load_model(path, safe_mode=True)  # Keras reads it as ever


def test_I4_a_model_without_description_needs_modalities(tmp_path, case):
    path = tmp_path / "foreign.keras"
    oracle().save(path)
    with pytest.raises(ValueError, match=r"foreign.keras.*3 channels.*modalities=\("):
        predict_case(path, case)
    with pytest.raises(ValueError, match="modalities"):
        predict_cases(path, [case], tmp_path / "out")
    found = predict_case(path, case, modalities=("flair", "t1ce", "t2"))
    np.testing.assert_array_equal(found, predict_case(oracle(), case))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', "{}"])
def test_I4_a_damaged_description_is_refused(tmp_path, text):
    path = tmp_path / "model.keras"
    oracle().save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("brats.json", text)
    with pytest.raises(ValueError, match="model.keras"):
        load_model(path)


def test_I4_a_model_file_alone_can_be_tuned(tmp_path, case):
    path = tmp_path / "best.keras"  # copied out of the folder of its run
    write_model(oracle(), path, DESCRIPTION)
    tune_model(path, [case])
    assert "thresholds" in load_model(path).description["decoding"]
    foreign = tmp_path / "foreign.keras"
    oracle().save(foreign)
    before = foreign.read_bytes()
    with pytest.raises(ValueError, match="no .keras file with a description"):
        tune_model(foreign, [case], modalities=("flair", "t1ce", "t2"))
    assert foreign.read_bytes() == before


def test_H1_label_maps_are_written_to_no_folder_of_others(tmp_path, case):
    truths = tmp_path / "set" / "labelsTr"
    truths.mkdir(parents=True)
    (truths / "toy.nii.gz").write_bytes(b"the truth")
    before = tree(tmp_path)
    scans = case.images["flair"].parent
    for folder in (truths, scans, scans / "out", tmp_path / "raw"):
        with pytest.raises(ValueError, match="choose another"):
            predict_cases(oracle(), [case], folder)
    assert tree(tmp_path) == before


def test_H1_a_label_map_of_the_user_among_predictions_stays(tmp_path, cases):
    predict_cases(oracle(), cases[:1], tmp_path / "out")
    (tmp_path / "out" / "case1.nii.gz").write_bytes(b"drawn by hand")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="case1.nii.gz"):
        predict_cases(oracle(), cases[:2], tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"modalities": ("FLAIR", "t1ce", "t2")},
        {"modalities": ("flair",)},
        {"patch_shape": (8, 8)},
        {"patch_shape": (0, 8, 8)},
        {"thresholds": (0.5,)},
    ],
)
def test_H2_a_wrong_option_leaves_former_predictions_usable(tmp_path, cases, wrong):
    predict_cases(oracle(), cases, tmp_path / "out")
    before, (name,) = tree(tmp_path / "out"), wrong
    with pytest.raises(ValueError, match=name):
        predict_cases(oracle(), cases, tmp_path / "out", **wrong)
    assert tree(tmp_path / "out") == before


@pytest.fixture
def cases(tmp_path):
    for number in range(3):
        write_case(tmp_path / "raw", f"case{number}", seed=number)
    return find_cases(tmp_path / "raw")


def watched(model, stop_at=None):
    """Return a model that notes each image it predicts, and may be interrupted."""
    predict, seen = model.predict_on_batch, []

    def note(x):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(x)
        return predict(x)

    model.predict_on_batch = note
    return model, seen


def test_H5_old_and_new_predictions_are_not_scored_together(tmp_path, cases):
    out = tmp_path / "out"
    predict_cases(oracle(), cases, out)
    first = score_cases(out, cases)
    with pytest.raises(KeyboardInterrupt):
        predict_cases(watched(sided_model(), stop_at=1)[0], cases, out)
    with pytest.raises(ValueError, match="case1, case2"):
        score_cases(out, cases)
    assert len(score_cases(out, cases[:1])) == 1
    predict_cases(sided_model(), cases, out)
    assert not score_cases(out, cases).equals(first)


def test_a_bad_scan_does_not_stop_the_others(tmp_path, cases):
    out, (model, seen) = tmp_path / "out", watched(oracle())
    path = cases[0].images["t2"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    cases[1].images["flair"].rename(tmp_path / "flair.nii")
    with pytest.raises(BratsDataError, match="2 of 3 cases could not") as error:
        predict_cases(model, cases, out)
    assert "case0, " in str(error.value) and "case1_flair.nii" in str(error.value)
    assert (out / "case2.nii.gz").is_file() and len(seen) == 1
    path.write_bytes(whole)
    (tmp_path / "flair.nii").rename(cases[1].images["flair"])
    predict_cases(model, cases, out)
    assert len(seen) == 3  # case2 was not predicted again


def test_J4_what_cannot_be_predicted_is_refused_before_anything_is_written(
    tmp_path, cases
):
    for wrong, told in (
        ({"flips": "yes"}, "flips is 'yes', expected True or False"),
        ({"uncertainty": 1}, "uncertainty is 1"),
        ({"patch_shape": (8, 8)}, "patch_shape is"),
        ({"thresholds": (0.5, 0.5)}, "thresholds is .*three numbers from 0 to 1"),
        ({"thresholds": (0.5, 0.5, float("nan"))}, "thresholds is"),
        ({"min_et_voxels": -1}, "min_et_voxels is -1"),
        ({"min_et_voxels": 2.5}, "min_et_voxels is 2.5"),
        ({"modalities": ("FLAIR", "T1CE", "T2")}, "modalities is .*'flair'"),
        ({"modalities": "flair"}, "modalities"),
        ({"fips": True}, "fips.*expected some of .*flips"),
        ({"cases": [*cases, cases[0]]}, "cases is .*each id once"),
        ({"cases": ["case0"]}, "case is 'case0', expected a Case"),
        ({"model": []}, "model is .*at least one"),
        ({"model": None}, "model is None, expected a path"),
        ({"out_dir": None}, "out_dir.* is None, expected a path"),
    ):
        call = {"model": oracle(), "cases": cases, "out_dir": tmp_path / "out"}
        with pytest.raises(ValueError, match=told):
            predict_cases(**{**call, **wrong})
    assert not (tmp_path / "out").exists()


def test_J2_a_background_that_is_not_0_is_told_when_predicting(cases):
    path = cases[0].images["t1ce"]
    noise = np.random.default_rng(0).uniform(1e-4, 1e-3, SHAPE).astype(np.float32)
    volume = np.asarray(nib.load(path).dataobj) + noise
    nib.save(nib.Nifti1Image(volume, AFFINE), path)
    with pytest.warns(UserWarning, match="case0: 0.0% of its voxels.*brain mask"):
        predict_case(oracle(), cases[0])


def test_R5_a_model_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "bomb.keras"
    write_model(sided_model(), path, DESCRIPTION)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**8))
    with pytest.raises(ValueError, match="would unpack to 100 MB"):
        load_model(path)


def test_H5_what_a_model_has_predicted_is_not_predicted_again(tmp_path, cases):
    out = tmp_path / "out"
    model, seen = watched(oracle())

    def count(cases, **options):
        """Return how many cases were predicted."""
        before = len(seen)
        predict_cases(model, cases, out, **options)
        return len(seen) - before

    assert count(cases[:2]) == 2
    assert count(cases) == 1
    (out / "case0.nii.gz").write_bytes(b"damaged")
    assert count(cases) == 1
    write_case(tmp_path / "again", "case2", seed=9)  # the same id, another scan
    cases = [*cases[:2], *find_cases(tmp_path / "again")]
    assert count(cases) == 1
    assert count(cases, thresholds=np.full(3, 0.4)) == 3
    predict_cases(sided_model(), cases, out)
    assert count(cases) == 3


def test_H5_a_description_that_changes_the_prediction_counts_too(tmp_path, cases):
    model, path = sided_model(), tmp_path / "model.keras"
    for changed in ({}, {"patch_shape": [8, 8, 8]}, {"modalities": ["t1", "t2", "t1"]}):
        write_model(model, path, {**DESCRIPTION, **changed})
        (written, *_) = predict_cases(path, cases, tmp_path / "out")
        expected = predict_case(path, cases[0])
        np.testing.assert_array_equal(load_labels(written)[0], expected)


def test_H5_predictions_of_other_scans_are_not_scored(tmp_path, cases):
    predict_cases(oracle(), cases, tmp_path / "out")
    write_case(tmp_path / "others", "case1", seed=7)
    with pytest.raises(ValueError, match="case1"):
        score_cases(tmp_path / "out", find_cases(tmp_path / "others"))


def test_H1_a_label_map_corrected_by_hand_is_kept_and_not_scored(tmp_path, cases):
    out = tmp_path / "out"
    predict_cases(oracle(), cases, out)
    path = out / "case1.nii.gz"
    volume, header = read_volume(path)
    volume = volume.copy()
    volume[10:14] = 1
    save_volume(volume, path, like=header)
    corrected = path.read_bytes()
    for model in (oracle(), sided_model()):
        with pytest.raises(ValueError, match="case1.nii.gz was changed after"):
            predict_cases(model, cases, out)
        assert path.read_bytes() == corrected
    with pytest.raises(ValueError, match=r"changed since.*case1"):
        score_cases(out, cases)
    path.rename(tmp_path / path.name)
    predict_cases(oracle(), cases, out)
    assert len(score_cases(out, cases)) == len(cases)


def test_E1_killed_before_a_file_is_noted_the_prediction_resumes(tmp_path, cases):
    out = tmp_path / "out"
    predict_cases(oracle(), cases, out)
    before = tree(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["case1.nii.gz"] = None
    del manifest["cases"]["case1"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    predict_cases(oracle(), cases, out)
    assert tree(out) == before


def test_E1_a_prediction_killed_while_it_replaces_another_resumes(
    tmp_path, cases, monkeypatch
):
    predict_cases(sided_model(), cases, tmp_path / "out")
    monkeypatch.setattr(files.OutputFolder, "note_case", None)  # fails, is not saved
    monkeypatch.setattr(files.OutputFolder, "__exit__", lambda self, *a: release(self))
    with pytest.raises(TypeError):
        predict_cases(oracle(), cases, tmp_path / "out")
    monkeypatch.undo()
    predict_cases(oracle(), cases, tmp_path / "out")
    assert len(score_cases(tmp_path / "out", cases)) == 3


def release(output):
    output._lock.release()


@pytest.mark.parametrize("output", [3, 4])
def test_outputs_that_are_no_probabilities_are_refused(case, output):
    model = pointwise_model(np.ones((3, output)), np.ones(output), activation=None)
    with pytest.raises(ValueError, match="expected probabilities: end it with"):
        predict_case(model, case)


def test_J2_strange_scans_are_told_when_predicting(cases):
    path = cases[0].images["t1ce"]
    nib.save(nib.load(cases[0].images["flair"]), path)
    with pytest.warns(UserWarning, match="case0: two of its modalities are the same"):
        predict_case(oracle(), cases[0])


def test_softmax_and_sigmoids_decode_to_brats_labels():
    labels = np.eye(4)[[0, 1, 2, 3]]
    assert decode_probabilities(labels).tolist() == [0, 1, 2, 4]
    # Columns are WT, TC, ET; a region outside the one round it does not count.
    regions = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]]
    assert decode_probabilities(regions).tolist() == [0, 2, 1, 4, 0, 2]
    with pytest.raises(ValueError, match="got 5"):
        decode_probabilities(np.zeros((2, 5)))


def test_regions_are_nested_whatever_the_probabilities():
    rng = np.random.default_rng(0)
    for _ in range(200):
        probabilities = rng.random((6, 6, 6, 3))
        probabilities[:3] = np.sort(probabilities[:3], axis=-1)  # p(ET) > p(TC) > p(WT)
        thresholds = rng.uniform(0.2, 0.8, 3)
        found = decode_probabilities(probabilities, thresholds=list(thresholds))
        above = probabilities > thresholds
        assert not (np.isin(found, REGIONS["ET"]) & ~above.all(axis=-1)).any()
        assert not (np.isin(found, REGIONS["TC"]) & ~above[..., :2].all(axis=-1)).any()
        np.testing.assert_array_equal(found > 0, above[..., 0])


def sure_case(truth, inside=0.9, outside=0.1):
    """Return probabilities of the regions that fit a truth, and the truth."""
    truth = np.asarray(truth)
    regions = [np.isin(truth, values) for values in REGIONS.values()]
    return np.where(np.stack(regions, -1), inside, outside), truth


def test_nothing_is_tuned_where_nothing_is_better():
    decoding, gain = tune_decoding([sure_case([0, 0, 1, 2, 4, 4])])
    assert decoding == {}
    assert (gain == 1).all(axis=None)


def test_a_threshold_follows_the_probabilities_of_its_region():
    probabilities, truth = sure_case([0, 0, 0, 1, 2, 4, 4, 4])
    probabilities[truth == 4, 2] = 0.4
    decoding, gain = tune_decoding([(probabilities, truth)])
    assert decoding["thresholds"][:2] == [0.5, 0.5]
    assert 0.1 < decoding["thresholds"][2] < 0.4
    assert gain.loc["ET"].tolist() == [0, 1]
    found = decode_probabilities(probabilities, **decoding)
    np.testing.assert_array_equal(found, truth)


def test_stray_enhancing_voxels_are_worth_a_least_volume():
    truth = np.repeat([0, 1, 2], 500)
    stray = sure_case(truth)[0]
    stray[500:530, 2] = 0.95
    many = sure_case(np.repeat([0, 1, 4], 500))
    decoding, gain = tune_decoding([(stray, truth), many])
    assert decoding["min_et_voxels"] == 50
    assert gain.loc["ET"].tolist() == [0.5, 1]


def test_islands_are_dropped_beside_the_largest_component():
    truth = np.zeros((20, 8, 8), int)
    truth[1:5, 1:5, 1:5], truth[1:3, 1:3, 1:3] = 2, 4  # 64 voxels
    truth[8:11, 1:4, 1:4], truth[11, 4, 4] = 1, 2  # 28: corners connect
    truth[15, 5, 5] = 4
    probabilities = sure_case(truth)[0]
    for share, kept in ((0, 93), (1 / 64, 93), (0.02, 92), (28 / 64, 92), (0.44, 64)):
        found = decode_probabilities(probabilities, min_island=share)
        assert np.count_nonzero(found) == kept
        np.testing.assert_array_equal(found, np.where(found > 0, truth, 0))
    # What is dropped does not count as enhancing tumour.
    found = decode_probabilities(probabilities, min_island=0.1, min_et_voxels=9)
    assert not (found == 4).any()
    nothing = decode_probabilities(np.zeros((4, 4, 4, 3)), min_island=0.1)
    assert not nothing.any()


def test_islands_are_tuned_too():
    truth = np.zeros((20, 8, 8), int)
    truth[1:5, 1:5, 1:5] = 4
    probabilities = sure_case(truth)[0]
    probabilities[8:10, 1:3, 1:3] = 0.95  # as sure as the tumour
    decoding, gain = tune_decoding([(probabilities, truth)])
    assert decoding["min_island"] == 0.2  # 8 voxels of 64: the least that drops them
    assert decoding["thresholds"] == [0.5] * 3
    assert (gain["tuned"] == 1).all() and (gain["plain"] < 1).all()


def test_labels_are_added_up_over_the_regions():
    labels = [[0.4, 0.3, 0.1, 0.2], [0.6, 0.2, 0.1, 0.1]]
    assert decode_probabilities(labels).tolist() == [0, 0]
    found = decode_probabilities(labels, thresholds=[0.5, 0.4, 0.3])
    assert found.tolist() == [1, 0]


def test_labels_are_tuned_against_the_decoding_that_they_have():
    # Background is the likeliest label of the last five voxels, and right, although the
    # other labels together, whole tumour, have more than one half.
    probabilities = np.tile([0.02, 0.01, 0.96, 0.01], (10, 1))
    probabilities[5:] = [0.45, 0.2, 0.15, 0.2]
    decoding, gain = tune_decoding([(probabilities, np.repeat([2, 0], 5))])
    assert decoding == {}
    assert (gain == 1).all(axis=None)
    # Here the tumour is less likely than background, but far more than elsewhere.
    hidden = np.tile([0.45, 0.3, 0.05, 0.2], (10, 1))
    hidden[5:] = [0.98, 0.01, 0.01, 0]
    decoding, gain = tune_decoding([(hidden, np.repeat([1, 0], 5))])
    assert decoding["thresholds"][1] < 0.5
    assert gain.loc["TC"].tolist() == [0, 1]


def test_of_two_better_thresholds_the_best_is_taken():
    # Four false voxels at 0.525, one at 0.775: the last gains less than LEAST_GAIN.
    likely = np.r_[np.full(1000, 0.95), [0.525, 0.525, 0.525, 0.525, 0.775]]
    regions = np.stack([likely] * 3, axis=-1)
    truth = np.r_[np.full(1000, 4), np.zeros(5)].astype(np.uint8)
    decoding, gain = tune_decoding([(regions, truth)])
    assert decoding["thresholds"][0] >= 0.8 and gain.loc["WT", "tuned"] == 1


def test_thresholds_may_be_an_array():
    regions = [[0.9, 0.6, 0.6]]
    assert decode_probabilities(regions, thresholds=np.full(3, 0.7)).tolist() == [2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modalities": ["flair", "t1ce", "adc"]}, "adc.*say which of"),
        ({"modalities": 3}, "channels in: 0, found 3"),
        ({"outputs": ["labels"]}, "channels out"),
        ({"patch_shape": "large"}, "patch_shape is 'large'"),
        ({"decoding": 5}, "decoding"),
        ({"decoding": {"thresholds": [9]}}, r"thresholds is \[9\]"),
    ],
)
def test_I4_an_edited_description_is_refused_before_anything_is_written(
    tmp_path, case, change, told
):
    path = tmp_path / "model.keras"
    write_described(oracle(), path, {**DESCRIPTION, **change})
    with pytest.raises(ValueError, match=told):
        predict_cases(path, [case], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_I4_models_that_mean_other_channels_or_outputs_are_no_ensemble(tmp_path, case):
    others = {"modalities": ["t1", "t1ce", "t2"]}, {"outputs": "WT, TC, ET"}
    write_model(oracle(), tmp_path / "0.keras", DESCRIPTION)
    write_model(oracle(), tmp_path / "1.keras", {**DESCRIPTION, **others[0]})
    write_model(oracle(output=3), tmp_path / "2.keras", {**DESCRIPTION, **others[1]})
    for names, told in (("01", "modalities is .*same for all"), ("02", "outputs is")):
        models = [tmp_path / f"{name}.keras" for name in names]
        with pytest.raises(ValueError, match=told):
            predict_cases(models, [case], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_H5_numbers_of_numpy_are_options_as_others_are(tmp_path, cases):
    model, seen = watched(oracle())
    for number in (float, np.float32):
        options = {"thresholds": [number(0.5)] * 3, "min_et_voxels": np.int64(5)}
        predict_cases(model, cases, tmp_path / "out", **options)
    assert len(seen) == 3


def test_a_scan_whose_prediction_is_nan_does_not_stop_the_others(tmp_path, cases):
    model, seen = watched(oracle())
    predict = model.predict_on_batch
    model.predict_on_batch = lambda x: predict(x) * (np.nan if len(seen) == 1 else 1)
    with pytest.raises(BratsDataError, match="1 of 3 cases .*case0: .* NaN"):
        predict_cases(model, cases, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_J3_patches_that_the_network_cannot_take_are_refused_at_once(tmp_path, case):
    with pytest.raises(ValueError, match=r"patch_shape is \(7, 8, 8\).*multiples of 2"):
        predict_cases(
            unet((None, None, None, 3), filters=2, depth=2),
            [case],
            tmp_path / "out",
            patch_shape=(7, 8, 8),
        )
    assert not (tmp_path / "out").exists()


def test_J4_tuning_needs_labelled_cases_and_writes_nothing_without(tmp_path, case):
    path = tmp_path / "model.keras"
    write_model(oracle(), path, DESCRIPTION)
    before = path.read_bytes()
    write_case(tmp_path / "blind", "blind", seg_name=None)
    for wrong, told in (
        ({"cases": []}, r"cases is \[\], expected one"),
        ({"cases": find_cases(tmp_path / "blind")}, "no segmentation: blind"),
        ({"flip": True}, "flip.*expected some of .*flips"),
        ({"flips": "yes"}, "flips is 'yes'"),
    ):
        call = {"run_dir": path, "cases": [case], **wrong}
        with pytest.raises(ValueError, match=told):
            tune_model(**call)
    assert path.read_bytes() == before


def test_a_decoding_is_not_tuned_on_the_cases_of_the_training(tmp_path, cases):
    path = tmp_path / "model.keras"
    write_model(oracle(), path, {**DESCRIPTION, "train_cases": ["case1"]})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="for training; tune on others: case1"):
        tune_model(path, cases)
    assert path.read_bytes() == before


def test_cases_of_the_training_are_known_by_their_images(tmp_path, cases):
    row = prepare_case(cases[0], tmp_path / "one", crop_shape=None, min_labelled=0)
    known = {"train_cases": ["case1"], "train_images": sorted(name_images(row))}
    path = tmp_path / "model.keras"
    write_model(oracle(), path, {**DESCRIPTION, **known})
    copied = replace(cases[0], id="copied")
    with pytest.raises(ValueError, match="for training; tune on others: copi"):
        tune_model(path, [copied])
    tune_model(path, [cases[1]])  # of another set, where ids are the same


def test_the_phantom_weights_predict_without_another_file(tmp_path):
    write_case(tmp_path / "raw", "BraTS20_Training_001", seed=1)
    [case] = find_cases(tmp_path / "raw")
    trained = load_model("phantom")
    assert trained.description["modalities"] == ["flair", "t1", "t1ce", "t2"]
    assert trained.description["optional"] == ["t1"]
    assert not {"train_cases", "val_cases"} & {*trained.description}
    found = predict_case("phantom", case)
    np.testing.assert_array_equal(found, predict_case(trained, case))
    assert found.dtype == np.uint8 and {*np.unique(found)} <= {0, 1, 2, 4}
    [path] = predict_cases("phantom", [case], tmp_path / "out")
    np.testing.assert_array_equal(load_labels(path)[0], found)


OWN = ["flair", "t1ce", "t2"]


def test_an_optional_modality_is_left_out_where_a_case_lacks_it(tmp_path, tiny_weights):
    write_case(tmp_path / "raw", "BraTS20_Training_001", seed=1)
    [case] = find_cases(tmp_path / "raw")
    lacking = replace(case, images={name: case.images[name] for name in OWN})
    trained = load_model("phantom")
    narrow = TrainedModel(*read_model(tiny_weights, OWN))
    assert narrow.description["modalities"] == OWN and narrow.model.input_shape[-1] == 3
    with_t1 = predict_scan([trained], case).probabilities
    without = predict_scan([trained], lacking).probabilities
    assert np.abs(with_t1 - without).max() > 1e-3
    found = predict_scan([narrow], case).probabilities
    np.testing.assert_allclose(found, without, atol=1e-5)
    how = {"thresholds": (0.75, 0.5, 0.25), "min_island": 0.0}
    expected = predict_case("phantom", case, modalities=OWN, **how)
    [path] = predict_cases("phantom", [lacking], tmp_path / "out", **how)
    np.testing.assert_array_equal(load_labels(path)[0], expected)
    [path] = predict_cases("phantom", [case], tmp_path / "out", **how)  # now it has T1
    assert (expected != load_labels(path)[0]).any()
    expected = predict_case("phantom", case, **how)
    np.testing.assert_array_equal(load_labels(path)[0], expected)


def test_a_modality_that_is_not_optional_is_not_left_out(tmp_path, tiny_weights):
    write_case(tmp_path / "raw", "BraTS20_Training_001", seed=1)
    [case] = find_cases(tmp_path / "raw")
    images = {name: case.images[name] for name in ("flair", "t1", "t1ce")}
    with pytest.raises(BratsDataError, match="t2"):
        predict_case("phantom", replace(case, images=images))
    for wrong in (("flair", "t1", "t1ce"), [*OWN, "t2"], [OWN], "t1", 5):
        with pytest.raises(ValueError, match="modalities is .*takes .*flair"):
            predict_case("phantom", case, modalities=wrong)
    with pytest.raises(ValueError, match="case is None"):
        predict_case("phantom", None)
    trained = load_model("phantom")
    with pytest.raises(ValueError, match="modalities is .*takes .*, 't1', "):
        predict_case(trained, case, modalities=OWN)  # it is loaded with all of them
    odd = replace(trained, description={**trained.description, "optional": []})
    lacking = replace(case, images={name: case.images[name] for name in OWN})
    with pytest.raises(BratsDataError, match=r"\bt1\b"):  # one of two models needs T1
        predict_case([trained, odd], lacking)


def test_an_optional_modality_is_left_out_where_an_ensemble_lacks_it(
    tmp_path, tiny_weights
):
    write_case(tmp_path / "raw", "BraTS20_Training_001", seed=1)
    [case] = find_cases(tmp_path / "raw")
    narrow = TrainedModel(*read_model(tiny_weights, OWN))
    how = {"thresholds": (0.75, 0.5, 0.25), "min_island": 0.0}
    expected, phantom = predict_case(narrow, case, **how), load_model("phantom")
    for mixed in ([narrow, "phantom"], ["phantom", narrow], ["phantom", [narrow]]):
        np.testing.assert_array_equal(predict_case(mixed, case, **how), expected)
    found = predict_case([narrow.model, "phantom"], case, **how)
    np.testing.assert_array_equal(found, expected)
    assert (predict_case([phantom, "phantom"], case, **how) != expected).any()
    for mixed in ([narrow, phantom], [phantom, narrow]):  # it may have been changed
        with pytest.raises(ValueError, match="modalities is .*takes"):
            predict_case(mixed, case)


def test_the_phantom_weights_are_loaded_without_t1(tiny_weights):
    model, description = read_model(tiny_weights, OWN)
    found = load_model("phantom", OWN)
    assert found.description == description and description["modalities"] == OWN
    for ours, theirs in zip(found.model.weights, model.weights, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))
    turned = load_model("phantom", OWN[::-1]).model.weights[0]
    np.testing.assert_array_equal(np.array(turned)[..., ::-1, :], model.weights[0])
    with pytest.raises(ValueError, match="modalities is .*takes"):
        load_model("phantom", OWN[1:])


def test_the_phantom_weights_are_not_tuned_in_place(tmp_path):
    write_case(tmp_path / "raw", "BraTS20_Training_001", seed=1)
    [case] = find_cases(tmp_path / "raw")
    path = load_model("phantom").path
    before = path.read_bytes()
    with pytest.raises(ValueError, match="phantom"):
        tune_model("phantom", [case])
    assert path.read_bytes() == before


def test_I4_other_modalities_than_the_models_own_are_refused(tmp_path):
    write_case(tmp_path, "BraTS20_Training_001")
    (case,), trained = find_cases(tmp_path), load_model("phantom")
    own = ("flair", "t1", "t1ce", "t2")
    for others in (own[::-1], ("t1",) * 4, own[1:]):
        with pytest.raises(ValueError, match="modalities is .*takes .*flair"):
            predict_case(trained, case, modalities=others)
    found = predict_case(trained, case, modalities=own)
    np.testing.assert_array_equal(found, predict_case(trained, case))


@pytest.mark.parametrize("value", [1e6, 1e12, -1e6])
def test_J1_a_hot_voxel_is_refused_in_prediction_too(tmp_path, value):
    images, _ = toy_volumes(1, (48, 48, 48))
    folder = write_case(tmp_path, "BraTS20_Training_001", seed=1, shape=(48, 48, 48))
    values = images["t1ce"].astype(np.float32)
    values[20, 20, 20] = value
    path = folder / "BraTS20_Training_001_t1ce.nii"
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    (case,) = find_cases(tmp_path)
    with pytest.raises(BratsDataError, match="Training_001_t1ce.*voxel lies .* SD"):
        predict_case("phantom", case)


def test_H2_a_call_that_predicts_nothing_leaves_the_former_result(tmp_path, cases):
    out = tmp_path / "out"
    (tmp_path / "a").mkdir()
    first, second = oracle(), sided_model()
    predict_cases(first, cases, out, patch_shape=(8, 8, 8))
    expected = tree(out)
    damaged = tmp_path / "a" / "x_flair.nii"
    damaged.write_bytes(b"x")
    bad = replace(cases[0], images={**cases[0].images, "flair": damaged})
    for wrong in ([], iter(()), [bad]):
        with pytest.raises(ValueError):
            predict_cases(second, wrong, out, patch_shape=(8, 8, 8))
        assert tree(out) == expected
        assert len(score_cases(out, cases)) == 3
    with pytest.raises(ValueError, match="1 of 1 cases could not be predicted"):
        predict_cases(second, [bad], tmp_path / "new", patch_shape=(8, 8, 8))
    assert not (tmp_path / "new").exists()
    (out / "case9.nii.gz").write_bytes(b"mine")
    expected = tree(out)
    with pytest.raises(ValueError, match="holds other files"):
        other = replace(cases[0], id="case9")
        predict_cases(second, [other], out, patch_shape=(8, 8, 8))
    assert tree(out) == expected


def test_H5_an_uncertainty_of_another_model_does_not_remain(tmp_path, cases):
    out = tmp_path / "out"
    predict_cases(oracle(), cases, out, patch_shape=(8, 8, 8), uncertainty=True)
    assert list((out / "uncertainty").iterdir())
    predict_cases(sided_model(), cases, out, patch_shape=(8, 8, 8))
    assert not (out / "uncertainty").exists()


def test_H1_a_description_is_stored_in_keras_files_only(tmp_path):
    trained = load_model("phantom")
    before = trained.path.read_bytes()
    for path in (trained.path, None):
        with pytest.raises(ValueError, match="no .keras file"):
            store_description(replace(trained, path=path))
    assert trained.path.read_bytes() == before


def test_J4_cases_may_come_from_a_generator(tmp_path, cases):
    out = tmp_path / "out"
    paths = predict_cases(oracle(), (c for c in cases), out, patch_shape=(8, 8, 8))
    assert len(paths) == len(score_cases(out, (c for c in cases))) == 3


def test_a_tilde_in_the_output_is_the_home_folder(tmp_path, cases, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in predict_cases(oracle(), cases, "~/out", patch_shape=(8, 8, 8)):
        assert path.exists()


def test_A15_a_truth_on_another_grid_is_not_tuned_on(tmp_path, case):
    write_model(oracle(), tmp_path / "model.keras", DESCRIPTION)
    before = (tmp_path / "model.keras").read_bytes()
    moved = AFFINE.copy()
    moved[0, 3] += 5
    labels, _ = load_labels(case.segmentation)
    nib.save(nib.Nifti1Image(labels, moved), case.segmentation)
    with pytest.raises(BratsDataError, match="toy"):
        tune_model(tmp_path / "model.keras", [case])
    assert (tmp_path / "model.keras").read_bytes() == before


def test_I4_a_model_without_description_is_not_guessed_in_an_ensemble(tmp_path, case):
    write_model(oracle(), tmp_path / "ours.keras", DESCRIPTION)
    oracle().save(tmp_path / "foreign.keras")
    models = [tmp_path / "ours.keras", tmp_path / "foreign.keras"]
    with pytest.raises(ValueError, match="say which of"):
        predict_case(models, case)
    given = predict_case(models, case, modalities=("flair", "t1ce", "t2"))
    np.testing.assert_array_equal(given, predict_case(models[0], case))


@pytest.mark.parametrize("levels", [1, 5])
def test_J1_a_modality_with_few_grey_levels_is_not_predicted(case, levels):
    image, _, affine = load_case(case)
    brain = image[..., 0] > 0
    few = np.random.default_rng(0).integers(1, levels + 1, brain.shape) * brain
    nib.save(nib.Nifti1Image(few.astype(np.int16), affine), case.images["flair"])
    with pytest.raises(BratsDataError, match="grey levels are left"):
        predict_case(oracle(), case)


def test_a_subclassed_model_is_refused_in_plain_words(case):
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="functional keras.Model"):
        predict_case(Own(), case)


def test_I4_the_phantom_networks_own_model_keeps_its_channels(tmp_path):
    write_case(tmp_path, "BraTS20_Training_001")
    (case,) = find_cases(tmp_path)
    trained = load_model("phantom", ["t2", "t1ce", "flair"])
    options = {**trained.description["decoding"], "patch_shape": (96, 96, 96)}
    found = predict_case(trained.model, case, **options)
    np.testing.assert_array_equal(found, predict_case(trained, case))


def test_I4_a_modality_named_twice_fills_both_channels(case):
    model = keras.Sequential([keras.Input((None, None, None, 3)), layers.Softmax()])
    found = predict_scan(
        [TrainedModel(model, {})], case, modalities=("t2", "flair", "t2")
    )
    inside = found.scan.brain_mask[found.box]
    first, _, last = found.probabilities[inside].T
    np.testing.assert_array_equal(first, last)


def test_J3_patches_fit_every_axis_of_a_network_that_fixes_one(case, tmp_path):
    network = unet((None, None, 16, 3), filters=2, depth=2)
    for shape in ((8, 8, 8), (8, 7, 16)):
        told = r"patch_shape is .*takes patches of multiples of 2 in \(None, None, 16\)"
        with pytest.raises(ValueError, match=told):
            predict_cases(network, [case], tmp_path / "out", patch_shape=shape)
    assert not (tmp_path / "out").exists()
    image = np.zeros((20, 18, 12, 3), np.float32)
    found, _ = predict_probabilities(network, image, patch_shape=(8, 8, 16))
    assert found.shape == (20, 18, 12, 4)
    found, _ = predict_probabilities(network, np.zeros((20, 18, 16, 3), np.float32))
    assert found.shape == (20, 18, 16, 4)

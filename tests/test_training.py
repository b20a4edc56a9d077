"""Training: the loss falls, a run resumes bit for bit, foreign folders are refused."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import tree, write_case
from keras import ops

from brats_utils import training
from brats_utils.augment import flip
from brats_utils.cases import find_cases
from brats_utils.evaluation import tune_model
from brats_utils.files import OutputFolder
from brats_utils.generator import BratsGenerator
from brats_utils.inference import load_model, predict_case
from brats_utils.losses import (
    describe_object,
    dice_cross_entropy_loss,
    dice_focal_loss,
    dice_loss,
)
from brats_utils.model import (
    PHANTOM_WEIGHTS,
    has_gpu,
    model_table,
    read_model,
    unet,
    unet_cicek2016,
    write_model,
)
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset, split_folds
from brats_utils.training import plan_epochs, train

PATCHES = {"patch_shape": (8, 8, 8), "tumour_share": 1, "batch_size": 2}
REGIONS = ("WT", "TC", "ET")


class Recorder(BratsGenerator):
    """A generator that notes what Keras asks for, and may be stopped on the way."""

    fail_at = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def __getitem__(self, index):
        epoch, batch = self.epoch, super().__getitem__(index)
        self.seen.append((epoch, index, batch[0].tobytes()))
        return batch

    def on_epoch_end(self):
        if self.fail_at == self.epoch:  # after its batches, before its state is kept
            raise KeyboardInterrupt
        super().on_epoch_end()


def tiny_unet(filters=2, seed=1, depth=1):
    keras.utils.set_random_seed(seed)
    return unet((8, 8, 8, 3), filters=filters, depth=depth)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Three toy cases to learn from and one to validate."""
    root = tmp_path_factory.mktemp("toys")
    for seed in range(1, 5):
        write_case(root / "raw", f"BraTS20_Training_{seed:03}", seed=seed)
    prepare_dataset(root / "raw", root / "prepared", crop_shape=(16, 16, 8), jobs=1)
    split_dataset(root / "prepared", root / "split")
    return root / "split"


def data(split, **options):
    options = {**PATCHES, **options}
    return Recorder(split / "train", **options), Recorder(split / "val", **PATCHES)


def run(split, run_dir, epochs=4, *, model=None, train_data=None, **options):
    model = model or tiny_unet()
    default, val_data = data(split, augment=True)
    train_data, val_data = train_data or default, options.pop("val_data", val_data)
    options = {"learning_rate": 0.02, "validation_freq": 2, "verbose": False, **options}
    history = train(model, train_data, val_data, run_dir, epochs=epochs, **options)
    return model, history, train_data, val_data


@pytest.fixture(scope="module")
def finished(split, tmp_path_factory):
    """Four epochs, validated every second one."""
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, *run(split, run_dir)


def variables(run_dir):
    """Return what was saved of the model and its optimizer."""
    with np.load(run_dir / "last.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name[0] == "v"}


def assert_same_run(run_dir, history, finished):
    """Compare with an unbroken run: every bit of weights, optimizer and history."""
    expected, found = variables(finished[0]), variables(run_dir)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    histories = [table.drop(columns="seconds") for table in (history, finished[2])]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert not list(run_dir.glob(".writing-*"))


def test_the_loss_goes_down_and_the_history_says_so(finished):
    run_dir, _, history, *_ = finished
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    measured = ["loss"] + [f"dice_{region}" for region in REGIONS]
    expected = {"epoch", "seconds", "learning_rate", *measured}
    assert set(history) == expected | {f"val_{name}" for name in measured}
    # 4 epochs of 2 steps: one step of warm-up, then a cosine that ends at 0.
    assert history["learning_rate"].iloc[-1] == pytest.approx(0, abs=1e-8)
    assert (history["learning_rate"] <= 0.02).all()
    table = pd.read_csv(run_dir / "history.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(table, history, check_exact=True)


def test_validation_leaves_gaps(finished):
    history = finished[2]
    gaps = history["val_dice_WT"].isna().tolist()
    assert gaps == [True, False, True, False]


def test_keras_trains_on_each_epochs_batches(finished, split):
    again, _ = data(split, augment=True)
    for epoch in range(4):
        again.set_epoch(epoch)
        for index in range(len(again)):
            again[index]
    # Keras looks at the first batches once before it begins, to know their shapes. Its
    # threads load those of an epoch in any order, and hand them over in theirs.
    assert sorted(finished[3].seen[-8:]) == again.seen


def test_validation_patches_are_the_same_each_time(finished):
    val_data = finished[4]
    assert len(val_data.seen) >= 2 and len(set(val_data.seen)) == 1


def test_the_best_model_reloads_without_custom_objects(finished):
    run_dir, model, history, *_ = finished
    best = keras.models.load_model(run_dir / "best.keras", safe_mode=True)
    assert not best.compiled
    for mine, theirs in zip(best.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with zipfile.ZipFile(run_dir / "best.keras") as archive:
        assert b"brats_utils" not in archive.read("config.json")
    description = load_model(run_dir).description
    assert description["modalities"] == ["flair", "t1ce", "t2"]
    assert description["outputs"] == "labels 0..3"
    assert len(description["train_cases"]) == 3 and len(description["val_cases"]) == 1
    assert description["patch_shape"] == [8, 8, 8]
    assert description["precision"] == "float32"
    assert description["keras"] == keras.__version__


def test_a_finished_run_returns_its_best_weights(finished, split):
    run_dir, model, history, *_ = finished
    before = (run_dir / "last.npz").stat().st_mtime_ns
    again, table, *_ = run(split, run_dir, model=tiny_unet(seed=7))
    assert table["loss"].tolist() == history["loss"].tolist()
    for mine, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (run_dir / "last.npz").stat().st_mtime_ns == before


def test_E01_a_stopped_run_resumes_bit_for_bit(finished, split, tmp_path):
    assert len(run(split, tmp_path, max_minutes=0)[1]) == 1
    stopped, _ = data(split, augment=True)
    stopped.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(split, tmp_path, train_data=stopped)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 2
    resumed, _ = data(split, augment=True, workers=2)
    _, history, *_ = run(split, tmp_path, model=tiny_unet(seed=7), train_data=resumed)
    assert_same_run(tmp_path, history, finished)


WINNERS = {"deep_supervision": 1, "average": 0.9}


def test_E01_deeply_supervised_and_averaged_it_resumes_bit_for_bit(split, tmp_path):
    model, history, *_ = run(split, tmp_path / "a", model=tiny_unet(depth=3), **WINNERS)
    for model_seed, limit in ((1, 0), (7, None)):
        again = tiny_unet(depth=3, seed=model_seed)
        options = {**WINNERS, "max_minutes": limit}
        _, table, *_ = run(split, tmp_path / "b", model=again, **options)
    assert_same_run(tmp_path / "b", table, (tmp_path / "a", model, history))
    with pytest.raises(ValueError, match="optimizer.average .0.9 -> 0.0"):
        run(split, tmp_path / "b", epochs=5, model=tiny_unet(depth=3))


class Counter(keras.callbacks.Callback):
    """A user's callback: notes the epochs, and what it is told of each."""

    def __init__(self):
        super().__init__()
        self.epochs, self.losses, self.n_batches = [], [], 0

    def on_train_batch_end(self, batch, logs=None):
        self.n_batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(epoch + 1)
        self.losses.append(logs["loss"])
        logs["loss"] = -1.0  # whatever it does to them, the history has been written


def test_E01_ones_own_callbacks_see_each_epoch_once_and_change_nothing(
    finished, split, tmp_path
):
    counter = Counter()
    run(split, tmp_path, max_minutes=0, callbacks=[counter])
    assert counter.epochs == [1]
    interrupted(split, tmp_path)
    last, log = Counter(), keras.callbacks.CSVLogger(tmp_path.with_suffix(".csv"))
    _, history, *_ = run(
        split, tmp_path, model=tiny_unet(seed=7), callbacks=(last, log)
    )
    assert counter.epochs + last.epochs == [1, 3, 4]  # 2 ran without callbacks
    assert counter.losses + last.losses == history["loss"][[0, 2, 3]].tolist()
    assert counter.n_batches + last.n_batches == 3 * 2
    assert_same_run(tmp_path, history, finished)
    assert len(pd.read_csv(tmp_path.with_suffix(".csv"))) == 2  # Keras's own work, too


def test_ones_own_callback_may_stop_a_run_and_is_called_after_it_is_saved(
    split, tmp_path
):
    saved = []

    def stop(epoch, logs):
        saved.append(len(pd.read_csv(tmp_path / "history.csv")))
        model.stop_training = True

    model = tiny_unet()
    options = {"callbacks": [keras.callbacks.LambdaCallback(on_epoch_end=stop)]}
    _, history, *_ = run(split, tmp_path, model=model, **options)
    assert saved == history["epoch"].tolist() == [1]
    assert len(run(split, tmp_path, epochs=2)[1]) == 2


def test_a_finished_run_keeps_the_decoding_that_was_tuned(split, tmp_path):
    run(split, tmp_path / "run", epochs=1)
    write_case(tmp_path / "raw", "toy", seed=9)
    tune_model(tmp_path / "run", find_cases(tmp_path / "raw"))
    tuned = load_model(tmp_path / "run").description
    assert "decoding" in tuned
    run(split, tmp_path / "run", epochs=1)
    assert load_model(tmp_path / "run").description == tuned
    run(split, tmp_path / "run", epochs=2)  # another model: what was tuned is void
    assert "decoding" not in load_model(tmp_path / "run").description


def test_an_average_does_not_keep_the_first_weights_of_a_short_run(split, tmp_path):
    # 80 steps: a momentum of 0.999 would leave nine tenths of what training began with.
    options = {"epochs": 40, "validation_freq": 40}
    means = [
        run(split, tmp_path / str(average), average=average, **options)[0].get_weights()
        for average in (0.0, 0.999)
    ]
    first = tiny_unet().get_weights()
    moved, apart = (
        np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(one, other, strict=True)))
        for one, other in ((means[0], first), means)
    )
    assert apart < 0.2 * moved


def test_the_average_of_the_weights_is_what_is_validated_and_kept(split, tmp_path):
    model, history, *_ = run(split, tmp_path, epochs=1, average=0.9)
    arrays = list(variables(tmp_path).values())
    own, others = arrays[: len(model.weights)], arrays[len(model.weights) :]
    kept = model.get_weights()  # of the best epoch: there is only one
    assert not any(np.array_equal(a, b) for a, b in zip(own, kept, strict=True))
    assert all(any(np.array_equal(a, b) for b in others) for a in kept)
    val_data = data(split)[1]
    scores = model.evaluate(val_data, verbose=0, return_dict=True)
    for region in REGIONS:
        assert scores[f"dice_{region}"] == pytest.approx(
            history[f"val_dice_{region}"][0]
        )


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_E01_killed_at_any_file_operation_it_ends_in_the_same_bits(
    split, tmp_path, step
):
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, "train", split, tmp_path, str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 110  # file operations, each of them a point to die at


def interrupted(split, run_dir, epoch=2):
    """Stop a run by Ctrl-C at the end of an epoch, before its state is kept."""
    model = tiny_unet()
    stopped, _ = data(split, augment=True)
    stopped.fail_at = epoch
    with pytest.raises(KeyboardInterrupt):
        run(split, run_dir, model=model, train_data=stopped)
    return model


@pytest.mark.parametrize("epoch", [0, 2])
def test_E08_the_cell_run_again_after_an_interrupt(finished, split, tmp_path, epoch):
    # The model's weights are those of the middle of an epoch by then.
    model = interrupted(split, tmp_path, epoch)
    _, history, *_ = run(split, tmp_path, model=model)
    assert_same_run(tmp_path, history, finished)


@pytest.mark.parametrize("damage", [b"", b"<html>", None])
def test_E02_a_damaged_state_falls_back_by_one(finished, split, tmp_path, damage):
    interrupted(split, tmp_path)
    path = tmp_path / "last.npz"
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    with pytest.warns(UserWarning, match="resuming from last_but_one.npz"):
        _, history, *_ = run(split, tmp_path)
    assert_same_run(tmp_path, history, finished)


def test_E02_a_lost_state_falls_back_by_one(finished, split, tmp_path):
    interrupted(split, tmp_path)
    (tmp_path / "last.npz").unlink()
    assert_same_run(tmp_path, run(split, tmp_path)[1], finished)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"kind": "run"}'])
def test_E02_without_its_manifest_a_folder_is_left_as_it_is(split, tmp_path, text):
    run(split, tmp_path, epochs=1)
    path = tmp_path / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        run(split, tmp_path, epochs=2)
    assert tree(tmp_path) == before


def test_E02_without_a_valid_state_nothing_starts_again(finished, split, tmp_path):
    interrupted(split, tmp_path)
    for name in ("last.npz", "last_but_one.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"last.npz is.* and .*last_but_one.npz is"):
        run(split, tmp_path)
    for name in ("last.npz", "last_but_one.npz"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds best.keras, but no state"):
        run(split, tmp_path)


def test_E03_another_model_is_refused_and_nothing_changes(finished, split):
    run_dir = finished[0]
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match=r"filters \(2 -> 3\).*run_dir"):
        run(split, run_dir, epochs=5, model=tiny_unet(filters=3))
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def open_unet():
    return unet((None, None, None, 3), filters=2, depth=1)


def test_E03_what_differs_is_said_with_its_values(split, tmp_path):
    run(split, tmp_path, 1, model=open_unet())
    larger, _ = data(split, augment=True, patch_shape=(16, 8, 8))
    told = r"patch_shape.0 \(8 -> 16\).*RUN"
    with pytest.raises(ValueError, match=told):
        run(split, tmp_path, 5, train_data=larger, model=open_unet())


def test_E03_other_cases_are_refused_and_few_of_them_shown(finished, split, tmp_path):
    prepared = split.with_name("prepared")
    split_dataset(prepared, tmp_path / "split", ratio=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"train_cases\.\d") as caught:
        run(tmp_path / "split", finished[0], epochs=5)
    assert len(str(caught.value)) < 700


def test_E03_other_volumes_of_the_same_cases_are_refused(finished, split, tmp_path):
    for seed in range(1, 5):
        write_case(tmp_path / "raw", f"BraTS20_Training_{seed:03}", seed=10 + seed)
    prepare_dataset(tmp_path / "raw", tmp_path / "p", crop_shape=(16, 16, 8), jobs=1)
    split_dataset(tmp_path / "p", tmp_path / "split")
    with pytest.raises(ValueError, match="train_data.volumes"):
        run(tmp_path / "split", finished[0], epochs=5)


def test_C08_a_flipped_bit_is_caught_before_training(split, tmp_path):
    folder = tmp_path / "split"
    shutil.copytree(split, folder)  # follows links: files of its own
    path = next((folder / "val" / "masks").iterdir())
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"changed since.*{path.name}"):
        run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: failed to allocate")]
)
def test_E06_out_of_memory_says_what_to_lower(split, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    model = tiny_unet()
    monkeypatch.setattr(model, "fit", fail)
    with pytest.raises(MemoryError, match="2 patches of .8, 8, 8.*batch_size to 1"):
        run(split, tmp_path, model=model)
    smaller, _ = data(split, augment=True, batch_size=1)
    history = run(split, tmp_path, epochs=1, train_data=smaller)[1]
    assert len(history) == 1  # the advice was taken, and the folder takes it


def test_E06_what_cannot_fit_is_refused_before_the_first_step(
    split, tmp_path, monkeypatch
):
    model = tiny_unet()
    monkeypatch.setattr(model, "fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(training.os, "sysconf", lambda _: 100)
    with pytest.raises(MemoryError, match=r"a step needs .* of 1.0e\+04 b.*batch_size"):
        run(split, tmp_path, model=model)


def test_B07_a_region_that_no_training_case_has_is_said(split, tmp_path):
    train_data, _ = data(split, augment=True)
    for row in train_data.rows.values():
        row["ET_ml"] = 0.0
    with pytest.warns(UserWarning, match="no training case has ET"):
        run(split, tmp_path, epochs=1, train_data=train_data)


def test_E07_a_full_disk_costs_nothing_that_was_saved(finished, split, tmp_path):
    interrupted(split, tmp_path)
    saved = {n: (tmp_path / n).read_bytes() for n in ("last.npz", "best.keras")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*GB are free"):
            run(split, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved == {name: (tmp_path / name).read_bytes() for name in saved}
    assert_same_run(tmp_path, run(split, tmp_path)[1], finished)


def test_E05_nan_stops_the_run_and_keeps_the_last_state(
    finished, split, tmp_path, monkeypatch
):
    monkeypatch.setattr(BratsGenerator, "verify", lambda self: None)  # past the door
    shutil.copytree(finished[0], tmp_path / "run")
    folder = tmp_path / "split"
    shutil.copytree(split, folder)  # follows links: files of its own
    path = next((folder / "train" / "images").iterdir())
    image = np.load(path)
    image[8, 8, 4] = np.nan  # the tumour's middle, in every patch
    np.save(path, image)
    before = (tmp_path / "run" / "last.npz").read_bytes()
    with pytest.raises(FloatingPointError, match="epoch 5.*the previous epoch is kept"):
        run(folder, tmp_path / "run", epochs=5)
    assert (tmp_path / "run" / "last.npz").read_bytes() == before
    best = keras.models.load_model(tmp_path / "run" / "best.keras")
    assert all(np.isfinite(weight).all() for weight in best.get_weights())


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.01},
        {"patches_per_case": 2},
        {"tumour_share": 0.5},
        {"batch_size": 1},
        {"seed": 3},
    ],
)
def test_E03_other_settings_are_refused_by_name(finished, split, other):
    (name,) = other
    options = other if name == "learning_rate" else {}
    train_data, _ = data(split, augment=True, **({} if options else other))
    with pytest.raises(ValueError, match=rf"{name} \("):
        run(split, finished[0], epochs=5, train_data=train_data, **options)


def test_E04_the_best_epoch_is_kept_and_not_the_last(split, tmp_path, monkeypatch):
    score = {1: -1, 2: 0.2, 3: 0.9, 4: 0.4}
    monkeypatch.setattr(training, "_mean_dice", lambda row: score[row["epoch"]])
    keep, saved = training.write_model, []

    def note_and_keep(model, path, description):
        keep(model, path, description)
        saved.append(model.get_weights())

    monkeypatch.setattr(training, "write_model", note_and_keep)
    model, *_ = run(split, tmp_path)
    assert len(saved) == 3  # the first until one is validated, then 0.2 and 0.9
    for mine, best in zip(model.get_weights(), saved[-1], strict=True):
        np.testing.assert_array_equal(mine, best)


def test_a_model_of_half_precision_predicts_on_a_cpu_once_saved(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = tiny_unet(depth=2)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    training.write_model(model, tmp_path / "model.keras", {})
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for mine, saved in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, saved)
    image = np.zeros((1, 8, 8, 8, 3), np.float32)
    assert loaded.predict_on_batch(image).shape == (1, 8, 8, 8, 4)


def test_a_call_stops_after_the_epoch_in_which_its_time_is_up(split, tmp_path):
    for n_epochs in (1, 2):  # not validated yet, and still there is a model to use
        _, history, *_ = run(
            split, tmp_path, epochs=9, validation_freq=9, max_minutes=0
        )
        assert history["epoch"].tolist() == list(range(1, n_epochs + 1))
    assert (tmp_path / "best.keras").exists()


def test_a_run_in_mixed_precision_resumes_with_its_loss_scale(split, tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        # Convolutions of half precision do not run on a CPU; dense layers do.
        x = inputs = keras.Input((8, 8, 8, 3))
        x = keras.layers.Dropout(0.1)(keras.layers.Dense(4)(x))
        x = keras.layers.Dense(4, activation="softmax", dtype="float32")(x)
        models = [keras.models.clone_model(keras.Model(inputs, x)) for _ in range(2)]
        for epochs, model in enumerate(models, start=1):
            run(split, tmp_path, epochs, model=model)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert int(models[1].optimizer.iterations) == 4  # 2 epochs of 2 steps
    scales = [float(model.optimizer.dynamic_scale) for model in models]
    assert scales[0] == scales[1] > 1


def test_a_gpu_trains_in_half_precision(monkeypatch):
    for gpu, policy in ((False, "float32"), (True, "mixed_float16")):
        monkeypatch.setattr(training, "has_gpu", lambda gpu=gpu: gpu)
        assert training.choose_precision() == policy


def test_no_epochs_are_refused(split, tmp_path):
    with pytest.raises(ValueError, match="epochs is 0, expected a whole number, 1 or"):
        run(split, tmp_path / "run", epochs=0)
    assert not (tmp_path / "run").exists()


def test_a_backend_that_lists_no_devices_has_no_gpu(monkeypatch):
    def refuse(kind):
        raise NotImplementedError

    for list_devices, found in (
        (lambda kind: [f"{kind}:0"], True),
        (lambda kind: [], False),
        (refuse, False),
    ):
        monkeypatch.setattr(keras.distribution, "list_devices", list_devices)
        assert has_gpu() == found


JAX_RUNS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import keras
from test_training import WINNERS, data, run, tiny_unet
split, out = map(Path, sys.argv[1:3])
losses = []
for name, options in json.loads(sys.argv[4]).items():
    n_devices = options.pop("devices", 1)
    parallel = keras.distribution.DataParallel
    devices = keras.distribution.list_devices()[:n_devices]
    assert len(devices) == n_devices
    keras.distribution.set_distribution(parallel(devices=devices))
    train_data, val_data = data(split, augment=True, full_batches=True, **options)
    val_data.full_batches = True
    how = {"model": tiny_unet(depth=3), "train_data": train_data, **WINNERS}
    how |= {"val_data": val_data, "validation_freq": 1}
    history = run(split, out / name, 2, **how)[1]
    losses.append(history[["loss", "val_loss"]].to_numpy().ravel().tolist())
print(json.dumps([keras.backend.backend(), losses]))
"""


def run_on_jax(split, out, **runs):
    """Train on JAX, in a process of its own; return losses for each set of options."""
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    flags = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    flags["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", JAX_RUNS, split, out, here, json.dumps(runs)],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    backend, losses = json.loads(result.stdout.splitlines()[-1])
    assert backend == "jax" and np.isfinite(losses).all()
    return losses


def test_jax_trains_equally_with_one_worker_and_two(split, tmp_path):
    one, two = run_on_jax(split, tmp_path, one={"workers": 1}, two={"workers": 2})
    # Batches left in a queue would come an epoch late with two.
    assert one == two and len(one) == 4


def test_jax_trains_equally_on_one_device_and_two(split, tmp_path):
    runs = {name: {"devices": n, "batch_size": 2} for name, n in (("a", 1), ("b", 2))}
    one, two = run_on_jax(split, tmp_path, **runs)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_jax_trains_equally_in_one_process_and_two():
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        places = [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]
    script = Path(__file__).with_name("two_processes.py")
    losses = []
    for addresses in (places[:1], places):
        commands = [
            [sys.executable, script, ",".join(addresses), str(rank)]
            for rank in range(len(addresses))
        ]
        flags = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
        flags["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        options = {"env": {**os.environ, **flags}, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started = [subprocess.Popen(command, **options) for command in commands]
        for process in started:
            out, complaint = process.communicate(timeout=300)
            assert process.returncode == 0, complaint[-2000:]
            losses.append(json.loads(out.splitlines()[-1]))
    assert np.ptp(losses, axis=0).max() < 1e-5 and len(losses) == 3


TORCH_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import keras
import numpy as np
from conftest import write_case
from test_training import data, run, tiny_unet
from brats_utils.cases import find_cases
from brats_utils.inference import load_model, predict_case
split, out = map(Path, sys.argv[1:3])
assert keras.backend.backend() == "torch"
history = run(split, out / "run", 1, model=tiny_unet())[1]
assert np.isfinite(history["loss"]).all()
write_case(out / "raw", "one")
(case,) = find_cases(out / "raw")
found = predict_case(load_model(out / "run"), case)
print(found.shape, found.dtype)
"""


def test_torch_trains_and_predicts(split, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
    result = subprocess.run(
        [sys.executable, "-c", TORCH_RUN, split, tmp_path, str(Path(__file__).parent)],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "(24, 24, 16) uint8"


def test_E02_damaged_states_are_refused_or_equal(tmp_path):
    """Damage the only state 200 times: what is resumed is what was saved."""
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(50)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    with OutputFolder(tmp_path / "run", "run") as output:
        begun = training.Run(output, {"loss": "mse"}, set())
        begun.resume(model)
        begun.begin(model)
        saved = [variable.numpy() for variable in model.variables]
        path, rng, refused = tmp_path / "run" / "last.npz", np.random.default_rng(0), 0
        good = path.read_bytes()
        method = good.index(b"PK\1\2") + 10  # where zip says how it compressed
        for place in [method, *rng.integers(0, len(good), 200)]:
            damaged = bytearray(good)
            damaged[place] ^= 1 if place == method else 1 << rng.integers(8)
            path.write_bytes(damaged)
            model.set_weights([np.zeros_like(array) for array in saved])
            try:
                training.Run(output, {"loss": "mse"}, set()).resume(model)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error) and "another run_dir" in str(error)
                continue
            for variable, array in zip(model.variables, saved, strict=True):
                np.testing.assert_array_equal(variable.numpy(), array)
    assert refused > 100  # the others hit what nothing reads, such as dates


def test_H1_training_writes_to_no_folder_of_others(split, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "last.npz").write_text("a file of the user")
    before = tree(tmp_path), tree(split)
    inside = (split / "run", split / "train" / "run")
    for folder in (tmp_path / "mine", split, split.parent, split / "train", *inside):
        with pytest.raises(ValueError, match="choose another"):
            run(split, folder, epochs=1)
    assert (tree(tmp_path), tree(split)) == before


def test_I4_the_best_model_copied_alone_knows_its_channels_and_cases(tmp_path):
    names = [f"BraTS20_Training_{seed:03}" for seed in range(1, 5)]
    for seed, name in enumerate(names):
        write_case(tmp_path / "raw", name, seed=seed)
    modalities = ("t1", "t1ce", "t2")
    options = {"crop_shape": (16, 16, 8), "jobs": 1, "modalities": modalities}
    prepare_dataset(tmp_path / "raw", tmp_path / "prepared", **options)
    ids = split_dataset(tmp_path / "prepared", tmp_path / "split")
    run(tmp_path / "split", tmp_path / "run", epochs=1)
    path = shutil.copy(tmp_path / "run" / "best.keras", tmp_path / "mine.keras")
    shutil.rmtree(tmp_path / "run")
    trained = load_model(path)
    assert trained.description["train_cases"] == ids["train"]
    assert trained.description["val_cases"] == ids["val"]
    (case, *_) = find_cases(tmp_path / "raw")
    options = {"modalities": modalities, "patch_shape": (8, 8, 8)}
    expected = predict_case(trained.model, case, **options)
    np.testing.assert_array_equal(predict_case(path, case), expected)
    options["modalities"] = ("flair", "t1ce", "t2")
    foreign = keras.models.clone_model(trained.model)  # of which nothing is known
    foreign.set_weights(trained.model.get_weights())
    assert not np.array_equal(predict_case(foreign, case, **options), expected)


def test_H1_a_file_of_the_user_in_a_run_stays(split, tmp_path):
    run(split, tmp_path, epochs=1)
    (tmp_path / "notes.txt").write_text("mine")
    run(split, tmp_path, epochs=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": "none"},
        {"max_minutes": "ten"},
        {"loss": "no such loss"},
        {"learning_rate": -0.1},
        {"average": 1.5},
        {"deep_supervision": 9},
        {"validation_freq": 0},
    ],
)
def test_H2_a_wrong_option_changes_nothing(finished, split, wrong):
    before = tree(finished[0])
    (name,) = wrong
    name = "levels" if name == "deep_supervision" else name
    with pytest.raises(ValueError, match=name):
        run(split, finished[0], **{"epochs": 5, **wrong})
    assert tree(finished[0]) == before


def test_H4_a_run_that_another_process_writes_is_refused(split, tmp_path):
    code = (
        "import sys, time; from brats_utils.files import OutputFolder\n"
        "with OutputFolder(sys.argv[1], 'run'):\n"
        "    print('open', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=f"written by another.*{child.pid}"):
            run(split, tmp_path / "run", epochs=1)
        child.kill()
    assert len(run(split, tmp_path / "run", epochs=1)[1]) == 1


def weighted(y_true, y_pred, weights):
    labels = keras.ops.squeeze(keras.ops.cast(y_true, "int32"), -1)
    weights = keras.ops.take(keras.ops.convert_to_tensor(weights, "float32"), labels)
    return keras.losses.sparse_categorical_crossentropy(labels, y_pred) * weights


class WeightedLoss(keras.losses.Loss):
    """A loss of the user, whose `get_config` does not mention the weights."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        self.weights = weights

    def call(self, y_true, y_pred):
        return weighted(y_true, y_pred, self.weights)


class DescribedLoss(keras.losses.Loss):
    """One whose weights are private, and are told by `get_config`."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        self._weights = weights

    def call(self, y_true, y_pred):
        return weighted(y_true, y_pred, self._weights)

    def get_config(self):
        return {**super().get_config(), "weights": self._weights}


class Scaled:
    """An object that is no Keras loss, but is called as one."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, y_true, y_pred):
        return self.factor * dice_cross_entropy_loss(y_true, y_pred)


def tempered(y_true, y_pred, power):
    return dice_cross_entropy_loss(y_true, y_pred**power)


LOSSES = {
    "function": (dice_focal_loss, dice_cross_entropy_loss),
    "class": (WeightedLoss([1.0] * 4), WeightedLoss([0.0, 0, 0, 100])),
    "described": (DescribedLoss([1.0] * 4), DescribedLoss([0.0, 0, 0, 100])),
    "array": (WeightedLoss(np.ones(4)), WeightedLoss(np.arange(4.0))),
    "callable": (Scaled(1.0), Scaled(2.0)),
    "partial": (partial(tempered, power=1.0), partial(tempered, power=2.0)),
    "string": ("sparse_categorical_crossentropy", dice_focal_loss),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_I5_a_loss_of_the_user_trains_and_another_is_refused(split, tmp_path, kind):
    first, second = LOSSES[kind]
    assert np.isfinite(run(split, tmp_path, 1, loss=first)[1]["loss"]).all()
    assert len(run(split, tmp_path, 2, loss=first)[1]) == 2
    with pytest.raises(ValueError, match="other settings: loss"):
        run(split, tmp_path, 3, loss=second)


def test_I5_the_cell_run_again_makes_the_same_loss_again(split, tmp_path):
    for epochs in (1, 2):  # Keras names the second object weighted_loss_1
        run(split, tmp_path, epochs, loss=WeightedLoss([1.0] * 4))


@pytest.mark.parametrize("kind", LOSSES)
def test_I5_a_loss_of_the_user_is_supervised_deeply(split, tmp_path, kind):
    options = {"loss": LOSSES[kind][0], "deep_supervision": 1}
    history = run(split, tmp_path, 1, model=tiny_unet(depth=3), **options)[1]
    assert np.isfinite(history["loss"]).all()


def test_I5_a_lambda_trains_and_is_said_not_to_be_compared(split, tmp_path):
    for epochs in (1, 2):
        with pytest.warns(UserWarning, match="lambda.*not noticed") as caught:
            loss = lambda y, p: dice_focal_loss(y, p)  # noqa: E731
            history = run(split, tmp_path, epochs, loss=loss)[1]
        assert len(history) == epochs
        assert sum("not noticed" in str(w.message) for w in caught) == 1


def users_model(rate=0.2):
    """Return a functional model whose layers have the names that Keras gives them."""
    x = inputs = keras.Input((8, 8, 8, 3))
    x = keras.layers.Conv3D(4, 3, padding="same", activation="relu")(x)
    x = keras.layers.Dropout(rate)(x)
    return keras.Model(inputs, keras.layers.Conv3D(4, 1, activation="softmax")(x))


def activated_model():
    x = inputs = keras.Input((8, 8, 8, 3))
    x = keras.layers.Conv3D(4, 3, padding="same")(x)
    x = keras.layers.Activation("relu")(x)  # "activation", an option of the others too
    return keras.Model(inputs, keras.layers.Conv3D(4, 1, activation="softmax")(x))


def nested_model():
    block = [keras.Input((8, 8, 8, 3)), keras.layers.Conv3D(4, 3, padding="same")]
    x = inputs = keras.Input((8, 8, 8, 3))
    x = keras.Sequential([*block, keras.layers.ReLU()])(x)
    return keras.Model(inputs, keras.layers.Conv3D(4, 1, activation="softmax")(x))


def model_with_operations():
    inputs = keras.Input((8, 8, 8, 3))
    x = keras.ops.relu(keras.layers.Conv3D(4, 1)(2 * inputs))
    return keras.Model(inputs, keras.ops.softmax(x))


@pytest.mark.parametrize(
    "make", [users_model, activated_model, nested_model, model_with_operations]
)
def test_I5_a_run_resumes_in_one_session_though_keras_counts_names(
    split, tmp_path, make
):
    for epochs in (1, 2):
        assert len(run(split, tmp_path, epochs, model=make())[1]) == epochs


@pytest.mark.parametrize("make", [users_model, unet])
def test_I5_another_dropout_is_refused(split, tmp_path, make):
    def with_rate(rate):
        if make is users_model:
            return users_model(rate)
        return unet((8, 8, 8, 3), filters=2, depth=1, dropout=rate)

    run(split, tmp_path, 1, model=with_rate(0.2))
    with pytest.raises(ValueError, match=r"rate \(0.2 -> 0.5\)"):
        run(split, tmp_path, 2, model=with_rate(0.5))


def test_I5_validation_patches_and_precision_are_compared(finished, split, tmp_path):
    run(split, tmp_path, 1, model=open_unet())
    other = BratsGenerator(split / "val", patch_shape=(8, 8, 4), batch_size=2)
    with pytest.raises(ValueError, match=r"val_data.patch_shape.2 \(8 -> 4\)"):
        run(split, tmp_path, 5, val_data=other, model=open_unet())
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        with pytest.raises(ValueError, match="precision .'float32' -> 'mixed_float16'"):
            run(split, finished[0], 5)
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_I5_how_patches_are_changed_is_compared(split, tmp_path):
    train_data, _ = data(split, augment=flip)
    run(split, tmp_path, epochs=1, train_data=train_data)
    train_data, _ = data(split, augment=True)
    with pytest.raises(ValueError, match="augment .'brats_utils.augment.flip' -> True"):
        run(split, tmp_path, epochs=2, train_data=train_data)


def of_shapes(split, tmp_path, *shapes):
    """Return a split of cases of several shapes, whole volumes."""
    for number, shape in enumerate(shapes * 3):
        name = f"BraTS20_Training_{number:03}"
        labels = np.zeros(shape, np.uint8)
        labels[4:8, 4:8, 4:8] = [1, 2, 2, 4]
        options = {"shape": shape, "seed": number, "segmentation": labels}
        write_case(tmp_path / "raw", name, **options)
    prepare_dataset(tmp_path / "raw", tmp_path / "p", crop_shape=None, min_labelled=0)
    split_dataset(tmp_path / "p", tmp_path / "split", ratio=(0.5, 0.5))
    return tmp_path / "split"


@pytest.mark.parametrize(
    ("which", "options", "told"),
    [
        (
            "val",
            {"patch_shape": (8, 8, 6)},
            r"val has samples of \(8, 8, 6\).*multiples",
        ),
        ("train", {"patch_shape": (6, 8, 8)}, r"train has samples of \(6, 8, 8\)"),
        ("val", {"patch_shape": None, "batch_size": 1}, r"val has samples.*set patch"),
        ("train", {"patch_shape": None, "batch_size": 2}, "train has samples"),
    ],
)
def test_J3_samples_that_do_not_fit_are_told_before_the_first_step(
    split, tmp_path, which, options, told
):
    mixed = of_shapes(split, tmp_path, (24, 24, 16), (20, 25, 17))
    data = {n: BratsGenerator(mixed / n, **PATCHES) for n in ("train", "val")}
    data[which] = BratsGenerator(mixed / which, **{**PATCHES, **options})
    model = unet((None, None, None, 3), filters=2, depth=3)
    with pytest.raises(ValueError, match=told):
        train(model, data["train"], data["val"], tmp_path / "run", epochs=20)
    fixed = unet((8, 8, 8, 3), filters=2, depth=1)
    with pytest.raises(ValueError, match=r"the model takes \(8, 8, 8\)"):
        train(fixed, data["train"], data["val"], tmp_path / "run", epochs=20)
    assert not (tmp_path / "run").exists()


def test_J3_channels_shared_cases_and_other_data_are_told_before_the_first_step(
    split, tmp_path
):
    train_data, val_data = data(split)
    sibling = data(split)[1]
    for rows in (train_data.rows, sibling.rows):
        next(iter(rows.values()))["patient"] = "P7"
    inputs = keras.Input((8, 8, 8, 3))
    logits = keras.Model(inputs, keras.layers.Conv3D(4, 1)(inputs))

    def small(**options):
        options = {"activation": "softmax", "padding": "same", **options}
        return keras.Model(inputs, keras.layers.Conv3D(4, 3, **options)(inputs))

    for change, told in (
        ({"model": unet((8, 8, 8, 4), filters=2, depth=1)}, "the model takes 4"),
        ({"model": unet((8, 8, 3), filters=2, depth=1)}, "the model takes"),
        ({"val_data": train_data}, "share 3 cases: .'BraTS20"),
        ({"train_data": val_data}, "share 1 cases"),
        ({"val_data": sibling}, "share 1 patients: .'P7'"),
        ({"model": logits}, "same grid: end it with a softmax"),
        (
            {"model": small(padding="valid")},
            r"\(1, 8, 8, 8, 3\) to \(1, 6, 6, 6, 4\)",
        ),
        ({"model": small(strides=2)}, r"\(1, 8, 8, 8, 3\) to \(1, 4, 4, 4, 4\)"),
        ({"model": small(activation="relu")}, "expected probabilities on the same"),
        ({"train_data": None}, "train_data is None, expected a BratsGenerator"),
        ({"val_data": [1, 2]}, r"val_data is \[1, 2\]"),
    ):
        call = {"model": tiny_unet(), "train_data": train_data, "val_data": val_data}
        with pytest.raises(ValueError, match=told):
            train(run_dir=tmp_path / "run", epochs=20, **{**call, **change})
    assert not (tmp_path / "run").exists()


def test_a_failure_of_xla_is_told_once_and_training_goes_on_without(
    split, tmp_path, monkeypatch
):
    fit, calls = keras.Model.fit, []

    def fail_at_first(self, *arguments, **options):
        calls.append(self.jit_compile)
        if len(calls) == 1:
            raise RuntimeError("No valid engine configs for fused conv (CUDNN)")
        return fit(self, *arguments, **options)

    expected = run(split, tmp_path / "expected")[1]
    monkeypatch.setattr(keras.Model, "fit", fail_at_first)
    with pytest.raises(RuntimeError, match="CUDNN"):
        run(split, tmp_path / "cpu")  # without XLA the error is another one
    calls.clear()
    compile_as = keras.Model.compile  # on a CPU "auto" is no

    def with_xla(self, *arguments, **options):
        compile_as(self, *arguments, **{**options, "jit_compile": True})

    monkeypatch.setattr(keras.Model, "compile", with_xla)
    with pytest.warns(UserWarning, match="XLA failed .*CUDNN") as caught:
        history = run(split, tmp_path / "gpu")[1]
    assert sum("XLA failed" in str(w.message) for w in caught) == 1
    assert len(calls) == 2 and history["loss"].equals(expected["loss"])


@pytest.mark.parametrize("when", ["on_train_batch_end", "on_test_begin"])
def test_after_a_failure_of_xla_a_part_of_an_epoch_counts_for_nothing(
    split, tmp_path, monkeypatch, when
):
    options = {"average": 0.9, "validation_freq": 1}
    expected = run(split, tmp_path / "expected", 2, **options)
    fit, failed = keras.Model.fit, []

    def fail_within(self, *arguments, callbacks, **options):
        def fail(*_, **__):
            if not failed:
                failed.append(when)
                raise RuntimeError("XLA compilation failed: CUDNN_STATUS")

        failing = keras.callbacks.LambdaCallback(**{when: fail})
        return fit(self, *arguments, callbacks=[*callbacks, failing], **options)

    monkeypatch.setattr(keras.Model, "fit", fail_within)
    monkeypatch.setattr(training, "has_gpu", lambda: True)
    monkeypatch.setattr(keras.Model, "_resolve_auto_jit_compile", lambda self: True)
    with pytest.warns(UserWarning, match="XLA failed"):
        history = run(split, tmp_path / "run", 2, **options)[1]
    assert failed
    assert_same_run(tmp_path / "run", history, (tmp_path / "expected", *expected))


def test_E06_out_of_memory_is_no_failure_of_xla(split, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: XLA could not allocate")

    monkeypatch.setattr(keras.Model, "fit", fail)
    monkeypatch.setattr(training, "has_gpu", lambda: True)
    monkeypatch.setattr(keras.Model, "_resolve_auto_jit_compile", lambda self: True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "XLA")
        with pytest.raises(MemoryError, match="batch_size to 1"):
            run(split, tmp_path)


def five_outputs():
    x = inputs = keras.Input((8, 8, 8, 3))
    return keras.Model(inputs, keras.layers.Conv3D(5, 1, activation="softmax")(x))


def two_inputs():
    both = [keras.Input((8, 8, 8, 3)) for _ in range(2)]
    x = keras.layers.Concatenate()(both)
    return keras.Model(both, keras.layers.Conv3D(4, 1, activation="softmax")(x))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (five_outputs, "outputs is 5, expected 3 or 4"),
        (two_inputs, "model is .*one input"),
        (lambda: keras.Sequential([keras.layers.Conv3D(4, 1)]), "model is"),
        (lambda: "best.keras", "model is 'best.keras'"),
    ],
)
def test_J3_other_networks_are_told_before_the_first_step(split, tmp_path, make, told):
    with pytest.raises(ValueError, match=told):
        run(
            split,
            tmp_path / "run",
            model=make(),
            loss="sparse_categorical_crossentropy",
        )
    assert not (tmp_path / "run").exists()


def test_J3_validation_data_of_other_channels_is_told_before_the_first_step(
    split, tmp_path
):
    order = ("t2", "t1ce", "flair")  # as many as those of the training, and not them
    raw, options = split.with_name("raw"), {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(raw, tmp_path / "prepared", modalities=order, **options)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    val_data = data(tmp_path / "split")[1]
    with pytest.raises(ValueError, match="modalities of val_data is .*'t2', .*'flair'"):
        run(split, tmp_path / "run", val_data=val_data)
    assert not (tmp_path / "run").exists()


def test_I4_the_best_model_of_another_run_is_not_taken_for_ones_own(split, tmp_path):
    for seed, name in enumerate(("mine", "other")):
        run(split, tmp_path / name, 1, model=tiny_unet(seed=seed))
    shutil.copy(tmp_path / "other" / "best.keras", tmp_path / "mine" / "best.keras")
    with pytest.raises(ValueError, match="best.keras in .*mine is not"):
        run(split, tmp_path / "mine", 1)


def test_I5_the_optimizers_options_are_compared(split, tmp_path, monkeypatch):
    run(split, tmp_path, 1)
    monkeypatch.setitem(training.OPTIMIZER, "weight_decay", 1e-2)
    with pytest.raises(ValueError, match="optimizer.weight_decay .0.0001 -> 0.01"):
        run(split, tmp_path, 2)


NOTHING = {"learning_rate": 1e-12, "epochs": 1}  # a run that hardly changes the start


def test_a_run_starts_from_the_weights_of_another(finished, split, tmp_path):
    source = load_model(finished[0])
    for start in (finished[0], source.path):
        model = tiny_unet(seed=9)
        run(split, tmp_path / Path(start).name, start=start, model=model, **NOTHING)
        for ours, theirs in zip(model.weights, source.model.weights, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-6)
    description = load_model(tmp_path / "best.keras").description
    digest = files_digest(source.path)
    assert description["start"] == digest


def files_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_head_keeps_its_own_weights(finished, split, tmp_path):
    keras.utils.set_random_seed(3)
    model = unet((8, 8, 8, 3), filters=2, depth=1, n_classes=3)
    head = model.get_layer("head_conv").get_weights()
    run(split, tmp_path / "run", start=finished[0], model=model, **NOTHING)
    source = load_model(finished[0]).model
    np.testing.assert_allclose(
        model.get_layer("head_conv").get_weights()[0], head[0], atol=1e-6
    )
    first = model.get_layer("encoder1_conv1").get_weights()[0]
    expected = source.get_layer("encoder1_conv1").get_weights()[0]
    np.testing.assert_allclose(first, expected, atol=1e-6)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_weights_that_are_kept_are_averaged_with_the_start(
    finished, split, tmp_path, average
):
    begun, options = load_model(finished[0]).model, {"average": average}
    options |= {"start": finished[0], "validation_freq": 1}
    alone, mixed = tiny_unet(), tiny_unet()
    run(split, tmp_path / "alone", 1, model=alone, **options)
    run(split, tmp_path / "mixed", 1, model=mixed, start_share=0.25, **options)
    weights = [m.weights for m in (begun, alone, mixed)]
    for first, own, kept in zip(*weights, strict=True):
        np.testing.assert_allclose(0.25 * first + 0.75 * own, kept, atol=1e-6)
    trained = [variables(tmp_path / name) for name in ("alone", "mixed")]
    for name in trained[0]:  # what is trained is the same
        np.testing.assert_array_equal(trained[0][name], trained[1][name])
    scores = mixed.evaluate(data(split)[1], verbose=0, return_dict=True)
    history = pd.read_csv(tmp_path / "mixed" / "history.csv")
    assert scores["dice_WT"] == pytest.approx(history["val_dice_WT"][0])
    with pytest.raises(ValueError, match="other settings: .*start_share"):
        run(split, tmp_path / "mixed", 2, model=mixed, start_share=0.5, **options)


def test_a_share_of_no_start_is_refused(split, tmp_path):
    with pytest.raises(ValueError, match="start_share is 0.3, expected 0 without"):
        run(split, tmp_path / "run", start_share=0.3)


def test_a_run_from_a_start_resumes_bit_for_bit_and_another_start_is_refused(
    finished, split, tmp_path
):
    start = tmp_path / "start.keras"
    shutil.copy(finished[0] / "best.keras", start)
    whole = run(split, tmp_path / "whole", start=start)[1]
    part = {"max_minutes": 1e-9, "start": start}
    run(split, tmp_path / "parts", **part)
    history = run(split, tmp_path / "parts", start=start)[1]
    columns = [name for name in whole if name != "seconds"]
    pd.testing.assert_frame_equal(history[columns], whole[columns])
    expected, found = variables(tmp_path / "whole"), variables(tmp_path / "parts")
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    before = tree(tmp_path / "whole")
    tiny_unet(seed=4).save(start)
    with pytest.raises(ValueError, match="start"):
        run(split, tmp_path / "whole", 5, start=start)
    with pytest.raises(ValueError, match="start"):
        run(split, tmp_path / "whole", 5)
    assert tree(tmp_path / "whole") == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"filters": 3}, "filters 2, not 3"),
        ({"depth": 2}, "depth 1, not 2"),
        ({"stem_stride": 2}, "stem_stride 1, not 2"),
        ({"filters": 4, "depth": 3}, "filters 2, not 4; depth 1, not 3"),
        ({"normalisation": False}, "other layers"),
    ],
)
def test_J4_a_start_that_does_not_fit_is_refused(
    finished, split, tmp_path, options, told
):
    model = unet((8, 8, 8, 3), **{"filters": 2, "depth": 1, **options})
    weights = [w.numpy() for w in model.weights]
    with pytest.raises(ValueError, match=f"start=.*{told}"):
        run(split, tmp_path / "run", model=model, start=finished[0])
    assert not (tmp_path / "run").exists()
    for ours, theirs in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def without_convolutions():
    image = keras.Input((8, 8, 8, 3))
    return keras.Model(image, keras.layers.Dense(4, activation="softmax")(image))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without_convolutions, "filters None, not 2"),
        (lambda: unet((8, 8, 3), filters=2, depth=1), "other layers"),
        (lambda: unet_cicek2016((8, 8, 8, 3)), "filters 32, not 2; depth 4, not 1"),
        (lambda: unet((8, 8, 8, 4), filters=2, depth=1), "channels 4, not 3"),
    ],
)
def test_J4_a_start_of_another_kind_is_refused(split, tmp_path, make, told):
    make().save(tmp_path / "start.keras")
    with pytest.raises(ValueError, match=f"start=.*{told}"):
        run(split, tmp_path / "run", start=tmp_path / "start.keras")
    assert not (tmp_path / "run").exists()


def test_J4_a_start_of_other_channels_is_refused(finished, split, tmp_path):
    path = tmp_path / "start.keras"
    trained = load_model(finished[0])
    names = ["flair", "t1", "t2"]
    write_model(trained.model, path, {**trained.description, "modalities": names})
    with pytest.raises(ValueError, match="start=.*'t1'"):
        run(split, tmp_path / "run", start=path)
    assert not (tmp_path / "run").exists()


def test_a_start_fits_data_without_its_optional_modality(split, tmp_path, tiny_weights):
    keras.utils.set_random_seed(1)
    model = unet((8, 8, 8, 3), filters=2, depth=2, stem_stride=2)
    run(split, tmp_path / "run", start="phantom", model=model, **NOTHING)
    source = load_model("phantom").model  # FLAIR, T1, T1CE, T2
    for ours, theirs in zip(model.weights, source.weights, strict=True):
        theirs = np.array(theirs)
        if ours.shape != theirs.shape:
            theirs = theirs[..., [0, 2, 3], :]
        np.testing.assert_allclose(np.array(ours), theirs, atol=1e-5)
    description = load_model(tmp_path / "run").description
    assert description["modalities"] == ["flair", "t1ce", "t2"]
    assert description["start"] == files_digest(tiny_weights)


def test_J4_a_start_whose_modalities_the_data_lack_is_refused(
    tmp_path, toy_set, tiny_weights
):
    options = {"crop_shape": None, "modalities": ("flair", "t1", "t2")}
    prepare_dataset(toy_set, tmp_path / "prepared", **options)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    model = unet((8, 8, 8, 3), filters=2, depth=2, stem_stride=2)
    call = {"start": "phantom", "model": model, **NOTHING}
    with pytest.raises(ValueError, match="start='phantom' takes .*'t1ce'.* has "):
        run(tmp_path / "split", tmp_path / "run", **call)
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_phantom_weights(split, tmp_path):
    keras.utils.set_random_seed(1)
    model = unet((None, None, None, 3), filters=16, stem_stride=2)
    patches = {"patch_shape": (32, 32, 32), "batch_size": 1}
    train_data, val_data = (
        BratsGenerator(split / side, **patches) for side in ("train", "val")
    )
    options = {"verbose": False, "start": "phantom", **NOTHING}
    train(model, train_data, val_data, tmp_path / "run", **options)
    source, _ = read_model(PHANTOM_WEIGHTS, ("flair", "t1ce", "t2"))
    for ours, theirs in zip(model.weights, source.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)
    assert load_model(tmp_path / "run").description["start"] == files_digest(
        PHANTOM_WEIGHTS
    )


def rows_of(*seconds):
    return [{"seconds": each} for each in seconds]


def test_as_many_epochs_are_planned_as_fit_into_the_time():
    assert plan_epochs([], 8) == plan_epochs(rows_of(20), 8) == (20, 2)
    # 480 s: 30 for the first, then 45 of 10 s; a quarter of 46 later, once more.
    assert plan_epochs(rows_of(30, 10), 8) == (46, 11)
    assert plan_epochs(rows_of(30, *[10] * 9), 8) == (46, 11)
    slower = rows_of(30, 10, *[15] * 9)
    total = 1 + int(450 / 14.5)
    assert plan_epochs(slower, 8) == (total, total) == (32, 32)
    assert plan_epochs(slower + rows_of(99, 99), 8) == (32, 32)  # corrected only once
    # What is done already cannot be taken back.
    assert plan_epochs(rows_of(300, 300), 8) == (2, 2)


@pytest.fixture
def steady_clock(monkeypatch):
    """Make each epoch last three seconds."""
    ticks = itertools.count(0, 3)
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(ticks)))


def test_a_run_of_minutes_ends_at_rate_zero_and_resumes_bit_for_bit(
    split, tmp_path, steady_clock
):
    options = {"epochs": None, "minutes": 0.5, "validation_freq": None}
    whole = run(split, tmp_path / "whole", **options)[1]
    assert whole["epoch"].tolist() == [*range(1, 11)]  # 30 s
    assert whole["learning_rate"].iloc[-1] == pytest.approx(0, abs=1e-8)
    assert whole["val_loss"].notna().sum() >= 8
    for n_epochs in range(1, 11):
        history = run(split, tmp_path / "parts", max_minutes=0, **options)[1]
        assert len(history) == n_epochs
    assert len(run(split, tmp_path / "parts", **options)[1]) == 10  # finished
    expected, found = variables(tmp_path / "whole"), variables(tmp_path / "parts")
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_epochs_win_over_minutes_and_one_of_them_is_needed(split, tmp_path):
    assert len(run(split, tmp_path / "run", epochs=1, minutes=9)[1]) == 1
    with pytest.raises(ValueError, match="epochs or minutes"):
        run(split, tmp_path / "other", epochs=None)
    assert not (tmp_path / "other").exists()


def test_J3_a_start_that_knows_the_validation_cases_is_refused(
    split, tmp_path, finished
):
    ours, theirs = data(split)
    told = f"trained on 3 cases of val_data.*{ours.case_ids[0]}"
    with pytest.raises(ValueError, match=f"start=.*{told}"):
        swapped = {"train_data": theirs, "val_data": ours}
        run(split, tmp_path / "run", start=finished[0], **swapped)
    assert not (tmp_path / "run").exists()


def other_images(tmp_path, *, seed):
    """Return a split of cases with the ids of `split`, and other images."""
    for number in range(1, 5):
        name = f"BraTS20_Training_{number:03}"
        write_case(tmp_path / "raw", name, seed=number + seed)
    crop = {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(tmp_path / "raw", tmp_path / "prepared", **crop)
    split_dataset(tmp_path / "prepared", tmp_path / "split", seed=1)
    return tmp_path / "split"


def test_J3_a_start_on_other_images_of_the_same_ids_is_taken(split, tmp_path, finished):
    other = other_images(tmp_path, seed=50)
    ids = {p.stem for p in (other / "val/images").iterdir()}
    assert ids <= {*load_model(finished[0]).description["train_cases"]}
    run(other, tmp_path / "run", 1, start=finished[0])


def test_J3_a_start_on_the_same_images_under_other_ids_is_refused(
    split, tmp_path, finished
):
    for number in range(1, 5):
        write_case(tmp_path / "raw", f"Copy_{number}", seed=number)
    prepare_dataset(tmp_path / "raw", tmp_path / "p", crop_shape=(16, 24, 8), jobs=1)
    split_dataset(tmp_path / "p", tmp_path / "copies", seed=1)
    ours, _ = data(split)
    copies = BratsGenerator(tmp_path / "copies/val", **PATCHES)
    with pytest.raises(ValueError, match="share images of 1 cases: .'Copy_"):
        run(split, tmp_path / "run", val_data=copies)
    with pytest.raises(ValueError, match="start=.*trained on 1 cases of val_data"):
        run(tmp_path / "copies", tmp_path / "run", start=finished[0])
    assert not (tmp_path / "run").exists()


def test_J3_a_model_that_was_trained_on_the_validation_cases_is_refused(
    split, tmp_path
):
    model, *_, train_data, val_data = run(split, tmp_path / "fold0", 1)
    run(split, tmp_path / "again", 1, model=model)  # on the same cases
    swapped = {"train_data": val_data, "val_data": train_data}
    with pytest.raises(
        ValueError, match="this model was trained on 3 cases of val_data"
    ):
        run(split, tmp_path / "fold1", 1, model=model, **swapped)
    assert not (tmp_path / "fold1").exists()


def test_J3_a_model_of_a_call_that_was_refused_is_as_good_as_new(
    split, tmp_path, finished
):
    model, (train_data, val_data) = tiny_unet(), data(split)
    swapped = {"train_data": val_data, "val_data": train_data}
    with pytest.raises(ValueError, match="other settings"):
        run(split, finished[0], model=model, **swapped)
    run(split, tmp_path / "run", 1, model=model)


@pytest.mark.parametrize("levels", [0, 1])
def test_J3_what_a_start_or_a_loaded_model_has_seen_is_not_forgotten(
    split, tmp_path, finished, levels
):
    other = other_images(tmp_path, seed=50)
    options = {"model": tiny_unet(depth=3), "deep_supervision": levels}
    model = run(split, tmp_path / "a", 1, **options)[0]
    run(other, tmp_path / "b", 1, model=model, deep_supervision=levels)
    train_data, val_data = data(split)
    swapped = {"train_data": val_data, "val_data": train_data}
    for start in (tmp_path / "a", tmp_path / "b"):
        call = {"model": tiny_unet(depth=3), "start": start, **swapped}
        with pytest.raises(ValueError, match="start=.*trained on 3 cases of val_data"):
            run(split, tmp_path / "c", **call)
        with pytest.raises(ValueError, match="this model was trained on 3 cases"):
            run(split, tmp_path / "c", model=load_model(start).model, **swapped)
    started = run(other, tmp_path / "d", 1, start=finished[0])[0]
    with pytest.raises(ValueError, match="this model was trained on 3 cases"):
        run(split, tmp_path / "c", model=started, **swapped)


def test_J3_without_the_names_of_its_images_a_start_is_known_by_ids(
    split, tmp_path, finished
):
    model, description = read_model(finished[0] / "best.keras")
    assert len(description.pop("train_images")) == 9  # three images of three cases
    write_model(model, tmp_path / "old.keras", description)
    odd = {**description, "train_images": [["flair"]], "train_cases": [{}]}
    write_model(model, tmp_path / "odd.keras", odd)
    load_model(tmp_path / "odd.keras")
    run(split, tmp_path / "new", 1, start=tmp_path / "odd.keras")
    ours, theirs = data(split)
    swapped = {"train_data": theirs, "val_data": ours}
    with pytest.raises(ValueError, match="start=.*trained on 3 cases of val_data"):
        run(split, tmp_path / "run", start=tmp_path / "old.keras", **swapped)


@pytest.mark.parametrize(
    "loss", ["mse", "binary_crossentropy", "categorical_crossentropy", lambda y, p: -p]
)
def test_J4_a_loss_that_does_not_fit_is_refused(split, tmp_path, loss):
    with pytest.raises(ValueError, match=r"loss is .*expected a loss of labels"):
        run(split, tmp_path / "run", loss=loss)
    assert not (tmp_path / "run").exists()


def test_J4_the_losses_of_keras_that_fit_are_taken(split, tmp_path):
    for loss in ("sparse_categorical_crossentropy", dice_focal_loss):
        run(split, tmp_path / str(loss)[:9], 1, loss=loss)


def test_a_run_in_the_home_folder_ends_like_any_other(split, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, history, *_ = run(split, "~/run", epochs=1)
    assert len(history) == 1
    assert (tmp_path / "run" / "best.keras").exists()


def test_J3_a_model_that_cannot_be_loaded_is_refused_before_the_first_step(
    split, tmp_path
):
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    model = tiny_unet()
    for layer in (keras.layers.Lambda(lambda x: 2 * x), Twice()):
        broken = keras.Model(
            model.input, model.layers[-1](layer(model.layers[-2].output))
        )
        with pytest.raises(ValueError, match="not be loaded again.*(Twice|Lambda)"):
            run(split, tmp_path / "run", epochs=1, model=broken)
        assert not (tmp_path / "run").exists()


def test_I5_what_a_function_or_a_slot_holds_is_compared_on_resume():
    class Weighted:
        __slots__ = ("weight",)

        def __init__(self, weight):
            self.weight = weight

        def __call__(self, y, p):
            return self.weight

    def make(weight):
        return lambda y, p: weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def default(weight):
            def loss(y, p, w=weight):
                return w

            return loss

        def named(weight):
            def loss(y, p, *, w=weight):
                return w

            return loss

        def around(weight):
            inner = make(weight)
            return lambda y, p: inner(y, p)

        kinds = (Weighted, make, lambda w: partial(make(w)), default, named, around)
        for make_loss in kinds:
            one, same, other = (
                json.dumps(make_loss(w), default=describe_object)
                for w in (1.0, 1.0, 9.0)
            )
            assert one == same != other
        one, other = (
            json.dumps(s, default=describe_object) for s in ({1, 2}, {1, 2, 3})
        )
        assert one != other

        def with_module(module=json):
            return lambda y, p: module

        json.dumps(with_module(), default=describe_object)  # a module is code

        def recursive(y, p):
            return recursive(y, p)

        json.dumps(recursive, default=describe_object)


def test_J4_numpy_sizes_are_sizes(split, tmp_path):
    sizes = np.array(data(split)[0].patch_shape)
    assert BratsGenerator(split / "train", patch_shape=sizes).patch_shape == (*sizes,)


def test_H2_a_refused_call_leaves_a_damaged_state_where_it_is(split, tmp_path):
    run_dir = tmp_path / "run"
    run(split, run_dir, epochs=2)
    (run_dir / "last.npz").write_bytes(b"cut")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with (
        pytest.warns(UserWarning, match="resuming from last_but_one"),
        pytest.raises(ValueError, match="learning_rate"),
    ):
        run(split, run_dir, epochs=4, learning_rate=0.5)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_I4_a_model_in_memory_takes_the_channels_it_was_trained_on(split, tmp_path):
    raw = split.parent / "raw"
    options = {"crop_shape": (16, 16, 8), "jobs": 1}
    channels = ("t2", "t1", "flair")
    prepare_dataset(raw, tmp_path / "prepared", modalities=channels, **options)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    model = run(tmp_path / "split", tmp_path / "run", epochs=1)[0]
    case = find_cases(raw)[0]
    found = predict_case(model, case)
    np.testing.assert_array_equal(found, predict_case(tmp_path / "run", case))
    with pytest.raises(ValueError, match="modalities is .*'flair', 't1ce', 't2'"):
        predict_case(model, case, modalities=("flair", "t1ce", "t2"))


def border(y, p):
    """A loss that, as Keras lets it, pools the labels."""
    weight = ops.max_pool(y, 3, strides=1, padding="same")
    return dice_cross_entropy_loss(y, p) + 0 * ops.mean(weight)


def coarse(y, p):
    """A loss that needs a grid of at least 4 voxels."""
    return dice_cross_entropy_loss(y, p) + 0 * ops.mean(ops.average_pool(p, 4))


@pytest.mark.parametrize("loss", [border, coarse])
@pytest.mark.filterwarnings("ignore:.*a change in its code")
def test_I5_a_loss_that_pools_trains(split, tmp_path, loss):
    assert len(run(split, tmp_path / "run", epochs=1, loss=loss)[1]) == 1


def test_J3_a_loss_that_costs_nothing_for_an_empty_map_is_refused(split, tmp_path):
    with pytest.raises(ValueError, match="mape.* for the truth, .* for an empty map"):
        run(split, tmp_path / "run", epochs=1, loss="mape")


def test_a_fixed_model_with_one_voxel_inside_takes_a_patch_that_is_no_cube(split):
    x = inputs = keras.Input((12, 8, 8, 3))
    x = keras.layers.Conv3D(4, 3, padding="same")(x)
    pooled = keras.layers.GlobalAveragePooling3D(keepdims=True)(x)
    x = keras.layers.Multiply()([x, keras.layers.Dense(4, "sigmoid")(pooled)])
    model = keras.Model(inputs, keras.layers.Conv3D(4, 1, activation="softmax")(x))
    options = {"model": model, "train_data": data(split, patch_shape=(12, 8, 8))[0]}
    options["val_data"] = BratsGenerator(split / "val", patch_shape=(12, 8, 8))
    run(split, split.parent / "cuboid", epochs=1, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda image, labels, rng: image,
        lambda image, labels, rng: None,
        lambda image, labels, rng: (image[:4], labels[:4]),
    ],
)
def test_J4_what_a_function_for_augment_returns_is_checked(split, change):
    batches = BratsGenerator(split / "train", patch_shape=(8, 8, 8), augment=change)
    with pytest.raises(
        ValueError, match="what augment returns, by shape, is .*expected"
    ):
        batches[0]


def test_I4_a_refused_call_does_not_change_the_channels_of_a_model(split, tmp_path):
    model = run(split, tmp_path / "run", epochs=1)[0]
    case = find_cases(split.parent / "raw")[0]
    expected = predict_case(model, case)
    options = {
        "crop_shape": (16, 16, 8),
        "jobs": 1,
        "modalities": ("t2", "t1", "flair"),
    }
    prepare_dataset(split.parent / "raw", tmp_path / "prepared", **options)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(tmp_path / "split", tmp_path / "run", epochs=1, model=model)
    np.testing.assert_array_equal(predict_case(model, case), expected)


def smooth(y, p):
    """Dice with a price on borders."""
    steps = ops.abs(p[:, 1:] - p[:, :-1])
    return dice_loss(y, p) + 2 * ops.mean(steps)


@pytest.mark.filterwarnings("ignore:.*a change in its code")
def test_I5_a_loss_that_asks_for_smooth_borders_trains(split, tmp_path):
    assert len(run(split, tmp_path / "run", epochs=1, loss=smooth)[1]) == 1


def test_I5_of_kerass_own_losses_the_defaults_are_not_noted():
    class Net(keras.Model):
        def __init__(self, thing):
            super().__init__()

    net = Net(object())

    def with_net(y, p, net=net):
        return net(y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = keras.losses.SparseCategoricalCrossentropy()
        noted = json.loads(json.dumps(loss, default=describe_object))
        assert noted["fn"].endswith(".sparse_categorical_crossentropy")
        json.dumps(with_net, default=describe_object)  # cannot be described: left out


def test_I5_arrays_of_an_augmentation_are_compared_but_not_stored(tmp_path):
    image = np.zeros((64, 64, 64, 3), np.float32)
    changed = image.copy()
    changed[1, 2, 3, 0] = 1
    told = []
    for array in (image, image[..., ::1].copy(), changed, image.astype(np.float64)):
        change = partial(flip, lesions=[array, np.uint8([1, 2])])
        told.append(json.dumps(change, default=describe_object))
    assert told[0] == told[1] and len({*told}) == 3 and len(told[0]) < 500
    # So do arrays that a function captures, however they lie in memory.
    for array in (image, np.asfortranarray(image)):
        with pytest.warns(UserWarning, match="a change in its code"):
            told.append(json.dumps(lambda x, a=array: x + a, default=describe_object))
    assert told[-1] == told[-2] and len(told[-1]) < 500


def dense_model(outputs=4, activation="softmax"):
    """Return a network without convolutions: those in half precision need a GPU."""
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((8, 8, 8, 3))
    x = keras.layers.Dense(4)(x)
    x = keras.layers.Dense(outputs, activation=activation, dtype="float32")(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_weights_are_averaged_in_half_precision_too(split, tmp_path, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        kept = []
        for average in (0.0, 0.99):
            model, folder = dense_model(), tmp_path / f"{average}"
            kept.append(run(split, folder, model=model, average=average)[0])
    finally:
        keras.mixed_precision.set_global_policy("float32")
    plain, averaged = (model.get_weights()[0] for model in kept)
    assert not np.array_equal(plain, averaged)


def test_J3_a_resumed_run_knows_what_its_first_model_had_seen(split, tmp_path):
    root = tmp_path / "others"
    for seed in range(5, 9):
        write_case(root / "raw", f"BraTS20_Training_{seed:03}", seed=seed)
    prepare_dataset(root / "raw", root / "prepared", crop_shape=(16, 16, 8), jobs=1)
    split_dataset(root / "prepared", root / "split")
    run(split, tmp_path / "first", 1)
    tuned = load_model(tmp_path / "first").model
    run(root / "split", tmp_path / "second", 2, model=tuned, max_minutes=0)
    for _ in range(2):  # resumed, then finished
        model = run(root / "split", tmp_path / "second", 2, model=tiny_unet(seed=7))[0]
        stored = load_model(tmp_path / "second").description["train_images"]
        first = load_model(tmp_path / "first").description["train_images"]
        assert {*first} < {*stored} == training.SEEN[model]


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_E4_a_run_without_its_best_model_is_refused_at_once(split, tmp_path, how):
    run(split, tmp_path / "run", 4, max_minutes=0)
    best = tmp_path / "run" / "best.keras"
    best.unlink() if how == "deleted" else best.write_bytes(best.read_bytes()[:-99])
    before = tree(tmp_path / "run")
    with pytest.raises(ValueError, match=r"best\.keras"):
        run(split, tmp_path / "run", 4)
    assert tree(tmp_path / "run") == before


def list_of_inputs():
    x = keras.Input((8, 8, 8, 3))
    y = keras.layers.Conv3D(4, 3, padding="same", activation="relu")(x)
    y = keras.layers.Conv3D(4, 1, activation="softmax")(y)
    return keras.Model(inputs=[x], outputs=[y])


def sequential():
    convolution = keras.layers.Conv3D(4, 1, activation="softmax")
    return keras.Sequential([keras.Input((8, 8, 8, 3)), convolution])


def dict_of_inputs():
    model = sequential()
    return keras.Model({"image": model.inputs[0]}, model.outputs[0])


def nested():
    x = keras.Input((8, 8, 8, 3))
    encoder = keras.Model(x, keras.layers.Conv3D(4, 3, padding="same")(x))
    x = keras.Input((8, 8, 8, 3))
    y = keras.layers.Conv3D(4, 1, activation="softmax")(encoder(x))
    return keras.Model(x, y)


@pytest.mark.parametrize("build", [list_of_inputs, sequential, dict_of_inputs, nested])
def test_models_built_in_other_ways_train_and_predict(split, tmp_path, build):
    run(split, tmp_path / "run", 1, model=build())
    case = find_cases(split.parent / "raw")[0]
    assert predict_case(tmp_path / "run", case).shape == (24, 24, 16)


@pytest.mark.parametrize("build", [list_of_inputs, sequential, dict_of_inputs])
def test_models_built_in_other_ways_have_a_table(build):
    table = model_table(build())
    assert table.loc["total", "parameters"] == build().count_params()


def test_J3_regions_that_exclude_each_other_are_refused(split, tmp_path):
    with pytest.raises(ValueError, match="end it with a sigmoid"):
        run(split, tmp_path / "run", model=dense_model(3, "softmax"))
    assert not (tmp_path / "run").exists()


def test_J3_callbacks_that_set_the_learning_rate_are_refused(split, tmp_path):
    callback = keras.callbacks.ReduceLROnPlateau()
    with pytest.raises(ValueError, match="callbacks is .* no schedule"):
        run(split, tmp_path / "run", callbacks=[callback])
    assert not (tmp_path / "run").exists()


def test_H1_a_run_inside_the_folds_is_refused(split, tmp_path):
    folds = tmp_path / "folds"
    split_folds(split.parent / "prepared", folds, folds=2)
    sides = [BratsGenerator(folds / "fold0" / n, **PATCHES) for n in ("train", "val")]
    for inside in (folds / "run", folds / "fold1" / "run"):
        with pytest.raises(ValueError, match="overlap"):
            run(split, inside, train_data=sides[0], val_data=sides[1])


def test_a_nested_model_is_saved_in_full_precision(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        inner = keras.Sequential([keras.Input((8, 8, 8, 3)), keras.layers.Dense(4)])
        inputs = keras.Input((8, 8, 8, 3))
        model = keras.Model(inputs, inner(inputs))
        write_model(model, tmp_path / "model.keras", {})
    finally:
        keras.mixed_precision.set_global_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].layers[0].compute_dtype == "float32"


def test_a_failure_of_xla_is_remembered_when_training_is_planned_again(
    split, tmp_path, monkeypatch
):
    fit, compile_as, with_xla = keras.Model.fit, keras.Model.compile, []

    def fail_with_xla(self, *arguments, **options):
        with_xla.append(bool(self.jit_compile))
        if self.jit_compile:
            raise RuntimeError("No valid engine configs for fused conv (CUDNN)")
        return fit(self, *arguments, **options)

    def compile_on_gpu(self, *arguments, jit_compile, **options):
        compile_as(self, *arguments, **options, jit_compile=jit_compile == "auto")

    monkeypatch.setattr(keras.Model, "fit", fail_with_xla)
    monkeypatch.setattr(keras.Model, "compile", compile_on_gpu)
    monkeypatch.setattr(training, "has_gpu", lambda: True)
    plans = iter([(4, 1), (4, 2), (4, 4), (4, 4)])
    monkeypatch.setattr(training, "plan_epochs", lambda *_: next(plans))
    with pytest.warns(UserWarning, match="XLA failed") as caught:
        run(split, tmp_path / "run", None, minutes=1)
    assert sum("XLA failed" in str(w.message) for w in caught) == 1
    assert with_xla == [True, False, False, False]


def test_J3_a_model_that_a_damaged_volume_kept_from_training_is_as_good_as_new(
    split, tmp_path
):
    shutil.copytree(split.parent, tmp_path / "set", symlinks=False)
    damaged = tmp_path / "set" / "split"
    path = next((damaged / "train" / "images").glob("*.npy"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    model = tiny_unet()
    with pytest.raises(ValueError, match="damaged|changed|checksum"):
        run(damaged, tmp_path / "run", 1, model=model)
    train_data, val_data = data(split)
    swapped = {"train_data": val_data, "val_data": train_data}
    run(split, tmp_path / "run", 1, model=model, **swapped)


class StopWithin(keras.callbacks.Callback):
    """Stops training after the first batch of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.last = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.last and batch == 0:
            self.model.stop_training = True


def test_I4_a_callback_that_stops_within_an_epoch_leaves_it_to_the_next_call(
    split, tmp_path, finished
):
    with pytest.raises(ValueError, match="stopped training within its first epoch"):
        run(split, tmp_path / "first", callbacks=[StopWithin(0)])
    history = run(split, tmp_path / "run", callbacks=[StopWithin(2)])[1]
    assert history["epoch"].tolist() == [1, 2]
    history = run(split, tmp_path / "run")[1]
    assert_same_run(tmp_path / "run", history, (finished[0], *finished[1:3]))


def test_I5_a_model_that_was_trained_before_is_said_to_be(split, tmp_path, finished):
    model = tiny_unet()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this model was trained before")
        for epochs in (1, 2):  # the second call resumes
            run(split, tmp_path / "a", epochs, model=model)
        run(split, tmp_path / "b", 1, start=finished[0])
    with pytest.warns(UserWarning, match="trained before: the run starts from its"):
        run(split, tmp_path / "c", 1, model=model, learning_rate=0.01)

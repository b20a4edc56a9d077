"""Train a model from generators: schedule, best checkpoint, history, going on."""

import contextlib
import functools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops
from tqdm import tqdm

from brats_utils.files import atomic_write
from brats_utils.labels import ENCODED_REGIONS
from brats_utils.losses import dice_cross_entropy_loss
from brats_utils.metrics import RegionDice
from brats_utils.model import model_table, supervise_deeply
from brats_utils.runs import BEST, HISTORY, begin_or_go_on, save_model, save_state
from brats_utils.transforms import NORMALISATION

WARMUP_SHARE = 0.05  # of all steps
WEIGHT_DECAY = 1e-4
CLIP_NORM = 1.0
AVERAGED_SHARE = 0.05  # of all steps: an average reaches back no further


def has_gpu():
    """Return whether Keras's backend sees a GPU.

    Returns
    -------
    gpu : bool
        False on the torch backend, whose devices Keras does not list.
    """
    try:
        return bool(keras.distribution.list_devices("gpu"))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False


def choose_precision():
    """Return the dtype policy to set before a model is made.

    Returns
    -------
    policy : str
        "mixed_bfloat16" on a GPU of compute capability 8 or more (A100, L4), else
        "mixed_float16" on one of 7 (T4, V100), and "float32" anywhere else.

    References
    ----------
    https://developer.nvidia.com/cuda-gpus lists the compute capabilities.
    """
    if not has_gpu():
        return "float32"
    capability = min(_ask_gpus("compute_cap", otherwise=0))
    if capability >= 8:
        return "mixed_bfloat16"
    return "mixed_float16" if capability >= 7 else "float32"


def _ask_gpus(field, otherwise):
    """Return what NVIDIA's tool says of each GPU; [otherwise] if nothing."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30)
        return [float(line) for line in found.stdout.split()] or [otherwise]
    except (OSError, subprocess.SubprocessError, ValueError):
        return [otherwise]


def _memory_gb():
    """Return the training device's memory in GB (10⁹ bytes); infinity if unknown."""
    if has_gpu():
        return max(_ask_gpus("memory.total", otherwise=math.inf)) * 2**20 / 1e9
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _check_memory(model, data):
    """Raise if half of the layers' outputs, the least a step keeps, cannot fit."""
    needed_gb = model_table(model, data.input_shape)["activations_mb"]["total"] / 1e3
    needed_gb *= data.batch_size / (4 if "16" in model.layers[1].compute_dtype else 2)
    parallel = keras.distribution.distribution()
    needed_gb /= parallel.device_mesh.devices.size if parallel else 1
    if needed_gb > _memory_gb():
        raise MemoryError(f"a step keeps {needed_gb:.1f} of {_memory_gb():.1f} GB")


def _jit():
    """Return what `compile` gets as `jit_compile`.

    XLA makes TensorFlow's 3-D convolutions ten times slower on a CPU; JAX needs it.
    """
    return (
        False if keras.backend.backend() == "tensorflow" and not has_gpu() else "auto"
    )


def _schedule(learning_rate, steps):
    """Return a learning rate that warms up linearly and falls along a cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return keras.optimizers.schedules.CosineDecay(
        learning_rate / warmup,
        max(1, steps - warmup),
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )


def _compile(model, loss, learning_rate, steps, average):
    """Compile with AdamW, clipped gradients and the Dice of each region."""
    # Keras's average begins with the first weights, which a short run would keep.
    momentum = min(average, max(0.5, 1 - 1 / (AVERAGED_SHARE * steps)))
    optimizer = keras.optimizers.AdamW(
        _schedule(learning_rate, steps),
        weight_decay=WEIGHT_DECAY,
        global_clipnorm=CLIP_NORM,
        use_ema=average > 0,
        ema_momentum=momentum,
    )
    metrics = [RegionDice(region) for region in ENCODED_REGIONS]
    model.compile(optimizer, loss, metrics=metrics, jit_compile=_jit())
    # Not `optimizer`: with mixed_float16 Keras has wrapped it, to scale the loss.
    model.optimizer.build(model.trainable_variables)
    # What is not built yet JAX and torch build with a first batch before the first
    # epoch, and a second worker's batches, queued by then, come again later.
    factors = getattr(model, "factors", (1,))
    *grid, n_outputs = model.outputs[0].shape
    grids = [[1, *[factors[-1] // factor] * len(grid[1:])] for factor in factors]
    labels = np.zeros([*grids[0], 1], np.uint8)
    outputs = [np.full([*grid, n_outputs], 0.5, np.float32) for grid in grids]
    outputs = outputs if len(factors) > 1 else outputs[0]
    model.compute_loss(None, labels, outputs)
    model.compute_metrics(None, labels, outputs)


def _describe(model, train_data, val_data, loss, **settings):
    """Return what `model.json` says: the input that the model needs, and its making."""
    return {
        "modalities": list(train_data.modalities),
        "normalisation": NORMALISATION,
        "orientation": "LPS",
        "outputs": "labels 0..3" if model.output_shape[-1] == 4 else "WT, TC, ET",
        "labels": train_data.settings.get("labels"),
        "crop_shape": train_data.settings.get("crop_shape"),
        "scaling": train_data.settings.get("scaling"),
        "patch_shape": train_data.patch_shape and list(train_data.patch_shape),
        "batch_size": train_data.batch_size,
        "patches_per_case": train_data.patches_per_case,
        "tumour_share": train_data.tumour_share,
        "augment": getattr(train_data.augment, "__name__", train_data.augment),
        "seed": train_data.seed,
        "weights": f"{len(model.weights)} arrays, {model.count_params()} parameters",
        "loss": getattr(loss, "__name__", type(loss).__name__),
        **settings,
        "train_cases": train_data.case_ids,
        "val_cases": val_data.case_ids,
        "volumes": [train_data.checksum, val_data.checksum],
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }


def _mean_dice(row):
    """Return the mean validation Dice of a history row, -1 where there is none."""
    values = [row.get(f"val_dice_{region}", np.nan) for region in ENCODED_REGIONS]
    return float(np.nan_to_num(np.mean(values), nan=-1))


def _progress_bar(done, epochs, verbose):
    """Return a bar of one line that counts epochs, with `done` of them behind it."""
    return tqdm(
        total=epochs,
        initial=done,
        desc="training",
        unit="epoch",
        file=sys.stdout,  # as text: a saved notebook loses a widget's last state
        disable=not verbose,
    )


class _Keeper(keras.callbacks.Callback):
    """At the end of each epoch: check, save the state, the best model, the history."""

    def __init__(self, run_dir, train_data, val_data, save, rows, max_minutes, bar):
        super().__init__()
        self.run_dir, self.rows, self.bar, self.save = run_dir, rows, bar, save
        self.train_data, self.val_data = train_data, val_data
        limit_s = np.inf if max_minutes is None else 60 * max_minutes
        self.deadline = time.perf_counter() + limit_s

    def on_epoch_begin(self, epoch, logs=None):
        self.train_data.set_epoch(epoch)
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.val_data.set_epoch(0)  # the same patches each time
        self._lend_average()

    def on_test_end(self, logs=None):
        self.model.set_weights(self.own)

    def _lend_average(self):
        """Give the model the average of its weights, where the optimizer keeps one."""
        self.own = self.model.get_weights()
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        # Copies: JAX, validating, would give away arrays that are the optimizer's.
        self.model.set_weights(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self._check_finite(epoch, logs["loss"])
        seconds = time.perf_counter() - self.start
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": epoch + 1, "seconds": seconds, "learning_rate": rate}
        self.rows.append({**row, **{k: float(v) for k, v in logs.items()}})
        score = _mean_dice(self.rows[-1])
        # Until the first validation the newest model is the best there is.
        best = score >= max(map(_mean_dice, self.rows))
        if best or not (self.run_dir / BEST).exists():
            self._lend_average()
            save_model(self.model, self.run_dir / BEST)
            self.model.set_weights(self.own)
        with atomic_write(self.run_dir / HISTORY) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)
        self.save(rows=self.rows)
        shown = {"loss": f"{logs['loss']:.3f}"}
        shown |= {"val Dice": f"{score:.3f}"} if score >= 0 else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if time.perf_counter() > self.deadline:
            self.model.stop_training = True

    def _check_finite(self, epoch, loss):
        """Raise if the loss or a weight is NaN or infinite."""
        weights = self.model.weights
        if np.isfinite(loss) and all(bool(ops.all(ops.isfinite(w))) for w in weights):
            return
        raise FloatingPointError(
            f"epoch {epoch + 1}: the loss or a weight is NaN or infinite. The state of "
            f"the epoch before is kept in {self.run_dir}. Lower the learning rate, or "
            "look for a bad volume with check_cases"
        )


@contextlib.contextmanager
def _advice_on_memory(data):
    """Turn whatever a backend raises when memory is short into one plain error."""
    try:
        yield
    except Exception as error:  # each backend has a class of its own
        if not re.search(
            "ResourceExhausted|RESOURCE_EXHAUSTED|MemoryError", repr(error)
        ):
            raise
        raise MemoryError(
            f"out of memory with {data.batch_size} patches of {data.patch_shape} a "
            f"step ({str(error)[:200]}). Lower batch_size to 1 first, then patch_shape "
            "(96 or 64 voxels a side), then the model's filters. Nothing that was "
            "saved is lost"
        ) from error


def _fit(model, keeper, epochs, validation_freq):
    """Train for the epochs that the keeper's history lacks."""
    keeper.train_data.verify()
    keeper.val_data.verify()
    volumes = keeper.train_data.report[[f"{region}_ml" for region in ENCODED_REGIONS]]
    absent = [name.removesuffix("_ml") for name in volumes if not volumes[name].any()]
    if absent:
        print(f"No training case has {', '.join(absent)}: it cannot be learnt")
    validated = [e for e in range(1, epochs) if e % validation_freq == 0]
    model.fit(
        keeper.train_data,
        validation_data=keeper.val_data,
        validation_freq=[*validated, epochs],
        initial_epoch=len(keeper.rows),
        epochs=epochs,
        shuffle=False,  # the generator's order is its own
        verbose=0,
        callbacks=[keeper],
    )


def train(
    model,
    train_data,
    val_data,
    run_dir,
    *,
    epochs,
    loss=dice_cross_entropy_loss,
    learning_rate=1e-3,
    deep_supervision=0,
    average=0.0,
    validation_freq=1,
    max_minutes=None,
    verbose=True,
):
    """Train a model, or go on with the run that `run_dir` holds.

    AdamW with a linear warm-up over a twentieth of all steps and a cosine decay to 0.
    After each epoch the state is saved, so that a run that was stopped goes on where
    it was when the same call is made again; a finished run returns at once. The
    learning rate is planned for `epochs`: asking a finished run for more goes on with
    the rate that the longer plan has at that point.

    Parameters
    ----------
    model : keras.Model
        As `unet` makes it; a run that goes on wants the same architecture. Holds the
        weights of the best epoch afterwards.
    train_data, val_data : BratsGenerator
        Validation uses the same patches in every epoch.
    run_dir : path
        Gets `best.keras` (the epoch with the best mean Dice of WT, TC and ET in
        validation), `last.npz` and `last_but_one.npz` (the states), `history.csv` and
        `model.json`.
    epochs : int
        In all, those of an earlier call included.
    loss : function or keras.losses.Loss
        Of labels (B, ..., 1) and probabilities (B, ..., K).
    learning_rate : float
        The highest one, after the warm-up.
    deep_supervision : int
        How many coarser outputs learn as well, see `supervise_deeply`.
    average : float
        Momentum of a moving average of the weights, which is what is validated and kept
        as the best: 0.99 averages over some hundred steps, though never over more than
        a twentieth of the run; 0 keeps the weights' own. The statistics of batch
        normalisation, a moving average already, stay as they are.
    validation_freq : int
        Validate every so many epochs, and after the last.
    max_minutes : float, optional
        Stop after the epoch in which this time is up; the same call then goes on. The
        learning rate stays planned for `epochs`, so give as many as the time allows.
    verbose : bool
        Whether to show a progress bar.

    Returns
    -------
    history : pandas.DataFrame
        A row an epoch: "epoch" (from 1), "seconds", "learning_rate", "loss",
        "dice_WT", ..., and "val_loss", "val_dice_WT", ... where validated.

    Raises
    ------
    FloatingPointError
        If the loss or a weight becomes NaN or infinite; the state before is kept.
    MemoryError
        If the device's memory does not suffice; says which sizes to lower.
    ValueError
        If `run_dir` holds a run of another model, of other data or other settings, or
        only damaged states; if a volume has changed since it was prepared; or if
        `epochs` is less than 1.

    References
    ----------
    Loshchilov and Hutter, 2019, arXiv:1711.05101 (AdamW), and 2017, arXiv:1608.03983
    (the cosine); Izmailov et al., 2018, arXiv:1803.05407 (averaged weights).
    """
    if epochs < 1:
        raise ValueError(f"epochs is at least 1, got {epochs}")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": learning_rate, "average": average}
    settings["deep_supervision"] = deep_supervision
    description = _describe(model, train_data, val_data, loss, **settings)
    pupil = supervise_deeply(model, deep_supervision) if deep_supervision else model
    _compile(pupil, loss, learning_rate, epochs * len(train_data), average)
    rows = begin_or_go_on(pupil, run_dir, description, epochs)
    if len(rows) < epochs:
        bar = _progress_bar(len(rows), epochs, verbose)
        save = functools.partial(
            save_state, pupil, description=description, run_dir=run_dir
        )
        keeper = _Keeper(run_dir, train_data, val_data, save, rows, max_minutes, bar)
        with bar, _advice_on_memory(train_data):
            _check_memory(model, train_data)
            _fit(pupil, keeper, epochs, validation_freq)
    best = keras.models.load_model(run_dir / BEST, compile=False)
    model.set_weights(best.get_weights())
    return pd.DataFrame(rows)

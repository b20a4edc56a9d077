"""Train a model from generators: schedule, best checkpoint, history, going on."""

import io
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops
from tqdm import tqdm

from brats_utils.files import atomic_write, write_json
from brats_utils.labels import ENCODED_REGIONS
from brats_utils.losses import dice_cross_entropy_loss
from brats_utils.metrics import RegionDice

WARMUP_SHARE = 0.05  # of all steps
WEIGHT_DECAY = 1e-4
CLIP_NORM = 1.0
BEST, STATE, HISTORY, SIDECAR = "best.keras", "last.npz", "history.csv", "model.json"


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


def _compile(model, loss, learning_rate, steps):
    """Compile with AdamW, clipped gradients and the Dice of each region."""
    optimizer = keras.optimizers.AdamW(
        _schedule(learning_rate, steps),
        weight_decay=WEIGHT_DECAY,
        global_clipnorm=CLIP_NORM,
    )
    metrics = [RegionDice(region) for region in ENCODED_REGIONS]
    model.compile(optimizer, loss, metrics=metrics, jit_compile=_jit())
    optimizer.build(model.trainable_variables)


def _variables(model):
    """Return all that a run must keep to go on: weights, then the optimizer's own."""
    return [*model.weights, *model.optimizer.variables]


def _save_state(model, epoch, path):
    """Write the weights, the optimizer's state and the number of finished epochs."""
    arrays = {
        f"v{i:04}": ops.convert_to_numpy(variable)
        for i, variable in enumerate(_variables(model))
    }
    with atomic_write(path) as temporary:
        np.savez(temporary, epoch=epoch, **arrays)


def _load_state(model, path):
    """Put a saved state into a compiled model; return the number of finished epochs."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as state:
        variables = _variables(model)
        arrays = [state[name] for name in sorted(state.files) if name != "epoch"]
        epoch = int(state["epoch"])
    shapes = [tuple(variable.shape) for variable in variables]
    if [array.shape for array in arrays] != shapes:
        raise ValueError(
            f"{path.parent} holds the run of another model: {len(arrays)} arrays, this "
            f"one has {len(shapes)}. Choose another run_dir, or delete that folder"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return epoch


def save_model(model, path):
    """Save architecture and weights alone, so that Keras reloads it by itself.

    Parameters
    ----------
    model : keras.Model
        Functional; neither its loss nor its optimizer is written.
    path : path
        Ends in `.keras`.
    """
    bare = keras.Model(model.inputs, model.outputs, name=model.name)
    with atomic_write(path) as temporary:
        bare.save(temporary)


def _describe(model, data):
    """Return what `model.json` says: the input that the model needs, and of what."""
    return {
        "modalities": list(data.modalities),
        "normalisation": "mean 0, SD 1 over each modality's non-zero voxels",
        "orientation": "LPS",
        "outputs": "labels 0..3" if model.output_shape[-1] == 4 else "WT, TC, ET",
        "patch_shape": data.patch_shape,
        "labels": data.settings.get("labels"),
        "train_cases": data.case_ids,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }


class _Keeper(keras.callbacks.Callback):
    """At the end of each epoch: check, save the state, the best model, the history."""

    def __init__(self, run_dir, train_data, val_data, history, epochs, verbose):
        super().__init__()
        self.run_dir, self.rows, self.epochs = run_dir, history, epochs
        self.train_data, self.val_data = train_data, val_data
        self.bar = tqdm(
            total=epochs,
            initial=len(history),
            desc="training",
            unit="epoch",
            file=sys.stdout,
            disable=not verbose,
        )

    def on_epoch_begin(self, epoch, logs=None):
        self.train_data.set_epoch(epoch)
        self.val_data.set_epoch(0)  # the same patches each time
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        finite = np.isfinite(logs["loss"]) and all(
            bool(ops.all(ops.isfinite(weight))) for weight in self.model.weights
        )
        if not finite:
            raise FloatingPointError(
                f"epoch {epoch + 1}: the loss or a weight is NaN or infinite. The "
                f"state of the epoch before is kept in {self.run_dir}. Lower the "
                "learning rate, or look for a bad volume with check_cases"
            )
        seconds = time.perf_counter() - self.start
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": epoch + 1, "seconds": seconds, "learning_rate": rate}
        self.rows.append({**row, **{k: float(v) for k, v in logs.items()}})
        score = _mean_dice(self.rows[-1])
        if score is not None and score >= max(
            s for s in map(_mean_dice, self.rows) if s is not None
        ):
            save_model(self.model, self.run_dir / BEST)
        with atomic_write(self.run_dir / HISTORY) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)
        _save_state(self.model, epoch + 1, self.run_dir / STATE)
        shown = {"loss": f"{logs['loss']:.3f}"}
        shown |= {} if score is None else {"val Dice": f"{score:.3f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, logs=None):
        self.bar.close()


def _mean_dice(row):
    """Return the mean validation Dice of a history row, None where there is none."""
    values = [row.get(f"val_dice_{region}") for region in ENCODED_REGIONS]
    known = all(value is not None and np.isfinite(value) for value in values)
    return float(np.mean(values)) if known else None


def train(
    model,
    train_data,
    val_data,
    run_dir,
    *,
    epochs,
    loss=dice_cross_entropy_loss,
    learning_rate=1e-3,
    validation_freq=1,
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
        validation), `last.npz` (the state), `history.csv` and `model.json`.
    epochs : int
        In all, those of an earlier call included.
    loss : function or keras.losses.Loss
        Of labels (B, ..., 1) and probabilities (B, ..., K).
    learning_rate : float
        The highest one, after the warm-up.
    validation_freq : int
        Validate every so many epochs, and after the last.
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
    ValueError
        If `run_dir` holds the run of another model, or `epochs` is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs is at least 1, got {epochs}")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _compile(model, loss, learning_rate, epochs * len(train_data))
    done, rows = 0, []
    if (run_dir / STATE).exists():
        done = _load_state(model, run_dir / STATE)
        rows = pd.read_csv(run_dir / HISTORY).head(done).to_dict("records")
    if done < epochs:
        write_json(run_dir / SIDECAR, _describe(model, train_data))
        keeper = _Keeper(run_dir, train_data, val_data, rows, epochs, verbose)
        validated = [e for e in range(1, epochs) if e % validation_freq == 0]
        model.fit(
            train_data,
            validation_data=val_data,
            validation_freq=[*validated, epochs],
            initial_epoch=done,
            epochs=epochs,
            shuffle=False,  # the generator's order is its own
            verbose=0,
            callbacks=[keeper],
        )
    best = keras.models.load_model(run_dir / BEST, compile=False)
    model.set_weights(best.get_weights())
    return pd.DataFrame(rows)

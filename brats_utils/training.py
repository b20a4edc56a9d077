"""Train a model from generators: schedule, checkpoints, history, resuming a run."""

import json
import os
import re
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from brats_utils import files, losses
from brats_utils import model as networks
from brats_utils.generator import CHANNELS, SEEN, check_pair
from brats_utils.labels import ENCODED_REGIONS
from brats_utils.model import BEST, has_gpu, start_from, write_model
from brats_utils.volumes import NORMALISATION

HISTORY, STATE, FORMER = "history.csv", "last.npz", "last_but_one.npz"
ANOTHER_RUN = "Choose another run_dir (in notebook 04, RUN), or delete this one"
WARMUP_SHARE = AVERAGED_SHARE = 0.05  # of all steps; averages span at most this
PILOT, PILOT_PLAN = 2, 20  # epochs to time, and the planned number until then
VALIDATIONS = 10  # in a run, by default
OPTIMIZER = {"weight_decay": 1e-4, "global_clipnorm": 1.0}  # of AdamW


# Callbacks that set the learning rate, which `train` itself schedules.
SCHEDULERS = keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau


def _are_usable(xs):
    usable = [x for x in xs if isinstance(x, keras.callbacks.Callback)]
    return len(xs) == len(usable) and not any(isinstance(x, SCHEDULERS) for x in xs)


OPTIONAL = ("epochs", "minutes", "max_minutes", "validation_freq")  # may be None
# The values that options of `train` may have, as (fits, expected) for `check_option`.
POSSIBLE = dict.fromkeys(("epochs", "validation_freq"), files.whole(1))
POSSIBLE |= {"average": files.number(0, 0.9999), "start_share": files.number(0, 0.99)}
POSSIBLE |= {"minutes": files.number(0, 1e6), "max_minutes": files.number(0, np.inf)}
POSSIBLE |= {"learning_rate": files.number(1e-12, 1e3), "verbose": files.BOOL}
POSSIBLE["deep_supervision"] = files.whole(0)
POSSIBLE["loss"] = keras.losses.get, "a loss as Keras takes it"
POSSIBLE["callbacks"] = _are_usable, "a list of keras.callbacks.Callback, no schedule"


def choose_precision():
    """Return the dtype policy to set before a model is made.

    Returns
    -------
    policy : str
        "mixed_float16" on a GPU, "float32" on a CPU.
    """
    return "mixed_float16" if has_gpu() else "float32"


def _compile(model, loss, learning_rate, average, steps):
    """Compile with AdamW, clipped gradients and the Dice of each region."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    plan = {"warmup_target": learning_rate, "warmup_steps": warmup}
    plan |= {"decay_steps": max(1, steps - warmup)}
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate / warmup, **plan)
    # Keras's average starts at the initial weights, which would dominate a short run.
    momentum = min(average, max(0.5, 1 - 1 / (AVERAGED_SHARE * steps)))
    ema = {"use_ema": average > 0, "ema_momentum": momentum}
    optimizer = keras.optimizers.AdamW(schedule, **OPTIMIZER, **ema)
    metrics = [losses.RegionDice(region) for region in ENCODED_REGIONS]
    # XLA makes TensorFlow's 3-D convolutions ten times slower on a CPU; JAX needs it.
    slow = keras.backend.backend() == "tensorflow" and not has_gpu()
    slow = slow or getattr(model, "without_xla", False)
    model.compile(optimizer, loss, metrics=metrics, jit_compile=not slow and "auto")
    # Not `optimizer`: with mixed_float16, Keras wraps it to scale the loss.
    model.optimizer.build(model.trainable_variables)
    losses.build_losses(model)


def _describe_run(model, train_data, val_data, loss, **settings):
    """Return the run's description: everything that must match to resume it."""
    settings["start_share"] = settings["start_share"] or None  # as in older states
    description = {
        "modalities": train_data.modalities,
        "normalisation": NORMALISATION,
        "orientation": "LPS",
        "outputs": "labels 0..3" if model.output_shape[-1] == 4 else "WT, TC, ET",
        "patch_shape": train_data.patch_shape,
        "precision": keras.config.dtype_policy().name,
        "train_cases": train_data.case_ids,
        "val_cases": val_data.case_ids,
        "settings": {k: v for k, v in train_data.settings.items() if k != "raw"},
        "train_data": train_data.describe(),
        "val_data": val_data.describe(),
        "loss": loss,
        "optimizer": {"class": "AdamW", **OPTIMIZER, **settings},
        "model": losses.describe_model(model),
    }
    return losses.describe(description)


class Run:
    """The folder of a training run, with its history, states and best model.

    Parameters
    ----------
    output : files.OutputFolder
        Open, of the kind "run".
    description : dict
        Everything that must match to resume the run.
    seen : set of str
        The images that the model has been trained on, see `generator.SEEN`.
    """

    def __init__(self, output, description, seen):
        self.output, self.description, self.seen = output, description, seen
        self.rows, self.former_is_newest = [], False  # True: the newest is damaged

    def resume(self, model):
        """Restore the run in the folder, if there is one, without writing anything.

        Parameters
        ----------
        model : keras.Model
            Compiled, with its optimizer built. Receives the run's variables.

        Raises
        ------
        ValueError
            If the folder holds a run with another description, only damaged states, or
            a model without a state.
        """
        folder = self.output.path
        arrays, record = self._read_state() or (None, dict(history=[], description={}))
        if arrays is None and (folder / BEST).exists():
            raise ValueError(f"{folder} holds {BEST}, but no state. {ANOTHER_RUN}")
        differ = files.find_differences(record["description"], self.description)
        if record["history"] and differ:
            found = "; ".join(differ[:5])
            problem = f"{folder} holds a run with other settings: {found}"
            raise ValueError(f"{problem}. {ANOTHER_RUN}")
        if record["history"] and not zipfile.is_zipfile(folder / BEST):
            problem = f"{BEST} in {folder} is missing or damaged"
            raise ValueError(f"{problem}. {ANOTHER_RUN}")
        # A different run that was stopped in its first epoch is simply replaced.
        self.rows, self.is_new = record["history"], arrays is None or bool(differ)
        if not self.is_new:
            self.seen.update(record.get("seen", ()))
            for variable, array in zip(_variables(model), arrays, strict=True):
                variable.assign(array)

    def begin(self, model):
        """Register the files of the run, and save the initial state of a new one.

        Parameters
        ----------
        model : keras.Model
            Compiled.
        """
        self.output.begin(self.description)
        self.output.claim([BEST, HISTORY, STATE, FORMER])
        if self.former_is_newest:
            os.replace(self.output.path / FORMER, self.output.path / STATE)
        if self.is_new:
            self.save(model)

    def save(self, model):
        """Write the state and keep the previous one.

        Parameters
        ----------
        model : keras.Model
            Compiled.
        """
        variables = map(ops.convert_to_numpy, _variables(model))
        arrays = {f"v{i:04}": array for i, array in enumerate(variables)}
        record = {"history": self.rows, "description": self.description}
        record = json.dumps({**record, "seen": sorted(self.seen)})
        state, former = self.output.path / STATE, self.output.path / FORMER
        self.output.save()  # record the best model before a state that refers to it
        with self.output.write(STATE) as temporary:
            np.savez(temporary, record=record, **arrays)
            if state.exists():
                os.replace(state, former)
        self.output.save()

    def check_best(self):
        """Raise if the best model is not the one that this run wrote."""
        output = self.output
        if files.find_changed(output.path, {BEST: output.manifest["files"].get(BEST)}):
            problem = f"{BEST} in {output.path} is not the one that this run wrote"
            raise ValueError(f"{problem}. {ANOTHER_RUN}")

    def _read_state(self):
        """Return (variables, record) of the newest valid state, None without any."""
        problems, state = [], self.output.path / STATE
        for path in filter(Path.exists, (state, self.output.path / FORMER)):
            try:
                arrays, record = files.read_arrays(path)
            except Exception as error:  # whatever zip and numpy raise for damaged files
                problems.append(f"{path} is damaged ({error})")
                continue
            if problems:
                text = f"{problems[0]}; resuming from {path.name}, the state before it"
                warnings.warn(text, stacklevel=4)
            self.former_is_newest = bool(problems)
            return arrays, record
        if problems:
            text = f"{' and '.join(problems)}. If {BEST} is there it is the best model"
            raise ValueError(f"{text} so far. {ANOTHER_RUN}")


def _variables(model):
    """Return what a state stores: weights, dropout seeds and optimizer state."""
    return [*model.variables, *model.optimizer.variables]


def _mean_dice(row):
    """Return the mean validation Dice of a history row, -1 if there is none."""
    values = [row.get(f"val_dice_{region}", np.nan) for region in ENCODED_REGIONS]
    return float(np.nan_to_num(np.mean(values), nan=-1))


class Checkpoint(keras.callbacks.Callback):
    """Set the generator's epoch; after each epoch save history, best model and state.

    Training stops after the epoch in which `deadline` passes. `averaged(model)` is a
    context manager that switches to the weights to validate and save. `model` does not
    have the outputs of deep supervision.
    """

    def __init__(self, output, description, model, data, averaged, verbose):
        super().__init__()
        self.train_data, self.val_data = data
        self.run = Run(output, description, SEEN.setdefault(model, set()))
        self.base_model, self.averaged, self.begun = model, averaged, False
        options = {"desc": "training", "unit": "epoch", "disable": not verbose}
        self.bar, self.deadline = files.progress_bar(**options), np.inf

    def begin(self, model):
        """Verify the volumes and register the files of the run."""
        self.train_data.verify()
        self.val_data.verify()
        if self.run.is_new and self.run.seen and not self.run.description["start"]:
            text = "this model was trained before: the run starts from its weights. "
            warnings.warn(f"{text}For new ones, create it with unet", stacklevel=4)
        self.run.begin(model)
        self.begun = True
        for region in ENCODED_REGIONS:
            if not any(row[f"{region}_ml"] for row in self.train_data.rows.values()):
                warnings.warn(f"no training case has {region}", stacklevel=4)

    def on_epoch_begin(self, epoch, logs=None):
        """Tell the generator which epoch it is."""
        self.train_data.set_epoch(epoch)
        self.start = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        """Note which batch it is."""
        self.batch = batch

    def on_test_begin(self, logs=None):
        """Switch to the averaged weights, and to the same patches each time."""
        self.val_data.set_epoch(0)
        self.validation = self.averaged(self.model)
        self.validation.__enter__()

    def on_test_end(self, logs=None):
        """Switch back to the weights that are being trained."""
        self.validation.__exit__(None, None, None)

    def on_epoch_end(self, epoch, logs=None):
        """Save the results; the state last, because it implies that the rest exists."""
        # A callback may have stopped training within the epoch.
        if self.model.stop_training and self.batch + 1 < len(self.train_data):
            return
        rows, output = self.run.rows, self.run.output
        seconds = time.perf_counter() - self.start
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": epoch + 1, "seconds": seconds, "learning_rate": rate}
        rows.append({**row, **{k: float(v) for k, v in logs.items()}})
        score = _mean_dice(rows[-1])
        # Until the first validation, the newest model counts as the best.
        if score >= max(map(_mean_dice, rows)) or not (output.path / BEST).exists():
            stored = {k: v for k, v in self.run.description.items() if k != "model"}
            stored["train_images"] = sorted(self.run.seen)
            with self.averaged(self.model), output.write(BEST) as temporary:
                write_model(self.model, temporary, stored)
        with output.write(HISTORY) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)
        self.run.save(self.model)
        validated = {"val Dice": f"{score:.3f}"} if score >= 0 else {}
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", **validated, refresh=False)
        self.bar.update()
        if time.perf_counter() > self.deadline:
            self.model.stop_training = True


def _check_options(model, start, **options):
    """Raise if an option of `train` is invalid or does not fit the model."""
    for name, value in options.items():
        if value is not None or name not in OPTIONAL:
            files.check_option(name, value, *POSSIBLE[name])
    if options["epochs"] is None and options["minutes"] is None:
        raise ValueError("epochs is None, expected epochs or minutes to train for")
    if start is None and (share := options["start_share"]):
        raise ValueError(f"start_share is {share}, expected 0 without a start")
    losses.check_loss(options["loss"], model)


def plan_epochs(rows, minutes, epochs=None):
    """Estimate how many epochs fit into a given time, from those already done.

    Parameters
    ----------
    rows : list of dict
        The history, from which a resumed run gets the same plan.
    minutes : float
        Time for all epochs together.
    epochs : int, optional
        If given, plan this number whatever the time.

    Returns
    -------
    total : int
        Total number of epochs.
    stop : int
        How many to train before planning again: first two, then a quarter, in case the
        speed of the machine has changed, and finally all.
    """

    def estimate(n_timed):
        first, *others = [row["seconds"] for row in rows[:n_timed]]
        # The first epoch is slower because it also builds the graph.
        return max(n_timed, 1 + int((60 * minutes - first) / np.mean(others)))

    if epochs is not None:
        return epochs, epochs
    if len(rows) < PILOT:
        return PILOT_PLAN, PILOT
    total = estimate(PILOT)
    quarter = max(PILOT, total // 4)
    if len(rows) >= quarter:
        total = quarter = estimate(quarter)  # final: `stop` is the end
    return total, quarter


def _fit(model, checkpoint, epochs, stop, validation_freq, callbacks):
    """Train the epochs up to `stop` that are not done yet, out of `epochs` planned."""
    every = validation_freq or max(1, epochs // VALIDATIONS)
    validated = [e for e in range(1, epochs + 1) if e % every == 0 or e == epochs]
    fit = partial(
        model.fit,
        checkpoint.train_data,
        validation_data=checkpoint.val_data,
        validation_freq=validated,
        epochs=stop,
        shuffle=False,  # the generator shuffles by itself
        verbose=0,
        callbacks=[losses.FiniteCheck(), checkpoint, *callbacks],
    )
    try:
        fit(initial_epoch=len(checkpoint.run.rows))
    except Exception as error:  # cuDNN 9.3 to 9.5 fail in XLA on some GPUs
        in_xla = re.match("(?is)(?!.*resource_?exhausted).*(cudnn|xla)", repr(error))
        if not (in_xla and model.jit_compile) or keras.backend.backend() == "jax":
            raise
        text = f"XLA failed ({str(error)[:200]}): continuing without it, more slowly"
        warnings.warn(text, stacklevel=3)
        model.jit_compile, model.train_function, model.test_function = False, None, None
        model.without_xla = True  # also after a new plan
        checkpoint.run.resume(model)  # undo the changes of the unfinished epoch
        fit(initial_epoch=len(checkpoint.run.rows))


def _follow_plan(
    model, compile_for, checkpoint, extra, epochs, minutes, validation_freq, max_minutes
):
    """Train with extra callbacks until the planned epochs are done or time is up.

    The learning rate depends on the number of epochs, so each new plan compiles the
    model again and resumes the run from its state.
    """
    if max_minutes is not None:
        checkpoint.deadline = time.perf_counter() + 60 * max_minutes
    run, bar, train_data = checkpoint.run, checkpoint.bar, checkpoint.train_data
    plan, previous = plan_epochs([], minutes, epochs), None
    while plan != previous:
        total, stop = previous = plan
        compile_for(total * len(train_data))
        run.resume(model)
        if len(run.rows) < stop and not checkpoint.begun:
            checkpoint.begin(model)
        run.seen |= train_data.name_images()
        CHANNELS[checkpoint.base_model] = train_data.modalities
        bar.n, bar.total = len(run.rows), total
        if len(run.rows) < stop:
            _fit(model, checkpoint, total, stop, validation_freq, extra)
            if model.stop_training and not run.rows:
                raise ValueError("callbacks stopped training within its first epoch")
            if model.stop_training:
                break
        plan = plan_epochs(run.rows, minutes, epochs)
    run.check_best()


def train(
    model,
    train_data,
    val_data,
    run_dir,
    *,
    epochs=None,
    minutes=None,
    loss=losses.dice_cross_entropy_loss,
    learning_rate=1e-3,
    deep_supervision=0,
    average=0.0,
    validation_freq=1,
    start=None,
    start_share=0.0,
    max_minutes=None,
    callbacks=(),
    verbose=True,
):
    """Train a model, or resume the run that `run_dir` holds.

    Give either `epochs` or `minutes`. The optimizer is AdamW, with a linear warm-up
    over a twentieth of all steps and a cosine decay to 0. The state is saved after each
    epoch: the same call resumes an interrupted run where it left off, and returns at
    once if the run is finished. The learning rate is planned for `epochs`: if you ask a
    finished run for more, it continues at the rate of the longer plan.

    Parameters
    ----------
    model : keras.Model
        For example from `unet`. To resume a run, it must have the same architecture. A
        new run without `start` begins with its weights, and warns if they were trained.
        Afterwards it holds those of the best epoch.
    train_data, val_data : BratsGenerator
        Validation uses the same patches in every epoch.
    run_dir : path
        Where to write `best.keras` (the epoch with the best mean Dice of WT, TC, ET in
        validation), `last.npz` and `last_but_one.npz` (the states), `history.csv` and
        `manifest.json`.
    epochs : int, optional
        Total number of epochs, including those of earlier calls.
    minutes : float, optional
        Train for as many epochs as fit into this time, if `epochs` is not given. The
        first two epochs are timed, and the plan is corrected once after a quarter. A
        resumed run keeps its plan.
    loss : function or keras.losses.Loss
        Takes labels (B, ..., 1) and probabilities (B, ..., K).
    learning_rate : float
        The peak learning rate, reached after the warm-up.
    deep_supervision : int
        Number of coarser outputs to train as well, see `losses.supervise_deeply`.
    average : float
        Momentum of a moving average of the weights, which is validated and saved in
        their place. 0.99 averages over about a hundred steps, but over a twentieth of
        the run at most. 0 turns averaging off. The statistics of batch normalisation,
        already a moving average, are not averaged again.
    validation_freq : int, optional
        Number of epochs between validations; the last epoch is always validated. None
        validates about ten times in total.
    start : path or "phantom", optional
        Start from the weights of this model instead of random ones: a `.keras` file,
        the folder of a run, or "phantom", the weights that come with this package.
        Channels, filters, depth and stride must be the same; for "phantom", the data
        may lack T1.
    start_share : float
        Share of the weights of `start` in the weights that are validated and saved; the
        trained weights make up the rest. A short run on few cases then forgets less of
        what `start` had learned. Must be 0 without `start`.
    max_minutes : float, optional
        Stop after the epoch in which this time is up; the same call then resumes. The
        learning rate is still planned for `epochs`, so set as many as the time allows.
    callbacks : list of keras.callbacks.Callback
        Your own, such as a logger or early stopping. They are called after the state of
        an epoch is saved, with the model being trained and epochs counted over the
        whole run. They are not part of the run: a call that resumes it may pass others.
        Those that set the learning rate, which has a schedule, are refused. An epoch
        within which one stops training is not saved; the next call repeats it.
    verbose : bool
        Whether to show a progress bar.

    Returns
    -------
    history : pandas.DataFrame
        One row per epoch: "epoch" (from 1), "seconds", "learning_rate", "loss",
        "dice_WT", ..., and "val_loss", "val_dice_WT", ... where validated.

    Raises
    ------
    FloatingPointError
        If the loss or a weight becomes NaN or infinite; the last state is kept.
    MemoryError
        If the device runs out of memory; the message says which sizes to lower.
    ValueError
        If `run_dir` holds a run with another model, data or settings, only damaged
        states, or other files; if a volume has changed since it was prepared; if
        `start` does not fit; if `train_data` and `val_data` share cases, patients or
        images; if `start` or `model` is known to have been trained on a case of
        `val_data`; if a callback stops training within the first epoch; or if an option
        is out of range.

    References
    ----------
    Loshchilov and Hutter, 2019, arXiv:1711.05101 (AdamW), and 2017, arXiv:1608.03983
    (the cosine); Izmailov et al., 2018, arXiv:1803.05407 (averaged weights); Wortsman
    et al., 2022, arXiv:2109.01903 (averaged with the start).
    """
    settings = {"learning_rate": learning_rate, "average": average}
    settings |= {"deep_supervision": deep_supervision, "start_share": start_share}
    times = {"epochs": epochs, "minutes": minutes, "validation_freq": validation_freq}
    times["max_minutes"] = max_minutes
    others = {"loss": loss, "callbacks": callbacks, "verbose": verbose}
    _check_options(model, start, **settings, **times, **others)
    check_pair(train_data, val_data, model, networks.size_factor(model))
    description = _describe_run(model, train_data, val_data, loss, **settings)
    description["start"], initial = start_from(start, model, train_data, val_data)
    averaged = partial(losses.averaged_weights, start=initial, share=start_share)
    levels = deep_supervision
    trained = losses.supervise_deeply(model, levels) if levels else model
    compile_for = partial(_compile, trained, loss, learning_rate, average)  # of steps
    data = train_data, val_data
    with files.OutputFolder(run_dir, "run", inputs=[d.root for d in data]) as output:
        checkpoint = Checkpoint(output, description, model, data, averaged, verbose)
        with checkpoint.bar, networks.advice_on_memory(model, train_data):
            _follow_plan(trained, compile_for, checkpoint, callbacks, **times)
    model.set_weights(networks.read_model(output.path / BEST)[0].get_weights())
    return pd.DataFrame(checkpoint.run.rows)

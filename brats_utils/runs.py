"""The folder of a training run: what it consists of, and how it is gone on with."""

import io
import json
import os
from pathlib import Path
from zipfile import BadZipFile

import keras
import numpy as np
from keras import ops

from brats_utils.files import atomic_write, write_json

BEST, HISTORY, SIDECAR = "best.keras", "history.csv", "model.json"
STATE, FORMER = "last.npz", "last_but_one.npz"
ANEW = "Choose another run_dir (in notebook 04, RUN), or delete it to train anew"
LONGEST_SHOWN = 40  # characters of both values; lists of cases are longer
NO_SETTINGS = ("keras", "backend")  # a run may go on with others


def _variables(model):
    """Return all that a run must keep: weights, dropout's seeds, optimizer's state."""
    return [*model.variables, *model.optimizer.variables]


def save_state(model, rows, description, run_dir):
    """Write all that a run needs to go on, as one file, and keep the one before.

    Parameters
    ----------
    model : keras.Model
        Compiled, its optimizer built.
    rows : list of dict
        The history, a row an epoch.
    description : dict
        What the run is made of, see `begin_or_go_on`.
    run_dir : Path
        Gets `last.npz`; the former one becomes `last_but_one.npz`.
    """
    arrays = {
        f"v{i:04}": ops.convert_to_numpy(variable)
        for i, variable in enumerate(_variables(model))
    }
    record = json.dumps({"history": rows, "description": description})
    with atomic_write(run_dir / STATE, former=run_dir / FORMER) as temporary:
        np.savez(temporary, record=record, **arrays)


def read_state(run_dir):
    """Read the newest state of a run that is sound.

    Parameters
    ----------
    run_dir : Path
        Where a run was kept, or nothing yet.

    Returns
    -------
    state : (list of arrays, dict) or None
        All variables, and {"history": rows, "description": description}.

    Raises
    ------
    ValueError
        If there are states and none is sound.
    """
    problems = []
    for path in filter(Path.exists, (run_dir / STATE, run_dir / FORMER)):
        try:
            # From memory: the file is not kept open, and can be replaced.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as state:
                arrays = {name: state[name] for name in sorted(state.files)}
            record = json.loads(arrays.pop("record").item())
        except (ValueError, KeyError, EOFError, RuntimeError, BadZipFile) as error:
            problems.append(f"{path} is damaged ({error})")
            continue
        if problems:
            print(f"{problems[0]}; going on from {path.name}, the state before it")
            os.replace(path, run_dir / STATE)
        return list(arrays.values()), record
    if problems:
        raise ValueError(
            f"{' and '.join(problems)}. If {BEST} is there it is the best model so "
            f"far. {ANEW}"
        )


def begin_or_go_on(model, run_dir, description, epochs):
    """Restore the run that a folder holds, or begin one there.

    Parameters
    ----------
    model : keras.Model
        Compiled, its optimizer built; gets the run's variables.
    run_dir : Path
        An existing folder.
    description : dict
        What the run is made of: data, settings, architecture. Written as `model.json`
        unless the run is finished: then that may hold notes of its model.
    epochs : int
        That the run shall have in the end.

    Returns
    -------
    rows : list of dict
        The history so far.

    Raises
    ------
    ValueError
        If the folder holds a run of another description, only damaged states, or a
        model without any.
    """
    arrays, record = read_state(run_dir) or (None, {"history": []})
    if arrays is None and (run_dir / BEST).exists():
        raise ValueError(f"{run_dir} holds {BEST}, but no state to go on from. {ANEW}")
    before, rows = record.get("description", {}), record["history"]
    changed = [
        name + (f" ({was} -> {value})" if len(f"{was}{value}") < LONGEST_SHOWN else "")
        for name, value in description.items()
        # What an older run does not note it did not have: None, 0 and False alike.
        if name not in NO_SETTINGS
        and ((was := before.get(name)) or None) != (value or None)
    ]
    if rows and changed:
        raise ValueError(
            f"{run_dir} holds a run with other {', '.join(changed)}. {ANEW}"
        )
    if arrays and not changed:
        for variable, array in zip(_variables(model), arrays, strict=True):
            variable.assign(array)
    else:  # the weights before the first step are a state to go on from, too
        save_state(model, [], description, run_dir)
    if len(rows) < epochs:
        write_json(run_dir / SIDECAR, description)
    return rows


def _in_float32(layer):
    """Return a layer like this one that computes in float32."""
    return type(layer).from_config({**layer.get_config(), "dtype": "float32"})


def save_model(model, path):
    """Save architecture and weights alone, so that Keras reloads it by itself.

    Parameters
    ----------
    model : keras.Model
        Functional; its first output is kept, neither loss nor optimizer is. Mixed
        precision is saved as float32: half precision cannot be pooled on a CPU.
    path : path
        Ends in `.keras`.
    """
    bare = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if any(layer.compute_dtype != "float32" for layer in bare.layers):
        weights = bare.get_weights()
        bare = keras.models.clone_model(bare, clone_function=_in_float32)
        bare.set_weights(weights)
    with atomic_write(path) as temporary:
        bare.save(temporary)

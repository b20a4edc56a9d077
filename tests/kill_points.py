"""Kill a preparation or a training before each file operation, and run it again.

Run by tests as a process of its own, since it forks: python kill_points.py prepare RAW
FOLDER, or train SPLIT FOLDER. Prints how many points there were, and exits with 1 where
one of them led to other bytes than an unbroken run's.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from brats_utils import generator, model, training
from brats_utils.prepare import prepare_dataset, split_dataset

NEVER = 0
SIDES = ("train", "val")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")


def prepare(raw, folder):
    """Prepare and split."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_dataset(raw, folder / "prepared", crop_shape=(16, 16, 8), jobs=1)
        split_dataset(folder / "prepared", folder / "split")


def prepared(folder):
    """Return {relative path: SHA-256} of all that lies in a folder, links followed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def train(split, folder):
    """Train for three epochs."""
    options = {"patch_shape": (8, 8, 8), "tumour_share": 1}
    data = [generator.BratsGenerator(split / side, **options) for side in SIDES]
    keras.utils.set_random_seed(1)
    network = model.unet((8, 8, 8, 3), filters=2, depth=1)
    training.train(network, *data, folder, epochs=3, verbose=False)


def trained(folder):
    """Return what a run's folder holds, but for the dates and seconds in it."""
    with np.load(folder / "last.npz") as state:
        found = {
            name: state[name].tobytes() for name in state.files if name != "record"
        }
        rows = json.loads(state["record"].item())["history"]
    found["rows"] = str([row | {"seconds": 0} for row in rows])
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    found["history"] = history.to_csv()
    with zipfile.ZipFile(folder / "best.keras") as archive:
        found["best"] = archive.read("model.weights.h5")
    found["description"] = (folder / "model.json").read_bytes()
    assert len(rows) == 3
    return found


def killed_at(point, work, source, folder):
    """Work in a child that dies before its n-th file operation; say if it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and str(folder) in str(arguments[0]):
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work(source, folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status and not os.WIFSIGNALED(status):
        sys.exit(f"the child failed at {point}")
    return os.WIFSIGNALED(status)


def main(kind, source, folder):
    """Compare what each point leads to with an unbroken run; return their number."""
    work, result = {"prepare": (prepare, prepared), "train": (train, trained)}[kind]
    folder.mkdir()
    killed_at(NEVER, work, source, folder)
    unbroken, point = result(folder), 0
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        if not killed_at(point + 1, work, source, folder):
            return point
        point += 1
        killed_at(NEVER, work, source, folder)
        found = result(folder)
        if found != unbroken:
            names = sorted(found.keys() | unbroken.keys())
            different = [n for n in names if found.get(n) != unbroken.get(n)]
            sys.exit(f"killed at {point}: {different[:4]}")


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) / "out"))

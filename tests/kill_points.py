"""Kill a piece of work before each of its file operations, then check what is left.

Run by tests as a process of its own, because it forks:

    python kill_points.py KIND SOURCE FOLDER [STEP]

KIND is "extract", "prepare", "reprepare", "resplit", "resplit-no-exchange" or "train".
With a STEP only every so many of a training's points are tried. Prints how many points
there are; exits with 1 and a message if one of them fails the check.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from brats_utils import files
from brats_utils import prepare as preparing
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset

NEVER = 0
SIDES = ("train", "val")
EVENTS = "open os.rename os.remove os.mkdir os.rmdir os.link os.symlink".split()
NOTE = "note of mine.txt"


def prepare(raw, folder):
    """Prepare and split, and count each scan that is read."""
    read_scan = preparing.read_scan

    def count(*arguments):
        with open(folder.with_name("reads"), "a") as file:
            file.write("x")
        return read_scan(*arguments)

    with mock.patch.object(preparing, "read_scan", count):
        prepare_quietly(raw, folder / "prepared")
    split_dataset(folder / "prepared", folder / "split")


def prepare_quietly(raw, out, **options):
    """Prepare without a progress bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_dataset(raw, out, crop_shape=(16, 16, 8), jobs=1, **options)


def extract(archive, folder):
    """Unpack, if it has not been done: the folder appears when it is complete."""
    if not (folder / "raw").exists():
        preparing.extract(archive, folder / "raw")


def extracted(folder):
    """Return what was unpacked."""
    return contents(folder / "raw")


def contents(folder):
    """Return {relative path: SHA-256} of all files in a folder, links followed."""
    return {
        path.relative_to(folder).as_posix(): files.describe_file(path)["sha256"]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def train(split, folder):
    """Train for three epochs."""
    import keras

    from brats_utils import generator, model, training

    options = {"patch_shape": (8, 8, 8), "tumour_share": 1}
    data = [generator.BratsGenerator(split / side, **options) for side in SIDES]
    keras.utils.set_random_seed(1)
    network = model.unet((8, 8, 8, 3), filters=2, depth=1)
    training.train(network, *data, folder, epochs=3, verbose=False)


def trained(folder):
    """Return what a run's folder holds, except for dates and seconds."""
    names = sorted(path.name for path in folder.iterdir())
    with np.load(folder / "last.npz") as state:
        found = {
            name: state[name].tobytes() for name in state.files if name != "record"
        }
        rows = json.loads(state["record"].item())["history"]
    found["names"] = str(names)  # nothing unfinished is left
    found["rows"] = str([row | {"seconds": 0} for row in rows])
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    found["history"] = history.to_csv()
    with zipfile.ZipFile(folder / "best.keras") as archive:
        found["best"] = archive.read("model.weights.h5")
        found["description"] = hashlib.sha256(archive.read("brats.json")).hexdigest()
    assert len(rows) == 3
    return found


def killed_at(point, work, source, folder):
    """Work in a child that dies at its n-th point; return whether it did.

    A point is before each file operation, and after each opening of a file to write:
    it is then empty.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            exchange = event == "ctypes.dlsym" and arguments[1] == "renameat2"
            ours = event in EVENTS and any(str(folder) in str(a) for a in arguments)
            if not (exchange or ours):
                return
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "open" and arguments[2] & os.O_CREAT:
                count += 1
                if count == point:
                    os.open(arguments[0], arguments[2], 0o666)
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work(source, folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status and not os.WIFSIGNALED(status):
        sys.exit(f"the child failed at {point}")
    return os.WIFSIGNALED(status)


def resume_at_every_point(work, result, source, folder, step=1):
    """Compare what a second run ends with to an unbroken run; return the last point."""
    folder.mkdir()
    reads = folder.with_name("reads")
    reads.touch()
    killed_at(NEVER, work, source, folder)
    unbroken, n_reads, point = result(folder), reads.stat().st_size, 0
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        reads.write_text("")
        if not killed_at(point + step, work, source, folder):
            return point
        point += step
        killed_at(NEVER, work, source, folder)
        found = result(folder)
        if found != unbroken:
            names = sorted(found.keys() | unbroken.keys())
            different = [n for n in names if found.get(n) != unbroken.get(n)]
            sys.exit(f"killed at {point}: {different[:4]}")
        if reads.stat().st_size > n_reads + 1:
            sys.exit(f"killed at {point}: more than one case was read again")


def resplit(prepared, folder):
    """Split with another seed."""
    split_dataset(prepared, folder / "result", ratio=(0.5, 0.5), seed=7)


def fail_to_split(prepared, folder):
    """Yield after each of three calls that fail: two before, one while it writes."""
    out, full = folder / "result", OSError(28, "No space left on device")
    with raises(ValueError):
        split_dataset(prepared, out, ratio=(0.9, 0.2))
    yield "a wrong ratio"
    with raises(ValueError):
        split_dataset(prepared.with_name("nowhere"), out)
    yield "a missing folder"
    with (
        raises(OSError),
        mock.patch.object(Path, "symlink_to", side_effect=full),
        mock.patch.object(shutil, "copyfile", side_effect=full),
    ):
        split_dataset(prepared, out)
    yield "a full disk"


def reprepare(raw, folder):
    """Prepare with other settings."""
    prepare_quietly(raw, folder / "result", scaling="zscore")


def fail_to_prepare(raw, folder):
    """Yield after each of two calls that fail: one before, one while it writes."""
    out, full = folder / "result", OSError(28, "No space left on device")
    with raises(ValueError):
        prepare_quietly(raw, out, scaling="min-max")
    yield "a wrong option"
    with raises(OSError), mock.patch.object(np, "save", side_effect=full):
        prepare_quietly(raw, out, min_labelled=0.02)
    yield "a full disk"


@contextlib.contextmanager
def raises(kind):
    """Exit unless the body raises an error of this kind."""
    try:
        yield
    except kind:
        return
    sys.exit("a call succeeded that has to fail")


def replace_at_every_point(first, second, fail, source, folder):
    """Check that `second` replaces what `first` wrote in one step; return the points.

    At each point the old or the new result must be whole, and stay so through calls
    that fail; the next good call must end with the new one. A user's own file in the
    folder must survive all of it.
    """
    folder.mkdir()
    second(source, folder)
    new = contents(folder / "result")
    shutil.rmtree(folder)
    first(source, folder)
    old = contents(folder / "result")
    (folder / "result" / NOTE).write_text("mine")
    spare = folder.with_name("start")
    shutil.copytree(folder, spare, symlinks=True)
    point = 0
    while True:
        shutil.rmtree(folder)
        shutil.copytree(spare, folder, symlinks=True)
        if not killed_at(point + 1, second, source, folder):
            check_whole(folder, [new], "unbroken")
            return point
        point += 1
        check_whole(folder, [old, new], f"killed at {point}")
        for failure in fail(source, folder):
            check_whole(folder, [old, new], f"killed at {point}, then {failure}")
        second(source, folder)
        check_whole(folder, [new], f"killed at {point}, then a good call")
        if [path.name for path in folder.iterdir()] != ["result"]:
            sys.exit(f"killed at {point}: {list(folder.iterdir())} are left")


def check_whole(folder, expected, when):
    """Exit unless a result is whole, there or set aside, and the user's note is there.

    Where folders can be exchanged in one step, nothing is ever set aside.
    """
    places = [folder / "result"]
    if not files.ctypes.CDLL:
        places.append(folder / ".result-old")
    found = [contents(place) for place in places if place.is_dir()]
    for each in found:
        each.pop(NOTE, None)
    if not any(each in expected for each in found):
        sys.exit(f"{when}: no whole result is left")
    notes = [path.read_text() for path in folder.rglob(NOTE)]
    if notes != ["mine"]:
        sys.exit(f"{when}: the user's note is {notes}")


def split_first(prepared, folder):
    """Split as `resplit` does, with another seed and ratio."""
    split_dataset(prepared, folder / "result", seed=1)


def prepare_first(raw, folder):
    """Prepare as `reprepare` does, with other settings."""
    prepare_quietly(raw, folder / "result")


def main(kind, source, folder, step):
    """Return how many points there are, all of them checked if `step` is 1."""
    if kind == "extract":
        return resume_at_every_point(extract, extracted, source, folder)
    if kind == "prepare":
        return resume_at_every_point(prepare, contents, source, folder)
    if kind == "train":
        from brats_utils import generator, training  # noqa: F401, before the forks

        return resume_at_every_point(train, trained, source, folder, step)
    if kind == "reprepare":
        steps = prepare_first, reprepare, fail_to_prepare
        return replace_at_every_point(*steps, source, folder)
    if kind == "resplit-no-exchange":  # as on macOS and Windows
        files.ctypes = types.SimpleNamespace(CDLL=None)
    steps = split_first, resplit, fail_to_split
    return replace_at_every_point(*steps, source, folder)


if __name__ == "__main__":
    step = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    print(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) / "out", step))

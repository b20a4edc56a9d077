"""Kill a preparation before each of its file operations, and run it again.

Run by test_prepare.py as a process of its own, since it forks: python kill_points.py
RAW FOLDER. Prints how many points there were, and exits with 1 where one of them led to
other bytes than an unbroken run's.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
from pathlib import Path

from brats_utils.prepare import prepare_dataset, split_dataset

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")


def work(raw, folder):
    """Prepare and split."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_dataset(raw, folder / "prepared", crop_shape=(16, 16, 8), jobs=1)
        split_dataset(folder / "prepared", folder / "split")


def tree(folder):
    """Return {relative path: SHA-256} of all that lies in a folder, links followed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed_at(point, raw, folder):
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
        work(raw, folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(raw, folder):
    """Compare what each point leads to with an unbroken run; return their number."""
    folder.mkdir()
    work(raw, folder)
    unbroken, point = tree(folder), 0
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        if not killed_at(point + 1, raw, folder):
            return point
        point += 1
        work(raw, folder)
        if tree(folder) != unbroken:
            different = set(tree(folder).items()) ^ set(unbroken.items())
            sys.exit(f"killed at {point}: {sorted(different)[:4]}")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]) / "out"))

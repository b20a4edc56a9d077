"""Execute notebooks in place, show how far they are, and keep to a time.

`make run` calls it with the four notebooks. Parameters are set from outside as
always, by `BRATS_<NAME>`; those that the plan sets are only defaults.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from brats_utils import files
from brats_utils.phantom.wide import draw_wide_patient

BUDGET_MINUTES = 12
# All of `make run` but the training of notebook 04, on two cores on which
# `sample_seconds` is REFERENCE_SECONDS; the second with the settings in SMALL.
REFERENCE_SECONDS = 0.31
REST_MINUTES, REST_MINUTES_SMALL = 7.1, 6.0
SMALL = {"OVERFIT_STEPS": 60, "LIBRARY_STEPS": 2}  # never the data
TRAINING_MINUTES = (2, 8)  # least and most
REFRESH_SECONDS = 30  # between two lines of progress, where lines cannot be replaced


def sample_seconds():
    """Return the time that one synthetic patient takes on this machine."""
    start = time.perf_counter()
    list(draw_wide_patient(0, (120, 120, 78)))
    return time.perf_counter() - start


def has_gpu():
    """Return whether Keras finds a GPU, without its start-up lines."""
    code = "from brats_utils.training import has_gpu; print(has_gpu())"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() == "True"


def make_plan(seconds, cores):
    """Return how long `make run` takes here, and the parameters that keep it short.

    Parameters
    ----------
    seconds : float
        From `sample_seconds`.
    cores : int

    Returns
    -------
    minutes : float
        Of all four notebooks, estimated.
    settings : dict
        Values of notebook parameters.
    """
    slower = seconds / REFERENCE_SECONDS * 2 / min(cores, 2)
    settings, rest = {}, slower * REST_MINUTES
    if rest + TRAINING_MINUTES[1] > BUDGET_MINUTES:
        settings, rest = dict(SMALL), slower * REST_MINUTES_SMALL
    least, most = TRAINING_MINUTES
    settings["MINUTES"] = min(most, max(least, round(BUDGET_MINUTES - rest)))
    return rest + settings["MINUTES"], settings


class Client(NotebookClient):
    """A notebook client that prints one line a cell, and progress bars as they move."""

    def process_message(self, msg, cell, cell_index):
        """Show the last state of what a cell prints."""
        content = msg["content"]
        if msg["msg_type"] == "stream" and "it/s" not in content["text"]:
            lines = content["text"].replace("\r", "\n").split("\n")
            self._show(next((line for line in reversed(lines) if line.strip()), ""))
        return super().process_message(msg, cell, cell_index)

    def _show(self, text):
        now = time.perf_counter()
        if sys.stdout.isatty():
            print(f"\r\033[K    {text.strip()[:100]}", end="", flush=True)
        elif "%|" in text and now - getattr(self, "_shown", now - 60) > REFRESH_SECONDS:
            print(f"    {text.strip()[:100]}", flush=True)
            self._shown = now


def execute(path):
    """Execute one notebook in place; what was there stays if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    codes = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    started = {}

    def begin(cell, cell_index):
        started[cell_index] = time.perf_counter()

    def end(cell, cell_index, execute_reply):
        seconds = time.perf_counter() - started[cell_index]
        line = next((s for s in cell.source.split("\n") if s[:1] not in "#%"), "")
        back = "\r\033[K" if sys.stdout.isatty() else ""
        where = f"{codes.index(cell_index) + 1:3}/{len(codes)}"
        print(f"{back}  {where} {seconds:7.1f} s  {line[:64]}", flush=True)

    client = Client(
        notebook,
        timeout=None,
        # TensorFlow's start-up lines stay out of the notebooks.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=begin,
        on_cell_executed=end,
    )
    with tempfile.TemporaryFile() as log:
        try:
            client.execute(stdout=log, stderr=log)
        except DeadKernelError:
            log.seek(0)
            sys.exit(f"{path.name}: {log.read().decode(errors='replace')[-2000:]}")
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
    # Of a progress bar its end is kept.
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True)(notebook, {})
    nbformat.write(notebook, path)
    clean = [sys.executable, "-m", "nbstripout", "--keep-output", str(path)]
    subprocess.run(clean, check=True)


def main(paths):
    """Print the plan, then execute the notebooks.

    Scans or epochs from outside, or a GPU, take the time they need.
    """
    start = time.perf_counter()
    names = "RAW", "EPOCHS", "DOWNLOAD"
    raw = files.setting("DATA", files.project_root() / "data") / "raw"
    own = any(os.environ.get(f"BRATS_{n}") for n in names) or any(raw.glob("[!.]*"))
    gpu = len(paths) > 1 and not own and has_gpu()
    if gpu:
        print("a GPU: notebook 04 trains for hours, or for BRATS_MINUTES")
    elif len(paths) > 1 and not own:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2
        minutes, settings = make_plan(min(sample_seconds() for _ in range(3)), cores)
        for name, value in settings.items():
            os.environ.setdefault(f"BRATS_{name}", str(value))
        plan = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"this machine: about {minutes:.0f} minutes ({plan})", flush=True)
    for path in paths:
        print(path, flush=True)
        execute(Path(path).resolve())
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Shared by the benchmarks: interleaved runs, medians with their range, peak memory."""

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
from statistics import median
from time import perf_counter

REPEATS = 5


def in_turn(works, repeats=REPEATS):
    """Time several functions in turn, so that a slow moment of the machine hits all.

    Each is called once to warm up, then `repeats` times.

    Parameters
    ----------
    works : dict of str to function
        Called without arguments.
    repeats : int

    Returns
    -------
    seconds : dict of str to list of float
        The duration of each run.
    """
    seconds = {name: [] for name in works}
    with quiet():
        for repeat in range(repeats + 1):
            for name, work in works.items():
                start = perf_counter()
                work()
                if repeat:
                    seconds[name].append(perf_counter() - start)
    return seconds


def quiet():
    """Send progress bars and other output to stderr, to keep them out of the tables."""
    return contextlib.redirect_stdout(sys.stderr)


def print_times(title, seconds, *, ours="ours", per=1, unit="s", aims=None):
    """Print a table of the median, the range, and the ratio to our own time.

    Parameters
    ----------
    title : str
    seconds : dict of str to list of float
        From `in_turn`; a row each.
    ours : str
        The row that the others are compared with.
    per : int
        The number of cases or samples in a run; times are given for one of them.
    unit : str
        Of the median, in the heading.
    aims : dict of str to str, optional
        The target of a row, in words.
    """
    print(f"\n### {title}\n")
    print(f"| | median, {unit} | from … to | times ours | aim |")
    print("|---|---|---|---|---|")
    for name, values in seconds.items():
        each = sorted(value / per for value in values)
        pairs = zip(values, seconds[ours], strict=True)
        ratio = median(value / base for value, base in pairs)
        aim = (aims or {}).get(name, "")
        print(
            f"| {name} | {median(each):.3g} | {each[0]:.3g} … {each[-1]:.3g} "
            f"| {ratio:.2f} | {aim} |"
        )


def print_rows(title, rows):
    """Print a table of {name: (value, target)}."""
    print(f"\n### {title}\n\n| | found | aim |\n|---|---|---|")
    for name, (value, aim) in rows.items():
        print(f"| {name} | {value} | {aim} |")


def is_there(package):
    """Return whether a package to compare with is installed; print a line if not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"\n{package} is not installed; its rows are left out")
    return found


def in_new_process(code, *arguments):
    """Run Python code in a fresh interpreter and return the last line it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip().splitlines()[-1]


def peak_mb():
    """Return the peak memory of this process, in 10⁶ bytes (Linux)."""
    # getrusage would not do: a child process starts with the peak of its parent.
    with open("/proc/self/status", encoding="ascii") as file:
        (peak,) = (line.split()[1] for line in file if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e6


def describe_machine():
    """Return a line with the processor, cores, memory and versions."""
    import keras
    import numpy as np

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if "model name" in line]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{names[0]}, {len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB; "
        f"{platform.system()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, Keras {keras.__version__} on "
        f"{keras.backend.backend()}"
    )


if __name__ == "__main__":
    print(f"# Benchmarks\n\nWritten by `make bench`. {describe_machine()}.")

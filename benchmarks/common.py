"""What the benchmarks share: runs in turn, medians with their spread, peak memory."""

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
    """Run each of {name: call} once unmeasured, then all in turn, `repeats` times.

    Returns {name: seconds of each run}: what slows the machine down for a while slows
    all of them.
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
    """Keep progress bars and remarks out of the tables: send them to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


def print_times(title, seconds, *, ours="ours", per=1, unit="s", aims=None):
    """Print a table: median, lowest to highest, and how many times ours each takes.

    `per` is what a run does of something: seconds are divided by it; `aims` says what
    is to be reached, by the name of a row.
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
    """Print a table of {name: (value, what must be reached)}."""
    print(f"\n### {title}\n\n| | found | aim |\n|---|---|---|")
    for name, (value, aim) in rows.items():
        print(f"| {name} | {value} | {aim} |")


def is_there(package):
    """Say whether a peer is installed; print that it is left out where it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"\n{package} is not installed and left out")
    return found


def in_new_process(code, *arguments):
    """Run Python code in a fresh interpreter and return the last line it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip().splitlines()[-1]


def peak_mb():
    """Return the most memory that this process has held, in 10⁶ bytes (Linux)."""
    # Not getrusage: a child begins there with its parent's peak.
    with open("/proc/self/status", encoding="ascii") as file:
        (peak,) = (line.split()[1] for line in file if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e6


def describe_machine():
    """Return a line on processor, cores, memory and versions."""
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

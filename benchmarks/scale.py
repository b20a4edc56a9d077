"""Prepare 50, 100 and 200 small cases: time per case and memory should not grow."""

import tempfile
from pathlib import Path

from common import in_new_process, print_rows

from brats_utils.phantom import write_phantom

CODE = """
import sys, time
from common import peak_mb
from brats_utils.cases import find_cases
from brats_utils.prepare import prepare_dataset
cases = find_cases(sys.argv[1], labels="0124")[: int(sys.argv[2])]
start = time.perf_counter()
prepare_dataset(cases, sys.argv[3], min_labelled=0, jobs=2)
print("\\n", (time.perf_counter() - start) / len(cases), peak_mb())
"""


def main():
    """Print the table on larger data sets."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_phantom(folder / "raw", 200, shape=(120, 120, 78))
        for n in (50, 100, 200):
            out = in_new_process(CODE, folder / "raw", n, folder / f"out{n}")
            seconds, memory = map(float, out.split()[-2:])
            found = f"{1000 * seconds:.0f} ms a case, {memory:.0f} MB peak"
            rows[f"{n} cases of 120 x 120 x 78"] = (found, "the same for each")
    print_rows("Prepare many cases, two jobs", rows)


if __name__ == "__main__":
    main()

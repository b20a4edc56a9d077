"""Time to import the package in a new interpreter, and whether that imports Keras."""

from statistics import median

from common import REPEATS, in_new_process, print_rows

CODE = """
import sys, time
start = time.perf_counter()
__import__(sys.argv[1])
print(time.perf_counter() - start, "keras" in sys.modules)
"""

AIMS_S = {"brats_utils": 0.1, "brats_utils.cases": 0.6}


def main():
    """Print the table on importing."""
    rows = {}
    for module, aim in AIMS_S.items():
        found = [in_new_process(CODE, module).split() for _ in range(REPEATS)]
        seconds = median(float(each[0]) for each in found)
        brought = "imports Keras" if found[0][1] == "True" else "without Keras"
        rows[f"`import {module}`"] = (f"{seconds:.3f} s, {brought}", f"≤ {aim} s")
    print_rows("Import", rows)


if __name__ == "__main__":
    main()

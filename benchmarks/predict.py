"""A whole scan by the tutorial recipe's U-Net: in one pass, and by windows, in turn.

One pass takes the brain's box whole. The windows are of 128 x 128 x 128, half a window
apart, over the same box or the whole grid. The weights are untrained unless `--run`
names a trained run; then the Dice scores of both ways are printed as well.
"""

import argparse
import tempfile
from pathlib import Path

import seed_recipe
from common import in_new_process, in_turn, print_rows, print_times

from brats_utils.cases import find_cases, load_case
from brats_utils.inference import load_model, predict_case, predict_probabilities
from brats_utils.phantom import write_phantom
from brats_utils.transforms import standardise

WINDOW = (128, 128, 128)
RSS = """
import sys
import seed_recipe
from common import peak_mb
from brats_utils.cases import find_cases
from brats_utils.inference import predict_case
model = seed_recipe.tutorial_unet((None, None, None, 3))
predict_case(model, find_cases(sys.argv[1], labels="0124")[0])
print(f"{peak_mb() / 1000:.1f}")
"""


def main():
    """Print the rows on prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a trained run's folder")
    run = parser.parse_args().run
    model = seed_recipe.tutorial_unet((None, None, None, 3))
    if run:
        model = load_model(run)
        model.description = {}
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(folder, 1)
        (case,) = find_cases(folder, labels="0124")
        image = standardise(load_case(case)[0])
        works = {
            "one pass over the brain's box": lambda: predict_case(model, case),
            "windows over the brain's box": lambda: predict_case(
                model, case, patch_shape=WINDOW
            ),
            "windows over the whole grid": lambda: predict_probabilities(
                model, image, patch_shape=WINDOW
            ),
        }
        seconds = in_turn(works, 3)
        ours = "one pass over the brain's box"
        print_times("Predict a whole scan, reading included", seconds, ours=ours)
        memory = in_new_process(RSS, folder)
        rows = {"peak memory of one pass, GB": (memory, "≤ 3")}
        print_rows("Predict a whole scan: memory", rows)


if __name__ == "__main__":
    main()

"""Predict a whole scan with the tutorial recipe's U-Net, in one pass and in windows.

One pass takes the whole box of the brain. Windows are of 128 x 128 x 128, half a window
apart, over the same box or over the whole grid. With a trained network, which `python
benchmarks/recipes.py --recipes repaired --minutes 20 --seeds 1 --keep data/models`
writes, the Dice of both on the validation cases of the split is printed as well.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import seed_recipe
from common import in_new_process, in_turn, print_rows, print_times

from brats_utils.cases import find_cases, load_case
from brats_utils.evaluation import score_case
from brats_utils.files import project_root
from brats_utils.inference import (
    decode_probabilities,
    load_model,
    predict_case,
    predict_probabilities,
)
from brats_utils.phantom import write_phantom
from brats_utils.volumes import bounding_box, scale_volume, standardise

WINDOW = (128, 128, 128)
ONE_PASS, WINDOWS = "one pass over the brain's box", "windows over the brain's box"
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


def compare_dice(model, cases):
    """Print the mean Dice of one pass and of windows, and their difference."""
    rows = []
    for case in cases:
        image, truth, _ = load_case(case)
        volumes = [scale_volume(image[..., c]) for c in range(image.shape[-1])]
        box = bounding_box(image.any(axis=-1))
        for way, shape in ((ONE_PASS, None), (WINDOWS, WINDOW)):
            found, _ = predict_probabilities(
                model, np.stack(volumes, -1)[box], patch_shape=shape
            )
            segmentation = np.zeros(truth.shape, np.uint8)
            segmentation[box] = decode_probabilities(found)
            rows.append({"way": way, **score_case(segmentation, truth)})
    means = pd.DataFrame(rows).groupby("way").mean().filter(like="dice").mean(axis=1)
    found = {way: (f"{means[way]:.4f}", "") for way in (ONE_PASS, WINDOWS)}
    gap = f"{abs(means[ONE_PASS] - means[WINDOWS]):.4f}"
    print_rows(
        f"Mean region Dice on {len(cases)} scans",
        {**found, "difference": (gap, "≤ 0.002")},
    )


def main():
    """Print the tables on prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = project_root(Path(__file__).parent) / "data"
    path = data / "models/repaired-20-1.keras"
    parser.add_argument("--model", type=Path, default=path, help="of the same network")
    parser.add_argument("--split", type=Path, default=data / "split")
    options = parser.parse_args()
    model = seed_recipe.tutorial_unet((None, None, None, 3))
    if options.model.exists():
        model.set_weights(load_model(options.model).model.get_weights())
        compare_dice(model, seed_recipe.split_cases(options.split)[1])
    else:
        print(f"\nThere is no {options.model}; the comparison of Dice is left out")
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(folder, 1)
        (case,) = find_cases(folder, labels="0124")
        image = standardise(load_case(case)[0])
        works = {
            ONE_PASS: lambda: predict_case(model, case),
            WINDOWS: lambda: predict_case(model, case, patch_shape=WINDOW),
            "windows over the whole grid": lambda: predict_probabilities(
                model, image, patch_shape=WINDOW
            ),
        }
        seconds = in_turn(works, 3)
        aims = {WINDOWS: "≥ 4", "windows over the whole grid": "≥ 10"}
        title = "Predict a whole scan, including reading it"
        print_times(title, seconds, ours=ONE_PASS, aims=aims)
        memory = in_new_process(RSS, folder)
        rows = {"peak memory of one pass, GB": (memory, "≤ 3")}
        print_rows("Predict a whole scan: memory", rows)


if __name__ == "__main__":
    main()

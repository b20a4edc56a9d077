"""Compare, on real scans, ten minutes of training from nothing, phantoms, and peers.

    BRATS_REAL_CASES=folder:another python benchmarks/real.py

The scans are split into three folds by patient: about two thirds train, the others are
scored as whole scans, so that each is scored once. "no training" scores the phantom
weights as they are, and those of `make run` if they are in data/models. Everything else
is as in recipes.py: a row a run in benchmarks/results/real.csv, one for each case in
real_cases.csv, and runs that are there are skipped. Rows named after islands of 0.2,
plain decoding or the first round are of former weights or decodings. Nothing else
should run meanwhile.
"""

import argparse
import os
from functools import partial
from itertools import product
from pathlib import Path

import recipes

from brats_utils.cases import find_cases
from brats_utils.files import project_root
from brats_utils.inference import predict_case
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_folds

PHANTOM_RUN = project_root(Path(__file__).parent) / "data/models/phantom-quick"


def untrained(train_cases, split, minutes, seed, folder, *, model="phantom", **options):
    """Predict with a network that has seen no real scan."""
    return recipes.StepClock(0), lambda case: predict_case(model, case, **options)


def fold_folders(data):
    """Prepare the scans and split them into folds; return the folds' folders."""
    folders = os.environ.get("BRATS_REAL_CASES", "").split(os.pathsep)
    if not folders[0]:
        raise SystemExit("set BRATS_REAL_CASES to folders of labelled scans")
    cases = [case for folder in folders for case in find_cases(folder)]
    prepare_dataset(cases, data / "prepared", crop_shape=None, min_labelled=0.0)
    folds = split_folds(data / "prepared", data / "folds", folds=3, seed=0)
    return [data / "folds" / f"fold{i}" for i in range(len(folds))]


ISLAND = 0.5  # as the phantom weights are decoded; chosen with decoding.py
FROM_PHANTOMS = {"start": "phantom", "learning_rate": 1e-3, "start_share": 0.35}
RECIPES = {
    "no training": untrained,
    "no training, flips": partial(untrained, flips=True),
    "no training, all islands": partial(untrained, min_island=0.0),
    "no training, thresholds 0.5": partial(untrained, thresholds=(0.5, 0.5, 0.5)),
    "no training, make run": partial(untrained, model=PHANTOM_RUN),
    "from nothing": partial(recipes.ours, min_island=ISLAND),
    "from phantoms": partial(recipes.ours, min_island=ISLAND, **FROM_PHANTOMS),
    "from phantoms, no share of the start": partial(
        recipes.ours, min_island=ISLAND, **{**FROM_PHANTOMS, "start_share": 0}
    ),
    "tutorial": recipes.tutorial,
    "segresnet": recipes.segresnet,
    "medicai": recipes.medicai,
}
OURS = ["from phantoms", "from nothing"]  # these with every seed, the others with one


def main():
    """Run what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", type=Path, help="folder for the trained models")
    options = parser.parse_args()
    splits = fold_folders(project_root(Path(__file__).parent) / "data/real")
    recipes.RECIPES = RECIPES
    for seed, name, split in product(options.seeds, options.recipes, splits):
        there = "make run" not in name or PHANTOM_RUN.exists()
        if there and (name in OURS or seed == options.seeds[0]):
            minutes = 0.0 if "no training" in name else options.minutes
            keep = options.keep and options.keep / split.name
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
            todo = [split], [name], [seed], minutes, "real", keep
            recipes.run_missing(*todo, scans="real")


if __name__ == "__main__":
    main()

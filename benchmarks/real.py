"""Compare, on real scans, ten minutes of training from nothing, phantoms, and peers.

    BRATS_REAL_CASES=folder:another python benchmarks/real.py

The scans are split into three folds by patient: about two thirds train, the others are
scored as whole scans, so that each is scored once. "no training" scores the phantom
weights as they are, and those of `make run` if they are in data/models. Everything else
is as in recipes.py: a row a run in benchmarks/results/real.csv, one for each case in
real_cases.csv, and runs that are there are skipped. Rows named after islands of 0.2,
plain decoding, or the first or second round are of former weights or decodings; those
of "second round" have no T1 and start from phantoms. Nothing else should run meanwhile.
"""

import argparse
import os
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import recipes
from scipy.ndimage import distance_transform_edt

from brats_utils import augment
from brats_utils.cases import find_cases
from brats_utils.files import project_root
from brats_utils.generator import BratsGenerator
from brats_utils.inference import predict_case
from brats_utils.labels import ALL_MODALITIES, MODALITIES
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_folds

PHANTOM_RUN = project_root(Path(__file__).parent) / "data/models/phantom-quick"


def untrained(train_cases, split, minutes, seed, folder, *, model="phantom", **options):
    """Predict with a network that has seen no real scan."""
    return recipes.StepClock(0), lambda case: predict_case(model, case, **options)


def _cut_lesions(folder):
    """Return each training case's tumour: image, labels, distance from its surface."""
    lesions, data = [], BratsGenerator(folder, batch_size=1)
    for image, labels in (data[i] for i in range(len(data))):
        image, labels = np.asarray(image)[0], np.asarray(labels)[0, ..., 0]
        where = np.argwhere(labels > 0)
        low = np.maximum(where.min(axis=0) - 4, 0)  # room for 4 voxels around it
        box = tuple(map(slice, low, where.max(axis=0) + 5))
        image, labels = image[box], labels[box]
        inside = distance_transform_edt(labels > 0)
        distance = distance_transform_edt(labels == 0) - inside
        lesions.append((image.copy(), labels.copy(), distance))
    return lesions


def _paste_lesion(image, labels, rng, *, lesions):
    """Paste a lesion, mirrored at random, at a healthy voxel of every second patch.

    After CarveMix (Zhang et al., 2021): all of the tumour with up to 4 voxels around
    it, or its inner part.
    """
    free = np.flatnonzero((labels == 0) & image.any(axis=-1))
    if rng.random() < 0.5 and free.size:
        chosen = lesions[rng.integers(len(lesions))]
        axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
        lesion, its_labels, distance = (np.flip(part, axes) for part in chosen)
        edge = rng.uniform(0, 4) if rng.random() < 0.7 else distance.min() / 2
        middle = np.unravel_index(rng.choice(free), labels.shape)
        corner = np.array(middle) - np.array(its_labels.shape) // 2
        low = np.maximum(corner, 0)
        high = np.minimum(corner + its_labels.shape, labels.shape)
        to = tuple(map(slice, low, high))
        source = tuple(map(slice, low - corner, high - corner))
        pasted = (distance[source] <= edge) & lesion[source].any(axis=-1)
        pasted &= image[to].any(axis=-1)
        image, labels = np.array(image), np.array(labels)
        image[to][pasted] = lesion[source][pasted]
        labels[to][pasted] = its_labels[source][pasted]
    return augment.augment(image, labels, rng)


def copying_lesions(train_cases, split, *arguments, **options):
    """Train ours with lesions that are copied from one training case to another."""
    change = partial(_paste_lesion, lesions=_cut_lesions(split / "train"))
    data = {"augment": change}
    return recipes.ours(train_cases, split, *arguments, data=data, **options)


def changing_intensities_more(*arguments, **options):
    """Train ours with intensities that are changed more often, and more strongly."""
    more = {"INTENSITY_CHANCE": 0.5, "BRIGHTNESS": (0.6, 1.5), "CONTRAST": (0.6, 1.5)}
    with mock.patch.multiple(augment, **more):
        return recipes.ours(*arguments, **options)


def with_t1(train_cases, split, *arguments, **options):
    """Train ours on four channels, prepared into a folder of their own."""
    data = split.parents[1] / "with_t1"
    fold_folders(data, modalities=ALL_MODALITIES)
    given, split = split, data / "folds" / split.name
    if sorted(os.listdir(given / "val/masks")) != sorted(
        os.listdir(split / "val/masks")
    ):
        raise SystemExit(f"{split} is another split than {given}")
    return recipes.ours(train_cases, split, *arguments, channels=4, **options)


def fold_folders(data, **options):
    """Prepare the scans and split them into folds; return the folds' folders."""
    folders = os.environ.get("BRATS_REAL_CASES", "").split(os.pathsep)
    if not folders[0]:
        raise SystemExit("set BRATS_REAL_CASES to folders of labelled scans")
    cases = [case for folder in folders for case in find_cases(folder)]
    options |= {"crop_shape": None, "min_labelled": 0.0}
    prepare_dataset(cases, data / "prepared", **options)
    folds = split_folds(data / "prepared", data / "folds", folds=3, seed=0)
    return [data / "folds" / f"fold{i}" for i in range(len(folds))]


ISLAND = 0.5  # as the phantom weights are decoded; chosen with decoding.py
FROM_PHANTOMS = {"start": "phantom", "learning_rate": 1e-3, "start_share": 0.35}
RECIPES = {
    "no training": untrained,
    "no training, without T1": partial(untrained, modalities=MODALITIES),
    "no training, flips": partial(untrained, flips=True),
    "no training, all islands": partial(untrained, min_island=0.0),
    "no training, thresholds 0.5": partial(untrained, thresholds=(0.5, 0.5, 0.5)),
    "no training, make run": partial(untrained, model=PHANTOM_RUN),
    "from nothing": partial(recipes.ours, min_island=ISLAND),
    "from phantoms": partial(with_t1, min_island=ISLAND, **FROM_PHANTOMS),
    "without T1": partial(recipes.ours, min_island=ISLAND, **FROM_PHANTOMS),
    "without T1, no share of the start": partial(
        recipes.ours, min_island=ISLAND, **{**FROM_PHANTOMS, "start_share": 0}
    ),
    "without T1, lesions copied": partial(
        copying_lesions, min_island=ISLAND, **FROM_PHANTOMS
    ),
    "without T1, two thirds centred": partial(
        recipes.ours, min_island=ISLAND, data={"tumour_share": 2 / 3}, **FROM_PHANTOMS
    ),
    "without T1, stronger intensities": partial(
        changing_intensities_more, min_island=ISLAND, **FROM_PHANTOMS
    ),
    "without T1, patches of 64": partial(
        recipes.ours, min_island=ISLAND, patch_shape=(64,) * 3, **FROM_PHANTOMS
    ),
    "without T1, averaged weights": partial(
        recipes.ours, min_island=ISLAND, average=0.99, **FROM_PHANTOMS
    ),
    "without T1, deep supervision": partial(
        recipes.ours, min_island=ISLAND, deep_supervision=2, **FROM_PHANTOMS
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
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder for the trained models")
    options = parser.parse_args()
    splits = fold_folders(project_root(Path(__file__).parent) / "data/real")
    splits = [splits[i] for i in options.folds]
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

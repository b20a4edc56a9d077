"""Batches from our generator, the tutorial recipe's and MONAI's CacheDataset.

Whole volumes of 128 x 128 x 128 and augmented patches of 96 x 96 x 96, batch 2, one
thread each. MONAI keeps standardised float32 volumes in memory; ours reads float16 from
the disk or, with `cache=True`, keeps the same in memory as MONAI.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
import seed_recipe
from common import in_turn, is_there, peak_mb, print_rows, print_times, quiet

from brats_utils.generator import BratsGenerator
from brats_utils.losses import dice_cross_entropy_loss
from brats_utils.model import unet
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset

N_WRITTEN, N_CASES = 8, 6  # patients, and those of the training side
PATCH = (96, 96, 96)
CHANCE = 0.15  # of each intensity change, as in `brats_utils.augment`


def draw(dataset):
    """Take each batch of a Keras data set once."""
    for index in range(len(dataset)):
        dataset[index]


def forget(folder):
    """Drop a folder's volumes from the system's file cache."""
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def monai_loader(side, patches):
    """Return MONAI's loader of the same standardised volumes, kept in memory."""
    from monai import data, transforms

    whole = BratsGenerator(side, batch_size=1)
    volumes = [
        {"image": np.moveaxis(x[0], -1, 0), "label": np.moveaxis(y[0], -1, 0)}
        for x, y in (whole[i] for i in range(len(whole)))
    ]
    keys = ["image", "label"]
    steps = [transforms.EnsureTyped(keys)]
    if patches:
        options = {"prob": CHANCE, "channel_wise": True}
        steps += [
            transforms.RandCropByPosNegLabeld(keys, "label", PATCH, 1, 2, 1),
            *(transforms.RandFlipd(keys, 0.5, axis) for axis in range(3)),
            transforms.RandScaleIntensityd("image", 0.25, **options),
            transforms.RandScaleIntensityFixedMeand("image", factors=0.25, prob=CHANCE),
            transforms.RandGaussianNoised("image", CHANCE, std=0.1),
        ]
    dataset = data.CacheDataset(volumes, transforms.Compose(steps), progress=False)
    return data.DataLoader(dataset, batch_size=2, num_workers=0)


def whole_volumes(side, recipe_folder):
    """Print the tables on whole volumes."""
    ours = {cached: BratsGenerator(side, cache=cached) for cached in (False, True)}
    recipe = seed_recipe.batches(recipe_folder, ours[True].case_ids)
    works = {
        "ours, from disk": lambda: draw(ours[False]),
        "ours, cached": lambda: draw(ours[True]),
        "tutorial recipe": lambda: [next(recipe) for _ in range(N_CASES // 2)],
    }
    if is_there("monai"):
        loader = monai_loader(side, patches=False)
        works["MONAI CacheDataset"] = lambda: list(loader)
    options = {"ours": "ours, from disk", "per": N_CASES, "unit": "s a sample"}
    aims = {"ours, cached": "MONAI ≥ 0.8 times this", "tutorial recipe": "≥ 6"}
    options["aims"] = aims
    title = "Whole volumes of 128³, batch 2"
    print_times(f"{title}, files in the system's cache", in_turn(works, 9), **options)
    # The case of a data set larger than memory: the recipe's 369 cases take 43 GB.
    works = {name: works[name] for name in ("ours, from disk", "tutorial recipe")}

    def cold(work):
        forget(side)
        forget(recipe_folder)
        work()

    works = {n: lambda work=work: cold(work) for n, work in works.items()}
    print_times(f"{title}, from the disk itself", in_turn(works, 5), **options)


def patches(side):
    """Print the tables on augmented patches, and whether memory grows."""
    options = {"patch_shape": PATCH, "augment": True}
    data = {
        cached: BratsGenerator(side, cache=cached, **options)
        for cached in (False, True)
    }
    works = {
        "ours, cached": lambda: draw(data[True]),
        "ours, from disk": lambda: draw(data[False]),
    }
    if is_there("monai"):
        loader = monai_loader(side, patches=True)
        works["MONAI CacheDataset"] = lambda: list(loader)
    title = "Patches of 96³ with flips, brightness, contrast, noise, batch 2"
    # MONAI's tutorial does not rotate, change gamma or blur, so ours does not here.
    with (
        mock.patch("brats_utils.augment.TURN_CHANCE", 0),
        mock.patch("brats_utils.augment.DETAIL_CHANCE", 0),
        mock.patch("brats_utils.augment.GAMMA", (1.0, 1.0)),
    ):
        seconds = in_turn(works, 9)
    aims = {"ours, cached": "≤ 0.025", "MONAI CacheDataset": "> 1"}
    options = {"ours": "ours, cached", "per": N_CASES, "unit": "s a sample"}
    print_times(title, seconds, aims=aims, **options)
    draw(data[True])
    before = peak_mb()
    for _ in range(1000 // len(data[True])):
        draw(data[True])
    grown = f"{peak_mb() - before:.0f} MB"
    print_rows("Memory over 1,000 batches", {"grown by": (grown, "flat")})


def starvation(side):
    """Print how long training waits for batches that another thread draws."""
    options = {"patch_shape": PATCH, "augment": True, "patches_per_case": 6}
    data = BratsGenerator(side, batch_size=1, cache=True, **options)
    model = unet((*PATCH, len(data.modalities)), stem_stride=2)
    model.compile("adam", dice_cross_entropy_loss, jit_compile=False)
    first = data[0]
    model.train_on_batch(*first)
    waited, alone, start = 0.0, 0.0, perf_counter()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(data.__getitem__, 0)
        for index in range(len(data)):
            before = perf_counter()
            batch = coming.result()
            waited += perf_counter() - before
            coming = pool.submit(data.__getitem__, (index + 1) % len(data))
            model.train_on_batch(*batch)
        total = perf_counter() - start
    for _ in range(len(data)):
        before = perf_counter()
        model.train_on_batch(*first)
        alone += perf_counter() - before
    rows = {
        "waited for batches": (f"{waited / total:.1%} of an epoch", "≤ 5 %"),
        "an epoch / the same steps on one batch": (f"{total / alone:.2f}", ""),
    }
    title = "The quick run's training step, two cores for step and generator"
    print_rows(title, rows)


def main():
    """Print the tables on the generator."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with quiet():
            cases = write_phantom(folder / "raw", N_WRITTEN)
            (folder / "recipe").mkdir()
            for case in cases:
                seed_recipe.prepare(case, folder / "recipe")
            prepare_dataset(folder / "raw", folder / "prepared", min_labelled=0)
            split_dataset(folder / "prepared", folder / "split")
        side = folder / "split" / "train"
        whole_volumes(side, folder / "recipe")
        patches(side)
        starvation(side)


if __name__ == "__main__":
    main()

"""Train several recipes for the same time on the same cases, and score them.

    python benchmarks/recipes.py --phantoms 52 --minutes 5
    python benchmarks/recipes.py --minutes 20 --recipes tutorial repaired segresnet
    python benchmarks/recipes.py --split data/folds/fold* --seeds 0

Each recipe trains on the training cases of a split (data/split from notebook 01 by
default), predicts the validation cases as whole scans, and adds a row to
benchmarks/results/recipes.csv and one for each case to recipes_cases.csv. Runs that are
in the table already are skipped. compare.py prints both tables.

The clock runs while a recipe trains, without planning and scoring. For ours it includes
checksums, checkpoints and validation; ours ends with an epoch (`train_s` is the time it
took). Each recipe is one function; those named "ours, ..."
change one thing of it. Sizes are for two cores: patches of 96 x 96 x 96 where the
original has larger ones, and its own window for the tutorial recipe. Peers keep their
published learning rates, which were chosen for longer runs; ours was chosen for short
ones.
"""

import argparse
import contextlib
import io
import itertools
import math
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import seed_recipe
from common import describe_machine, is_there
from keras import ops

from brats_utils.cases import MODALITIES, load_case
from brats_utils.evaluation import score_case
from brats_utils.files import atomic_write, project_root
from brats_utils.generator import BratsGenerator
from brats_utils.inference import decode_probabilities, predict_case
from brats_utils.labels import REGIONS, encode_labels
from brats_utils.losses import batch_dice_cross_entropy_loss
from brats_utils.model import unet
from brats_utils.nifti import load_labels, spacing_mm
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset
from brats_utils.training import train
from brats_utils.volumes import bounding_box, scale_volume, standardise

PATCH = (96, 96, 96)


class StepClock:
    """Count training steps until the time is up; it starts with the first step."""

    def __init__(self, minutes):
        self.limit_s, self.steps, self.start = 60 * minutes, 0, None
        self.elapsed_s = 0.0

    def next_step(self):
        """Count a step and return True, or return False if the time is up."""
        self.start = self.start or time.monotonic()
        self.elapsed_s = time.monotonic() - self.start
        if self.elapsed_s > self.limit_s:
            return False
        self.steps += 1
        return True

    def cosine(self):
        """Return a factor that decays from 1 to 0 along a cosine over the time."""
        return 0.5 + 0.5 * math.cos(math.pi * min(1, self.elapsed_s / self.limit_s))


def ours(
    train_cases,
    split,
    minutes,
    seed,
    folder,
    *,
    data=None,
    model=None,
    patch_shape=PATCH,
    min_island=0.0,
    channels=3,
    **how,
):
    """Train as notebook 04 does in its quick run, for as many epochs as fit.

    With all augmentations and a third of the patches centred on tumour, as in the full
    run. `data`, `model` and `how` are keywords of the generator, `unet` and `train`.
    Scans are predicted in windows of `PATCH` whatever the patches were.
    """
    options = {"batch_size": 1, "patch_shape": patch_shape}
    drawn = {"augment": True, "cache": True, "seed": seed, **(data or {})}
    drawn["patches_per_case"] = max(1, 36 // len(train_cases))
    data = BratsGenerator(split / "train", **options, **drawn)
    val = BratsGenerator(split / "val", tumour_share=1.0, **options)
    model = unet((None, None, None, channels), **{"stem_stride": 2, **(model or {})})
    clock = StepClock(minutes)
    clock.next_step()
    history = train(
        model,
        data,
        val,
        folder / "run",
        minutes=minutes,
        validation_freq=10**6,  # only after the last epoch
        verbose=False,
        **{"loss": batch_dice_cross_entropy_loss, "learning_rate": 3e-3, **how},
    )
    clock.next_step()
    clock.steps = len(history) * len(data)
    options = {"patch_shape": PATCH, "min_island": min_island}
    return clock, lambda case: predict_case(model, case, **options)


def tutorial(train_cases, split, minutes, seed, folder):
    """Train the tutorial recipe unchanged."""
    shares = {case.id: seed_recipe.prepare(case, folder) for case in train_cases}
    kept = [case_id for case_id, share in shares.items() if share > 0.01]
    model, clock = seed_recipe.train_tutorial(folder, kept, minutes)

    def predict(case):
        seed_recipe.prepare(case, folder)
        image = np.load(folder / f"image_{case.id}.npy")
        probabilities = ops.convert_to_numpy(model(image[None], training=False))[0]
        return seed_recipe.paste_window(probabilities.argmax(-1))

    return clock, predict


def _window_of(case):
    """Return a case's image and labels in the recipe's window, each volume scaled."""
    image, segmentation, _ = load_case(case, MODALITIES)
    volumes = [scale_volume(image[..., c]) for c in range(len(MODALITIES))]
    image = seed_recipe.cut_window(np.stack(volumes, axis=-1))
    return image, seed_recipe.cut_window(encode_labels(segmentation))


def repaired(train_cases, split, minutes, seed, folder):
    """Train the tutorial recipe with whole volumes scaled, shuffled, Adam at 1e-3."""
    data = [_window_of(case) for case in train_cases]
    model = seed_recipe.tutorial_unet()
    loss = seed_recipe.tutorial_loss
    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=False)
    rng, clock, order = np.random.default_rng(seed), StepClock(minutes), []
    while clock.next_step():
        while len(order) < seed_recipe.BATCH_SIZE:
            order += rng.permutation(len(data)).tolist()
        chosen = [data[order.pop()] for _ in range(seed_recipe.BATCH_SIZE)]
        x = np.stack([image for image, _ in chosen])
        y = np.stack([np.eye(4, dtype="float32")[labels] for _, labels in chosen])
        model.train_on_batch(x, y)
    model.save(folder / "best.keras")

    def predict(case):
        image, _ = _window_of(case)
        probabilities = ops.convert_to_numpy(model(image[None], training=False))[0]
        return seed_recipe.paste_window(probabilities.argmax(-1))

    return clock, predict


def _brain_of(case):
    """Return a scan's brain (X, Y, Z, C), its box, and the label map of the scan.

    The box is at least as large as a patch.
    """
    image, segmentation, _ = load_case(case, MODALITIES)
    box = []
    sides = bounding_box(image.any(axis=-1)), segmentation.shape, PATCH
    for part, size, least in zip(*sides, strict=True):
        start = min(part.start, size - max(least, part.stop - part.start))
        box.append(slice(start, max(part.stop, start + least)))
    return image[tuple(box)], tuple(box), segmentation


def _brain_and_regions(case):
    """Return a scan's brain (X, Y, Z, C) and its WT, TC and ET (X, Y, Z, 3)."""
    brain, box, segmentation = _brain_of(case)
    regions = [np.isin(segmentation[box], values) for values in REGIONS.values()]
    return brain, np.stack(regions, axis=-1)


def _decode(probabilities, box, shape):
    """Return the label map of a whole scan from the regions' probabilities in a box."""
    segmentation = np.zeros(shape, np.uint8)
    segmentation[box] = decode_probabilities(probabilities)
    return segmentation


def medicai(train_cases, split, minutes, seed, folder):
    """Train keras.io's BraTS example of medicai: its loss, optimiser and transforms.

    With medicai's UNet, because a step of its SwinUNETR takes five times as long on two
    cores.
    """
    from medicai.losses import BinaryDiceCELoss
    from medicai.models import UNet
    from medicai.utils.inference import SlidingWindowInference

    data = [_brain_and_regions(case) for case in train_cases]
    model = UNet(
        encoder_name="resnet18",
        input_shape=(*PATCH, len(MODALITIES)),
        num_classes=len(REGIONS),
        classifier_activation=None,
    )
    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=1e-5)
    loss = BinaryDiceCELoss(from_logits=True, num_classes=len(REGIONS))
    model.compile(optimizer, loss, jit_compile=False)
    rng, clock, order = np.random.default_rng(seed), StepClock(minutes), []
    while clock.next_step():
        order = order or rng.permutation(len(data)).tolist()
        x, y = _draw_patch(*data[order.pop()], rng)
        model.train_on_batch(x[None], y[None])
    slide = SlidingWindowInference(model, len(REGIONS), PATCH, 1, overlap=0.5)

    def predict(case):
        brain, box, segmentation = _brain_of(case)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            logits = ops.convert_to_numpy(slide(standardise(brain)[None]))[0]
        return _decode(1 / (1 + np.exp(-logits)), box, segmentation.shape)

    return clock, predict


def _draw_patch(image, regions, rng):
    """Return a random patch, flipped and shifted as medicai's example does."""
    sizes = zip(regions.shape, PATCH, strict=False)
    corner = [rng.integers(0, n - m + 1) for n, m in sizes]
    box = tuple(slice(i, i + n) for i, n in zip(corner, PATCH, strict=True))
    axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
    # The example standardises after cropping: each patch by its own mean and SD.
    x = np.flip(standardise(image[box]), axes) + rng.uniform(-0.1, 0.1)
    y = np.flip(regions[box], axes).astype(np.float32)
    return np.ascontiguousarray(x), y


def _channels_first(brain):
    """Return a standardised brain (C, X, Y, Z)."""
    return np.moveaxis(standardise(brain), -1, 0)


def _segresnet_data(train_cases):
    """Return MONAI's samples of the training cases, and the transforms of a sample."""
    from monai import transforms

    data = []
    for brain, regions in map(_brain_and_regions, train_cases):
        label = np.moveaxis(regions, -1, 0).astype(np.float32)
        data.append({"image": _channels_first(brain), "label": label})
    keys = ["image", "label"]
    steps = [
        transforms.RandSpatialCropd(keys, PATCH, random_size=False),
        *(transforms.RandFlipd(keys, 0.5, axis) for axis in range(3)),
        transforms.RandScaleIntensityd("image", factors=0.1, prob=1.0),
        transforms.RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        transforms.ToTensord(keys),
    ]
    return data, transforms.Compose(steps)


def segresnet(train_cases, split, minutes, seed, folder):
    """Train MONAI's BraTS tutorial: SegResNet, its loss, optimiser and transforms."""
    import torch
    from monai import inferers, losses, networks, utils

    utils.set_determinism(seed)
    data, change = _segresnet_data(train_cases)
    net = networks.nets.SegResNet(
        init_filters=16,
        in_channels=len(MODALITIES),
        out_channels=3,
        dropout_prob=0.2,
        blocks_down=(1, 2, 2, 4),
        blocks_up=(1, 1, 1),
    )
    loss = losses.DiceLoss(
        smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-5)
    rng, clock, order = np.random.default_rng(seed), StepClock(minutes), []
    while clock.next_step():
        order = order or rng.permutation(len(data)).tolist()
        sample = change(data[order.pop()])
        optimizer.param_groups[0]["lr"] = 1e-4 * clock.cosine()
        optimizer.zero_grad()
        loss(net(sample["image"][None]), sample["label"][None]).backward()
        optimizer.step()
    net.eval()

    def predict(case):
        brain, box, segmentation = _brain_of(case)
        image = torch.from_numpy(_channels_first(brain))[None]
        with torch.no_grad():
            found = inferers.sliding_window_inference(image, PATCH, 1, net, overlap=0.5)
        probabilities = np.moveaxis(torch.sigmoid(found)[0].numpy(), 0, -1)
        return _decode(probabilities, box, segmentation.shape)

    return clock, predict


RECIPES = {
    "ours": ours,
    "ours, regions": partial(ours, model={"n_classes": 3}),
    "ours, deep supervision": partial(ours, deep_supervision=2),
    "ours, averaged": partial(ours, average=0.99),
    "ours, not augmented": partial(ours, data={"augment": False}),
    "ours, no centring": partial(ours, data={"tumour_share": 0.0}),
    "tutorial": tutorial,
    "repaired": repaired,
    "segresnet": segresnet,
    "medicai": medicai,
}
NEEDS = {"segresnet": "monai", "medicai": "medicai"}


def run(name, split, minutes, seed, keep=None):
    """Train and score a recipe; return its row of the table and those of its cases."""
    train_cases, val_cases = seed_recipe.split_cases(split)
    keras.utils.set_random_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = RECIPES[name]
        clock, predict = recipe(train_cases, split, minutes, seed, Path(folder))
        scores = []
        for case in val_cases:
            truth, affine = load_labels(case.segmentation, case.labels)
            scores.append(score_case(predict(case), truth, spacing_mm(affine)))
        for path in Path(folder).rglob("best.keras") if keep else ():
            shutil.copy(path, keep / f"{name}-{minutes:g}-{seed}.keras")
    cases = pd.DataFrame(scores).filter(regex="dice|hd95").round(4)
    cases.insert(0, "case", [case.id for case in val_cases])
    means = cases.mean(numeric_only=True).round(4)
    spent = {"steps": clock.steps, "train_s": round(clock.elapsed_s, 1)}
    mean = {"dice_mean": round(means.filter(like="dice").mean(), 4)}
    return {**spent, **mean, **means, "machine": describe_machine()}, cases


def name_of(split, scans=None):
    """Return what the tables call a split: its scans, its folder and its sizes."""
    train_data, val_data = (BratsGenerator(split / side) for side in ("train", "val"))
    raw = scans or Path(train_data.settings["raw"]).name
    sizes = f"{len(train_data.case_ids)}/{len(val_data.case_ids)}"
    return f"{raw}/{split.name} {sizes}"


def write_phantoms(n_cases, data):
    """Write, prepare and split phantoms in a folder, if not done yet; return the split.

    Their seed is not that of the notebooks' phantoms, on which the learning rate and
    sizes of "ours" were chosen. The rows "ours, ..." did decide about the quick run of
    notebook 04.
    """
    split = data / "split"
    if not split.exists():
        write_phantom(data / "phantom", n_cases, seed=2020)
        options = {"crop_shape": None, "min_labelled": 0.0}
        prepare_dataset(data / "phantom", data / "prepared", **options)
        split_dataset(data / "prepared", split, ratio=(10 / 13, 3 / 13))
    return split


def append(rows, path):
    """Add rows to a table of results, atomically."""
    former = [pd.read_csv(path)] if path.exists() else []
    with atomic_write(path) as temporary:
        pd.concat([*former, rows]).to_csv(temporary, index=False)


def run_missing(splits, recipes, seeds, minutes, table, keep=None, scans=None):
    """Run the recipes that are not in benchmarks/results/<table>.csv yet."""
    results = project_root(Path(__file__).parent) / "benchmarks/results"
    path, cases_path = results / f"{table}.csv", results / f"{table}_cases.csv"
    left_out = [name for name, peer in NEEDS.items() if not is_there(peer)]
    for seed, split, name in itertools.product(seeds, splits, recipes):
        key = {"split": name_of(split, scans), "recipe": name, "minutes": minutes}
        key["seed"] = seed
        lines = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*key])
        there = (lines[list(key)] == pd.Series(key)).all(axis=1).any()
        if there or name in left_out:
            continue
        line, cases = run(name, split, minutes, seed, keep)
        append(cases.assign(**key), cases_path)
        append(pd.DataFrame([{**key, **line}]), path)


def main():
    """Run the recipes that are not in the table yet."""
    root = project_root(Path(__file__).parent)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--split", type=Path, nargs="+", default=[root / "data/split"])
    parser.add_argument(
        "--phantoms", type=int, help="number of patients to write and split"
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", type=Path, help="folder for the trained Keras models")
    options = parser.parse_args()
    if options.phantoms:
        data = root / "data" / f"recipes-{options.phantoms}"
        options.split = [write_phantoms(options.phantoms, data)]
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    todo = options.split, options.recipes, options.seeds, options.minutes
    run_missing(*todo, "recipes", options.keep)


if __name__ == "__main__":
    main()

"""The widely copied tutorial recipe, rewritten with its bugs: the baseline to beat.

Trains it for a given time on the training cases of data/split, predicts the validation
cases, and scores whole scans, as notebook 04 does with ours:

    python benchmarks/seed_recipe.py --split data/split --minutes 7

Kept from the recipe: each axial slice is scaled separately; the window is fixed;
volumes and one-hot masks are stored in float64; the order never changes; with its class
weights a perfect prediction has a loss of 0.75. Changed in its favour: cases come from
our split and are paired by id, and no time is spent on validation.
"""

import argparse
import tempfile
import time
from pathlib import Path

import keras
import nibabel as nib
import numpy as np
import pandas as pd
from keras import layers, ops
from sklearn.preprocessing import MinMaxScaler

from brats_utils.cases import find_cases
from brats_utils.evaluation import score_case
from brats_utils.files import project_root
from brats_utils.generator import BratsGenerator
from brats_utils.labels import REGIONS, decode_labels, encode_labels
from brats_utils.nifti import load_labels

WINDOW = (slice(56, 184), slice(56, 184), slice(13, 141))
SHAPE = (240, 240, 155)
BATCH_SIZE = 2


def scale_slicewise(volume):
    """Scale (X, Y, Z) as the recipe does: each axial slice, a column, to [0, 1]."""
    flat = volume.reshape(-1, volume.shape[-1])
    return MinMaxScaler().fit_transform(flat).reshape(volume.shape)


def cut_window(volume):
    """Return the recipe's fixed 128 x 128 x 128 window, wherever the tumour is."""
    if volume.shape[:3] != SHAPE:
        raise ValueError(
            f"the recipe's window is for {SHAPE} scans, got {volume.shape}"
        )
    return volume[WINDOW]


def paste_window(labels):
    """Return the label map of a whole scan, 0/1/2/4, from the window's labels 0..3."""
    whole = np.zeros(SHAPE, np.uint8)
    whole[WINDOW] = decode_labels(labels)
    return whole


def prepare(case, folder):
    """Save a case's image and one-hot mask; return the labelled share of the mask."""
    volumes = [
        scale_slicewise(nib.load(case.images[modality]).get_fdata())
        for modality in ("flair", "t1ce", "t2")
    ]
    segmentation, _ = load_labels(case.segmentation, case.labels)
    labels = cut_window(encode_labels(segmentation))
    np.save(folder / f"image_{case.id}.npy", cut_window(np.stack(volumes, axis=-1)))
    np.save(folder / f"mask_{case.id}.npy", keras.utils.to_categorical(labels, 4))
    return np.count_nonzero(labels) / labels.size


def batches(folder, case_ids):
    """Yield (images, masks) without end, always in the same order."""
    while True:
        for start in range(0, len(case_ids), BATCH_SIZE):
            chosen = case_ids[start : start + BATCH_SIZE]
            images = [np.load(folder / f"image_{i}.npy") for i in chosen]
            masks = [np.load(folder / f"mask_{i}.npy") for i in chosen]
            yield np.array(images), np.array(masks)  # (B, 128, 128, 128, C)


def _block(x, filters, dropout):
    options = {"padding": "same", "kernel_initializer": "he_uniform"}
    x = layers.Conv3D(filters, 3, activation="relu", **options)(x)
    x = layers.Dropout(dropout)(x)
    return layers.Conv3D(filters, 3, activation="relu", **options)(x)


def tutorial_unet(input_shape=(128, 128, 128, 3)):
    """Return the recipe's U-Net: 5,645,828 parameters."""
    inputs = x = keras.Input(input_shape)
    dropouts = {16: 0.1, 32: 0.1, 64: 0.2, 128: 0.2, 256: 0.3}
    skips = []
    for filters, dropout in dropouts.items():
        x = layers.MaxPooling3D(2)(x) if skips else x
        x = _block(x, filters, dropout)
        skips.append(x)
    for filters, skip in zip((128, 64, 32, 16), skips[-2::-1], strict=True):
        x = layers.Conv3DTranspose(filters, 2, strides=2, padding="same")(x)
        x = _block(layers.Concatenate()([x, skip]), filters, dropouts[filters])
    return keras.Model(inputs, layers.Conv3D(4, 1, activation="softmax")(x))


def tutorial_loss(y_true, y_pred):
    """Return 1 - mean over classes of Dice / 4, + mean of -g (1 - p)² log(p) / 4."""
    overlap = ops.sum(y_true * y_pred, axis=(0, 1, 2, 3))
    size = ops.sum(y_true, axis=(0, 1, 2, 3)) + ops.sum(y_pred, axis=(0, 1, 2, 3))
    dice = (2 * overlap + 1e-5) / (size + 1e-5)
    p = ops.clip(y_pred, 1e-7, 1 - 1e-7)
    focal = -0.25 * y_true * ops.square(1 - p) * ops.log(p)
    return 1 - ops.mean(0.25 * dice) + ops.mean(focal)


class Clock(keras.callbacks.Callback):
    """Count the batches, and stop training after the first one past the time limit."""

    def __init__(self, minutes):
        super().__init__()
        self.limit_s, self.steps, self.elapsed_s = 60 * minutes, 0, 0.0

    def on_train_begin(self, logs=None):
        """Start the clock: tracing the training function counts, preparing does not."""
        self.start = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Count the batch and compare with the limit."""
        self.steps += 1
        self.elapsed_s = time.monotonic() - self.start
        self.model.stop_training = self.elapsed_s >= self.limit_s


def train_tutorial(folder, case_ids, minutes):
    """Return the recipe's model, trained for some minutes, and the clock."""
    model = tutorial_unet()
    model.compile(keras.optimizers.Adam(1e-4), tutorial_loss, jit_compile=False)
    clock = Clock(minutes)
    model.fit(
        batches(folder, case_ids),
        steps_per_epoch=-(-len(case_ids) // BATCH_SIZE),
        epochs=10**6,
        callbacks=[clock],
        shuffle=False,
        verbose=0,
    )
    return model, clock


def score(model, cases, folder):
    """Return the official scores of whole scans: a row for each case, and the mean."""
    rows = {}
    for case in cases:
        image = np.load(folder / f"image_{case.id}.npy")
        labels = np.asarray(model(image[None], training=False))[0].argmax(-1)
        truth, affine = load_labels(case.segmentation, case.labels)
        spacing_mm = nib.affines.voxel_sizes(affine)
        rows[case.id] = score_case(paste_window(labels), truth, spacing_mm)
    table = pd.DataFrame(rows).T
    table.loc["mean"] = table.mean()
    columns = [f"{what}_{region}" for what in ("dice", "hd95") for region in REGIONS]
    return table[columns]


def split_cases(split):
    """Return the raw cases of both sides of our split, training first."""
    sides = [BratsGenerator(split / side) for side in ("train", "val")]
    settings = sides[0].settings
    found = find_cases(settings["raw"], labels=settings["labels"])
    cases = {case.id: case for case in found}
    return [[cases[case_id] for case_id in side.case_ids] for side in sides]


def main():
    """Train the recipe, score it, print the table."""
    root = project_root(Path(__file__).parent)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", type=Path, default=root / "data/split")
    parser.add_argument("--minutes", type=float, default=7.0)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    train, val = split_cases(options.split)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shares = {case.id: prepare(case, folder) for case in train + val}
        kept = [case.id for case in train if shares[case.id] > 0.01]
        print(f"{len(kept)} of {len(train)} training cases are labelled above 1 %")
        model, clock = train_tutorial(folder, kept, options.minutes)
        epochs, minutes = clock.steps * BATCH_SIZE / len(kept), clock.elapsed_s / 60
        print(f"{clock.steps} steps, {epochs:.1f} epochs in {minutes:.1f} minutes")
        print(score(model, val, folder).round(3).to_string())


if __name__ == "__main__":
    main()

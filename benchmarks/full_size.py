"""Run the network of the full profile at its true size: train some steps, predict.

    python benchmarks/full_size.py --steps 100        # on a GPU; 2 on a CPU
    KERAS_BACKEND=jax python benchmarks/full_size.py

Trains as notebook 04 does on a GPU, on phantoms: 128³, batches of 2, 32 filters, three
regions, two coarser outputs, averaged weights, all augmentations. Once more with a
single batch used again and again, to see how long a step waits for its data. Then
predicts a whole scan, on a CPU with OpenVINO too. With BRATS_REAL_CASES, folders of
labelled scans, the phantom weights label them with both engines, to compare the Dice.
"""

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import keras
import numpy as np
import pandas as pd
from common import describe_machine, in_turn, is_there, peak_mb, print_rows, print_times

from brats_utils import export
from brats_utils.cases import find_cases, load_labels
from brats_utils.evaluation import score_case
from brats_utils.generator import BratsGenerator
from brats_utils.inference import TrainedModel, load_model, predict_case
from brats_utils.labels import ALL_MODALITIES
from brats_utils.losses import batch_dice_cross_entropy_loss
from brats_utils.model import has_gpu, unet
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset
from brats_utils.training import choose_precision, train
from brats_utils.volumes import NORMALISATION

EPOCHS, TRAIN_CASES = 300, 295  # of the full run on 369 cases
FULL = {"n_classes": 3, "filters": 32, "depth": 5}
HOW = {"deep_supervision": 2, "average": 0.999, "learning_rate": 1e-3}
PATCHES = {"patch_shape": (128, 128, 128), "batch_size": 2}


class SameBatch(BratsGenerator):
    """Gives the first batch again and again."""

    def __getitem__(self, index):
        if not hasattr(self, "batch"):
            self.batch = super().__getitem__(0)
        return self.batch


def gpu_peak_gb():
    """Return the peak memory of the first GPU, in 10⁹ bytes."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e9


def seconds_a_step(generator, split, steps, run_dir):
    """Train three epochs; return the model and the seconds a step in the second."""
    cases = len(list((split / "train" / "images").glob("*.npy")))
    options = {**PATCHES, "augment": True, "cache": True}
    options["patches_per_case"] = -(-steps * PATCHES["batch_size"] // cases)
    train_data = generator(split / "train", **options)
    val_data = BratsGenerator(split / "val", **{**PATCHES, "batch_size": 1})
    model = unet((None, None, None, 3), **FULL)
    options = {**HOW, "loss": batch_dice_cross_entropy_loss, "validation_freq": 3}
    history = train(model, train_data, val_data, run_dir, epochs=3, **options)
    return model, history["seconds"][1] / len(train_data)


def loading_rate(split):
    """Return how many augmented patches two threads of the generator load a second."""
    options = {**PATCHES, "augment": True, "cache": True, "patches_per_case": 8}
    data = BratsGenerator(split / "train", **options)
    [data[index] for index in range(len(data))]  # to fill the cache
    start = perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(data.__getitem__, range(len(data))))
    return len(data) * PATCHES["batch_size"] / (perf_counter() - start)


def training(split, steps, folder):
    """Print the table on training; return the model."""
    keras.config.set_dtype_policy(choose_precision())
    model, seconds = seconds_a_step(BratsGenerator, split, steps, folder / "a")
    _, without = seconds_a_step(SameBatch, split, steps, folder / "b")
    rate = PATCHES["batch_size"] / seconds
    hours = EPOCHS * TRAIN_CASES / rate / 3600
    rows = {
        "patches trained a second": (f"{rate:.3g}", "≥ 20 on an H100"),
        "patches loaded a second": (f"{loading_rate(split):.3g}", "more"),
        "share of a step spent waiting": (
            f"{max(0, 1 - without / seconds):.1%}",
            "≤ 5 %",
        ),
        f"hours for {EPOCHS} epochs of {TRAIN_CASES} cases": (f"{hours:.3g}", ""),
        "peak memory of the process, GB": (f"{peak_mb() / 1000:.1f}", ""),
    }
    if has_gpu():
        rows["peak memory of the GPU, GB"] = f"{gpu_peak_gb():.1f}", ""
    print_rows(f"The full profile, {steps} steps an epoch or more", rows)
    return model


def to_int8(trained, split):
    """Return a model that OpenVINO computes in int8, and which precision it kept."""
    options = {"batch_size": 1, "patch_shape": trained.description["patch_shape"]}
    train_data = BratsGenerator(split / "train", **options, tumour_share=1.0)
    val_data = BratsGenerator(split / "val", **options, tumour_share=1.0)
    result = export.calibrate_int8(trained, train_data, val_data)
    return export.to_openvino(trained), result


def predicting(model, split, case):
    """Print the table on predicting a whole scan."""
    described = {"modalities": ["flair", "t1ce", "t2"], "orientation": "LPS"}
    described |= {"outputs": "WT, TC, ET", "normalisation": NORMALISATION}
    described |= {"patch_shape": PATCHES["patch_shape"], "keras": keras.__version__}
    trained = TrainedModel(model, described)
    works = {"Keras": lambda: predict_case(trained, case)}
    aims = {"Keras": "≤ 1 s on a GPU"}
    if has_gpu():
        works["Keras, 8 mirror images"] = lambda: predict_case(
            trained, case, flips=True
        )
    elif is_there("openvino"):
        fast, _ = to_int8(trained, split)
        name = fast.description["engine"]
        works[name] = lambda: predict_case(fast, case)
        works[f"{name}, 8 mirror images"] = lambda: predict_case(fast, case, flips=True)
        aims |= {name: "≤ 1/3", f"{name}, 8 mirror images": "≤ 90 s"}
    seconds = in_turn(works, 3)
    title = "Predict a whole scan with the full-size network"
    print_times(title, seconds, ours="Keras", aims=aims)


def prepare(raw, folder, **options):
    """Prepare the phantoms and split them; return the folder of the split."""
    prepare_dataset(raw, folder / "prepared", min_labelled=0, **options)
    split_dataset(folder / "prepared", folder / "split")
    return folder / "split"


def comparing(raw, folder):
    """Print the mean Dice of the phantom weights on real scans, by both engines."""
    split = prepare(raw, folder, modalities=ALL_MODALITIES)
    trained = load_model("phantom")
    fast, result = to_int8(trained, split)
    kept, rows = result["kept"], []
    for folder in os.environ["BRATS_REAL_CASES"].split(os.pathsep):
        for case in find_cases(folder):
            truth = load_labels(case.segmentation, case.labels)[0]
            for engine, each in (("Keras", trained), ("OpenVINO", fast)):
                row = score_case(predict_case(each, case), truth)
                rows.append({"engine": engine, **row})
    means = pd.DataFrame(rows).groupby("engine").mean().filter(like="dice")
    mean = means.mean(axis=1)
    table = {name: (f"{mean[name]:.4f}", "") for name in mean.index}
    difference = np.abs(means.loc["Keras"] - means.loc["OpenVINO"]).max()
    table["largest difference of a region"] = f"{difference:.4f}", "≤ 0.005"
    n_cases = len(rows) // 2
    print_rows(f"Mean Dice on {n_cases} real scans, phantom weights, {kept}", table)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100 if has_gpu() else 2)
    parser.add_argument("--cases", type=int, default=6, help="phantoms")
    options = parser.parse_args()
    print(f"# The full profile\n\n{describe_machine()}.")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        raw = folder / "raw"
        write_phantom(raw, options.cases)
        split = prepare(raw, folder)
        model = training(split, options.steps, folder)
        predicting(model, split, find_cases(raw)[0])
        if os.environ.get("BRATS_REAL_CASES") and not has_gpu() and export.ov:
            comparing(raw, folder / "with_t1")


if __name__ == "__main__":
    main()

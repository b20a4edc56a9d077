"""Train the quick profile's network on wide phantoms, and store its weights.

`make pretrain` runs it; hours on two cores. Stopped, it resumes. The same seed gives
the same weights on the same machine. BRATS_PATIENTS and BRATS_EPOCHS shorten it.
BRATS_START=phantom and another BRATS_SEED continue from the package's weights, with new
patients. The network takes FLAIR, T1, T1CE and T2, but sees a third of the patches
without T1; BRATS_MODALITIES=flair,t1ce,t2 leaves it out. BRATS_WEIGHTS names the file.
"""

import functools
import json

import keras
import numpy as np

from brats_utils import augment, files, inference, losses
from brats_utils.generator import BratsGenerator
from brats_utils.labels import ALL_MODALITIES
from brats_utils.model import (
    PHANTOM_WEIGHTS,
    find_model,
    read_model,
    unet,
    write_model,
)
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset
from brats_utils.training import train

NETWORK = {"n_classes": 4, "filters": 16, "depth": 5, "stem_stride": 2}
PATCHES = {"batch_size": 1, "patch_shape": (96, 96, 96)}
PLAN = {"average": 0.999, "validation_freq": 4}
WITHOUT_T1 = 1 / 3  # share of the patches that the network sees without T1


def prepare(data, n_patients, seed, modalities):
    """Draw the patients and prepare them; return the folder of the split."""
    raw, shape = data / "raw", files.setting("SHAPE", (240, 240, 155))
    write_phantom(raw, n_patients, seed=seed, wide=True, shape=shape)
    options = {"crop_shape": None, "min_labelled": 0.0}  # healthy brains belong to it
    prepare_dataset(raw, data / "prepared", modalities=modalities, **options)
    split_dataset(data / "prepared", data / "split", ratio=(0.94, 0.06), seed=seed)
    return data / "split"


def change(image, labels, rng, *, channel, share):
    """Augment a patch, and blank a channel now and then: not every scan has T1."""
    image, labels = augment.augment(image, labels, rng)
    if rng.random() < share:
        image = np.array(image)
        image[..., channel] = 0
    return image, labels


def pretrain(
    data, n_patients, epochs, weights, *, seed=7, start=None, modalities=ALL_MODALITIES
):
    """Train, or resume training, and write the weights; return the history."""
    there = files.read_manifest(data / "split").get("cases", {})
    done = len(there) == n_patients
    split = data / "split" if done else prepare(data, n_patients, seed, modalities)
    more = {"augment": True, "tumour_share": 1 / 3, "seed": seed}
    if "t1" in modalities:
        blank = {"channel": modalities.index("t1"), "share": WITHOUT_T1}
        more["augment"] = functools.partial(change, **blank)
    train_data = BratsGenerator(split / "train", **PATCHES, **more)
    val_data = BratsGenerator(split / "val", **PATCHES, tumour_share=1.0)
    first = data / "start.keras" if start == "phantom" else start
    if start == "phantom" and not first.exists():  # its checksum is part of the run
        former, description = read_model(find_model("start", start), modalities)
        with files.atomic_write(first) as temporary:
            write_model(former, temporary, description)
    keras.utils.set_random_seed(seed)
    model = unet((None, None, None, len(modalities)), **NETWORK)
    history = train(
        model,
        train_data,
        val_data,
        data / "run",
        epochs=epochs,
        start=first,
        learning_rate=2e-3 if start else 3e-3,
        loss=losses.batch_dice_cross_entropy_loss,
        **PLAN,
    )
    n_before = 0
    if start == "phantom":  # they name how many patients they were trained on
        n_before = int(inference.load_model(first).description["about"].split()[0])
    write_weights(data / "run", weights, n_before)
    return history


def write_weights(run_dir, path, n_before=0):
    """Write a trained network's weights in half precision, as `load_model` reads them.

    The description keeps what a user must know; the ids of the phantoms are not it.
    """
    trained = inference.load_model(run_dir)
    keys = "modalities normalisation orientation outputs patch_shape keras".split()
    kept = {key: trained.description[key] for key in keys}
    n_cases = n_before + len(trained.description["train_cases"])
    kept["optional"] = [name for name in kept["modalities"] if name == "t1"]
    kept["about"] = f"{n_cases} synthetic patients, no real scan"
    record = json.dumps({"network": NETWORK, "description": kept})
    weights = {f"w{i:03}": w for i, w in enumerate(trained.model.get_weights())}
    half = {name: array.astype(np.float16) for name, array in weights.items()}
    with files.atomic_write(path) as temporary:
        np.savez_compressed(temporary, record=record, **half)


if __name__ == "__main__":
    seed = files.setting("SEED", 7)
    folder = files.setting("DATA", files.project_root() / "data") / "pretrain"
    folder /= f"seed{seed}"  # other patients have a folder of their own
    n_patients, epochs = files.setting("PATIENTS", 212), files.setting("EPOCHS", 28)
    weights = files.setting("WEIGHTS", PHANTOM_WEIGHTS)
    more = {"seed": seed, "start": files.setting("START", None)}
    more["modalities"] = files.setting("MODALITIES", ALL_MODALITIES)
    history = pretrain(folder, n_patients, epochs, weights, **more)
    print(f"{history['seconds'].sum() / 3600:.1f} hours; {weights}")

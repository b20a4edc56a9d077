"""The options of notebook 04 that depend on the machine and on the data."""

from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import pandas as pd

from brats_utils import files
from brats_utils.augment import flip
from brats_utils.split import split_folds

AUGMENTATIONS = {"all": True, "flips": flip, "none": False}
MEANINGS = {
    "start": "weights to begin with: phantom, a file or a run; or none",
    "learning_rate": "the highest, after the warm-up",
    "depth": "stages of the U-Net; each halves the resolution",
    "n_classes": "outputs: 4 labels, or 3 regions",
    "deep_supervision": "coarser outputs that are trained as well",
    "average": "momentum of averaged weights; 0 keeps the last",
    "augment": "changes of a patch: all, flips or none",
    "tumour_share": "of the training patches centred on tumour",
    "flips": "predict 8 mirror images, and average",
    "devices": "GPUs that share a batch (JAX)",
}


@dataclass(frozen=True)
class Recipe:
    """How to train and predict: the fields of `MEANINGS`, and where the scans are."""

    raw: Path
    start: str
    learning_rate: float
    depth: int
    n_classes: int
    deep_supervision: int
    average: float
    augment: str
    tumour_share: float
    flips: bool
    devices: int

    def table(self):
        """Return options and meanings as a table, named as the variables are."""
        table = pd.DataFrame({"value": asdict(self), "meaning": MEANINGS})
        return table.loc[[*MEANINGS]].rename(index=lambda name: f"BRATS_{name.upper()}")


def choose_recipe(data, *, gpu):
    """Return the options for a machine and a data set; `BRATS_<NAME>` overrides each.

    A GPU gets the recipe of nnU-Net, for hundreds of epochs. Without one, a run takes
    minutes: real scans start from the weights that come with this package, phantoms
    from nothing and without augmentation.

    Parameters
    ----------
    data : path
        The folder in which notebook 01 made `split`.
    gpu : bool
        Whether there is one.

    Returns
    -------
    recipe : Recipe

    Raises
    ------
    ValueError
        If a variable cannot be read, or names no augmentation.
    """
    made_from = files.read_manifest(Path(data) / "split").get("made_from", {})
    raw = Path(made_from.get("settings", {}).get("raw", data))
    real = files.read_manifest(raw).get("kind") != "phantoms"
    start = files.setting("START", "phantom" if real and not gpu else "none")
    varied = gpu or start != "none"
    options = {
        "start": start,
        "learning_rate": 1e-3 if varied else 3e-3,
        "depth": 5,
        "n_classes": 3 if gpu else 4,
        "deep_supervision": 2 if gpu else 0,
        "average": 0.999 if gpu else 0.0,
        "augment": "all" if varied else "none",
        "tumour_share": 1 / 3 if varied else 0.0,
        "flips": gpu,
        "devices": 1,
    }
    chosen = {k: files.setting(k.upper(), v) for k, v in options.items()}
    possible = f"one of {[*AUGMENTATIONS]}"
    files.check_option(
        "AUGMENT", chosen["augment"], AUGMENTATIONS.__contains__, possible
    )
    return Recipe(raw, **chosen)


def choose_split(data, fold=None, *, seed=42):
    """Return the folder of notebook 01's split or, by its number, of one of five folds.

    Parameters
    ----------
    data : path
        The folder in which notebook 01 made `prepared` and `split`.
    fold : int, optional
        0 to 4: who is validated.
    seed : int
        Of the folds.

    Returns
    -------
    folder : Path
        With `train` and `val`.
    """
    if fold is None:
        return Path(data) / "split"
    split_folds(Path(data) / "prepared", Path(data) / "folds", seed=seed)
    return Path(data) / "folds" / f"fold{fold}"


def use_devices(n):
    """Divide each batch among devices (JAX only), or return to one.

    Parameters
    ----------
    n : int

    Raises
    ------
    ValueError
        If Keras runs on another backend than JAX, or has fewer devices.
    """
    keras.distribution.set_distribution(None)
    if n == 1:
        return
    devices = keras.distribution.list_devices()[:n]
    if keras.backend.backend() != "jax" or len(devices) < n:
        problem = f"DEVICES is {n}, expected at most the {len(devices)} there are"
        raise ValueError(f"{problem}, with KERAS_BACKEND=jax")
    parallel = keras.distribution.DataParallel(devices=devices)
    keras.distribution.set_distribution(parallel)

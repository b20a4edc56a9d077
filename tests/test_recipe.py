"""The options of notebook 04: defaults by machine and data, each one overridden."""

from dataclasses import asdict, replace

import keras
import pytest
from conftest import prepared_toys

from brats_utils.files import write_json
from brats_utils.model import start_from
from brats_utils.recipe import (
    AUGMENTATIONS,
    MEANINGS,
    choose_recipe,
    choose_split,
    use_devices,
)
from brats_utils.split import split_dataset


@pytest.fixture
def toy_data(toy_set, tmp_path, monkeypatch):
    """A data folder as notebook 01 leaves it, and a function that makes it phantoms."""
    for name in MEANINGS:
        monkeypatch.delenv(f"BRATS_{name.upper()}", raising=False)
    prepared, _ = prepared_toys(toy_set, tmp_path)
    split_dataset(prepared, tmp_path / "split")
    manifest = {"kind": "phantoms", "format": 1, "made_from": {}}
    manifest |= {"files": {}, "cases": {}}
    return tmp_path, lambda: write_json(toy_set / "manifest.json", manifest)


def test_defaults_by_machine_and_data(toy_data):
    data, make_phantoms = toy_data
    real = choose_recipe(data, gpu=False)
    assert (real.start, real.augment, real.learning_rate) == ("phantom", "all", 1e-3)
    assert (real.n_classes, real.deep_supervision, real.average) == (4, 0, 0)
    assert (real.tumour_share, real.flips, real.depth) == (1 / 3, False, 5)
    full = choose_recipe(data, gpu=True)
    assert (full.start, full.augment, full.learning_rate) == ("none", "all", 1e-3)
    assert (full.n_classes, full.deep_supervision, full.average) == (3, 2, 0.999)
    assert (full.tumour_share, full.flips, full.devices) == (1 / 3, True, 1)
    make_phantoms()
    assert choose_recipe(data, gpu=True) == full
    quick = {"start": "none", "augment": "none", "learning_rate": 3e-3}
    expected = replace(real, tumour_share=0, **quick)
    assert choose_recipe(data, gpu=False) == expected
    assert expected.raw == data / "raw"


def test_a_start_brings_its_learning_rate_and_augmentation(toy_data, monkeypatch):
    data, make_phantoms = toy_data
    make_phantoms()
    monkeypatch.setenv("BRATS_START", "phantom")
    recipe = choose_recipe(data, gpu=False)
    assert (recipe.augment, recipe.learning_rate) == ("all", 1e-3)


def test_every_option_is_set_from_outside_and_refuses_nonsense(toy_data, monkeypatch):
    values = {"learning_rate": 0.5, "depth": 3, "n_classes": 3, "deep_supervision": 1}
    values |= {"average": 0.9, "augment": "flips", "tumour_share": 1.0, "flips": True}
    values |= {"start": "my.keras", "devices": 2}
    assert values.keys() == MEANINGS.keys()
    for name, value in values.items():
        monkeypatch.setenv(f"BRATS_{name.upper()}", str(value))
    recipe = choose_recipe(toy_data[0], gpu=False)
    assert {k: v for k, v in asdict(recipe).items() if k != "raw"} == values
    table = recipe.table()
    assert table.loc["BRATS_DEPTH", "value"] == 3 and len(table) == len(values)
    with pytest.raises(ValueError, match="there is no model nonsense"):
        start_from("nonsense", None, ())  # as `train` does
    for name in values.keys() - {"start"}:
        with monkeypatch.context() as patch:
            patch.setenv(f"BRATS_{name.upper()}", "nonsense")
            with pytest.raises(ValueError, match=f"{name.upper()} is 'nonsense', exp"):
                choose_recipe(toy_data[0], gpu=False)
    assert AUGMENTATIONS["all"] is True and AUGMENTATIONS["none"] is False


def test_the_split_or_one_of_five_folds(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    assert choose_split(tmp_path) == tmp_path / "split"
    with pytest.raises(ValueError, match="4 patients cannot be split into 5 folds"):
        choose_split(tmp_path, 0)


def test_too_many_devices_are_refused_and_one_is_always_there():
    use_devices(1)
    assert keras.distribution.distribution() is None
    with pytest.raises(ValueError, match="DEVICES is 99, expected"):
        use_devices(99)

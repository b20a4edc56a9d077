"""The folder of a run: what is read back is what was written, or is refused."""

import keras
import numpy as np
import pytest

from brats_utils import runs


@pytest.fixture
def run_dir(tmp_path):
    """Return a folder with one saved state of a dense layer."""
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(50)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    runs.begin_or_go_on(model, tmp_path, {"batch_size": 2}, 1)
    return tmp_path


def test_E02_damaged_states_are_refused_or_equal(run_dir):
    path = run_dir / "last.npz"
    good, (whole, _) = path.read_bytes(), runs.read_state(run_dir)
    rng = np.random.default_rng(0)
    refused = 0
    method = good.index(b"PK\1\2") + 10  # where zip says how it compressed
    for place in [method, *rng.integers(0, len(good), 200)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 if place == method else 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            arrays, record = runs.read_state(run_dir)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "another run_dir" in str(error)
            continue
        assert record["description"] == {"batch_size": 2}
        for value, expected in zip(arrays, whole, strict=True):
            np.testing.assert_array_equal(value, expected)
    assert refused > 100  # the others hit what nothing reads, such as dates


def test_a_folder_without_a_run_has_no_state(tmp_path):
    assert runs.read_state(tmp_path) is None

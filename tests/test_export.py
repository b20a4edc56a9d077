"""OpenVINO: the same label maps as Keras's, int8 only where it is as good."""

import keras
import numpy as np
import pytest
from conftest import prepared_toys, write_case
from keras import layers

from brats_utils import export
from brats_utils.cases import find_cases
from brats_utils.evaluation import store_description
from brats_utils.generator import CHANNELS, BratsGenerator
from brats_utils.inference import (
    TrainedModel,
    load_model,
    predict_case,
    predict_cases,
    predict_probabilities,
)
from brats_utils.losses import supervise_deeply
from brats_utils.model import unet, unet_cicek2016, write_model
from brats_utils.split import split_dataset
from brats_utils.volumes import NORMALISATION

missing = pytest.mark.skipif(export.ov is None, reason="OpenVINO is not installed")
DESCRIPTION = {"modalities": ["flair", "t1ce", "t2"], "outputs": "labels 0..3"}
DESCRIPTION |= {"normalisation": NORMALISATION, "orientation": "LPS"}
DESCRIPTION |= {"keras": keras.__version__, "patch_shape": [16, 16, 8]}


def shaken(model, seed=3):
    """Change all weights: scales, offsets and biases begin as 1 or 0."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(weight.numpy() + rng.normal(0, 0.2, weight.shape))
    return model


def small(**options):
    keras.utils.set_random_seed(1)
    options = {"filters": 4, "depth": 3, **options}
    return shaken(unet((None, None, None, 3), **options))


NETWORKS = {
    "labels": small,
    "regions": lambda: small(n_classes=3, dropout=0.2),
    "stem of stride 2": lambda: small(stem_stride=2, depth=2),
    "no normalisation": lambda: small(normalisation=False),
    "fixed size": lambda: shaken(unet((16, 16, 8, 3), filters=3, depth=2)),
    "deep supervision": lambda: supervise_deeply(small(n_classes=3), 1),
    "the first one": lambda: unet_cicek2016((None, None, None, 3)),
}


def decided(probabilities):
    """Return what a voxel is called: its label, or the regions it lies in."""
    if probabilities.shape[-1] == 4:
        return probabilities.argmax(-1)
    return (probabilities > 0.5) @ [1, 2, 4]


@missing
@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32_the_label_map_is_that_of_keras(name):
    model = NETWORKS[name]()
    model = keras.Model(model.inputs[0], model.outputs[0])
    image = np.random.default_rng(0).normal(size=(19, 24, 16, 3)).astype(np.float32)
    expected = predict_probabilities(model, image)[0]
    converted = export.to_openvino(TrainedModel(model, {}))
    assert converted.description == {"engine": "OpenVINO float32"}
    found = predict_probabilities(converted, image)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.mean(decided(found) == decided(expected)) >= 0.9999
    assert len(np.unique(decided(expected))) > 1


@missing
@pytest.mark.parametrize(
    "layer",
    [
        layers.BatchNormalization(name="odd"),
        layers.Conv3D(3, 3, padding="same", activation="relu"),
        layers.Conv3D(3, 3, padding="same", dilation_rate=2),
        layers.GroupNormalization(groups=1),
    ],
)
def test_what_it_does_not_convert_is_refused(layer):
    inputs = keras.Input((None, None, None, 3))
    outputs = layers.Activation("sigmoid")(layer(inputs))
    trained = TrainedModel(keras.Model(inputs, outputs), {})
    with pytest.raises(ValueError, match="use engine='keras'"):
        export.to_openvino(trained)


def test_without_openvino_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "ov", None)
    write_case(tmp_path, "toy")
    with pytest.raises(ImportError, match="pip install openvino"):
        predict_case(small(), find_cases(tmp_path)[0], engine="openvino")


@pytest.fixture
def trained(tmp_path):
    """A network that calls the bright voxels of the toys a tumour, and its file."""
    model = small(depth=2)
    write_model(model, tmp_path / "model.keras", DESCRIPTION)
    return load_model(tmp_path / "model.keras")


@pytest.fixture
def data(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    patches = {"patch_shape": (16, 16, 8), "tumour_share": 1}
    return [BratsGenerator(tmp_path / "split" / n, **patches) for n in ("train", "val")]


@missing
def test_int8_is_kept_with_the_model_where_validation_is_as_good(
    trained, data, tmp_path, monkeypatch
):
    plain = export.to_openvino(trained)
    monkeypatch.setattr(export, "LARGEST_FALL", 1.0)
    result = export.calibrate_int8(trained, *data)
    assert result["kept"] == "int8"
    convolutions = [x.name for x in trained.model.layers if hasattr(x, "kernel")]
    assert [*trained.description["int8"]] == convolutions
    store_description(trained)
    again = export.to_openvino(load_model(tmp_path / "model.keras"))
    assert again.description["engine"] == "OpenVINO int8"
    image = data[1][0][0]
    keras_, float32, int8 = (
        each.model.predict_on_batch(image) for each in (trained, plain, again)
    )
    # int8 rounds, by little: 256 levels of what each layer takes.
    assert np.abs(float32 - keras_).max() < 1e-4 < np.abs(int8 - keras_).max() < 0.2


@missing
def test_int8_is_dropped_where_validation_is_worse(data, monkeypatch):
    inputs = keras.Input((None, None, None, 3))
    x = layers.Conv3D(4, 1)(inputs)
    model = keras.Model(inputs, layers.Activation("softmax")(x))
    kernel = np.zeros((1, 1, 1, 3, 4))
    kernel[..., 0, :] = [0, 2, 3, 5]  # the brighter in FLAIR, the more of a tumour
    model.set_weights([kernel, np.array([0, -1, -3, -9])])
    trained = TrainedModel(model, {})
    good = export.calibrate_int8(trained, *data)
    assert good["kept"] == "int8" and good["float32"] > 0.3
    assert [*trained.description] == ["int8"]
    zero = np.float32(0)
    monkeypatch.setattr(export, "_round", lambda x, *_: export.op.multiply(x, zero))
    bad = export.calibrate_int8(trained, *data)
    assert bad["kept"] == "float32" and bad["int8"] < bad["float32"] - 0.1
    assert bad["float32"] == good["float32"] and trained.description == {}


@missing
def test_a_case_is_predicted_by_either_engine_and_not_mixed_up(
    trained, toy_set, tmp_path
):
    cases = find_cases(toy_set)[:1]
    segmentation = predict_case(trained, cases[0])
    found = predict_case(trained, cases[0], engine="openvino")
    assert np.mean(found == segmentation) >= 0.9999 and len(np.unique(found)) > 1
    out = tmp_path / "out"
    (path,) = predict_cases(trained, cases, out)
    times = [path.stat().st_mtime_ns]
    for engine in ("keras", "openvino", "openvino", "keras"):
        predict_cases(trained, cases, out, engine=engine)
        times.append(path.stat().st_mtime_ns)
    changed = [a != b for a, b in zip(times, times[1:], strict=False)]
    assert changed == [False, True, False, True]  # each engine keeps what is its own


@missing
@pytest.mark.parametrize("kind", ["product", "softmax", "twice"])
def test_what_is_no_plain_layer_is_told(kind):
    inputs = keras.Input((None, None, None, 3))
    convolution = layers.Conv3D(3, 3, padding="same")
    x = {
        "product": lambda: 2 * convolution(inputs),
        "softmax": lambda: keras.ops.softmax(convolution(inputs)),
        "twice": lambda: convolution(convolution(inputs)),
    }[kind]()
    outputs = layers.Conv3D(4, 1, activation="softmax")(x)
    model = TrainedModel(keras.Model(inputs, outputs), DESCRIPTION)
    with pytest.raises(ValueError, match="use engine='keras'"):
        export.to_openvino(model)


@missing
@pytest.mark.parametrize("kind", ["upsampling", "pooling", "activation"])
def test_layers_that_openvino_computes_differently_are_refused(kind):
    inputs = keras.Input((None, None, None, 3))
    x = layers.Conv3D(4, 3, strides=2 if kind == "upsampling" else 1, padding="same")(
        inputs
    )
    if kind == "upsampling":
        x = layers.Conv3DTranspose(4, 3, strides=2, padding="same")(x)
    elif kind == "pooling":
        x = layers.MaxPooling3D(3, 2, "same")(x)
        x = layers.UpSampling3D(2)(x)
    else:
        x = layers.Activation(layers.LeakyReLU())(x)
    model = keras.Model(inputs, layers.Conv3D(4, 1, activation="softmax")(x))
    with pytest.raises(ValueError, match="use engine='keras'"):
        export.to_openvino(TrainedModel(model, DESCRIPTION))


@missing
def test_I4_the_channels_of_a_network_in_memory_are_kept(data, tmp_path):
    write_case(tmp_path / "scans", "toy", seed=5)
    (case,) = find_cases(tmp_path / "scans", labels="0124")
    model = small(depth=2)
    CHANNELS[model] = ["t2", "t1", "flair"]
    maps = [predict_case(model, case, engine=name) for name in ("keras", "openvino")]
    assert np.mean(maps[0] == maps[1]) > 0.99
    assert np.mean(maps[0] == predict_case(small(depth=2), case)) < 0.99


@missing
def test_ranges_of_int8_stay_if_the_network_cannot_be_converted(trained, data):
    trained.description["int8"] = {"encoder1_conv1": [0.0, 1.0]}
    inputs = trained.model.inputs[0]
    odd = layers.BatchNormalization()(trained.model.outputs[0])
    trained.model = keras.Model(inputs, odd)
    with pytest.raises(ValueError, match="use engine='keras'"):
        export.calibrate_int8(trained, *data)
    assert trained.description["int8"]

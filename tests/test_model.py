import json
import warnings
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers

from brats_utils.losses import (
    RegionDice,
    describe_object,
    dice_focal_loss,
    supervise_deeply,
)
from brats_utils.model import (
    model_table,
    size_factor,
    unet,
    unet_cicek2016,
)

ANY_SIZE = (None, None, None, 3)


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(2, 8, 8, 8, 3)).astype("float32")


@pytest.fixture
def tiny():
    return unet(ANY_SIZE, filters=2, depth=2)


def test_standard_unet_has_the_published_tutorials_size():
    model = unet(ANY_SIZE, normalisation=False)
    total = model_table(model, (128, 128, 128, 3)).loc["total"]
    assert total.parameters == model.count_params() == 5_645_828
    assert round(total.GFLOP) == 243


def test_2d_and_3d_have_the_same_layers():
    flat, solid = unet((32, 32, 3)), unet((32, 32, 32, 3))
    assert [x.name for x in flat.layers] == [x.name for x in solid.layers]
    assert flat.output_shape == (None, 32, 32, 4)
    assert solid.output_shape == (None, 32, 32, 32, 4)


def test_layers_are_named_by_stage(tiny):
    stages = dict.fromkeys(x.name.split("_")[0] for x in tiny.layers)
    assert list(stages) == ["image", "encoder1", "bottleneck", "decoder1", "head"]


def test_open_sizes_accept_any_multiple(tiny):
    assert tiny(np.zeros((1, 4, 6, 8, 3))).shape == (1, 4, 6, 8, 4)
    assert tiny(np.zeros((2, 2, 2, 10, 3))).shape == (2, 2, 2, 10, 4)


def test_labels_sum_to_one_and_regions_do_not(tiny, image):
    labels = np.asarray(tiny(image))
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-5)
    regions = np.asarray(unet(ANY_SIZE, filters=2, depth=2, n_classes=3)(image))
    assert regions.shape == (2, 8, 8, 8, 3)
    assert 0 <= regions.min() and regions.max() <= 1
    assert np.ptp(regions.sum(-1)) > 0.01


def test_a_sample_does_not_depend_on_the_rest_of_its_batch(tiny, image):
    together, alone = np.asarray(tiny(image)), np.asarray(tiny(image[1:]))
    np.testing.assert_allclose(together[1:], alone, atol=1e-6)


def test_stem_stride_halves_the_resolution_and_restores_it():
    model = unet((16, 16, 16, 3), filters=2, depth=3, stem_stride=2)
    assert model.get_layer("encoder1_conv1").output.shape == (None, 8, 8, 8, 2)
    assert model.get_layer("bottleneck_act2").output.shape == (None, 2, 2, 2, 8)
    assert model.output_shape == (None, 16, 16, 16, 4)
    full = model_table(unet(ANY_SIZE), (64, 64, 64, 3)).GFLOP["total"]
    cheap = model_table(unet(ANY_SIZE, stem_stride=2), (64, 64, 64, 3)).GFLOP["total"]
    assert full / cheap > 7


@pytest.mark.parametrize("stride", [1, 2])
def test_deep_supervision_weighs_the_losses_of_all_outputs(stride):
    model = unet((16, 16, 16, 2), filters=2, depth=4, stem_stride=stride)
    supervised = supervise_deeply(model, 2)
    assert supervised.factors == (1, 2, 4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 16, 16, 2)).astype("float32")
    y = rng.integers(0, 4, (2, 16, 16, 16, 1)).astype("uint8")
    outputs = [np.asarray(output) for output in supervised(x)]
    assert [output.shape[1] for output in outputs] == [16, 8, 4]
    np.testing.assert_array_equal(outputs[0], model(x))
    supervised.compile("sgd", dice_focal_loss, metrics=[RegionDice("WT")])
    sampled = [y, y[:, 1::2, 1::2, 1::2], y[:, 2::4, 2::4, 2::4]]
    losses = [
        float(np.mean(dice_focal_loss(labels, output)))
        for labels, output in zip(sampled, outputs, strict=True)
    ]
    # Validation looks at the first output alone, so it compares with other models.
    scores = supervised.test_on_batch(x, y, return_dict=True)
    assert scores["loss"] == pytest.approx(losses[0], rel=1e-5)
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    trained = supervised.train_on_batch(x, y, return_dict=True)
    assert trained["loss"] == pytest.approx(expected, rel=1e-5)


def test_copies_of_a_model_keep_their_factors(tmp_path):
    model = unet(ANY_SIZE, filters=2, depth=3, stem_stride=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copy in (loaded, keras.models.clone_model(model)):
        assert size_factor(copy) == 8
        assert supervise_deeply(copy, 2).factors == (1, 2, 4)


@pytest.mark.parametrize("levels", [0, 3])
def test_deep_supervision_needs_that_many_stages(levels):
    model = unet(ANY_SIZE, filters=2, depth=4)  # decoder3 and decoder2 are coarser
    with pytest.raises(ValueError, match=f"levels .*{levels}, expected 1 to 2"):
        supervise_deeply(model, levels)


def test_dropout_acts_in_training_only(image):
    model = unet(ANY_SIZE, filters=2, depth=2, dropout=0.5)
    once, twice = (np.asarray(model(image, training=False)) for _ in range(2))
    np.testing.assert_array_equal(once, twice)
    assert np.any(np.asarray(model(image, training=True)) != once)


def test_head_is_float32_in_mixed_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = unet(ANY_SIZE, filters=2, depth=2)
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.get_layer("encoder1_conv1").output.dtype == "bfloat16"
    assert model.output.dtype == "float32"


@pytest.mark.parametrize("build", [unet, unet_cicek2016])
def test_models_are_made_of_keras_layers_only(build):
    layers = build(ANY_SIZE).layers
    assert {type(layer).__module__.split(".")[0] for layer in layers} == {"keras"}


def test_reloads_compiled_without_custom_objects(tiny, image, tmp_path):
    tiny.compile(loss=dice_focal_loss, metrics=[RegionDice("WT")])
    tiny.train_on_batch(image, np.zeros((2, 8, 8, 8, 1), "uint8"))
    tiny.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(tiny(image), again(image))
    assert again.loss is dice_focal_loss


def test_memorises_one_patch():
    keras.utils.set_random_seed(0)
    labels = np.zeros((1, 8, 8, 8, 1), "uint8")
    for label, edge in ((2, 1), (3, 2), (1, 3)):
        labels[:, edge:-edge, edge:-edge, edge:-edge] = label
    model = unet((8, 8, 8, 1), filters=8, depth=2)
    model.compile(keras.optimizers.Adam(0.02), dice_focal_loss)
    model.fit(labels / 3.0, labels, epochs=40, verbose=0)
    predicted = np.asarray(model(labels / 3.0)).argmax(-1)
    np.testing.assert_array_equal(predicted, labels[..., 0])


def test_cicek2016_has_the_published_size_and_keeps_the_grid():
    model = unet_cicek2016((32, 32, 32, 3), n_classes=3)
    assert model.count_params() == 19_069_955
    assert model.output_shape == (None, 32, 32, 32, 3)
    assert model.get_layer("bottleneck_act2").output.shape == (None, 4, 4, 4, 512)


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((30, 32, 32, 3), {}, "multiples of 16, got .30, 32, 32."),
        ((16, 16, 16, 3), {"stem_stride": 2}, "multiples of 32"),
        ((32, 3), {}, r"\(X, Y, C\) or \(X, Y, Z, C\)"),
        ((32, 32, 32, None), {}, "channels"),
        ((32, 32, 32, 3), {"n_classes": 2}, "n_classes"),
        ((32, 32, 32, 3), {"depth": 0}, "depth"),
        ((32, 32, 32, 3), {"stem_stride": 3}, "stem_stride"),
    ],
)
def test_unet_rejects_what_does_not_fit(shape, options, says):
    with pytest.raises(ValueError, match=says):
        unet(shape, **options)


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((64, 64, 3), {}, r"\(X, Y, Z, C\)"),
        ((60, 64, 64, 3), {}, "multiples of 8"),
        ((64, 64, 64, 3), {"n_classes": 5}, "n_classes"),
    ],
)
def test_cicek2016_rejects_what_does_not_fit(shape, options, says):
    with pytest.raises(ValueError, match=says):
        unet_cicek2016(shape, **options)


def test_table_by_hand():
    table = model_table(unet((8, 8, 8, 1), filters=2, depth=2))
    # Kernels of encoder1: 3³·1·2 = 54 and 3³·2·2 = 108; bottleneck: 3³·2·4 = 216 and
    # 3³·4·4 = 432; decoder1: 2³·4·2 = 64 upwards, 3³·4·2 = 216 and 108; head: 2·4 = 8.
    # A norm has twice its channels; only the transposed and the last have a bias.
    assert table.parameters.to_dict() == {
        "encoder1": 54 + 4 + 108 + 4,
        "bottleneck": 216 + 8 + 432 + 8,
        "decoder1": 64 + 2 + 216 + 4 + 108 + 4,
        "head": 8 + 4,
        "total": 1244,
    }
    # 512 voxels at full size, 64 at half; the way up is paid per coarse voxel.
    flop = [512 * 162, 64 * 648, 64 * 64 + 512 * 324, 512 * 8]
    expected = [2 * f / 1e9 for f in (*flop, sum(flop))]
    np.testing.assert_allclose(table.GFLOP, expected, rtol=1e-12)
    # Six layers a block, and the pooling, the way up, the concatenation, two heads.
    values = [
        6 * 512 * 2,
        64 * 2 + 6 * 64 * 4,
        512 * 2 + 512 * 4 + 6 * 512 * 2,
        2 * 512 * 4,
    ]
    expected = [4 * v / 1e6 for v in (*values, sum(values))]
    np.testing.assert_allclose(table.activations_mb, expected, rtol=1e-12)
    assert table.output.tolist() == [
        (8, 8, 8, 2),
        (4, 4, 4, 4),
        (8, 8, 8, 2),
        (8, 8, 8, 4),
        (8, 8, 8, 4),
    ]


def test_table_needs_sizes_that_fit(tiny):
    with pytest.raises(ValueError, match="pass input_shape"):
        model_table(tiny)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(5, 8, 8\)"):
        model_table(tiny, (5, 8, 8, 3))


def test_table_of_a_fixed_size_equals_that_of_an_open_one(tiny):
    fixed = unet((8, 8, 16, 3), filters=2, depth=2)
    expected = model_table(fixed)
    assert expected.equals(model_table(tiny, (8, 8, 16, 3)))
    assert expected.output["bottleneck"] == (4, 4, 8, 4)


def foreign_network():
    """Return a 2D U-Net unlike ours: a nested encoder, a shared layer, a gate."""
    image = keras.Input((None, None, 3))
    fine = layers.Conv2D(4, 3, padding="same")(image)
    encoder = keras.Model(image, [fine, layers.MaxPooling2D(8)(fine)])
    image = keras.Input((None, None, 3))
    fine, coarse = encoder(image)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(coarse)
    coarse = layers.Multiply()([coarse, layers.Conv2D(4, 1)(gate)])
    activation = layers.ReLU()
    x = activation(layers.UpSampling2D(8)(coarse))
    x = activation(layers.Concatenate()([fine, x]))
    return keras.Model(image, layers.Conv2D(4, 1)(x))


def attentive_network():
    """Return a 2D network with efficient channel attention: vectors of 4 channels."""
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, padding="same")(image)
    gate = layers.Reshape((4, 1))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv1D(1, 3, padding="same", activation="sigmoid")(gate)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 4))(gate)])
    x = layers.UpSampling2D(2)(layers.MaxPooling2D(2)(x))
    return keras.Model(image, layers.Conv2D(4, 1)(x))


def test_size_factor_of_other_networks():
    assert size_factor(attentive_network()) == 2
    vector = keras.Input((4,))
    assert size_factor(keras.Model(vector, layers.Dense(4)(vector))) == 1  # no grid
    assert size_factor(foreign_network()) == 8
    assert size_factor(unet((16, 16, 16, 1), filters=2, depth=5)) == 16  # one voxel
    assert size_factor(unet((None, None, 16, 1), filters=2, depth=5)) == 16
    network = unet((None, 48, 16, 1), filters=2, depth=5)
    assert size_factor(network) == 16
    assert model_table(network, (32, 48, 16, 1))["GFLOP"].loc["total"] > 0
    image = keras.Input((None, None, 5, 1))
    x = layers.UpSampling3D((2, 2, 1))(layers.MaxPooling3D((2, 2, 1))(image))
    network = keras.Model(image, layers.Conv3D(4, 1)(x))
    assert size_factor(network) == 2 and len(model_table(network, (4, 4, 5, 1)))
    assert size_factor(unet(ANY_SIZE, filters=2, depth=1)) == 1
    assert size_factor(unet_cicek2016(ANY_SIZE)) == 8


def test_the_librarys_network_trains_with_our_loss_and_reloads(tmp_path):
    sm3d = pytest.importorskip(
        "segmentation_models_3D", reason="the optional library is not installed"
    )
    network = sm3d.Unet(
        "resnet18", input_shape=(32, 32, 32, 3), classes=4, encoder_weights=None
    )
    assert size_factor(network) == 32
    network.compile("adam", dice_focal_loss, jit_compile=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 32, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 4, (1, 32, 32, 32, 1))
    first, second = (float(network.train_on_batch(x, y)) for _ in range(2))
    assert np.isfinite(first) and second != first
    network.save(tmp_path / "library.keras")
    again = keras.models.load_model(tmp_path / "library.keras", compile=False)
    np.testing.assert_allclose(
        again.predict_on_batch(x), network.predict_on_batch(x), atol=1e-5
    )


def test_the_table_of_a_model_of_fixed_size_may_be_asked_for_another_patch():
    fixed = unet((8, 8, 8, 3), filters=2, depth=2)
    table = model_table(fixed, (16, 16, 16, 3))
    expected = model_table(
        unet((None,) * 3 + (3,), filters=2, depth=2), (16, 16, 16, 3)
    )
    assert table.equals(expected)


class OfKeras(keras.losses.Loss):
    """A loss of the user with private weights, which `get_config` does not mention."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        self._weights = weights


class Plain:
    """What is no Keras object; may hold others."""

    def __init__(self, value):
        self._value = value

    def loss(self, y_true, y_pred):
        return 0.0


class Slotted:
    """An object whose values cannot be listed."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def described(value):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        text = json.dumps(value, default=describe_object)
    return text, [str(warning.message) for warning in said]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: OfKeras([x, 1.0]),
        lambda x: OfKeras(np.array([x, 1.0])),
        Plain,
        lambda x: Plain(OfKeras([x])),
        lambda x: Plain({"losses": [dice_focal_loss, Plain(x)]}),
        lambda x: Plain(x).loss,
        lambda x: partial(dice_focal_loss, weight=x),
        lambda x: Plain(partial(dice_focal_loss, weight=x)),
        lambda x: keras.losses.SparseCategoricalCrossentropy(ignore_class=x),
    ],
)
def test_I5_objects_of_other_state_are_told_apart_and_equal_ones_are_not(make):
    assert described(make(1))[0] == described(make(1))[0] != described(make(2))[0]


def test_I5_what_cannot_be_compared_is_told():
    for value in (lambda y, p: 0.0, Plain(1), Slotted(1), Plain(1).loss, described):
        assert "test_model" in " ".join(described(value)[1])
    for value in (dice_focal_loss, keras.losses.KLDivergence(), np.float32(1)):
        assert described(value)[1] == []

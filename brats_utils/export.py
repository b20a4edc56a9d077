"""Predict on a CPU with OpenVINO, in float32 or int8: `pip install openvino`.

OpenVINO's own converter runs Keras's GroupNormalization on slow reference kernels. This
module builds the graph layer by layer and uses OpenVINO's MVN operation instead.
"""

import dataclasses

import keras
import numpy as np
from keras import layers, ops

from brats_utils import generator, labels, losses
from brats_utils.model import size_factor

try:
    import openvino as ov
    from openvino import opset13 as op
except ImportError:  # it is optional; `to_openvino` says how to install it
    ov = None

# Training batches for calibration, and how much lower the Dice may be with int8.
BATCHES, LARGEST_FALL = 16, 0.005
KERAS_ONLY = "OpenVINO does not compute it here; use engine='keras'"
CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
TO_CHANNELS_FIRST, TO_CHANNELS_LAST = np.array([[0, 4, 1, 2, 3], [0, 2, 3, 4, 1]])
SPACE = np.array([2, 3, 4])  # the axes of a node (B, C, X, Y, Z)
PADS = {"pads_begin": [0] * 3, "pads_end": [0] * 3, "dilations": [1] * 3}


class OpenVinoModel(keras.Model):
    """A Keras model whose `predict_on_batch` is computed by OpenVINO."""

    def predict_on_batch(self, x):
        """Return the probabilities (B, X, Y, Z, K) of a batch (B, X, Y, Z, C)."""
        if x.shape not in self.ready:  # it only holds the last shape
            self.graph.reshape(x.shape)  # a fixed shape runs faster
            self.ready = {x.shape: ov.Core().compile_model(self.graph, "CPU", CONFIG)}
        return np.array(self.ready[x.shape](np.ascontiguousarray(x, np.float32))[0])


def _round(x, low, high, levels=256):
    """Return a node rounded to a number of levels, one of which is 0.

    OpenVINO runs convolutions of such nodes in int8.
    """
    step = (high - low) / (levels - 1)
    low = np.round(low / step) * step
    bounds = [op.constant(np.float32(x)) for x in (low, low + (levels - 1) * step)]
    return op.fake_quantize(x, *bounds, *bounds, levels)


def _per_channel(weights):
    """Return weights (C,) in a shape that broadcasts with (B, C, X, Y, Z)."""
    return ops.convert_to_numpy(weights).reshape(1, -1, 1, 1, 1)


def _convolve(layer, x, ranges):
    """Return a convolution, or a transposed one; in int8 if its range is known."""
    transposed = isinstance(layer, layers.Conv3DTranspose)
    values = ops.convert_to_numpy(layer.kernel).transpose(4, 3, 0, 1, 2).copy()
    kernel, all_but_output = op.constant(values), (0 if transposed else 1, *SPACE)
    if layer.name in ranges:
        x = _round(x, *ranges[layer.name])
        largest = np.abs(values).max(all_but_output, keepdims=True) + 1e-8
        kernel = _round(kernel, -largest, largest, 255)
    convolve = op.convolution_backprop_data if transposed else op.convolution
    padding = {"same": "SAME_UPPER", "valid": "VALID"}[layer.padding]
    x = convolve(x, kernel, [*layer.strides], auto_pad=padding, **PADS)
    return op.add(x, _per_channel(layer.bias)) if layer.use_bias else x


def _normalise(layer, x):
    """Return the instance normalisation; `_check_outputs` rejects other groups."""
    x = op.mvn(x, SPACE, True, layer.epsilon, "INSIDE_SQRT")
    x = op.multiply(x, _per_channel(layer.gamma)) if layer.scale else x
    return op.add(x, _per_channel(layer.beta)) if layer.center else x


def _resample(layer, x):
    """Return a max pooling or a nearest-neighbour upsampling."""
    if isinstance(layer, layers.MaxPooling3D):
        pool = {"kernel_shape": [*layer.pool_size], **PADS}
        return op.max_pool(x, [*layer.strides], **pool).output(0)
    return op.interpolate(x, np.float32(layer.size), "nearest", "scales", axes=SPACE)


def _convert_layer(layer, inputs, ranges):
    """Return the OpenVINO node of a Keras layer, from the nodes of its inputs."""
    x, name = inputs[0], type(layer).__name__
    name = layer.activation.__name__ if name == "Activation" else name
    operations = {
        "Add": lambda: op.add(*inputs),
        "Concatenate": lambda: op.concat(inputs, 1),
        "Conv3D": lambda: _convolve(layer, x, ranges),
        "Conv3DTranspose": lambda: _convolve(layer, x, ranges),
        "Dropout": lambda: x,
        "GroupNormalization": lambda: _normalise(layer, x),
        "LeakyReLU": lambda: op.prelu(x, np.float32([layer.negative_slope])),
        "MaxPooling3D": lambda: _resample(layer, x),
        "UpSampling3D": lambda: _resample(layer, x),
        "sigmoid": lambda: op.sigmoid(x),
        "softmax": lambda: op.softmax(x, 1),
    }
    if name not in operations or any(each is None for each in inputs):
        raise ValueError(f"layer {layer.name} has type {name}: {KERAS_ONLY}")
    return operations[name]()


def _convert_model(model, ranges):
    """Return an OpenVinoModel, in int8 where the range of a convolution is given."""
    made = OpenVinoModel(model.inputs[0], model.outputs[0], name=model.name)
    image = op.parameter([-1] * 4 + [model.input_shape[-1]], np.float32)
    # {id of a Keras tensor: node}; tensors are not hashable.
    nodes = {id(made.inputs[0]): op.transpose(image, TO_CHANNELS_FIRST)}
    for layer in made.operations[1:]:
        inputs = [nodes.get(id(each)) for each in keras.tree.flatten(layer.input)]
        nodes[id(layer.output)] = _convert_layer(layer, inputs, ranges)
    last = op.transpose(nodes[id(made.outputs[0])], TO_CHANNELS_LAST)
    made.graph, made.ready = ov.Model([last], [image]), {}
    return made


def _check_outputs(model):
    """Raise unless OpenVINO and Keras agree on a small random image."""
    sizes = [size or 2 * size_factor(model) for size in model.input_shape[1:]]
    x = np.random.default_rng(0).normal(size=(1, *sizes)).astype(np.float32)
    found, expected = model.predict_on_batch(x), ops.convert_to_numpy(model(x))
    same_shape = found.shape == expected.shape
    if not same_shape or np.abs(found - expected).max() > 1e-3:
        raise ValueError(f"a layer of {model.name} has unknown options: {KERAS_ONLY}")


def _find_ranges(model, data):
    """Return {layer: [min, max]} of each convolution's input, averaged over batches."""
    convolutions = [layer for layer in model.layers if hasattr(layer, "kernel")]
    limits = [ops.stack([ops.min(x.input), ops.max(x.input)]) for x in convolutions]
    observer, n = keras.Model(model.inputs[0], limits), min(len(data), BATCHES)
    observer.jit_compile = False
    means = np.mean([observer.predict_on_batch(data[i][0]) for i in range(n)], axis=0)
    # Each range must contain 0, because padding adds zeros.
    ranges = np.clip(means.reshape(-1, 2), [-np.inf, 1e-6], [0, np.inf]).tolist()
    return {x.name: each for x, each in zip(convolutions, ranges, strict=True)}


def _mean_dice(model, data):
    """Return the mean Dice of WT, TC and ET over all patches."""
    metrics = [losses.RegionDice(region) for region in labels.ENCODED_REGIONS]
    for x, truth in (data[i] for i in range(len(data))):
        predicted = model.predict_on_batch(x)
        for metric in metrics:
            metric.update_state(truth, predicted)
    return float(np.mean([metric.result() for metric in metrics]))


def to_openvino(trained):
    """Return a model that OpenVINO computes on the CPU.

    Parameters
    ----------
    trained : inference.TrainedModel
        A 3D U-Net like those of `brats_utils.model`. It runs in int8 if
        `calibrate_int8` has stored ranges in its description, else in float32.

    Returns
    -------
    converted : inference.TrainedModel
        Its description says "engine": "OpenVINO int8" or "OpenVINO float32".

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    ValueError
        If the type or the options of a layer are not supported.
    """
    if ov is None:
        raise ImportError("OpenVINO is missing: pip install openvino")
    model, ranges = trained.model, trained.description.get("int8")
    try:
        converted = _convert_model(model, {})
        _check_outputs(converted)  # in float32, as int8 differs from Keras
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{model.name}: {KERAS_ONLY} ({str(error)[:200]})") from None
    model = _convert_model(model, ranges) if ranges else converted
    engine = f"OpenVINO {'int8' if ranges else 'float32'}"
    if trained.model in generator.CHANNELS:  # for a model not from a file
        generator.CHANNELS[model] = generator.CHANNELS[trained.model]
    description = {**trained.description, "engine": engine}
    return dataclasses.replace(trained, model=model, description=description)


def calibrate_int8(trained, train_data, val_data):
    """Find the value ranges for int8, and keep them if the Dice hardly drops.

    Parameters
    ----------
    trained : inference.TrainedModel
        "int8", the ranges of the layers' inputs, is set in its description or removed.
        `evaluation.store_description(trained)` then updates the model's file.
    train_data, val_data : BratsGenerator
        The ranges come from 16 training batches; all of `val_data` is scored.

    Returns
    -------
    result : dict
        The mean validation Dice with "float32" and with "int8", and which is "kept":
        int8 if its Dice is less than 0.005 lower.

    Raises
    ------
    ImportError, ValueError
        As in `to_openvino`; or if the data do not fit the model.
    """
    model = trained.model
    generator.check_pair(train_data, val_data, model, size_factor(model))
    plain = to_openvino(dataclasses.replace(trained, description={})).model
    ranges = _find_ranges(model, train_data)
    trained.description.pop("int8", None)
    models = {"float32": plain, "int8": _convert_model(model, ranges)}
    result = {name: _mean_dice(each, val_data) for name, each in models.items()}
    if result["float32"] - result["int8"] < LARGEST_FALL:
        trained.description["int8"] = ranges
    return {**result, "kept": "int8" if "int8" in trained.description else "float32"}

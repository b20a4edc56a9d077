"""Losses for label maps, the Dice metric, deep supervision and averaged weights.

The five losses share one interface. They take

- `y_true`, an integer or float tensor (B, ..., 1): the labels 0..3,
- `y_pred`, a float tensor (B, ..., K): with K = 4 the softmax probabilities of these
  labels, with K = 3 the sigmoid probabilities of the nested regions WT, TC and ET,

and return one loss per sample, a float32 tensor (B,). Any other K is a ValueError. Sums
are computed in float32 under every precision policy.

They are made of three terms. In these, p is a predicted probability, g is the truth, 0
or 1, and q is the probability of the truth: that of the voxel's label (K = 4) or that
of being inside or outside a region (K = 3). Each term is 0 for a perfect prediction.

- Dice: 1 - (2 Σpg + 1) / (Σp + Σg + 1), where Σ runs over the voxels of a sample. This
  is the mean over three maps, which are the regions (K = 3) or the labels 1, 2 and 3
  (K = 4). The background is left out because its Dice is always close to 1. For a map
  that is absent from the truth the loss is Σp / (Σp + 1): one false voxel costs 1/2 and
  a thousand cost almost 1, so it is up to the second term to correct them.
- Focal: the mean over voxels (and regions) of -(1 - q)² log q.
- Cross-entropy: the mean over voxels (and regions) of -log q.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import random
import types
import warnings

import keras
import numpy as np
from keras import ops
from keras.saving import register_keras_serializable

from brats_utils.files import check_option, is_whole
from brats_utils.labels import ENCODED_REGIONS, LABELS
from brats_utils.model import check_model, grid_sizes, output_head, size_factor

SMOOTH = 1.0  # voxels
EPSILON = 1e-7

# (4, 3): whether each of the labels 0..3 belongs to WT, TC and ET.
IN_REGION = np.array([[k in v for v in ENCODED_REGIONS.values()] for k in range(4)])


def _look_up(table, labels):
    """Return each label's row of a table: (4, K), (B, ...) -> (B, ..., K) float32."""
    table = ops.convert_to_tensor(table, "float32")
    return ops.take(table, ops.cast(labels, "int32"), axis=0)


def _check_outputs(y_pred):
    """Return the number of outputs, 4 or 3; raise if it is neither."""
    n = y_pred.shape[-1]
    if n not in (len(LABELS), len(ENCODED_REGIONS)):
        raise ValueError(f"expected 4 outputs (labels 0..3) or 3 (WT, TC, ET), got {n}")
    return n


def _prepare(y_true, y_pred):
    """Return true and predicted maps, both (B, voxels, K) float32."""
    n = _check_outputs(y_pred)
    table = np.eye(len(LABELS)) if n == len(LABELS) else IN_REGION
    targets = _look_up(table, ops.squeeze(y_true, axis=-1))
    flat = (ops.shape(y_pred)[0], -1, n)
    return ops.reshape(targets, flat), ops.reshape(ops.cast(y_pred, "float32"), flat)


def _true_probability(targets, probabilities):
    """Return the probability of the truth: (B, voxels, 1), or 3 for three regions."""
    if probabilities.shape[-1] == len(LABELS):
        q = ops.sum(targets * probabilities, axis=-1, keepdims=True)
    else:
        q = targets * probabilities + (1 - targets) * (1 - probabilities)
    return ops.clip(q, EPSILON, 1.0)


def _dice(targets, probabilities, voxels=1):
    """Return the Dice term; `voxels` are the axes of Σ, (0, 1) for the whole batch."""
    # The last three maps: all but the background.
    targets, probabilities = targets[..., -3:], probabilities[..., -3:]
    overlap = ops.sum(targets * probabilities, axis=voxels)  # (B, 3), or (3,)
    size = ops.sum(targets, axis=voxels) + ops.sum(probabilities, axis=voxels)
    return ops.mean(1 - (2 * overlap + SMOOTH) / (size + SMOOTH), axis=-1)


def _cross_entropy(targets, probabilities):
    return ops.mean(-ops.log(_true_probability(targets, probabilities)), axis=(1, 2))


def _focal(targets, probabilities):
    q = _true_probability(targets, probabilities)
    return ops.mean(ops.square(1 - q) * -ops.log(q), axis=(1, 2))


@register_keras_serializable(package="brats_utils")
def dice_loss(y_true, y_pred):
    """1 - (2 Σpg + 1) / (Σp + Σg + 1), averaged over labels or regions.

    Parameters
    ----------
    y_true : (B, ..., 1) tensor
        Labels 0..3.
    y_pred : (B, ..., K) tensor
        Probabilities of the four labels or the three regions.

    References
    ----------
    Milletari et al., 2016, arXiv:1606.04797.

    Examples
    --------
    >>> labels = np.array([0, 1, 2, 3]).reshape(1, 4, 1)
    >>> float(dice_loss(labels, np.eye(4)[None])[0])
    0.0
    """
    return _dice(*_prepare(y_true, y_pred))


@register_keras_serializable(package="brats_utils")
def focal_loss(y_true, y_pred):
    """-(1 - q)² log q, averaged over voxels; q is the probability of the truth.

    A voxel with q = 0.9 contributes a hundredth of what it does to the cross-entropy,
    so the easy background, 98 % of a scan, does not dominate the tumour.

    Parameters
    ----------
    y_true : (B, ..., 1) tensor
        Labels 0..3.
    y_pred : (B, ..., K) tensor
        Probabilities of the four labels or the three regions.

    References
    ----------
    Lin et al., 2017, arXiv:1708.02002, with gamma = 2 and without class weights.
    """
    return _focal(*_prepare(y_true, y_pred))


@register_keras_serializable(package="brats_utils")
def dice_focal_loss(y_true, y_pred):
    """Dice + focal: the sum of `dice_loss` and `focal_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) tensor
        Labels 0..3.
    y_pred : (B, ..., K) tensor
        Probabilities of the four labels or the three regions.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps) + _focal(*maps)


@register_keras_serializable(package="brats_utils")
def dice_cross_entropy_loss(y_true, y_pred):
    """Dice + cross-entropy, as used by the winners of BraTS 2020.

    Parameters
    ----------
    y_true : (B, ..., 1) tensor
        Labels 0..3.
    y_pred : (B, ..., K) tensor
        Probabilities of the four labels or the three regions.

    References
    ----------
    Isensee et al., 2020, nnU-Net for Brain Tumor Segmentation, arXiv:2011.00848.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps) + _cross_entropy(*maps)


@register_keras_serializable(package="brats_utils")
def batch_dice_cross_entropy_loss(y_true, y_pred):
    """Dice of the batch + cross-entropy, where Σ runs over all samples of the batch.

    A patch without one of the regions then has little influence on the Dice of that
    region. With one sample per batch this equals `dice_cross_entropy_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) tensor
        Labels 0..3.
    y_pred : (B, ..., K) tensor
        Probabilities of the four labels or the three regions.

    References
    ----------
    Isensee et al., 2020, nnU-Net for Brain Tumor Segmentation, arXiv:2011.00848.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps, voxels=(0, 1)) + _cross_entropy(*maps)


@register_keras_serializable(package="brats_utils")
class RegionDice(keras.metrics.Mean):
    """2 |P ∩ G| / (|P| + |G|), the Dice of one region, averaged over samples.

    P and G are the predicted and the true voxels of the region in one sample. The Dice
    is 1 where both are empty, as in the official scores of whole scans. With four
    outputs, P holds the voxels whose most probable label belongs to the region. With
    three, it holds those where the region's probability exceeds 0.5.

    Parameters
    ----------
    region : {"WT", "TC", "ET"}
        Whole tumour, tumour core or enhancing tumour.
    name : str, optional
        `dice_<region>` by default.
    dtype : str, optional
        As in other Keras metrics.

    Raises
    ------
    ValueError
        If `region` is not one of the three.
    """

    def __init__(self, region, name=None, dtype=None):
        check_option("region", region, [*ENCODED_REGIONS].__contains__, "WT, TC or ET")
        super().__init__(name=name or f"dice_{region}", dtype=dtype)
        self.region = region

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Add a batch: y_true (B, ..., 1) labels, y_pred (B, ..., K) probabilities."""
        channel = list(ENCODED_REGIONS).index(self.region)
        in_region = IN_REGION[:, channel]
        _check_outputs(y_pred)
        truth = _look_up(in_region, ops.squeeze(y_true, axis=-1))  # (B, ...)
        if y_pred.shape[-1] == len(LABELS):
            predicted = _look_up(in_region, ops.argmax(y_pred, axis=-1))
        else:
            predicted = ops.cast(y_pred[..., channel] > 0.5, "float32")
        voxels = tuple(range(1, len(truth.shape)))
        overlap = ops.sum(truth * predicted, axis=voxels)
        size = ops.sum(truth, axis=voxels) + ops.sum(predicted, axis=voxels)
        dice = ops.where(size > 0, 2 * overlap / ops.maximum(size, 1.0), 1.0)  # (B,)
        super().update_state(dice, sample_weight=sample_weight)

    def get_config(self):
        """Return what is needed to recreate the metric from a saved model."""
        return {**super().get_config(), "region": self.region}


class FiniteCheck(keras.callbacks.Callback):
    """Stop if the loss or a weight is NaN or infinite, before anything is saved."""

    def on_epoch_end(self, epoch, logs=None):
        """Raise FloatingPointError if the loss or a weight is not finite."""
        finite = all(bool(ops.all(ops.isfinite(w))) for w in self.model.weights)
        if not (finite and np.isfinite(logs["loss"])):
            problem = f"epoch {epoch + 1}: the loss or a weight is NaN or infinite"
            advice = "Lower the learning rate, or look for a bad scan with check_cases"
            raise FloatingPointError(f"{problem}; the previous epoch is kept. {advice}")


class _DeeplySupervised(keras.Model):
    """A U-Net with additional outputs, each at a lower resolution and half the weight.

    `factors` holds the downsampling factor of each output: how many voxels of the
    labels correspond to one voxel of the output along each axis.
    """

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        """Return the weighted mean loss in training, else that of the first output."""
        total = 0.0
        for level, factor in enumerate(self.factors if training else (1,)):
            # Nearest-neighbour downsampling of the labels, along the spatial axes.
            every = [slice(factor // 2, None, factor)] * (len(y.shape) - 2)
            maps = y[(slice(None), *every)], y_pred[level]
            total += super().compute_loss(x, *maps, sample_weight, training) / 2**level
        return total / (2 - 0.5**level)  # the sum of the weights 1, 1/2, 1/4, ...

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Return the metrics of the first output, which has full resolution."""
        return super().compute_metrics(x, y, y_pred[0], sample_weight)


def supervise_deeply(model, levels):
    """Add outputs at lower resolutions to the decoder of a U-Net, for training.

    Parameters
    ----------
    model : keras.Model
        From `unet`, or a copy that was loaded from a file.
    levels : int
        Number of outputs to add, each at half the resolution of the one before.

    Returns
    -------
    supervised : keras.Model
        Shares the layers and weights of `model` and trains on the same labels. Its
        first output is that of `model`.

    Raises
    ------
    ValueError
        If the decoder does not have that many stages below full resolution.

    References
    ----------
    Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.
    """
    check_model(model)
    names = {layer.name for layer in model.layers}
    stages = [n for n in range(1, 10) if f"decoder{n}_act2" in names]
    features = {n: model.get_layer(f"decoder{n}_act2").output for n in stages}
    full, *sizes = grid_sizes(model, [model.inputs[0], *features.values()])
    factors = {n: full // size for n, size in zip(stages, sizes, strict=True)}
    stages = [n for n in stages if factors[n] > 1]  # the others have full resolution
    fits = is_whole(levels, 1) and levels <= len(stages)
    possible = f"1 to {len(stages)}" if stages else "no deep supervision"
    expected = f"{possible}: {model.name}'s decoder has {len(stages)} coarser stages"
    check_option("levels (deep_supervision)", levels, lambda _: fits, expected)
    stages, n_classes = stages[:levels], model.output_shape[-1]
    heads = [output_head(features[n], n_classes, f"head{n}") for n in stages]
    outputs = [model.outputs[0], *heads]
    name = f"{model.name}_supervised"
    deep = _DeeplySupervised(model.inputs[0], outputs, name=name)
    deep.factors = (1, *(factors[n] for n in stages))
    return deep


def build_losses(model):
    """Build the losses and metrics of a compiled model.

    Keras has no public API for this. On JAX and torch, `fit` would build them with a
    batch from the generator, and then load the same batch again to train on.

    Parameters
    ----------
    model : keras.Model
        With deep supervision, its `factors` give the downsampling of each output.
    """
    factors = getattr(model, "factors", (1,))
    _, *grid, n_outputs = model.outputs[0].shape
    shapes = [(1, *[8 * factors[-1] // f] * len(grid)) for f in factors]
    outputs = [np.full((*shape, n_outputs), 0.5, np.float32) for shape in shapes]
    labels = np.zeros((*shapes[0], 1), np.uint8)
    outputs = outputs if len(factors) > 1 else outputs[0]
    model.compute_loss(None, labels, outputs)
    model.compute_metrics(None, labels, outputs)


def _check_can_be_loaded(model):
    """Raise unless Keras can rebuild the model from its config, as loading does."""
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    # Rebuilding draws initializer seeds from `random`, which must not affect training.
    random_state = random.getstate()
    try:
        keras.saving.deserialize_keras_object(config, safe_mode=True)
    except Exception as error:  # whatever a layer's own code raises
        reason = str(error).split("Exception encountered:")[-1].strip()[:300]
        problem = f"model could be trained, but not be loaded again: {reason}"
        advice = "use Keras's layers, or register yours with keras.saving"
        raise ValueError(f"{problem}; {advice}") from None
    finally:
        random.setstate(random_state)


def _check_probabilities(model):
    """Raise unless a model returns probabilities on the grid of its input."""
    size = size_factor(model) * max(2, 32 // size_factor(model))  # for open sizes
    *grid, channels = model.input_shape[1:]
    shape = (1, *(n or size for n in grid), channels)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    try:
        y = ops.convert_to_numpy(model(x))
    except Exception as error:  # whatever a layer raises
        problem = f"the model fails on an image of shape {shape}: {str(error)[:200]}"
        raise ValueError(problem) from None
    # Labels exclude each other; nested regions do not.
    is_softmax = np.abs(y.sum(-1) - 1).max() < 0.01
    fits = y.shape[:-1] == x.shape[:-1] and is_softmax == (y.shape[-1] == len(LABELS))
    if not fits or y.min() < 0 or y.max() > 1.01:
        found = f"{y.shape}, values from {y.min():.2g} to {y.max():.2g}"
        last = "softmax" if y.shape[-1] == len(LABELS) else "sigmoid"
        expected = f"probabilities on the same grid: end it with a {last}"
        raise ValueError(f"the model maps {shape} to {found}; expected {expected}")


def check_loss(loss, model):
    """Raise unless a model returns probabilities and its loss favours the truth.

    Parameters
    ----------
    loss : function, keras.losses.Loss or str
        Any loss that Keras accepts.
    model : keras.Model
        With four outputs for labels or three for regions.

    Raises
    ------
    ValueError
        If the loss fails or is higher for the truth than for a wrong map (as losses are
        that do not know that labels are coded 0 to 3), or the model does not fit or
        cannot be loaded again.
    """
    check_model(model)
    outputs = model.output_shape[-1]
    check_option("the model's outputs", outputs, (3, 4).__contains__, "3 or 4")
    _check_can_be_loaded(model)
    _check_probabilities(model)
    function = keras.losses.get(loss)
    # Labels in slabs, not at random: some losses penalise ragged borders.
    labels = np.indices((8, 8, 8))[:1] // 2  # (1, 8, 8, 8): 0, 0, 1, 1, 2, 2, 3, 3
    truth = ops.convert_to_tensor(labels[..., None], "float32")  # as `fit` passes it
    perfect = _look_up(np.eye(4) if outputs == 4 else IN_REGION, labels)
    all_enhancing = ops.where(labels[..., None] > 0, perfect[:, -1:, -1:, -1:], perfect)
    maps = perfect, 1 - perfect, 0 * perfect, all_enhancing
    try:
        right, *others = [float(ops.mean(function(truth, p))) for p in maps]
    except Exception as error:  # whatever Keras and its backends raise for other shapes
        found = f"which fails: {str(error)[:100]}"
    else:
        # Not `<=`: a loss of NaN passes here, and `FiniteCheck` reports it in training.
        if not any(right > other + 1e-6 for other in others):
            return
        opposite, empty, enhancing = others
        found = f"which is {right:.3g} for the truth, {opposite:.3g} for its opposite, "
        found += f"{empty:.3g} for an empty map, {enhancing:.3g} if all is enhancing"
    expected = f"a loss of labels (B, ..., 1) and probabilities (B, ..., {outputs})"
    raise ValueError(f"loss is {loss!r}, {found}; expected {expected}")


@contextlib.contextmanager
def averaged_weights(model, start=(), share=0.0):
    """Switch to the weights to validate and save, for the length of a `with` block.

    Parameters
    ----------
    model : keras.Model
        Compiled. If its optimizer keeps a moving average of the weights, this is used.
    start : iterable of (keras.Variable, array)
        Weights to average with their values before training.
    share : float
        Share of these first values in the average.
    """
    trained = model.get_weights()
    # In mixed precision, Keras wraps the optimizer, to scale the loss.
    if getattr(model.optimizer, "inner_optimizer", model.optimizer).use_ema:
        model.optimizer.finalize_variable_values(model.trainable_variables)
        # Copy them: in validation, JAX donates the model's arrays, which would be the
        # optimizer's own.
        model.set_weights(model.get_weights())
    for variable, initial in start:
        variable.assign((1 - share) * variable + share * initial)
    # No `finally`: after a failure in validation `Run.resume` restores the weights, and
    # this generator, closed later, must not overwrite them.
    yield
    model.set_weights(trained)


def describe_model(model):
    """Return a model's configuration with layer numbers instead of layer names.

    Keras numbers default names per session, so equal models can differ in names.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    config : dict
        Can be stored as JSON.
    """
    numbers = {}  # {layer name: number}, in the order in which the config uses them

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(each) for k, each in value.items() if k != "name"}
        if not isinstance(value, list):
            return value
        if [type(each) for each in value] == [str, int, int]:  # layer, node, tensor
            return [numbers.setdefault(value[0], len(numbers)), *value[1:]]
        return [strip(each) for each in value]

    return strip(json.loads(json.dumps(model.get_config(), default=str)))


def describe(description):
    """Return a run's description as JSON stores it, see `describe_object`.

    Parameters
    ----------
    description : dict

    Returns
    -------
    description : dict
        Made up of text, numbers, lists and dicts.

    Raises
    ------
    ValueError
        If a loss or another object has an attribute that cannot be described.
    """
    described = {}
    for key, value in description.items():
        try:
            described[key] = json.loads(json.dumps(value, default=describe_object))
        except (NotImplementedError, RecursionError, TypeError, ValueError) as error:
            problem = f"{key} is {value!r:.300}, expected attributes that JSON can hold"
            raise ValueError(f"{problem}: {error}") from None
    return described


def _captured_values(function):
    """Return a function's default arguments and the variables of its closure.

    A function among them is listed by name, and what it captures is listed as well.
    What JSON cannot store is left out.
    """
    captured, functions = [], [function]
    for each in functions:  # the loop below appends to this list
        values = [*(getattr(each, "__defaults__", None) or ())]
        values += (getattr(each, "__kwdefaults__", None) or {}).values()
        for cell in getattr(each, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # the cell is empty
                values.append(cell.cell_contents)
        for value in values:
            if isinstance(value, types.FunctionType):
                if value not in functions:
                    functions.append(value)
                    captured.append(f"{value.__module__}.{value.__qualname__}")
            elif not isinstance(value, types.ModuleType | type):
                errors = NotImplementedError, RecursionError, TypeError, ValueError
                with contextlib.suppress(*errors):
                    json.dumps(value, default=describe_object)
                    captured.append(value)
    return captured


def describe_object(value):
    """Return what identifies a loss or another object, as `default` for `json.dumps`.

    A function is described by its name, an object by its class, its `get_config` and
    its attributes, including private ones. Code is not compared; for code outside Keras
    and this package, a warning says so. `json.dumps` calls this function again for
    anything in the result that it cannot store.

    Parameters
    ----------
    value : object

    Returns
    -------
    description : str, list or dict
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.size <= 100 or array.dtype.hasobject:
            return array.tolist()
        digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        return [str(array.dtype), array.shape, digest]  # as text, it could be gigabytes
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if isinstance(value, set | frozenset | range):
        return [type(value).__name__, *sorted(map(repr, value))]
    state, pickled = getattr(value, "__dict__", None), object.__getstate__(value)
    if isinstance(pickled, tuple):  # (attributes, slots), if its class has slots
        state = {**(state or {}), **pickled[1]}
    name = getattr(value, "__qualname__", None)  # of a function or class
    path = f"{getattr(value, '__module__', '')}.{name or type(value).__qualname__}"
    ours = path.startswith(("keras.", "brats_utils."))
    captured = [] if ours else _captured_values(value)
    if state is None or (name and not ours):
        text = f"{path}: a change in its code is not noticed when a run is resumed"
        warnings.warn(text, stacklevel=2)
    if name or state is None:
        return [path, *captured] if captured else path
    config = value.get_config() if hasattr(value, "get_config") else {}
    config.pop("name", None)  # Keras numbers it
    if isinstance(value, keras.losses.Loss):
        inherited = vars(keras.losses.Loss())
        state = {key: each for key, each in state.items() if key not in inherited}
    elif config:  # a layer or a model: its state is Keras's own
        state = {}
    return {"class": type(value), **config, **state}

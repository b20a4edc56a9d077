"""U-Nets in 2D and 3D, what each of their stages costs, and saved models."""

import contextlib
import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import layers

from brats_utils import files
from brats_utils.generator import CHANNELS, SEEN
from brats_utils.volumes import NORMALISATION

DESCRIPTION = "brats.json"  # in a model's file
# Times the size of a .keras file. Keras hardly compresses, so a file that unpacks to
# more is probably a "zip bomb".
MOST_UNPACKED = 10
BEST = "best.keras"  # in the folder of a run
NO_START = "Choose what fits, or no start (notebook 04: BRATS_START=none)"
PHANTOM_WEIGHTS = Path(__file__).with_name("phantom") / "weights.npz"
IMAGE_KERNELS = ("encoder1_conv1/kernel", "full_image/kernel")  # of `unet`
# Tuned on real scans, where a network trained only on phantoms misses much tumour.
PHANTOM_DECODING = {"thresholds": [0.3, 0.2, 0.3], "min_island": 0.5}
# Everything that depends on the spatial rank: 2 for slices, 3 for volumes.
CONV = {2: layers.Conv2D, 3: layers.Conv3D}
POOL = {2: layers.MaxPooling2D, 3: layers.MaxPooling3D}
REPEAT = {2: layers.UpSampling2D, 3: layers.UpSampling3D}
UPSAMPLE = {2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}

KERNEL = {"kernel_size": 3, "padding": "same", "kernel_initializer": "he_normal"}
# Instance normalisation: as many groups as channels, so that each channel of each
# sample is normalised separately, whatever the batch size.
INSTANCE = {"groups": -1, "epsilon": 1e-5}


def _among(possible, expected):
    """Return `fits` and `expected` of `check_option` for a few whole numbers."""
    return (lambda n: files.is_whole(n) and n in possible), expected


def _check_sizes(sizes, factor):
    """Raise unless all spatial sizes are multiples of `factor` or None."""
    if any((size or 0) % factor for size in sizes):
        problem = f"spatial sizes must be multiples of {factor}, got {sizes}"
        raise ValueError(f"input_shape: {problem}")


def _check_input(input_shape, n_classes, factor):
    """Validate the arguments and return the spatial rank, 2 or 3."""

    def is_shape(shape):
        sizes = [size is None or files.is_whole(size, 1) for size in shape[:-1]]
        return len(shape) in (3, 4) and all(sizes) and files.is_whole(shape[-1], 1)

    expected = "(X, Y, C) or (X, Y, Z, C); sizes may be None, but not the channels C"
    files.check_option("input_shape", input_shape, is_shape, expected)
    classes = "4 (labels) or 3 (regions WT, TC, ET)"
    files.check_option("n_classes", n_classes, *_among((3, 4), classes))
    _check_sizes(input_shape[:-1], factor)
    return len(input_shape) - 1


def _conv_block(x, widths, name, *, strides=(1, 1), slope=0.01, dropout=0.0, norm=None):
    """Apply [convolution -> normalisation -> leaky ReLU] twice."""
    for i, (filters, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        x = CONV[len(x.shape) - 2](
            filters, strides=stride, use_bias=not norm, name=f"{name}_conv{i}", **KERNEL
        )(x)
        if norm:
            x = layers.GroupNormalization(**norm, name=f"{name}_norm{i}")(x)
        x = layers.LeakyReLU(slope, name=f"{name}_act{i}")(x)
        if dropout and i == 1:
            x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return x


def _encode_and_decode(image, widths, *, stride=1, up_ratio=1, up_bias=True, **block):
    """Apply all stages of a U-Net, down and up again, and return the features.

    `widths` holds the channels of the two convolutions of each encoder stage, with the
    bottleneck last. A decoder stage has the channels that the encoder stage ends with.
    """
    pool, upsample = POOL[len(image.shape) - 2], UPSAMPLE[len(image.shape) - 2]
    x = _conv_block(image, widths[0], "encoder1", strides=(stride, 1), **block)
    skips = []  # (B, X, Y, Z, 16), (B, X/2, Y/2, Z/2, 32), ...
    for stage, pair in enumerate(widths[1:], start=2):
        skips.append(x)
        name = f"encoder{stage}" if stage < len(widths) else "bottleneck"
        x = pool(2, name=f"{name}_down")(x)
        x = _conv_block(x, pair, name, **block)
    for stage in range(len(skips), 0, -1):
        name, width = f"decoder{stage}", widths[stage - 1][1]
        options = {"strides": 2, "use_bias": up_bias, "name": f"{name}_up"}
        x = upsample(width * up_ratio, 2, **options)(x)
        x = layers.Concatenate(name=f"{name}_concat")([skips.pop(), x])
        x = _conv_block(x, (width, width), name, **block)
    return x


def _to_full_resolution(x, image, filters):
    """Restore the resolution that a strided first convolution halved.

    This equals a 1x1x1 convolution of the upsampled features and the image together, at
    full resolution. The features contribute the same to each block of 8 voxels, so
    their part is computed once, before upsampling.
    """
    rank = len(x.shape) - 2
    x = CONV[rank](filters, 1, name="full_conv")(x)
    x = REPEAT[rank](2, name="full_up")(x)
    image = CONV[rank](filters, 1, use_bias=False, name="full_image")(image)
    x = layers.Add(name="full_add")([x, image])
    return layers.LeakyReLU(0.01, name="full_act")(x)


def output_head(x, n_classes, name="head"):
    """Apply the last convolution and return probabilities, always in float32.

    Parameters
    ----------
    x : tensor (B, ..., C)
        The features.
    n_classes : {4, 3}
        4: softmax. 3: sigmoids.
    name : str
        Prefix of the layers' names.

    Returns
    -------
    probabilities : float32 tensor (B, ..., n_classes)
    """
    x = CONV[len(x.shape) - 2](n_classes, 1, name=f"{name}_conv")(x)
    kind = "softmax" if n_classes == 4 else "sigmoid"
    return layers.Activation(kind, dtype="float32", name=f"{name}_probabilities")(x)


def unet(
    input_shape,
    *,
    n_classes=4,
    filters=16,
    depth=5,
    stem_stride=1,
    normalisation=True,
    dropout=0.0,
):
    """Return a U-Net, in 2D or 3D depending on the length of `input_shape`.

    Each encoder stage applies two convolutions and halves the resolution. Each decoder
    stage doubles it, appends the encoder's features of the same resolution and applies
    two convolutions.

    Parameters
    ----------
    input_shape : tuple
        (X, Y, C) for slices or (X, Y, Z, C) for volumes. Spatial sizes are multiples
        of `stem_stride * 2 ** (depth - 1)`, or None to accept any such size.
    n_classes : {4, 3}, default 4
        4: softmax probabilities of the labels 0..3. 3: a sigmoid for each of the
        nested regions WT, TC and ET.
    filters : int, default 16
        Channels of the first stage. Each further stage has twice as many.
    depth : int, default 5
        Number of stages, including the bottleneck.
    stem_stride : {1, 2}, default 1
        2 halves the resolution in the first layer, which saves 7/8 of the work of a 3D
        network. The last layers restore it.
    normalisation : bool, default True
        Use instance normalisation. The bottleneck then needs more than one voxel,
        because a single voxel minus its own mean is 0: use patches at least twice as
        large as the multiple above.
    dropout : float, default 0.0
        Fraction of values dropped between the two convolutions of a stage.

    Returns
    -------
    model : keras.Model
        (B, X, Y, Z, C) float -> (B, X, Y, Z, n_classes) float32. It consists of
        built-in layers only, so it can be loaded without custom objects.

    Raises
    ------
    ValueError
        If `input_shape` does not fit or another argument is out of range.

    References
    ----------
    Ronneberger et al., 2015, arXiv:1505.04597. Instance normalisation and leaky ReLU
    follow nnU-Net: Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.

    Examples
    --------
    >>> unet((8, 8, 3), depth=2).output_shape, unet((8, 8, 8, 3), depth=2).output_shape
    ((None, 8, 8, 4), (None, 8, 8, 8, 4))
    """
    files.check_option("filters", filters, *files.whole(1))
    files.check_option("depth", depth, *_among(range(1, 10), "1 to 9"))
    files.check_option("stem_stride", stem_stride, *_among((1, 2), "1 or 2"))
    files.check_option("normalisation", normalisation, *files.BOOL)
    files.check_option("dropout", dropout, *files.number(0, 0.999))
    rank = _check_input(input_shape, n_classes, stem_stride * 2 ** (depth - 1))
    image = keras.Input(input_shape, name="image")  # (B, X, Y, Z, C)
    widths = [(filters * 2**stage,) * 2 for stage in range(depth)]  # 16, 32, 64, ...
    block = {"norm": INSTANCE if normalisation else None, "dropout": dropout}
    x = _encode_and_decode(image, widths, stride=stem_stride, **block)
    if stem_stride == 2:
        x = _to_full_resolution(x, image, filters)
    return keras.Model(image, output_head(x, n_classes), name=f"unet_{rank}d")


def unet_cicek2016(input_shape, *, n_classes=4):
    """Return the 3D U-Net of Çiçek et al., 2016, the first one published.

    It has three stages down and up and doubles the channels before each pooling rather
    than after it. With three channels in and three out it has 19,069,955 parameters, as
    stated in the paper.

    Parameters
    ----------
    input_shape : tuple
        (X, Y, Z, C), spatial sizes multiples of 8 or None.
    n_classes : {4, 3}, default 4
        4: softmax over the labels 0..3. 3: a sigmoid for each of WT, TC and ET.

    Returns
    -------
    model : keras.Model
        (B, X, Y, Z, C) float -> (B, X, Y, Z, n_classes) float32.

    Raises
    ------
    ValueError
        If `input_shape` does not fit, or `n_classes` is neither 4 nor 3.

    Notes
    -----
    Two details differ from the paper. Convolutions are zero-padded, so that the output
    has the size of the patch; in the paper they lose a voxel at each face. The paper
    uses batch normalisation with a batch of one and the current statistics at test
    time, which is instance normalisation. Here it has an offset but no scale, which
    agrees with the published number of parameters.

    References
    ----------
    Çiçek et al., 2016, 3D U-Net: Learning Dense Volumetric Segmentation from Sparse
    Annotation, arXiv:1606.06650.
    """
    if _check_input(input_shape, n_classes, factor=8) != 3:
        raise ValueError(f"expected input_shape (X, Y, Z, C), got {input_shape}")
    image = keras.Input(input_shape, name="image")
    widths = [(32, 64), (64, 128), (128, 256), (256, 512)]
    block = {"norm": {"groups": -1, "scale": False}, "slope": 0.0}
    x = _encode_and_decode(image, widths, up_ratio=2, up_bias=False, **block)
    return keras.Model(image, output_head(x, n_classes), name="unet_cicek2016")


def check_model(model):
    """Raise unless a model is functional and has a single input.

    Parameters
    ----------
    model : keras.Model

    Raises
    ------
    ValueError
        If it is not.
    """
    single = "a functional keras.Model with one input"
    files.check_option("model", model, lambda m: len(m.inputs) == 1, single)


def _output_shapes(model, tensors, shape):
    """Return the shapes of a model's tensors for one sample of a given shape."""
    return keras.Function(model.inputs[0], tensors).compute_output_shape((1, *shape))


def grid_sizes(model, tensors):
    """Return the number of voxels of each tensor along its shortest spatial axis.

    If sizes of the input may vary, only these axes count, with 2**10 voxels: no U-Net
    halves its resolution ten times. A tensor without the input's axes, as in channel
    attention, counts as one voxel.

    Parameters
    ----------
    model : keras.Model
    tensors : list of tensor
        Tensors of this model.

    Returns
    -------
    sizes : list of int
    """
    full = model.input_shape
    axes = [i for i, n in enumerate(full) if i and n is None] or range(1, len(full) - 1)
    shapes = _output_shapes(model, tensors, [n or 2**10 for n in full[1:]])
    return [min((s[i] for i in axes if len(s) == len(full)), default=1) for s in shapes]


def size_factor(model):
    """Return the number that a model's spatial input sizes must be multiples of.

    Parameters
    ----------
    model : keras.Model
        A functional U-Net, not necessarily from `unet`.

    Returns
    -------
    factor : int
        The size of the input divided by that of the model's coarsest feature map.

    Examples
    --------
    >>> size_factor(unet((None, None, None, 3), depth=4, stem_stride=2))
    16
    """
    tensors = [x.input for x in model.layers if not isinstance(x, keras.Model)]
    full, *sizes = grid_sizes(model, keras.tree.flatten([model.inputs, tensors]))
    # With open sizes, a single voxel is not a grid but the output of global pooling, as
    # in squeeze-and-excitation blocks.
    smallest = 2 if None in model.input_shape[1:] else 1
    return full // min((size for size in sizes if size >= smallest), default=full)


def _gflop(layer, output_shape):
    """Return the GFLOP of a layer's forward pass; only kernels are counted."""
    if not hasattr(layer, "kernel"):
        return 0.0
    voxels = math.prod(output_shape[1:-1])
    if isinstance(layer, tuple(UPSAMPLE.values())):
        voxels /= math.prod(layer.strides)  # its kernel is applied per input voxel
    return 2 * voxels * math.prod(layer.kernel.shape) / 1e9


def model_table(model, input_shape=None):
    """Return the output shape, parameters, operations and memory of each stage.

    Parameters
    ----------
    model : keras.Model
        Functional, with layers named `<stage>_<what>`.
    input_shape : tuple, optional
        The patch (X, Y, Z, C) to count for. Required if the model has sizes of None.

    Returns
    -------
    table : pandas.DataFrame
        One row per stage, in order of computation, and a last row "total". Columns:
        "output" (shape without the batch), "parameters", "GFLOP" (forward pass of one
        sample, two operations per multiply-add, convolutions only) and "activations_mb"
        (outputs of all layers for one sample in float32, in 10⁶ bytes, which is about
        what training keeps in memory).

    Raises
    ------
    ValueError
        If a size is given neither by the model nor by `input_shape`, or does not fit.
    """
    check_model(model)
    own = model.input_shape[1:]
    shape = own if input_shape is None else input_shape

    def fits(shape):
        same_rank = len(shape) == len(own) and shape[-1] == own[-1]
        return same_rank and all(files.is_whole(n, 1) for n in shape)

    expected = f"sizes for the model's {own}; if it has None, pass input_shape"
    files.check_option("input_shape", shape, fits, expected)
    shape = tuple(shape)
    sizes = tuple(n for n, size in zip(shape, own, strict=True) if n != size)
    _check_sizes(sizes, size_factor(model))
    if None not in own and shape != own:
        model = keras.models.clone_model(model, keras.Input(shape))
    parts = [x for x in model.layers if not isinstance(x, layers.InputLayer)]
    shapes = _output_shapes(model, [layer.output for layer in parts], shape)
    stages = pd.Index([layer.name.split("_")[0] for layer in parts], name="stage")
    table = pd.DataFrame({"output": [output[1:] for output in shapes]}, stages)
    table["parameters"] = [layer.count_params() for layer in parts]
    table["GFLOP"] = list(map(_gflop, parts, shapes))
    table["activations_mb"] = [4 * math.prod(output) / 1e6 for output in shapes]
    sums = dict.fromkeys(table.columns[1:], "sum")
    table = table.groupby("stage", sort=False).agg({"output": "last", **sums})
    table.loc["total"] = [table["output"].iloc[-1], *table[list(sums)].sum()]
    return table.astype({"parameters": int})


def _in_float32(layer):
    """Return a layer like this one that computes in float32."""
    return type(layer).from_config({**layer.get_config(), "dtype": "float32"})


def write_model(model, path, description):
    """Write architecture, weights and description to a file that Keras can load.

    Parameters
    ----------
    model : keras.Model
        Functional. Only its first output is saved, without loss or optimizer. Mixed
        precision is saved as float32, because pooling in float16 fails on a CPU.
    path : path
        Must end in `.keras`; the temporary path of an atomic write.
    description : dict
        Stored in the archive as `brats.json`, with Keras's version and backend.
    """
    made_by = {"keras": keras.__version__, "backend": keras.backend.backend()}
    saved = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if any(layer.compute_dtype != "float32" for layer in saved.layers):
        weights = saved.get_weights()
        saved = keras.models.clone_model(saved, None, _in_float32, recursive=True)
        saved.set_weights(weights)
    saved.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(DESCRIPTION, json.dumps(description | made_by, indent=1))


def _read_phantom_weights(modalities):
    """Return the network that was trained on phantoms, and its description.

    Kernels of optional modalities that `modalities` lacks are left out: the result is
    that of a channel of zeros, which the network has seen in training.
    """
    weights, record = files.read_arrays(PHANTOM_WEIGHTS)
    description = {**record["description"], "decoding": {**PHANTOM_DECODING}}
    stored = description["modalities"]
    needed = {*stored}.difference(description.get("optional", ()))
    names = [*map(str, modalities)] if isinstance(modalities, (list, tuple)) else []
    if not needed <= {*names} <= {*stored} or len(names) != len({*names}):
        names = stored  # what does not fit is refused where the data are known
    model = unet((None, None, None, len(names)), **record["network"])
    for variable, half in zip(model.weights, weights, strict=True):
        if variable.path in IMAGE_KERNELS:
            half = half[..., [stored.index(name) for name in names], :]
        variable.assign(half.astype(np.float32))
    CHANNELS[model] = names
    return model, {**description, "modalities": names}


def find_model(name, path):
    """Return the path of a model file.

    Parameters
    ----------
    name : str
        Name of the argument, for the error message.
    path : path
        A `.keras` file; the folder of a run, whose `best.keras` is used; or "phantom",
        the network that comes with this package.

    Returns
    -------
    path : Path

    Raises
    ------
    ValueError
        If it is not a path.
    """
    path = PHANTOM_WEIGHTS if path == "phantom" else files.check_path(name, path)
    return path / BEST if path.is_dir() else path


def read_model(path, modalities=None):
    """Read a saved model without executing any code that the file may contain.

    Parameters
    ----------
    path : Path
        A `.keras` file, or `PHANTOM_WEIGHTS`.
    modalities : sequence of str, optional
        The channels of `PHANTOM_WEIGHTS`, in any order. Those that its description
        calls "optional" may be missing. By default, and if they do not fit, all.

    Returns
    -------
    model : keras.Model
        Not compiled.
    description : dict
        As stored by `write_model`; empty if the file has none.

    Raises
    ------
    ValueError
        If the file is missing, damaged, an HDF5 file or an HTML page, contains code
        (Lambda layers), or does not fit its own description.
    """
    if path == PHANTOM_WEIGHTS:
        return _read_phantom_weights(modalities)
    if path.suffix.lower() in (".h5", ".hdf5"):
        advice = "keras.models.load_model(path).save('model.keras') will convert it"
        problem = f"{path}: HDF5 models may contain code and are refused"
        raise ValueError(f"{problem}. If you trust it, {advice}")
    if not path.is_file():
        raise ValueError(f"no model found at {path}; train one first (notebook 04)")
    if not zipfile.is_zipfile(path):
        is_page = path.read_bytes()[:1] == b"<"
        found = "an HTML page, not a model" if is_page else "damaged or no Keras model"
        raise ValueError(f"{path} is {found}; save it again as a .keras file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > MOST_UNPACKED * path.stat().st_size:
                raise ValueError(f"it would unpack to {unpacked / 1e6:.0f} MB")
            named = DESCRIPTION in archive.namelist()
            description = dict(json.loads(archive.read(DESCRIPTION) if named else "{}"))
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras, HDF5 and zip raise for damaged files
        found = "damaged, contains code (Lambda layers) or is of another version"
        problem = f"{path} cannot be loaded: it is {found} than Keras"
        raise ValueError(f"{problem} {keras.__version__}: {error}") from None
    if named:
        check_description(model, description, path)
        SEEN[model] = {*map(str, description.get("train_images", ()))}
        CHANNELS[model] = description["modalities"]
    return model, description


def _unet_options(model):
    """Return the options that a U-Net was made with, inferred from its layers."""
    options, kinds = {"channels": model.input_shape[-1]}, tuple(CONV.values())
    stem = next((layer for layer in model.layers if isinstance(layer, kinds)), None)
    if stem:
        # Each stage but the first halves the resolution: the factor is 2^(depth - 1).
        depth = (size_factor(model) // stem.strides[0]).bit_length()
        options |= {"filters": stem.kernel.shape[-1], "depth": depth}
        options["stem_stride"] = stem.strides[0]
    return options


def start_from(start, model, train_data, val_data):
    """Copy the weights of another model, to start training from.

    If their outputs differ (labels or regions), the last layer is not copied.

    Parameters
    ----------
    start : path, "phantom" or None
        A `.keras` file, the folder of a run, or the weights of this package: a U-Net
        with the same channels, filters, depth and stride (of "phantom", the kernels of
        T1 are left out if the data have none). None changes nothing.
    model : keras.Model
        Its weights are replaced.
    train_data, val_data : BratsGenerator
        Data for training and validation.

    Returns
    -------
    sha256 : str or None
        Checksum of the file that was read.
    copied : list of (keras.Variable, array)
        The replaced weights, and their new values.

    Raises
    ------
    ValueError
        If `start` does not fit, or was trained on cases of `val_data`.
    """
    if start is None:
        return None, ()
    path = find_model("start", start)
    modalities = train_data.modalities if path == PHANTOM_WEIGHTS else None
    source, description = read_model(path, modalities)
    if description and [*description["modalities"]] != [*train_data.modalities]:
        problem = f"start={start!r} takes {description['modalities']}, train_data has "
        raise ValueError(f"{problem}{train_data.modalities}. {NO_START}")
    images, case_ids = SEEN.get(source, set()), description.get("train_cases", ())
    if known := val_data.known_cases(images, map(str, case_ids)):
        problem = f"start={start!r} was trained on {len(known)} cases of val_data"
        raise ValueError(f"{problem}: {known[:5]}; validate on other cases. {NO_START}")
    theirs, ours = _unet_options(source), _unet_options(model)
    options = [(k, theirs.get(k), ours.get(k)) for k in {**theirs, **ours}]
    differ = [f"{name} {a}, not {b}" for name, a, b in options if a != b]
    weighted = [[x for x in each.layers if x.weights] for each in (source, model)]
    # Without the last layer, whose shapes depend on the number of outputs.
    shapes = [[[w.shape for w in x.weights] for x in each[:-1]] for each in weighted]
    if differ or shapes[0] != shapes[1]:
        found = "; ".join(differ) or "other layers"
        problem = f"start={start!r} does not fit the model: it has {found}"
        raise ValueError(f"{problem}. {NO_START}")
    copied = []
    for old, new in zip(*weighted, strict=True):
        if [w.shape for w in old.weights] == [w.shape for w in new.weights]:
            new.set_weights(old.get_weights())
            copied += zip(new.weights, old.get_weights(), strict=True)
    SEEN.setdefault(model, set()).update(images)
    return files.describe_file(path)["sha256"], copied


def check_description(model, description, path):
    """Raise if a model does not fit the description in its file.

    Parameters
    ----------
    model : keras.Model
    description : dict
        As stored by `write_model`.
    path : Path
        The file, for the error message.

    Raises
    ------
    ValueError
        If they differ.
    """
    n_outputs = {"labels 0..3": 4, "WT, TC, ET": 3}.get(str(description.get("outputs")))
    modalities, version = description.get("modalities"), str(description.get("keras"))
    n_inputs = len(modalities) if isinstance(modalities, list) else 0
    major, our_major = (v.split(".")[0] for v in (version, keras.__version__))
    lists = "optional", "train_cases", "train_images"
    expected = {  # what the description says, and what is found
        "channels in": (n_inputs, model.input_shape[-1]),
        "channels out": (n_outputs, model.output_shape[-1]),
        "normalisation": (description.get("normalisation"), NORMALISATION),
        "orientation": (description.get("orientation"), "LPS"),
        "decoding": (type(description.get("decoding", {})), dict),
        **{k: (type(description.get(k, [])), list) for k in lists},
        f"Keras (install keras=={version})": (major, our_major),
    }
    differ = [f"{k}: {a}, found {b}" for k, (a, b) in expected.items() if a != b]
    if differ:
        raise ValueError(f"{path} does not fit its description: {'; '.join(differ)}")
    if version != keras.__version__:
        text = f"{path} was made by Keras {version}; this is {keras.__version__}"
        warnings.warn(text, stacklevel=3)


def has_gpu():
    """Return whether Keras's backend sees a GPU.

    Returns
    -------
    gpu : bool
        False on the torch backend, whose devices Keras does not list.
    """
    try:
        return bool(keras.distribution.list_devices("gpu"))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False


@contextlib.contextmanager
def advice_on_memory(model, data):
    """Turn any backend's out-of-memory error into one plain MemoryError.

    Parameters
    ----------
    model : keras.Model
    data : BratsGenerator
        Provides the training batches.
    """
    try:
        # Keras may not know all shapes, and a layer may have several outputs.
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            # A step keeps at least half of the layers' outputs in memory.
            megabytes = model_table(model, data.input_shape)["activations_mb"]["total"]
            needed, memory = megabytes * data.batch_size * 1e6 / 2, math.inf
            if not has_gpu() and hasattr(os, "sysconf"):  # Windows has no sysconf
                memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if needed > memory:
                # Caught below, like an error of the backend in the `with` block.
                raise MemoryError(f"a step needs {needed:.1e} of {memory:.1e} bytes")
        yield
    except Exception as error:  # each backend has its own class
        if not re.search("(?i)resource_?exhausted|MemoryError", repr(error)):
            raise
        problem = f"out of memory with {data.batch_size} patches of {data.patch_shape}"
        advice = "Lower batch_size to 1, then patch_shape (96 or 64). The run is kept"
        raise MemoryError(f"{problem} ({str(error)[:200]}). {advice}") from error

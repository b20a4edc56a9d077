"""U-Nets in two and three dimensions, block by block, and a table of what they cost."""

import math

import keras
import pandas as pd
from keras import layers

# Below are the only lines that know the rank: 2 for slices, 3 for volumes.
CONV = {2: layers.Conv2D, 3: layers.Conv3D}
POOL = {2: layers.MaxPooling2D, 3: layers.MaxPooling3D}
REPEAT = {2: layers.UpSampling2D, 3: layers.UpSampling3D}
UPSAMPLE = {2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}


def _rank(input_shape, n_classes, factor, depth):
    """Return 2 or 3, after looking at what a caller may get wrong."""
    rank = len(input_shape) - 1
    if rank not in CONV or input_shape[-1] is None:
        raise ValueError(
            "input_shape is (X, Y, C) or (X, Y, Z, C); sizes may be None, the channels "
            f"C not; got {tuple(input_shape)}"
        )
    if n_classes not in (3, 4):
        raise ValueError(
            "n_classes is 4 (background and three labels: softmax) or 3 (the regions "
            f"WT, TC, ET: sigmoid), got {n_classes}"
        )
    if any(size is not None and size % factor for size in input_shape[:-1]):
        raise ValueError(
            f"with depth={depth} the grid is halved until it is 1/{factor} of the "
            f"input: each spatial size must be a multiple of {factor} or None, "
            f"got {tuple(input_shape[:-1])}"
        )
    return rank


def _conv_block(x, filters, name, *, normalisation=True, dropout=0.0, stride=1):
    """Convolve twice: [convolution -> instance normalisation -> leaky ReLU] x 2."""
    conv = CONV[len(x.shape) - 2]
    for i in (1, 2):
        x = conv(
            filters,
            3,
            strides=stride if i == 1 else 1,
            padding="same",
            use_bias=not normalisation,
            kernel_initializer="he_normal",
            name=f"{name}_conv{i}",
        )(x)
        if normalisation:
            # As many groups as channels: each sample and channel on its own, whatever
            # the batch size.
            x = layers.GroupNormalization(-1, epsilon=1e-5, name=f"{name}_norm{i}")(x)
        x = layers.LeakyReLU(0.01, name=f"{name}_act{i}")(x)
        if dropout and i == 1:
            x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return x


def _down(x, name):
    """Halve the grid: (B, X, Y, Z, C) -> (B, X/2, Y/2, Z/2, C)."""
    return POOL[len(x.shape) - 2](2, name=f"{name}_down")(x)


def _up(x, skip, filters, name):
    """Double the grid and put the encoder's features of that size beside it."""
    x = UPSAMPLE[len(x.shape) - 2](filters, 2, strides=2, name=f"{name}_up")(x)
    return layers.Concatenate(name=f"{name}_concat")([skip, x])


def _head(x, n_classes, name="head"):
    """Turn features into probabilities, in float32 whatever the precision policy."""
    x = CONV[len(x.shape) - 2](n_classes, 1, name=f"{name}_conv")(x)
    kind, name = "softmax" if n_classes == 4 else "sigmoid", f"{name}_probabilities"
    return layers.Activation(kind, dtype="float32", name=name)(x)


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
    """Return the standard U-Net: in 2-D or in 3-D, by the length of `input_shape`.

    Each encoder stage convolves twice and halves the grid; each decoder stage doubles
    it, sees the encoder's features of that size again, and convolves twice.

    Parameters
    ----------
    input_shape : tuple
        (X, Y, C) for slices or (X, Y, Z, C) for volumes. Spatial sizes are multiples
        of `stem_stride * 2 ** (depth - 1)`, or None for any such size.
    n_classes : {4, 3}, default 4
        4: probabilities of the labels 0..3, by softmax. 3: of the nested regions WT,
        TC and ET, each by its own sigmoid.
    filters : int, default 16
        Channels of the first stage; every further stage has twice as many.
    depth : int, default 5
        Number of stages, the bottleneck included: 16-32-64-128-256.
    stem_stride : {1, 2}, default 1
        2 halves the grid in the very first convolution and restores it in the last
        step: about an eighth of the operations, for a CPU.
    normalisation : bool, default True
        Normalise each channel of each sample after a convolution. The bottleneck then
        needs more than one voxel, or nothing is left of it: take patches of at least
        twice the size that the grid is divided by.
    dropout : float, default 0.0
        Share of values dropped between the two convolutions of a stage.

    Returns
    -------
    model : keras.Model
        (B, X, Y, Z, C) float -> (B, X, Y, Z, n_classes) float32. Made of Keras's own
        layers only, so that it reloads without custom objects.

    Raises
    ------
    ValueError
        If a shape does not fit, or `n_classes`, `depth` or `stem_stride` is none of
        the above.

    References
    ----------
    Ronneberger et al., 2015, arXiv:1505.04597. Instance normalisation and leaky ReLU
    as in nnU-Net: Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.

    Examples
    --------
    >>> unet((8, 8, 3), depth=2).output_shape, unet((8, 8, 8, 3), depth=2).output_shape
    ((None, 8, 8, 4), (None, 8, 8, 8, 4))
    """
    if depth < 1 or stem_stride not in (1, 2):
        raise ValueError(
            f"depth is at least 1 and stem_stride 1 or 2, got {depth} and {stem_stride}"
        )
    rank = _rank(input_shape, n_classes, stem_stride * 2 ** (depth - 1), depth)
    block = {"normalisation": normalisation, "dropout": dropout}
    inputs = keras.Input(input_shape, name="image")  # (B, X, Y, Z, C)
    x = _conv_block(inputs, filters, "encoder1", stride=stem_stride, **block)
    skips = []
    for stage in range(2, depth + 1):  # grid / 2 and channels * 2 a stage
        skips.append(x)
        name = f"encoder{stage}" if stage < depth else "bottleneck"
        x = _conv_block(_down(x, name), filters * 2 ** (stage - 1), name, **block)
    for stage in range(depth - 1, 0, -1):  # grid * 2 and channels / 2 a stage
        name, width = f"decoder{stage}", filters * 2 ** (stage - 1)
        x = _conv_block(_up(x, skips.pop(), width, name), width, name, **block)
    if stem_stride == 2:
        # A convolution 1x1x1 over features and image side by side, at full resolution:
        # what the image's values mean in a voxel depends on the features there. The
        # features' part of the sum is the same for 8 voxels, so it is made once.
        x = REPEAT[rank](2, name="full_up")(CONV[rank](filters, 1, name="full_conv")(x))
        image = CONV[rank](filters, 1, use_bias=False, name="full_image")(inputs)
        x = layers.Add(name="full_add")([x, image])
        x = layers.LeakyReLU(0.01, name="full_act")(x)
    return keras.Model(inputs, _head(x, n_classes), name=f"unet_{rank}d")


class _DeeplySupervised(keras.Model):
    """A U-Net with further outputs on coarser grids, each with half the weight."""

    factors = (1,)  # how many voxels of the labels one of each output measures

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """Return the outputs' mean loss in training, the finest's in validation."""
        total, factors = 0.0, self.factors if training else (1,)
        for level, factor in enumerate(factors):
            middle = slice(factor // 2, None, factor)
            labels = y[(slice(None), *[middle] * (len(y.shape) - 2))]
            loss = super().compute_loss(
                x, labels, y_pred[level], sample_weight, training
            )
            total = total + loss / 2**level
        return total / sum(2.0**-level for level in range(len(factors)))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Return the metrics of the finest output."""
        return super().compute_metrics(x, y, y_pred[0], sample_weight)


def supervise_deeply(model, levels):
    """Return a U-Net that learns from coarser outputs of its decoder, too.

    Parameters
    ----------
    model : keras.Model
        As `unet` makes it; its layers are shared, and so are the weights.
    levels : int
        How many outputs to add, each on a grid of half the size of the one before.

    Returns
    -------
    supervised : keras.Model
        To train with, on the same labels. Its first output is the model's own.

    Raises
    ------
    ValueError
        If the decoder has not so many further stages.

    References
    ----------
    Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.
    """
    names = [layer.name for layer in model.layers]
    stride = max(model.get_layer("encoder1_conv1").strides)
    stages = [n for n in range(1, len(names)) if f"decoder{n}_act2" in names]
    stages = [stage for stage in stages if stage > 1 or stride > 1][:levels]
    if len(stages) < levels:
        raise ValueError(f"only {len(stages)} stages can be supervised, not {levels}")
    features = [model.get_layer(f"decoder{stage}_act2").output for stage in stages]
    heads = [
        _head(x, model.output_shape[-1], f"head{stage}")
        for stage, x in zip(stages, features, strict=True)
    ]
    outputs, name = [model.output, *heads], f"{model.name}_supervised"
    supervised = _DeeplySupervised(model.input, outputs, name=name)
    supervised.factors = (1, *(stride * 2 ** (stage - 1) for stage in stages))
    return supervised


def _cicek_block(x, filters, name, padding):
    """Convolve twice to `filters[0]`, then `filters[1]` channels, with plain ReLU."""
    for i, width in enumerate(filters, start=1):
        conv = layers.Conv3D(
            width,
            3,
            padding=padding,
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}_conv{i}",
        )
        x = layers.GroupNormalization(-1, scale=False, name=f"{name}_norm{i}")(conv(x))
        x = layers.ReLU(name=f"{name}_act{i}")(x)
    return x


def unet_cicek2016(input_shape, *, n_classes=4, padding="same"):
    """Return the 3D U-Net of Çiçek et al., 2016, the first one published.

    Three stages down and up, channels doubled before each pooling, not after it:
    19,069,955 parameters with three channels in and three out, as the paper counts.

    Parameters
    ----------
    input_shape : tuple
        (X, Y, Z, C), spatial sizes multiples of 8 or None with `padding="same"`; with
        `padding="valid"` known sizes such as the paper's (132, 132, 116, 3).
    n_classes : {4, 3}, default 4
        4: softmax over the labels 0..3, 3: a sigmoid for each of WT, TC and ET.
    padding : {"same", "valid"}, default "same"
        "valid" is the paper's: no zeros are added, every convolution loses a voxel at
        each face, and 132x132x116 in give 44x44x28 out. "same" gives a map on the
        patch's own grid, so that it trains on the same patches as `unet`; it has the
        same weights, and is less sure of itself at the faces of a patch.

    Returns
    -------
    model : keras.Model

    Raises
    ------
    ValueError
        If a shape does not fit, or `n_classes` or `padding` is none of the above.

    Notes
    -----
    The paper normalises by batch, with a batch of one and the current statistics at
    test time too: that is what instance normalisation does, and does for any batch.
    It has an offset but no factor here, which is what the published count leaves room
    for; before a ReLU the next convolution does the work of a factor.

    References
    ----------
    Çiçek et al., 2016, 3D U-Net: Learning Dense Volumetric Segmentation from Sparse
    Annotation, arXiv:1606.06650.
    """
    if padding not in ("same", "valid") or len(input_shape) != 4:
        raise ValueError(
            'expected input_shape (X, Y, Z, C) and padding "same" or "valid", '
            f"got {tuple(input_shape)} and {padding!r}"
        )
    _rank(input_shape, n_classes, 8 if padding == "same" else 1, 4)
    inputs = x = keras.Input(input_shape, name="image")
    skips = []
    for stage, width in enumerate((32, 64, 128), start=1):
        name = f"encoder{stage}"
        x = _down(x, name) if skips else x
        x = _cicek_block(x, (width, 2 * width), name, padding)
        skips.append(x)
    x = _cicek_block(_down(x, "bottleneck"), (256, 512), "bottleneck", padding)
    for stage, width in ((3, 256), (2, 128), (1, 64)):
        name = f"decoder{stage}"
        up = layers.Conv3DTranspose(
            2 * width, 2, strides=2, use_bias=False, name=f"{name}_up"
        )
        x, skip = up(x), skips.pop()
        if padding == "valid":
            sizes = zip(skip.shape[1:4], x.shape[1:4], strict=True)
            faces = [(larger - smaller) // 2 for larger, smaller in sizes]
            skip = layers.Cropping3D(faces, name=f"{name}_crop")(skip)
        x = layers.Concatenate(name=f"{name}_concat")([skip, x])
        x = _cicek_block(x, (width, width), name, padding)
    return keras.Model(inputs, _head(x, n_classes), name="unet_cicek2016")


def size_factor(model):
    """Return what the spatial sizes of a model's input must be multiples of.

    Parameters
    ----------
    model : keras.Model
        A U-Net, its own layers with strides.

    Returns
    -------
    factor : int
        Strides with a kernel of 1 voxel do not count: in residual nets they are the
        shortcuts beside another strided layer.
    """
    strides = [
        max(layer.strides)
        for layer in model.layers
        if hasattr(layer, "strides")
        and "Transpose" not in type(layer).__name__
        and max(getattr(layer, "kernel_size", (0,))) != 1
    ]
    return math.prod(strides)


def _gflop(layer):
    """Return the layer's forward GFLOP a sample; only convolutions count."""
    kernel = getattr(layer, "kernel", None)
    if kernel is None:
        return 0.0
    # A transposed convolution applies its kernel once an input voxel.
    transposed = "Transpose" in type(layer).__name__
    grid = (layer.input if transposed else layer.output).shape[1:-1]
    return 2 * math.prod(grid) * math.prod(kernel.shape) / 1e9


def model_table(model, input_shape=None):
    """Return what each stage of a model gives, holds and costs.

    Parameters
    ----------
    model : keras.Model
        Functional; its layers are named `<stage>_<what>`.
    input_shape : tuple, optional
        The patch (X, Y, Z, C) to count for; needed where the model leaves sizes open.

    Returns
    -------
    table : pandas.DataFrame
        A row a stage in order of computation and a last row "total"; columns
        "output" (shape without the batch), "parameters", "GFLOP" (forward pass, one
        sample, two operations a multiply-add, convolutions only) and "activations_mb"
        (every layer's output in float32, one sample, in 10⁶ bytes: about what training
        keeps).

    Raises
    ------
    ValueError
        If neither the model nor `input_shape` says all the sizes, or one does not fit.
    """
    shape = tuple(input_shape or model.input_shape[1:])
    if None in shape:
        raise ValueError(f"the model leaves sizes open, {shape}: give input_shape")
    # The same layers on the given patch, weights not copied: only shapes are read.
    try:
        sized = keras.models.clone_model(model, keras.Input(shape, batch_size=1))
    except ValueError as error:
        raise ValueError(
            f"the model does not take {shape}: each spatial size must be a multiple "
            f"of {size_factor(model)} ({error})"
        ) from None
    rows = [
        {
            "stage": layer.name.split("_")[0],
            "output": tuple(layer.output.shape[1:]),
            "parameters": layer.count_params(),
            "GFLOP": _gflop(layer),
            "activations_mb": 4 * math.prod(layer.output.shape) / 1e6,
        }
        for layer in sized.layers
        if not isinstance(layer, layers.InputLayer)
    ]
    stages = pd.DataFrame(rows).groupby("stage", sort=False)
    sums = stages[["parameters", "GFLOP", "activations_mb"]].sum()
    table = pd.concat([stages[["output"]].last(), sums], axis=1)
    table.loc["total"] = [tuple(sized.output.shape[1:]), *sums.sum()]
    return table.astype({"parameters": int})

"""Losses on label maps: Dice, focal, cross-entropy, and their sums.

All take labels (B, ..., 1) and probabilities (B, ..., K), and return a number a sample.
K = 4 are softmax probabilities of the labels 0..3; K = 3 are sigmoids of WT, TC and ET.
"""

import numpy as np
from keras import ops
from keras.saving import register_keras_serializable

from brats_utils.labels import ENCODED_REGIONS, LABELS

SMOOTH = 1.0  # voxels
EPSILON = 1e-7


def _targets(y_true, n_outputs):
    """Return labels as 0/1 maps like the prediction's: (B, ..., 1) -> (B, ..., K)."""
    if n_outputs == len(LABELS):
        table = np.eye(len(LABELS), dtype="float32")
    elif n_outputs == len(ENCODED_REGIONS):
        members = ENCODED_REGIONS.values()
        table = [[float(k in values) for values in members] for k in range(len(LABELS))]
    else:
        raise ValueError(
            f"expected 4 outputs (labels 0..3) or 3 (WT, TC, ET), got {n_outputs}"
        )
    labels = ops.cast(ops.squeeze(y_true, axis=-1), "int32")  # (B, ...)
    return ops.take(ops.convert_to_tensor(table, "float32"), labels, axis=0)


def _prepare(y_true, y_pred):
    """Return target and probability maps, both (B, voxels, K) float32."""
    y_pred = ops.cast(y_pred, "float32")
    n_outputs = y_pred.shape[-1]
    flat = (ops.shape(y_pred)[0], -1, n_outputs)
    return ops.reshape(_targets(y_true, n_outputs), flat), ops.reshape(y_pred, flat)


def _surprise(targets, probabilities):
    """Return the probability of the truth and minus its log, for each voxel.

    (B, voxels, 1) for softmax over labels, (B, voxels, 3) for regions.
    """
    if probabilities.shape[-1] == len(LABELS):
        truth = ops.sum(targets * probabilities, axis=-1, keepdims=True)
    else:
        truth = targets * probabilities + (1 - targets) * (1 - probabilities)
    truth = ops.clip(truth, EPSILON, 1.0)
    return truth, -ops.log(truth)


def _dice(targets, probabilities, voxels=1):
    """Return the Dice loss; `voxels` are the axes summed: (0, 1) is over the batch."""
    if probabilities.shape[-1] == len(LABELS):
        targets, probabilities = targets[..., 1:], probabilities[..., 1:]
    overlap = ops.sum(targets * probabilities, axis=voxels)  # (B, 3), or (3,)
    size = ops.sum(targets, axis=voxels) + ops.sum(probabilities, axis=voxels)
    return ops.mean(1 - (2 * overlap + SMOOTH) / (size + SMOOTH), axis=-1)


def _cross_entropy(targets, probabilities):
    return ops.mean(_surprise(targets, probabilities)[1], axis=(1, 2))


def _focal(targets, probabilities):
    truth, surprise = _surprise(targets, probabilities)
    return ops.mean(ops.square(1 - truth) * surprise, axis=(1, 2))


@register_keras_serializable(package="brats_utils")
def dice_loss(y_true, y_pred):
    """Return the soft Dice loss, 1 - (2 Σpg + 1) / (Σp + Σg + 1), averaged over 3 maps.

    Sums run over the voxels of one sample; p is a map's probability, g its truth. The
    three maps are the tumour labels 1, 2, 3 (K = 4; the background is left out, its
    Dice is near 1 whatever the network does) or the regions WT, TC, ET (K = 3). A
    perfect prediction costs exactly 0.

    A map that is absent from the truth costs Σp / (Σp + 1): 0 where nothing is
    predicted, 1/2 for one voxel in all, near 1 with a slope near 0 for many. So Dice
    hardly corrects a large false alarm; that is the other term's work in
    `dice_focal_loss` and `dice_cross_entropy_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.

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
    """Return the focal loss, the mean over voxels of -(1 - p)² log p.

    p is the probability given to the truth: to the voxel's label (K = 4), or to being
    in or out of each region (K = 3, averaged over the regions). A voxel at p = 0.9
    counts a hundredth of what it does in the cross-entropy, so that the easy
    background, 98 % of a scan, does not drown the tumour.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.

    References
    ----------
    Lin et al., 2017, arXiv:1708.02002, with gamma = 2 and no class weights.
    """
    return _focal(*_prepare(y_true, y_pred))


@register_keras_serializable(package="brats_utils")
def cross_entropy_loss(y_true, y_pred):
    """Return the cross-entropy, the mean over voxels of -log p.

    p is the probability given to the truth, as in `focal_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.
    """
    return _cross_entropy(*_prepare(y_true, y_pred))


@register_keras_serializable(package="brats_utils")
def dice_focal_loss(y_true, y_pred):
    """Return `dice_loss` + `focal_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps) + _focal(*maps)


@register_keras_serializable(package="brats_utils")
def dice_cross_entropy_loss(y_true, y_pred):
    """Return `dice_loss` + `cross_entropy_loss`, the pairing of BraTS2020's winners.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.

    References
    ----------
    Isensee et al., 2020, nnU-Net for Brain Tumor Segmentation, arXiv:2011.00848.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps) + _cross_entropy(*maps)


@register_keras_serializable(package="brats_utils")
def batch_dice_cross_entropy_loss(y_true, y_pred):
    """Return the Dice loss of a batch taken as one volume, + `cross_entropy_loss`.

    A patch without a region then costs little by itself: the others' voxels stand
    beside it. With one patch a batch it is `dice_cross_entropy_loss`.

    Parameters
    ----------
    y_true : (B, ..., 1) integer or float tensor
        Labels 0..3.
    y_pred : (B, ..., K) float tensor
        Probabilities, K = 4 or 3.

    Returns
    -------
    loss : (B,) float32 tensor

    Raises
    ------
    ValueError
        If K is neither 4 nor 3.

    References
    ----------
    Isensee et al., 2020, nnU-Net for Brain Tumor Segmentation, arXiv:2011.00848.
    """
    maps = _prepare(y_true, y_pred)
    return _dice(*maps, voxels=(0, 1)) + _cross_entropy(*maps)

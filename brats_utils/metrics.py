"""Dice of the BraTS regions as Keras metrics, to watch during training."""

import keras
from keras import ops
from keras.saving import register_keras_serializable

from brats_utils.labels import ENCODED_REGIONS, LABELS


def _in_region(y, region):
    """Return 1.0 where a label 0..3 belongs to the region, else 0.0."""
    return sum(ops.cast(ops.equal(y, v), "float32") for v in ENCODED_REGIONS[region])


@register_keras_serializable(package="brats_utils")
class RegionDice(keras.metrics.Mean):
    """Dice of one region, 2 |P ∩ G| / (|P| + |G|), averaged over samples.

    Each sample (patch or volume) has its own Dice, 1 where the region is neither
    predicted nor there, as the official scoring has it for whole scans. With four
    outputs P is where the most probable label belongs to the region; with three, where
    the region's own probability exceeds 0.5.

    Parameters
    ----------
    region : {"WT", "TC", "ET"}
        Whole tumour, tumour core or enhancing tumour.
    name : str, optional
        `dice_<region>` by default.
    dtype : str, optional
        As for every Keras metric.

    Raises
    ------
    ValueError
        If `region` is none of the three.
    """

    def __init__(self, region, name=None, dtype=None):
        if region not in ENCODED_REGIONS:
            raise ValueError(
                f"region is one of {list(ENCODED_REGIONS)}, got {region!r}"
            )
        super().__init__(name=name or f"dice_{region}", dtype=dtype)
        self.region = region

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Add a batch: y_true (B, ..., 1) labels, y_pred (B, ..., K) probabilities."""
        y_pred = ops.convert_to_tensor(y_pred)
        if y_pred.shape[-1] == len(LABELS):
            predicted = _in_region(ops.argmax(y_pred, axis=-1), self.region)
        else:
            channel = list(ENCODED_REGIONS).index(self.region)
            predicted = ops.cast(y_pred[..., channel] > 0.5, "float32")
        truth = _in_region(ops.squeeze(y_true, axis=-1), self.region)
        voxels = tuple(range(1, len(truth.shape)))
        overlap = ops.sum(truth * predicted, axis=voxels)
        size = ops.sum(truth, axis=voxels) + ops.sum(predicted, axis=voxels)
        dice = ops.where(size > 0, 2 * overlap / ops.maximum(size, 1.0), 1.0)  # (B,)
        super().update_state(dice, sample_weight=sample_weight)

    def get_config(self):
        """Return what a saved model needs to make this metric again."""
        return {**super().get_config(), "region": self.region}

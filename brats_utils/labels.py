"""Label values, tumour regions, their names and colours: stated here, once."""

import numpy as np

LABELS = {
    0: "background",
    1: "necrotic and non-enhancing core",
    2: "oedema",
    4: "enhancing tumour",
}
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
REGION_NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
ENCODED_REGIONS = {
    region: tuple(list(LABELS).index(value) for value in values)
    for region, values in REGIONS.items()
}
# Blue, yellow and vermilion of Okabe and Ito's palette, told apart by all readers.
COLOURS = {1: "#0072B2", 2: "#F0E442", 4: "#D55E00"}


def _look_up(values, keys, replacements, what):
    """Replace each of `keys` in `values`, or raise naming the values that are none."""
    values = np.asarray(values)
    if values.dtype == np.uint8:
        counts = np.bincount(values.ravel(), minlength=256)
        found = np.flatnonzero(counts)
        strange = [int(v) for v in found if v not in keys]
    else:
        strange = [v.item() for v in np.unique(values) if v not in keys]
    if strange:
        raise ValueError(
            f"expected only the {what} {', '.join(map(str, keys))}, found {strange[:5]}"
        )
    table = np.zeros(max(keys) + 1, np.uint8)
    table[list(keys)] = replacements
    return table[values.astype(np.uint8)]


def encode_labels(segmentation):
    """Return the training labels 0, 1, 2, 3 of a BraTS label map.

    Parameters
    ----------
    segmentation : integer array, any shape
        Holds only the values 0, 1, 2 and 4.

    Returns
    -------
    labels : uint8 array of the same shape
        The same map with 4 (enhancing tumour) as 3, so that the labels have no gap.

    Raises
    ------
    ValueError
        If `segmentation` holds another value; nothing is ever rounded.

    Examples
    --------
    >>> encode_labels([0, 1, 2, 4]).tolist()
    [0, 1, 2, 3]
    """
    return _look_up(segmentation, tuple(LABELS), range(len(LABELS)), "BraTS labels")


def decode_labels(labels):
    """Return the BraTS label map of training labels: the inverse of `encode_labels`.

    Parameters
    ----------
    labels : integer array, any shape
        Holds only the values 0, 1, 2 and 3.

    Returns
    -------
    segmentation : uint8 array of the same shape
        The same map with 3 as 4.

    Raises
    ------
    ValueError
        If `labels` holds another value.

    Examples
    --------
    >>> decode_labels([0, 1, 2, 3]).tolist()
    [0, 1, 2, 4]
    """
    return _look_up(labels, tuple(range(len(LABELS))), tuple(LABELS), "training labels")


def region_volumes_ml(segmentation, spacing_mm):
    """Return the volume of each BraTS region, in millilitres.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        BraTS 2020 label map, holding only the values 0, 1, 2 and 4.
    spacing_mm : (3,) sequence of float
        Voxel size along X, Y and Z, in millimetres.

    Returns
    -------
    volumes : dict of str to float
        Millilitres of "WT", "TC" and "ET". A region with no voxel has volume 0.0.

    Raises
    ------
    ValueError
        If `segmentation` is not 3-D, or holds a value that is no BraTS label.

    References
    ----------
    Regions as scored in Bakas et al., 2018, arXiv:1811.02629.

    Examples
    --------
    >>> region_volumes_ml(np.full((10, 10, 10), 4), (1, 1, 2))
    {'WT': 2.0, 'TC': 2.0, 'ET': 2.0}
    """
    labels = encode_labels(segmentation)
    if labels.ndim != 3:
        raise ValueError(f"expected a 3-D label map, got shape {labels.shape}")
    counts = np.bincount(labels.ravel(), minlength=len(LABELS))
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {
        region: float(counts[list(values)].sum()) * voxel_ml
        for region, values in ENCODED_REGIONS.items()
    }

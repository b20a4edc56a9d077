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


def relabel(values, table):
    """Return another value for each label, by a table that must know them all.

    Parameters
    ----------
    values : array, any shape
        Whole numbers from 0 to 255, of any type.
    table : dict of int to int
        Old value to new one.

    Returns
    -------
    relabelled : uint8 array of the same shape

    Raises
    ------
    ValueError
        If a value is not in the table, with how often it occurs; nothing is rounded.
    """
    values = np.asarray(values)
    known = sum(np.count_nonzero(values == old) for old in table)
    if known != values.size:
        found = zip(*np.unique(values, return_counts=True), strict=True)
        strange = [f"{v:g} in {n} voxels" for v, n in found if v not in table]
        raise ValueError(
            f"expected only the labels {list(table)}, found {', '.join(strange[:5])}"
        )
    relabelled = values.astype(np.uint8)
    for old, new in table.items():
        if old != new:
            relabelled[values == old] = new
    return relabelled


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
    return relabel(segmentation, {value: i for i, value in enumerate(LABELS)})


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
    return relabel(labels, dict(enumerate(LABELS)))


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
    counts = np.array([np.count_nonzero(labels == i) for i in range(len(LABELS))])
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {
        region: float(counts[list(values)].sum()) * voxel_ml
        for region, values in ENCODED_REGIONS.items()
    }

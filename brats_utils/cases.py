"""Read and check BraTS cases, and write their label maps; `layouts` finds them."""

import numpy as np

from brats_utils.labels import LABELS, encode_labels, relabel
from brats_utils.layouts import (
    ALL_MODALITIES,
    MODALITIES,
    Case,
    find_cases,
    rename_odd_segmentation,
    short_name,
)
from brats_utils.nifti import (
    BratsDataError,
    read_header,
    read_volume,
    save_volume,
    spacing_mm,
)

__all__ = [
    "ALL_MODALITIES",
    "MODALITIES",
    "BratsDataError",
    "Case",
    "check_cases",
    "find_cases",
    "load_case",
    "load_labels",
    "read_case",
    "read_grid",
    "rename_odd_segmentation",
    "save_segmentation",
]


def load_labels(path, labels="0124"):
    """Read one label map.

    Parameters
    ----------
    path : path
        A NIfTI file of labels.
    labels : {"0124", "0123", "0213"}
        How the file writes its labels, see `Case`.

    Returns
    -------
    segmentation : (X, Y, Z) uint8 array
        Values 0, 1, 2 and 4, whatever the file's convention.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If the file cannot be read, or holds another value.
    """
    volume, header, _ = read_volume(path)
    return _check_labels(volume, path, labels), header.get_best_affine()


def _check_labels(volume, path, labels):
    """Return stored labels as 0, 1, 2, 4 in uint8; raise if there are others."""
    values = [int(value) for value in labels]
    try:
        return relabel(volume, dict(zip(values, LABELS, strict=True)))
    except ValueError as error:
        advice = "Check that this is a BraTS segmentation of the same year"
        raise BratsDataError(str(error), file=path, advice=advice) from None


def _fits_float32(volume):
    """Return where a volume is finite, as float32 too: float64 reaches further."""
    with np.errstate(over="ignore"):
        return np.isfinite(volume.astype(np.float32, copy=False))


def _check_image(volume, path):
    """Raise if one modality is blank, or holds NaN or Inf."""
    problem = None
    if volume.min() == volume.max():
        problem = f"blank modality: every voxel is {volume.flat[0]:g}"
    elif volume.dtype.kind == "f" and not (sound := _fits_float32(volume)).all():
        bad = np.argwhere(~sound)
        problem = f"{len(bad)} voxels are NaN or infinite, first {bad[0].tolist()}"
    if problem:
        advice = "Download it again, or leave this case out"
        raise BratsDataError(problem, file=path, advice=advice)


def _paths(case, modalities):
    """Return each file of a case: {path: the modalities asked for; () for labels}."""
    paths = {}
    for modality in modalities:
        path = case.images[modality]
        paths[path] = (*paths.get(path, ()), modality)
    return paths | ({case.segmentation: ()} if case.segmentation else {})


def _images_of(volume, modalities, path):
    """Return the images (X, Y, Z) that a file holds and that are asked for, checked."""
    if volume.ndim == 4:
        images = [volume[..., ALL_MODALITIES.index(m)] for m in modalities]
    else:
        images = [volume] * len(modalities)
    for image in images:
        _check_image(image, path)
    return images


def _check_grid(header, path, first):
    """Raise if a volume lies on another grid than the case's first (path, header)."""
    shape, affine = header.get_data_shape(), header.get_best_affine()
    other, problem = first[1], None
    if shape != other.get_data_shape():
        problem = f"shape {shape}, but {first[0].name} has {other.get_data_shape()}"
    elif not np.allclose(affine, other.get_best_affine(), atol=1e-3):
        problem = f"its grid (affine) differs from that of {first[0].name}"
    if problem:
        advice = "All volumes of a case must lie on one grid; register them first"
        raise BratsDataError(problem, file=path, advice=advice)


def read_case(case, modalities=MODALITIES):
    """Read a case as `load_case` does, its volumes as stored, with their checksums.

    Parameters
    ----------
    case, modalities
        As in `load_case`.

    Returns
    -------
    volumes : list of (X, Y, Z) array
        Raw intensities in the files' own types, one for each modality; read-only.
    segmentation, affine
        As `load_case` gives them.
    checksums : dict of str to str
        File name to SHA-256 of the file.

    Raises
    ------
    BratsDataError
        As `load_case` does; the message names case and file.
    """
    volumes, segmentation, checksums, first = [], None, {}, None
    try:
        for path, wanted in _paths(case, modalities).items():
            volume, header, checksum = read_volume(path, case.channels if wanted else 1)
            checksums[short_name(path)] = checksum
            first = first or (path, header)
            _check_grid(header, path, first)
            if wanted:
                volumes += _images_of(volume, wanted, path)
            else:
                segmentation = _check_labels(volume, path, case.labels)
    except BratsDataError as error:
        raise error.of(case.id) from None
    affine = first[1].get_best_affine() if first else read_grid(case)[1]
    return volumes, segmentation, affine, checksums


def load_case(case, modalities=MODALITIES):
    """Read a case's images and segmentation, on the grid they are stored in.

    Parameters
    ----------
    case : Case
        From `find_cases`.
    modalities : sequence of str
        Which images, and in which order, become the channels; may be empty.

    Returns
    -------
    image : (X, Y, Z, C) float32 array
        Raw intensities, a channel for each modality.
    segmentation : (X, Y, Z) uint8 array or None
        Values 0, 1, 2 and 4. None where the case has none.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If a file cannot be read, is blank, holds NaN or infinity or a wrong label, or
        if the files do not lie on one grid.
    """
    volumes, segmentation, affine, _ = read_case(case, modalities)
    shape = volumes[0].shape if volumes else read_grid(case)[0]
    # Each channel is one block, as in its file: filled and read without jumps.
    image = np.empty((*shape, len(volumes)), np.float32, order="F")  # (X, Y, Z, C)
    for channel, volume in enumerate(volumes):
        image[..., channel] = volume
    return image, segmentation, affine


def check_cases(cases, *, voxels=True):
    """Read every file of every case, and list all that is wrong; nothing is changed.

    Parameters
    ----------
    cases : list of Case
        From `find_cases`.
    voxels : bool
        False looks at names, headers and lengths alone, in milliseconds a case.

    Returns
    -------
    problems : pandas.DataFrame
        A row for each problem: "case", "file", "problem", "what to do". Empty if none.
    """
    import pandas as pd

    rows = []

    def note(case, path, check, *arguments):
        try:
            return check(*arguments)
        except BratsDataError as error:
            rows.append((case.id, str(path), error.problem, error.advice or ""))

    for case in cases:
        first = None
        for path, wanted in _paths(case, ALL_MODALITIES).items():
            channels = case.channels if wanted else 1
            header = note(case, path, read_header, path, channels)
            if header is None:
                continue
            first = first or (path, header)
            note(case, path, _check_grid, header, path, first)
            if voxels and not wanted:
                note(case, path, load_labels, path, case.labels)
            elif voxels and (read := note(case, path, read_volume, path, channels)):
                for modality in wanted:
                    note(case, path, _images_of, read[0], [modality], path)
    return pd.DataFrame(rows, columns=["case", "file", "problem", "what to do"])


def read_grid(case):
    """Return the grid of a case, from the header of its first image alone.

    Parameters
    ----------
    case : Case
        From `find_cases`.

    Returns
    -------
    shape : tuple of 3 int
        Voxels along X, Y and Z.
    affine : (4, 4) array
        Voxel indices to millimetres.
    spacing_mm : tuple of 3 float
        Voxel size along X, Y and Z.
    """
    header = read_header(case.images["flair"], case.channels)
    affine = header.get_best_affine()
    return header.get_data_shape(), affine, spacing_mm(affine)


def save_segmentation(segmentation, case, path):
    """Write a label map on the case's own grid, as the challenge wants it.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Values 0, 1, 2 and 4, in the shape of the case's images.
    case : Case
        Whose affine and header geometry the file takes.
    path : path
        Ends in `.nii` or `.nii.gz`; the file holds uint8.

    Raises
    ------
    ValueError
        If the shape is not the case's, or a value is no BraTS label.
    """
    segmentation = np.asarray(segmentation)
    header = read_header(case.images["flair"], case.channels)
    if segmentation.shape != header.get_data_shape():
        raise ValueError(
            f"{case.id}: the label map has shape {segmentation.shape}, "
            f"its images {header.get_data_shape()}"
        )
    encode_labels(segmentation)  # raises on a value that is no label
    save_volume(segmentation.astype(np.uint8), path, like=header)

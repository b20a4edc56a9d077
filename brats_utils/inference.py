"""Predict whole scans: raw intensities in, a label map on the scan's own grid out."""

import dataclasses
import itertools
import math
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from brats_utils.cases import (
    ALL_MODALITIES,
    MODALITIES,
    BratsDataError,
    load_case,
    load_labels,
    save_segmentation,
)
from brats_utils.decoding import decode_probabilities, tune_decoding
from brats_utils.files import read_json, write_json
from brats_utils.model import size_factor
from brats_utils.nifti import from_lps, read_header, save_volume, spacing_mm, to_lps
from brats_utils.runs import BEST, SIDECAR
from brats_utils.transforms import NORMALISATION, brain_box, standardise

SPACING_MM = (1.0, 1.0, 1.0)


def load_model(path):
    """Load a saved model as data: nothing that the file holds is executed.

    Parameters
    ----------
    path : path
        A `.keras` file, or the folder of a run, whose `best.keras` is taken.

    Returns
    -------
    model : keras.Model
        Not compiled: to predict with. Without XLA, which would compile anew for each
        brain's size. Its `description` is what `model.json` beside it says, or {}.

    Raises
    ------
    ValueError
        If there is no such file, or it is an HDF5 file, an HTML page, damaged, or holds
        code (Lambda layers), or does not fit the `model.json` beside it.
    """
    path = Path(path)
    path = path / BEST if path.is_dir() else path
    if path.suffix.lower() in (".h5", ".hdf5"):
        raise ValueError(
            f"{path}: HDF5 models may hold code and are refused. If you trust it, "
            "convert it: keras.models.load_model(path).save('model.keras')"
        )
    if not path.is_file():
        raise ValueError(f"there is no model {path}; train one first (notebook 04)")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            is_page = file.read(1) == b"<"
        found = "an HTML page, not a model" if is_page else "damaged or no Keras model"
        raise ValueError(f"{path} is {found}; get it again, as a .keras file")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras, HDF5 and zip raise at damaged files
        raise ValueError(
            f"{path} cannot be loaded: it is damaged, holds code (Lambda layers), or "
            f"comes from another version than Keras {keras.__version__}: {error}"
        ) from None
    model.jit_compile, model.description = False, {}
    if (path.parent / SIDECAR).is_file():
        _heed_description(model, read_json(path.parent / SIDECAR), path)
    return model


def _heed_description(model, description, path):
    """Check a model against the `model.json` beside it, and note that in it."""
    modalities = description.get("modalities", ())
    outputs = {"labels 0..3": 4, "WT, TC, ET": 3}.get(description.get("outputs"))
    expected = {
        "channels in": (len(modalities), model.input_shape[-1]),
        "channels out": (outputs, model.output_shape[-1]),
        "normalisation": (description.get("normalisation"), NORMALISATION),
        "orientation": (description.get("orientation"), "LPS"),
    }
    other = [f"{k}: {a}, found {b}" for k, (a, b) in expected.items() if a != b]
    if other:
        raise ValueError(f"{path} does not fit its {SIDECAR}: {'; '.join(other)}")
    version = description.get("keras", "(not noted)")
    if version.split(".")[0] != keras.__version__.split(".")[0]:
        raise ValueError(
            f"{path} was made by Keras {version}, this is {keras.__version__}; "
            f"install keras=={version}"
        )
    if version != keras.__version__:
        print(f"{path} was made by Keras {version}; this is {keras.__version__}")
    model.description = description


def _pad(image, shape):
    """Add zeros, which are background, at the ends of the first three axes."""
    widths = [(0, n - have) for n, have in zip(shape, image.shape, strict=False)]
    return np.pad(image, [*widths, (0, 0)])


def _gaussian(shape):
    """Return the weights of a patch: high in its middle, low at its rim."""
    weights = np.ones(shape, np.float32)
    for axis, n in enumerate(shape):
        distance = (np.arange(n) - (n - 1) / 2) / (n / 8)
        line = np.exp(-0.5 * distance**2).astype(np.float32)
        weights *= np.expand_dims(line, [a for a in range(3) if a != axis])
    return weights[..., None]  # (X, Y, Z, 1)


def _starts(size, patch):
    """Return where windows of `patch` begin to cover `size`, half a patch apart."""
    n = math.ceil(2 * (size - patch) / patch) + 1
    return np.linspace(0, size - patch, n).round().astype(int)


def _slide(model, image, patch_shape):
    """Return the probabilities of overlapping patches, averaged by Gaussian weights."""
    shape = [max(pair) for pair in zip(image.shape, patch_shape, strict=False)]
    padded = _pad(image, shape)
    weights = _gaussian(patch_shape)
    total = np.zeros((*shape, model.output_shape[-1]), np.float32)
    divisor = np.zeros((*shape, 1), np.float32)
    starts = (_starts(*pair) for pair in zip(shape, patch_shape, strict=True))
    for corner in itertools.product(*starts):
        box = tuple(slice(i, i + n) for i, n in zip(corner, patch_shape, strict=True))
        total[box] += weights * model.predict_on_batch(padded[box][None])[0]
        divisor[box] += weights
    total /= divisor
    return total[tuple(slice(n) for n in image.shape[:3])]


def _predict_once(model, image, patch_shape):
    """Return the probabilities of an image: by patches, or in one pass if None."""
    if patch_shape is not None:
        return _slide(model, image, patch_shape)
    factor = size_factor(model)
    shape = [math.ceil(n / factor) * factor for n in image.shape[:3]]
    probabilities = model.predict_on_batch(_pad(image, shape)[None])[0]
    return probabilities[tuple(slice(n) for n in image.shape[:3])]


def _as_list(models):
    """Return models as a list, those given as paths loaded."""
    models = models if isinstance(models, (list, tuple)) else [models]
    return [m if isinstance(m, keras.Model) else load_model(m) for m in models]


def _check_fit(model, image, patch_shape):
    """Return the shape of patches to predict, None for one pass; raise if none fits."""
    expected, channels = model.input_shape[1:-1], model.input_shape[-1]
    same_grid = model.output_shape[1:-1] == expected
    if len(expected) != 3 or not same_grid or channels != image.shape[-1]:
        raise ValueError(
            f"the model maps {model.input_shape} to {model.output_shape}; expected "
            f"(batch, X, Y, Z, {image.shape[-1]}) to the same grid"
        )
    if None in expected:
        return patch_shape
    if patch_shape is not None and tuple(patch_shape) != expected:
        raise ValueError(f"the model takes patches of {expected}, not {patch_shape}")
    return expected


def predict_probabilities(model, image, *, flips=False, patch_shape=None, spread=False):
    """Return a model's probabilities for every voxel of a standardised image.

    Parameters
    ----------
    model : keras.Model or path, or list of them
        (B, X, Y, Z, C) -> (B, X, Y, Z, K). Where it takes any spatial size, the image
        is predicted in one pass, padded with zeros to the multiple the model needs.
        The probabilities of several models, an ensemble, are averaged.
    image : (X, Y, Z, C) float32 array
        Of any size, in LPS order, as `standardise` gives it.
    flips : bool
        Average over the image and its 7 mirror images: 8 times the work.
    patch_shape : tuple of 3 int, optional
        Predict patches of this shape, half a patch apart, and average them by Gaussian
        weights. Needs less memory than one pass. A model of fixed size always does so.
    spread : bool
        Return the spread, too.

    Returns
    -------
    probabilities : (X, Y, Z, K) float32 array
    spread : (X, Y, Z) float32 array
        Only if asked for: the SD over models and mirror images, of the channel where
        it is largest. Where they disagree, nobody should be sure.

    Raises
    ------
    ValueError
        If a model is no such model, or takes patches of another shape.
    """
    axes = [a for n in range(4) for a in itertools.combinations(range(3), n)]
    total = squares = None
    count = 0
    for each in _as_list(model):
        shape = _check_fit(each, image, patch_shape)
        for mirrored in axes if flips else [()]:
            found = _predict_once(each, np.flip(image, mirrored), shape)
            found = np.flip(found, mirrored)
            total = found if total is None else total + found
            if spread:
                squares = found**2 if squares is None else squares + found**2
            count += 1
    mean = total / count if count > 1 else total
    if not spread:
        return mean
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0)).max(axis=-1)


def _choose_modalities(model, modalities):
    """Return the channels to feed a model: those given, or the usual ones."""
    channels = model.input_shape[-1]
    usual = {len(names): names for names in (MODALITIES, ALL_MODALITIES)}
    noted = getattr(model, "description", {}).get("modalities")
    modalities = modalities or noted or usual.get(channels, ())
    if len(modalities) != channels:
        raise ValueError(
            f"the model takes {channels} channels; say which modalities they are, got "
            f"{tuple(modalities)}"
        )
    return modalities


def _read_brain(case, modalities):
    """Return a case's standardised brain in LPS order, its mask, box and affine."""
    unlabelled = dataclasses.replace(case, segmentation=None)
    image, _, affine = load_case(unlabelled, modalities)
    if not np.allclose(spacing_mm(affine), SPACING_MM, atol=0.05):
        raise BratsDataError(
            f"voxels of {np.round(spacing_mm(affine), 2).tolist()} mm; BraTS scans, "
            f"and networks trained on them, have {SPACING_MM}",
            case=case.id,
            advice="Resample the scan to 1 mm first",
        )
    image = to_lps(image, affine)
    box = brain_box(image)
    # All non-zero voxels lie in the box: mean and SD are the whole scan's.
    return standardise(image[box]), image.any(axis=-1), box, affine


def _predict_brain(
    models, case, *, modalities=None, flips=False, patch_shape=None, spread=False
):
    """Return [probabilities], with `spread` that too, of the brain, and its place."""
    noted = getattr(models[0], "description", {}).get("patch_shape")
    modalities = _choose_modalities(models[0], modalities)
    brain, mask, box, affine = _read_brain(case, modalities)
    patch_shape = patch_shape or noted
    found = predict_probabilities(
        models, brain, flips=flips, patch_shape=patch_shape, spread=spread
    )
    probabilities, *spread = found if spread else (found,)
    if not np.isfinite(probabilities).all():
        raise ValueError(f"{case.id}: the model's output is NaN; it was badly trained")
    probabilities[~mask[box], -3:] = 0  # no tumour outside the brain, nor doubt
    for values in spread:
        values[~mask[box]] = 0
    return [probabilities, *spread], (mask, box, affine)


def _paste(values, mask, box, affine):
    """Return the values of a box on the scan's own grid, 0 around it."""
    volume = np.zeros(mask.shape, values.dtype)
    volume[box] = values
    return np.ascontiguousarray(from_lps(volume, affine))


def predict_case(
    model,
    case,
    *,
    modalities=None,
    flips=False,
    patch_shape=None,
    thresholds=None,
    min_et_voxels=None,
    uncertainty=False,
):
    """Predict the label map of a whole scan, on the scan's own grid.

    Parameters
    ----------
    model : keras.Model or path, or list of them
        Four output channels are the labels 0 to 3, three the regions WT, TC and ET.
        Several models are an ensemble, which works by the notes beside the first.
    case : Case
        Its segmentation, if it has one, is not read.
    modalities : sequence of str, optional
        The model's channels. By default those that `load_model` found noted beside
        it, else FLAIR, T1CE, T2 for three and all for four.
    flips, patch_shape
        As in `predict_probabilities`. Where no shape is given, windows of the training
        patches' shape are taken if `load_model` found it noted beside the model.
    thresholds, min_et_voxels : optional
        As in `decode_probabilities`. By default what `tune_models` noted, else none.
    uncertainty : bool
        Return the spread over flips and models as well.

    Returns
    -------
    segmentation : (X, Y, Z) uint8 array
        Values 0, 1, 2 and 4; 0 where all modalities are 0, outside the brain.
    uncertainty : (X, Y, Z) float32 array
        Only if asked for; see `predict_probabilities`.

    Raises
    ------
    BratsDataError
        If a file of the case is not sound, or its voxels are not 1 mm wide.
    ValueError
        If a model does not fit, or its output is NaN.
    """
    models = _as_list(model)
    options = {"modalities": modalities, "flips": flips, "patch_shape": patch_shape}
    found, place = _predict_brain(models, case, spread=uncertainty, **options)
    given = {"thresholds": thresholds, "min_et_voxels": min_et_voxels}
    decoding = getattr(models[0], "description", {}).get("decoding", {})
    decoding = decoding | {k: v for k, v in given.items() if v is not None}
    found[0] = decode_probabilities(found[0], **decoding)
    volumes = tuple(_paste(values, *place) for values in found)
    return volumes if uncertainty else volumes[0]


def tune_models(run_dirs, parts, **options):
    """Tune the decoding of trained models on validation cases, and note it beside them.

    Parameters
    ----------
    run_dirs : sequence of path
        The folder of a run, or of each fold's; every `model.json` gets "decoding".
    parts : sequence of sequence of Case
        For each run cases with segmentations that it was not trained on.
    **options
        `modalities`, `flips` and `patch_shape` of `predict_case`.

    Returns
    -------
    gain : pandas.DataFrame
        See `tune_decoding`.
    """

    def predicted():
        for run_dir, cases in zip(run_dirs, parts, strict=True):
            models = _as_list(run_dir)
            for case in cases:
                (found,), (_, box, affine) = _predict_brain(models, case, **options)
                truth, _ = load_labels(case.segmentation, case.labels)
                yield found, to_lps(truth, affine)[box]

    decoding, gain = tune_decoding(predicted())
    for path in (Path(run_dir) / SIDECAR for run_dir in run_dirs):
        write_json(path, {**read_json(path), "decoding": decoding})
    return gain


def predict_cases(model, cases, out_dir, *, uncertainty=False, **options):
    """Predict many cases and write each as `<case id>.nii.gz`.

    Parameters
    ----------
    model, **options
        As in `predict_case`.
    cases : sequence of Case
        With or without segmentations.
    out_dir : path
        Where to; a former prediction of a case is replaced.
    uncertainty : bool
        Write the spread as `uncertainty/<case id>.nii.gz`, float32, as well.

    Returns
    -------
    paths : list of Path
        One for each case: uint8, values 0, 1, 2 and 4, on the case's own grid.
    """
    models, out_dir = _as_list(model), Path(out_dir)
    paths = [out_dir / f"{case.id}.nii.gz" for case in cases]
    bar = tqdm(paths, desc="predicting", unit="case", file=sys.stdout)
    for case, path in zip(cases, bar, strict=True):
        found = predict_case(models, case, uncertainty=uncertainty, **options)
        if uncertainty:
            found, spread = found
            header = read_header(case.images["flair"], case.channels)
            save_volume(spread, out_dir / "uncertainty" / path.name, like=header)
        save_segmentation(found, case, path)
    return paths

"""Predict whole scans: raw intensities in, a label map on the scan's own grid out."""

import hashlib
import itertools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from brats_utils import files, labels, nifti, volumes
from brats_utils.cases import check_distinct, read_scan
from brats_utils.generator import CHANNELS
from brats_utils.losses import describe_model
from brats_utils.model import check_model, find_model, read_model, size_factor
from brats_utils.nifti import BratsDataError

# How regions are decoded by default: the options that `evaluation.tune_model` tunes.
PLAIN = {"thresholds": [0.5, 0.5, 0.5], "min_island": 0.0, "min_et_voxels": 0}
OPTIONS = ["modalities", "flips", "patch_shape", *PLAIN, "uncertainty", "engine"]
ENGINES = ["keras", "openvino"]


@dataclass
class TrainedModel:
    """A network and the description that its file contains.

    Parameters
    ----------
    model : keras.Model
        Not compiled.
    description : dict
        "modalities" in order, "normalisation", "orientation", "outputs", "patch_shape",
        "train_cases", "val_cases", "keras", "precision" and so on, and "decoding" if it
        was tuned. Empty if the file has none.
    path : Path or None
        The file; None for a model in memory.
    """

    model: keras.Model
    description: dict
    path: Path | None = None


@dataclass
class Prediction:
    """The probabilities in the bounding box of a scan's brain.

    Parameters
    ----------
    scan : cases.Scan
    box : tuple of 3 slices
        The brain's box in the scan, in LPS order.
    probabilities : (X, Y, Z, K) float32 array
        Inside the box. Tumour probabilities are 0 outside the brain.
    spread : (X, Y, Z) float32 array
        SD over models and mirror images, the largest of all channels.
    """

    scan: object
    box: tuple
    probabilities: np.ndarray
    spread: np.ndarray

    def place(self, values):
        """Place values (X, Y, Z) of the box on the stored grid, with 0 around it."""
        volume = np.zeros(self.scan.brain_mask.shape, values.dtype)
        volume[self.box] = values
        return np.ascontiguousarray(self.scan.restore(volume))


def load_model(path, modalities=None):
    """Load a saved model without executing any code that the file may contain.

    Parameters
    ----------
    path : path
        A `.keras` file; the folder of a run, whose `best.keras` is used; or "phantom",
        the network that comes with this package, trained on synthetic patients only.
    modalities : sequence of str, optional
        The channels, in order. Those of "phantom" may be in any order, and those that
        its description calls "optional" may be left out. By default all.

    Returns
    -------
    trained : TrainedModel
        With `.model`, not compiled, and `.description`, which is stored in the file.

    Raises
    ------
    ValueError
        If the file is missing, damaged, an HDF5 file or an HTML page, contains code
        (Lambda layers), or does not fit its own description or `modalities`.
    """
    path = find_model("model", path)
    model, description = read_model(path, modalities)
    model.jit_compile = False  # XLA would recompile for each size of brain
    trained = TrainedModel(model, description, path)
    if modalities is not None:
        _choose_modalities(trained, modalities)  # raises if they do not fit
    return trained


def _as_trained(models, modalities=None):
    """Return a model or a path, or a list of them, as a list of TrainedModel.

    In a list, "phantom" leaves out the optional modalities that the others lack.
    """
    if isinstance(models, (list, tuple)):
        files.check_option("model", models, len, "at least one model")
        loaded = [m if m == "phantom" else _as_trained(m, modalities) for m in models]
        others = [trained for m in loaded if m != "phantom" for trained in m]
        if modalities is None and others and "phantom" in loaded:
            modalities = _choose_modalities(others[0], None)
        phantom = load_model("phantom", modalities) if "phantom" in loaded else None
        return [t for m in loaded for t in ([phantom] if m == "phantom" else m)]
    if isinstance(models, keras.Model):
        check_model(models)
        models = TrainedModel(models, {})
    loaded = isinstance(models, TrainedModel)
    return [models if loaded else load_model(models, modalities)]


def _gaussian(shape):
    """Return the weights of a patch: high at its centre, low at its border."""
    # Distances in standard deviations; a patch is 8 of them wide.
    distances = ((np.arange(n) - (n - 1) / 2) / (n / 8) for n in shape)
    x, y, z = (np.exp(-0.5 * d**2).astype(np.float32) for d in distances)
    return (x[:, None, None] * y[:, None] * z)[..., None]  # (X, Y, Z, 1)


def _starts(size, patch):
    """Return the starts of windows that cover `size`, at most half a `patch` apart."""
    n = math.ceil(2 * (size - patch) / patch) + 1
    return np.linspace(0, size - patch, n).round().astype(int)


def _slide(model, image, patch_shape):
    """Return the Gaussian-weighted mean of the probabilities of overlapping patches."""
    padded, weights = volumes.pad(image, patch_shape), _gaussian(patch_shape)
    total = np.zeros((*padded.shape[:3], model.output_shape[-1]), np.float32)
    divisor = np.zeros((*padded.shape[:3], 1), np.float32)
    starts = map(_starts, padded.shape, patch_shape)
    for corner in itertools.product(*starts):
        box = tuple(slice(i, i + n) for i, n in zip(corner, patch_shape, strict=True))
        total[box] += weights * model.predict_on_batch(padded[box][None])[0]
        divisor[box] += weights
    total /= divisor
    return total


def _predict_once(model, image, patch_shape):
    """Predict an image in patches, or in one pass if `patch_shape` is None."""
    if patch_shape is not None:
        probabilities = _slide(model, image, patch_shape)
    else:
        factor = size_factor(model)
        shape = [math.ceil(n / factor) * factor for n in image.shape[:3]]
        probabilities = model.predict_on_batch(volumes.pad(image, shape)[None])[0]
    return probabilities[tuple(map(slice, image.shape[:3]))]


def _choose_patch(model, channels, patch_shape):
    """Return the shape of patches to predict, None for one pass; raise if none fits."""
    volumes.check_shape(patch_shape, "patch_shape")
    sizes = model.input_shape[1:-1]  # None where any size is accepted
    same_grid = model.output_shape[1:-1] == sizes
    if len(sizes) != 3 or not same_grid or channels != model.input_shape[-1]:
        raise ValueError(
            f"the model maps {model.input_shape} to {model.output_shape}; expected "
            f"(batch, X, Y, Z, {channels}) to the same grid"
        )
    patch = sizes if patch_shape is None else tuple(patch_shape)
    factor = size_factor(model) if None in sizes else 1
    takes = f"multiples of {factor} in {sizes}" if factor > 1 else sizes
    pairs = zip(patch, sizes, strict=True)
    fits = all(n == size if size else n and n % factor == 0 for n, size in pairs)
    if not fits and patch_shape is not None:
        raise ValueError(f"patch_shape is {patch}, the model takes patches of {takes}")
    return None if None in patch else patch


def predict_probabilities(model, image, *, flips=False, patch_shape=None):
    """Return a model's probabilities for every voxel of a standardised image.

    Parameters
    ----------
    model : keras.Model, TrainedModel or path, or list of them
        (B, X, Y, Z, C) -> (B, X, Y, Z, K). If it accepts any spatial size, the image is
        predicted in one pass, padded with zeros to the multiple the model needs. The
        probabilities of several models (an ensemble) are averaged.
    image : (X, Y, Z, C) float32 array
        Of any size, in LPS order, as `standardise` gives it.
    flips : bool
        Average over the image and its 7 mirror images: 8 times the work.
    patch_shape : tuple of 3 int, optional
        Predict patches of this shape, at most half a patch apart, and average them with
        Gaussian weights. This needs less memory than one pass. Models of
        fixed input size always do this.

    Returns
    -------
    probabilities : (X, Y, Z, K) float32 array
    spread : (X, Y, Z) float32 array
        SD over models and mirror images, the largest of all channels; zeros for a
        single pass. Where it is large, do not trust the prediction.

    Raises
    ------
    ValueError
        If the input or output of a model does not fit, or `patch_shape` does not.
    """
    models, total, squares = _as_trained(model), 0, 0
    files.check_option("flips", flips, *files.BOOL)
    if np.ndim(image) != 4:
        raise ValueError(f"image has shape {np.shape(image)}, expected (X, Y, Z, C)")
    # The axes along which to flip: none first, then single axes, pairs and all three.
    counts = range(4) if flips else [0]
    flipped_axes = [a for n in counts for a in itertools.combinations(range(3), n)]
    n_passes = len(models) * len(flipped_axes)
    for network in (trained.model for trained in models):
        shape = _choose_patch(network, np.shape(image)[-1], patch_shape)
        for axes in flipped_axes:
            found = np.flip(_predict_once(network, np.flip(image, axes), shape), axes)
            if n_passes == 1:
                return found, np.zeros(found.shape[:3], np.float32)
            total, squares = total + found, squares + found**2
    mean = total / n_passes
    return mean, np.sqrt(np.maximum(squares / n_passes - mean**2, 0)).max(axis=-1)


def _choose_modalities(trained, modalities):
    """Return a model's channels: as given, as in its description, or the usual ones."""
    n_channels = trained.model.input_shape[-1]
    stored = trained.description.get("modalities") or CHANNELS.get(trained.model)
    usual = {3: labels.MODALITIES, 4: labels.ALL_MODALITIES}.get(n_channels, ())
    if modalities is None:  # guess for models in memory, not from a file
        modalities = stored or (usual if trained.path is None else ())
    valid = isinstance(modalities, (list, tuple)) and len(modalities) == n_channels
    valid = valid and {*labels.ALL_MODALITIES}.issuperset(map(str, modalities))
    if not valid or stored and [*modalities] != [*stored]:
        problem = f"modalities is {modalities!r}, {trained.path or 'the model'} takes "
        which = f"say which of {labels.ALL_MODALITIES} they are, in order: modalities="
        takes = f"{n_channels} channels; {which}(...)"
        takes = f"{stored}, the same for all models" if valid else takes
        raise ValueError(problem + takes)
    return modalities


def _fill_in(trained, options):
    """Return options, with None replaced by the value in a model's description."""
    stored = trained.description | trained.description.get("decoding", {})
    return {k: stored.get(k) if v is None else v for k, v in options.items()}


def check_options(models, options, possible=OPTIONS):
    """Raise if the models do not fit each other or an option is invalid.

    Parameters
    ----------
    models : list of TrainedModel
    options : dict
        Keyword arguments of `predict_case`.
    possible : sequence of str
        Names of the allowed options.

    Raises
    ------
    ValueError
        Names the option, its value and what is possible.
    """
    check = files.check_option
    unknown = [name for name in options if name not in possible]
    check("options", unknown, lambda names: not names, f"some of {possible}")
    outputs = sorted({each.model.output_shape[-1] for each in models})
    check("the models' outputs", outputs, ([3], [4]).__contains__, "all 3, or all 4")
    given = _fill_in(models[0], dict.fromkeys(OPTIONS) | options)
    names = given["modalities"]
    for each in models:
        if each.path:  # do not guess a file's channels from those of the first model
            _choose_modalities(each, options.get("modalities"))
        names = _choose_modalities(each, names)
        _choose_patch(each.model, len(names), given["patch_shape"])
    check("engine", options.get("engine", "keras"), ENGINES.__contains__, ENGINES)
    for name in ("flips", "uncertainty"):
        check(name, options.get(name, False), *files.BOOL)
    _check_decoding(**{name: given[name] for name in PLAIN})


def _choose_engine(models, engine):
    """Return the models, converted if an engine requires it."""
    if engine == "keras":
        return models
    from brats_utils.export import to_openvino  # imports openvino if it is installed

    return [to_openvino(trained) for trained in models]


def _check_decoding(**decoding):
    """Raise if a decoding option is invalid; None stands for its default."""
    given = {name: PLAIN[name] if x is None else x for name, x in decoding.items()}
    check, share = files.check_option, files.number(0, 1)
    thresholds, expected = given["thresholds"], "three numbers from 0 to 1"
    check("thresholds", thresholds, files.are(3, share[0]), expected)
    check("min_island", given["min_island"], *share)
    check("min_et_voxels", given["min_et_voxels"], *files.whole(0))


def predict_scan(models, case, *, modalities=None, flips=False, patch_shape=None):
    """Predict the probabilities of a scan, inside the bounding box of its brain.

    Parameters
    ----------
    models : list of TrainedModel
    case, modalities, flips, patch_shape
        As in `predict_case`.

    Returns
    -------
    prediction : Prediction

    Raises
    ------
    BratsDataError, ValueError
        As `predict_case` does.
    """
    names = _choose_modalities(models[0], modalities)
    optional = set.intersection(*({*m.description.get("optional", ())} for m in models))
    there = getattr(case, "images", ())  # what is no Case is refused below
    taken = {i: m for i, m in enumerate(names) if m in there or m not in optional}
    scan = read_scan(case, [*taken.values()], labelled=False)
    nifti.check_spacing(scan.header, case.id)
    for doubt in scan.doubts:
        warnings.warn(f"{case.id}: {doubt}", stacklevel=2)
    for name, volume in zip(taken.values(), scan.volumes, strict=True):
        volumes.check_outliers(volume, case.images[name])
        volumes.check_grey_levels(volume, path=case.images[name])
    box = volumes.bounding_box(scan.brain_mask)
    # All non-zero voxels are in the box, so mean and SD are those of the whole scan.
    stacked = np.stack([volume[box] for volume in scan.volumes], axis=-1)
    image = np.zeros((*stacked.shape[:3], len(names)), np.float32)
    image[..., [*taken]] = volumes.standardise(stacked)
    options = _fill_in(models[0], {"flips": flips, "patch_shape": patch_shape})
    found, spread = predict_probabilities(models, image, **options)
    if not np.isfinite(found).all():
        raise ValueError(f"{case.id}: the model's output is NaN; its training failed")
    if found.min() < -0.01 or found.max() > 1.01:
        problem = f"outputs lie in {found.min():.3g} ... {found.max():.3g}, expected "
        raise ValueError(f"{case.id}: {problem}probabilities: end it with a softmax")
    outside = ~scan.brain_mask[box]
    found[outside, -3:] = 0  # no tumour outside the brain, and no doubt
    spread[outside] = 0
    return Prediction(scan, box, found, spread)


def predict_case(
    model,
    case,
    *,
    modalities=None,
    flips=False,
    patch_shape=None,
    thresholds=None,
    min_island=None,
    min_et_voxels=None,
    uncertainty=False,
    engine="keras",
):
    """Predict the label map of a whole scan, on the scan's own grid.

    Parameters
    ----------
    model : keras.Model, TrainedModel or path, or list of them
        Four output channels are the labels 0 to 3, three are the regions WT, TC and ET.
        Several models form an ensemble, which uses the description of the first one.
    case : Case
        Its segmentation, if it has one, is not read.
    modalities : sequence of str, optional
        The channels, in order. By default those that the model was trained with, which
        cannot be changed. A case may lack those that the model's description calls
        "optional"; their channel is then 0. For the path "phantom" they can also be
        left out here, and are if another model of an ensemble lacks them. If the
        channels are unknown, a file needs this argument; a `keras.Model` defaults to
        FLAIR, T1CE, T2 or, with four channels, to all.
    flips, patch_shape
        As in `predict_probabilities`. The default shape is that of the training
        patches, if the model has a description.
    thresholds, min_island, min_et_voxels : optional
        As in `decode_probabilities`. By default, what `evaluation.tune_model` stored.
    uncertainty : bool
        Also return the spread over flips and models.
    engine : {"keras", "openvino"}
        What runs the network: Keras's backend, or OpenVINO on the CPU, in int8 if
        `export.calibrate_int8` has prepared the model for it, else in float32.

    Returns
    -------
    segmentation : (X, Y, Z) uint8 array
        Values 0, 1, 2 and 4; 0 where all modalities are 0, outside the brain.
    uncertainty : (X, Y, Z) float32 array
        Only if requested; see `predict_probabilities`.

    Raises
    ------
    BratsDataError
        If a file of the case is not valid, or its voxels are not 1 mm wide.
    ImportError
        If OpenVINO is requested but not installed.
    ValueError
        If a model does not fit, or its output is NaN or not a probability.
    """
    options = {"modalities": modalities, "flips": flips, "patch_shape": patch_shape}
    options |= {"thresholds": thresholds, "min_island": min_island}
    options["min_et_voxels"] = min_et_voxels
    models = _as_trained(model, modalities)
    check_options(models, {**options, "uncertainty": uncertainty, "engine": engine})
    models = _choose_engine(models, engine)
    segmentation, spread, _ = _predict_maps(models, case, **options)
    return (segmentation, spread) if uncertainty else segmentation


def _predict_maps(models, case, **options):
    """Return the label map, the spread and the header of their grid."""
    decoding = _fill_in(models[0], {name: options.pop(name, None) for name in PLAIN})
    found = predict_scan(models, case, **options)
    segmentation = decode_probabilities(found.probabilities, **decoding)
    return found.place(segmentation), found.place(found.spread), found.scan.header


def _fingerprint(trained):
    """Return a checksum of everything in a model that affects its predictions."""
    digest = hashlib.sha256(json.dumps(describe_model(trained.model)).encode())
    names = ["modalities", "patch_shape", "decoding"]
    if "engine" in trained.description:  # not for Keras, to match older checksums
        names += ["engine", "int8"]
    digest.update(json.dumps([trained.description.get(n) for n in names]).encode())
    for weights in trained.model.get_weights():
        digest.update(np.ascontiguousarray(weights))
    return digest.hexdigest()


def predict_cases(model, cases, out_dir, *, uncertainty=False, **options):
    """Predict many cases and write each as `<case id>.nii.gz`.

    Cases already predicted there by the same model with the same options are skipped.
    Predictions of another model are replaced; as soon as one of them is, `score_cases`
    refuses the rest. A case that cannot be predicted does not stop the others: one
    error at the end lists all such cases.

    Parameters
    ----------
    model, **options
        As in `predict_case`.
    cases : sequence of Case
        With or without segmentations.
    out_dir : path
        Absent, empty or written by this function.
    uncertainty : bool
        Also write the spread as `uncertainty/<case id>.nii.gz`, float32.

    Returns
    -------
    paths : list of Path
        One for each case: uint8, values 0, 1, 2 and 4, on the case's own grid.

    Raises
    ------
    BratsDataError, ValueError
        As in `predict_case`; or if `out_dir` holds something else, or a label map that
        was edited since it was written.
    """
    models, failed = _as_trained(model, options.get("modalities")), []
    check_options(models, {**options, "uncertainty": uncertainty})
    cases = check_distinct(cases)
    files.check_option("cases", cases, len, "one Case or more")
    models = _choose_engine(models, options.pop("engine", "keras"))
    made_from = {"options": options, "uncertainty": uncertainty}
    made_from["models"] = [_fingerprint(trained) for trained in models]
    made_from = json.loads(json.dumps(made_from, default=lambda x: x.tolist()))
    parts = ["", "uncertainty/"] if uncertainty else [""]
    names = {case.id: [f"{part}{case.id}.nii.gz" for part in parts] for case in cases}
    sources = {path.parent for case in cases for path in case.images.values()}
    with files.OutputFolder(out_dir, "predictions", inputs=sources) as output:
        nifti.check_unedited(output.path, output.manifest["files"])
        output.claim(name for each in names.values() for name in each)
        for case in files.progress_bar(cases, desc="predicting", unit="case"):
            recorded = {n: output.manifest["files"][n] for n in names[case.id]}
            try:
                scans = nifti.file_states(case.images.values())
                same_call = output.manifest["made_from"] == made_from
                done = same_call and output.manifest["cases"].get(case.id) == scans
                if not done or files.find_changed(output.path, recorded):
                    found = _predict_maps(models, case, **options)
                    if not same_call:  # keep the old ones until there is a new one
                        output.manifest["cases"] = {}
                    if not same_call and not uncertainty:
                        output.remove(n for n in output.manifest["files"] if "/" in n)
                    output.manifest["files"] |= dict.fromkeys(names[case.id])
                    # Before the maps: if the process is killed in between, a new map
                    # must not be recorded as one of the old model.
                    output.begin(made_from)
                    _write_maps(output, names[case.id], *found)
                    output.note_case(case.id, scans)
            except (ValueError, FileNotFoundError) as error:
                failed.append(str(error))
        if failed:
            problem = f"{len(failed)} of {len(cases)} cases could not be predicted: "
            raise BratsDataError(problem + " | ".join(failed))
    return [output.path / names[case.id][0] for case in cases]


def _write_maps(output, names, found, spread, header):
    """Write the label map of a case and, if there is a second name, its uncertainty."""
    with output.write(names[0]) as temporary:
        nifti.write_segmentation(found, header, temporary)
    for name in names[1:]:
        with output.write(name) as temporary:
            nifti.save_volume(spread, temporary, like=header)


def _check_probabilities(probabilities):
    """Return probabilities as an array, and how many channels they have: 3 or 4."""
    probabilities = np.asarray(probabilities)
    n_channels = (0, *probabilities.shape)[-1]  # 0 for a single number
    if n_channels not in (3, 4) or not np.issubdtype(probabilities.dtype, np.number):
        problem = "probabilities: expected 4 channels (labels) or 3 (WT, TC, ET)"
        found = f"got {n_channels} of {probabilities.dtype} {probabilities.shape}"
        raise ValueError(f"{problem}, {found}")
    return probabilities, n_channels


def region_probabilities(probabilities):
    """Return the probabilities of WT, TC and ET from either kind of model output.

    Parameters
    ----------
    probabilities : (..., K) float array
        K = 3: of the regions themselves. K = 4: of the labels 0 to 3, which are summed
        over each region.

    Returns
    -------
    regions : (..., 3) float array

    Raises
    ------
    ValueError
        If K is neither.
    """
    probabilities, n_channels = _check_probabilities(probabilities)
    if n_channels == 3:
        return probabilities
    regions = labels.ENCODED_REGIONS.values()
    members = [probabilities[..., list(values)].sum(-1) for values in regions]
    return np.stack(members, axis=-1)


def decode_probabilities(
    probabilities, *, thresholds=None, min_island=0.0, min_et_voxels=0
):
    """Convert a model's probabilities to BraTS labels.

    Parameters
    ----------
    probabilities : (..., K) float array
        K = 4: of the labels 0 to 3. K = 3: of the regions WT, TC and ET.
    thresholds : sequence of 3 float, optional
        A region counts where its probability is above its threshold, TC only within
        WT, and ET only within TC. By default, the most probable of four labels is
        chosen, and each of three regions counts above 0.5.
    min_island : float
        Drop the connected components of the whole tumour that are smaller than this
        share of the largest one; 0 keeps all, 1 keeps the largest only.
    min_et_voxels : int
        If fewer enhancing voxels than this are found, relabel them as core (label 1):
        in a case without any, a few stray voxels would reduce the Dice from 1 to 0.

    Returns
    -------
    segmentation : (...) uint8 array
        Values 0, 1, 2 and 4.

    Raises
    ------
    ValueError
        If K is neither.

    Examples
    --------
    >>> decode_probabilities([[0.9, 0.8, 0.2], [0.9, 0.2, 0.8], [0.1, 0.9, 0.9]])
    array([1, 2, 0], dtype=uint8)
    """
    sizes = {"min_island": min_island, "min_et_voxels": min_et_voxels}
    _check_decoding(thresholds=thresholds, **sizes)
    if _check_probabilities(probabilities)[1] == 4 and thresholds is None:
        segmentation = labels.decode_labels(np.argmax(probabilities, axis=-1))
    else:
        regions = region_probabilities(probabilities)
        thresholds = PLAIN["thresholds"] if thresholds is None else thresholds
        above = regions > np.array(thresholds, regions.dtype)
        nested = np.logical_and.accumulate(above, axis=-1)
        # The label of a voxel in 0, 1 (WT), 2 (WT, TC) or 3 (WT, TC, ET) regions.
        segmentation = np.array([0, 2, 1, 4], np.uint8)[nested.sum(axis=-1)]
    if min_island:
        volumes.drop_islands(segmentation, min_island)
    if np.count_nonzero(segmentation == 4) < (min_et_voxels or 0):
        segmentation[segmentation == 4] = 1
    return segmentation

"""Write synthetic BraTS-like patients, in the data set's own folders and names.

Nothing here is a real scan. Sizes, contrasts, textures and their spreads are set to
figures measured on 25 real labelled BraTS cases, so that a score on these patients
says something of a recipe; it says nothing of a real patient.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from scipy import ndimage

from brats_utils.cases import ALL_MODALITIES, Case, save_volume

FULL_SHAPE = (240, 240, 155)
SETS = {
    "Training": Path("BraTS2020_TrainingData", "MICCAI_BraTS2020_TrainingData"),
    "Validation": Path("BraTS2020_ValidationData", "MICCAI_BraTS2020_ValidationData"),
}
MARKER = "PHANTOMS.txt"
ODD_NAME, ODD_INDEX = "W39_1998.09.19_Segm", 2
CENTRE_MM = np.array([118.5, 128.5, 78.0])

# Per modality, in SDs of the brain: CSF and grey matter above white matter, vessels
# and dura, the caps of the ventricles.
TISSUES = {
    "flair": (-2.0, 0.8, 0.0, 1.2),
    "t1": (-2.4, -0.8, 0.2, 0.0),
    "t1ce": (-2.1, -0.3, 2.7, 0.0),
    "t2": (3.2, 0.6, 0.0, 0.2),
}
# Textures over 1.5, 3, 8 and 25 mm that the modalities share, over 3 and 25 mm (bias
# field) of each one's own; noise; and texture of tumour over 4 mm.
TEXTURE_MM = (1.5, 3, 8, 25, 3, 25)
TEXTURES = {
    "flair": ((0.10, 0.38, 0.33, -0.36, 0.00, 0.30), 0.07, 0.80),
    "t1": ((-0.10, 0.54, 0.43, 0.42, 0.00, 0.14), 0.05, 0.20),
    "t1ce": ((-0.10, 0.37, 0.07, 0.49, 0.51, 0.30), 0.07, 0.50),
    "t2": ((0.10, 0.48, 0.12, -0.06, 0.00, 0.05), 0.05, 0.70),
}
# Oedema, necrosis and enhancing tumour above normal brain: mean, SD over cases.
CONTRASTS = {
    "flair": ((2.1, 0.7), (2.6, 0.9), (2.5, 0.9)),
    "t1": ((0.1, 0.3), (-0.5, 0.45), (-0.1, 0.45)),
    "t1ce": ((-0.1, 0.3), (-0.6, 0.4), (2.1, 0.75)),
    "t2": ((1.1, 0.45), (2.2, 0.6), (1.45, 0.6)),
}
# Raw mean of the brain (median, lowest, highest over cases), its SD / mean, hottest
# voxel / 99.5th percentile.
SCANNER = {
    "flair": ((198, 117, 14035), 0.36, 1.6),
    "t1": ((382, 210, 9447), 0.26, 1.8),
    "t1ce": ((417, 47, 9592), 0.30, 2.0),
    "t2": ((442, 115, 11794), 0.39, 1.3),
}


def _stretch(coarse, shape):
    """Interpolate a volume linearly to `shape`, first voxel to first, last to last."""
    for axis, size in enumerate(shape):
        where = np.linspace(0, coarse.shape[axis] - 1, size)
        low = np.minimum(where.astype(int), max(coarse.shape[axis] - 2, 0))
        weight = np.expand_dims(where - low, [a for a in range(3) if a != axis])
        weight = weight.astype(np.float32)
        high = np.minimum(low + 1, coarse.shape[axis] - 1)
        below = coarse.take(low, axis)
        coarse = below + weight * (coarse.take(high, axis) - below)
    return coarse


def _field(rng, shape, length):
    """Draw a smooth random field of mean 0 and SD 1; `length` in voxels per axis."""
    length = np.maximum(np.broadcast_to(length, 3), 0.4)
    step = np.maximum(length / 1.5, 1)
    size = np.ceil(np.array(shape) / step).astype(int) + 2
    noise = rng.standard_normal(size, np.float32)
    noise = ndimage.gaussian_filter(noise, length / step, truncate=3)
    return _stretch((noise - noise.mean()) / noise.std(), shape)


def _grain(rng, shape, passes):
    """Draw noise of SD 1 that `passes` of a binomial filter correlate over ~1 mm."""
    noise = rng.standard_normal(shape, np.float32)
    for _ in range(passes):
        for axis in range(3):
            view = np.moveaxis(noise, axis, 0)
            view[:-1] += view[1:]
    return noise / noise.std()


def _rise(x, width):
    """Return a soft step from 0 to 1 at x = 0, some four `width` wide."""
    return 1 / (1 + np.exp(-np.clip(x / width, -30, 30)))


def _ball(points, centre, half_axes, power=2.0):
    """Return millimetres inside (+) or outside (-) of an ellipsoid, about."""
    half_axes = np.asarray(half_axes, np.float32)
    radius = sum(
        np.abs((p - c) / h) ** power
        for p, c, h in zip(points, centre, half_axes, strict=True)
    ) ** (1 / power)
    return (1 - radius) * half_axes.min()


def _brain(rng, points, mm):
    """Return signed depth maps in mm: cerebrum, and cerebellum with brain stem."""
    size = rng.normal(1, 0.02) * rng.normal(1, 0.015, 3)
    points = [(p - c) / s + c for p, c, s in zip(points, CENTRE_MM, size, strict=True)]
    shape = np.broadcast_shapes(*(p.shape for p in points))
    bumps = 1.5 * _field(rng, shape, 14 / mm)
    cerebrum = _ball(points, (118.5, 128.5, 84), (69, 85, 55), 2.05) + bumps
    lower = _ball(points, (118.5, 172, 36), (48, 33, 28), 2.1) + 0.5 * bumps
    stem = _ball(points, (118.5, 150, 22), (13, 14, 40), 3)
    return cerebrum, np.maximum(lower, stem)


def _csf_distances(rng, points, mm, cerebrum, lower, depth):
    """Return mm to the nearest fold or surface, mm to the ventricles, the folds."""
    x, y, z = (p - c for p, c in zip(points, CENTRE_MM, strict=True))
    fold = _field(rng, depth.shape, 5 / mm)
    sulcus = 6.5 * np.abs(fold) + 0.5 * np.maximum(depth - 18, 0)
    beyond = (y / 62) ** 2 + ((z - 2) / 24) ** 2 - 1
    fissure = np.abs(x + 1.5 * fold) + 20 * np.maximum(-beyond, 0)
    tentorium = np.abs(cerebrum - lower)
    cortex = np.minimum.reduce([depth, sulcus, fissure, tentorium])
    wide = rng.uniform(4, 8)
    across = np.abs(x) - (wide + 3 + 0.005 * y**2)
    up = (z - 12 + 0.01 * y**2) / 1.4
    body = np.sqrt(across**2 + up**2 + np.maximum(np.abs(y) - 32, 0) ** 2) - wide
    third = np.maximum.reduce([np.abs(x) - 2, np.abs(y) - 14, np.abs(z + 3) - 14])
    return cortex, np.minimum(body, third) + 0.8 * fold, fold


def _anatomy(rng, shape):
    """Draw a head without tumour.

    Returns
    -------
    window : tuple of 3 slices
        The brain's box in the volume.
    size : list of 3 int
        Voxels of that box.
    mm : (3,) array
        Voxel size on a head of full size: 1 at the full shape, 10 at a tenth of it.
    maps : dict of str to float32 array
        Distances in mm and coordinates, on a grid of half the box's resolution.
    """
    mm = np.array(FULL_SHAPE) / shape
    factor = 2 if min(shape) >= 64 else 1
    index = np.meshgrid(*(np.arange(0, n, factor) for n in shape), indexing="ij")
    grid = [(i * s).astype(np.float32) for i, s in zip(index, mm, strict=True)]
    cerebrum, lower = _brain(rng, grid, mm * factor)
    solid = np.maximum(cerebrum, lower)
    box = ndimage.find_objects((solid > 0).astype(np.uint8))[0]
    size = [(b.stop - b.start - 1) * factor + 1 for b in box]
    window = tuple(
        slice(b.start * factor, b.start * factor + n)
        for b, n in zip(box, size, strict=True)
    )
    cerebrum, lower, solid, *grid = (v[box] for v in (cerebrum, lower, solid, *grid))
    edge = np.pad(solid > 0, 1)
    edge = ndimage.distance_transform_edt(edge, sampling=mm * factor)
    depth = edge[1:-1, 1:-1, 1:-1].astype(np.float32)
    cortex, ventricle, fold = _csf_distances(
        rng, grid, mm * factor, cerebrum, lower, depth
    )
    maps = {"solid": solid, "depth": depth, "cortex": cortex, "ventricle": ventricle}
    maps |= {"fold": fold, "cerebrum": cerebrum}
    maps |= dict(zip("xyz", grid, strict=True))
    return window, size, mm, maps


def _top(values, n):
    """Return the threshold that the `n` highest of `values` reach."""
    n = int(np.clip(n, 1, len(values)))
    return np.partition(values, len(values) - n)[len(values) - n]


def _volumes(rng, n_brain, enhances):
    """Draw how many voxels whole tumour, core and enhancing tumour shall have."""
    whole = np.clip(rng.lognormal(np.log(88), 0.6), 25, 230) / 1471
    core = np.clip(rng.normal(0.43, 0.14), 0.15, 0.75) * whole
    enhancing = np.clip(rng.normal(0.45, 0.13), 0.2, 0.75) * core
    sizes = np.array([whole, core, enhancing * enhances]) * n_brain
    # Small shapes: a voxel of each class at least.
    n_core = max(2, round(sizes[1]))
    n_enhancing = max(1, min(round(sizes[2]), n_core - 1)) if enhances else 0
    return max(n_core + 1, round(sizes[0])), n_core, n_enhancing


def _tumour_maps(rng, maps, mm):
    """Draw the coarse maps, in mm, whose highest parts are whole tumour and core."""
    room = maps["cerebrum"] - 12 * (maps["ventricle"] < 6) - 12 * (maps["z"] < 40)
    room = room - 12 * (maps["y"] > 174)
    x = maps["x"] - CENTRE_MM[0]
    room = room - 0.3 * np.maximum(20 - np.abs(x), 0)
    seats = np.flatnonzero(room >= min(rng.uniform(3, 16), room.max() * 0.9))
    seat = rng.choice(seats)
    centre = [maps[axis].flat[seat] for axis in "xyz"]
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0] * rng.uniform(0.8, 1.25, 3)
    offset = [maps[axis] - c for axis, c in zip("xyz", centre, strict=True)]
    length = sum(
        (sum(a * o for a, o in zip(row, offset, strict=True))) ** 2 for row in turn.T
    )
    radius = -np.sqrt(length).astype(np.float32)
    shape = x.shape
    rough = 4.5 * _field(rng, shape, 10 / mm) + 2.5 * _field(rng, shape, 4 / mm)
    across = np.maximum(-np.sign(centre[0] - CENTRE_MM[0]) * x, 0)
    barrier = rng.choice([0.1, 3.0], p=[0.4, 0.6]) * np.minimum(across, 8)
    fluid = np.minimum(maps["ventricle"] - 1, maps["cortex"] * 0.7)
    spread = 2.0 * np.clip(fluid - 2.5, -5, 1)
    whole = radius + rng.uniform(1.0, 1.9) * rough + spread - barrier
    core = radius + 0.6 * rough + 3.0 * _field(rng, shape, 12 / mm) - 0.5 * barrier
    return whole, core


def _tumour(rng, maps, mm, inside, size, enhances):
    """Draw the label of every brain voxel, and how far it lies within each class.

    Returns
    -------
    labels : (N,) uint8 array
        0, 1, 2 or 4 for each brain voxel.
    parts : list of 3 (N,) float32 arrays
        Soft membership, 0 to 1: whole tumour, core, enhancing tumour.
    """
    factor_mm = mm * (2 if max(size) > maps["solid"].shape[0] * 1.5 else 1)
    whole, core = (
        _stretch(m, size)[inside] for m in _tumour_maps(rng, maps, factor_mm)
    )
    speckle = _grain(rng, size, 2)[inside]
    n_whole, n_core, n_enhancing = _volumes(rng, len(whole), enhances)
    whole += 1.0 * speckle
    limit = _top(whole, n_whole)
    labels = np.where(whole >= limit, 2, 0).astype(np.uint8)
    parts = [_rise(whole - limit, 0.6)]
    core += 0.7 * speckle
    limit = _top(core[labels > 0], n_core)
    parts.append(_rise(core - limit, 0.5) * parts[0])
    tumour_core = (labels > 0) & (core >= limit)
    labels[tumour_core] = 1
    patch = _field(rng, size, 3 / mm)[inside]
    ring = 3 * np.tanh((limit - core) / 4)
    ring += rng.uniform(0.5, 2) * patch - 4 * np.maximum(speckle - 2.2, 0)
    if n_enhancing:
        limit = _top(ring[tumour_core], n_enhancing)
        labels[tumour_core & (ring >= limit)] = 4
        parts.append(_rise(ring - limit, 0.3) * parts[1])
    else:
        parts.append(np.zeros_like(whole))
    return labels, parts


def _contrasts(rng, modality):
    """Draw a case's three class contrasts, which rise and fall together by half."""
    common = np.clip(rng.standard_normal(), -1.6, 1.6)
    drawn = []
    for mean, spread in CONTRASTS[modality]:
        own = np.clip(rng.standard_normal(), -1.6, 1.6)
        drawn.append(mean + spread * (0.75 * common + 0.66 * own))
    oedema, necrosis, enhancing = drawn
    if modality == "t1ce":
        enhancing = max(enhancing, necrosis + 1.2)
    return oedema, necrosis, enhancing


def _tissue_maps(rng, maps, size, mm, inside):
    """Return the shares of CSF, grey matter, vessels and caps in each brain voxel."""
    fine = {
        k: _stretch(maps[k], size)[inside]
        for k in ("depth", "cortex", "ventricle", "fold")
    }
    csf = _rise(1.0 - np.minimum(fine["cortex"], fine["ventricle"]), 0.4)
    grey = _rise(4.5 - fine["cortex"], 0.5) * (1 - csf)
    other = _field(rng, size, 6 / mm)[inside]
    tubes = np.exp(-(fine["fold"] ** 2 + other**2) / 0.05)
    tubes *= _rise(16 - fine["depth"], 2)
    dura = _rise(2.0 - fine["depth"], 0.5) * np.maximum(other, 0)
    caps = np.exp(-np.abs(fine["ventricle"] - 2) / 3)
    return csf, grey, np.maximum(tubes, dura), caps


def _acquire(rng, modality, image, hot, brightness):
    """Turn an image in SDs of the brain into a scanner's raw values, int16."""
    (median, low, high), cv, hottest = SCANNER[modality]
    image = (image - image.mean()) / image.std()
    raw = np.maximum(1 + cv * rng.uniform(0.85, 1.15) * image, 0.02)
    bright = np.percentile(raw[::7], 99.5)
    raw = np.minimum(raw, 1.15 * bright)
    raw = np.maximum(raw, hot * hottest * rng.uniform(0.9, 1.1) * bright)
    mean = np.clip(median * brightness * rng.lognormal(0, 0.3), low, high)
    return np.clip(np.rint(raw * mean / raw.mean()), 1, 32767).astype(np.int16)


def _hot_voxels(rng, maps, size, mm, inside):
    """Return where flow and skin at the brain's edge shine: 0 to 1, nearly all 0."""
    step = mm * np.array(size) / maps["solid"].shape
    hot = _field(rng, maps["solid"].shape, 3 / step) - 0.5 * maps["depth"]
    hot = _stretch(hot, size)[inside]
    hot = np.maximum(hot - _top(hot, len(hot) // 4000 + 1), 0)
    return hot / max(hot.max(), 1e-6)


def _draw_case(rng, shape, index):
    """Draw one patient: {modality: (X, Y, Z) int16} and (X, Y, Z) uint8 labels."""
    window, size, mm, maps = _anatomy(rng, shape)
    inside = _stretch(maps["solid"], size) > 0
    head = _tissue_maps(rng, maps, size, mm, inside)
    labels, parts = _tumour(rng, maps, mm, inside, size, not _is_low_grade(index))
    hot = _hot_voxels(rng, maps, size, mm, inside)
    grid = maps["solid"].shape
    step = mm * np.array(size) / grid
    shared = [_field(rng, grid, length / step) for length in TEXTURE_MM[:4]]
    # Deep white matter is the calmer part.
    calm = 0.35 + _rise(8 - maps["cortex"], 2)
    shared[:3] = [calm * texture for texture in shared[:3]]
    # One case in eight comes from a scanner with values some thirty times higher.
    brightness = rng.lognormal(0, 0.35) * (25 if index % 8 == 3 else 1)

    def place(values):
        volume = np.zeros(shape, values.dtype, order="F")
        volume[window][inside] = values
        return volume

    images = {}
    for modality in ALL_MODALITIES:
        weights, noise, patchiness = TEXTURES[modality]
        own = [_field(rng, grid, length / step) for length in TEXTURE_MM[4:]]
        own[0] *= calm
        texture = sum(w * f for w, f in zip(weights, shared + own, strict=True))
        normal = _stretch(texture, size)[inside]
        for weight, tissue in zip(TISSUES[modality], head, strict=True):
            normal += weight * tissue
        normal -= normal.mean()
        patches = _stretch(_field(rng, grid, 4 / step), size)[inside]
        oedema, necrosis, enhancing = _contrasts(rng, modality)
        tumour = oedema + (necrosis - oedema) * parts[1] + patchiness * patches
        tumour += (enhancing - necrosis) * parts[2]
        image = normal * (1 - 0.5 * parts[0]) + tumour * parts[0]
        image += noise * rng.standard_normal(len(image), np.float32)
        images[modality] = place(_acquire(rng, modality, image, hot, brightness))
    return images, place(labels)


def _write_case(root, kind, index, seed, shape, suffix):
    """Draw and write one patient; return its Case."""
    rng = np.random.default_rng([seed, kind == "Validation", index])
    images, segmentation = _draw_case(rng, shape, index)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    case_id = f"BraTS20_{kind}_{index + 1:03}"
    folder = Path(root) / SETS[kind] / case_id
    paths = {m: folder / f"{case_id}_{m}{suffix}" for m in ALL_MODALITIES}
    for modality, path in paths.items():
        save_volume(images[modality], affine, path)
    if kind == "Validation":
        return Case(case_id, paths)
    name = ODD_NAME if index == ODD_INDEX else f"{case_id}_seg"
    save_volume(segmentation, affine, folder / f"{name}{suffix}")
    return Case(case_id, paths, folder / f"{name}{suffix}")


def _write_tables(root, n_cases, seed):
    """Write stand-ins for the two tables that lie beside the training cases."""
    rng = np.random.default_rng([seed, 2])
    names = "BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID"
    mapping = [f"Grade,{names},BraTS_2019_subject_ID,BraTS_2020_subject_ID"]
    survival = ["Brats20ID,Age,Survival_days,Extent_of_Resection"]
    for index in range(n_cases):
        case_id = f"BraTS20_Training_{index + 1:03}"
        grade = "LGG" if _is_low_grade(index) else "HGG"
        mapping.append(f"{grade},NA,NA,NA,NA,{case_id}")
        age, days = rng.normal(60, 12), rng.lognormal(5.8, 0.8)
        survival.append(f"{case_id},{age:.3f},{days:.0f},NA")
    folder = Path(root) / SETS["Training"]
    (folder / "name_mapping.csv").write_text("\n".join(mapping) + "\n")
    (folder / "survival_info.csv").write_text("\n".join(survival) + "\n")


def _is_low_grade(index):
    """Say whether a case has no enhancing tumour: the 8th, 18th, 28th and so on."""
    return index % 10 == 7


def _check_arguments(n_cases, without_segmentation, shape):
    """Raise if a caller asks for what cannot be drawn."""
    for name, count in (
        ("n_cases", n_cases),
        ("without_segmentation", without_segmentation),
    ):
        if count < 0 or count != int(count):
            raise ValueError(f"{name} counts patients: 0 or more, not {count!r}")
    if n_cases + without_segmentation == 0:
        raise ValueError(
            "n_cases and without_segmentation are both 0: nothing to write"
        )
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape is three sizes of 16 voxels or more, not {shape!r}")


def _clear(root):
    """Remove an earlier call's patients, and refuse to touch any others."""
    for folder in (Path(root) / part.parts[0] for part in SETS.values()):
        if not folder.exists():
            continue
        if not (Path(root) / MARKER).exists():
            raise ValueError(
                f"{folder} is there and was not written by write_phantom; pass another "
                "root, so that no real scan is lost"
            )
        shutil.rmtree(folder)


def write_phantom(
    root,
    n_cases,
    *,
    seed=0,
    shape=FULL_SHAPE,
    without_segmentation=0,
    compressed=False,
    jobs=None,
):
    """Write synthetic BraTS-like patients, in the Kaggle set's folders and names.

    The third training case has a segmentation of another name, as folder 355 of that
    set; the 8th, 18th, 28th... have no enhancing tumour. The same seed gives the same
    bytes, whatever `jobs`, and case i does not depend on how many are written.

    Parameters
    ----------
    root : path
        Folder to write to. Patients of an earlier call in it are replaced.
    n_cases : int
        Training patients, with segmentation.
    seed : int
        Another seed, other patients.
    shape : tuple of 3 int
        Voxels of a volume, 16 or more each; the anatomy is scaled to it.
    without_segmentation : int
        Validation patients, without segmentation, written besides.
    compressed : bool
        Write `.nii.gz` (slower) and not `.nii`.
    jobs : int, optional
        Patients drawn at once, in threads; as many as there are cores by default.

    Returns
    -------
    cases : list of Case
        Training cases, then validation cases, sorted by id.

    Raises
    ------
    ValueError
        If a count is negative or both are 0, `shape` is too small, or `root` holds a
        BraTS set that this function did not write.
    """
    _check_arguments(n_cases, without_segmentation, shape)
    _clear(root)
    Path(root).mkdir(parents=True, exist_ok=True)
    (Path(root) / MARKER).write_text("Synthetic patients, written by write_phantom.\n")
    suffix = ".nii.gz" if compressed else ".nii"
    wanted = [("Training", i) for i in range(n_cases)]
    wanted += [("Validation", i) for i in range(without_segmentation)]
    cases = Parallel(jobs or os.cpu_count(), prefer="threads")(
        delayed(_write_case)(root, kind, index, seed, tuple(shape), suffix)
        for kind, index in wanted
    )
    if n_cases:
        _write_tables(root, n_cases, seed)
    return cases

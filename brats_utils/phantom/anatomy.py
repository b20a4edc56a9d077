"""Draw heads with tumours: a label map and four images, as in BraTS.

Nothing here is a real scan. Sizes, contrasts and textures, and how much they vary, are
set to values measured on 25 real labelled BraTS cases. A score on these patients can
therefore compare training recipes, but it says nothing about real patients.

To save time, smooth maps are drawn at half the resolution and interpolated. Lengths
are in mm of a full-size head, whatever the shape of the volume.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy import ndimage

from brats_utils.cases import ALL_MODALITIES

FULL_SHAPE = (240, 240, 155)
CENTRE_MM = np.array((118.5, 128.5, 78), np.float32)

# Intensities are in SDs of the brain until `_acquire` turns them into raw values.
# Per modality: CSF and grey matter relative to white matter, vessels and dura, the
# rim around the ventricles.
TISSUES = {
    "flair": (-2.0, 0.8, 0.0, 2.2),
    "t1": (-2.4, -0.8, 0.2, 0.0),
    "t1ce": (-2.1, -0.3, 3.1, 0.0),
    "t2": (3.5, 0.5, 0.0, 0.4),
}
# Weights of six textures (the modalities share the first four; the last two, a texture
# and a bias field, are drawn for each), SD of the noise, and weights of two textures of
# the tumour (one shared, the water content, and one drawn for each modality).
TEXTURE_MM, TUMOUR_TEXTURE_MM = (1.5, 3, 8, 25, 3, 25), 2.5
TEXTURES = {
    "flair": ((0.10, 0.42, 0.38, -0.36, 0.00, 0.30), 0.07, (0.80, 0.60)),
    "t1": ((-0.10, 0.54, 0.43, 0.42, 0.00, 0.14), 0.05, (-0.25, 0.10)),
    "t1ce": ((-0.10, 0.37, 0.07, 0.49, 0.51, 0.30), 0.07, (-0.30, 0.45)),
    "t2": ((0.10, 0.66, 0.10, 0.00, 0.00, 0.00), 0.05, (0.75, 0.40)),
}
# Oedema, necrosis and enhancing tumour relative to normal brain: mean, SD over cases.
CONTRASTS = {
    "flair": ((2.0, 0.85), (2.25, 1.15), (2.2, 1.15)),
    "t1": ((0.0, 0.45), (-0.45, 0.65), (-0.15, 0.65)),
    "t1ce": ((-0.15, 0.45), (-0.55, 0.55), (2.6, 1.0)),
    "t2": ((1.2, 0.75), (1.85, 0.95), (1.3, 0.85)),
}
SHARED, OWN = 0.85, 0.53  # weights of what all classes share and of each one's own
# Raw mean of the brain (median, lowest and highest over cases), SD / mean, brightest
# voxel / 99.5th percentile.
SCANNER = {
    "flair": ((198, 117, 14035), 0.36, 1.6),
    "t1": ((382, 210, 9447), 0.26, 1.8),
    "t1ce": ((417, 47, 9592), 0.30, 2.0),
    "t2": ((442, 115, 11794), 0.39, 1.3),
}


def per_axis(values):
    """Reshape three values, one per axis, to broadcast with (3, X, Y, Z).

    Parameters
    ----------
    values : (3,) sequence of float

    Returns
    -------
    shaped : (3, 1, 1, 1) float32 array
    """
    return np.asarray(values, np.float32).reshape(3, 1, 1, 1)


def upsample(coarse, shape):
    """Interpolate a volume linearly to `shape`; the corners keep their values.

    Parameters
    ----------
    coarse : (x, y, z) float32 array
    shape : tuple of 3 int

    Returns
    -------
    volume : float32 array of this shape
    """
    for axis, size in enumerate(shape):
        where = np.linspace(0, coarse.shape[axis] - 1, size)
        low = np.minimum(where.astype(int), coarse.shape[axis] - 2)
        weight = np.expand_dims(where - low, [a for a in range(3) if a != axis])
        below, above = coarse.take(low, axis), coarse.take(low + 1, axis)
        coarse = below + weight.astype(np.float32) * (above - below)
    return coarse


def smooth_noise(rng, shape, length):
    """Draw a random field of mean 0 and SD 1.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape : tuple of 3 int
    length : (3,) array
        SD of the Gaussian filter, in voxels; at least 0.4 is used.

    Returns
    -------
    field : float32 array of this shape
    """
    length = np.maximum(length, 0.4)
    step = np.maximum(length / 1.5, 1)
    size = np.ceil(np.array(shape) / step).astype(int) + 2
    noise = rng.standard_normal(size, np.float32)
    noise = ndimage.gaussian_filter(noise, length / step, truncate=3)
    return upsample((noise - noise.mean()) / noise.std(), shape)


def _speckle(rng, shape):
    """Draw noise of SD 1, correlated over about 1 mm by two binomial filters."""
    noise = rng.standard_normal(shape, np.float32)
    for axis in (0, 1, 2, 0, 1, 2):
        view = np.moveaxis(noise, axis, 0)
        view[:-1] += view[1:]
    return noise / noise.std()


def soft_step(x, width):
    """Return a smooth step from 0 to 1 at x = 0.

    Parameters
    ----------
    x : array
    width : float
        About a quarter of the width of the step.

    Returns
    -------
    y : array of the same shape
    """
    return 1 / (1 + np.exp(-np.clip(x / width, -30, 30)))


def _threshold_of_highest(values, n):
    """Return the `n`-th highest of `values`, with n limited to 1..len(values)."""
    n = int(np.clip(n, 1, len(values)))
    return np.partition(values, len(values) - n)[len(values) - n]


def _ellipsoid(points, centre, half_axes, power=2.0):
    """Return roughly how far points are inside (+) or outside (-) an ellipsoid."""
    half_axes = per_axis(half_axes)
    scaled = np.abs((points - per_axis(centre)) / half_axes)
    radius = (scaled**power).sum(0) ** (1 / power)
    return (1 - radius) * half_axes.min()


@dataclass
class Head:
    """A head without tumour: its place in the volume, and coarse maps of it.

    `window` is the brain's box in the volume and `inside` a mask of the brain in it.
    The other arrays are coarse maps of the box, with voxels of `step_mm`: coordinates
    (3, X, Y, Z) and distances in mm.
    """

    window: tuple
    inside: np.ndarray
    step_mm: np.ndarray
    points: np.ndarray
    cerebrum: np.ndarray  # depth inside the cerebrum
    depth: np.ndarray  # to the surface of the brain
    cortex: np.ndarray  # to the nearest fold or surface
    ventricle: np.ndarray  # to the ventricles, negative inside
    fold: np.ndarray  # a smooth random field, 0 along the folds

    def texture(self, rng, length_mm):
        """Draw a coarse random field of mean 0 and SD 1."""
        return smooth_noise(rng, self.depth.shape, length_mm / self.step_mm)

    def place(self, values, shape):
        """Return a volume of `shape` with values (N,) in the brain and 0 elsewhere."""
        volume = np.zeros(shape, values.dtype, order="F")
        volume[self.window][self.inside] = values
        return volume

    def at_voxels(self, coarse):
        """Return the values of a coarse map at the N voxels of the brain."""
        return upsample(coarse, self.inside.shape)[self.inside]


def _draw_brain(rng, points, step_mm):
    """Return the depth of points in the cerebrum, and in cerebellum or brain stem."""
    size = per_axis(rng.normal(1, 0.02) * rng.normal(1, 0.015, 3))
    points = (points - per_axis(CENTRE_MM)) / size + per_axis(CENTRE_MM)
    bumps = 1.5 * smooth_noise(rng, points.shape[1:], 14 / step_mm)
    cerebrum = _ellipsoid(points, (118.5, 128.5, 84), (69, 85, 55), 2.05) + bumps
    lower = _ellipsoid(points, (118.5, 172, 36), (48, 33, 28), 2.1) + 0.5 * bumps
    stem = _ellipsoid(points, (118.5, 150, 22), (13, 14, 40), 3)
    return cerebrum, np.maximum(lower, stem)


def _draw_csf(rng, points, step_mm, cerebrum, lower, depth, ventricle_mm):
    """Return the maps `cortex`, `ventricle` and `fold` of a head."""
    x, y, z = points - per_axis(CENTRE_MM)
    fold = smooth_noise(rng, depth.shape, 5 / step_mm)
    sulcus = 6.5 * np.abs(fold) + 0.5 * np.maximum(depth - 18, 0)
    beyond = (y / 62) ** 2 + ((z - 2) / 24) ** 2 - 1
    fissure = np.abs(x + 1.5 * fold) + 20 * np.maximum(-beyond, 0)
    tentorium = np.abs(cerebrum - lower)
    cortex = np.minimum.reduce([depth, sulcus, fissure, tentorium])
    wide = rng.uniform(*ventricle_mm)
    across = np.abs(x) - (wide + 3 + 0.005 * y**2)
    up = (z - 12 + 0.01 * y**2) / 1.4
    body = np.sqrt(across**2 + up**2 + np.maximum(np.abs(y) - 32, 0) ** 2) - wide
    third = np.maximum.reduce([np.abs(x) - 2, np.abs(y) - 14, np.abs(z + 3) - 14])
    return cortex, np.minimum(body, third) + 0.8 * fold, fold


def draw_head(rng, shape, *, bend=None, strip=None, ventricle_mm=(3.5, 7)):
    """Draw a head without tumour.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape : tuple of 3 int
        Voxels of the volume.
    bend : function, optional
        (rng, points, step_mm) -> points: changes the shape of the anatomy.
    strip : function, optional
        (rng, height, step_mm) -> height: adds errors of skull-stripping. The height is
        roughly the depth inside the brain in mm; the images show where it is above 0.
    ventricle_mm : (float, float)
        Smallest and largest half width of the lateral ventricles.

    Returns
    -------
    head : Head
    """
    factor = 2 if min(shape) >= 64 else 1
    step_mm = np.array(FULL_SHAPE) / shape * factor
    points = np.indices([-(-n // factor) for n in shape])
    points = (points * step_mm.reshape(3, 1, 1, 1)).astype(np.float32)
    if bend:
        points = bend(rng, points, step_mm)
    cerebrum, lower = _draw_brain(rng, points, step_mm)
    brain = np.maximum(cerebrum, lower)
    box = ndimage.find_objects((brain > 0).astype(np.uint8))[0]
    cerebrum, lower, brain = cerebrum[box], lower[box], brain[box]
    points = points[:, *box]
    depth = ndimage.distance_transform_edt(np.pad(brain > 0, 1), sampling=step_mm)
    depth = depth[1:-1, 1:-1, 1:-1].astype(np.float32)
    csf = _draw_csf(rng, points, step_mm, cerebrum, lower, depth, ventricle_mm)
    window = tuple(slice(b.start * factor, (b.stop - 1) * factor + 1) for b in box)
    shown = strip(rng, brain, step_mm) if strip else brain
    inside = upsample(shown, [part.stop - part.start for part in window]) > 0
    return Head(window, inside, step_mm, points, cerebrum, depth, *csf)


def _draw_tissues(rng, head):
    """Return the shares of CSF, grey matter, vessels and rims in each brain voxel."""
    maps = (head.depth, head.cortex, head.ventricle, head.fold)
    depth, cortex, ventricle, fold = (head.at_voxels(values) for values in maps)
    csf = soft_step(1.0 - np.minimum(cortex, ventricle), 0.4)
    grey = soft_step(4.5 - cortex, 0.5) * (1 - csf)
    other = head.at_voxels(head.texture(rng, 6))
    vessels = np.exp(-(fold**2 + other**2) / 0.05) * soft_step(16 - depth, 2)
    dura = soft_step(2.0 - depth, 0.5) * np.maximum(other, 0)
    return csf, grey, np.maximum(vessels, dura), np.exp(-np.abs(ventricle - 2) / 3)


def _tumour_sizes(draws, n_brain):
    """Return the number of voxels of whole tumour, core and enhancing tumour."""
    whole = 88 * np.exp(0.57 * draws[0]) / 1471  # ml in a brain of 1471 ml
    core = (0.39 + 0.14 * draws[1]) * whole
    enhancing = (0.46 + 0.13 * draws[2]) * core
    # In small volumes, every class gets at least one voxel.
    n_core = max(2, round(core * n_brain))
    n_enhancing = np.clip(round(enhancing * n_brain), 1, n_core - 1)
    return max(n_core + 1, round(whole * n_brain)), n_core, n_enhancing


def _draw_centre(rng, head):
    """Draw the centre of a tumour, in mm: deep in the cerebrum, mostly on one side."""
    x, y, z = head.points
    room = head.cerebrum - 0.3 * np.maximum(20 - np.abs(x - CENTRE_MM[0]), 0)
    room = room - 12 * (head.ventricle < 6) - 12 * (z < 40) - 12 * (y > 182)
    candidates = np.flatnonzero(room >= min(rng.uniform(3, 16), room.max() * 0.9))
    return head.points.reshape(3, -1)[:, rng.choice(candidates)]


def _draw_distance(rng, head, centre):
    """Return the distance to `centre` in mm, stretched along three random axes."""
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0] * rng.uniform(0.8, 1.25, 3)
    offset = head.points - per_axis(centre)
    return np.sqrt(sum((per_axis(axis) * offset).sum(0) ** 2 for axis in axes.T))


def draw_tumour_heights(rng, head, raggedness):
    """Draw two maps whose highest parts are whole tumour and core.

    Parameters
    ----------
    rng : numpy.random.Generator
    head : Head
    raggedness : float
        Factor on the roughness of the surface of the whole tumour.

    Returns
    -------
    whole, core : (N,) float32 array
        In mm, for each voxel of the brain.
    """
    centre = _draw_centre(rng, head)
    height = -_draw_distance(rng, head, centre)
    rough = 4.5 * head.texture(rng, 10) + 2.5 * head.texture(rng, 4)
    # The falx keeps most tumours in their own half of the brain.
    side = -np.sign(centre[0] - CENTRE_MM[0])
    across = np.maximum(side * (head.points[0] - CENTRE_MM[0]), 0)
    falx = rng.choice([0.1, 3.0], p=[0.4, 0.6]) * np.minimum(across, 8)
    # Oedema does not spread into ventricles and folds.
    fluid = np.minimum(head.ventricle - 1, head.cortex * 0.7)
    spread = 2.0 * np.clip(fluid - 2.5, -5, 1)
    whole = height
    if rng.random() < 0.3:  # a second, smaller focus
        second = _draw_distance(rng, head, _draw_centre(rng, head))
        whole = np.maximum(height, -second - 18)
    whole = whole + raggedness * rough + spread - falx
    core = height + 0.6 * rough + 3.0 * head.texture(rng, 12) - 0.5 * falx
    return head.at_voxels(whole), head.at_voxels(core)


def draw_tumour(rng, head, heights, sizes, enhances):
    """Draw the label of every brain voxel, and soft versions of the three regions.

    Parameters
    ----------
    rng : numpy.random.Generator
    head : Head
    heights : pair of (N,) arrays
        From `draw_tumour_heights`.
    sizes : tuple of 3 int
        Voxels of whole tumour, core and enhancing tumour.
    enhances : bool
        Whether there is an enhancing part.

    Returns
    -------
    labels : (N,) uint8 array
        0, 1, 2 or 4 for each brain voxel.
    regions : list of 3 (N,) arrays
        Soft membership, 0 to 1, of whole tumour, core and enhancing tumour.
    """
    speckle = _speckle(rng, head.inside.shape)[head.inside]
    n_whole, n_core, n_enhancing = sizes
    whole, core = heights[0] + speckle, heights[1] + 0.7 * speckle
    limit = _threshold_of_highest(whole, n_whole)
    labels = np.where(whole >= limit, 2, 0).astype(np.uint8)
    regions = [soft_step(whole - limit, 0.8)]
    limit = _threshold_of_highest(core[labels > 0], n_core)
    regions.append(soft_step(core - limit, 0.5) * regions[0])
    in_core = (labels > 0) & (core >= limit)
    labels[in_core] = 1
    if not enhances:
        return labels, [*regions, np.zeros_like(whole)]
    # The enhancing part is a rim of uneven width, with small dark foci.
    rim = 3 * np.tanh((limit - core) / 4) - 4 * np.maximum(speckle - 2.2, 0)
    rim += rng.uniform(0.3, 1.2) * head.at_voxels(head.texture(rng, 3))
    limit = _threshold_of_highest(rim[in_core], n_enhancing)
    labels[in_core & (rim >= limit)] = 4
    return labels, [*regions, soft_step(rim - limit, 0.3) * regions[1]]


def class_contrasts(modality, draws, enhancement=0.0):
    """Return the contrasts of oedema, necrosis and enhancing tumour of a case.

    Parameters
    ----------
    modality : str
    draws : (4,) sequence of float
        A row as in `draw_patient`.
    enhancement : float
        As in `draw_images`; matters on T1CE only.

    Returns
    -------
    contrasts : (3,) array
        In SDs of the brain.
    """
    mean, sd = np.transpose(CONTRASTS[modality])
    contrasts = mean + sd * (SHARED * draws[0] + OWN * np.array(draws[1:]))
    if modality == "t1ce":
        contrasts[2] = max(contrasts[2], contrasts[1] + enhancement)
    return contrasts


def _bright_spots(rng, head):
    """Return a map, 0 to 1, of the few very bright voxels: flow, skin at the edge."""
    spots = head.at_voxels(head.texture(rng, 3) - 0.5 * head.depth)
    spots = np.maximum(spots - _threshold_of_highest(spots, len(spots) // 4000 + 1), 0)
    return spots / max(spots.max(), 1e-6)


def _acquire(rng, modality, image, spots, brightness):
    """Turn an image in SDs of the brain into a scanner's raw values, int16."""
    (median, low, high), sd, brightest = SCANNER[modality]
    image = (image - image.mean()) / image.std()
    raw = np.maximum(1 + sd * rng.uniform(0.85, 1.15) * image, 0.02)
    bright = np.percentile(raw[::7], 99.5)
    raw = np.minimum(raw, 1.15 * bright)
    raw = np.maximum(raw, spots * brightest * rng.uniform(0.9, 1.1) * bright)
    mean = np.clip(median * brightness * rng.lognormal(0, 0.3), low, high)
    return np.clip(np.rint(raw * mean / raw.mean()), 1, 32767).astype(np.int16)


def draw_images(
    rng,
    head,
    draws,
    regions,
    brightness,
    *,
    spread=1.0,
    degrade=None,
    enhancement=1.6,
):
    """Draw the four images of a head.

    Parameters
    ----------
    rng : numpy.random.Generator
    head : Head
    draws : (4, 4) sequence of float
        As in `draw_patient`, without the first row.
    regions : list of 3 (N,) arrays
        From `draw_tumour`.
    brightness : float
        Factor on the raw values.
    spread : float
        Factor on how much tissues and textures vary.
    degrade : function, optional
        (rng, head, image) -> image, (N,) arrays: imitates a worse scanner.
    enhancement : float
        Least contrast of the enhancing tumour to necrosis on T1CE, in SDs of the brain.

    Yields
    ------
    name : str
        "flair", "t1", "t1ce" and "t2".
    values : (N,) int16 array
        Raw values at the voxels of the brain.
    """
    tissues, spots = _draw_tissues(rng, head), _bright_spots(rng, head)
    whole, core, enhancing_part = regions
    # Deep white matter is smoother than the rest.
    calm = 0.35 + soft_step(8 - head.cortex, 2)
    strengths = (calm, calm, calm, 1, calm, 1)
    shared = [head.texture(rng, length) for length in TEXTURE_MM[:4]]
    water = head.texture(rng, TUMOUR_TEXTURE_MM)
    for modality, own_draws in zip(ALL_MODALITIES, draws, strict=True):
        weights, noise, (wet, patchy) = TEXTURES[modality]
        fields = shared + [head.texture(rng, length) for length in TEXTURE_MM[4:]]
        weights = (weights * rng.lognormal(0, 0.3 * spread, 6)).tolist()
        parts = zip(weights, strengths, fields, strict=True)
        normal = head.at_voxels(sum(w * s * field for w, s, field in parts))
        for weight, tissue in zip(TISSUES[modality], tissues, strict=True):
            normal += weight * rng.lognormal(0, 0.25 * spread) * tissue
        normal -= normal.mean()
        contrasts = class_contrasts(modality, own_draws, enhancement)
        # Python floats leave float32 images as they are; NumPy's make them float64.
        oedema, necrosis, enhancing = contrasts.tolist()
        tumour = oedema + (necrosis - oedema) * core
        tumour += (enhancing - necrosis) * enhancing_part
        tumour += head.at_voxels(
            wet * water + patchy * head.texture(rng, TUMOUR_TEXTURE_MM)
        )
        image = normal * (1 - 0.5 * whole) + tumour * whole
        image += noise * rng.standard_normal(len(image), np.float32)
        if degrade:
            image = degrade(rng, head, image)
        yield modality, _acquire(rng, modality, image, spots, brightness)


def draw_patient(seed, draws, shape, *, enhances=True, brightness=1.0):
    """Draw one patient, one volume at a time, which keeps the memory use low.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed and draws give the same patient.
    draws : (5, 4) sequence of float
        Standard normal values that set the tumour's sizes and contrasts. The first row
        is for the sizes of whole tumour, core and enhancing part, and for roughness.
        Then comes a row for each modality: a value that all classes share, and one each
        for oedema, necrosis and enhancing tumour.
    shape : tuple of 3 int
        Voxels of a volume; the anatomy is scaled to it.
    enhances : bool
        Whether the tumour has an enhancing part.
    brightness : float
        Factor on the scanner's raw values.

    Yields
    ------
    name : str
        "seg", then "flair", "t1", "t1ce" and "t2".
    volume : (X, Y, Z) array
        uint8 labels 0, 1, 2, 4; int16 raw values, 0 outside the brain.
    """
    rng = np.random.default_rng(seed)
    head = draw_head(rng, shape)
    heights = draw_tumour_heights(rng, head, 1.45 + 0.25 * draws[0][3])
    sizes = _tumour_sizes(draws[0], len(heights[0]))
    labels, regions = draw_tumour(rng, head, heights, sizes, enhances)
    brightness *= rng.lognormal(0, 0.35)
    images = draw_images(rng, head, draws[1:], regions, brightness)
    for name, values in chain([("seg", labels)], images):
        yield name, head.place(values, shape)

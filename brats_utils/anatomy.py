"""Draw heads with tumours: labels and four images, as BraTS scans would show them.

Nothing here is a real scan. Sizes, contrasts, textures and their spreads are set to
figures measured on 25 real labelled BraTS cases, so that a score on these patients
says something of a recipe; it says nothing of a real patient.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from brats_utils.cases import ALL_MODALITIES

FULL_SHAPE = (240, 240, 155)
CENTRE_MM = (118.5, 128.5, 78.0)

# Per modality, in SDs of the brain: CSF and grey matter above white matter, vessels
# and dura, the caps of the ventricles.
TISSUES = {
    "flair": (-2.0, 0.8, 0.0, 2.2),
    "t1": (-2.4, -0.8, 0.2, 0.0),
    "t1ce": (-2.1, -0.3, 3.1, 0.0),
    "t2": (3.5, 0.5, 0.0, 0.4),
}
# Textures over 1.5, 3, 8 and 25 mm that the modalities share, over 3 and 25 mm (bias
# field) of each one's own; noise; tumour's texture over 2.5 mm, shared (water) and own.
TEXTURE_MM, TUMOUR_TEXTURE_MM = (1.5, 3, 8, 25, 3, 25), 2.5
TEXTURES = {
    "flair": ((0.10, 0.42, 0.38, -0.36, 0.00, 0.30), 0.07, (0.80, 0.60)),
    "t1": ((-0.10, 0.54, 0.43, 0.42, 0.00, 0.14), 0.05, (-0.25, 0.10)),
    "t1ce": ((-0.10, 0.37, 0.07, 0.49, 0.51, 0.30), 0.07, (-0.30, 0.45)),
    "t2": ((0.10, 0.66, 0.10, 0.00, 0.00, 0.00), 0.05, (0.75, 0.40)),
}
# Oedema, necrosis and enhancing tumour above normal brain: mean, SD over cases.
CONTRASTS = {
    "flair": ((2.0, 0.85), (2.25, 1.15), (2.2, 1.15)),
    "t1": ((0.0, 0.45), (-0.45, 0.65), (-0.15, 0.65)),
    "t1ce": ((-0.15, 0.45), (-0.55, 0.55), (2.6, 1.0)),
    "t2": ((1.2, 0.75), (1.85, 0.95), (1.3, 0.85)),
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
    size = (rng.normal(1, 0.02) * rng.normal(1, 0.015, 3)).tolist()
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
    wide = rng.uniform(3.5, 7)
    across = np.abs(x) - (wide + 3 + 0.005 * y**2)
    up = (z - 12 + 0.01 * y**2) / 1.4
    body = np.sqrt(across**2 + up**2 + np.maximum(np.abs(y) - 32, 0) ** 2) - wide
    third = np.maximum.reduce([np.abs(x) - 2, np.abs(y) - 14, np.abs(z + 3) - 14])
    return cortex, np.minimum(body, third) + 0.8 * fold, fold


@dataclass
class _Head:
    """A head without tumour: its place in the volume, and coarse maps of it.

    `window` is the brain's box in the volume, `size` its voxels, `inside` its brain.
    `maps` holds distances in mm (on a head of full size) and coordinates, on a grid of
    half the box's resolution whose voxels measure `step` mm.
    """

    window: tuple
    size: list
    inside: np.ndarray
    step: np.ndarray
    maps: dict

    def texture(self, rng, length_mm):
        """Draw a coarse random field of mean 0 and SD 1."""
        return _field(rng, self.maps["solid"].shape, length_mm / self.step)

    def fine(self, coarse):
        """Return the values of a coarse map at the brain's voxels, (N,)."""
        return _stretch(coarse, self.size)[self.inside]


def _draw_head(rng, shape):
    """Draw a head without tumour in a volume of `shape`."""
    mm = np.array(FULL_SHAPE) / shape
    factor = 2 if min(shape) >= 64 else 1
    index = np.meshgrid(*(np.arange(0, n, factor) for n in shape), indexing="ij")
    grid = [(i * s).astype(np.float32) for i, s in zip(index, mm, strict=True)]
    step = mm * factor
    cerebrum, lower = _brain(rng, grid, step)
    solid = np.maximum(cerebrum, lower)
    box = ndimage.find_objects((solid > 0).astype(np.uint8))[0]
    window = tuple(slice(b.start * factor, (b.stop - 1) * factor + 1) for b in box)
    size = [part.stop - part.start for part in window]
    cerebrum, lower, solid, *grid = (v[box] for v in (cerebrum, lower, solid, *grid))
    edge = np.pad(solid > 0, 1)
    edge = ndimage.distance_transform_edt(edge, sampling=step)
    depth = edge[1:-1, 1:-1, 1:-1].astype(np.float32)
    cortex, ventricle, fold = _csf_distances(rng, grid, step, cerebrum, lower, depth)
    maps = {"solid": solid, "depth": depth, "cortex": cortex, "ventricle": ventricle}
    maps |= {"fold": fold, "cerebrum": cerebrum, **dict(zip("xyz", grid, strict=True))}
    return _Head(window, size, _stretch(solid, size) > 0, step, maps)


def _tissues(rng, head):
    """Return the shares of CSF, grey matter, vessels and caps in each brain voxel."""
    depth, cortex, ventricle, fold = (
        head.fine(head.maps[name]) for name in ("depth", "cortex", "ventricle", "fold")
    )
    csf = _rise(1.0 - np.minimum(cortex, ventricle), 0.4)
    grey = _rise(4.5 - cortex, 0.5) * (1 - csf)
    other = head.fine(head.texture(rng, 6))
    tubes = np.exp(-(fold**2 + other**2) / 0.05) * _rise(16 - depth, 2)
    dura = _rise(2.0 - depth, 0.5) * np.maximum(other, 0)
    return csf, grey, np.maximum(tubes, dura), np.exp(-np.abs(ventricle - 2) / 3)


def _top(values, n):
    """Return the threshold that the `n` highest of `values` reach."""
    n = int(np.clip(n, 1, len(values)))
    return np.partition(values, len(values) - n)[len(values) - n]


def _volumes(draws, n_brain, enhances):
    """Return how many voxels whole tumour, core and enhancing tumour shall have."""
    whole = 88 * np.exp(0.57 * draws[0]) / 1471
    core = (0.39 + 0.14 * draws[1]) * whole
    enhancing = (0.46 + 0.13 * draws[2]) * core
    # Small shapes: a voxel of each class at least.
    n_core = max(2, round(core * n_brain))
    n_enhancing = np.clip(round(enhancing * n_brain), 1, n_core - 1) if enhances else 0
    return max(n_core + 1, round(whole * n_brain)), n_core, n_enhancing


def _seat(rng, maps):
    """Draw where a tumour sits: deep enough in the cerebrum, mostly to one side."""
    x, y, z = (maps[axis] for axis in "xyz")
    room = maps["cerebrum"] - 0.3 * np.maximum(20 - np.abs(x - CENTRE_MM[0]), 0)
    room = room - 12 * (maps["ventricle"] < 6) - 12 * (z < 40) - 12 * (y > 182)
    seats = np.flatnonzero(room >= min(rng.uniform(3, 16), room.max() * 0.9))
    seat = rng.choice(seats)
    return [float(v.flat[seat]) for v in (x, y, z)]


def _distance(rng, maps, centre):
    """Return mm to `centre`, along three random axes of unlike lengths."""
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0] * rng.uniform(0.8, 1.25, 3)
    offset = [maps[axis] - c for axis, c in zip("xyz", centre, strict=True)]
    squares = (
        sum(a * o for a, o in zip(v, offset, strict=True)) ** 2 for v in axes.T.tolist()
    )
    return np.sqrt(sum(squares)).astype(np.float32)


def _tumour_maps(rng, head, raggedness):
    """Draw the coarse maps, in mm, whose highest parts are whole tumour and core."""
    maps, centre = head.maps, _seat(rng, head.maps)
    height = -_distance(rng, maps, centre)
    rough = 4.5 * head.texture(rng, 10) + 2.5 * head.texture(rng, 4)
    x = maps["x"] - CENTRE_MM[0]
    across = np.maximum(-np.sign(centre[0] - CENTRE_MM[0]) * x, 0)
    falx = rng.choice([0.1, 3.0], p=[0.4, 0.6]) * np.minimum(across, 8)
    # Oedema keeps out of ventricles and folds.
    fluid = np.minimum(maps["ventricle"] - 1, maps["cortex"] * 0.7)
    spread = 2.0 * np.clip(fluid - 2.5, -5, 1)
    whole = height
    if rng.random() < 0.3:  # a second, smaller focus
        whole = np.maximum(height, -_distance(rng, maps, _seat(rng, maps)) - 18)
    whole = whole + raggedness * rough + spread - falx
    core = height + 0.6 * rough + 3.0 * head.texture(rng, 12) - 0.5 * falx
    return whole, core


def _tumour(rng, head, draws, enhances):
    """Draw the label of every brain voxel, and how far it lies within each class.

    Returns
    -------
    labels : (N,) uint8 array
        0, 1, 2 or 4 for each brain voxel.
    parts : list of 3 (N,) float32 arrays
        Soft membership, 0 to 1: whole tumour, core, enhancing tumour.
    """
    coarse = _tumour_maps(rng, head, 1.45 + 0.25 * draws[3])
    whole, core = (head.fine(values) for values in coarse)
    speckle = _grain(rng, head.size, 2)[head.inside]
    n_whole, n_core, n_enhancing = _volumes(draws, len(whole), enhances)
    whole += speckle
    limit = _top(whole, n_whole)
    labels = np.where(whole >= limit, 2, 0).astype(np.uint8)
    parts = [_rise(whole - limit, 0.8)]
    core += 0.7 * speckle
    limit = _top(core[labels > 0], n_core)
    parts.append(_rise(core - limit, 0.5) * parts[0])
    in_core = (labels > 0) & (core >= limit)
    labels[in_core] = 1
    if not n_enhancing:
        return labels, [*parts, np.zeros_like(whole)]
    # A rim of uneven width, with small dark foci.
    rim = 3 * np.tanh((limit - core) / 4) - 4 * np.maximum(speckle - 2.2, 0)
    rim += rng.uniform(0.3, 1.2) * head.fine(head.texture(rng, 3))
    limit = _top(rim[in_core], n_enhancing)
    labels[in_core & (rim >= limit)] = 4
    return labels, [*parts, _rise(rim - limit, 0.3) * parts[1]]


def _contrasts(modality, draws):
    """Return a case's three class contrasts, which rise and fall together by half."""
    common, *own = draws
    oedema, necrosis, enhancing = (
        mean + spread * (0.85 * common + 0.53 * draw)
        for (mean, spread), draw in zip(CONTRASTS[modality], own, strict=True)
    )
    if modality == "t1ce":
        enhancing = max(enhancing, necrosis + 1.6)
    return oedema, necrosis, enhancing


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


def _hot_voxels(rng, head):
    """Return where flow and skin at the brain's edge shine: 0 to 1, nearly all 0."""
    hot = head.fine(head.texture(rng, 3) - 0.5 * head.maps["depth"])
    hot = np.maximum(hot - _top(hot, len(hot) // 4000 + 1), 0)
    return hot / max(hot.max(), 1e-6)


def _draw_images(rng, head, draws, parts, brightness):
    """Yield each modality's name and raw values at the brain's voxels, (N,) int16."""
    tissues, hot = _tissues(rng, head), _hot_voxels(rng, head)
    whole, core, enhancing_part = parts
    calm = 0.35 + _rise(8 - head.maps["cortex"], 2)  # lower in deep white matter
    calm = [calm, calm, calm, 1, calm, 1]
    shared = [head.texture(rng, length) for length in TEXTURE_MM[:4]]
    water = head.texture(rng, TUMOUR_TEXTURE_MM)
    for number, modality in enumerate(ALL_MODALITIES):
        weights, noise, (wet, patchy) = TEXTURES[modality]
        fields = shared + [head.texture(rng, length) for length in TEXTURE_MM[4:]]
        weights = (weights * rng.lognormal(0, 0.3, 6)).tolist()
        normal = head.fine(
            sum(w * c * f for w, c, f in zip(weights, calm, fields, strict=True))
        )
        for weight, tissue in zip(TISSUES[modality], tissues, strict=True):
            normal += weight * rng.lognormal(0, 0.25) * tissue
        normal -= normal.mean()
        own_draws = draws[4 + 4 * number : 8 + 4 * number]
        oedema, necrosis, enhancing = _contrasts(modality, own_draws)
        tumour = oedema + (necrosis - oedema) * core
        tumour += (enhancing - necrosis) * enhancing_part
        tumour += head.fine(wet * water + patchy * head.texture(rng, TUMOUR_TEXTURE_MM))
        image = normal * (1 - 0.5 * whole) + tumour * whole
        image += noise * rng.standard_normal(len(image), np.float32)
        yield modality, _acquire(rng, modality, image, hot, brightness)


def draw_patient(seed, draws, shape, *, enhances=True, brightness=1.0):
    """Draw one patient, a volume at a time, so that few of them are in memory at once.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed and draws give the same patient.
    draws : sequence of 20 float
        Standard normal draws behind the tumour's size and contrasts: of whole tumour,
        core, enhancing part, roughness; then for each modality one that its classes
        share and one each for oedema, necrosis and enhancing tumour.
    shape : tuple of 3 int
        Voxels of a volume; the anatomy is scaled to it.
    enhances : bool
        False for a tumour without enhancing part.
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
    head = _draw_head(rng, shape)
    labels, parts = _tumour(rng, head, draws, enhances)
    brightness *= rng.lognormal(0, 0.35)

    def place(values):
        volume = np.zeros(shape, values.dtype, order="F")
        volume[head.window][head.inside] = values
        return volume

    yield "seg", place(labels)
    for modality, values in _draw_images(rng, head, draws, parts, brightness):
        yield modality, place(values)

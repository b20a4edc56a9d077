"""Draw patients that vary more than real ones, to pretrain a network.

The patients of `anatomy` look like scans from one collection. A network that has to
work on scans from elsewhere must not rely on that. Here shape, tissues, tumours and
scanner vary well beyond the calibrated values. The idea is that of SynthSeg: a network
learns to ignore whatever varies in training.

References
----------
Billot et al., 2023, SynthSeg, doi:10.1016/j.media.2023.102789.
"""

from itertools import chain

import numpy as np
from scipy import ndimage

from brats_utils.augment import rotation
from brats_utils.phantom import anatomy
from brats_utils.phantom.anatomy import CENTRE_MM, per_axis, smooth_noise

TILT_DEGREES, SIZE_SD, BEND_MM = 8, 0.06, 4
VENTRICLE_MM = (2, 12)
LARGEST_ML, BRAIN_ML = 250, 1471
# Shares of patients: no tumour; and of the others, no enhancing part, a core that
# enhances completely, and a core that enhances in at most a tenth of its volume.
HEALTHY, LOW_GRADE, SOLID, FAINT = 0.1, 0.25, 0.15, 0.25
SPREAD = (0.8, 2.0)  # of contrasts, tissues and textures: factor on the calibrated one
# On T1CE, in SDs of the brain: what contrast agent adds to the enhancing tumour, by how
# much this exceeds necrosis at least, and by how much the rest differs from T1.
ENHANCEMENT, LEAST_ENHANCEMENT, T1CE_SD = (0.5, 4.0), 0.8, 0.3
LINKED = 0.7  # share of the patients whose T1CE shows what T1 does
GAMMA, BIAS_SD, SLICE_MM = (0.6, 1.7), 0.15, (1.5, 6)


def _bend(rng, points, step_mm):
    """Tilt, stretch and bend a head, which also shifts its midline."""
    sizes = 1 + SIZE_SD * rng.standard_normal(3)
    angles = np.radians(TILT_DEGREES * rng.standard_normal(3))
    matrix = np.diag(sizes) @ rotation(angles)
    offset = points - per_axis(CENTRE_MM)
    bent = np.einsum("ij,jxyz->ixyz", matrix.astype(np.float32), offset)
    for axis in range(3):
        bent[axis] += BEND_MM * smooth_noise(rng, points.shape[1:], 40 / step_mm)
    return bent + per_axis(CENTRE_MM)


def _strip(rng, height, step_mm):
    """Imitate bad skull-stripping: bites out of the brain, residues around it."""
    errors = smooth_noise(rng, height.shape, 12 / step_mm)
    bites = np.maximum(errors - rng.uniform(1.2, 4), 0)
    residues = np.maximum(-errors - rng.uniform(1.2, 4), 0)
    errors = 8 * residues - 12 * bites
    return height + rng.uniform(-2, 2) + errors * (rng.random() < 0.5)


def _draw_sizes(rng, n_brain):
    """Draw the numbers of voxels of whole tumour, core and enhancing tumour."""
    whole = LARGEST_ML ** rng.random(2).max() / BRAIN_ML * n_brain  # from 1 ml
    n_core = max(2, round(rng.uniform(0.03, 0.95) * whole))
    kinds = [1, 0.1 * rng.random(), rng.uniform(0.1, 0.9)]
    share = rng.choice(kinds, p=[SOLID, FAINT, 1 - SOLID - FAINT])
    n_enhancing = int(np.clip(round(share * n_core), 1, n_core - 1))
    return max(n_core + 1, round(whole)), n_core, n_enhancing


def _draw_tumours(rng, head):
    """Draw a tumour of one to three foci, or none; return what `draw_tumour` does."""
    if rng.random() < HEALTHY:
        nothing = np.zeros(np.count_nonzero(head.inside), np.float32)
        return nothing.astype(np.uint8), [nothing] * 3
    foci, lower = [], 0
    for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        heights = anatomy.draw_tumour_heights(rng, head, rng.uniform(0.8, 2.2))
        foci.append(np.subtract(heights, lower))
        lower = rng.uniform(0, 20)  # mm by which the next focus is smaller
    sizes = _draw_sizes(rng, foci[0].shape[1])
    enhances = rng.random() >= LOW_GRADE
    return anatomy.draw_tumour(rng, head, np.max(foci, axis=0), sizes, enhances)


def _thicken(rng, head, values):
    """Return values (N,) as seen by a scanner with thick slices along one axis."""
    volume = np.full(head.inside.shape, np.median(values), np.float32)
    volume[head.inside] = values
    axis, thickness = rng.integers(3), rng.uniform(*SLICE_MM)
    size = volume.shape[axis]
    blurred = ndimage.gaussian_filter1d(volume, 0.4 * thickness, axis)
    slices = np.linspace(0, size - 1, max(2, round(size / thickness))).round()
    coarse = blurred.take(slices.astype(int), axis)
    return anatomy.upsample(coarse, volume.shape)[head.inside]


def _degrade(rng, head, image):
    """Change the grey scale, bias field, resolution and noise of an image."""
    low, high = np.percentile(image[::7], (0.5, 99.5)).tolist()
    image = np.clip((image - low) / (high - low), 0, 1.5)
    if rng.random() < 0.5:
        image = image ** np.exp(rng.uniform(*np.log(GAMMA)))
    bias = head.texture(rng, rng.uniform(40, 90)) * (BIAS_SD * rng.random())
    image = image * np.exp(head.at_voxels(bias))
    if rng.random() < 0.4:
        image = _thicken(rng, head, image)
    noise = 0.1 * rng.random() ** 2
    return image + noise * rng.standard_normal(len(image), np.float32)


def _draw_contrasts(rng, spread):
    """Draw what sets the contrasts: for each modality a row, as in `draw_patient`.

    In most patients T1CE shows what T1 does, and in addition the enhancement; in the
    others it is drawn like the rest, for variety.
    """
    draws = spread * rng.uniform(-1.8, 1.8, (4, 4))
    if rng.random() < LINKED:
        contrasts = anatomy.class_contrasts("t1", draws[1])
        contrasts[:2] += T1CE_SD * rng.standard_normal(2)
        contrasts[2] += rng.uniform(*ENHANCEMENT)
        mean, sd = np.transpose(anatomy.CONTRASTS["t1ce"])
        draws[2] = 0, *(contrasts - mean) / (anatomy.OWN * sd)
    return draws.tolist()


def draw_wide_patient(seed, shape):
    """Draw one patient from a very wide range of appearances.

    One in ten has no tumour, and a quarter of the others have no enhancing part. There
    are one to three foci, 1 to 250 ml in total, with any share of oedema and necrosis.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed gives the same patient.
    shape : tuple of 3 int
        Voxels of a volume; the anatomy is scaled to it.

    Yields
    ------
    name, volume
        As in `draw_patient`.
    """
    rng = np.random.default_rng(seed)
    changes = {"bend": _bend, "strip": _strip, "ventricle_mm": VENTRICLE_MM}
    head = anatomy.draw_head(rng, shape, **changes)
    labels, regions = _draw_tumours(rng, head)
    brightness, spread = rng.lognormal(0, 0.5), rng.uniform(*SPREAD)
    draws = _draw_contrasts(rng, spread)
    worse = {"spread": spread, "degrade": _degrade, "enhancement": LEAST_ENHANCEMENT}
    images = anatomy.draw_images(rng, head, draws, regions, brightness, **worse)
    for name, values in chain([("seg", labels)], images):
        yield name, head.place(values, shape)

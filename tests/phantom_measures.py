"""What test_anatomy.py measures on cases, and what real cases measured.

The targets are figures measured on 25 real labelled BraTS cases (36 for volumes).
"""

import numpy as np
from scipy import ndimage

from brats_utils.cases import ALL_MODALITIES, load_case
from brats_utils.labels import REGIONS, region_volumes_ml

CLASSES = {"NCR": 1, "ED": 2, "ET": 4}
LAGS_MM = (1, 2, 4, 8, 16)
PAIRS = ("t1-flair", "t1ce-t1", "t1ce-flair", "t2-flair", "t2-t1", "t2-t1ce")
NEIGHBOURS = np.ones((3, 3, 3), bool)


def _by_modality(name, *values):
    return {f"{m} {name}": v for m, v in zip(ALL_MODALITIES, values, strict=True)}


# Mean and SD over real cases: the mean of phantoms lies within one SD of the mean, and
# their SD within a factor of two of the SD.
MEAN_SD = {
    **_by_modality("ET - brain", (2.2, 1.1), (-0.1, 0.6), (1.75, 0.9), (1.25, 0.7)),
    **_by_modality("ED - brain", (2.0, 0.6), (0.2, 0.4), (0.0, 0.4), (0.9, 0.55)),
    **_by_modality("NCR - brain", (2.3, 1.1), (-0.5, 0.6), (-0.5, 0.5), (2.0, 0.7)),
    **_by_modality("ET - NCR", (-0.1, 0.6), (0.4, 0.4), (2.25, 0.8), (-0.75, 0.5)),
    "brain ml": (1471, 123),
    "WT ml": (104, 64),
    "TC ml": (44, 35),
    "ET ml": (19, 17),
    "components": (1.2, 0.5),
    "slices": (64, 13),
    "window %": (97, 6),
}
# Where a range over real cases is known: the median of phantoms lies within.
RANGE = {
    **_by_modality("mean", (117, 14035), (210, 9447), (47, 9592), (115, 11794)),
    "largest %": (87, 100),
    "NCR islands": (1, 270),
    "ED islands": (1, 80),
    "ET islands": (1, 54),
    "roughness": (0.49, 0.98),
}
# The mean of phantoms lies within 30 % of these.
NEAR = {
    **_by_modality("SD / mean", 0.36, 0.26, 0.30, 0.39),
    **_by_modality("max / p99.5", 1.6, 1.8, 2.0, 1.3),
    **_by_modality("noise", 0.14, 0.10, 0.14, 0.10),
    **_by_modality("SD in tumour", 0.85, 0.45, 0.75, 0.70),
    **_by_modality("SD in brain", 0.90, 0.90, 0.90, 0.90),
    "t1ce p99": 2.6,
    "t2 p99": 3.3,
}
for _modality, _values in {
    "flair": (0.85, 0.65, 0.47, 0.33, 0.21),
    "t1": (0.95, 0.84, 0.66, 0.43, 0.23),
    "t1ce": (0.88, 0.70, 0.52, 0.36, 0.22),
    "t2": (0.91, 0.77, 0.54, 0.27, 0.06),
}.items():
    for _lag, _value in zip(LAGS_MM, _values, strict=True):
        NEAR[f"{_modality} at {_lag} mm"] = _value
# The mean of phantoms lies within 0.15 of these.
CORRELATIONS = dict(zip(PAIRS, (0.48, 0.63, 0.28, 0.0, -0.24, -0.23), strict=True))
# Dice of a classifier that sees one voxel alone; 0.58, 0.36, 0.36 on real cases.
DIFFICULTY = {"WT": (0.45, 0.70), "TC": (0.25, 0.50), "ET": (0.25, 0.50)}


def standardise_brain(case):
    """Return z-scores (N, 4) and labels (N,) of the brain's voxels."""
    image, segmentation, _ = load_case(case, ALL_MODALITIES)
    voxels = image[(image != 0).any(-1)]
    z = (voxels - voxels.mean(0)) / voxels.std(0)
    return z, segmentation[(image != 0).any(-1)]


def _measure_modality(z, raw, brain, segmentation):
    """Return the figures of one modality; z and raw are (X, Y, Z)."""
    normal = brain & (segmentation == 0)
    found = {"mean": raw[brain].mean()}
    found["SD / mean"] = raw[brain].std() / found["mean"]
    found["max / p99.5"] = raw.max() / np.percentile(raw[brain], 99.5)
    rest = (z - ndimage.gaussian_filter(z, 1))[ndimage.binary_erosion(normal, None, 3)]
    found["noise"] = np.median(np.abs(rest)) / 0.6745
    found["SD in brain"] = z[normal].std()
    found["p99"] = np.percentile(z[normal], 99)
    means, spreads = {}, []
    for name, value in CLASSES.items():
        if (segmentation == value).any():
            means[name] = z[segmentation == value].mean()
            spreads.append(z[segmentation == value].std())
            found[f"{name} - brain"] = means[name] - z[normal].mean()
    if "ET" in means:
        found["ET - NCR"] = means["ET"] - means["NCR"]
    found["SD in tumour"] = np.mean(spreads)
    for lag in LAGS_MM:  # along X
        both = normal[lag:] & normal[:-lag]
        found[f"at {lag} mm"] = np.corrcoef(z[lag:][both], z[:-lag][both])[0, 1]
    return found


def _measure_geometry(segmentation):
    """Return the figures of a label map."""
    found = {
        f"{k} ml": v for k, v in region_volumes_ml(segmentation, (1, 1, 1)).items()
    }
    whole = segmentation > 0
    sizes = np.bincount(ndimage.label(whole, NEIGHBOURS)[0].ravel())[1:]
    found["components"] = (sizes >= 100).sum()
    found["largest %"] = 100 * sizes.max() / sizes.sum()
    for name, value in CLASSES.items():
        if (segmentation == value).any():
            count = ndimage.label(segmentation == value, NEIGHBOURS)[1]
            found[f"{name} islands"] = count
    found["slices"] = whole.any((0, 1)).sum()
    boundary = (whole & ~ndimage.binary_erosion(whole)).sum()
    ball = np.pi ** (1 / 3) * (6 * whole.sum()) ** (2 / 3)
    found["roughness"] = ball / boundary
    found["window %"] = 100 * whole[56:184, 56:184, 13:141].sum() / whole.sum()
    return found


def measure_case(case):
    """Return {name: figure} of one full-size case."""
    image, segmentation, _ = load_case(case, ALL_MODALITIES)
    brain = (image != 0).any(-1)
    found = {"brain ml": brain.sum() / 1000, **_measure_geometry(segmentation)}
    if not found["ET ml"]:
        del found["ET ml"]
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    image, segmentation, brain = image[box], segmentation[box], brain[box]
    scores = {}
    for channel, modality in enumerate(ALL_MODALITIES):
        raw = image[..., channel]
        z = (raw - raw[brain].mean()) / raw[brain].std()
        scores[modality] = z[brain & (segmentation == 0)]
        figures = _measure_modality(z, raw, brain, segmentation)
        found |= {f"{modality} {name}": value for name, value in figures.items()}
    for pair in PAIRS:
        one, other = pair.split("-")
        found[pair] = np.corrcoef(scores[one], scores[other])[0, 1]
    return found


def classify_voxels(train, test, seed=0):
    """Return the Dice of each test case and region, by single voxels' intensities."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(seed)
    drawn = []
    for case in train:
        z, labels = standardise_brain(case)
        chosen = rng.choice(len(z), min(6000, len(z)), replace=False)
        drawn.append((z[chosen], labels[chosen]))
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))
    scores = {region: [] for region in REGIONS}
    for case in test:
        z, labels = standardise_brain(case)
        guess = model.predict(z)
        for region, values in REGIONS.items():
            a, b = np.isin(guess, values), np.isin(labels, values)
            total = a.sum() + b.sum()
            scores[region].append(2 * (a & b).sum() / total if total else 1.0)
    return scores


def compare(figures, difficulty):
    """Return rows (name, target, measured, holds) for every target above.

    `figures` is a list of `measure_case`, `difficulty` a result of `classify_voxels`.
    """
    rows = []

    def add(name, target, measured, holds):
        rows.append((name, target, measured, bool(holds)))

    values = {
        name: np.array([f[name] for f in figures if name in f])
        for name in {**MEAN_SD, **RANGE, **NEAR, **CORRELATIONS}
    }
    for name, (mean, sd) in MEAN_SD.items():
        m, s = values[name].mean(), values[name].std(ddof=1)
        holds = abs(m - mean) <= sd and sd / 2 <= s <= sd * 2
        add(name, f"{mean} ± {sd}", f"{m:.2f} ± {s:.2f}", holds)
    least = values["t1ce ET - NCR"].min()
    add("t1ce ET - NCR, least", "0.8", f"{least:.2f}", least >= 0.8)
    for name, (low, high) in RANGE.items():
        middle, ends = np.median(values[name]), (values[name].min(), values[name].max())
        text = f"{middle:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
        add(name, f"[{low}, {high}]", text, low <= middle <= high)
    for name, target in NEAR.items():
        m = values[name].mean()
        add(name, f"{target} ± 30 %", f"{m:.3f}", abs(m / target - 1) <= 0.3)
    for name, target in CORRELATIONS.items():
        m = values[name].mean()
        add(name, f"{target:+.2f} ± 0.15", f"{m:+.2f}", abs(m - target) <= 0.15)
    for region, (low, high) in DIFFICULTY.items():
        m = np.mean(difficulty[region])
        each = " ".join(f"{v:.2f}" for v in difficulty[region])
        add(f"Dice {region}", f"[{low}, {high}]", f"{m:.2f} ({each})", low <= m <= high)
    return rows

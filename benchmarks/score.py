"""Score a case: all scores of the challenge with ours, HD95 alone with medpy.

The prediction is the truth of a phantom with random errors at the surfaces.
"""

import tempfile

import numpy as np
from common import in_turn, is_there, print_rows, print_times
from scipy.ndimage import gaussian_filter

from brats_utils.evaluation import score_case
from brats_utils.labels import REGIONS
from brats_utils.nifti import load_labels
from brats_utils.phantom import write_phantom


def blur(truth, seed=0):
    """Return a label map like the truth, with random errors at every surface."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.standard_normal(truth.shape, np.float32), 2)
    shares = [
        gaussian_filter((truth == v).astype(np.float32), 1.5) for v in (0, 1, 2, 4)
    ]
    shares[0] += 0.3 / noise.std() * noise * (shares[0] < 0.99)
    return np.array([0, 1, 2, 4], np.uint8)[np.argmax(shares, axis=0)]


def main():
    """Print the tables on scoring."""
    with tempfile.TemporaryDirectory() as folder:
        (case,) = write_phantom(folder, 1)
        truth, _ = load_labels(case.segmentation)
    prediction = blur(truth)
    scores = score_case(prediction, truth)
    works = {"ours": lambda: score_case(prediction, truth)}
    rows = {f"Dice {r}": (f"{scores[f'dice_{r}']:.3f}", "") for r in REGIONS}
    if is_there("medpy"):
        from medpy.metric.binary import hd95

        def theirs():
            return [
                hd95(np.isin(prediction, v), np.isin(truth, v))
                for v in REGIONS.values()
            ]

        works["medpy, HD95 alone"] = theirs
        pairs = zip(REGIONS, theirs(), strict=True)
        difference = max(abs(scores[f"hd95_{r}"] - value) for r, value in pairs)
        rows["largest difference in HD95, mm"] = (f"{difference:.1e}", "≤ 1e-6")
    aims = {"ours": "≤ 0.3 s", "medpy, HD95 alone": "≥ 20"}
    print_times("Score a case, three regions", in_turn(works), aims=aims)
    print_rows("What was scored", rows)


if __name__ == "__main__":
    main()

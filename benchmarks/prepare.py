"""Prepare a case with our code, the tutorial recipe and MONAI; then with two jobs.

All store the same three modalities of the same phantom, cropped to 128 x 128 x 128.
Only ours waits until its files are on the disk. The row "limit" only reads the input.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import seed_recipe
from common import in_new_process, in_turn, is_there, print_rows, print_times

from brats_utils.cases import MODALITIES, find_cases
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_case, prepare_dataset

N_CASES = 8
RSS = """
import sys, tempfile
from common import peak_mb
from brats_utils.cases import find_cases
from brats_utils.prepare import prepare_case
case, before = find_cases(sys.argv[1], labels="0124")[0], peak_mb()
with tempfile.TemporaryDirectory() as out:
    prepare_case(case, out)
print(round(peak_mb() - before))
"""


def monai_work(case, folder):
    """Return a function that prepares the case as MONAI's BraTS tutorial loads it."""
    from monai import transforms

    steps = transforms.Compose(
        [
            transforms.LoadImaged(["image", "label"]),
            transforms.EnsureChannelFirstd(["image", "label"]),
            transforms.Orientationd(["image", "label"], axcodes="RAS"),
            transforms.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            transforms.CenterSpatialCropd(["image", "label"], (128, 128, 128)),
        ]
    )
    paths = [str(case.images[m]) for m in MODALITIES]

    def work():
        done = steps({"image": paths, "label": str(case.segmentation)})
        np.save(folder / "image.npy", done["image"].numpy())
        np.save(folder / "label.npy", done["label"].numpy())

    return work


def compare(case, name, out, aim):
    """Print the times for one case; all that is prepared goes to folders in `out`."""
    peers = out / "peers"
    peers.mkdir(parents=True)
    new = (out / f"ours{n}" for n in itertools.count())
    works = {
        "ours": lambda: prepare_case(case, next(new)),
        "tutorial recipe": lambda: seed_recipe.prepare(case, peers),
    }
    if is_there("monai"):
        works["MONAI"] = monai_work(case, peers)
    used = [*(case.images[m] for m in MODALITIES), case.segmentation]
    works["limit: read the files"] = lambda: [path.read_bytes() for path in used]
    title = f"Prepare a case, {name}, one thread"
    print_times(title, in_turn(works), aims={"tutorial recipe": aim})


def compare_jobs(raw, out):
    """Print the times of a data set with one job and with two."""
    cases = find_cases(raw, labels="0124")
    new = (out / f"jobs{n}" for n in itertools.count())
    works = {
        f"jobs={jobs}": lambda jobs=jobs: prepare_dataset(cases, next(new), jobs=jobs)
        for jobs in (2, 1)
    }
    options = {"ours": "jobs=2", "per": N_CASES, "unit": "s a case"}
    title = f"Prepare {N_CASES} cases, `.nii`"
    print_times(title, in_turn(works), aims={"jobs=1": "≥ 1.7"}, **options)


def size_mb(folder, *patterns):
    """Return the size of a folder's files of some names, in 10⁶ bytes."""
    paths = (path for pattern in patterns for path in folder.rglob(pattern))
    return sum(path.stat().st_size for path in paths) / 1e6


def main():
    """Print the tables on preparing."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plain = write_phantom(folder / "raw", N_CASES)[0]
        (packed,) = write_phantom(folder / "packed", 1, compressed=True)
        compare(plain, "`.nii`", folder / "plain_out", aim="≥ 8")
        compare(packed, "`.nii.gz`", folder / "packed_out", aim="≥ 7")
        compare_jobs(folder / "raw", folder)
        ours = size_mb(folder / "plain_out" / "ours0", "*.npy")
        theirs = size_mb(folder / "plain_out" / "peers", "image_*.npy", "mask_*.npy")
        rows = {
            "on disk, MB": (f"{ours:.1f}", ""),
            "the tutorial recipe's, MB": (f"{theirs:.1f}", ""),
            "recipe's / ours": (f"{theirs / ours:.1f}", "≥ 7"),
            "memory above import, MB": (in_new_process(RSS, folder / "raw"), "≤ 250"),
        }
        print_rows("Prepare a case: space", rows)


if __name__ == "__main__":
    main()

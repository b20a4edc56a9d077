"""Prepare a case: ours, the tutorial recipe and MONAI in turn; then two jobs.

All store the same three modalities of the same phantom, ours and the recipe cropped to
128 x 128 x 128. "limit" only reads the bytes of the files used.
"""

import contextlib
import gzip
import tempfile
from pathlib import Path
from unittest import mock

import seed_recipe
from common import in_new_process, in_turn, is_there, print_rows, print_times

from brats_utils.cases import Case, find_cases
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_case, prepare_dataset

MODALITIES = ("flair", "t1ce", "t2")
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


def compress(case, folder):
    """Return the case with its files gzipped into a folder."""
    folder.mkdir()
    paths = {}
    for key, path in {**case.images, "seg": case.segmentation}.items():
        paths[key] = folder / f"{path.name}.gz"
        paths[key].write_bytes(gzip.compress(path.read_bytes(), 6))
    return Case(case.id, {m: paths[m] for m in case.images}, paths["seg"])


@contextlib.contextmanager
def without_care():
    """Leave out flushing to the disk and the checksums of files."""
    with (
        mock.patch("os.fsync"),
        mock.patch("brats_utils.prepare.sha256", return_value=""),
        mock.patch("brats_utils.nifti.hashlib.sha256"),
        mock.patch("brats_utils.prepare.write_json"),
    ):
        yield


def careless(case, out):
    """Prepare a case without flush and checksums."""
    with without_care():
        prepare_case(case, out)


def monai_work(case, folder):
    """Return a call that prepares the case as MONAI's BraTS tutorial loads it."""
    import numpy as np
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


def compare(case, name, folder, aims):
    """Print the times of all for one case."""
    count = iter(range(10**6))
    works = {
        "ours": lambda: prepare_case(case, folder / f"o{next(count)}"),
        "ours, no flush, no checksums": lambda: careless(
            case, folder / f"o{next(count)}"
        ),
        "tutorial recipe": lambda: seed_recipe.prepare(case, folder),
    }
    if is_there("monai"):
        works["MONAI"] = monai_work(case, folder)
    used = [*(case.images[m] for m in MODALITIES), case.segmentation]
    works["limit: read the bytes"] = lambda: [path.read_bytes() for path in used]
    aims = {
        "tutorial recipe": f"≥ {aims[0]}",
        "ours, no flush, no checksums": f"tutorial recipe ≥ {aims[1]} times this",
    }
    print_times(f"Prepare a case, {name}, one thread", in_turn(works), aims=aims)


def main():
    """Print the rows on preparation."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cases = write_phantom(folder / "raw", 8)
        (folder / "out").mkdir()
        zipped = compress(cases[0], folder / "gz")
        compare(cases[0], "`.nii`", folder / "out", aims=(8, 15))
        compare(zipped, "`.nii.gz`", folder / "out", aims=(7, 9))
        n = iter(range(100))
        works = {
            f"{jobs} jobs": lambda jobs=jobs: prepare_dataset(
                find_cases(folder / "raw", labels="0124"),
                folder / f"jobs{next(n)}",
                jobs=jobs,
            )
            for jobs in (2, 1)
        }
        title = "Prepare 8 cases, `.nii`"
        options = {"ours": "2 jobs", "per": 8, "unit": "s a case"}
        print_times(title, in_turn(works, 5), aims={"1 jobs": "≥ 1.7"}, **options)
        ours = sum(
            path.stat().st_size for path in (folder / "out" / "o0").rglob("*.npy")
        )
        theirs = sum(path.stat().st_size for path in (folder / "out").glob("*e_*.npy"))
        theirs += sum(
            path.stat().st_size for path in (folder / "out").glob("mask_*.npy")
        )
        rows = {
            "bytes on disk, MB": (f"{ours / 1e6:.1f}", ""),
            "the tutorial recipe's, MB": (f"{theirs / 1e6:.1f}", ""),
            "recipe's / ours": (f"{theirs / ours:.1f}", "≥ 7"),
            "memory above import, MB": (in_new_process(RSS, folder / "raw"), "≤ 250"),
        }
        print_rows("Prepare a case: space", rows)


if __name__ == "__main__":
    main()

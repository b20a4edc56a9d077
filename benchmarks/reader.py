"""Read a scan of real size with our reader, which verifies the file, and with nibabel.

Both read the same `.nii.gz` in turn. nibabel stops before the gzip checksum; ours
verifies it.
"""

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from common import in_turn, print_times

from brats_utils.nifti import read_volume, save_volume
from brats_utils.phantom import write_phantom


def main():
    """Write a phantom's FLAIR as `.nii.gz`, time both readers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        (case,) = write_phantom(Path(folder) / "raw", 1)
        image = nib.load(case.images["flair"])
        path = Path(folder) / "flair.nii.gz"
        save_volume(np.array(image.dataobj), path, like=image.header)
        readers = {
            "read_volume": lambda: read_volume(path),
            "nibabel get_fdata": lambda: nib.load(path).get_fdata(),
        }
        title = "Read a `.nii.gz` of 240 x 240 x 155"
        print_times(
            title,
            in_turn(readers, repeats),
            ours="read_volume",
            aims={"nibabel get_fdata": "≥ 1"},
        )


if __name__ == "__main__":
    main()

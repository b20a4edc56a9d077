"""Read NIfTI files checked to the last byte, and write them; all nibabel is here."""

import io
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

HEADER_BYTES = 352
# A whole-body scan is smaller; a header that asks for more is damaged or hostile.
MAX_VOXELS = 2**28
AGAIN = "The file is incomplete or damaged; download it again"
GEOMETRY = (
    "pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y "
    "qoffset_z srow_x srow_y srow_z xyzt_units"
).split()
_LPS = nib.orientations.axcodes2ornt("LPS")


class BratsDataError(ValueError):
    """Something is wrong with the scans; the message says where and what to do.

    Parameters
    ----------
    problem : str
        What was found, and what was expected.
    case : str, optional
        Id of the case.
    file : path, optional
        The file.
    advice : str, optional
        What to do about it.
    """

    def __init__(self, problem, *, case=None, file=None, advice=None):
        self.problem, self.case, self.file, self.advice = problem, case, file, advice
        where = ", ".join(str(part) for part in (case, file) if part)
        text = f"{where}: {problem}" if where else problem
        super().__init__(f"{text}. {advice}." if advice else f"{text}.")

    def of(self, case):
        """Return the same error with a case's id in it."""
        return type(self)(self.problem, case=case, file=self.file, advice=self.advice)


def _parse_header(start, path, channels):
    """Return the header in the first bytes of a volume, or raise what is wrong."""

    def refuse(problem):
        raise BratsDataError(problem, file=path, advice=AGAIN)

    try:
        # Extensions (four zeros mean none) hold notes of other programs, no geometry.
        header = nib.Nifti1Header.from_fileobj(io.BytesIO(start[:348] + bytes(4)))
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        affine, offset = header.get_best_affine(), float(header["vox_offset"])
        header.get_slope_inter()
    except Exception as error:  # damaged bytes make nibabel raise many kinds
        refuse(f"not a NIfTI file (starts with {start[:12]!r}): {error}")
    if header["magic"] != b"n+1" or len(start) < HEADER_BYTES:
        refuse(f"not a single NIfTI-1 file (starts with {start[:12]!r})")
    if len(shape) == 4 and shape[3] == channels:
        shape = shape[:3]
        header.set_data_shape(shape)
    elif channels > 1:
        refuse(f"expected {channels} images in one file, the header says {shape}")
    if len(shape) != 3 or min(shape) < 1:
        refuse(f"expected a 3-D volume, the header says {shape}")
    if math.prod(shape) * channels > MAX_VOXELS:
        refuse(f"the header asks for {shape}, more than {MAX_VOXELS} voxels")
    if dtype.kind not in "iuf":
        refuse(f"expected integer or real voxels, the header says {dtype}")
    if not (HEADER_BYTES <= offset <= 2**24 and offset == int(offset)):
        refuse(f"the header says that its voxels begin at byte {offset}")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        refuse(f"its affine is no grid: {affine.tolist()}")
    return header


def _read(path, channels, *, voxels):
    """Return a file's header, and its contents unpacked; or only its first bytes."""
    start = b""
    try:
        with open(path, "rb") as file:
            packed, size = file.read(2) == b"\x1f\x8b", file.seek(0, 2)
        with igzip.open(path) if packed else open(path, "rb") as file:
            start = file.read(HEADER_BYTES)
            header = _parse_header(start, path, channels)
            expected = math.prod(header.get_data_shape()) * channels
            expected *= header.get_data_dtype().itemsize
            expected += int(header["vox_offset"])
            # A byte more than expected: the checksum is read, and a bomb is seen.
            file.seek(0)
            contents = file.read(expected + 1) if voxels else b""
    except FileNotFoundError:
        raise BratsDataError("the file is not there", file=path) from None
    except (OSError, EOFError, isal_zlib.error) as error:
        problem = f"cannot be read: {error} (starts with {start[:12]!r})"
        raise BratsDataError(problem, file=path, advice=AGAIN) from None
    found = len(contents) if voxels else size
    if found != expected and (voxels or not packed):
        long = "longer" if found > expected else f"{found} bytes long, shorter"
        problem = f"the file is {long} than the {expected} bytes its header asks for"
        raise BratsDataError(problem, file=path, advice=AGAIN)
    return header, contents


def read_header(path, channels=1):
    """Read and check the header of a NIfTI file, without its voxels.

    Parameters
    ----------
    path : path
        `.nii` or `.nii.gz`. The length of a plain file is checked too; that of a packed
        one is only known when it is unpacked.
    channels : int
        How many images the file must hold, one after the other.

    Returns
    -------
    header : nibabel.Nifti1Header
        Of three dimensions: those of one image.

    Raises
    ------
    BratsDataError
        If the file is missing or is not a valid NIfTI file.
    """
    return _read(path, channels, voxels=False)[0]


def read_volume(path, channels=1):
    """Read a NIfTI file and verify its length and gzip checksum.

    Parameters
    ----------
    path : path
        `.nii` or `.nii.gz`. A plain `.nii` has no checksum: changed bytes among its
        voxels cannot be noticed.
    channels : int
        As in `read_header`.

    Returns
    -------
    volume : (X, Y, Z) array, or (X, Y, Z, channels)
        As stored, in the file's own type if it is not scaled.
    header : nibabel.Nifti1Header

    Raises
    ------
    BratsDataError
        If the file is missing, damaged, incomplete, or longer than its header says.
    """
    header, contents = _read(path, channels, voxels=True)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    shape = (*shape, channels) if channels > 1 else shape
    volume = np.ndarray(shape, dtype, contents, int(header["vox_offset"]), order="F")
    slope, inter = header.get_slope_inter()
    return nib.volumeutils.apply_read_scaling(volume, slope, inter), header


def spacing_mm(affine):
    """Return the size of a voxel along X, Y and Z.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel indices to millimetres.

    Returns
    -------
    spacing : tuple of 3 float
    """
    return tuple(float(size) for size in nib.affines.voxel_sizes(affine))


def _reorient(volume, start, end):
    """Swap and flip axes from one orientation to another."""
    change = nib.orientations.ornt_transform(start, end)
    return nib.orientations.apply_orientation(volume, change)


def to_lps(volume, affine):
    """Reorient a volume to LPS: X to the left, Y to the back, Z to the head.

    Parameters
    ----------
    volume : (X, Y, Z, ...) array
        On the stored grid.
    affine : (4, 4) array
        Of that grid.

    Returns
    -------
    volume : array
        Axes swapped and flipped, no voxel changed; a view where possible.
    """
    return _reorient(volume, nib.orientations.io_orientation(affine), _LPS)


def from_lps(volume, affine):
    """Reorient a volume from LPS to a stored grid: the inverse of `to_lps`.

    Parameters
    ----------
    volume : (X, Y, Z, ...) array
        In LPS order.
    affine : (4, 4) array
        Of the stored grid.

    Returns
    -------
    volume : array
        On the stored grid.
    """
    return _reorient(volume, _LPS, nib.orientations.io_orientation(affine))


def check_suffix(path):
    """Raise unless a path ends in `.nii` or `.nii.gz`.

    Parameters
    ----------
    path : path
        Where a volume will be written.

    Raises
    ------
    ValueError
        If it ends in something else.
    """
    if not str(path).lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: the name of the file must end in .nii or .nii.gz")


def save_volume(volume, path, *, affine=None, like=None, name=""):
    """Write a volume as NIfTI in the array's own type.

    Parameters
    ----------
    volume : (X, Y, Z) array
        What to write.
    path : path
        Ends in `.nii` or `.nii.gz`; the temporary path of an atomic write.
    affine : (4, 4) array, optional
        Voxel indices to millimetres, in nibabel's RAS+ world.
    like : nibabel.Nifti1Header, optional
        Take the geometry of this header instead. Its texts, which may name the
        patient, are not copied.
    name : str
        Written as the header's "intent_name", at most 15 characters.

    Raises
    ------
    ValueError
        If the path has another suffix.
    """
    check_suffix(path)
    image = nib.Nifti1Image(volume, affine)
    image.set_data_dtype(volume.dtype)
    image.header.set_slope_inter(1, 0)
    for field in GEOMETRY if like is not None else ():
        image.header[field] = like[field]
    image.header["intent_name"] = name
    nib.save(image, Path(path))

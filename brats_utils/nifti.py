"""Read NIfTI files checked to the last byte, and write them; all nibabel is here."""

import hashlib
import io
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import isal_zlib as zlib  # the same interface, faster

from brats_utils.files import atomic_write

HEADER_BYTES = 352
# A whole-body scan is smaller; a header that asks for more is damaged or hostile.
MAX_VOXELS = 2**28
GZIP = 31  # zlib's name for a gzip stream, whose checksum it verifies
AGAIN = "The file is incomplete or damaged; download it again"
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


def _is_gzip(path):
    return Path(path).name.lower().endswith(".gz")


def _parse_header(start, path, channels):
    """Return the header that the first bytes of a volume hold, or say why not."""

    def refuse(problem):
        raise BratsDataError(problem, file=path, advice=AGAIN)

    try:
        # Extensions (four zeros say: none) hold notes of other programs, no geometry.
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


def _file_bytes(header, channels):
    """Return how long a file with this header is, uncompressed."""
    voxels = math.prod(header.get_data_shape()) * channels
    return int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize


def _unpack(data, expected):
    """Return the contents of a gzip file, `expected` bytes and no more, verified."""
    contents = b""
    while True:  # most files have one part; parallel compressors make several
        part = zlib.decompressobj(GZIP)
        # One byte more than expected, so that a bomb shows and does not go off.
        new = part.decompress(data, expected + 1 - len(contents))
        contents = contents + new if contents else new
        data = part.unused_data.lstrip(b"\0")
        if len(contents) > expected:
            raise ValueError(f"longer than the {expected} bytes its header says")
        if not part.eof:
            raise ValueError("the compressed data end too early")
        if not data:
            return contents


def read_header(path, channels=1):
    """Read and check the header of a NIfTI file, without its voxels.

    Parameters
    ----------
    path : path
        `.nii` or `.nii.gz`. Of a `.nii` the length is checked too; how much a
        `.nii.gz` holds is only known when it is unpacked.
    channels : int
        How many images the file must hold, one after the other.

    Returns
    -------
    header : nibabel.Nifti1Header
        Of three dimensions, those of one image.

    Raises
    ------
    BratsDataError
        If the file is missing or is no sound NIfTI file.
    """
    start = b""
    try:
        with open(path, "rb") as file:
            start, size = file.read(2**14), file.seek(0, 2)
        if _is_gzip(path):
            start = zlib.decompressobj(GZIP).decompress(start, HEADER_BYTES)
    except FileNotFoundError:
        raise BratsDataError("the file is not there", file=path) from None
    except (OSError, zlib.error) as error:
        problem = f"cannot be read: {error} (starts with {start[:12]!r})"
        raise BratsDataError(problem, file=path, advice=AGAIN) from None
    header = _parse_header(start[:HEADER_BYTES], path, channels)
    expected = _file_bytes(header, channels)
    if not _is_gzip(path) and size != expected:
        problem = f"is {size} bytes long; by its header it has {expected}"
        raise BratsDataError(problem, file=path, advice=AGAIN)
    return header


def read_volume(path, channels=1):
    """Read a NIfTI file: header, length, gzip checksum and voxels, in this order.

    Parameters
    ----------
    path : path
        `.nii` or `.nii.gz`. A plain `.nii` has no checksum: of changed bytes among
        its voxels nobody can know.
    channels : int
        As in `read_header`.

    Returns
    -------
    volume : (X, Y, Z) array, or (X, Y, Z, channels)
        As stored, in the file's own type where it is not scaled; read-only.
    header : nibabel.Nifti1Header
    checksum : str
        SHA-256 of the file as it lies on disk.

    Raises
    ------
    BratsDataError
        If the file is missing, damaged, incomplete, or longer than its header says.
    """
    header = read_header(path, channels)
    data = np.fromfile(path, np.uint8)  # numpy's memory: half the time of `bytes`
    data.flags.writeable = False
    checksum = hashlib.sha256(data).hexdigest()
    expected = _file_bytes(header, channels)
    try:
        contents = _unpack(data, expected) if _is_gzip(path) else data
        if len(contents) != expected:
            raise ValueError(f"{len(contents)} bytes; by its header it has {expected}")
    except (ValueError, zlib.error) as error:
        raise BratsDataError(str(error), file=path, advice=AGAIN) from None
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    offset = int(header["vox_offset"])
    shape = (*shape, channels) if channels > 1 else shape
    volume = np.frombuffer(contents, dtype, math.prod(shape), offset)
    volume = volume.reshape(shape, order="F")
    slope, inter = header.get_slope_inter()
    if (slope, inter) not in ((None, None), (1, 0)):
        volume = volume * np.float64(slope) + np.float64(inter or 0)
    return volume, header, checksum


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


def _turn(volume, start, end):
    """Swap and flip axes from one orientation to another."""
    turn = nib.orientations.ornt_transform(start, end)
    return nib.orientations.apply_orientation(volume, turn)


def to_lps(volume, affine):
    """Turn a volume into LPS order: X to the left, Y to the back, Z to the head.

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
    return _turn(volume, nib.orientations.io_orientation(affine), _LPS)


def from_lps(volume, affine):
    """Turn a volume from LPS order to that of a stored grid: the inverse of `to_lps`.

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
    return _turn(volume, _LPS, nib.orientations.io_orientation(affine))


def save_volume(volume, path, *, affine=None, like=None):
    """Write a volume as NIfTI, atomically, in the array's own type.

    Parameters
    ----------
    volume : (X, Y, Z) array
        What to write.
    path : path
        Ends in `.nii` or `.nii.gz`.
    affine : (4, 4) array, optional
        Voxel indices to millimetres, in nibabel's RAS+ world.
    like : nibabel.Nifti1Header, optional
        Whose geometry the file takes, instead of an affine.
    """
    image = nib.Nifti1Image(volume, affine, like)  # which copies the header
    image.set_data_dtype(volume.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_max"] = image.header["cal_min"] = 0
    with atomic_write(path) as temporary:
        nib.save(image, temporary)

"""Read, check and write NIfTI files; the only module that uses nibabel."""

import contextlib
import io
import math
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from brats_utils.files import atomic_write, check_option, check_path, find_changed
from brats_utils.labels import LABELS, label_table, relabel

# A whole-body scan is smaller; a header that asks for more is damaged or hostile.
MAX_VOXELS = 2**28
AGAIN = "The file is incomplete or damaged; download it again"
CORRECT = "Correct its header with nibabel, or export the file again"
CONVERT = "Unpack it, or convert it to one .nii.gz (nibabel.save, SimpleITK, dcm2niix)"
# Patterns of the first bytes of a file. The key is the class that reads the header, or
# the name of an unsupported format. The first match counts.
FORMATS = {
    nib.Nifti1Header: rb".{344}n\+1\0",
    nib.Nifti2Header: rb".{4}n\+2\0.{532}",
    "a .hdr without .img": rb"(.{344}ni1|.{4}ni2|(\x5c\x01\0|\0\0\x01).{341}\0{3})\0",
    "DICOM": rb".{128}DICM",
    "NRRD, MetaImage, MGH, HDF5 or MINC": rb"NRRD|ObjectType|\0\0\0\x01|\x89HDF|CDF",
    "an archive": rb"PK|7z|Rar!|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
    "too short, or a web page": rb".{,347}\Z|.{4}n\+2\0|\W{,9}[<{]",
    "unknown or damaged": rb"",
}
GEOMETRY = re.compile("pixdim|[qs]form_code|quatern|qoffset|srow|xyzt_units")
NO_ORIENTATION = "its header states no orientation; LAS is assumed"
WRITTEN_BY = "brats_utils"  # marks our label maps, which may be overwritten
_SYSTEM_DIRS = "__macosx", "lost+found", "$recycle.bin", "system volume information"
_LPS = nib.orientations.axcodes2ornt("LPS")


class BratsDataError(ValueError):
    """Raised for invalid data; the message says where it is and what to do.

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
        """Return the same error with the id of its case added."""
        return type(self)(self.problem, case=case, file=self.file, advice=self.advice)


def _refuse(path, problem, advice=CORRECT):
    raise BratsDataError(problem, file=path, advice=advice) from None


def _is_singular(affine):
    """Return whether an affine is finite but gives voxels no volume."""
    return np.isfinite(affine).all() and abs(np.linalg.det(affine)) < 1e-6


def _repair(header):
    """Repair what nibabel can, and affines whose meaning is clear."""
    sizes = abs(header["pixdim"][1:4])
    header.check_fix()
    if header["qform_code"] and _is_singular(header.get_sform()):
        header["sform_code"] = 0
    header["pixdim"][1:4] = sizes  # check_fix turns a size of 0 into 1 mm
    length = math.hypot(header["quatern_b"], header["quatern_c"], header["quatern_d"])
    # Rounding can make a unit quaternion too long, which nibabel rejects.
    for axis in "bcd" if 1 < length < 1.001 else "":
        header[f"quatern_{axis}"] /= length


def _parse_header(start, path, channels):
    """Parse and check a file's header, given its first bytes `start`.

    The header must state `channels` volumes that are not too large, and an invertible
    affine.
    """
    kind = next(kind for kind, sign in FORMATS.items() if re.match(sign, start, re.S))
    if isinstance(kind, str):
        problem = f"not a NIfTI file: {kind} (starts with {start[:12]!r})"
        _refuse(path, problem, AGAIN if "too short" in kind else CONVERT)
    # Extensions hold other programs' notes and no geometry, so they are not read.
    header = kind(start[: kind.sizeof_hdr], check=False)
    dtype = header.get_value_label("datatype")
    if not re.fullmatch("u?int(8|16|32|64)|float(32|64)", dtype):
        _refuse(path, f"its voxels are {dtype}", "Save them as integers or floats")
    try:
        _repair(header)
        header.get_slope_inter()  # raises if it is not valid
        shape, affine = header.get_data_shape(), header.get_best_affine()
    except Exception as error:  # nibabel raises many types for damaged bytes
        _refuse(path, f"its header or affine is not valid: {error}")
    wanted = f"{channels} images in one file" if channels > 1 else "a 3-D volume"
    # After the third axis, only a channel axis and axes of length 1 are allowed.
    more = [length for length in shape[3:] if length != 1]
    if len(shape) < 3 or min(shape) < 1 or more != ([channels] if channels > 1 else []):
        _refuse(path, f"expected {wanted}, found shape {shape}", f"Save only {wanted}")
    if math.prod(shape) > MAX_VOXELS:
        _refuse(path, f"the header asks for {shape}, more than {MAX_VOXELS} voxels")
    if not header.single_vox_offset <= header["vox_offset"] <= 2**24:
        _refuse(path, f"its header puts the voxels at byte {header['vox_offset']}")
    if not np.isfinite(affine).all() or _is_singular(affine):
        _refuse(path, f"its affine does not define a grid: {affine.tolist()}")
    header.set_data_shape(shape[:3])
    return header


def _read(path, channels, *, voxels):
    """Return a file's header and all its bytes, decompressed; check its length.

    Without `voxels`, only the start of the file is read, and the length of a compressed
    file is only checked roughly.
    """
    try:
        with open(path, "rb") as file:
            # The header is in the first 128 KB, however much the file decompresses to.
            contents, size = file.read(2**17), file.seek(0, os.SEEK_END)
            packed = contents[:2] == b"\x1f\x8b"
            unpack = igzip.open if packed else (lambda stored: stored)
            start = unpack(io.BytesIO(contents)).read(544)  # enough for NIfTI-2
            header = _parse_header(start, path, channels)
            sizes = *header.get_data_shape(), channels, header.get_data_dtype().itemsize
            expected = int(header["vox_offset"]) + math.prod(sizes)
            # gzip compresses by a factor of 1032 at most, or adds a few per cent.
            least = expected // 1032 if packed else expected
            most = expected + expected // 8 + 2**20 if packed else expected
            if voxels and least <= size <= most:
                file.seek(0)
                # One byte more than expected, so that the gzip checksum is verified and
                # a file that is far too long is detected without unpacking all of it.
                contents = unpack(file).read(expected + 1)
                size, least, most = len(contents), expected, expected
    except (EOFError, OverflowError, OSError, isal_zlib.error) as error:
        advice = "Check its path and access" if getattr(error, "errno", 0) else AGAIN
        _refuse(path, f"cannot be read: {error}", advice)
    if not least <= size <= most:
        kind, advice = ("shorter", AGAIN) if size < least else ("longer", CORRECT)
        problem = f"the file is {size} bytes long, {kind} than the {expected} bytes"
        _refuse(path, f"{problem} its header asks for", advice)
    return header, contents


def read_header(path, channels=1):
    """Read and check the header of a NIfTI file, without its voxels.

    Parameters
    ----------
    path : path
        NIfTI-1 or NIfTI-2, compressed or not; the content decides, not the name. The
        length of an uncompressed file is checked exactly, that of a compressed one only
        roughly.
    channels : int
        Number of images that the file must hold, one after the other.

    Returns
    -------
    header : nibabel.Nifti1Header or Nifti2Header
        With the three dimensions of one image. Its best affine is the qform if the
        sform is singular.

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
        As in `read_header`. A plain `.nii` has no checksum, so changes in its voxels
        cannot be detected.
    channels : int
        As in `read_header`.

    Returns
    -------
    volume : (X, Y, Z) array, or (X, Y, Z, channels)
        In the file's own type, unless the header scales the values.
    header : nibabel.Nifti1Header or Nifti2Header

    Raises
    ------
    BratsDataError
        If the file is missing, damaged, incomplete, or longer than its header says.
    """
    header, contents = _read(path, channels, voxels=True)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    shape = (*shape, channels) if channels > 1 else shape
    volume = np.ndarray(shape, dtype, contents, int(header["vox_offset"]), order="F")
    volume = volume.astype(dtype.newbyteorder("="), copy=False)
    return nib.volumeutils.apply_read_scaling(volume, *header.get_slope_inter()), header


def load_labels(path, labels="0124"):
    """Read one label map.

    Parameters
    ----------
    path : path
        A NIfTI file of labels.
    labels : str or dict
        The file's label convention, see `labels.label_table`.

    Returns
    -------
    segmentation : (X, Y, Z) uint8 array
        Values 0, 1, 2 and 4, whatever the file's convention.
    affine : (4, 4) array
        Voxel indices to millimetres.

    Raises
    ------
    BratsDataError
        If the file cannot be read, or holds a value that `labels` does not list.
    """
    table = label_table(labels)
    volume, header = read_volume(path)
    try:
        # Scaling may not be exact: in float32, 0.1 * 30 is 3.0000001.
        segmentation = relabel(np.round(volume, 4), table)
    except ValueError as error:
        advice = "If a set uses other labels, pass labels= to find_cases; a prediction "
        advice += "to score has to use 0, 1, 2 and 4 (see labels.relabel)"
        _refuse(path, str(error), advice)
    return segmentation, header.get_best_affine()


def check_unedited(folder, files):
    """Raise if a file was edited: it differs from the manifest and is still valid.

    Parameters
    ----------
    folder : path
        The folder with the manifest.
    files : dict
        "files" of the manifest: NIfTI volumes and tables.

    Raises
    ------
    ValueError
        The message names the file.
    """
    complete = {name: noted for name, noted in files.items() if noted}
    for path in (Path(folder, name) for name in find_changed(folder, complete)):
        with contextlib.suppress(BratsDataError):
            is_table = path.name.endswith(".csv") and path.is_file()
            if not (is_table and path.read_bytes().strip(b"\0")):
                read_volume(path)  # a damaged file is not an edit, and is overwritten
            problem = f"{path} was changed after it was written"
            raise ValueError(f"{problem}; move it, or choose another folder")


def absolute(root):
    """Return a folder as an absolute path, so that it has a name.

    Parameters
    ----------
    root : path

    Returns
    -------
    root : Path
        Links are kept, unless the path contains "..".
    """
    root = check_path("root", root)
    return root.resolve() if ".." in root.parts else root.absolute()


def walk(root):
    """Yield each file below a folder once, sorted within each subfolder.

    Parameters
    ----------
    root : path
        Links are followed; hidden files, hidden folders and system folders are skipped.

    Yields
    ------
    path : Path

    Raises
    ------
    BratsDataError
        If a folder cannot be read or a link is broken, because files would be missed
        without a message.
    """

    def refuse(error):
        problem = f"cannot be read ({error.strerror})"
        _refuse(error.filename, problem, "Change its permissions, or move it away")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        visible = (f for f in folders if f[0] != "." and f.lower() not in _SYSTEM_DIRS)
        folders[:] = sorted(visible)
        if (real := os.path.realpath(folder)) in seen:  # a second link to it, or a loop
            folders[:], names = (), ()
        seen.add(real)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if not os.path.exists(path):
                advice = "Connect the disk it is on, or remove the link"
                _refuse(path, "is a broken link", advice)
            yield path


def file_states(paths):
    """Return sizes and times that show whether files changed, without reading them.

    Parameters
    ----------
    paths : iterable of path

    Returns
    -------
    states : dict of str to list of int
        {resolved path: [bytes, modification time, change time]}, times in nanoseconds.
    """
    stats = {str(Path(path).resolve()): Path(path).stat() for path in paths}
    return {p: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in stats.items()}


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
    # Rounded, because a tilted grid of 1 mm may give 1.00000001.
    return tuple(np.round(nib.affines.voxel_sizes(affine), 5).tolist())


def check_spacing(header, case_id=None):
    """Raise unless voxels are 1 mm wide, as in all BraTS scans.

    Parameters
    ----------
    header : nibabel.Nifti1Header
    case_id : str, optional
        For the message.

    Raises
    ------
    BratsDataError
        If a side differs from 1 mm by more than 0.05 mm.
    """
    spacing = np.round(spacing_mm(header.get_best_affine()), 2).tolist()
    if not np.allclose(spacing, 1, atol=0.05):
        problem = f"its voxel size is {spacing} mm; the networks expect 1 mm"
        raise BratsDataError(problem, case=case_id, advice="Resample it to 1 mm first")


def check_grid(header, path, first):
    """Raise if a volume is not on the same grid as the first one of its case.

    Parameters
    ----------
    header : nibabel.Nifti1Header
    path : path
        Its file, for the message.
    first : (Path, nibabel.Nifti1Header)
        The case's first volume.

    Raises
    ------
    BratsDataError
        The message says what differs.
    """
    name, other = first[0].name, first[1]
    shape, expected = header.get_data_shape(), other.get_data_shape()
    advice = "All volumes of a case must lie on one grid; register them"
    if shape != expected:
        _refuse(path, f"shape {shape}, but {name} has {expected}", advice)
    if not np.allclose(header.get_best_affine(), other.get_best_affine(), atol=1e-3):
        _refuse(path, f"its grid (affine) differs from that of {name}", advice)


def threes_and_fours(paths):
    """Return which of the values 3 and 4 each label map holds.

    Parameters
    ----------
    paths : list of path or None

    Returns
    -------
    values : list of set of int
        Empty if there is no file or it cannot be read; reading the case will raise.
    """

    def find(path):
        with contextlib.suppress(BratsDataError):
            if path is not None:
                volume = read_volume(path)[0]
                return {value for value in (3, 4) if (abs(volume - value) < 1e-3).any()}
        return set()

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(find, paths)]


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
        Affine of that grid.

    Returns
    -------
    volume : array
        With axes swapped and flipped, values unchanged; a view where possible.
    """
    return _reorient(volume, nib.orientations.io_orientation(affine), _LPS)


def from_lps(volume, affine):
    """Reorient a volume from LPS to a stored grid: the inverse of `to_lps`.

    Parameters
    ----------
    volume : (X, Y, Z, ...) array
        In LPS order.
    affine : (4, 4) array
        Affine of the stored grid.

    Returns
    -------
    volume : array
        On the stored grid.
    """
    return _reorient(volume, _LPS, nib.orientations.io_orientation(affine))


def save_volume(volume, path, *, affine=None, like=None, name=""):
    """Write a volume as NIfTI-1 in the array's own type.

    Parameters
    ----------
    volume : (X, Y, Z) array
        What to write.
    path : path
        Ends in `.nii` or `.nii.gz`; the temporary path of an atomic write.
    affine : (4, 4) array, optional
        Voxel indices to millimetres, in nibabel's RAS+ space.
    like : nibabel.Nifti1Header or Nifti2Header, optional
        Header to take the geometry from instead. Its text fields, which may name the
        patient, are not copied.
    name : str
        Written as the header's "intent_name", at most 15 characters. Its "aux_file" is
        then a checksum of the voxels.
    """
    image = nib.Nifti1Image(volume, affine, dtype=volume.dtype)
    image.header.set_slope_inter(1, 0)
    for field in filter(GEOMETRY.match, like or ()):
        image.header[field] = like[field]
    image.header["intent_name"] = name
    image.header["aux_file"] = _checksum(volume) if name else b""
    nib.save(image, path)


def _checksum(volume):
    """Return the checksum of a volume's voxels, in its own type."""
    return f"{zlib.crc32(volume.tobytes()):08x}".encode()


def _is_ours(path):
    """Return whether we wrote a label map, and nobody has edited it since."""
    volume, header = read_volume(path)
    # Before checksums were written, the field was empty.
    is_unedited = header["aux_file"] in (b"", _checksum(volume))
    return is_unedited and header["intent_name"] == WRITTEN_BY.encode()


def write_segmentation(segmentation, header, path):
    """Write a label map to the temporary path of an atomic write.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Values 0, 1, 2 and 4.
    header : nibabel.Nifti1Header
        Header of the case's images.
    path : path
        Ends in `.nii` or `.nii.gz`.

    Raises
    ------
    ValueError
        If the shape differs from the header's, or a value is not a BraTS label.
    """
    segmentation, shape = np.asarray(segmentation), header.get_data_shape()
    if segmentation.shape != shape:
        found = f"the label map has shape {segmentation.shape}"
        raise ValueError(f"{found}, the case's images {shape}")
    labels = relabel(segmentation, {value: value for value in LABELS})
    save_volume(labels, path, like=header, name=WRITTEN_BY)


def save_segmentation(segmentation, case, path):
    """Write a label map on the case's own grid, as the challenge requires.

    Parameters
    ----------
    segmentation : (X, Y, Z) integer array
        Values 0, 1, 2 and 4, in the shape of the case's images.
    case : Case
        The file gets the affine and the header geometry of its images.
    path : path
        Ends in `.nii` or `.nii.gz`; the file holds uint8. A label map that this
        function wrote and nobody has edited is replaced; any other file is left as it
        is.

    Raises
    ------
    ValueError
        If the shape differs from the case's, a value is not a BraTS label, or `path` is
        a file that this function did not write or that was edited.
    """
    path = check_path("path", path)
    check_option("case", case, lambda c: len(c.images), "a Case, as find_cases returns")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: the name of the file must end in .nii or .nii.gz")
    if path.exists() and not _is_ours(path):
        what = f"{path} already exists and was not written by this project, or edited"
        raise ValueError(f"{what}; it is left as it is. Choose another path")
    header = read_header(next(iter(case.images.values())), case.channels)
    with atomic_write(path) as temporary:
        write_segmentation(segmentation, header, temporary)

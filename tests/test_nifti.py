"""The checked reader: damaged files are refused, valid ones read as nibabel does."""

import gzip
import io
import resource
import struct
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, toy_volumes

from brats_utils.nifti import (
    BratsDataError,
    from_lps,
    read_header,
    read_volume,
    save_volume,
    spacing_mm,
    to_lps,
)

FIELDS = {  # offset and type in a NIfTI-1 header
    "dim": (40, "<8h"),
    "datatype": (70, "<h"),
    "bitpix": (72, "<h"),
    "pixdim1": (80, "<f"),
    "vox_offset": (108, "<f"),
    "scl_slope": (112, "<f"),
    "magic": (344, "<4s"),
}


def write(path, volume=None, affine=AFFINE):
    volume = toy_volumes()[0]["flair"] if volume is None else volume
    save_volume(volume, path, affine=affine)
    return path


def patch(path, field, *values):
    """Change one field of the header of a `.nii`."""
    data = bytearray(path.read_bytes())
    struct.pack_into(FIELDS[field][1], data, FIELDS[field][0], *values)
    path.write_bytes(data)


def accepted_as(path):
    """Return the voxels and affine of a file, or None if it is refused."""
    try:
        volume, header = read_volume(path)
    except BratsDataError as error:
        assert path.name in str(error) and error.advice
        return None
    return np.array(volume), header.get_best_affine()


def equal(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["i2", ">i2", "u1", "f4", "f8"])
def test_reads_what_nibabel_reads(tmp_path, suffix, kind):
    volume = toy_volumes()[0]["t2"].clip(0, 255).astype(kind)
    path = write(tmp_path / f"x{suffix}", volume)
    found, header = read_volume(path)
    np.testing.assert_array_equal(found, nib.load(path).get_fdata())
    assert found.dtype.kind == np.dtype(kind).kind
    np.testing.assert_array_equal(header.get_best_affine(), AFFINE)


def test_scaled_voxels_are_scaled(tmp_path):
    path = write(tmp_path / "x.nii")
    patch(path, "scl_slope", 0.5)
    expected = toy_volumes()[0]["flair"] * 0.5
    np.testing.assert_array_equal(read_volume(path)[0], expected)


def test_a_gzip_of_several_parts_is_read_whole(tmp_path):
    data = write(tmp_path / "x.nii").read_bytes()
    path = tmp_path / "y.nii.gz"
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    np.testing.assert_array_equal(read_volume(path)[0], toy_volumes()[0]["flair"])


def test_A05_a_cut_gz_is_refused(tmp_path):
    path = write(tmp_path / "x.nii.gz")
    whole, rng = path.read_bytes(), np.random.default_rng(5)
    cuts = [*rng.integers(1, len(whole), 50), *range(len(whole) - 9, len(whole))]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert accepted_as(path) is None, cut


def damage(whole, n, seed):
    """Yield copies of some bytes with one to three of them changed."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(0, 8)
        yield bytes(data)


def silently_wrong(path, n):
    """Return how many of `n` damaged copies are taken for something else."""
    expected, wrong = accepted_as(path), 0
    for data in damage(path.read_bytes(), n, seed=6):
        path.write_bytes(data)
        found = accepted_as(path)
        wrong += found is not None and not equal(found, expected)
    return wrong


def test_A06_no_damaged_gz_gets_in_unseen(tmp_path):
    assert silently_wrong(write(tmp_path / "x.nii.gz"), 1000) == 0


def test_A06_fails_without_the_checksum(tmp_path, monkeypatch):
    """Read as tools do that stop at the last voxel."""

    def careless(path):
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)  # bare: nothing is verified
        try:
            return io.BytesIO(unpack.decompress(path.read_bytes()[10:]))
        except zlib.error as error:
            raise OSError(error) from None

    path = write(tmp_path / "x.nii.gz")
    data = gzip.compress(gzip.decompress(path.read_bytes()), mtime=0)
    path.write_bytes(data)  # a header of ten bytes, without a name
    monkeypatch.setattr("brats_utils.nifti.igzip.open", careless)
    assert silently_wrong(path, 200) > 0


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_R1_a_file_is_read_by_its_content_whatever_its_name(tmp_path, name):
    plain = write(tmp_path / "plain.nii").read_bytes()
    for data in (plain, gzip.compress(plain)):
        (tmp_path / name).write_bytes(data)
        found, header = read_volume(tmp_path / name)
        np.testing.assert_array_equal(found, toy_volumes()[0]["flair"])
        np.testing.assert_array_equal(
            read_header(tmp_path / name).get_best_affine(), header.get_best_affine()
        )


def test_A07_a_nii_of_another_length_is_refused(tmp_path):
    path = write(tmp_path / "x.nii")
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:400], whole[:100], whole + b"\0", whole + whole):
        path.write_bytes(data)
        assert accepted_as(path) is None
    path.write_bytes(whole[:-2])
    message = f"{len(whole) - 2} bytes long.* {len(whole)} bytes its header asks for"
    with pytest.raises(BratsDataError, match=message):
        read_header(path)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("data", [b"<html>quota", b"", bytes(5000), b"PK\3\4" * 500])
def test_A09_no_nifti_at_all(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BratsDataError, match="starts with"):
        read_volume(path)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("dim", (3, 24, 24, 17, 1, 1, 1, 1)),
        ("dim", (3, 24, 24, -16, 1, 1, 1, 1)),
        ("dim", (2, 24, 24, 16, 1, 1, 1, 1)),
        ("dim", (9, 24, 24, 16, 1, 1, 1, 1)),
        ("dim", (3, 0, 24, 16, 1, 1, 1, 1)),
        ("datatype", (16,)),
        ("datatype", (128,)),
        ("datatype", (32,)),
        ("datatype", (999,)),
        ("bitpix", (32,)),
        ("pixdim1", (np.nan,)),
        ("vox_offset", (0,)),
        ("vox_offset", (354,)),
        ("vox_offset", (352.5,)),
        ("vox_offset", (np.nan,)),
        ("vox_offset", (1e9,)),
        ("scl_slope", (np.nan,)),
        ("scl_slope", (np.inf,)),
        ("magic", (b"ni1\0",)),
        ("magic", (b"xyz\0",)),
    ],
)
def test_A11_a_wrong_header_is_refused_or_reads_equal(tmp_path, field, values):
    path = write(tmp_path / "x.nii")
    expected = accepted_as(path)
    patch(path, field, *values)
    found = accepted_as(path)
    assert found is None or equal(found, expected)


BOMB = """
import resource, sys
import brats_utils.nifti as n
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for path in sys.argv[1:]:
    try:
        n.read_volume(path)
        sys.exit("accepted")
    except n.BratsDataError as error:
        print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
sys.exit(f"grew by {grown} KB" if grown > 100_000 else 0)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no address limit here")
def test_A12_a_header_that_asks_for_much_and_a_bomb(tmp_path):
    huge = write(tmp_path / "huge.nii")
    patch(huge, "dim", 3, 3000, 3000, 3000, 1, 1, 1, 1)
    bomb = tmp_path / "bomb.nii.gz"
    small = write(tmp_path / "x.nii").read_bytes()
    zeros = gzip.compress(bytes(10**7))
    bomb.write_bytes(gzip.compress(small + bytes(10**7)) + zeros * 200)  # 2 GB
    command = [sys.executable, "-c", BOMB, huge, bomb]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "more than" in done.stdout and "longer than" in done.stdout


def test_A14_a_fourth_axis(tmp_path):
    volume = toy_volumes()[0]["flair"]
    path = write(tmp_path / "x.nii", volume[..., None])
    np.testing.assert_array_equal(read_volume(path)[0], volume)
    path = write(tmp_path / "x.nii", np.stack([volume] * 2, -1))
    with pytest.raises(BratsDataError, match="expected a 3-D volume"):
        read_volume(path)


def test_A16_an_affine_that_is_no_grid(tmp_path):
    for broken in (np.diag([np.nan, 1, 1, 1]), np.diag([0.0, 1, 1, 1])):
        path = tmp_path / "x.nii"
        image = nib.Nifti1Image(toy_volumes()[0]["flair"], None)
        image.header.set_sform(broken, code=1)
        nib.save(image, path)
        with pytest.raises(BratsDataError, match="x.nii"):
            read_volume(path)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_reads_a_file_with_header_extensions(tmp_path, name):
    # Segmentation tools leave notes between the header and the voxels.
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 2000))
    nib.save(image, tmp_path / name)
    volume, header = read_volume(tmp_path / name)
    assert header["vox_offset"] > 2000
    np.testing.assert_array_equal(volume, voxels)


def test_a_folder_in_a_files_place_is_refused(tmp_path):
    (tmp_path / "x.nii").mkdir()
    with pytest.raises(BratsDataError, match="cannot be read"):
        read_header(tmp_path / "x.nii")


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "PIR", "SRA"])
def test_orientation_round_trip(codes):
    volume = np.arange(24).reshape(2, 3, 4)
    lps = nib.orientations.axcodes2ornt("LPS")
    turn = nib.orientations.ornt_transform(lps, nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(volume, turn)
    affine = np.diag([-1.0, -1, 1, 1]) @ nib.orientations.inv_ornt_aff(turn, (2, 3, 4))
    assert "".join(nib.aff2axcodes(affine)) == codes
    np.testing.assert_array_equal(to_lps(stored, affine), volume)
    np.testing.assert_array_equal(from_lps(volume, affine), stored)


def test_spacing_of_a_tilted_grid():
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1, 2, 3])
    assert spacing_mm(affine) == pytest.approx((1, 2, 3))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_saved_volume_reads_back_on_the_grid_it_was_given(tmp_path, suffix):
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.array([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    save_volume(volume, tmp_path / f"first{suffix}", affine=affine)
    like = read_header(tmp_path / f"first{suffix}")
    save_volume(volume.astype(np.uint8), tmp_path / f"x{suffix}", like=like)
    found, header = read_volume(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, volume)
    np.testing.assert_array_equal(header.get_best_affine(), affine)


def test_R6_another_suffix_is_refused(tmp_path):
    for name in ("p.hdr", "p.img", "p.nii.bz2", "p.mgz", "p", "nii"):
        with pytest.raises(ValueError, match=r"\.nii or \.nii\.gz"):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_error_says_where_what_and_what_to_do():
    error = BratsDataError("too short", file="x.nii", advice="Download it again")
    assert str(error.of("001")) == "001, x.nii: too short. Download it again."
    assert str(BratsDataError("no scans")) == "no scans."

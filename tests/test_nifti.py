"""The checked reader: damaged files are refused, valid ones read as nibabel does."""

import gzip
import io
import resource
import struct
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, toy_volumes

from brats_utils.nifti import (
    AGAIN,
    BratsDataError,
    from_lps,
    load_labels,
    read_header,
    read_volume,
    save_volume,
    spacing_mm,
    to_lps,
    walk,
)

FIELDS = {  # offset and type in a NIfTI-1 header
    "dim": (40, "<8h"),
    "datatype": (70, "<h"),
    "bitpix": (72, "<h"),
    "pixdim1": (80, "<f"),
    "vox_offset": (108, "<f"),
    "scl_slope": (112, "<f"),
    "scl_inter": (116, "<f"),
    "magic": (344, "<4s"),
}
HEADERS = [nib.Nifti1Header, nib.Nifti2Header]


def write(path, volume=None, affine=AFFINE):
    volume = toy_volumes()[0]["flair"] if volume is None else volume
    save_volume(volume, path, affine=affine)
    return path


def patch(path, field, *values):
    """Change one field of the header of a `.nii`."""
    data = bytearray(path.read_bytes())
    struct.pack_into(FIELDS[field][1], data, FIELDS[field][0], *values)
    path.write_bytes(data)


def write_as(path, kind, order="<", volume=None, **fields):
    """Write with nibabel, and set fields of the header as they are."""
    volume = toy_volumes()[0]["flair"] if volume is None else volume
    header = kind(endianness=order)
    header.set_data_dtype(volume.dtype)
    image_kind = nib.Nifti2Image if kind is nib.Nifti2Header else nib.Nifti1Image
    image = image_kind(volume, AFFINE, header)
    image.set_qform(AFFINE, 1)
    image.header.set_slope_inter(1, 0)
    data = bytearray(image.to_bytes())
    header = kind(bytes(data[: kind.sizeof_hdr]), check=False)
    for field, value in fields.items():
        header[field] = value
    data[: kind.sizeof_hdr] = header.binaryblock
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def error_of(path, channels=1):
    """Return the error with which both readers refuse a file."""
    with pytest.raises(BratsDataError, match=path.name) as caught:
        read_volume(path, channels)
    return caught.value


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
    assert silently_wrong(write_as(tmp_path / "2.nii.gz", nib.Nifti2Header), 300) == 0


def test_A06_fails_without_the_checksum(tmp_path, monkeypatch):
    """Read as tools do that stop at the last voxel."""

    def careless(file):
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)  # bare: nothing is verified
        try:
            return io.BytesIO(unpack.decompress(file.read()[10:]))
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


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", HEADERS)
def test_R1_both_versions_and_byte_orders(tmp_path, name, order, kind):
    for stored in ("i2", "f4", "u1", "f8"):
        volume = toy_volumes()[0]["flair"].clip(0, 255).astype(stored)
        path = write_as(tmp_path / name, kind, order, volume)
        assert nib.load(path).header.endianness == order
        found, header = read_volume(path)
        np.testing.assert_array_equal(found, volume)
        assert found.dtype == np.dtype(stored)  # of this computer's byte order
        np.testing.assert_array_equal(header.get_best_affine(), AFFINE)
        assert read_header(path)["pixdim"][1:4].tolist() == [1, 1, 1]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", HEADERS)
def test_R1_the_geometry_of_any_header_is_written(tmp_path, order, kind):
    turn = nib.quaternions.quat2mat([0.5, 0.1, 0.7, 0.5])
    affine = nib.affines.from_matvec(turn @ np.diag([0.9, 1.1, -2]), [5, 6.5, 7])
    path, header = tmp_path / "x.nii", kind(endianness=order)
    header.set_data_shape((24, 24, 16))
    for set_form in (header.set_sform, header.set_qform):
        set_form(affine, code=1)
    header["xyzt_units"] = 10
    save_volume(toy_volumes()[1], path, like=header)
    written = nib.load(path).header
    assert type(written) is nib.Nifti1Header and written["xyzt_units"] == 10
    for found in (written.get_sform(), written.get_qform()):
        np.testing.assert_allclose(found, affine, atol=1e-5)


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_further_axes_of_length_1_are_dropped(tmp_path, kind):
    path, volume = tmp_path / "x.nii.gz", toy_volumes()[0]["flair"]
    for axes in [(1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)]:
        write_as(path, kind, volume=volume.reshape(*volume.shape, *axes))
        found, header = read_volume(path)
        np.testing.assert_array_equal(found, volume)
        assert header.get_data_shape() == volume.shape
        assert read_header(path).get_data_shape() == volume.shape
    for axes in [(2,), (1, 2), (2, 1), (3, 1, 1)]:
        write_as(path, kind, volume=np.ones((*volume.shape, *axes), np.int16))
        error = error_of(path)
        assert "expected a 3-D volume" in error.problem
        assert str((*volume.shape, *axes)) in error.problem
        assert error.advice == "Save only a 3-D volume"


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_images_in_one_file(tmp_path, kind):
    path, images = tmp_path / "x.nii.gz", np.stack([*toy_volumes()[0].values()], -1)
    for axes in [(4,), (4, 1), (1, 4), (1, 1, 4), (1, 4, 1)]:
        write_as(path, kind, volume=images.reshape(24, 24, 16, *axes))
        found, header = read_volume(path, channels=4)
        np.testing.assert_array_equal(found, images)
        assert header.get_data_shape() == (24, 24, 16)
    for axes in [(), (1,), (3,), (5,), (2, 2), (4, 4), (4, 2)]:
        write_as(path, kind, volume=np.ones((24, 24, 16, *axes), np.int16))
        assert "expected 4 images in one file" in str(error_of(path, 4))


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_a_good_qform_stands_in_for_a_singular_sform(tmp_path, kind):
    flat = np.diag([1.0, 1, 0, 1])
    for broken in (np.zeros((4, 4)), flat, flat[[1, 1, 0, 3]]):
        rows = dict(zip(("srow_x", "srow_y", "srow_z"), broken, strict=False))
        bad = {"sform_code": 1, **rows}
        path = write_as(tmp_path / "x.nii", kind, qform_code=1, **bad)
        header = read_volume(path)[1]
        np.testing.assert_array_equal(header.get_best_affine(), AFFINE)
        save_volume(toy_volumes()[1], tmp_path / "y.nii", like=header)
        np.testing.assert_array_equal(nib.load(tmp_path / "y.nii").affine, AFFINE)
        for unusable in (
            {"qform_code": 0},
            {"qform_code": 1, "quatern_b": 0.9},
            {"qform_code": 1, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]},
            {"qform_code": 1, "qoffset_x": np.nan},
            {"qform_code": 1, "srow_y": [np.nan] * 4},  # not a number is never guessed
        ):
            error = error_of(write_as(tmp_path / "x.nii", kind, **bad | unusable))
            assert "affine" in error.problem and "header" in error.advice


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_a_voxel_size_of_0_is_not_taken_for_1_mm(tmp_path, kind):
    sizes = {"pixdim": [1, 1, 1, 0, 0, 0, 0, 0], "qform_code": 0}
    path = write_as(tmp_path / "x.nii", kind, sform_code=0, **sizes)
    assert "affine" in error_of(path).problem
    path = write_as(tmp_path / "x.nii", kind, sform_code=1, **sizes)
    np.testing.assert_array_equal(read_header(path).get_best_affine(), AFFINE)


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_a_rounded_quaternion_is_normalised(tmp_path, kind):
    rng = np.random.default_rng(1)
    for length in (1 + 1e-12, 1 + 1e-7, 1 + 1e-5, 1 + 9e-4):
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        fields = {f"quatern_{x}": axis[n] * length for n, x in enumerate("bcd")}
        path = tmp_path / "x.nii"
        write_as(path, kind, sform_code=0, qform_code=1, **fields)
        turn = 2 * np.outer(axis, axis) - np.eye(3)  # by 180 degrees
        found = read_header(path).get_best_affine()[:3, :3]
        np.testing.assert_allclose(found, turn, atol=1e-6)
        save_volume(toy_volumes()[1], tmp_path / "y.nii", like=read_header(path))
        found = nib.load(tmp_path / "y.nii").affine[:3, :3]
        np.testing.assert_allclose(found, turn, atol=1e-6)
    for length in (1.01, 1.5, 1e30):
        write_as(path, kind, sform_code=0, qform_code=1, quatern_d=length)
        assert "affine" in error_of(path).problem


@pytest.mark.parametrize("kind", HEADERS)
def test_R1_scaled_labels_are_whole_numbers(tmp_path, kind):
    labels, path = np.array([[[0, 1, 2, 4]]]), tmp_path / "x.nii.gz"
    scalings = [(0.1, 0), (1 / 3, 0), (1e-3, 0), (1 / 255, 0), (0.1, -3), (-0.2, 4)]
    for slope, inter in [*scalings, (4 / 65535, 2)]:  # the last is nibabel's for int16
        stored = np.rint((labels - inter) / slope).astype(np.int32)
        write_as(path, kind, volume=stored, scl_slope=slope, scl_inter=inter)
        assert load_labels(path)[0].tolist() == labels.tolist()


def test_R1_labels_that_are_not_whole_stay_as_they_are(tmp_path):
    path = tmp_path / "x.nii"
    for value in (0.999, 1.001, 0.5, -0.9, np.nan, np.inf):
        for stored in (np.float32, np.float64):
            write_as(path, nib.Nifti1Header, volume=np.full((1, 1, 2), value, stored))
            with pytest.raises(BratsDataError, match="expected only the labels"):
                load_labels(path)
    write(path, toy_volumes()[1])
    np.testing.assert_array_equal(load_labels(path)[0], toy_volumes()[1])


def starts_with(data, place=0):
    return bytes(place) + data + bytes(3000)


def analyze_header(order):
    header = nib.AnalyzeHeader(endianness=order)
    header.set_data_shape((2, 3, 4))
    return header.binaryblock


PAIR1 = nib.nifti1.Nifti1PairHeader().binaryblock
PAIR2 = nib.nifti2.Nifti2PairHeader(endianness=">").binaryblock
OTHERS = [  # what a file holds, words of the problem, and of the advice
    (PAIR1, "a .hdr without .img", "one .nii.gz (nibabel.save"),
    (PAIR1 + bytes(4), "a .hdr without .img", "nibabel.save"),
    (PAIR2, "a .hdr without .img", "nibabel.save"),
    (analyze_header("<"), "a .hdr without .img", "nibabel.save"),
    (analyze_header(">"), "a .hdr without .img", "nibabel.save"),
    (starts_with(b"DICM", 128), "DICOM", "dcm2niix"),
    (starts_with(b"NRRD0004\n# Complete"), "NRRD, MetaImage, MGH", "SimpleITK"),
    (starts_with(b"\0\0\0\1\0\0\1\0"), "NRRD, MetaImage, MGH", "nibabel.save"),
    (starts_with(b"\x89HDF\r\n\x1a\n"), "NRRD, MetaImage, MGH", "convert"),
    (starts_with(b"CDF\1"), "NRRD, MetaImage, MGH", "convert"),
    (starts_with(b"ObjectType = Image\n"), "NRRD, MetaImage, MGH", "SimpleITK"),
    (starts_with(b"PK\3\4"), "an archive", "Unpack"),
    (starts_with(b"ustar\00000", 257), "an archive", "Unpack"),
    (gzip.compress(gzip.compress(b"x" * 999)), "an archive", "Unpack"),
    (starts_with(b"BZh91AY&SY"), "an archive", "Unpack"),
    (starts_with(b"\xfd7zXZ\0"), "an archive", "Unpack"),
    (starts_with(b"\x28\xb5\x2f\xfd"), "an archive", "Unpack"),
    (bytes(range(1, 256)) * 9, "unknown", "convert"),
    (bytes(5000), "unknown or damaged", "convert"),
]


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_R1_another_format_is_named_with_its_remedy(tmp_path, name):
    for plain, problem, advice in OTHERS:
        for data in (plain, gzip.compress(plain)):
            (tmp_path / name).write_bytes(data)
            error = error_of(tmp_path / name)
            assert f"not a NIfTI file: {problem}" in error.problem
            assert "starts with" in error.problem and advice in error.advice


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", HEADERS)
def test_R1_voxels_of_another_type_are_named(tmp_path, kind, order):
    names = {1: "binary", 32: "complex64", 128: "RGB", 1536: "float128"}
    names |= {1792: "complex128", 2048: "complex256", 2304: "RGBA", 999: "999"}
    for code, name in names.items():
        path = write_as(tmp_path / "x.nii", kind, order, datatype=code)
        error = error_of(path)
        assert f"voxels are {name}" in error.problem or name == "999"
        assert name in error.problem and "integers or floats" in error.advice


def test_R1_download_it_again_only_where_bytes_are_missing_or_changed(tmp_path):
    path = write(tmp_path / "x.nii.gz")
    plain, packed = gzip.decompress(path.read_bytes()), path.read_bytes()
    nifti2 = write_as(tmp_path / "2.nii", nib.Nifti2Header).read_bytes()
    broken = packed[:-20] + b"x" + packed[-19:]
    cut = [plain[:n] for n in (-1, 5000, 360, 352, 350, 346, 100, 4)]
    cut += [nifti2[:n] for n in (-1, 5000, 543, 539, 100, 9)]
    text = [b"", gzip.compress(b""), b"<html>", b'\n<?xml version="1.0"?>', b'{"error"']
    text += [text[2].decode().encode(code) * 99 for code in ("utf-8-sig", "utf-16")]
    lost = [*cut, *map(gzip.compress, cut), *text, broken, packed + b"junk"]
    for data in [*lost, packed[:-9], packed[:99], packed[:5], packed[:2]]:
        path.write_bytes(data)
        assert error_of(path).advice == AGAIN, data[:20]
    for data in (plain + b"x", nifti2 + plain, gzip.compress(plain + b"x")):
        path.write_bytes(data)
        assert "longer than the" in error_of(path).problem
        assert "Correct" in error_of(path).advice
    path.write_bytes(plain + b"x")
    with pytest.raises(BratsDataError, match=f"{len(plain) + 1} .* {len(plain)} bytes"):
        read_header(path)
    path.write_bytes(plain)
    for field, value in [
        ("dim", (3, 24, 24, 0, 1, 1, 1, 1)),
        ("dim", (2, 24, 24, 16, 1, 1, 1, 1)),
        ("dim", (3, 9000, 9000, 9000, 1, 1, 1, 1)),
        ("datatype", (999,)),
        ("vox_offset", (1e9,)),
        ("scl_inter", (np.nan,)),
    ]:
        patch(path, field, *value)
        assert error_of(path).advice and "download" not in error_of(path).advice
        path.write_bytes(plain)
    (tmp_path / "folder.nii").mkdir()
    assert "download" not in error_of(tmp_path / "folder.nii").advice


EMPTY = gzip.compress(b"")


def seconds(call, *arguments):
    """Return the processor time that a call takes, and its error if it has one."""
    start = time.process_time()
    try:
        call(*arguments)
        error = None
    except BratsDataError as caught:
        error = caught
    return time.process_time() - start, error


def test_R5_many_members_take_no_more_time_than_the_header_promises(tmp_path):
    data = write(tmp_path / "x.nii").read_bytes()
    whole, path = gzip.compress(data), tmp_path / "y.nii.gz"
    halves = [gzip.compress(data[:999]), gzip.compress(data[999:])]
    many, ones = EMPTY * 1_500_000, gzip.compress(b"\0") * 1_500_000  # 30 MB
    for begin, end in ((b"", b""), (b"", whole), (whole, b""), halves):
        for members in (many, ones):
            path.write_bytes(begin + members + end)
            for reader in (read_header, read_volume):
                took, error = seconds(reader, path)
                assert error and took < 0.5, (took, error)


def test_R5_what_cannot_hold_its_voxels_is_not_unpacked(tmp_path):
    path = write(tmp_path / "x.nii")
    patch(path, "dim", 3, 640, 640, 640, 1, 1, 1, 1)  # 500 MB
    for data in (path.read_bytes(), gzip.compress(path.read_bytes())):
        path.write_bytes(data)
        for reader in (read_header, read_volume):
            took, error = seconds(reader, path)
            assert "shorter" in error.problem and error.advice == AGAIN and took < 0.1


def test_R5_usual_ways_to_pack_are_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**16, (64, 64, 64), dtype=np.uint16)
    data = write(tmp_path / "x.nii", noise).read_bytes()
    path, slices = tmp_path / "y.nii.gz", range(0, len(data), 8192)
    for level in (0, 1, 6, 9):
        blocks = [gzip.compress(data[n : n + 8192], level) for n in slices]
        for packed in (gzip.compress(data, level), b"".join(blocks) + EMPTY):
            for padding in (b"", bytes(512), bytes(2**16)):
                path.write_bytes(packed + padding)
                np.testing.assert_array_equal(read_volume(path)[0], noise)


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


def test_an_error_says_where_what_and_what_to_do():
    error = BratsDataError("too short", file="x.nii", advice="Download it again")
    assert str(error.of("001")) == "001, x.nii: too short. Download it again."
    assert str(BratsDataError("no scans")) == "no scans."


@pytest.mark.parametrize(
    "name", ["lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"]
)
def test_A24_folders_of_the_system_are_left_out(tmp_path, name):
    for path in (tmp_path / name / "x.nii", tmp_path / "set" / "y.nii"):
        path.parent.mkdir()
        path.touch()
    assert [path.name for path in walk(tmp_path)] == ["y.nii"]

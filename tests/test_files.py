import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from brats_utils.files import (
    atomic_write,
    extract,
    free_gb,
    project_root,
    read_json,
    setting,
    sha256,
    write_json,
    write_npy,
)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("7", 3, 7),
        ("0.5", 1.0, 0.5),
        ("yes", False, True),
        ("0", True, False),
        ("64, 64,32", (128, 128, 128), (64, 64, 32)),
        ("none", (128, 128, 128), None),
        ("flair,t1", ("flair",), ("flair", "t1")),
        ("/data/x", Path("y"), Path("/data/x")),
        ("text", None, "text"),
        ("64, 64,32", None, (64, 64, 32)),
        ("/data/a, b", None, "/data/a, b"),
        ("", 3, 3),
    ],
)
def test_setting_reads_by_the_type_of_the_default(monkeypatch, text, default, value):
    monkeypatch.setenv("BRATS_THING", text)
    found = setting("THING", default)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("default", [3, True, (1, 2)])
def test_setting_names_the_variable_it_cannot_read(monkeypatch, default):
    monkeypatch.setenv("BRATS_EPOCHS", "many")
    with pytest.raises(ValueError, match="BRATS_EPOCHS='many'"):
        setting("EPOCHS", default)


def test_project_root_is_the_nearest_with_pyproject(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    assert project_root(tmp_path / "notebooks") == tmp_path.resolve()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_makes_folders_and_keeps_long_suffixes(tmp_path):
    with atomic_write(tmp_path / "new" / "a.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"x")
    assert (tmp_path / "new" / "a.nii.gz").read_bytes() == b"x"


def test_npy_goes_there_and_back_but_objects_do_not(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_npy(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    with pytest.raises(ValueError, match="[Oo]bject"):
        write_npy(tmp_path / "b.npy", np.array([{}]))
    assert not (tmp_path / "b.npy").exists()


def test_sha256_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The first test vector of FIPS 180.
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_free_gb_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_gb(tmp_path / "a" / "b") > 0


def test_broken_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def a_zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def a_link(target):
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {entry: target}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"good": "x", "../out": "x"}, "leads out"),
        ({"good": "x", "/tmp/out": "x"}, "leads out"),
        ({"good": "x", **a_link("/etc")}, "leads out"),
        ({"good": "x", "bomb": bytes(2_000_000)}, "unpacks to"),
    ],
)
def test_G01_a_hostile_archive_is_refused_whole(tmp_path, entries, message):
    archive = a_zip(tmp_path / "a.zip", entries)
    with pytest.raises(ValueError, match=message):
        extract(archive, tmp_path / "new", max_gb=0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("n", range(20))
def test_G01_a_cut_or_damaged_archive_writes_nothing(tmp_path, n):
    content = np.random.default_rng(0).bytes(5000)
    archive = a_zip(tmp_path / "a.zip", {"one": content})
    whole = bytearray(archive.read_bytes())
    if n % 2:
        del whole[-1 - n * 200 :]
    else:
        whole[100 + n * 200] ^= 4
    archive.write_bytes(whole)
    with pytest.raises(ValueError, match="a.zip.*download it again"):
        extract(archive, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_G01_a_sound_archive_is_unpacked(tmp_path):
    extract(a_zip(tmp_path / "a.zip", {"in/one": "x"}), tmp_path / "new")
    assert (tmp_path / "new" / "in" / "one").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="new"):  # it holds something
        extract(tmp_path / "a.zip", tmp_path / "new")


def test_setting_asks_for_as_many_numbers_as_the_default_has(monkeypatch):
    monkeypatch.setenv("BRATS_PATCH_SHAPE", "96")
    with pytest.raises(ValueError, match="expected 3 numbers with commas"):
        setting("PATCH_SHAPE", (128, 128, 128))


def test_setting_counts_relative_paths_from_the_projects_root(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("BRATS_RAW", "scans of mine/raw")
    assert setting("RAW", Path("x")) == tmp_path.resolve() / "scans of mine" / "raw"


def test_G01_a_full_disk_is_not_called_a_bad_download(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("a.nii", bytes(1000))
    monkeypatch.setattr("brats_utils.files.free_gb", lambda _: 1e-7)
    with pytest.raises(ValueError, match="over 0.0 GB$"):
        extract(tmp_path / "a.zip", tmp_path / "out")

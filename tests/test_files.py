"""Settings, small files, output folders that have an owner, and archives."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import tree

from brats_utils.files import (
    OutputFolder,
    atomic_write,
    check_option,
    describe_file,
    find_changed,
    free_gb,
    lies_in,
    project_root,
    read_json,
    read_manifest,
    setting,
    write_json,
)
from brats_utils.prepare import extract, prepare_dataset
from brats_utils.split import read_csv, split_dataset

MANIFEST = {"kind": "a", "format": 1, "made_from": {}, "files": {}, "cases": {}}


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("7", 3, 7),
        ("0.5", 1.0, 0.5),
        ("2", 1.0, 2.0),
        ("yes", False, True),
        ("0", True, False),
        ("64, 64,32", (128, 128, 128), (64, 64, 32)),
        ("flair,t1", ("flair",), ("flair", "t1")),
        ("flair", ("flair", "t1"), ("flair",)),
        ("quick", "full", "quick"),
        ("2024", "full", "2024"),
        ("/data/x", Path("y"), Path("/data/x")),
        ("none", None, None),
        ("~/x", Path("y"), Path.home() / "x"),
        ("/no", Path("y"), Path("/no")),
        ("text", None, "text"),
        ("7", None, 7),
        ("0.5", None, 0.5),
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


def test_J4_a_setting_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setenv("BRATS_MINUTES", "none")
    assert setting("MINUTES", 8.0, or_none=True) is None
    texts = ["many", "1,2", "[1]", "{[]: 1}", "(((", "96", "1.5", "yes,no", "nan"]
    texts.append("none")
    for default, fits in ((3, "96"), (True, ""), ((1, 2), "1,2"), (1.0, "96 1.5")):
        for text in set(texts) - set(fits.split()):
            monkeypatch.setenv("BRATS_EPOCHS", text)
            with pytest.raises(ValueError, match="BRATS_EPOCHS"):
                setting("EPOCHS", default)


def test_setting_takes_relative_paths_from_the_projects_root(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("BRATS_RAW", "scans of mine/raw")
    assert setting("RAW", Path("x")) == tmp_path.resolve() / "scans of mine" / "raw"


def test_project_root_is_the_nearest_with_pyproject(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    assert project_root(tmp_path / "notebooks") == tmp_path.resolve()


def test_J4_an_impossible_option_is_named_with_what_is_possible():
    check_option("share", 0.5, lambda x: 0 <= x <= 1, "0 to 1")
    for value in (1.5, float("nan"), "half", None):
        with pytest.raises(ValueError, match="share is .*, expected 0 to 1"):
            check_option("share", value, lambda x: 0 <= x <= 1, "0 to 1")


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


def test_json_round_trip(tmp_path):
    value = {"Größe": [1, 2.5, None], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


MANY = b'{"a": ' + b"1" * 5000 + b"}"  # digits


def test_R3_broken_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    for data in (b"{", b"[1]", b"", b"\xff\xfe", b"[" * 100_000, b"3", b"null", MANY):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.json"):
            read_json(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_R3_a_table_is_read_as_text(tmp_path, encoding, separator):
    text = "id,Größe\nNA,1.50\n007,\n".replace(",", separator)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    expected = [{"id": "NA", "Größe": "1.50"}, {"id": "007", "Größe": ""}]
    assert read_csv(tmp_path / "t.csv") == expected


def test_R3_what_is_no_table_is_named(tmp_path):
    for data in (b"", b"a,b\n\0,1\n", b"PK\3\4\0\0", b"a,b\n" + b"x" * 200_000):
        (tmp_path / "t.csv").write_bytes(data)
        with pytest.raises(ValueError, match=r"t\.csv"):
            read_csv(tmp_path / "t.csv")


def test_describe_file_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    noted = describe_file(tmp_path / "abc")
    # The first test vector of FIPS 180.
    assert noted["bytes"] == 3 and noted["sha256"].startswith("ba7816bf8f01cfea")


def test_find_changed_names_what_is_missing_incomplete_or_changed(tmp_path):
    files = {}
    for name in ("same", "longer", "other", "missing"):
        (tmp_path / name).write_text("abc")
        files[name] = describe_file(tmp_path / name)
    (tmp_path / "longer").write_text("abcd")
    (tmp_path / "other").write_text("abd")
    (tmp_path / "missing").unlink()
    files["incomplete"] = None
    changed = find_changed(tmp_path, files)
    assert changed == ["longer", "other", "missing", "incomplete"]


def test_free_gb_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_gb(tmp_path / "a" / "b") > 0


def test_H1_an_error_while_tidying_up_does_not_mix_the_manifests(tmp_path, monkeypatch):
    fill(tmp_path / "out", ["old"], beside=True)
    unlink = Path.unlink

    def refuse(path, **options):  # as Windows does while a volume is read
        if path.name == "old":
            raise PermissionError("it is in use")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        fill(tmp_path / "out", ["new"], beside=True)
    monkeypatch.undo()
    assert list(read_manifest(tmp_path / "out")["files"]) == ["new"]
    assert list(read_manifest(tmp_path / ".out-new")["files"]) == ["old"]
    fill(tmp_path / "out", ["old", "newer"], beside=True)
    assert sorted(tree(tmp_path / "out")) == ["manifest.json", "newer", "old"]


def test_H1_links_whose_targets_changed_do_not_block_the_next_call(tmp_path):
    (tmp_path / "target").write_text("short")
    with OutputFolder(tmp_path / "out", "a") as output:
        output.begin({})
        output.claim(["link"])
        (tmp_path / "out" / "link").symlink_to(tmp_path / "target")
        output.manifest["files"]["link"] = describe_file(tmp_path / "target")
        (tmp_path / "target").write_text("much longer")
        output.start_over({}, ["link"])
    assert (tmp_path / "target").read_text() == "much longer"


@pytest.mark.parametrize("here", [".", "sub"])
def test_H1_the_current_folder_is_not_exchanged(tmp_path, monkeypatch, here):
    (tmp_path / "out" / here).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "out" / here)
    for out in ("." if here == "." else "..", tmp_path / "out"):
        with pytest.raises(ValueError, match="current folder .*choose a folder inside"):
            OutputFolder(out, "split", beside=True)
        OutputFolder(out, "run")


def test_H1_a_mounted_disk_is_not_exchanged():
    with pytest.raises(ValueError, match="/proc is a mounted disk"):
        OutputFolder("/proc", "split", beside=True)


def test_H2_a_file_that_others_changed_is_refused_before_any_is_deleted(tmp_path):
    fill(tmp_path / "out", ["one", "two"])
    (tmp_path / "out" / "two").write_text("changed by hand")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="were changed: .'two'"):
        fill(tmp_path / "out", ["one", "two"])
    assert tree(tmp_path) == before


def test_a_failure_to_open_gives_the_lock_back(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "_read", refuse)
        with pytest.raises(OSError, match="gone"), OutputFolder(tmp_path / "out", "a"):
            pass
    with OutputFolder(tmp_path / "out", "a"):
        pass


def test_H3_an_old_result_left_aside_does_not_stop_a_writer_in_place(tmp_path):
    fill(tmp_path / "out", ["one"])
    shutil.copytree(tmp_path / "out", tmp_path / ".out-old")
    with OutputFolder(tmp_path / "out", "a") as output:
        assert list(output.former["files"]) == ["one"]


def test_R3_what_is_no_manifest_is_named(tmp_path):
    assert read_manifest(tmp_path) == {}
    for strange in ({"files": 3}, {"files": ["a", 1]}, {"cases": []}, {"format": "1"}):
        write_json(tmp_path / "manifest.json", MANIFEST | strange)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_H2_a_first_call_that_fails_leaves_no_trace(tmp_path, beside):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(ValueError, match="bad scan"):
            with OutputFolder(tmp_path / name, "a", beside=beside) as output:
                output.start_over({}, ["one"])
                raise ValueError("bad scan")
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_H2_a_folder_that_is_not_blank_stays_ours_after_an_error(tmp_path, error):
    for beside in (False, True):
        with pytest.raises(error):
            with OutputFolder(tmp_path / "out", "a", beside=beside) as output:
                output.start_over({}, ["one"])
                if error is ValueError:
                    (output.path / "notes.txt").touch()  # of the user
                raise error  # a thread may still write "one"
        (output.path / "one").touch()
        fill(tmp_path / "out", ["one"], beside=beside)


def fill(path, names, kind="a", **options):
    """Write an output folder with some files."""
    with OutputFolder(path, kind, **options) as output:
        output.start_over({"names": names}, names)
        for name in names:
            with output.write(name) as temporary:
                temporary.write_text(name)
        if options.get("beside"):
            output.put_in_place()


def test_an_output_folder_holds_its_files_and_a_manifest_of_them(tmp_path):
    fill(tmp_path / "out", ["b", "sub/a"])
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "a" and manifest["made_from"]["names"] == ["b", "sub/a"]
    assert sorted(tree(tmp_path / "out")) == ["b", "manifest.json", "sub", "sub/a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no lock is left
    assert find_changed(tmp_path / "out", manifest["files"]) == []
    (tmp_path / "out" / "sub" / "a").write_text("A")
    assert find_changed(tmp_path / "out", manifest["files"]) == ["sub/a"]


@pytest.mark.parametrize("beside", [False, True])
def test_H1_a_users_own_files_survive_in_an_output_folder(tmp_path, beside):
    out = tmp_path / "out"
    fill(out, ["one", "sub/two"], beside=beside)
    (out / "note.txt").write_text("mine")
    (out / "sub" / "note.txt").write_text("mine too")
    (out / "link").symlink_to(tmp_path)
    fill(out, ["three"], beside=beside)
    assert sorted(tree(out)) == [
        "link",
        "manifest.json",
        "note.txt",
        "sub",
        "sub/note.txt",
        "three",
    ]
    assert (out / "sub" / "note.txt").read_text() == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("beside", [False, True])
def test_H1_a_users_file_with_the_name_of_a_new_one_is_not_lost(tmp_path, beside):
    fill(tmp_path / "out", ["one"], beside=beside)
    (tmp_path / "out" / "two").write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="two"):
        fill(tmp_path / "out", ["one", "two"], beside=beside)
    after = tree(tmp_path / "out")
    assert after["two"] == b"mine"
    if beside:
        assert after == before


def test_H1_only_listed_files_can_be_removed(tmp_path):
    fill(tmp_path / "out", ["one", "two"])
    (tmp_path / "out" / "mine").touch()
    with OutputFolder(tmp_path / "out", "a") as output:
        output.remove(["one", "mine", "../other", "manifest.json"])
    assert sorted(tree(tmp_path / "out")) == ["manifest.json", "mine", "two"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    "found",
    [
        {"thesis.txt": "mine"},
        {"images/scan.nii": "mine"},
        {"manifest.json": {**MANIFEST, "kind": "b"}, "x": "mine"},
        {"manifest.json": {**MANIFEST, "format": 2}, "x": "mine"},
        {"manifest.json": {**MANIFEST, "files": {"../precious": None}}},
        {"manifest.json": {**MANIFEST, "files": {"/etc/passwd": None}}},
        {"manifest.json": {"short_name": "a web page's manifest"}},
        {"manifest.json": "damaged"},
    ],
    ids=[
        "a text",
        "scans",
        "another kind",
        "another format",
        "a way out",
        "an absolute path",
        "a web page",
        "damaged",
    ],
)
def test_H1_a_folder_of_others_is_refused_as_it_is(tmp_path, found, beside):
    for name, content in found.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            write_json(path, content)
        else:
            path.write_text(content)
    (tmp_path / "precious").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="out"):
        fill(tmp_path / "out", ["one"], beside=beside)
    assert tree(tmp_path) == before


def test_H1_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out"):
        fill(tmp_path / "out", ["one"])
    assert (tmp_path / "out").read_text() == "mine"


def test_H1_an_output_is_never_around_or_inside_an_input(tmp_path):
    source = tmp_path / "set" / "images"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for out in (
        source,
        source / "new" / "deep",
        source.parent,
        tmp_path,
        tmp_path / "link",
        tmp_path / "link" / "new",
        tmp_path / "elsewhere" / ".." / "set" / "images",
    ):
        for beside in (False, True):
            for given in (source, tmp_path / "link"):
                with pytest.raises(ValueError, match="choose another"):
                    OutputFolder(out, "a", inputs=[given], beside=beside)
    assert sorted(tree(tmp_path)) == ["link", "set", "set/images"]
    fill(tmp_path / "set-new", ["one"], inputs=[source])  # a name that begins alike


def test_an_output_folder_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for names in (["one"], ["two"]):
        fill(tmp_path / "out", names, beside=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(tree(tmp_path / "disk")) == ["manifest.json", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_H2_an_error_while_writing_beside_keeps_the_former_result(tmp_path):
    fill(tmp_path / "out", ["one"], beside=True)
    before = tree(tmp_path / "out")
    with (
        pytest.raises(RuntimeError),
        OutputFolder(tmp_path / "out", "a", beside=True) as output,
    ):
        output.begin({})
        output.claim(["two"])
        with output.write("two") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert tree(tmp_path / "out") == before
    fill(tmp_path / "out", ["two"], beside=True)
    assert sorted(tree(tmp_path)) == ["out", "out/manifest.json", "out/two"]


def test_a_file_of_the_former_result_can_be_taken_over(tmp_path):
    fill(tmp_path / "out", ["sub/one", "two"], beside=True)
    with OutputFolder(tmp_path / "out", "a", beside=True) as output:
        output.begin({})
        output.claim(["sub/one"])
        output.take_over("sub/one")
        output.put_in_place()
    manifest = read_manifest(tmp_path / "out")
    assert find_changed(tmp_path / "out", manifest["files"]) == []
    assert sorted(tree(tmp_path / "out")) == ["manifest.json", "sub", "sub/one"]


def test_H4_the_lock_is_given_up_when_the_last_save_fails(tmp_path):
    with pytest.raises(TypeError), OutputFolder(tmp_path / "out", "a") as output:
        output.begin({"seed": 1})
        output.begin({"seed": np.int64(1)})  # JSON knows no such number
    fill(tmp_path / "out", ["one"])


HOLD = """
import sys, time
from brats_utils.files import OutputFolder
with OutputFolder(sys.argv[1], "a", beside=True) as output:
    output.begin({})
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("beside", [False, True])
def test_H4_a_second_writer_is_refused_until_the_first_has_ended(tmp_path, beside):
    fill(tmp_path / "out", ["one"], beside=True)
    command = [sys.executable, "-c", HOLD, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=f"process {holder.pid}"):
            fill(tmp_path / "out", ["two"], beside=beside)
        assert tree(tmp_path) == before
        holder.kill()
    fill(tmp_path / "out", ["two"], beside=True)
    assert sorted(tree(tmp_path)) == ["out", "out/manifest.json", "out/two"]


def test_H4_two_writers_in_one_process(tmp_path):
    with OutputFolder(tmp_path / "out", "a") as output:
        output.begin({})
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            fill(tmp_path / "out", ["two"])
    fill(tmp_path / "out", ["two"])


@pytest.mark.parametrize("start", ["", "/", "../"])
def test_H1_a_manifest_that_lists_files_elsewhere_is_refused(tmp_path, start):
    victim = tmp_path / "victim"
    victim.write_text("x")
    name = f"{start}{victim}" if start != "../" else "../victim"
    (tmp_path / "out").mkdir()
    text = json.dumps({**MANIFEST, "files": {name: {"bytes": 1, "sha256": ""}}})
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="lists files outside its folder"):
        read_manifest(tmp_path / "out")
    with OutputFolder(tmp_path / "new", "a") as output:
        with pytest.raises(ValueError, match="would be outside"):
            output.claim([name])
    assert victim.read_text() == "x"


def test_H4_windows_shields_the_lock_and_flushes_only_what_it_may_write(
    tmp_path, monkeypatch
):
    fsync, unlink, write_text = os.fsync, os.unlink, Path.write_text

    def flush(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(fd)

    def shield(function):
        def refuse_locks(path, *arguments, **options):
            if str(path).endswith(".lock"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path, *arguments, **options)

        return refuse_locks

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "unlink", shield(unlink))
    monkeypatch.setattr(Path, "write_text", shield(write_text))
    monkeypatch.setattr(Path, "read_text", shield(Path.read_text))
    fill(tmp_path / "out", ["one"], beside=True)
    with OutputFolder(tmp_path / "out", "a") as output:
        output.begin({})
        with pytest.raises(ValueError, match="written by another process"):
            fill(tmp_path / "out", ["two"])
    fill(tmp_path / "out", ["two"], beside=True)
    assert (tmp_path / "out" / "two").exists()


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
        ({"a/../b": "x"}, "leads out"),
        *(
            ({name: ""}, "manifest.json")
            for name in ("./manifest.json", "manifest.json/")
        ),
        ({"manifest.json/x": "x"}, "manifest.json"),
        ({"a": "x", "a/": ""}, "a file named 'a'"),
    ],
)
def test_G01_a_hostile_archive_is_refused_whole(tmp_path, entries, message):
    archive = a_zip(tmp_path / "a.zip", entries)
    with pytest.raises(ValueError, match=message):
        extract(archive, tmp_path / "new", max_gb=0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_G01_a_cut_or_damaged_archive_writes_nothing(tmp_path):
    content = np.random.default_rng(0).bytes(5000)
    whole = a_zip(tmp_path / "a.zip", {"one": content}).read_bytes()
    for n in range(20):
        data = bytearray(whole)
        if n % 2:
            del data[-1 - n * 200 :]
        else:
            data[100 + n * 200] ^= 4
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(ValueError, match="a.zip.*download it again"):
            extract(tmp_path / "a.zip", tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("field", ["encrypted", "method 9"])
def test_R4_an_archive_of_another_kind_needs_another_tool(tmp_path, field):
    path = a_zip(tmp_path / "a.zip", {"one": "x" * 100})
    data = bytearray(path.read_bytes())
    for start, offset in ((0, 6), (data.index(b"PK\1\2"), 8)):  # both headers
        flags, method = (1, 8) if field == "encrypted" else (0, 9)
        struct.pack_into("<HH", data, start + offset, flags, method)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.zip.*another tool"):
        extract(path, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_G01_a_valid_archive_is_unpacked(tmp_path):
    archive = a_zip(tmp_path / "a.zip", {"in/one": "x", "in/manifest.json": "{}"})
    extract(archive, tmp_path / "new")
    assert (tmp_path / "new" / "in" / "one").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "new"]


def test_H1_an_archive_is_never_unpacked_over_something(tmp_path):
    archive = a_zip(tmp_path / "a.zip", {"one": "x"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one").write_text("mine")
    extract(archive, tmp_path / "new")
    before = tree(tmp_path)
    for folder in (tmp_path / "mine", tmp_path / "new", archive, tmp_path):
        with pytest.raises(ValueError, match="new or empty"):
            extract(archive, folder)
    assert tree(tmp_path) == before


def test_C02_a_full_disk_while_unpacking_leaves_no_half_set(tmp_path, monkeypatch):
    archive = a_zip(tmp_path / "a.zip", {"one": "x", "two": "y"})

    def full(self, path):
        self.extract("one", path)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", full)
        with pytest.raises(OSError, match="No space"):
            extract(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    extract(archive, tmp_path / "new")
    names = sorted(tree(tmp_path / "new"))
    assert names == ["manifest.json", "one", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "new"]


def test_C01_unpacking_killed_at_any_file_operation_ends_in_the_same_bytes(tmp_path):
    archive = a_zip(tmp_path / "a.zip", {"one": "x", "in/two": "y", "in/deep/3": "z"})
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, "extract", archive, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 25  # file operations, each of them a point to die at


def test_R4_an_archive_that_cannot_be_unpacked_leaves_nothing(tmp_path):
    for number, names in enumerate((["manifest.json", "x"], ["x", "x/y"])):
        archive = a_zip(tmp_path / f"{number}.zip", dict.fromkeys(names, "{}"))
        with pytest.raises(ValueError, match=f"{number}.zip"):
            extract(archive, tmp_path / "new")
        archive.unlink()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\\b.nii", "..\\x", "C:\\x", "deep/a\\b"])
def test_R4_names_with_backslashes_are_refused_in_plain_words(tmp_path, name):
    a_zip(tmp_path / "a.zip", {"fine": "x", name: "y"})
    with pytest.raises(ValueError, match="backslashes; use another tool"):
        extract(tmp_path / "a.zip", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_R4_the_checkpoints_of_jupyter_are_ignored(toy_set, tmp_path):
    hidden = next(toy_set.rglob("*Training_001")) / ".ipynb_checkpoints"
    shutil.copytree(hidden.parent, hidden)
    report = prepare_dataset(toy_set, tmp_path / "out", min_labelled=0)
    for kind in ("images", "masks"):
        (tmp_path / "out" / kind / ".ipynb_checkpoints").mkdir()
        copy = tmp_path / "out" / kind / ".ipynb_checkpoints" / "x-checkpoint.npy"
        copy.write_bytes(b"no npy")
    ids = split_dataset(tmp_path / "out", tmp_path / "split")
    assert len(report) == 5 and sum(map(len, ids.values())) == 4


def test_G01_a_full_disk_is_not_called_a_bad_download(tmp_path, monkeypatch):
    a_zip(tmp_path / "a.zip", {"a.nii": bytes(1000)})
    monkeypatch.setattr("brats_utils.files.free_gb", lambda _: 1e-7)
    with pytest.raises(ValueError, match="over 0.0 GB$"):
        extract(tmp_path / "a.zip", tmp_path / "out")


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    fill(tmp_path / "out", ["one"], beside=True)
    monkeypatch.setattr(os, "link", refuse)
    with OutputFolder(tmp_path / "out", "a", beside=True) as output:
        output.begin({})
        output.claim(["one"])
        output.take_over("one")
        output.put_in_place()
    assert (tmp_path / "out" / "one").read_text() == "one"


def test_a_folder_in_ours_a_link_to_it_and_one_beside_it(tmp_path):
    with OutputFolder(tmp_path / "ours", "phantoms") as output:
        output.begin({})
    (tmp_path / "ours" / "set" / "case").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "ours" / "set")
    (tmp_path / "beside").mkdir()
    for name in ("ours", "ours/set/case", "link", "link/case", "beside/../ours"):
        assert lies_in(tmp_path / name, "phantoms"), name
        assert not lies_in(tmp_path / name, "split"), name
    for name in ("beside", "missing", "ours/.."):
        assert not lies_in(tmp_path / name, "phantoms"), name
    for text in ('{"short_name": "web app"}', "[", '{"files": {}, "cases": {}}'):
        (tmp_path / "ours" / "set" / "manifest.json").write_text(text)  # of others
        assert lies_in(tmp_path / "ours" / "set" / "case", "phantoms")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", r"a\..\..\x", "C:/x"])
def test_a_file_outside_its_folder_is_refused(tmp_path, name):
    with OutputFolder(tmp_path / "out", "thing") as output:
        output.begin({})
        with pytest.raises(ValueError, match="outside"):
            output.claim([name])


def test_H1_a_manifest_that_leads_elsewhere_on_windows_is_refused(tmp_path):
    for name in (r"..\victim", "C:/victim", r"C:\victim", r"\\server\share\victim"):
        text = json.dumps({**MANIFEST, "files": {name: {"bytes": 1, "sha256": ""}}})
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="lists files outside its folder"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("noted", [5, "x", [], {}])
def test_R3_a_manifest_with_entries_of_another_kind_counts_as_changed(tmp_path, noted):
    fill(tmp_path / "out", ["one"])
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "files": {"one": noted}}))
    files = read_manifest(tmp_path / "out")["files"]
    assert find_changed(tmp_path / "out", files) == ["one"]
    with contextlib.suppress(ValueError), OutputFolder(tmp_path / "out", "a") as output:
        output.start_over({}, ["two"])  # says that "one" was changed, or replaces it


def test_H4_a_binary_file_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / ".out.lock").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"\.out\.lock is not a lock of this project"):
        fill(tmp_path / "out", ["one"])
    assert (tmp_path / ".out.lock").read_bytes() == b"\xff\xfe"


def test_J4_a_home_folder_of_nobody_is_named_with_its_setting(monkeypatch):
    monkeypatch.setenv("BRATS_RAW", "~nobody-here/scans")
    with pytest.raises(ValueError, match="BRATS_RAW is '~nobody-here/scans'"):
        setting("RAW", Path("x"))


@pytest.mark.parametrize("kind", ["names", "front", "bzip2"])
def test_R4_a_damaged_archive_of_any_kind_is_named(tmp_path, kind):
    path = tmp_path / "a.zip"
    method = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("é.nii", np.random.default_rng(0).bytes(9000))
    data = bytearray(path.read_bytes())
    if kind == "names":
        data = data.replace("é".encode(), b"\xff\xfe")
    elif kind == "front":
        del data[:500]
    else:
        data[300] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip.*; download it again"):
        extract(path, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_H1_files_of_the_system_do_not_make_a_folder_foreign(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    for beside in (False, True):
        fill(tmp_path / "out", ["one"], beside=beside)
    assert tree(tmp_path / "out")[".DS_Store"]

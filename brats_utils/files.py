"""Files and settings: atomic writes, checksums, free space, `BRATS_` variables."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")


def _parse(text, default):
    """Read `text` as a value of the type of `default`."""
    if isinstance(default, bool):
        if text.lower() not in TRUE + FALSE:
            raise ValueError(f"expected one of {TRUE + FALSE}")
        return text.lower() in TRUE
    if text.lower() == "none":
        return None
    if isinstance(default, (tuple, list)):
        kind = type(default[0]) if default else str
        parts = tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        if kind is not str and len(parts) != len(default):
            raise ValueError(f"expected {len(default)} numbers with commas")
        return parts
    if isinstance(default, Path):
        return project_root() / text
    if default is None:
        parts = [part.strip() for part in text.split(",")]
        numbers = len(parts) > 1 and all(part.isdigit() for part in parts)
        return tuple(map(int, parts)) if numbers else text
    return type(default)(text)


def setting(name, default):
    """Return a notebook parameter: its default, or what `BRATS_<NAME>` says.

    Parameters
    ----------
    name : str
        Name of the constant, `"EPOCHS"` for the variable `BRATS_EPOCHS`.
    default : bool, int, float, str, Path, tuple or None
        Used where the variable is unset or empty; its type says how the text is read.
        A tuple is written with commas (`128,128,128`); `none` gives None. A path that
        is not absolute is counted from the project's root. Where the default is None,
        whole numbers with commas give a tuple, all else is text.

    Returns
    -------
    value : of the type of `default`, or None

    Raises
    ------
    ValueError
        If the text cannot be read as that type.

    Examples
    --------
    >>> setting("SURELY_UNSET", 3)
    3
    """
    text = os.environ.get(f"BRATS_{name}", "").strip()
    if not text:
        return default
    try:
        return _parse(text, default)
    except ValueError as error:
        raise ValueError(
            f"BRATS_{name}={text!r} cannot be read as {type(default).__name__}: {error}"
        ) from None


def project_root(start=None):
    """Return the nearest folder, from `start` upwards, that holds pyproject.toml.

    Parameters
    ----------
    start : path, optional
        Where to begin; the current folder by default.

    Returns
    -------
    root : Path
        `start` itself where no folder above it holds that file.
    """
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    return start


@contextlib.contextmanager
def atomic_write(path, former=None):
    """Give a temporary path to write to, and put it in the place of `path` when done.

    A reader sees the old file or the whole new one, never a half: the temporary file
    lies in the same folder, is flushed to disk and then replaces `path` in one step.
    It is removed where the body fails, and `path` then stays as it was.

    Parameters
    ----------
    path : path
        Where the file shall be; its folder is made. The temporary name keeps the
        suffix, since some writers choose the format by it.
    former : path, optional
        Where the file that `path` was until now is kept.

    Yields
    ------
    temporary : Path

    Raises
    ------
    OSError
        If the disk refuses, a full one say; the message names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed process left is overwritten by the next.
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if former and path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    except OSError as error:
        problem = f"cannot write {path}: {error} ({free_gb(path):.2f} GB are free)"
        raise OSError(error.errno, problem) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_npy(path, array):
    """Write an array as npy, atomically and without pickling.

    Parameters
    ----------
    path : path
        Where to; ends in `.npy`.
    array : array
        What to store.
    """
    import numpy as np

    with atomic_write(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def write_json(path, value):
    """Write a value as indented JSON, atomically.

    Parameters
    ----------
    path : path
        Where to.
    value : what json can hold
    """
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON file.

    Parameters
    ----------
    path : path
        A file that `write_json` wrote.

    Returns
    -------
    value : what the file holds

    Raises
    ------
    ValueError
        If the file is no JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def sha256(path):
    """Return the SHA-256 checksum of a file.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    checksum : str
        64 hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_gb(path):
    """Return the free space of the disk that holds `path`, in GB (10⁹ bytes).

    Parameters
    ----------
    path : path
        A file or folder; it need not exist yet.

    Returns
    -------
    free : float
    """
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def extract(archive, folder, *, max_gb=100):
    """Unpack a downloaded zip file, checked as a whole before anything is written.

    Parameters
    ----------
    archive : path
        The zip file.
    folder : path
        Where to; new or empty. It is there once all of the archive is.
    max_gb : float
        More than this, unpacked, is refused, in GB (10⁹ bytes).

    Raises
    ------
    ValueError
        If the archive is cut or damaged, too large, or a name in it is a link or leads
        out of the folder.
    OSError
        If the folder holds something, or the disk refuses.
    """
    root = Path(folder).resolve()
    unfinished = root.with_name(f".{root.name}-new")
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = zipped.infolist()
            size_gb = sum(entry.file_size for entry in entries) / 1e9
            room = min(max_gb, free_gb(root))
            problem = f"unpacks to {size_gb:.1f} GB, over {room:.1f} GB"
            problems = [problem] if size_gb > room else []
            for entry in entries:
                inside = (root / entry.filename).resolve().is_relative_to(root)
                if not inside or stat.S_ISLNK(entry.external_attr >> 16):
                    problems.append(f"{entry.filename!r} leads out of the folder")
            if problems:
                raise ValueError(f"{archive}: {problems[0]}")
            if damaged := zipped.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
            zipped.extractall(unfinished)
            unfinished.replace(root)
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive}: {error}; download it again") from None

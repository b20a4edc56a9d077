"""Output folders, atomic writes, JSON files, settings and checks of options.

Folders of results are written through `OutputFolder`, the only code that deletes
results. Each has a `manifest.json` that records its kind, its inputs and settings, and
the files that belong to it. Everything else in the folder belongs to the user.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from configparser import ConfigParser
from numbers import Integral, Real
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

BOOL = (lambda x: isinstance(x, bool | np.bool_)), "True or False"  # for `check_option`
MANIFEST, UNFINISHED, FORMAT = "manifest.json", ".writing-manifest.json", 1
_EXCHANGE, _CURRENT_FOLDER = 2, -100  # arguments of Linux's renameat2


def setting(name, default, or_none=False):
    """Return a notebook parameter: its default, or the value of `BRATS_<NAME>`.

    Parameters
    ----------
    name : str
        Name of the constant: `"EPOCHS"` for the variable `BRATS_EPOCHS`.
    default : bool, int, float, str, Path, tuple of int or of str, or None
        Used if the variable is unset or empty. Its type decides how the text is
        parsed: tuples are separated by commas (`128,128,128`), and relative paths
        start at the project root. If the default is None, numbers and tuples of whole
        numbers are recognised, and anything else stays text.
    or_none : bool
        Whether `none` means None. It always does if the default is None.

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
    if not text or isinstance(default, str):
        return text or default
    if text.lower() == "none" and (or_none or default is None):
        return None
    if isinstance(default, Path):
        return project_root() / check_path(f"BRATS_{name}", text)
    if isinstance(default, tuple) and isinstance(default[0], str):
        return tuple(part.strip() for part in text.split(","))
    with contextlib.suppress(KeyError, ValueError):
        if isinstance(default, bool):
            return ConfigParser.BOOLEAN_STATES[text.lower()]  # yes, no, on, off ...
        if isinstance(default, int | float) and np.isfinite(float(text)):
            return type(default)(text)
        if default is None and "," not in text and np.isfinite(float(text)):
            return int(text) if text.isdigit() else float(text)
        numbers = tuple(int(part) for part in text.strip("()").split(","))
        if "," in text and len(numbers) == len(default or numbers):
            return numbers
    if default is None:
        return text
    raise ValueError(f"BRATS_{name} is {text!r}, expected a value like {default!r}")


def project_root(start=None):
    """Return the nearest folder, from `start` upwards, that holds pyproject.toml.

    Parameters
    ----------
    start : path, optional
        Where to begin; the current folder by default.

    Returns
    -------
    root : Path
        `start` itself if no folder above it holds that file.
    """
    start = Path(start or Path.cwd()).resolve()
    folders = (start, *start.parents)
    return next((f for f in folders if (f / "pyproject.toml").is_file()), start)


def check_option(name, value, fits, expected):
    """Raise a ValueError if an option has an invalid value.

    Parameters
    ----------
    name : str
        The option.
    value : object
    fits : callable
        Takes the value and returns whether it is valid; an error means that it is not.
        Sets and dictionaries, which have no order, are never valid.
    expected : str
        The possible values, in words.

    Raises
    ------
    ValueError
        The message names the option, its value and the possible values.
    """
    with contextlib.suppress(Exception):
        if not isinstance(value, set | frozenset | dict) and fits(value):
            return
    raise ValueError(f"{name} is {value!r:.300}, expected {expected}")


def check_path(name, path):
    """Convert an argument to a Path; raise a ValueError if it is not a path.

    Parameters
    ----------
    name : str
        The argument.
    path : path

    Returns
    -------
    path : Path

    Raises
    ------
    ValueError
        The message names the argument and its value.
    """
    check_option(name, path, lambda p: Path(p).expanduser(), "a path; ~user must exist")
    return Path(path).expanduser()


def is_whole(value, least=0):
    """Return whether a value is a whole number of at least `least`, and not a bool.

    Parameters
    ----------
    value : object
    least : int

    Returns
    -------
    fits : bool
    """
    return isinstance(value, Integral) and type(value) is not bool and value >= least


def is_number(value, low, high):
    """Return whether a value is a number from `low` to `high`, and not NaN or a bool.

    Parameters
    ----------
    value : object
    low, high : float

    Returns
    -------
    fits : bool
    """
    return isinstance(value, Real) and type(value) is not bool and low <= value <= high


def whole(least):
    """Return arguments of `check_option` for a whole number of at least `least`.

    Parameters
    ----------
    least : int

    Returns
    -------
    fits : callable
    expected : str
    """
    return (lambda n: is_whole(n, least)), f"a whole number, {least} or more"


def number(low, high):
    """Return arguments of `check_option` for a number from `low` to `high`.

    Parameters
    ----------
    low, high : float

    Returns
    -------
    fits : callable
    expected : str
    """
    return (lambda x: is_number(x, low, high)), f"a number from {low:g} to {high:g}"


def are(n, fits):
    """Return a function that tests whether a list has n valid items.

    Parameters
    ----------
    n : int
    fits : callable
        Takes an item.

    Returns
    -------
    fit : callable
    """
    return lambda xs: not isinstance(xs, str) and len(xs) == n and all(map(fits, xs))


SIZES_MM = are(3, lambda mm: is_number(mm, 1e-9, 1e9)), "three numbers above 0"


def progress_bar(iterable=None, **options):
    """Return a tqdm progress bar that stays visible in a saved notebook.

    Parameters
    ----------
    iterable : iterable, optional
    **options
        Passed to `tqdm.tqdm`.

    Returns
    -------
    bar : tqdm.tqdm
        Printed to stdout as text, because the state of a widget is lost on saving.
    """
    return tqdm(iterable, file=sys.stdout, **options)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, then move it to `path` in one step.

    A reader sees either the old file or the complete new one: the temporary file is in
    the same folder, is flushed to disk and then replaces `path`. If the `with` block
    fails, the temporary file is removed and `path` is unchanged.

    Parameters
    ----------
    path : path
        The file to write; its folder is created. The temporary name keeps the suffix,
        because some writers use it to choose the format.

    Yields
    ------
    temporary : Path

    Raises
    ------
    OSError
        If writing fails, for example because the disk is full. The message names the
        file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name, so that the next call overwrites what a killed process left behind.
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes no file opened to read
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        problem = f"cannot write {path}: {error} ({free_gb(path):.2f} GB are free)"
        raise OSError(error.errno, problem) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a dictionary atomically as JSON, with one line per key.

    Parameters
    ----------
    path : path
        The file to write.
    value : dict
        Must be JSON-serialisable.
    """
    # Each line is `{"key": value}` without its braces.
    lines = (json.dumps({k: v}, ensure_ascii=False)[1:-1] for k, v in value.items())
    with atomic_write(path) as temporary:
        temporary.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def read_json(path):
    """Read a JSON file that holds an object.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    value : dict

    Raises
    ------
    ValueError
        If the file does not hold a JSON object; the message names it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def read_arrays(path):
    """Read the arrays and the JSON record of an npz file.

    Parameters
    ----------
    path : path
        Written by `np.savez(path, record=..., **arrays)`.

    Returns
    -------
    arrays : list of array
        Sorted by name.
    record : dict
        The parsed JSON text of "record".
    """
    # np.load may leave a damaged file open, which then cannot be replaced on Windows.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in sorted(saved.files)}
    record = json.loads(arrays.pop("record").item())
    return list(arrays.values()), record


def find_differences(old, new, name=""):
    """Compare two nested dictionaries of JSON values.

    Parameters
    ----------
    old, new : dict
        To compare.
    name : str
        Their place in a larger dictionary: "name.of.key".

    Returns
    -------
    differences : list of str
        "name.of.key (old value -> new value)" for each value that differs. A missing
        key counts as None.
    """
    # A list is compared as the dictionary {index: item}.
    parts = [dict(enumerate(x)) if isinstance(x, list) else x for x in (old, new)]
    if not all(isinstance(part, dict) for part in parts):
        return [] if old == new else [f"{name} ({old!r:.40} -> {new!r:.40})"]
    (old, new), found = parts, []
    for key in {**new, **old}:
        where = f"{name}.{key}" if name else str(key)
        found += find_differences(old.get(key), new.get(key), where)
    return found


def describe_file(path):
    """Return what a manifest records about a file.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    noted : dict
        Its size in "bytes", and its "sha256" in hexadecimal digits.
    """
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": Path(path).stat().st_size, "sha256": checksum}


def free_gb(path):
    """Return the free space on the disk that holds `path`, in GB (10⁹ bytes).

    Parameters
    ----------
    path : path
        A file or folder; it need not exist yet.

    Returns
    -------
    free : float
    """
    folders = (Path(path).resolve() / "file").parents
    return shutil.disk_usage(next(f for f in folders if f.exists())).free / 1e9


def read_manifest(folder):
    """Read the manifest of a folder that this package wrote.

    Parameters
    ----------
    folder : path
        The folder.

    Returns
    -------
    manifest : dict
        "kind", "format", "made_from", "files" ({relative path: {"bytes", "sha256"}, or
        None until the file is complete}) and "cases" ({case id: dict}). Empty if the
        folder has no manifest.

    Raises
    ------
    ValueError
        If the manifest is damaged, has another format, or lists files outside `folder`.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    if not all(isinstance(manifest.get(key), dict) for key in ("files", "cases")):
        raise ValueError(f"{path} is not a manifest of this project")
    if _find_outside(manifest["files"]):
        raise ValueError(f"{path} lists files outside its folder")
    if manifest.get("format") != FORMAT or not manifest.keys() >= {"kind", "made_from"}:
        raise ValueError(f"{path} is of another version; delete the folder yourself")
    return manifest


def lies_in(folder, kind):
    """Return whether a folder, or one above it, is an output folder of a given kind.

    Parameters
    ----------
    folder : path
        Links are resolved.
    kind : str
        As in the manifest: "phantoms", "prepared", "split", ...

    Returns
    -------
    found : bool
    """
    for path in (Path(folder).resolve() / MANIFEST).parents:
        with contextlib.suppress(ValueError):  # another program's manifest.json
            if read_manifest(path).get("kind") == kind:
                return True
    return False


def _find_outside(names):
    """Return the relative paths that lead out of their folder, here or on Windows."""
    return [n for n in names if ".." in (p := PureWindowsPath(n)).parts or p.anchor]


def _is_intact(path, noted):
    """Return whether a file is as recorded; None means that it was never completed."""
    there = isinstance(noted, dict) and path.is_file()
    return there and describe_file(path) == noted


def find_changed(folder, files):
    """Return the files of a manifest that are incomplete, missing or changed.

    Parameters
    ----------
    folder : path
        The folder with the manifest.
    files : dict
        "files" of the manifest, or some of them.

    Returns
    -------
    changed : list of str
        Relative paths.
    """
    return [n for n, noted in files.items() if not _is_intact(Path(folder, n), noted)]


def _exchange(first, second, spare):
    """Swap two folders: in one step on Linux, elsewhere through `spare`."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no renameat2
        one, other = os.fsencode(first), os.fsencode(second)
        rename = ctypes.CDLL(None).renameat2
        if rename(_CURRENT_FOLDER, one, _CURRENT_FOLDER, other, _EXCHANGE) == 0:
            return
    second.rename(spare)
    first.rename(second)
    spare.rename(first)


class OutputFolder:
    """An output folder of this package, open to one writer at a time.

    A folder that might hold somebody else's files is rejected before anything changes:
    the constructor compares it with the inputs, and entering it checks its contents.
    Files are listed with `claim` before they are written, so files that a killed
    process left behind are known to be ours. Only listed files are ever deleted.

    Parameters
    ----------
    path : path
        A new or empty folder, or one with a manifest of the same kind.
    kind : str
        What the folder holds: "prepared", "split", "run" and so on.
    inputs : sequence of path
        Folders that are read. The output must not be, contain or lie inside one.
    beside : bool
        Write to a folder next to `path`; `put_in_place` then swaps the two in one step
        (on Linux; elsewhere with three renames, which the next call completes if they
        are interrupted). Until then, and on failure, the previous result is unchanged.

    Attributes
    ----------
    path : Path
        Where to write.
    manifest, former : dict
        Of the folder being written and of the previous result, see `read_manifest`.

    Raises
    ------
    ValueError
        If the folder is an input, is not ours, or is being written by another process;
        or, with `beside`, if it is a mounted disk, the current folder or one above it.
    """

    def __init__(self, path, kind, *, inputs=(), beside=False):
        self.final = check_path("the output (out, out_dir, run_dir)", path).resolve()
        self.kind = kind
        for source in (Path(source).resolve() for source in inputs):
            if self.final.is_relative_to(source) or source.is_relative_to(self.final):
                problem = f"the output {self.final} and the input {source} overlap"
                raise ValueError(f"{problem}; choose another output folder")
        is_cwd = beside and self.final in (Path.cwd(), *Path.cwd().parents)
        if beside and (is_cwd or os.path.ismount(self.final)):
            what = "the current folder or one above it" if is_cwd else "a mounted disk"
            problem = f"the output {self.final} is {what}, which cannot be replaced"
            raise ValueError(f"{problem} in one step; choose a folder inside it")
        names = (f".{self.final.name}{end}" for end in ("-new", "-old", ".lock"))
        self._new, self._spare, lock = map(self.final.with_name, names)
        self.path = self._new if beside else self.final
        self._lock, self._is_new = FileLock(lock), beside or not self.path.exists()

    def _check_owner(self):
        """Raise if a path that we would write to is not ours."""
        for path in filter(Path.exists, {self.final, self.path, self._spare}):
            kind = read_manifest(path).get("kind")
            names = {p.name for p in path.iterdir()} if path.is_dir() else {"a file"}
            held = sorted(names - {UNFINISHED, ".DS_Store", "desktop.ini", "Thumbs.db"})
            if held and kind != self.kind:
                problem = f"{path} is not a folder of this project for {self.kind!r}"
                problem += f" (kind {kind!r}; it holds {', '.join(held[:5])})"
                raise ValueError(f"{problem}; choose another output folder")

    def __enter__(self):
        """Take the lock, and complete a swap that was interrupted."""
        self._check_owner()
        self.final.parent.mkdir(parents=True, exist_ok=True)
        holder, path = "", Path(self._lock.lock_file)
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")
        # The text is empty or cut short if its process was killed while writing it.
        if not holder.startswith("process "[: len(holder)]):
            raise ValueError(f"{path} is not a lock of this project; move it")
        try:
            self._lock.acquire(timeout=0)
            holder = f"process {os.getpid()} on {platform.node()} since {time.ctime()}"
            with contextlib.suppress(OSError):  # on Windows, nobody can write to it
                path.write_text(holder, encoding="utf-8")
            # Killed within _exchange: complete it, or undo it if `final` is missing.
            if self._spare.exists():
                self._spare.rename(self._new if self.final.exists() else self.final)
            self.former = self.manifest = self._read(self.final)
            if self.path != self.final:
                self.manifest = self._read(self.path)
        except Timeout:
            problem = f"{self.final} is being written by another process ({holder})"
            raise ValueError(f"{problem}; wait, or choose another folder") from None
        except BaseException:
            self._lock.release()
            raise
        return self

    def _read(self, path):
        """Return the manifest of one of our folders, or a new one if it has none."""
        blank = {"kind": self.kind, "format": FORMAT, "made_from": {}}
        return read_manifest(path) or {**blank, "files": {}, "cases": {}}

    def __exit__(self, kind, error, traceback):
        """Save the manifest, or delete it if the call failed and left nothing else."""
        manifest = self.path / MANIFEST
        try:
            if manifest.exists():
                self.save()
                # After other errors, threads may still be writing.
                failed = isinstance(error, ValueError) and not self.manifest["cases"]
                if failed and [*self.path.iterdir()] == [manifest]:
                    _unlink(self.path.parent if self._is_new else self.path, [manifest])
        finally:
            with contextlib.suppress(OSError):  # on Windows, filelock deletes it
                os.unlink(self._lock.lock_file)
            self._lock.release()

    def begin(self, made_from):
        """Record what the folder is made from; keep the recorded files and cases.

        Parameters
        ----------
        made_from : dict
            Must be JSON-serialisable.
        """
        self.manifest["made_from"] = made_from
        self.save()

    def save(self):
        """Write the manifest, sorted so that the order of processing has no effect."""
        for key in ("files", "cases"):
            self.manifest[key] = dict(sorted(self.manifest[key].items()))
        write_json(self.path / MANIFEST, self.manifest)

    def claim(self, names):
        """List files in the manifest as ours before they are written.

        Parameters
        ----------
        names : iterable of str
            Relative paths.

        Raises
        ------
        ValueError
            If a path leads outside the folder, or to a file that is not ours.
        """
        names = set(names)
        if out := _find_outside(names):
            raise ValueError(f"{out[:5]} would be outside {self.final}")
        for folder, ours in ((self.path, self.manifest), (self.final, self.former)):
            new = names - ours["files"].keys()
            foreign = [name for name in new if os.path.lexists(folder / name)]
            # A link to a folder cannot be swapped with a folder. So with `beside`, the
            # parents of all our files must be real folders.
            used = new if self.path == self.final else names | ours["files"].keys()
            parents = {folder / p for n in used for p in PurePosixPath(n).parents[:-1]}
            foreign += [str(p) for p in parents if p.is_symlink() or p.is_file()]
            if foreign:
                problem = f"{folder} holds other files: {', '.join(foreign[:5])}"
                raise ValueError(f"{problem}; move them, or choose another folder")
        self.manifest["files"] = dict.fromkeys(names) | self.manifest["files"]
        self.save()

    def start_over(self, made_from, names):
        """Delete all our files in the folder, and claim new ones.

        Parameters
        ----------
        made_from : dict
            See `begin`.
        names : iterable of str
            Relative paths.

        Raises
        ------
        ValueError
            If one of our files has changed in size (then nothing is deleted), or as in
            `claim`.
        """
        changed = []
        for name, noted in self.manifest["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            complete = isinstance(noted, dict) and not file.is_symlink()
            if complete and size not in (None, noted.get("bytes")):
                changed.append(name)
        if changed:
            problem = f"{self.path} holds files that were changed: {changed[:5]}"
            raise ValueError(f"{problem}; move them, or choose another folder")
        _unlink(self.path, self.manifest["files"])
        self.manifest |= {"files": {}, "cases": {}, "made_from": made_from}
        self.claim(names)

    @contextlib.contextmanager
    def write(self, name):
        """Yield a temporary path for a claimed file, then rename and record the file.

        Parameters
        ----------
        name : str
            Relative path.

        Yields
        ------
        temporary : Path
        """
        with atomic_write(self.path / name) as temporary:
            yield temporary
            noted = describe_file(temporary)
        self.manifest["files"][name] = noted

    def take_over(self, name):
        """Add a file of the previous result to the new one, as a hard link or a copy.

        Parameters
        ----------
        name : str
            Relative path of a claimed file.
        """
        source, target = self.final / name, self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)
        self.manifest["files"][name] = self.former["files"][name]

    def note_case(self, case_id, record):
        """Record what is known about a case, and save the manifest.

        Parameters
        ----------
        case_id : str
        record : dict
            Must be JSON-serialisable.
        """
        self.manifest["cases"][case_id] = record
        self.save()

    def remove(self, names):
        """Delete our files, and the folders that this leaves empty.

        Parameters
        ----------
        names : iterable of str
            Relative paths; only those that the manifest lists are deleted.
        """
        names = self.manifest["files"].keys() & set(names)
        _unlink(self.path, names)
        kept = {k: v for k, v in self.manifest["files"].items() if k not in names}
        self.manifest["files"] = kept
        self.save()

    def put_in_place(self):
        """Swap the new folder with the final one, and keep the user's own files."""
        self.save()
        if not self.final.exists():
            self.path.rename(self.final)
            return
        _exchange(self.path, self.final, self._spare)
        # The previous result is now in `self.path`: delete our files there, and move
        # the user's to the new one. The manifest, which marks the folder as ours, goes
        # last.
        self.manifest, self.former = self.former, self.manifest
        _unlink(self.path, self.manifest["files"])
        for path in sorted(self.path.rglob("*"), reverse=True):
            target = self.final / path.relative_to(self.path)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path != self.path / MANIFEST:
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        _unlink(self.path, [MANIFEST])
        self.path.rmdir()


def _unlink(folder, names):
    """Delete files, their unfinished copies, and folders within `folder` left empty."""
    parents = set()
    for path in (folder / name for name in names):
        path.unlink(missing_ok=True)
        path.with_name(f".writing-{path.name}").unlink(missing_ok=True)
        parents |= {parent for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, reverse=True):
        with contextlib.suppress(OSError):
            parent.rmdir()

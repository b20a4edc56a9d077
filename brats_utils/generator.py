"""Batches of whole volumes or patches for Keras, read from one side of a split."""

import hashlib
import json
import math
import threading
import weakref
import zlib
from pathlib import Path

import keras
import numpy as np

from brats_utils import files
from brats_utils.augment import augment as augment_patch
from brats_utils.split import name_images
from brats_utils.volumes import check_shape, pad, standardise

# numpy parses npy headers with `ast`, which is not thread-safe in some releases of
# Python 3.11 (python/cpython#106905).
PARSING = threading.Lock()
# What is known about the models in memory; `read_model` and `train` fill both tables.
# SEEN {model: names of the images it was trained on} keeps these out of validation.
# CHANNELS {model: its modalities in order} sets what `predict_case` reads by default.
SEEN = weakref.WeakKeyDictionary()
CHANNELS = weakref.WeakKeyDictionary()
PREPARE_AGAIN = "Run notebooks/01_prepare.ipynb again"
# The values that options may have, as (fits, expected) for `check_option`.
POSSIBLE = dict.fromkeys(("batch_size", "patches_per_case"), files.whole(1))
POSSIBLE |= dict.fromkeys(("seed", "workers", "max_queue_size"), files.whole(0))
POSSIBLE |= {"tumour_share": files.number(0, 1), "full_batches": files.BOOL}
CHANGES = "True, False or a function of (image, labels, rng)"
POSSIBLE["augment"] = (lambda change: type(change) is bool or callable(change)), CHANGES


def _read_side(folder):
    """Return a split's folder, its manifest, and the names of one side's files."""
    for root in folder.parents[:2]:  # <split>/train, or <folds>/<fold>/train
        manifest, side = files.read_manifest(root), folder.relative_to(root).as_posix()
        prefixes = f"{side}/images/", f"{side}/masks/"
        names = [n for n in manifest.get("files", ()) if n.startswith(prefixes)]
        if names and manifest["kind"] in ("split", "folds"):
            return root, manifest, names
    problem = f"no volumes in {folder}, or it is not the train or val folder of a split"
    raise FileNotFoundError(f"{problem}. {PREPARE_AGAIN}")


def _file_state(path):
    """Return size and modification time, which change when a file is rewritten."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


class BratsGenerator(keras.utils.PyDataset):
    """Standardised whole volumes or patches, in batches, from one side of a split.

    Each epoch uses every case once (or `patches_per_case` times). The order depends
    only on (seed, epoch). The position of a patch and its augmentation depend only on
    (seed, epoch, case id, patch number). Images and masks are paired by case id.

    Parameters
    ----------
    folder : path
        `data/split/train` or `data/split/val`, as written by `split_dataset`.
    batch_size : int
        The last batch of an epoch may be smaller, unless `full_batches` is set.
    patch_shape : tuple of 3 int, optional
        Voxels along X, Y and Z; a smaller volume is padded with zeros (background) at
        its end. None gives whole volumes, of one shape unless `batch_size` is 1.
    tumour_share : float
        Probability that a patch is centred on a voxel of a random tumour label, or
        as close to it as the border allows. Other patches are placed anywhere.
    augment : bool or callable
        True to use `brats_utils.augment.augment`, or another function with the same
        signature, such as `flip`. It may change its arguments, which are copies.
    cache : bool
        Keep the standardised volumes in memory instead of reading them again: 4 bytes
        per voxel and channel.
    seed : int
        Seed for the order, the patches and the augmentation.
    patches_per_case : int
        Number of samples drawn from each case in an epoch.
    full_batches : bool
        Fill up the last batch with the first samples of the epoch, so that several
        devices can share each batch evenly.
    workers : int
        Number of threads that load batches. With TensorFlow, 2 are faster than 1 even
        if loading takes no time; a comment in the code explains why.
    **kwargs
        `max_queue_size` of `keras.utils.PyDataset`.

    Attributes
    ----------
    case_ids : list of str
        Sorted.
    modalities : tuple of str
        Names of the channels, in order.
    settings : dict
        How the volumes were prepared, and from which folder ("raw").
    rows : dict of str to dict
        The row of each case in the report of `prepare_dataset`.
    root : Path
        The folder with the manifest, of a split or of all folds.
    epoch : int
        Epoch of the next batches. It advances when Keras finishes an epoch.

    Raises
    ------
    FileNotFoundError
        If the folder holds no volumes.
    ValueError
        If an image lacks its mask or vice versa, or an argument is out of range.
    """

    def __init__(
        self,
        folder,
        *,
        batch_size=2,
        patch_shape=None,
        tumour_share=1 / 3,
        augment=False,
        cache=False,
        seed=0,
        patches_per_case=1,
        full_batches=False,
        workers=2,
        **kwargs,
    ):
        # With one worker, Keras lets tf.data tune itself, and each epoch ends with a
        # wait for that: up to 20 s on two cores, as long as an epoch of a quick run.
        super().__init__(workers=workers, **kwargs)
        self.batch_size, self.patches_per_case = batch_size, patches_per_case
        self.tumour_share, self.augment, self.seed = tumour_share, augment, seed
        self.full_batches, self.patch_shape = full_batches, patch_shape
        files.check_option("cache", cache, *files.BOOL)
        for name, possible in POSSIBLE.items():
            files.check_option(name, getattr(self, name), *possible)
        check_shape(patch_shape, "patch_shape")
        self.folder = files.check_path("folder", folder).resolve()
        self.root, manifest, names = _read_side(self.folder)
        self._recorded = {name: manifest["files"][name] for name in names}
        self.case_ids = sorted({Path(name).stem for name in names})
        self.rows = {case_id: manifest["cases"][case_id] for case_id in self.case_ids}
        try:
            self._states = {p: _file_state(p) for p in map(self.root.joinpath, names)}
        except OSError as error:
            problem = f"image without mask, or vice versa: {error.filename} is missing"
            raise ValueError(f"{problem}. {PREPARE_AGAIN}") from None
        self.settings = manifest["made_from"]["settings"]
        self.modalities = tuple(self.settings["modalities"])
        self.patch_shape = None if patch_shape is None else (*map(int, patch_shape),)
        self._cache = {} if cache else None
        self.epoch, self._within_epoch = 0, False

    def describe(self):
        """Return what a training run depends on: the volumes and all options.

        Returns
        -------
        description : dict
            By option name. `cache` is left out because it does not change the batches.
        """
        volumes = hashlib.sha256(json.dumps(self._recorded, sort_keys=True).encode())
        names = "batch_size patch_shape tumour_share augment seed patches_per_case"
        options = {n: getattr(self, n) for n in (*names.split(), "full_batches")}
        return {"volumes": volumes.hexdigest(), **options}

    def name_images(self):
        """Return the names of all images of the cases, see `split.name_images`."""
        return set().union(*map(name_images, self.rows.values()))

    def known_cases(self, images, case_ids=()):
        """Return cases with one of these images; compare ids if images are unknown."""
        names = {case_id: name_images(row) for case_id, row in self.rows.items()}
        by_id = {i for i in names if not (images and names[i])} & {*case_ids}
        return [i for i in names if names[i] & images or i in by_id]

    def check_fit(self, input_shape, factor):
        """Raise unless all samples fit a model.

        Parameters
        ----------
        input_shape : tuple
            (B, X, Y, Z, C) of the model; None for sizes that may vary.
        factor : int
            Sizes that may vary must be multiples of this.

        Raises
        ------
        ValueError
            If a sample does not fit; the message says what to change.
        """
        *sizes, channels = input_shape[1:]
        shapes, problems = {self.patch_shape}, []
        if self.patch_shape is None:
            texts = {row["shape"] for row in self.rows.values()}
            shapes = {tuple(map(int, text.split("x"))) for text in texts}
        if channels != len(self.modalities):
            problems.append(f"channels {self.modalities}, the model takes {channels}")
        takes = f"multiples of {factor}" if None in sizes else tuple(sizes)
        for shape in shapes:
            pairs = zip(sizes, shape, strict=False)
            misfits = [n % factor if size is None else n != size for size, n in pairs]
            if len(sizes) != 3 or any(misfits):
                problem = f"samples of {shape}, the model takes {takes}"
                problems.append(f"{problem}: set patch_shape")
        if len(shapes) > 1 and self.batch_size > 1:
            problem = f"volumes of {len(shapes)} shapes"
            problems.append(f"{problem}: set patch_shape, or batch_size=1")
        if problems:
            raise ValueError(f"{self.folder} has {problems[0]}")

    @property
    def input_shape(self):
        """Return the shape (X, Y, Z, C) of a sample, as `unet` takes it."""
        spatial = self.patch_shape or self._read(self.case_ids[0])[1].shape
        return (*spatial, len(self.modalities))

    def verify(self):
        """Compare every volume with the checksum recorded when it was prepared.

        Raises
        ------
        ValueError
            If any have changed; the message lists them.
        """
        if changed := files.find_changed(self.root, self._recorded):
            problem = f"changed since they were prepared: {', '.join(changed)}"
            raise ValueError(f"{problem} in {self.root}. {PREPARE_AGAIN}")

    def __len__(self):
        """Return the number of batches in an epoch."""
        return math.ceil(len(self.case_ids) * self.patches_per_case / self.batch_size)

    def order(self, epoch=None):
        """Return the cases of an epoch in the order in which they are used.

        Parameters
        ----------
        epoch : int, optional
            The current one by default.

        Returns
        -------
        draws : list of (str, int)
            Case id and patch number.
        """
        epoch = self.epoch if epoch is None else epoch
        n, rng = len(self.case_ids), np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(n * self.patches_per_case)
        return [(self.case_ids[i % n], int(i // n)) for i in shuffled]

    def set_epoch(self, epoch):
        """Set the epoch of the next batches, for example to resume a run.

        Parameters
        ----------
        epoch : int
            Counted from 0.
        """
        files.check_option("epoch", epoch, *files.whole(0))
        self.epoch = epoch

    def on_epoch_begin(self):
        """Remember that an epoch has begun; Keras calls this."""
        self._within_epoch = True

    def on_epoch_end(self):
        """Advance to the next epoch; Keras calls this."""
        # `fit` and `evaluate` call it once before their first epoch, too.
        self.epoch += 1 if self._within_epoch else 0
        self._within_epoch = False

    def __getitem__(self, index):
        """Return batch number `index` of the current epoch.

        Parameters
        ----------
        index : int
            From 0 to `len(self) - 1`.

        Returns
        -------
        x : (B, X, Y, Z, C) float32 array
            Mean 0 and SD 1 over the non-zero voxels of the whole scan; background 0.
        y : (B, X, Y, Z, 1) uint8 array
            Labels 0 to 3.

        Raises
        ------
        IndexError
            If there is no such batch.
        ValueError
            If a volume cannot be read, has changed or does not fit its mask, or whole
            volumes differ in shape.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        epoch, first = self.epoch, index * self.batch_size
        order = self.order(epoch)
        last = first + self.batch_size
        last = last if self.full_batches else min(last, len(order))
        # With `full_batches`, positions past the end wrap around to the first samples.
        draws = [order[i % len(order)] for i in range(first, last)]
        samples = [self._sample(case_id, epoch, n) for case_id, n in draws]
        images, labels = zip(*samples, strict=True)
        shapes = {volume.shape for volume in labels}
        if len(shapes) > 1:
            problem = f"volumes of shapes {sorted(shapes)} do not fit into one batch"
            raise ValueError(f"{problem}: set patch_shape, or batch_size=1")
        return np.stack(images), np.stack(labels)[..., None]

    def _read(self, case_id):
        """Return image and mask, memory-mapped as stored or standardised if cached."""
        if self._cache is not None and case_id in self._cache:
            return self._cache[case_id]
        paths = [self.folder / kind / f"{case_id}.npy" for kind in ("images", "masks")]
        try:
            if any(_file_state(path) != self._states[path] for path in paths):
                raise ValueError("changed since the generator was made")
            with PARSING:
                image, mask = (np.load(p, "r", allow_pickle=False) for p in paths)
            found = f"image {image.shape} {image.dtype}, mask {mask.shape} {mask.dtype}"
            shape = (*mask.shape, len(self.modalities))
            fitting = f"image {shape} float16, mask {mask.shape} uint8"
            if found != fitting or mask.ndim != 3 or mask.max() > 3:
                problem = "are not a float16 image and labels 0 to 3 on one grid"
                raise ValueError(f"{found} {problem}")
        except (OSError, ValueError, EOFError) as error:
            problem = f"{case_id}: {paths[0]} or its mask: {error}"
            raise ValueError(f"{problem}. {PREPARE_AGAIN}") from error
        if self._cache is not None:
            image, mask = self._standardise(case_id, image), np.array(mask)
            self._cache[case_id] = image, mask
        return image, mask

    def _standardise(self, case_id, stored):
        """Return stored values as the network sees them, background exactly 0."""
        row, kinds = self.rows[case_id], ("mean", "sd", "zero")
        statistics = [[row[f"{m}_{kind}"] for m in self.modalities] for kind in kinds]
        return standardise(stored, statistics)

    def _corner(self, mask, rng):
        """Draw the first voxel of a patch along X, Y and Z."""
        room = np.maximum(np.array(mask.shape) - self.patch_shape, 0)
        if rng.random() < self.tumour_share:
            present = np.flatnonzero(np.bincount(mask.ravel(), minlength=4)[1:]) + 1
            if present.size:
                voxels = np.flatnonzero(mask == rng.choice(present))
                centre = np.unravel_index(rng.choice(voxels), mask.shape)
                corner = np.array(centre) - np.array(self.patch_shape) // 2
                return np.clip(corner, 0, room)
        return rng.integers(0, room + 1)

    def _sample(self, case_id, epoch, draw):
        """Return one image (X, Y, Z, C) float32 and its labels (X, Y, Z) uint8."""
        # The seed must not depend on loading order: any thread may load any batch.
        key = [self.seed, epoch, zlib.crc32(case_id.encode()), draw]
        rng = np.random.default_rng(key)
        image, labels = self._read(case_id)
        if self.patch_shape is not None:
            corner = self._corner(labels, rng)
            box = tuple(map(slice, corner, np.add(corner, self.patch_shape)))
            image, labels = image[box], labels[box]
        if self._cache is None:
            image = self._standardise(case_id, image)
        image, labels = pad(image, self.patch_shape), pad(labels, self.patch_shape)
        if self.augment is True:
            return augment_patch(image, labels, rng)
        if not self.augment:
            return image, labels
        # The function may change these copies.
        pair = self.augment(np.array(image), np.array(labels), rng)
        shapes = [image.shape, labels.shape]
        is_pair = isinstance(pair, tuple | list)
        found = [np.shape(x) for x in pair] if is_pair else type(pair).__name__
        name = "what augment returns, by shape,"
        files.check_option(name, found, lambda f: f == shapes, shapes)
        name, values = "labels that augment returns", np.unique(pair[1]).tolist()
        files.check_option(name, values, {0, 1, 2, 3}.issuperset, "0 to 3")
        return pair


def check_pair(train_data, val_data, model, factor):
    """Raise unless two generators fit a model and each other.

    Parameters
    ----------
    train_data, val_data : BratsGenerator
        To train and to validate with.
    model : keras.Model
        Must not have been trained on a case of `val_data`, as far as `SEEN` knows.
    factor : int
        As in `BratsGenerator.check_fit`.

    Raises
    ------
    ValueError
        If they do not fit, share cases, patients or images, or the model was trained on
        `val_data`.
    """
    for name, data in (("train_data", train_data), ("val_data", val_data)):
        files.check_option(name, data, lambda d: d.check_fit, "a BratsGenerator")
        data.check_fit(model.input_shape, factor)
    channels, others = train_data.modalities, val_data.modalities
    expected = f"{channels}, as in train_data"
    same = [*others] == [*channels]
    files.check_option("modalities of val_data", others, lambda _: same, expected)
    # Names of patients are only comparable within one set of raw scans.
    one_set = train_data.settings.get("raw") == val_data.settings.get("raw")
    for column in ("case", "patient") if one_set else ("case",):
        ids = [{r.get(column) for r in d.rows.values()} for d in (train_data, val_data)]
        if shared := sorted(filter(None, ids[0] & ids[1])):
            problem = f"train_data and val_data share {len(shared)} {column}s"
            raise ValueError(f"{problem}: {shared[:5]}; validate on other cases")
    if copies := val_data.known_cases(train_data.name_images()):
        problem = f"train_data and val_data share images of {len(copies)} cases"
        raise ValueError(f"{problem}: {copies[:5]}; validate on other cases")
    if known := val_data.known_cases(SEEN.get(model, set())):
        problem = f"this model was trained on {len(known)} cases of val_data"
        raise ValueError(f"{problem}: {known[:5]}. Create a new one with unet")

"""Batches for Keras, read from a split folder: whole volumes or patches."""

import math
import zlib
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from brats_utils.augment import augment as augment_patch
from brats_utils.files import read_json, sha256

MAX_HALF = 65504.0
SUBNORMAL_BITS = 0x7FF  # of a float16 without its sign, shifted by 1, less 1


def _case_files(folder):
    """Return {case id: (image path, mask path)} of one side of a split, by id."""
    folder = Path(folder)
    images, masks = (
        {path.stem: path for path in (folder / kind).glob("*.npy")}
        for kind in ("images", "masks")
    )
    if not images and not masks:
        raise FileNotFoundError(
            f"no volumes in {folder}: run notebooks/01_prepare.ipynb first"
        )
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        raise ValueError(f"{folder}: image without mask, or the reverse: {alone[:5]}")
    return {case_id: (images[case_id], masks[case_id]) for case_id in sorted(images)}


def _read_report(folder, case_ids):
    """Return the rows of `cases.csv` by case id."""
    path = Path(folder) / "cases.csv"
    report = pd.read_csv(path, dtype={"case": str}).set_index("case")
    missing = sorted(set(case_ids) - set(report.index))
    if missing:
        raise ValueError(f"{path} has no row for {missing[:5]}; split again")
    return report


def _check_arguments(batch_size, patches_per_case, tumour_share, patch_shape):
    """Raise if an argument is out of range."""
    if batch_size < 1 or patches_per_case < 1 or not 0 <= tumour_share <= 1:
        raise ValueError(
            "batch_size and patches_per_case are at least 1, tumour_share is in "
            f"0..1; got {batch_size}, {patches_per_case}, {tumour_share}"
        )
    if patch_shape is not None and (len(patch_shape) != 3 or min(patch_shape) < 1):
        raise ValueError(f"patch_shape is three voxel counts, got {patch_shape}")


def _widen(half, out):
    """Copy float16 values into a float32 array, in a third of numpy's own time."""
    # TensorFlow's threads take float32 subnormals, below, as 0: numpy has none of them.
    if ((half.view(np.uint16) << 1) - np.uint16(1)).min() < SUBNORMAL_BITS:
        out[...] = half
        return
    bits = out.view(np.int32)
    bits[...] = half.view(np.int16)
    bits <<= 13  # the fraction in its place; of the copies of the sign one is kept
    bits &= ~0x70000000
    out *= np.float32(2.0**112)  # the exponents count from 15 and from 127
    if max(out.max(), -out.min()) > MAX_HALF:  # infinity and NaN have another rule
        out[...] = half


class BratsGenerator(keras.utils.PyDataset):
    """Batches of one side of a split, whole volumes or patches, standardised.

    Each case comes once an epoch (or `patches_per_case` times), in an order that is a
    function of (seed, epoch); what is drawn of a case, and how it is augmented, is a
    function of (seed, epoch, case). Image and mask are paired by the case id.

    Parameters
    ----------
    folder : path
        `data/split/train` or `data/split/val`, as `split_dataset` makes them.
    batch_size : int
        The last batch of an epoch may be smaller, unless `full_batches`.
    patch_shape : tuple of 3 int, optional
        Voxels along X, Y and Z; where a volume is smaller, zeros (background) are
        added at its end. None gives whole volumes, which must then be of one shape.
    tumour_share : float
        Chance that a patch is centred on a voxel of a tumour label chosen at random,
        as far as the volume's border allows; the others lie anywhere.
    augment : bool or callable
        Whether to change patches at random, as `brats_utils.augment.augment` does; or
        a function like it, `flip` say, that takes its place.
    cache : bool
        Keep the volumes in memory, standardised, instead of reading them again: 4 bytes
        a voxel and channel.
    seed : int
        Of order, patches and augmentation.
    patches_per_case : int
        How often each case comes in an epoch.
    full_batches : bool
        Fill the last batch up with what the epoch began with: several devices divide
        each batch among them.
    **kwargs
        `workers` and `max_queue_size` of `keras.utils.PyDataset`.

    Attributes
    ----------
    case_ids : list of str
        Sorted.
    modalities : tuple of str
        The channels, in order.
    input_shape : tuple
        (X, Y, Z, C) of a sample.
    settings : dict
        What `settings.json` says of the volumes.
    checksum : str
        SHA-256 of the report, which holds the checksums of all volumes.
    report : pandas.DataFrame
        What `cases.csv` says, by case id.
    epoch : int
        Which epoch the next batches belong to; it advances when Keras ends one.

    Raises
    ------
    FileNotFoundError
        If the folder holds no volumes.
    ValueError
        If an image lacks its mask or the reverse, or an argument is out of range.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_arguments(batch_size, patches_per_case, tumour_share, patch_shape)
        self._files = _case_files(folder)
        self.case_ids = list(self._files)
        self.settings = read_json(Path(folder) / "settings.json")
        self.modalities = tuple(self.settings["modalities"])
        self.batch_size = batch_size
        self.patch_shape = None if patch_shape is None else tuple(patch_shape)
        self.tumour_share = tumour_share
        self.augment = augment
        self.seed = seed
        self.patches_per_case = patches_per_case
        self.full_batches = full_batches
        self.epoch = 0
        self._cache = {} if cache else None
        self.checksum = sha256(Path(folder) / "cases.csv")
        self.report = _read_report(folder, self.case_ids)
        # {case id: (means, SDs, values of background)}, each (C,) float32
        self._statistics = {
            case_id: [
                row[[f"{m}_{what}" for m in self.modalities]].to_numpy("float32")
                for what in ("mean", "sd", "zero")
            ]
            for case_id, row in self.report.iterrows()
        }
        self._within_epoch = False

    @property
    def input_shape(self):
        """Return (X, Y, Z, C) of a sample, as `unet` takes it."""
        spatial = self.patch_shape or self._read(self.case_ids[0])[1].shape
        return (*spatial, len(self.modalities))

    def verify(self):
        """Compare every volume with the checksum noted when it was prepared.

        Raises
        ------
        ValueError
            If one has changed since; all are named.
        """
        changed = [
            str(path)
            for case_id, paths in self._files.items()
            for path, kind in zip(paths, ("images", "masks"), strict=True)
            if sha256(path) != self.report.loc[case_id, f"{kind}_sha256"]
        ]
        if changed:
            raise ValueError(
                f"changed since they were prepared: {', '.join(changed)}. Run "
                "notebooks/01_prepare.ipynb again"
            )

    def __len__(self):
        """Return the number of batches in an epoch."""
        return math.ceil(len(self.case_ids) * self.patches_per_case / self.batch_size)

    def order(self, epoch=None):
        """Return the cases of an epoch in the order in which they come.

        Parameters
        ----------
        epoch : int, optional
            The current one by default.

        Returns
        -------
        draws : list of (str, int)
            Case id, and which of its patches.
        """
        epoch = self.epoch if epoch is None else epoch
        n = len(self.case_ids)
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(
            n * self.patches_per_case
        )
        return [(self.case_ids[i % n], int(i // n)) for i in shuffled]

    def set_epoch(self, epoch):
        """Say which epoch the next batches belong to, to go on with a run.

        Parameters
        ----------
        epoch : int
            Counted from 0.
        """
        self.epoch = epoch

    def on_epoch_begin(self):
        """Note that an epoch runs; Keras calls this."""
        self._within_epoch = True

    def on_epoch_end(self):
        """Go on to the next epoch's order; Keras calls this."""
        # `fit` and `evaluate` call it once before their first epoch, too.
        self.epoch += self._within_epoch
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
            If a volume cannot be read or does not fit its mask, or whole volumes
            differ in shape.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        epoch, first = self.epoch, index * self.batch_size
        order = self.order(epoch)
        last = len(order) if not self.full_batches else first + self.batch_size
        draws = [order[i % len(order)] for i in range(first, last)][: self.batch_size]
        samples = [self._sample(case_id, epoch, draw) for case_id, draw in draws]
        shapes = {labels.shape for _, labels in samples}
        if len(shapes) > 1:
            raise ValueError(
                f"volumes of shapes {sorted(shapes)} do not go into one batch: set "
                "patch_shape, or batch_size=1"
            )
        x = np.stack([image for image, _ in samples])  # (B, X, Y, Z, C)
        y = np.stack([labels for _, labels in samples])[..., None]  # (B, X, Y, Z, 1)
        return x, y

    def _read(self, case_id):
        """Return image and mask: as stored, memory-mapped, or standardised, cached."""
        if self._cache is not None and case_id in self._cache:
            return self._cache[case_id]
        mode = "r" if self._cache is None else None
        paths = self._files[case_id]
        try:
            image, mask = (np.load(p, mode, allow_pickle=False) for p in paths)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{case_id}: {paths[0]} or its mask cannot be read ({error}); "
                "prepare and split again"
            ) from error
        shape = *mask.shape, len(self.modalities)
        if mask.ndim != 3 or (image.shape, image.dtype) != (shape, np.float16):
            raise ValueError(
                f"{case_id}: image {image.shape} {image.dtype} and mask {mask.shape} "
                f"do not fit each other, the channels {self.modalities} and float16; "
                "prepare and split again"
            )
        if self._cache is not None:
            image = self._standardise(case_id, image)
            self._cache[case_id] = image, mask
        return image, mask

    def _corner(self, mask, rng):
        """Draw where a patch begins, along X, Y and Z."""
        room = np.maximum(np.array(mask.shape) - self.patch_shape, 0)
        if rng.random() < self.tumour_share:
            present = np.flatnonzero(np.bincount(mask.ravel(), minlength=4)[1:]) + 1
            if present.size:
                voxels = np.flatnonzero(mask == rng.choice(present))
                centre = np.unravel_index(rng.choice(voxels), mask.shape)
                return np.clip(
                    np.array(centre) - np.array(self.patch_shape) // 2, 0, room
                )
        return rng.integers(0, room + 1)

    def _sample(self, case_id, epoch, draw):
        """Return one image (X, Y, Z, C) float32 and its labels (X, Y, Z) uint8."""
        key = [self.seed, epoch, zlib.crc32(case_id.encode()), draw]
        rng = np.random.default_rng(key)
        image, labels = self._read(case_id)
        if self.patch_shape is not None:
            corner = self._corner(labels, rng)
            ends = np.add(corner, self.patch_shape)
            box = tuple(map(slice, corner, ends))
            image, labels = image[box], labels[box]
        if self._cache is None:
            image = self._standardise(case_id, image)
        if self.patch_shape is not None and labels.shape != self.patch_shape:
            widths = [(0, n) for n in np.subtract(self.patch_shape, labels.shape)]
            image, labels = np.pad(image, [*widths, (0, 0)]), np.pad(labels, widths)
        change = augment_patch if self.augment is True else self.augment
        return change(image, labels, rng) if change else (image, labels)

    def _standardise(self, case_id, stored):
        """Return stored values as the network sees them, background exactly 0."""
        # A plane at a time, its rows long: what numpy works on stays in the cache.
        n_z = stored.shape[2]
        mean, sd, zero = (np.tile(v, n_z) for v in self._statistics[case_id])
        zero = zero.astype(stored.dtype).astype(np.float32)
        image = np.empty(stored.shape, np.float32)
        for plane, result in zip(stored, image, strict=True):
            rows = result.reshape(len(result), -1)  # (Y, Z * C)
            _widen(plane.reshape(rows.shape), out=rows)
            brain = rows != zero
            rows -= mean
            rows /= sd
            rows *= brain
        return image

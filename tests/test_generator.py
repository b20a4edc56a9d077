"""Batches: paired by id, every case once, in an order that seed and epoch decide."""

import gc
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import toy_volumes

from brats_utils.files import OutputFolder, read_json, write_json
from brats_utils.generator import BratsGenerator
from brats_utils.labels import encode_labels
from brats_utils.prepare import prepare_dataset
from brats_utils.split import split_dataset, split_folds
from brats_utils.volumes import bounding_box, standardise

MODALITIES = ["flair", "t1ce", "t2"]
SHAPE = (24, 24, 16)


def write_split(folder, n_cases=5, shape=SHAPE):
    """Write one side of a split; a case's image tells which case it is.

    Brain voxels of case i hold i + 1 eighths, tumour voxels one eighth more; with mean
    1/4 and SD 1/2 they are seen as (i - 1) / 4 and i / 4.
    """
    with OutputFolder(folder.parent, "split") as output:
        output.begin({"settings": {"modalities": MODALITIES, "raw": "somewhere"}})
        for i in range(n_cases):
            case_id = f"case_{i:03}"
            mask = np.zeros(shape, np.uint8)
            mask[10:14, 10:14, 6:10] = 2
            mask[11:13, 11:13, 7:9] = [1, 3]
            image = np.zeros((*shape, len(MODALITIES)), np.float16)
            image[2:-2, 2:-2, 1:-1] = (i + 1) / 8
            image[mask > 0] += 1 / 8
            for kind, volume in (("images", image), ("masks", mask)):
                name = f"{folder.name}/{kind}/{case_id}.npy"
                output.claim([name])
                with output.write(name) as temporary:
                    np.save(temporary, volume)
            row = {"case": case_id}
            for m in MODALITIES:
                row |= {f"{m}_mean": 0.25, f"{m}_sd": 0.5, f"{m}_zero": 0.0}
            output.note_case(case_id, row)
    return folder


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path / "split" / "train")


def test_a_batch_is_standardised_and_background_is_exactly_zero(split):
    x, y = BratsGenerator(split, batch_size=5)[0]
    assert x.shape == (5, 24, 24, 16, 3) and x.dtype == np.float32
    assert y.shape == (5, 24, 24, 16, 1) and y.dtype == np.uint8
    assert not x[:, 0].any() and (x[:, 12, 12, 8] != x[:, 5, 5, 5]).all()
    order = [int(case[-3:]) for case, _ in BratsGenerator(split).order(0)]
    # Brain of case i: ((i + 1) / 8 - 1/4) / (1/2) = (i - 1) / 4, one more in tumour.
    np.testing.assert_array_equal(x[:, 5, 5, 5, 0], (np.array(order) - 1) / 4)
    np.testing.assert_array_equal(x[:, 12, 12, 8, 2], np.array(order) / 4)
    np.testing.assert_array_equal(np.unique(y), [0, 1, 2, 3])


def test_prepared_cases_are_seen_as_standardised_scans(tmp_path, toy_set):
    prepare_dataset(toy_set, tmp_path / "prepared", crop_shape=None, jobs=1)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    generator = BratsGenerator(tmp_path / "split" / "train", batch_size=3)
    x, y = generator[0]
    for image, labels, (case_id, _) in zip(x, y, generator.order(), strict=True):
        raw, segmentation = toy_volumes(int(case_id[-3:]))
        whole = standardise(np.stack([raw[m] for m in MODALITIES], axis=-1))
        box = bounding_box(whole.any(axis=-1))
        # Half precision is good to 2^-12 of the range, some 1.5 SD here.
        np.testing.assert_allclose(image, whole[box], atol=5e-3)
        np.testing.assert_array_equal(image == 0, whole[box] == 0)
        np.testing.assert_array_equal(labels[..., 0], encode_labels(segmentation[box]))


def test_background_other_than_zero_is_still_background(split):
    manifest = read_json(split.parent / "manifest.json")
    manifest["cases"]["case_000"]["flair_zero"] = 0.125
    write_json(split.parent / "manifest.json", manifest)
    generator = BratsGenerator(split, batch_size=5)
    first = [case for case, _ in generator.order()].index("case_000")
    x, _ = generator[0]
    assert x[first, 5, 5, 5].tolist() == [0, -0.25, -0.25]
    assert x[first, 0, 0, 0].tolist() == [-0.5, 0, 0]


@pytest.mark.parametrize("batch_size, n_batches", [(2, 3), (5, 1), (8, 1)])
def test_D04_every_case_comes_once_an_epoch_with_the_last_partial_batch(
    split, batch_size, n_batches
):
    generator = BratsGenerator(split, batch_size=batch_size)
    assert len(generator) == n_batches
    seen = np.concatenate([x[:, 12, 12, 8, 0] for x, _ in generator])
    assert sorted(seen * 4) == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        generator[n_batches]


def test_full_batches_are_filled_up_with_what_the_epoch_began_with(split):
    options = {"patch_shape": (8, 8, 8), "seed": 3, "full_batches": True}
    for batch_size in (2, 4, 7):  # of five cases
        data = BratsGenerator(split, batch_size=batch_size, **options)
        batches = [data[i][0] for i in range(len(data))]
        assert {len(x) for x in batches} == {batch_size}
        plain = BratsGenerator(
            split, batch_size=5, **{**options, "full_batches": False}
        )
        expected = plain[0][0]
        found = np.concatenate(batches)
        np.testing.assert_array_equal(found, np.resize(expected, found.shape))


def test_a_function_takes_the_place_of_the_augmentation(split):
    def invert(image, labels, rng):
        return -image, labels

    options = {"batch_size": 5, "seed": 2}
    plain = BratsGenerator(split, augment=False, **options)
    changed = BratsGenerator(split, augment=invert, **options)
    np.testing.assert_array_equal(changed[0][0], -plain[0][0])


def test_several_patches_of_a_case_differ(split):
    generator = BratsGenerator(split, patch_shape=(8, 8, 8), patches_per_case=3)
    assert len(generator) == 8  # 15 draws in batches of 2
    draws = generator.order()
    assert Counter(case for case, _ in draws) == dict.fromkeys(generator.case_ids, 3)
    patches = np.concatenate([x for x, _ in generator])
    places = [i for i, (case_id, _) in enumerate(draws) if case_id == "case_004"]
    assert len({patches[i].tobytes() for i in places}) > 1


def test_the_order_is_a_function_of_seed_and_epoch(split):
    one, two = BratsGenerator(split, seed=1), BratsGenerator(split, seed=1)
    assert one.order(3) == two.order(3)
    assert len({tuple(one.order(epoch)) for epoch in range(9)}) > 1
    assert any(one.order(e) != BratsGenerator(split, seed=2).order(e) for e in range(3))


def test_D05_the_order_in_which_files_are_listed_does_not_matter(split):
    expected = BratsGenerator(split)[0][0]
    manifest = read_json(split.parent / "manifest.json")
    for key in ("files", "cases"):
        manifest[key] = dict(reversed(manifest[key].items()))
    write_json(split.parent / "manifest.json", manifest)
    np.testing.assert_array_equal(BratsGenerator(split)[0][0], expected)


def test_patches_and_augmentation_are_a_function_of_the_epoch_too(split):
    options = {"patch_shape": (16, 16, 8), "augment": True, "batch_size": 5}
    one, two = BratsGenerator(split, **options), BratsGenerator(split, **options)
    two.set_epoch(1)
    later = two[0]
    one.on_epoch_begin()
    one.on_epoch_end()
    for mine, its in zip(one[0], later, strict=True):
        np.testing.assert_array_equal(mine, its)
    two.set_epoch(0)
    assert not np.array_equal(two[0][0], later[0])


def test_the_share_of_patches_centred_on_tumour(split):
    centres = {0.0: 0, 0.5: 0, 1.0: 0}
    for share in centres:
        generator = BratsGenerator(
            split, patch_shape=(5, 5, 5), tumour_share=share, patches_per_case=40
        )
        centres[share] = sum((y[:, 2, 2, 2, 0] > 0).sum() for _, y in generator)
    assert centres[1.0] == 200  # 5 cases, 40 patches each
    assert 80 < centres[0.5] < 130  # 100 expected, SD 7, and few by chance
    # Anywhere: 4 x 4 x 4 tumour voxels among 20 x 20 x 12 places, 1.3 % of 200.
    assert centres[0.0] < 15


def test_each_label_is_as_likely_a_centre(split):
    generator = BratsGenerator(
        split, patch_shape=(3, 3, 3), tumour_share=1, patches_per_case=60
    )
    middles = np.concatenate([y[:, 1, 1, 1, 0] for _, y in generator])
    # A third of 300 each, though label 2 has 56 of the 64 voxels.
    assert np.all(np.bincount(middles, minlength=4)[1:] > 75)


def test_a_patch_larger_than_the_volume_is_padded_with_background(split):
    generator = BratsGenerator(split, patch_shape=(32, 16, 16), batch_size=5)
    assert generator.input_shape == (32, 16, 16, 3)
    x, y = generator[0]
    assert x.shape == (5, 32, 16, 16, 3) and y.shape == (5, 32, 16, 16, 1)
    assert not x[:, 24:].any() and not y[:, 24:].any()


def test_a_case_without_tumour_gives_patches_from_anywhere(split):
    np.save(split / "masks" / "case_000.npy", np.zeros(SHAPE, np.uint8))
    generator = BratsGenerator(split, patch_shape=(8, 8, 8), tumour_share=1)
    assert sum(len(x) for x, _ in generator) == 5


def test_the_cache_gives_the_same_batches(split):
    read, cached = BratsGenerator(split), BratsGenerator(split, cache=True)
    for _ in range(2):
        np.testing.assert_array_equal(cached[1][0], read[1][0])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_keras_gets_the_same_batches_with_any_number_of_threads(split, workers):
    for path in (split / "images").glob("*.npy"):
        image = np.load(path)
        image[2:-2, 2:12] = 3e-5  # subnormal: TensorFlow's threads take those as 0
        np.save(path, image)
    generator = BratsGenerator(
        split, patch_shape=(8, 8, 8), augment=True, workers=workers, max_queue_size=2
    )
    expected = []
    for epoch in range(2):
        generator.set_epoch(epoch)
        expected += [x for x, _ in generator]
    generator.set_epoch(0)
    seen = []

    class Recorder(keras.Model):
        def train_step(self, data):
            seen.append(np.array(data[0]))
            return {"loss": keras.ops.zeros(())}

    model = Recorder()
    model.compile(run_eagerly=True, jit_compile=False)
    model.fit(generator, epochs=2, shuffle=False, verbose=0)
    for mine, theirs in zip(expected, seen, strict=True):
        np.testing.assert_array_equal(theirs, mine)
    assert generator.epoch == 2


def test_C10_a_missing_partner_is_named(split):
    (split / "masks" / "case_002.npy").unlink()
    with pytest.raises(ValueError, match="case_002"):
        BratsGenerator(split)


def test_another_folder_than_a_side_of_a_split_says_what_to_run(split, tmp_path):
    for folder in (tmp_path, split.parent, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="01_prepare"):
            BratsGenerator(folder)


def test_D06_a_damaged_volume_is_named_in_a_thread_too(split):
    path = split / "images" / "case_001.npy"
    path.write_bytes(path.read_bytes()[:1000])
    model = keras.Sequential([keras.Input((*SHAPE, 3)), keras.layers.Dense(1)])
    model.compile(loss="mse", jit_compile=False)
    with pytest.raises(Exception, match="case_001"):
        model.fit(BratsGenerator(split, workers=2), verbose=0)


def test_D06_reading_in_threads_survives_python_3_11s_parser(split):
    """Python before 3.11.8 parses one text at a time: the header of an npy file is one.

    Elsewhere it raises SystemError if the garbage collector lets another thread run in
    the middle (python/cpython#106905), some times in a million reads. Here it always
    lets it.
    """
    generator = BratsGenerator(split, batch_size=1, patch_shape=(4, 4, 4))
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()

    def give_way(phase, info):
        time.sleep(0)

    gc.callbacks.append(give_way)
    gc.set_threshold(50)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            batches = list(pool.map(lambda i: generator[i % 5], range(300)))
    finally:
        gc.callbacks.remove(give_way)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
    assert len(batches) == 300


class Trap:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_C09_pickled_objects_are_refused_and_not_executed(split, tmp_path):
    trap = np.array([Trap(tmp_path / "executed")], dtype=object)
    np.save(split / "images" / "case_001.npy", trap, allow_pickle=True)
    for cache in (False, True):
        with pytest.raises(ValueError, match="case_001"):
            list(BratsGenerator(split, cache=cache))
    assert not (tmp_path / "executed").exists()


def test_an_image_that_does_not_fit_its_mask_is_named(split):
    np.save(split / "masks" / "case_001.npy", np.zeros((24, 24, 8), np.uint8))
    with pytest.raises(ValueError, match="case_001.*24, 24, 8"):
        list(BratsGenerator(split, patch_shape=(8, 8, 8)))


def test_volumes_of_several_shapes_need_a_patch_shape(split, tmp_path):
    np.save(split / "images" / "case_001.npy", np.zeros((32, 24, 16, 3), np.float16))
    np.save(split / "masks" / "case_001.npy", np.zeros((32, 24, 16), np.uint8))
    with pytest.raises(ValueError, match="patch_shape"):
        list(BratsGenerator(split, batch_size=5))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", (0, 1.5, "2", None)),
        ("patches_per_case", (0, -1)),
        ("tumour_share", (2, -0.1, "all", np.nan)),
        ("patch_shape", ((8, 8), (8, 8, 0), (8, 8, 8.5), "888")),
    ],
)
def test_J4_arguments_out_of_range_are_refused(split, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name.split("_")[-1]):
            BratsGenerator(split, **{name: value})


def test_C08_every_flipped_bit_is_found_before_training(split):
    generator = BratsGenerator(split)
    generator.verify()
    paths, rng = sorted(split.rglob("*.npy")), np.random.default_rng(8)
    for _ in range(200):
        path = paths[rng.integers(len(paths))]
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.parent.name}/{path.name}.*Run"):
            generator.verify()
        path.write_bytes(data)
    generator.verify()


@pytest.mark.parametrize("cache", [False, True])
def test_H4_a_volume_that_is_prepared_again_in_training_is_noticed(split, cache):
    generator = BratsGenerator(split, batch_size=1, cache=cache)
    path = split / "images" / "case_001.npy"
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="case_001.*changed since"):
        list(generator)
    list(BratsGenerator(split, batch_size=1, cache=cache))  # a new one takes it


def test_H4_a_data_set_that_is_prepared_again_in_training_is_noticed(toy_set, tmp_path):
    options = {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(toy_set, tmp_path / "prepared", **options)
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    generator = BratsGenerator(tmp_path / "split" / "train", batch_size=1)
    assert generator[0][0].shape == (1, 16, 16, 8, 3)
    prepare_dataset(toy_set, tmp_path / "prepared", scaling="zscore", **options)
    with pytest.raises(ValueError, match="changed since.*01_prepare"):
        generator[0]
    # The split lists what it was made from: it has to be made again, too.
    with pytest.raises(ValueError, match="changed since.*01_prepare"):
        BratsGenerator(tmp_path / "split" / "train").verify()
    split_dataset(tmp_path / "prepared", tmp_path / "split")
    BratsGenerator(tmp_path / "split" / "train").verify()


def test_a_fold_is_a_split(toy_set, tmp_path):
    options = {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(toy_set, tmp_path / "prepared", **options)
    folds = split_folds(tmp_path / "prepared", tmp_path / "folds", folds=2)
    for number, ids in enumerate(folds):
        for side in ("train", "val"):
            data = BratsGenerator(tmp_path / "folds" / f"fold{number}" / side)
            assert data.case_ids == ids[side] == list(data.rows)
            assert data.settings["crop_shape"] == [16, 16, 8]
            data.verify()


def test_a_folder_above_or_below_a_side_is_refused(toy_set, tmp_path):
    options = {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(toy_set, tmp_path / "prepared", **options)
    split_folds(tmp_path / "prepared", tmp_path / "folds", folds=2)
    for folder in ("fold2/train", "fold0", "fold0/train/images"):
        with pytest.raises(FileNotFoundError, match="01_prepare"):
            BratsGenerator(tmp_path / "folds" / folder)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.astype(np.int16),
        lambda mask: mask.astype(bool),
        lambda mask: np.where(mask == 3, 4, mask).astype(np.uint8),
        lambda mask: mask[..., None],
    ],
)
def test_J3_masks_of_another_type_or_label_are_refused(split, change, cache):
    path = split / "masks" / "case_002.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(ValueError, match="case_002.*labels 0 to 3.*01_prepare"):
        list(BratsGenerator(split, cache=cache, patch_shape=(8, 8, 8)))


@pytest.mark.parametrize("name", ["workers", "max_queue_size"])
def test_J4_how_many_threads_is_a_whole_number(split, name):
    for value in ("2", 1.5, -1, None, True):
        with pytest.raises(ValueError, match=f"{name} is .* expected a whole number"):
            BratsGenerator(split, **{name: value})


def test_two_workers_by_default_so_that_tf_data_does_not_tune_itself(split):
    """With one, the end of each epoch waits for that, up to 20 s on two cores."""
    assert BratsGenerator(split).workers == 2
    assert BratsGenerator(split, workers=1).workers == 1


@pytest.mark.parametrize("factor", [0.5, 3])
def test_J4_labels_that_an_augmentation_makes_up_are_refused(split, factor):
    def change(image, labels, rng):
        return image, labels * factor

    data = BratsGenerator(split, patch_shape=(8, 8, 8), tumour_share=1, augment=change)
    with pytest.raises(ValueError, match="labels that augment returns is .* 0 to 3"):
        data[0]


@pytest.mark.parametrize("cache", [False, True])
def test_an_augmentation_may_change_what_it_gets(split, cache):
    def change(image, labels, rng):
        image *= 2
        labels[:] = 0
        return image, labels

    data = BratsGenerator(split, patch_shape=(8, 8, 8), augment=change, cache=cache)
    (first, _), (again, labels) = data[0], data[0]
    np.testing.assert_array_equal(first, again)
    assert not labels.any()

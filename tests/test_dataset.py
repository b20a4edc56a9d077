import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import prepared_toys, write_case

from brats_utils.cases import BratsDataError
from brats_utils.dataset import split_dataset, split_folds, verify_dataset
from brats_utils.files import read_json
from brats_utils.generator import BratsGenerator


def test_the_split_parts_cases_and_keeps_pairs(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    ids = split_dataset(out, tmp_path / "split", seed=1)
    assert len(ids["train"]) == 3 and len(ids["val"]) == 1
    assert not set(ids["train"]) & set(ids["val"])
    for side, expected in ids.items():
        folder = tmp_path / "split" / side
        for kind in ("images", "masks"):
            files = sorted((folder / kind).iterdir())
            assert [path.stem for path in files] == expected
            assert np.load(files[0]).shape[:3] == (16, 16, 8)
        assert pd.read_csv(folder / "cases.csv")["case"].tolist() == expected
        assert read_json(folder / "settings.json")["scaling"] == "minmax"


def test_D01_a_new_split_replaces_the_old_one_whole(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    for seed in range(20):
        split_dataset(out, tmp_path / "split", seed=seed)
        sides = [
            {p.stem for p in (tmp_path / "split" / side / "masks").iterdir()}
            for side in ("train", "val")
        ]
        assert len(sides[0] | sides[1]) == 4 and not sides[0] & sides[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prepared", "raw", "split"]


@pytest.mark.slow
def test_D01_a_thousand_splits_into_one_place_leak_nothing(toy_set, tmp_path):
    prepared, report = prepared_toys(toy_set, tmp_path, min_labelled=0)
    everyone = set(report.query("kept")["case"])
    for seed in range(1000):
        ratio = (0.75, 0.25) if seed % 2 else (0.5, 0.5)
        split_dataset(prepared, tmp_path / "split", ratio=ratio, seed=seed)
        on_disk = [
            {path.stem for path in (tmp_path / "split" / side / kind).iterdir()}
            for side in ("train", "val")
            for kind in ("images", "masks")
        ]
        assert on_disk[0] == on_disk[1] and on_disk[2] == on_disk[3], seed
        assert not on_disk[0] & on_disk[2] and on_disk[0] | on_disk[2] == everyone, seed


def test_a_split_without_links_copies(toy_set, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    out, _ = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    ids = split_dataset(out, tmp_path / "split")
    path = tmp_path / "split" / "val" / "images" / f"{ids['val'][0]}.npy"
    assert not path.is_symlink() and np.load(path).shape == (16, 16, 8, 3)


def test_C10_D03_a_split_needs_two_cases_and_whole_pairs(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    next((out / "masks").iterdir()).unlink()
    with pytest.raises(BratsDataError, match="image without mask"):
        split_dataset(out, tmp_path / "split")
    out, _ = prepared_toys(toy_set, tmp_path, min_labelled=0.9)
    with pytest.raises(BratsDataError, match="0 kept cases of 0 patients"):
        split_dataset(out, tmp_path / "split")


def test_C08_a_flipped_bit_in_a_volume_is_found(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    rng = np.random.default_rng(8)
    paths = sorted(out.rglob("*.npy"))
    for _ in range(200):
        path = paths[rng.integers(len(paths))]
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert verify_dataset(out)["file"].tolist() == [str(path)]
        path.write_bytes(data)


def test_D02_two_scans_of_one_patient_stay_on_one_side(tmp_path):
    raw = tmp_path / "raw"
    for number in range(8):  # two visits a patient, as BraTS 2018 names them
        name = f"Brats18_TCIA01_{number // 2}_{number % 2}"
        write_case(raw, name, seed=number)
    for number in range(8, 12):  # and as name_mapping.csv does
        write_case(raw, f"BraTS20_Training_{number:03}", seed=number)
    write_case(raw, "copy", seed=11)  # the same voxels under another name
    lines = ["Grade,TCGA_TCIA_subject_ID,BraTS_2020_subject_ID"]
    lines += [f"HGG,TCGA-{n // 2},BraTS20_Training_{n:03}" for n in range(8, 12)]
    (raw / "name_mapping.csv").write_text("\n".join(lines))
    out, _ = prepared_toys(raw, tmp_path)
    patients = [f"Brats18_TCIA01_{n}" for n in range(4)]
    pairs = [(f"{p}_0", f"{p}_1") for p in patients]
    pairs += [
        (f"BraTS20_Training_{n:03}", f"BraTS20_Training_{n + 1:03}") for n in (8, 10)
    ]
    pairs += [("copy", "BraTS20_Training_011")]
    for seed in range(100):
        ids = split_dataset(out, tmp_path / "split", ratio=(0.6, 0.4), seed=seed)
        assert len(ids["train"]) + len(ids["val"]) == 13
        for one, other in pairs:
            assert (one in ids["val"]) == (other in ids["val"])


def test_D02_links_between_scans_are_followed_through_ids_and_voxels(tmp_path):
    raw = tmp_path / "raw"
    # a and b hold the same voxels, b and c are of one patient, c and d the same voxels.
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 2), ("e", 3), ("f", 4)):
        write_case(raw, name, seed=seed)
    lines = ["TCGA_TCIA_subject_ID,BraTS_2020_subject_ID", "P,b", "P,c"]
    (raw / "name_mapping.csv").write_text("\n".join(lines))
    out, _ = prepared_toys(raw, tmp_path)
    for seed in range(30):
        ids = split_dataset(out, tmp_path / "split", ratio=(0.5, 0.5), seed=seed)
        sides = {case: side for side in ids for case in ids[side]}
        assert len({sides[case] for case in "abcd"}) == 1 and len(sides) == 6


def test_D02_each_case_is_validated_in_one_fold_with_its_patient(tmp_path):
    raw = tmp_path / "raw"
    for number in range(8):
        write_case(raw, f"Brats18_TCIA01_{number // 2}_{number % 2}", seed=number)
    out, _ = prepared_toys(raw, tmp_path)
    for seed, n in ((0, 3), (1, 3), (2, 2)):  # the last leaves no fold2 behind
        folds = split_folds(out, tmp_path / "folds", folds=n, seed=seed)
        assert len({tuple(fold["val"]) for fold in folds}) == n
        held_out = [case_id for fold in folds for case_id in fold["val"]]
        assert len(held_out) == len(set(held_out)) == 8
        for number, fold in enumerate(folds):
            patients = [{i[:-2] for i in fold[side]} for side in ("train", "val")]
            assert patients[0] and patients[1] and not patients[0] & patients[1]
            for side, ids in fold.items():
                folder = tmp_path / "folds" / f"fold{number}" / side
                assert BratsGenerator(folder).case_ids == ids
                assert np.load(folder / "masks" / f"{ids[0]}.npy").any()
        assert len(list((tmp_path / "folds").iterdir())) == n
    with pytest.raises(BratsDataError, match="8 kept cases of 4 .* into 5 folds"):
        split_folds(out, tmp_path / "folds", folds=5)
    assert len(list((tmp_path / "folds").iterdir())) == 2


def test_a_case_taken_out_of_the_set_leaves_no_marker(toy_set, tmp_path):
    prepared_toys(toy_set, tmp_path)
    shutil.rmtree(next(toy_set.rglob("BraTS20_Training_002")))
    out, report = prepared_toys(toy_set, tmp_path)
    assert len(report) == 4 and verify_dataset(out).empty

"""Splits: by patient, paired, and replaced whole."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import prepared_toys, tree, write_case

from brats_utils.cases import BratsDataError, Case
from brats_utils.files import OutputFolder, find_changed, read_manifest
from brats_utils.generator import BratsGenerator
from brats_utils.split import find_patients, split_dataset, split_folds


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
    manifest = read_manifest(tmp_path / "split")
    assert sorted(manifest["cases"]) == sorted(ids["train"] + ids["val"])
    assert manifest["made_from"]["settings"]["scaling"] == "minmax"
    assert manifest["made_from"]["seed"] == 1


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prepared", "raw", "split"]


def test_a_split_without_links_copies(toy_set, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    out, _ = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    ids = split_dataset(out, tmp_path / "split")
    path = tmp_path / "split" / "val" / "images" / f"{ids['val'][0]}.npy"
    assert not path.is_symlink() and np.load(path).shape == (16, 16, 8, 3)
    assert not find_changed(
        tmp_path / "split", read_manifest(tmp_path / "split")["files"]
    )


def test_C10_D03_a_split_needs_two_cases_and_whole_pairs(toy_set, tmp_path):
    out, _ = prepared_toys(toy_set, tmp_path)
    next((out / "masks").iterdir()).unlink()
    with pytest.raises(BratsDataError, match="image without mask"):
        split_dataset(out, tmp_path / "split")
    out, _ = prepared_toys(toy_set, tmp_path, min_labelled=0.9)
    with pytest.raises(BratsDataError, match="0 kept cases of 0 patients"):
        split_dataset(out, tmp_path / "split")


def test_D02_ids_that_count_visits_name_the_patient(tmp_path):
    patients = {
        "Brats18_TCIA01_2_1": "Brats18_TCIA01_2",
        "BraTS19_CBICA_AAB_1": "BraTS19_CBICA_AAB_1",
        "BraTS-GLI-00012-001": "BraTS-GLI-00012",
        "BraTS20_Training_001": "BraTS20_Training_001",
        "BRATS_001": "BRATS_001",
    }
    assert (
        find_patients([Case(case_id, {}) for case_id in patients], tmp_path) == patients
    )


def test_D02_R3_a_mapping_is_read_whatever_program_saved_it(tmp_path):
    cases = [Case(case_id, {}) for case_id in ("NA", "007", "b")]
    text = "TCGA_TCIA_subject_ID;BraTS_2020_subject_ID\nP;NA\nP;007\nNA;b\n"
    (tmp_path / "deep").mkdir()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / "deep" / "name_mapping.csv"
        path.write_bytes(text.encode(encoding))
        patients = find_patients(cases, tmp_path)
        assert patients == {"NA": "P", "007": "P", "b": "b"}


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
        assert len(list((tmp_path / "folds").glob("fold*"))) == n
    with pytest.raises(BratsDataError, match="8 kept cases of 4 .* into 5 folds"):
        split_folds(out, tmp_path / "folds", folds=5)
    assert len(list((tmp_path / "folds").glob("fold*"))) == 2


def test_H1_a_split_never_replaces_what_it_reads(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    before = tree(tmp_path)
    for out in (prepared, prepared / "split", tmp_path, prepared / "images"):
        for split in (split_dataset, split_folds):
            with pytest.raises(ValueError, match="choose another"):
                split(prepared, out, **({"folds": 2} if split is split_folds else {}))
    (tmp_path / "link").symlink_to(prepared, target_is_directory=True)
    with pytest.raises(ValueError, match="choose another"):
        split_dataset(tmp_path / "link", prepared)
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


def test_H1_a_folder_of_others_or_of_another_kind_is_refused(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    (tmp_path / "mine" / "train" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "images" / "x.npy").write_bytes(b"mine")
    split_folds(prepared, tmp_path / "folds", folds=2)
    before = tree(tmp_path)
    for out in ("mine", "folds"):
        with pytest.raises(ValueError, match="choose another"):
            split_dataset(prepared, tmp_path / out)
    assert tree(tmp_path) == before


def test_H1_a_file_of_the_user_stays_in_a_split(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    for split, name in ((split_dataset, "train"), (split_folds, "fold0/train")):
        out = tmp_path / split.__name__
        options = {"folds": 2} if split is split_folds else {}
        split(prepared, out, seed=1, **options)
        (out / "notes.txt").write_text("mine")
        (out / name / "images" / "mine.npy").write_bytes(b"mine")
        split(prepared, out, seed=2, **options)
        assert (out / "notes.txt").read_text() == "mine"
        assert (out / name / "images" / "mine.npy").read_bytes() == b"mine"
        assert not find_changed(out, read_manifest(out)["files"])


def test_H1_a_lock_file_of_the_user_is_not_deleted(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    (tmp_path / ".split.lock").write_text("mine")
    with contextlib.suppress(ValueError):
        split_dataset(prepared, tmp_path / "split")
    assert (tmp_path / ".split.lock").read_text() == "mine"


@pytest.mark.parametrize("kind", ["resplit", "resplit-no-exchange"])
def test_H3_a_split_is_replaced_in_one_step(toy_set, tmp_path, kind):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    script = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, script, kind, prepared, tmp_path / "work"]
    (tmp_path / "work").mkdir()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 70  # file operations, each of them a point to die at


def test_H4_a_second_split_is_refused(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    with OutputFolder(tmp_path / "split", "split", beside=True):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            split_dataset(prepared, tmp_path / "split")
    split_dataset(prepared, tmp_path / "split")


@pytest.mark.parametrize(
    "ratio", [(1.5, -0.5), (0.9, 0.2), (1, 0), (0.8,), (0.5, 0.25, 0.25), "half", None]
)
def test_H2_J4_a_wrong_ratio_changes_nothing(toy_set, tmp_path, ratio):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    split_dataset(prepared, tmp_path / "split")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="ratio"):
        split_dataset(prepared, tmp_path / "split", ratio=ratio)
    for folds in (1, 0, 2.5, "two"):
        with pytest.raises(ValueError, match="folds"):
            split_folds(prepared, tmp_path / "folds", folds=folds)
    assert tree(tmp_path) == before


def test_J4_numbers_of_numpy_are_taken_and_other_seeds_refused(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    ids = split_dataset(prepared, tmp_path / "split", seed=3)
    folds = split_folds(prepared, tmp_path / "folds", folds=2, seed=3)
    three, two = np.int64(3), np.int64(2)
    assert split_dataset(prepared, tmp_path / "split", seed=three) == ids
    assert split_folds(prepared, tmp_path / "folds", folds=two, seed=three) == folds
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="seed"):
        split_dataset(prepared, tmp_path / "split", seed=[3])
    with pytest.raises(ValueError, match="seed"):
        split_folds(prepared, tmp_path / "folds", folds=2, seed=[3])
    assert tree(tmp_path) == before

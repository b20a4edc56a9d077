"""Splits: by patient, paired, and replaced whole."""

import contextlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import prepared_toys, tree, write_case

from brats_utils.cases import BratsDataError, Case, find_cases
from brats_utils.files import OutputFolder, find_changed, read_manifest
from brats_utils.generator import BratsGenerator
from brats_utils.prepare import prepare_dataset
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
        "BraTS19_CBICA_AAB_1": "BraTS19_CBICA_AAB",
        "UPENN-GBM-00001_11": "UPENN-GBM-00001",
        "UCSF-PDGM-0431_FU001d": "UCSF-PDGM-0431",
        "TCGA-02-0003_1997.06.08": "TCGA-02-0003",
        "BraTS-SSA-00002-000": "BraTS-SSA-00002",
        "BraTS-GLI-00012-001": "BraTS-GLI-00012",
        "BraTS20_Training_001": "BraTS20_Training_001",
        "BRATS_001": "BRATS_001",
    }
    cases = [Case(case_id, {}) for case_id in patients]
    assert find_patients(cases, tmp_path) == (patients, [])


def test_D02_R3_a_mapping_is_read_whatever_program_saved_it(tmp_path):
    cases = [Case(case_id, {}) for case_id in ("NA", "007", "b")]
    text = "TCGA_TCIA_subject_ID;BraTS_2020_subject_ID\nP;NA\nP;007\nNA;b\n"
    (tmp_path / "deep").mkdir()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / "deep" / "name_mapping.csv"
        path.write_bytes(text.encode(encoding))
        patients, notes = find_patients(cases, tmp_path)
        told = "3 of 3 ids matched, 1 patients with several scans"
        assert notes == [f"name_mapping.csv: {told}"]
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


@pytest.mark.parametrize("scaling", ["minmax", "zscore"])
def test_I2_equal_images_are_known_whatever_was_cropped(tmp_path, scaling):
    for name, seed, corner in (("a", 1, 3), ("b", 1, 9), ("c", 2, 3), ("d", 3, 3)):
        segmentation = np.zeros((24, 24, 16), np.uint8)
        segmentation[corner : corner + 4, 8:12, 5:9] = 4  # another crop for each
        write_case(tmp_path / "raw", name, seed=seed, segmentation=segmentation)
    out, _ = prepared_toys(tmp_path / "raw", tmp_path, scaling=scaling, min_labelled=0)
    sides = []
    for seed in range(20):
        ids = split_dataset(out, tmp_path / "split", seed=seed, ratio=(0.5, 0.5))
        sides.append({i: side for side in ids for i in ids[side]})
        assert sides[-1]["a"] == sides[-1]["b"]
    assert {s["c"] == s["d"] for s in sides} == {True, False}


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


def save_mapping(path, rows, *, separator=",", encoding="utf-8"):
    """Write a name mapping as some program would, its ids with blanks and capitals."""
    header = [
        "Grade",
        "BraTS_2018_subject_ID ",
        "TCGA_TCIA_subject_ID",
        "BraTS 2020 ID",
    ]
    lines = [separator.join(cells) for cells in (header, *rows)]
    path.write_bytes("\r\n".join(lines).encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_I2_a_mapping_is_understood_however_it_was_saved(tmp_path, separator, encoding):
    cases = [Case(f"BraTS20_Training_00{n}", {}) for n in range(1, 7)]
    rows = [
        ("HGG", "NA", "TCGA-02-0001", " brats20_training_001 "),
        ("HGG", "Brats18_CBICA_AAB_1", "NA", "BraTS20_Training_002"),
        ("HGG", "NA", "tcga-02-0001 ", "BRATS20_TRAINING_003"),
        ("LGG", "Brats18_CBICA_AAB_2", "", "BraTS20_Training_004"),
        ("LGG", "", "Universität", "BraTS20_Training_005"),
        ("HGG", "Brats18_2013_0_1", "N/A", "BraTS20_Training_009"),
    ]
    options = {"separator": separator, "encoding": encoding}
    save_mapping(tmp_path / "Name_Mapping.csv", rows, **options)
    patients, (note,) = find_patients(cases, tmp_path)
    groups = {}
    for case_id, patient in patients.items():
        groups.setdefault(patient, set()).add(int(case_id[-1]))
    assert sorted(map(sorted, groups.values())) == [[1, 3], [2, 4], [5], [6]]
    assert note.startswith("Name_Mapping.csv: 5 of 6 ids matched, 2 patients with")


@pytest.mark.parametrize("place", ["raw", "raw/deep", ".", "elsewhere", "linked"])
def test_I2_a_mapping_is_found_up_one_level_and_behind_links(tmp_path, place):
    raw, elsewhere = tmp_path / "raw", tmp_path / "far" / "set"
    (raw / "deep").mkdir(parents=True)
    for number in (1, 2):  # two folders of cases that lie elsewhere
        case_id = f"BraTS20_Training_00{number}"
        write_case(elsewhere / "HGG", case_id, seed=number)
        (raw / case_id).symlink_to(elsewhere / "HGG" / case_id)
    folder = elsewhere if place == "elsewhere" else tmp_path / place
    if place == "linked":
        (elsewhere / "tables").mkdir()
        (raw / "tables").symlink_to(elsewhere / "tables")
        folder = elsewhere / "tables"
    rows = [("HGG", "NA", "P", f"BraTS20_Training_00{number}") for number in (1, 2)]
    save_mapping(folder / "name_mapping.csv", rows)
    for given in (raw, find_cases(raw), find_cases(raw)[:1]):
        report = prepare_dataset(given, tmp_path / "out", min_labelled=0)
        if given is raw or place in ("elsewhere", "raw", "."):
            assert set(report["patient"]) == {"P"}
            assert "ids matched" in report.attrs["patients"][0]


def test_I2_a_mapping_of_nothing_stops_before_work_starts(toy_set, tmp_path):
    before = tree(tmp_path)
    path = toy_set / "name_mapping.csv"
    for content, told in (
        (b"Grade,BraTS_2020_subject_ID\nHGG,BraTS20_Training_077\n", "has none of"),
        (b"PK\3\4\0\0 an Excel file", "not a text table.*save it as csv"),
        (b"", "not a text table"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"name_mapping.csv.*{told}"):
            prepare_dataset(toy_set, tmp_path / "out")
        path.unlink()
        assert tree(tmp_path) == before


def linked_set(root, rng):
    """Write 14 toy cases with links of every sort; return the groups of ids."""
    raw, far = root / "raw", root / "far"
    far.mkdir(parents=True)
    pairs = rng.permutation(14).reshape(7, 2)  # which cases are linked, and how below
    ids = [f"BraTS20_Training_{n:03}" for n in range(14)]
    seeds = list(range(14))
    for n, case in enumerate(pairs[0]):
        ids[case] = f"Brats18_TCIA01_{pairs[0, 0]}_{n + 1}"
    for n, case in enumerate(pairs[1]):
        ids[case] = f"BraTS-GLI-0000{rng.integers(1, 9) if not n else 0}-00{n}"
    ids[pairs[1, 1]] = ids[pairs[1, 0]][:-1] + "1"
    seeds[pairs[2, 0]] = seeds[pairs[2, 1]]  # the same scan under another name
    rows = [("HGG", "NA", "TCGA-1", ids[case]) for case in pairs[3]]
    rows += [("HGG", f"Brats18_CBICA_A_{case}", "NA", ids[case]) for case in pairs[4]]
    seeds[pairs[4, 0]] = seeds[pairs[3, 0]]  # a chain of three links
    for number, case_id in enumerate(ids):
        labelled = np.array([0, 1, 2, 4])[rng.integers(0, 4, (24, 24, 16))]
        options = {"seed": seeds[number], "segmentation": labelled.astype(np.uint8)}
        if rng.random() < 0.5:
            write_case(raw, case_id, **options)
        else:
            raw.mkdir(exist_ok=True)
            (raw / case_id).symlink_to(write_case(far, case_id, **options))
    save_mapping(rng.choice([raw, root, far]) / "mapping.csv", rows, separator=";")
    groups = [set(pair) for pair in pairs[:3]] + [{*pairs[3], *pairs[4]}]
    groups[2:] = [groups[2], groups[3]]
    return [{ids[case] for case in group} for group in groups]


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_I2_a_thousand_splits_of_linked_scans_leak_nothing(tmp_path, n):
    for number in range(5):
        rng = np.random.default_rng(number)
        groups = linked_set(tmp_path / str(number), rng)
        out = tmp_path / str(number) / "out"
        options = {"min_labelled": 0, "crop_shape": (16, 16, 8), "labels": "0124"}
        prepare_dataset(tmp_path / str(number) / "raw", out, **options)
        for seed in range(n):
            ratio = (0.5, 0.5) if seed % 2 else (0.7, 0.3)
            split = tmp_path / str(number) / "split"
            ids = split_dataset(out, split, seed=seed, ratio=ratio)
            assert sum(map(len, ids.values())) == 14
            for group in groups:
                assert {*ids["train"]} >= group or not {*ids["train"]} & group, seed


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


def test_I2_visits_by_week_date_and_folder_stay_together(tmp_path):
    named = {
        "Patient-001_week-000": "Patient-001_week-044",
        "UCSD-PTGBM-0002_01": "UCSD-PTGBM-0002_02",
        "PatientID_0003_Timepoint_1": "PatientID_0003_Timepoint_5",
        "P001_20190301": "P001_20190701",
        "lee_2019-03-01": "lee_2020-03-01",
        "xy-ses-1": "xy-ses-2",
    }
    for number, pair in enumerate(named.items()):
        for k, name in enumerate(pair):
            write_case(tmp_path / "named", name, seed=2 * number + k)
    cases = find_cases(tmp_path / "named", labels="0124")
    patients, _ = find_patients(cases, tmp_path / "named")
    assert all(patients[first] == patients[other] for first, other in named.items())
    assert len({*patients.values()}) == len(named)


def test_I2_a_date_as_id_is_of_the_patient_whose_folder_holds_it(tmp_path):
    dates = {"20190301": "P1", "20190701": "P1", "20180101": "P2", "20180501": "P2"}
    for number, (date, patient) in enumerate(dates.items()):
        folder = write_case(tmp_path / patient, date, seed=number)
        for path in folder.iterdir():
            path.rename(folder / path.name.removeprefix(f"{date}_"))
    cases = find_cases(tmp_path, labels="0124")
    expected = {f"{patient}_{date}": patient for date, patient in dates.items()}
    assert find_patients(cases, tmp_path)[0] == expected


def test_I2_visits_of_one_name_in_the_folders_of_patients(tmp_path):
    for number, name in enumerate(["P1/visit1", "P1/visit2", "P2/visit1", "P2/visit2"]):
        folder = write_case(tmp_path / name, "x", seed=number)
        for path in folder.iterdir():
            path.rename(folder.parent / path.name.removeprefix("x_"))
    found, _ = find_patients(find_cases(tmp_path, labels="0124"), tmp_path)
    both = ("P1", "P2")
    names = [
        "deep/week-000-1",
        "deep/week-000-2",
        "Q/ses-01/20190301",
        "R/ses-01/20190301",
        "Q/ses-02/20200301",
        "S/week_1",
    ]
    for number, name in enumerate(names):
        folder = write_case(tmp_path / "others" / name, "x", seed=9 + number)
        for path in folder.iterdir():
            path.rename(folder.parent / path.name.removeprefix("x_"))
    cases = find_cases(tmp_path / "others", labels="0124")
    patients, _ = find_patients(cases, tmp_path / "others")
    assert patients == {
        "Q_ses-01_20190301": "Q",
        "Q_ses-02_20200301": "Q",
        "R_ses-01_20190301": "R",
        "S_week_1": "S",
        "deep_week-000-1": "deep",
        "deep_week-000-2": "deep",
    }
    assert found == {f"{p}_visit{n}": p for p in both for n in (1, 2)}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["patient_id,case_id", "A,H0", ",H1", "B,H2"], "empty for H1.*merged"),
        (["Patient;case_id", "A;H0", "B;H1", ";H2"], "Patient empty for H2"),
        (["case_id,person,person", "H0,A,1", "H1,A,2", "H2,B,3"], "two columns named"),
        (["case_id,id,note,id", "H0,A,,1", "H1,A,,2"], "two columns named id"),
    ],
)
def test_I2_tables_that_leave_a_patient_open_are_refused(tmp_path, rows, problem):
    for number in range(3):
        write_case(tmp_path, f"H{number}", seed=number)
    (tmp_path / "name_mapping.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=problem):
        find_patients(find_cases(tmp_path, labels="0124"), tmp_path)


def test_I2_gaps_and_columns_that_say_nothing_of_our_patients(tmp_path):
    for number in range(3):
        write_case(tmp_path, f"H{number}", seed=number)
    rows = ["case_id,patient,Patient sex,Patient age,note,note"]
    rows += ["H0,A,M,5,,x", "H1,A,F,,,y", "H2,B,M,5,,x", "Z9,,M,,,", ",,,,,end"]
    (tmp_path / "name_mapping.csv").write_text("\n".join(rows))
    patients, _ = find_patients(find_cases(tmp_path, labels="0124"), tmp_path)
    assert patients["H0"] == patients["H1"] != patients["H2"]


def test_R1_shares_and_seeds_of_other_kinds(toy_set, tmp_path):
    prepared, _ = prepared_toys(toy_set, tmp_path)
    ids = split_dataset(prepared, tmp_path / "split", ratio=(0.5, 0.5))
    shares = np.float32([0.5, 0.5])
    assert split_dataset(prepared, tmp_path / "split", ratio=shares) == ids
    with pytest.raises(ValueError, match="seed is 8589934592, expected .* 2..32 - 1"):
        split_folds(prepared, tmp_path / "folds", folds=2, seed=2**33)


@pytest.mark.parametrize(
    "column", ["MRN", "hospital_patient_id", "person", "ID", "1.0"]
)
def test_I2_columns_of_patients_by_other_names(tmp_path, column):
    for number in range(4):
        write_case(tmp_path, f"H{number}", seed=number)
    cases = find_cases(tmp_path, labels="0124")
    rows = ["H0,1.0,wt", "H1,1,wt", "H2,2.0,wt", "H3,2,wt"]
    header = f"case_id,{'patient_id' if column == '1.0' else column},IDH"
    (tmp_path / "name_mapping.csv").write_text("\n".join([header, *rows]))
    patients, _ = find_patients(cases, tmp_path)
    assert patients["H0"] == patients["H1"] != patients["H2"] == patients["H3"]


@pytest.mark.parametrize(
    "column",
    ["IDH", "Side", "Residual_tumour", "site_id", "scan_id", "annotator_id", "fold_id"]
    + ["split_id", "operator_id", "vendor_id", "batch_id", "task_id", "treatment_id"]
    + ["reviewer_id", "observer_id", "expert_id"],
)
def test_I2_columns_that_are_not_of_patients_unite_nobody(tmp_path, column):
    for number in range(3):
        write_case(tmp_path, f"H{number}", seed=number)
    rows = [f"case_id,{column}", "H0,1", "H1,1", "H2,1"]
    (tmp_path / "name_mapping.csv").write_text("\n".join(rows))
    patients, _ = find_patients(find_cases(tmp_path, labels="0124"), tmp_path)
    assert len({*patients.values()}) == 3


def patients_of(folder, ids, header, *rows):
    """Return the groups that a mapping table makes of cases."""
    (folder / "mapping.csv").write_text("\n".join((header, *rows)), encoding="cp1252")
    patients, _ = find_patients([Case(i, {}) for i in ids], folder)
    return len({*patients.values()})


IDS = [f"BraTS20_Training_{n:03}" for n in range(4)]


@pytest.mark.parametrize(
    "header, rows, told",
    [
        (
            "Name mapping of BraTS,",
            ["BraTS_2020_subject_ID,TCGA_ID", "{0},T-0"],
            "a title",
        ),
        ("BraTS_2020_subject_ID,TCGA_ID", ["0,{0},T-0", "1,{1},T-0"], "more cells"),
    ],
)
def test_I2_a_table_that_is_misread_is_an_error(tmp_path, header, rows, told):
    rows = [row.format(*IDS) for row in rows]
    with pytest.raises(ValueError, match=rf"mapping.csv.*{told}"):
        patients_of(tmp_path, IDS, header, *rows)


@pytest.mark.parametrize("header", ["case_id,PID", "case_id;Pat.-Nr.", "IDs of scans"])
def test_I2_a_table_without_a_known_column_of_patients_is_said(tmp_path, header):
    separator = "".join(c for c in header if c in ",;")
    rows = [f"{i}{separator}" for i in IDS]
    with pytest.warns(UserWarning, match="no column of patients.*patient_id"):
        assert patients_of(tmp_path, IDS, header, *rows) == 4


def test_I2_a_line_ends_only_where_a_line_ends(tmp_path):
    rows = [f"{i},resected… twice,T-{n // 2}" for n, i in enumerate(IDS)]
    header = "BraTS_2020_subject_ID,Note,TCGA_TCIA_subject_ID"
    assert patients_of(tmp_path, IDS, header, *rows) == 2


@pytest.mark.parametrize(
    "header", ["BraTS2021,BraTS2020,Site No (1 to 23)", "scan,patient,Site No"]
)
def test_I2_the_column_of_the_ids_is_found_by_its_ids(tmp_path, header):
    ids = [f"BraTS2021_{n:05}" for n in range(4)]
    rows = [f"{i},{IDS[n // 2]},1" for n, i in enumerate(ids)]
    assert patients_of(tmp_path, ids, header, *rows) == 2


@pytest.mark.parametrize(
    "column, values",
    [
        *((name, "aaaa") for name in ("session_id", "Device ID", "Cohort Name")),
        *((name, "aabb") for name in ("Patient diagnosis", "Subject group", "visit")),
        *(("subject_id", [text] * 4) for text in ("#N/A", "NULL", "unknown", "?")),
        ("subject_no", "2340"),  # other numbers than the patient's
        ("WHO grade", "1111"),
        *((name, "aaaa") for name in ("Doctor name", "Tissue source name")),
    ],
)
def test_I2_what_names_no_patient_unites_nobody(tmp_path, column, values):
    rows = [f"{i},{n + 1},{values[n]}" for n, i in enumerate(IDS)]
    assert patients_of(tmp_path, IDS, f"case_id,patient_id,{column}", *rows) == 4


def test_I2_numbers_that_a_spreadsheet_shortened_are_ids(tmp_path):
    rows = [f"{n},P{n // 2}" for n in range(1, 5)]
    ids = [f"{n:03}" for n in range(1, 5)]
    assert patients_of(tmp_path, ids, "id,patient", *rows) == 3


@pytest.mark.parametrize(
    "first, second, patients",
    [
        ("W39_1998.09.19", "W39_1999.01.02", 1),
        ("lee_2019_03_01", "lee_2020_03_01", 1),
        ("P1_01-31-2004-NA-MR", "P1_02-01-2005-NA-MR", 1),
        ("P1_pre", "P1_post", 1),
        ("P1_baseline", "P1_follow-up2", 1),
        ("train_UPENN-GBM-00001_11", "train_UPENN-GBM-00001_21", 1),
        ("BraTS_GLI_02000_100", "BraTS_GLI_02000_101", 1),
        ("sub-GBM-01", "sub-GBM-02", 2),
        ("sub-GBM-01_ses-1", "sub-GBM-01_ses-2", 1),
        ("P1_preop", "P1_postop", 1),
        ("P1_pre-op", "P1_post-op", 1),
        ("P1_ses-preop", "P1_ses-postop", 1),
        ("P1_FU1", "P1_FU2", 1),
        ("P1_month3", "P1_month6", 1),
        ("P1_day0", "P1_day30", 1),
        ("RHUH-0001_0", "RHUH-0001_1", 1),
        ("FU_001", "FU_002", 2),  # a hospital's
        ("scan_scan1", "scan_scan2", 2),
        ("P_v1", "P_v2", 2),
    ],
)
def test_I2_more_names_of_visits(tmp_path, first, second, patients):
    found, _ = find_patients([Case(first, {}), Case(second, {})], tmp_path)
    assert len({*found.values()}) == patients


def test_R4_a_folder_named_like_a_mapping_is_none(tmp_path):
    (tmp_path / "name_mapping.csv").mkdir()
    assert find_patients([Case("a", {})], tmp_path) == ({"a": "a"}, [])


@pytest.mark.parametrize(
    "header",
    [
        *("Subject", "PatientName", "Patient ID (anonymised)", "TCGA_TCIA_subject_ID"),
        *("bcr_patient_barcode", "Patient UUID", "Subject Label", "PatientID_2021"),
        *("BraTS_2019_subject_ID", "patient_ref", "MRN", "Local ID", "BraTS2021"),
    ],
)
def test_I2_columns_of_patients_have_many_names(tmp_path, header):
    rows = [f"{i},T{n // 2}" for n, i in enumerate(IDS)]
    assert patients_of(tmp_path, IDS, f"case_id,{header}", *rows) == 2


@pytest.mark.parametrize(
    "ids, header, rows, patients",
    [
        (
            "1234",
            "case,patient,grade",
            [f"{n},P{n // 2},{3 + n % 2}" for n in range(12)],
            3,
        ),
        (["000", "001"], "id,patient,comment", ["0,A,", "1,A,", "2,B,", "3,B,"], 1),
        (["001", "002", "003", "004"], "first_id,second_id", ["001,002", "003,004"], 2),
        (["001", "002", "003"], "id,previous_id", ["001,NA", "002,001", "003,002"], 1),
        (["001", "002", "003"], "id,same_patient", ["001,NA", "002,001", "003,NA"], 2),
    ],
)
def test_I2_numbers_that_are_ids(tmp_path, ids, header, rows, patients):
    assert patients_of(tmp_path, ids, header, *rows) == patients


@pytest.mark.parametrize("header", ["patient,scan1,scan2", "who,baseline,followup"])
def test_I2_scans_in_several_columns_are_of_one_patient(tmp_path, header):
    rows = [f"p{n},{IDS[n]},{IDS[n + 2]}" for n in range(2)]
    assert patients_of(tmp_path, IDS, header, *rows) == 2


def test_I2_a_remark_that_is_an_id_unites_only_these_two(tmp_path):
    remarks = ["good", IDS[0], "good", "good"]
    rows = [f"{i},{n},{remarks[n]}" for n, i in enumerate(IDS)]
    assert patients_of(tmp_path, IDS, "case_id,patient_id,remark", *rows) == 3


@pytest.mark.parametrize("cells", ['"5 mm', '"Left side'])
def test_I2_an_open_quote_does_not_swallow_rows(tmp_path, cells):
    rows = [f"{i},P{n // 2},{'' if n else cells}" for n, i in enumerate(IDS)]
    with pytest.raises(ValueError, match="mapping.csv .* quotation mark"):
        patients_of(tmp_path, IDS, "case_id,patient_id,note", *rows)


@pytest.mark.parametrize("n", range(4))
def test_I2_a_comma_too_many_and_a_column_named_more(tmp_path, n):
    rows = [f"{i},P{k // 2}" for k, i in enumerate(IDS)]
    comma = [row + "," * (k == n) for k, row in enumerate(rows)]
    assert patients_of(tmp_path, IDS, "case_id,patient_id", *comma) == 2
    more = [row + ",x" for row in rows]
    assert patients_of(tmp_path, IDS, "case_id,patient_id,more", *more) == 2


def test_R3_quotation_marks_that_close_or_stand_inside_are_text(tmp_path):
    notes = ['6" tall', '"big" lesion', '"a" ', '"a, b"']
    rows = [
        f"{i},P{n // 2},{note}"
        for n, (i, note) in enumerate(zip(IDS, notes, strict=True))
    ]
    assert patients_of(tmp_path, IDS, "case_id,patient_id,note", *rows) == 2
    long = [f"{i},P{n // 2},40,more" for n, i in enumerate(IDS)]
    with pytest.raises(ValueError, match="more cells than the first: .*'more'"):
        patients_of(tmp_path, IDS, "case_id,patient_id,life expectancy", *long)


@pytest.mark.parametrize("ids", [["101", "102", "103", "104"], ["1", "2", "3", "4"]])
@pytest.mark.parametrize("header", ["patient,scan1,scan2", "who,baseline,followup"])
def test_I2_numbered_scans_in_several_columns_are_of_one_patient(tmp_path, header, ids):
    rows = [f"p{n},{ids[n]},{ids[n + 2]}" for n in range(2)]
    assert patients_of(tmp_path, ids, header, *rows) == 2
    # A column of ages holds numbers that are ids, too, but of cases that have a row.
    ids = [str(n) for n in range(40, 46)]
    rows = [f"p{n},{n},{85 - n}" for n in range(40, 46)]
    assert patients_of(tmp_path, ids, "patient,scan,years", *rows) == 6


def test_I2_scans_in_two_columns_of_one_name_are_of_one_patient(tmp_path):
    rows = [f"p{n},{IDS[n]},{IDS[n + 2]}" for n in range(2)]
    assert patients_of(tmp_path, IDS, "patient,scan,scan", *rows) == 2
    with pytest.raises(ValueError, match="unnamed columns hold"):
        patients_of(tmp_path, IDS, "patient,,", *rows)


@pytest.mark.parametrize("header", ["Subject;Scan", "Subject_ID;Scan", "Name;Scan"])
def test_I2_merged_cells_of_the_only_column_of_patients_are_refused(tmp_path, header):
    rows = [f"S0;{IDS[0]}", f";{IDS[1]}", f"S1;{IDS[2]}", f";{IDS[3]}"]
    with pytest.raises(ValueError, match="empty for BraTS20_Training_001 .*merged"):
        patients_of(tmp_path, IDS, header, *rows)


def test_I2_names_are_the_same_in_either_form_of_unicode(tmp_path):
    names = "Müller_A", "Müller_B", "Meier_A", "Meier_B"
    rows = [f"{name},{n // 2}" for n, name in enumerate(names)]
    for form in ("NFC", "NFD"):  # Linux and Windows write NFC, macOS wrote NFD
        raw = tmp_path / form / "raw"
        for n, name in enumerate(names):
            write_case(raw, unicodedata.normalize(form, name), seed=n)
        other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], rows[0])
        table = "\n".join(("case_id,patient_id", other, *rows[1:]))
        (raw / "mapping.csv").write_text(table, encoding="utf-8")
        patients, notes = find_patients(find_cases(raw), raw)
        assert "4 of 4 ids matched, 2 patients" in notes[0]
        assert len({*patients.values()}) == 2


@pytest.mark.parametrize("suffix", ["ods", "xlsm", "xlsb", "numbers", "csv.gz", "xlsx"])
def test_I2_a_table_of_another_program_is_refused(tmp_path, suffix):
    (tmp_path / f"name_mapping.{suffix}").write_bytes(b"PK\3\4\0\0 and so on")
    with pytest.raises(ValueError, match=f"mapping.{suffix} is not .*save it as csv"):
        find_patients([Case(i, {}) for i in IDS], tmp_path)


@pytest.mark.parametrize(
    "patients", [["UPENN-GBM-00001", "UPENN-GBM-00002"], ["BraTS-GLI-00001", "P1"]]
)
def test_I2_a_table_may_list_patients_instead_of_scans(tmp_path, patients):
    ids = [f"{patients[0]}_11", f"{patients[1]}_2021-03-01", f"{patients[1]}_baseline"]
    rows = [f"{name},H1" for name in patients]
    assert patients_of(tmp_path, ids, "ID,hospital_patient", *rows) == 1
    assert patients_of(tmp_path, ids, "ID,note", f"{patients[1]},x") == 2


def test_R3_the_separator_is_the_one_that_each_row_has(tmp_path):
    rows = [f"{i};P{n // 2};12,5" for n, i in enumerate(IDS)]
    header = "case_id;patient_id;size (x, y, z, in mm)"
    assert patients_of(tmp_path, IDS, header, *rows) == 2


@pytest.mark.parametrize("text", ["n.a.", "missing", "N.A", "not known", "to do", "-"])
def test_I2_words_for_nothing_name_no_patient(tmp_path, text):
    rows = [f"{i},{text}" for i in IDS]
    assert patients_of(tmp_path, IDS, "case_id,patient_id", *rows) == 4


def test_H6_an_edited_report_changes_no_split_and_is_said(toy_set, tmp_path):
    prepared, report = prepared_toys(toy_set, tmp_path)
    ids = split_dataset(prepared, tmp_path / "split")
    report.assign(kept=False).to_csv(prepared / "cases.csv", index=False)
    with pytest.warns(UserWarning, match="cases.csv was changed; it is a report"):
        assert split_dataset(prepared, tmp_path / "split") == ids


def test_I2_scans_that_are_all_of_one_patient_are_named(tmp_path):
    for number in range(3):
        folder = write_case(tmp_path / "raw", f"2019030{number + 1}", seed=number)
        for path in folder.iterdir():
            path.rename(folder / path.name.split("_")[1])
    prepare_dataset(tmp_path / "raw", tmp_path / "prepared", min_labelled=0)
    with pytest.raises(
        BratsDataError, match="3 kept.*raw_20190301, .*one patient"
    ) as e:
        split_dataset(tmp_path / "prepared", tmp_path / "split")
    assert "each case's name or folder" in str(e.value)


def tables_unite(folder, ids, **tables):
    """Return which cases mapping tables unite: groups of ids, sorted."""
    for name, rows in tables.items():
        (folder / f"{name}_mapping.csv").write_text("\n".join(rows))
    patients, _ = find_patients([Case(i, {}) for i in ids], folder)
    groups = {}
    for case_id, patient in patients.items():
        groups.setdefault(patient, []).append(case_id)
    return sorted(map(sorted, groups.values()))


def test_I2_a_column_of_patients_is_not_taken_for_that_of_the_scans(tmp_path):
    ids = "1", "2", "3", "4", "11", "12"
    first = ["case_id,patient_id", "1,P1", "2,P1", "3,P2", "4,P2"]
    second = ["case_id,patient_id", "11,P1", "12,P2", "999,P3"]  # one case is excluded
    groups = tables_unite(tmp_path, ids, a=first, b=second)
    assert groups == [["1", "11", "2"], ["12", "3", "4"]]


@pytest.mark.parametrize(
    "ids, tables, groups",
    [
        (  # ids that name patients, and numbers of scans
            ["P1_pre", "P1_post", "P2_pre", "P2_post", "101", "102"],
            [["case_id,patient_id", "101,P1", "102,P2", "999,P1"]],
            [["101", "P1_post", "P1_pre"], ["102", "P2_post", "P2_pre"]],
        ),
        (
            ["1_pre", "2_pre", "x", "y"],
            [["scan,patient", "1_pre,1", "2_pre,2"], ["scan,patient", "x,1", "y,5"]],
            [["1_pre", "x"], ["2_pre"], ["y"]],
        ),
        (  # numbers of subjects that are numbers of other cases
            ["1", "2", "12", "13", "30", "31"],
            [["case,subject", "1,12", "2,13"], ["case,subject", "30,12", "31,500"]],
            [["1", "30"], ["12"], ["13"], ["2"], ["31"]],
        ),
        (  # an arm of a study named like a patient
            ["A_pre", "B_pre", "C_pre"],
            [["case_id,patient,arm", "A_pre,A,A", "B_pre,B,A", "C_pre,C,B"]],
            [["A_pre"], ["B_pre"], ["C_pre"]],
        ),
        (  # numbers of another numbering
            ["1_pre", "2_pre", "3_pre", "4_pre"],
            [["patient_id,case_id", "2,1_pre", "3,2_pre", "4,3_pre", "1,4_pre"]],
            [["1_pre"], ["2_pre"], ["3_pre"], ["4_pre"]],
        ),
        (  # the second column of scans holds one that is excluded
            ["101", "102", "103", "104"],
            [["patient,scan1,scan2", "P0,101,103", "P1,102,104", "P2,105,106"]],
            [["101", "103"], ["102", "104"]],
        ),
        (  # a blank cell of the first scan is no name
            ["1", "2", "S1_a", "S2_b"],
            [["scan,note", ",S1_a", ",S2_b", "1,", "2,"]],
            [["1"], ["2"], ["S1_a"], ["S2_b"]],
        ),
        (  # cells of nothing in a column where they say something
            ["001", "002"],
            [["id,previous_id", "001,", "002,001"]],
            [["001", "002"]],
        ),
        (  # as pandas saves the challenge's table: NA becomes nothing
            IDS,
            [["BraTS_2020_subject_ID,TCGA_ID", f"{IDS[0]},", f"{IDS[1]},T-1"]],
            [[i] for i in IDS],
        ),
        (
            ["Müller_A".replace("ü", "u\u0308"), "x"],
            [["case_id,patient", "Müller_A,1", "x,1"]],
            [["Müller_A".replace("ü", "u\u0308"), "x"]],
        ),
        (  # as many numbers of patients as of scans are those of cases
            ["1", "2", "4", "5"],
            [["who,PatientName", "1,4", "2,5", "4,4", "5,5"]],
            [["1", "4"], ["2", "5"]],
        ),
        (  # a row that comes twice
            ["1", "2", "3", "4"],
            [["who,baseline,followup", "p,1,2", "p,1,2", "q,3,4"]],
            [["1", "2"], ["3", "4"]],
        ),
        (  # separators inside quotation marks
            IDS,
            [
                [
                    'id,patient,note,"size (x, y, z; mm)"',
                    *(f'{i},P{n // 2},"a; b",1' for n, i in enumerate(IDS)),
                ]
            ],
            [IDS[:2], IDS[2:]],
        ),
        (  # a footer without the separator, and decimal commas
            IDS,
            [
                [
                    "case_id;patient_id;size (mm, mean)",
                    *(f"{i};P{n // 2};12,5" for n, i in enumerate(IDS)),
                    "Quelle: TCIA",
                ]
            ],
            [IDS[:2], IDS[2:]],
        ),
    ],
)
def test_I2_what_tables_of_other_makes_unite(tmp_path, ids, tables, groups):
    found = tables_unite(tmp_path, ids, **dict(zip("ab", tables, strict=False)))
    assert found == sorted(groups)


def test_I2_a_table_without_rows_and_copies_of_tables(tmp_path):
    good = ["case_id,patient_id", f"{IDS[0]},P1", f"{IDS[1]},P1"]
    for suffix in ("bak", "md5", "dvc", "part"):
        text = f"case_id,patient_id\n{IDS[0]},P1\n{IDS[2]},P1"
        (tmp_path / f"a_mapping.csv.{suffix}").write_text(text)
    assert tables_unite(tmp_path, IDS, a=good) == [IDS[:2], IDS[2:3], IDS[3:]]
    with pytest.raises(ValueError, match="b_mapping.csv has none of these cases"):
        tables_unite(tmp_path, IDS, b=["case_id,patient_id"])


def test_I2_ucsf_alptdgs_two_times_are_of_one_patient(tmp_path):
    ids = [f"{patient}_time{n}" for patient in ("100001", "100002") for n in (1, 2)]
    patients, _ = find_patients([Case(case_id, {}) for case_id in ids], tmp_path)
    assert [patients[case_id] for case_id in ids] == ["100001"] * 2 + ["100002"] * 2


def test_C10_a_split_on_another_drive_of_windows_copies(toy_set, tmp_path, monkeypatch):
    def refuse(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    out, _ = prepared_toys(toy_set, tmp_path)
    monkeypatch.setattr("os.path.relpath", refuse)
    ids = split_dataset(out, tmp_path / "split")
    path = tmp_path / "split" / "val" / "images" / f"{ids['val'][0]}.npy"
    assert path.is_file() and not path.is_symlink()

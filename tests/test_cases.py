"""Cases: found in every layout, checked, read, and their label maps written."""

import gzip
import json
import os
import re
import shutil
import unicodedata
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, SHAPE, toy_volumes, write_case

from brats_utils.cases import (
    ALL_MODALITIES,
    BratsDataError,
    Case,
    check_cases,
    find_cases,
    load_case,
    load_labels,
    rename_odd_segmentation,
    save_segmentation,
)
from brats_utils.inference import predict_cases
from brats_utils.labels import label_table
from brats_utils.model import unet
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_case, prepare_dataset


def test_finds_cases_at_any_depth_sorted_by_id(toy_set):
    cases = find_cases(toy_set)
    assert [case.id[-14:] for case in cases] == [
        "0_Training_001",
        "0_Training_002",
        "0_Training_003",
        "0_Training_004",
        "Validation_001",
    ]
    assert list(cases[0].images) == list(ALL_MODALITIES)
    assert cases[-1].segmentation is None
    assert {case.labels for case in cases} == {"0124"}


def test_A24_strays_are_ignored(toy_set):
    folder = next(toy_set.rglob("BraTS20_Training_001"))
    for name in ("._x_flair.nii", ".DS_Store", "survival_info.csv", "atlas.nii.gz"):
        (folder / name).write_bytes(b"stray")
    (toy_set / "__MACOSX").mkdir()
    (toy_set / "__MACOSX" / "BraTS20_Training_009_flair.nii").write_bytes(b"stray")
    assert len(find_cases(toy_set)) == 5


def test_D05_the_order_does_not_depend_on_the_system(toy_set, monkeypatch):
    ids = [case.id for case in find_cases(toy_set)]
    walk = os.walk

    def shuffled(root, **options):
        for folder, folders, names in walk(root, **options):
            folders.reverse()
            yield folder, folders, names[::-1]

    monkeypatch.setattr(os, "walk", shuffled)
    assert [case.id for case in find_cases(toy_set)] == ids


def test_reads_the_raw_values_in_the_order_asked_for(toy_set):
    case = find_cases(toy_set)[0]
    images, segmentation = toy_volumes(1)
    image, read, affine = load_case(case, ("t2", "flair"))
    assert image.dtype == np.float32 and image.shape == (24, 24, 16, 2)
    np.testing.assert_array_equal(image[..., 0], images["t2"])
    np.testing.assert_array_equal(image[..., 1], images["flair"])
    np.testing.assert_array_equal(read, segmentation)
    np.testing.assert_array_equal(affine, AFFINE)
    assert load_case(case, ())[0].shape == (24, 24, 16, 0)


def test_A03_nii_and_nii_gz_may_be_mixed(toy_set):
    case = find_cases(toy_set)[0]
    expected = load_case(case)[0]
    for path in list(case.images.values())[:2]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    case = find_cases(toy_set)[0]
    assert case.images["flair"].name.endswith(".nii.gz")
    np.testing.assert_array_equal(load_case(case)[0], expected)


def test_A02_the_odd_segmentation_is_taken_and_renamed_when_asked(tmp_path):
    odd = "W39_1998.09.19_Segm.nii"
    folder = write_case(tmp_path, "BraTS20_Training_355", seg_name=odd)
    with pytest.warns(UserWarning, match="355: W39_1998.09.19_Segm.nii is its seg"):
        (case,) = find_cases(tmp_path)
    assert case.segmentation == folder / odd
    new = folder / "BraTS20_Training_355_seg.nii"
    assert rename_odd_segmentation(tmp_path) == [(folder / odd, new)]
    assert rename_odd_segmentation(tmp_path) == []
    (case,) = find_cases(tmp_path)
    assert case.segmentation == new


@pytest.mark.parametrize("other", ["W40_1999.01.02_Segm.nii", "b_seg_old.nii"])
def test_A02_two_odd_segmentations_are_an_error(tmp_path, other):
    odd = "W39_1998.09.19_Segm.nii"
    folder = write_case(tmp_path, "BraTS20_Training_355", seg_name=odd)
    shutil.copy(folder / odd, folder / other)
    for call in (find_cases, rename_odd_segmentation):
        with pytest.raises(BratsDataError, match="W39_1998.09.19_Segm.nii") as error:
            call(tmp_path)
        assert other in str(error.value)


def test_A01_A22_all_missing_modalities_and_doubles_are_listed_at_once(toy_set):
    next(toy_set.rglob("*002_t1ce.nii")).unlink()
    next(toy_set.rglob("*003_t2.nii")).unlink()
    folder = next(toy_set.rglob("BraTS20_Training_004"))
    shutil.copytree(folder, toy_set / "copy" / folder.name)
    with pytest.raises(BratsDataError) as error:
        find_cases(toy_set)
    for part in ("002 (", "lacks t1ce", "003 (", "lacks t2", "004 appears twice"):
        assert part in str(error.value)


def test_A25_a_wrong_folder_says_what_it_holds(tmp_path):
    with pytest.raises(BratsDataError, match="there is no folder"):
        find_cases(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BratsDataError, match="it holds: notes.txt"):
        find_cases(tmp_path)


def test_B02_brats_2023_names_and_labels(tmp_path):
    folder = write_case(tmp_path, "BraTS-GLI-00000-000", suffix=".nii.gz")
    names = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
    for old, new in names.items():
        path = folder / f"{folder.name}_{old}.nii.gz"
        path.rename(folder / f"{folder.name}-{new}.nii.gz")
    path = folder / f"{folder.name}-seg.nii.gz"
    segmentation = toy_volumes()[1]
    stored = np.where(segmentation == 4, 3, segmentation).astype(np.uint8)
    nib.save(nib.Nifti1Image(stored, AFFINE), path)
    (case,) = find_cases(tmp_path)
    assert case.labels == "0123"
    np.testing.assert_array_equal(load_case(case)[1], segmentation)
    write_case(tmp_path, "BraTS20_Training_001")  # each set by its own convention
    assert [case.labels for case in find_cases(tmp_path)] == ["0123", "0124"]
    np.testing.assert_array_equal(load_case(case)[1], segmentation)


def write_labelled(root, case_id, values, names=None):
    """Write a toy case whose labels 0, 1, 2 and 4 are written as other values."""
    table = np.zeros(5, np.uint8)
    table[[0, 1, 2, 4]] = values
    segmentation = table[toy_volumes()[1]]
    folder = write_case(root, case_id, segmentation=segmentation)
    for old, new in (names or {}).items():
        (folder / f"{case_id}_{old}.nii").rename(folder / new.format(case_id))
    return folder


def test_B02_values_decide_where_the_names_are_unknown(tmp_path):
    for number, values in enumerate(((0, 1, 2, 0), (0, 1, 2, 3))):
        write_labelled(tmp_path, f"patient{number}", values)
    with pytest.warns(UserWarning, match="1 is read as core, 2 as oedema, 3 as"):
        cases = find_cases(tmp_path)
    assert {case.labels for case in cases} == {"0123"}
    assert set(np.unique(load_case(cases[1])[1])) == {0, 1, 2, 4}
    write_labelled(tmp_path, "patient2", (0, 1, 2, 4))
    with pytest.raises(BratsDataError, match="two conventions"):
        find_cases(tmp_path)


# What a set's ids say of its labels, and label maps that contradict it.
I1_CONTRADICTIONS = [
    ("BraTS20_Training_001", (0, 1, 2, 3), "0124"),
    ("Brats18_CBICA_AAB_1", (0, 1, 2, 3), "0124"),
    ("BraTS2021_00002", (0, 1, 2, 3), "0124"),
    ("TCGA-02-0003_1997.06.08", (0, 2, 1, 3), "0124"),
    ("UPENN-GBM-00001_11", (0, 1, 2, 3), "0124"),
    ("UCSF-PDGM-0004", (0, 1, 2, 3), "0124"),
    ("BraTS-GLI-00000-000", (0, 1, 2, 4), "0123"),
    ("BraTS-SSA-00002-000", (0, 1, 2, 4), "0123"),
]


@pytest.mark.parametrize(("case_id", "values", "code"), I1_CONTRADICTIONS)
def test_I1_values_that_contradict_the_name_are_refused(
    tmp_path, case_id, values, code
):
    folder = write_labelled(tmp_path, case_id, values)
    with pytest.raises(BratsDataError, match="pass labels=") as error:
        find_cases(tmp_path)
    for part in (f"{case_id}_seg.nii", f"label {values[-1]}", code):
        assert part in str(error.value)
    told = {"0123": "0124", "0124": "0123"}[code]
    (case,) = find_cases(tmp_path, labels=told)
    assert case.labels == told and folder in case.segmentation.parents
    # The same names with the values they promise.
    right = [{"0123": 3, "0124": 4}[code] if v == values[-1] else v for v in values]
    write_labelled(tmp_path / "right", case_id, right)
    (case,) = find_cases(tmp_path / "right")
    assert case.labels == code and set(np.unique(load_case(case)[1])) == {0, 1, 2, 4}


@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 1, 2, 3), (0, 1, 2, 0)])
@pytest.mark.parametrize(
    ("case_id", "reason", "table"),
    [
        ("BraTS-GLI-02000-100", "4 is a cavity", {1: 1, 2: 2, 3: 4, 4: 0}),
        ("BraTS-GLI-00005-101", "4 is a cavity", {1: 1, 2: 2, 3: 4, 4: 0}),
        ("BraTS-PED-00001-000", "3 cyst, 4 oedema", {1: 4, 2: 1, 3: 1, 4: 2}),
        ("brats-peds-00001-000", "3 cyst, 4 oedema", {1: 4, 2: 1, 3: 1, 4: 2}),
    ],
)
def test_I1_names_that_do_not_settle_it_are_refused_until_told(
    tmp_path, case_id, reason, table, values
):
    write_labelled(tmp_path, case_id, values)
    with pytest.raises(BratsDataError, match=reason) as error:
        find_cases(tmp_path)
    assert f"labels={table}" in str(error.value)
    (case,) = find_cases(tmp_path, labels=table)
    expected = {table.get(int(v), 0) for v in values}
    assert set(np.unique(load_case(case)[1])) == expected
    folder = case.segmentation.parent
    case.segmentation.unlink()  # a scan to be predicted needs no convention
    assert find_cases(folder)[0].segmentation is None


@pytest.mark.parametrize("table", [{}, {1: 3}, {0: 1}, {"a": 1}, {-1: 1}, "0132", 5])
def test_J4_impossible_label_tables_are_refused(toy_set, table):
    with pytest.raises(ValueError, match=r"labels is .*, expected 'auto', one of"):
        find_cases(toy_set, labels=table)


def test_I1_a_description_decides_what_the_decathlons_labels_mean(phantoms, tmp_path):
    in_layout("decathlon", phantoms[:1], tmp_path)
    path = tmp_path / "Task01_BrainTumour" / "dataset.json"
    described = json.loads(path.read_text())
    for names, code in (
        ({"0": "background", "1": "necrotic", "2": "edema", "3": "enhancing"}, "0123"),
        (
            {
                "0": "background",
                "1": "edema",
                "2": "non-enhancing tumor",
                "3": "enhancing tumour",
            },
            "0213",
        ),
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 3}, "0123"),
        ({"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3}, "0213"),
        ({"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, "0123"),
    ):
        path.write_text(json.dumps({**described, "labels": names}))
        assert find_cases(tmp_path)[0].labels == code
    names = {"0": "background", "1": "cavity"}  # not understood: nor do the ids decide
    path.write_text(json.dumps({**described, "labels": names}))
    with pytest.raises(BratsDataError, match="what its labels mean is not certain"):
        find_cases(tmp_path)
    for wrong in (
        "[1]",
        "{",
        '{"modality": [1, 2]}',
        '{"modality": {"a": "T1"}}',
        '{"labels": [1]}',
        '{"labels": {"ET": "x"}}',
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="dataset.json"):
            find_cases(tmp_path)


def test_I3_only_known_names_are_label_maps(tmp_path):
    case_id = "UCSF-PDGM-0004"
    names = {"seg": "{}_tumor_segmentation.nii", "t1ce": "{}_T1c.nii"}
    folder = write_labelled(tmp_path, case_id, (0, 1, 2, 4), names)
    others = ("brain_segmentation", "ALGOseg-AURORA", "algo_seg", "brain_seg", "mask")
    for other in (*others, "brain_parenchyma_segmentation", "automated_approx_segm"):
        shutil.copy(folder / f"{case_id}_t2.nii", folder / f"{case_id}_{other}.nii")
    with pytest.warns(UserWarning, match="7 files .* are ignored.*seg"):
        (case,) = find_cases(tmp_path)
    assert case.segmentation.name == f"{case_id}_tumor_segmentation.nii"
    case.segmentation.unlink()
    with pytest.warns(UserWarning, match="ignored"):
        (case,) = find_cases(tmp_path)
    assert case.segmentation is None


def test_every_problem_of_every_case_is_listed_by_one_pass(toy_set):
    cases = find_cases(toy_set)
    assert check_cases(cases).empty
    image = nib.load(cases[0].images["t1"])
    moved = AFFINE.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(np.array(image.dataobj), moved), image.get_filename())
    broken = toy_volumes(2)[0]["t2"].astype(np.float32)
    broken[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(broken, AFFINE), cases[1].images["t2"])
    wrong = np.full((24, 24, 16), 5, np.uint8)
    nib.save(nib.Nifti1Image(wrong, AFFINE), cases[2].segmentation)
    cases[3].images["flair"].write_bytes(b"<html>quota exceeded</html>")
    problems = check_cases(cases)
    assert problems["case"].str[-1].tolist() == ["1", "2", "3", "4"]
    for part, text in zip(
        ("grid (affine) differs", "NaN", "found 5 in 9216 voxels", "not a NIfTI"),
        problems["problem"],
        strict=True,
    ):
        assert part in text


def test_a_file_with_two_problems_is_listed_twice(toy_set):
    case = find_cases(toy_set)[0]
    broken = toy_volumes()[0]["t2"].astype(np.float64)
    broken[3, 4, 5] = 1e39  # one damaged exponent: finite, but not as float32
    moved = AFFINE.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(broken, moved), case.images["t2"])
    problems = check_cases([case])["problem"].tolist()
    assert len(problems) == 2
    assert "grid (affine) differs" in problems[0]
    assert "1 voxels are NaN or infinite, first [3, 4, 5]" in problems[1]


def test_a_damaged_or_cut_gz_is_refused(tmp_path):
    folder = write_case(tmp_path, "BraTS20_Training_001", suffix=".nii.gz")
    path = folder / "BraTS20_Training_001_flair.nii.gz"
    whole = path.read_bytes()
    (case,) = find_cases(tmp_path)
    for data in (
        whole[: len(whole) // 2],
        whole[:-3],
        whole[:-20] + b"x" + whole[-19:],
    ):
        path.write_bytes(data)
        with pytest.raises(BratsDataError, match="download it again"):
            load_case(case)


def test_B01_B03_wrong_labels_are_refused_whatever_their_type(tmp_path):
    path = tmp_path / "x.nii.gz"
    for values in ([0, 1, 5], [0.0, 0.999, 2.0]):
        nib.save(nib.Nifti1Image(np.array([[values]], np.float32), np.eye(4)), path)
        with pytest.raises(BratsDataError, match="expected only the labels"):
            load_labels(path)
    exact = np.array([[[0.0, 1.0, 4.0]]], np.float32)
    nib.save(nib.Nifti1Image(exact, np.eye(4)), path)
    assert load_labels(path)[0].tolist() == [[[0, 1, 4]]]


def test_saved_labels_lie_on_the_cases_own_grid(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    segmentation = load_case(case)[1]
    path = tmp_path / "out" / f"{case.id}.nii.gz"
    save_segmentation(segmentation, case, path)
    saved, model = nib.load(path), nib.load(case.images["flair"])
    assert saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(saved.dataobj), segmentation)
    np.testing.assert_array_equal(saved.affine, model.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
        np.testing.assert_array_equal(saved.header[field], model.header[field])
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 2\)"):
        save_segmentation(np.zeros((2, 2, 2), int), case, path)
    with pytest.raises(ValueError, match="found 3 in 9216"):
        save_segmentation(np.full_like(segmentation, 3), case, path)


def test_real_cases_are_valid(real_cases):
    cases = find_cases(real_cases)
    assert len(cases) >= 2
    image, segmentation, affine = load_case(cases[0], ALL_MODALITIES)
    assert image.shape == (240, 240, 155, 4)
    assert set(np.unique(segmentation)) == {0, 1, 2, 4}
    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    assert check_cases(cases[:1]).empty


def test_A13_shapes_that_differ_are_both_named(tmp_path):
    folder = write_case(tmp_path, "one")
    other = nib.Nifti1Image(np.ones((24, 24, 15), np.int16), AFFINE)
    nib.save(other, folder / "one_t2.nii")
    with pytest.raises(BratsDataError, match=r"one_t2.*24, 24, 15.*24, 24, 16"):
        load_case(find_cases(tmp_path)[0])


@pytest.mark.parametrize("name", ["t1ce", "seg"])
@pytest.mark.parametrize(
    "change",
    [
        np.array([[1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        np.diag([-1.0, 1, 1, 1]),
        np.diag([2.0, 2, 2, 1]),
    ],
    ids=["shifted 5 mm", "flipped", "zoomed"],
)
def test_A15_grids_that_differ_are_refused(tmp_path, name, change):
    path = write_case(tmp_path, "one") / f"one_{name}.nii"
    image = nib.load(path)
    voxels = np.array(image.dataobj)  # no view of the file that is written next
    nib.save(nib.Nifti1Image(voxels, change @ AFFINE), path)
    with pytest.raises(BratsDataError, match=f"one, .*one_{name}.*its grid"):
        load_case(find_cases(tmp_path)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_A16_nan_and_infinity_are_counted_and_located(toy_set, value):
    case = find_cases(toy_set)[0]
    volume = toy_volumes(1)[0]["t2"].astype(np.float32)
    volume[3, 4, 5] = volume[6, 7, 8] = value
    nib.save(nib.Nifti1Image(volume, AFFINE), case.images["t2"])
    told = r"2 voxels are NaN or infinite, first \[3, 4, 5\]"
    with pytest.raises(BratsDataError, match=f"001, .*001_t2.*{told}"):
        load_case(case)
    assert re.search(told, check_cases([case])["problem"][0])


@pytest.mark.parametrize("value", [0, 7])
def test_A18_a_blank_modality_is_refused(tmp_path, value):
    folder = write_case(tmp_path, "one")
    blank = nib.Nifti1Image(np.full(SHAPE, value, np.int16), AFFINE)
    nib.save(blank, folder / "one_flair.nii")
    with pytest.raises(BratsDataError, match=f"one_flair.*blank.*is {value}"):
        load_case(find_cases(tmp_path)[0])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_A21_spaces_and_accents_in_paths_work(tmp_path, form):
    folder = tmp_path / unicodedata.normalize(form, "Données é 脑 (1)") / ("x" * 200)
    write_case(folder / "raw", "one", suffix=".nii.gz")
    out = folder / "prepared"
    prepare_dataset(folder / "raw", out, crop_shape=None, min_labelled=0)
    assert (out / "masks" / "one.npy").is_file()


def test_A02_an_odd_file_among_several_cases_without_segmentation(tmp_path):
    for name in ("a", "b"):
        folder = write_case(tmp_path / "raw", name, seg_name=None)
        for path in list(folder.iterdir()):
            path.rename(tmp_path / "raw" / path.name)
        folder.rmdir()
    shutil.copy(tmp_path / "raw" / "a_t2.nii", tmp_path / "raw" / "W39_9_Segm.nii")
    for look in (find_cases, rename_odd_segmentation):
        with pytest.raises(BratsDataError, match="W39_9_Segm.nii may belong to a, b"):
            look(tmp_path / "raw")


NAMES_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}


def write_2018(case, number, root):
    stem = f"Brats18_TCIA{number:02}_{number:03}_1"
    for key, path in case.images.items() | {("seg", case.segmentation)}:
        rewrite(path, root / "HGG" / stem / f"{stem}_{key}.nii.gz")


def write_2021(case, number, root):
    stem = f"BraTS2021_{number:05}"
    for key, path in case.images.items() | {("seg", case.segmentation)}:
        rewrite(path, root / stem / f"{stem}_{key}.nii.gz")


def write_2023(case, number, root):
    stem = f"BraTS-GLI-{number:05}-000"
    for key, path in case.images.items():
        rewrite(path, root / stem / f"{stem}-{NAMES_2023[key]}.nii.gz")
    rewrite(case.segmentation, root / stem / f"{stem}-seg.nii.gz", [0, 1, 2, 0, 3])


def write_decathlon(case, number, root):
    name = f"BRATS_{number:03}.nii.gz"
    images = [nib.load(case.images[modality]) for modality in ALL_MODALITIES]
    stacked = np.stack([np.asarray(image.dataobj) for image in images], axis=-1)
    folder = root / "Task01_BrainTumour"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"._{name}").write_bytes(b"a stray of macOS")
    image = nib.Nifti1Image(stacked, images[0].affine)
    nib.save(image, folder / "imagesTr" / name)
    # Of the Decathlon: 1 is oedema, 2 the necrotic core, 3 enhancing tumour.
    rewrite(case.segmentation, folder / "labelsTr" / name, [0, 2, 1, 0, 3])
    order = dict(enumerate(["FLAIR", "T1w", "t1gd", "T2w"]))
    (folder / "dataset.json").write_text(json.dumps({"modality": order}))


def rewrite(source, target, values=None):
    """Write a volume under another name, its labels by another table."""
    image = nib.load(source)
    volume = np.asarray(image.dataobj)
    volume = volume if values is None else np.array(values, np.uint8)[volume]
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, image.affine), target)


LAYOUTS = {
    "2018": (write_2018, "0124"),
    "2021": (write_2021, "0124"),
    "2023": (write_2023, "0123"),
    "decathlon": (write_decathlon, "0213"),
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts") / "phantom"
    write_phantom(root, 3, shape=(48, 48, 40), seed=5)
    rename_odd_segmentation(root)
    return find_cases(root, labels="0124")


def in_layout(layout, cases, root):
    write, labels = LAYOUTS[layout]
    for number, case in enumerate(cases, 1):
        write(case, number, root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # label 3 in the layout of 2023
        found = find_cases(root)
    assert {case.labels for case in found} == {labels}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_read_the_same_way(layout, phantoms, tmp_path):
    found = in_layout(layout, phantoms, tmp_path)
    assert len(found) == len(phantoms) and check_cases(found).empty
    for case, phantom in zip(found, phantoms, strict=True):
        for modalities in (("flair", "t1ce", "t2"), ("t2", "t1"), ()):
            image, segmentation, affine = load_case(case, modalities)
            expected = load_case(phantom, modalities)
            np.testing.assert_array_equal(image, expected[0])
            np.testing.assert_array_equal(segmentation, expected[1])
            np.testing.assert_array_equal(affine, expected[2])


@pytest.mark.filterwarnings("ignore:label 3")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_prepared_to_the_same_bytes(layout, phantoms, tmp_path):
    found = in_layout(layout, phantoms, tmp_path / "raw")
    options = {"crop_shape": (32, 32, 32), "min_labelled": 0.0, "jobs": 1}
    prepare_dataset(tmp_path / "raw", tmp_path / "out", **options)
    root = phantoms[0].images["flair"].parents[1]
    prepare_dataset(root, tmp_path / "expected", **options)
    for case, phantom in zip(found, phantoms, strict=True):
        for kind in ("images", "masks"):
            written = (tmp_path / "out" / kind / f"{case.id}.npy").read_bytes()
            expected = tmp_path / "expected" / kind / f"{phantom.id}.npy"
            assert written == expected.read_bytes()


def test_the_decathlons_scans_are_predicted_on_their_own_grid(phantoms, tmp_path):
    found = in_layout("decathlon", phantoms[:1], tmp_path)
    task = tmp_path / "Task01_BrainTumour"
    (task / "imagesTs").mkdir()
    shutil.copy(task / "imagesTr/BRATS_001.nii.gz", task / "imagesTs/BRATS_485.nii.gz")
    found = find_cases(tmp_path)
    assert [bool(case.segmentation) for case in found] == [True, False]
    model = unet((None, None, None, 3), filters=4, depth=2)
    paths = predict_cases(model, found, tmp_path / "out", uncertainty=True)
    for path, case in zip(paths, found, strict=True):
        written, shape = nib.load(path), (48, 48, 40)
        assert written.shape == shape and written.header["dim"][0] == 3
        np.testing.assert_array_equal(written.affine, load_case(case, ())[2])
        doubt = nib.load(tmp_path / "out" / "uncertainty" / path.name)
        assert doubt.shape == shape
    truth = load_labels(found[0].segmentation, found[0].labels)[0]
    save_segmentation(truth, found[0], tmp_path / "back.nii.gz")
    expected = load_case(phantoms[0])[1]
    np.testing.assert_array_equal(load_labels(tmp_path / "back.nii.gz")[0], expected)


def test_other_tasks_of_the_decathlon_are_refused(phantoms, tmp_path):
    in_layout("decathlon", phantoms[:1], tmp_path)
    task = tmp_path / "Task01_BrainTumour"
    (task / "dataset.json").write_text('{"modality": {"0": "T2", "1": "ADC"}}')
    with pytest.raises(BratsDataError, match="t2.*adc"):
        find_cases(tmp_path)
    (task / "dataset.json").unlink()
    rewrite(phantoms[0].images["t2"], task / "imagesTr" / "BRATS_001.nii.gz")
    problems = check_cases(find_cases(tmp_path))
    assert "expected 4 images in one file" in problems["problem"][0]
    with pytest.raises(BratsDataError, match="BRATS_001.*expected 4 images"):
        load_case(find_cases(tmp_path)[0])


def test_two_layouts_in_one_folder_keep_their_own_labels(phantoms, tmp_path):
    in_layout("decathlon", phantoms[:1], tmp_path)
    write_case(tmp_path, "BraTS20_Training_001")
    assert [case.labels for case in find_cases(tmp_path)] == ["0213", "0124"]


def write_named(root, names, number=1):
    """Write a toy case; `names` are paths for flair, t1, t1ce, t2 and seg, or None."""
    images, segmentation = toy_volumes(number)
    for key, name in zip((*images, "seg"), names, strict=True):
        if name:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            volume = {**images, "seg": segmentation}[key]
            nib.save(nib.Nifti1Image(volume, AFFINE), path)


R2_NAMES = {
    "T1GD": "UPENN-GBM-00001_11_{}.nii.gz FLAIR T1 T1GD T2 segm UPENN-GBM-00001_11",
    "t1Gd": (
        "TCGA-02-0003_1997.06.08_{}.nii.gz flair t1 t1Gd t2 "
        "GlistrBoost_ManuallyCorrected TCGA-02-0003_1997.06.08"
    ),
    "T1c": "UCSF-PDGM-0004_{}.nii.gz FLAIR T1 T1c T2 tumor_segmentation UCSF-PDGM-0004",
    "plain": "deep/patient-7/{}.nii.gz t2f t1n t1c t2w seg patient-7",
    "upper": "a/P7/{}.NII.GZ FLAIR T1 T1CE T2 SEG P7",
    "brain": "x/57_{}.nii brain_flair brain_t1 brain_t1ce brain_t2 final_seg 57",
    "post": "P1_{}.nii.gz FLAIR T1 T1post T2 seg P1",
    "wide": "P1_{}.nii.gz FLAIR T1w T1_CE T2w seg P1",
    "lumiere": "Patient-001/{}.nii.gz FLAIR T1 CT1 T2 seg Patient-001",
    "bids": "sub-01-{}.nii.gz FLAIR T1w T1ce T2w seg sub-01",
}


@pytest.mark.parametrize("layout", R2_NAMES)
def test_R2_names_of_public_sets_are_known(layout, tmp_path):
    pattern, *keys, case_id = R2_NAMES[layout].split()
    write_named(tmp_path, [pattern.format(key) for key in keys])
    (case,) = find_cases(tmp_path)
    assert case.id == case_id and list(case.images) == list(ALL_MODALITIES)
    expected = toy_volumes(1)
    np.testing.assert_array_equal(load_case(case)[1], expected[1])
    np.testing.assert_array_equal(load_case(case)[0][..., 1], expected[0]["t1ce"])


def test_R2_kaggles_nested_folders_are_known(tmp_path):
    case_id, names = "BraTS20_Training_003", ("flair", "t1", "t1ce", "t2")
    inner = [f"00000057_brain_{name}.nii" for name in names] + [
        "00000057_final_seg.nii"
    ]
    outer = [f"{case_id}/{case_id}_{name}.nii" for name in (*names, "seg")]
    write_named(tmp_path, [f"{a}/{b}" for a, b in zip(outer, inner, strict=True)])
    (case,) = find_cases(tmp_path)
    assert case.id == case_id and load_case(case)[1].any()


def test_R2_upenn_keeps_its_label_maps_in_a_folder_of_their_own(tmp_path):
    case_id = "UPENN-GBM-00001_11"
    names = [
        f"images_structural/{case_id}/{case_id}_{n}.nii.gz" for n in ("FLAIR", "T1")
    ]
    names += [
        f"images_structural/{case_id}/{case_id}_{n}.nii.gz" for n in ("T1GD", "T2")
    ]
    automated = f"automated_segm/{case_id}_automated_approx_segm.nii.gz"
    write_named(tmp_path, [*names, automated])
    with pytest.warns(UserWarning, match="ignored"):
        assert find_cases(tmp_path)[0].segmentation is None
    manual = f"images_segm/{case_id}_segm.nii.gz"
    write_named(tmp_path, [*names, manual])
    with pytest.warns(UserWarning, match="1 files .* are ignored"):
        assert find_cases(tmp_path)[0].segmentation == tmp_path / manual


def test_R2_nnunets_channels_are_named_by_its_description_or_refused(tmp_path):
    names = [f"imagesTr/BraTS_7_000{n}.nii.gz" for n in (3, 0, 1, 2)]
    write_named(tmp_path, [*names, "labelsTr/BraTS_7.nii.gz"])
    with pytest.raises(BratsDataError, match="dataset.json.*in order"):
        find_cases(tmp_path)
    described = {"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(described))
    (case,) = find_cases(tmp_path)
    assert case.id == "BraTS_7" and case.images["flair"].name == "BraTS_7_0003.nii.gz"
    np.testing.assert_array_equal(
        load_case(case, ("t1ce",))[0][..., 0], toy_volumes(1)[0]["t1ce"]
    )
    described["channel_names"]["2"] = "ADC"
    path.write_text(json.dumps(described))
    with pytest.raises(BratsDataError, match="adc"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("equal", "two of its modalities are the same image"),
        ("no orientation", "its header states no orientation"),
        ("off the brain", "44 labelled voxels lie outside the brain"),
        ("hot", "a voxel lies 400 SD from the brain's mean"),
    ],
)
def test_J1_strange_cases_are_listed(tmp_path, change, problem):
    images, truth = toy_volumes(shape=(64, 64, 48))
    affine = None if change == "no orientation" else AFFINE
    if change == "equal":
        images["t2"] = images["t1"]
    if change == "off the brain":
        truth[:4, :4, :3] = 2
    if change == "hot":
        images = {name: image.astype(np.float32) for name, image in images.items()}
        images["t2"][30, 30, 20] = 1e6
        images["t2"] += np.random.default_rng(0).random(truth.shape) / 9
        images["t2"][images["t1"] == 0] = 0
    folder = tmp_path / "one"
    folder.mkdir()
    for name, image in {**images, "seg": truth}.items():
        nib.save(nib.Nifti1Image(image, affine), folder / f"one_{name}.nii")
    case = find_cases(tmp_path, labels="0124")[0]
    found = check_cases([case])
    assert re.match(problem, found["problem"][0]) and len(found) == 1


def test_J1_what_is_strange_stands_in_the_report(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    nib.save(nib.load(case.images["flair"]), case.images["t2"])
    report = prepare_dataset(toy_set, tmp_path / "out", min_labelled=0)
    notes = ["two of its modalities" in str(note) for note in report["note"]]
    assert notes == [True, False, False, False, False]


def test_a_case_takes_paths_written_as_text(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    texts = {name: str(path) for name, path in case.images.items()}
    written = Case(case.id, texts, str(case.segmentation))
    assert written == case
    assert prepare_case(written, tmp_path / "out", min_labelled=0)["kept"]


def test_A22_a_name_that_is_not_utf_8_is_refused_before_anything(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9_1")
    os.mkdir(folder)
    for name, image in toy_volumes()[0].items():
        path = os.path.join(folder, b"caf\xe9_1_" + name.encode() + b".nii")
        nib.save(nib.Nifti1Image(image, AFFINE), os.fsdecode(path))
    with pytest.raises(BratsDataError, match=r"caf.udce9_1.*Rename it, in UTF-8") as e:
        find_cases(tmp_path)
    str(e.value).encode()  # can be printed


def test_A21_any_space_may_be_in_a_name(tmp_path):
    write_case(tmp_path / "\u8133\u3000a\u00a0b", "one")
    assert len(find_cases(tmp_path, labels={"1": 1, 2: 2, 4.0: 4})) == 1


def test_R2_only_the_modalities_asked_for_are_required(toy_set, tmp_path):
    next(toy_set.rglob("*001_t1.nii")).unlink()
    assert len(find_cases(toy_set)) == 5
    with pytest.raises(BratsDataError, match="001.*lacks t1"):
        find_cases(toy_set, modalities=("flair", "t1"))
    path = next(toy_set.rglob("*002_t2.nii"))
    path.rename(path.with_name("BraTS20_Training_002_T2_new.nii"))
    with pytest.raises(
        BratsDataError, match="002.*lacks t2; not understood there: .*new"
    ):
        find_cases(toy_set)
    cases = find_cases(toy_set, modalities=())
    (problem,) = check_cases(cases)["problem"]
    assert problem == "lacks t2"
    report = prepare_dataset(toy_set, tmp_path / "out", skip_bad=True, min_labelled=0)
    assert report["kept"].tolist() == [True, False, True, True, False]
    assert "lacks t2" in report["reason"][1]
    with pytest.raises(BratsDataError, match="lacks t2"):
        prepare_dataset(toy_set, tmp_path / "other")


def test_R5_each_real_folder_is_visited_once(toy_set):
    for name, target in (("loop", toy_set), ("again", toy_set / "deep")):
        (toy_set / "deep" / name).symlink_to(target)
    assert len(find_cases(toy_set)) == 5


def test_J2_a_background_that_is_not_0_is_explained(toy_set):
    cases, rng = find_cases(toy_set), np.random.default_rng(0)
    images, _ = toy_volumes(1)
    head = rng.integers(100, 200, SHAPE)
    changed = {
        "noise around": images["flair"] + rng.uniform(1e-4, 1e-3, SHAPE),
        "background is -5": images["flair"] - 5.0,
        "not skull-stripped": head,
    }
    for case, (told, volume) in zip(cases, changed.items(), strict=False):
        image = nib.Nifti1Image(np.float32(volume), AFFINE)
        nib.save(image, case.images["t1ce"])
        (problem,) = check_cases([case])["problem"]
        assert told in problem and "0.0% of its voxels are exactly 0" in problem


def test_four_images_in_one_file_are_refused_elsewhere(tmp_path):
    folder = write_case(tmp_path, "BraTS20_Training_001")
    path = folder / "BraTS20_Training_001_t1.nii"
    volume = np.asarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image(np.stack([volume] * 4, axis=-1), np.eye(4)), path)
    problems = check_cases(find_cases(tmp_path))
    assert "expected a 3-D volume" in problems["problem"][0]


@pytest.mark.parametrize("name", ["flair", "seg"])
def test_H1_a_scan_is_never_replaced_by_a_label_map(toy_set, name):
    case = find_cases(toy_set)[0]
    path = case.segmentation if name == "seg" else case.images[name]
    before, segmentation = path.read_bytes(), load_case(case)[1]
    with pytest.raises(ValueError, match="not written by this project.*another path"):
        save_segmentation(segmentation, case, path)
    assert path.read_bytes() == before


def test_H1_our_own_label_map_is_replaced_and_a_foreign_one_is_not(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    segmentation = load_case(case)[1]
    path = tmp_path / "mine.nii.gz"
    for values in (segmentation, np.zeros_like(segmentation)):
        save_segmentation(values, case, path)
        np.testing.assert_array_equal(load_labels(path)[0], values)
    for content in (b"text", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="mine.nii.gz"):
            save_segmentation(segmentation, case, path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["p.hdr", "p.img", "p", "p.mgz", "p.nii.zip"])
def test_R6_another_suffix_is_refused(toy_set, tmp_path, name):
    case = find_cases(toy_set)[0]
    with pytest.raises(ValueError, match=r"\.nii or \.nii\.gz"):
        save_segmentation(load_case(case)[1], case, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_R7_texts_of_a_scan_are_not_copied(toy_set, tmp_path):
    case = find_cases(toy_set)[0]
    image = nib.load(case.images["flair"])
    image = nib.Nifti1Image(np.array(image.dataobj), image.affine, image.header)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = "Jane Doe 1970"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, case.images["flair"])
    path = tmp_path / "out.nii"
    save_segmentation(load_case(case)[1], case, path)
    assert b"Jane" not in path.read_bytes() and b"1970" not in path.read_bytes()


def hot_voxels(value, *others):
    """Return a float32 scan in which some voxels squeeze all others together."""
    volume = toy_volumes(1)[0]["flair"].astype(np.float32)
    for number, each in enumerate((value, *others)):
        volume[5 + number, 6, 7] = each
    return nib.Nifti1Image(volume, AFFINE)


@pytest.mark.parametrize(
    ("values", "told"),
    [((1e12,), "1e.12"), ((3e38, -3e38), "3e.38"), ((-1e9,), "1e.09")],
)
def test_J1_a_voxel_that_squeezes_all_others_is_named(toy_set, values, told):
    case = find_cases(toy_set)[0]
    nib.save(hot_voxels(*values), case.images["flair"])
    (problem,) = check_cases([case])["problem"]
    assert re.search(told, problem) and "grey levels" in problem
    assert "[5, 6, 7]" in problem or "[6, 6, 7]" in problem


def test_A25_a_link_to_nothing_or_a_locked_folder_is_an_error(tmp_path, monkeypatch):
    root = tmp_path / "raw"
    write_case(root, "BraTS20_Training_001")
    (root / "BraTS20_Training_002").symlink_to(tmp_path / "unplugged")
    with pytest.raises(BratsDataError, match="Training_002.*is a broken link"):
        find_cases(root)
    (root / "BraTS20_Training_002").unlink()
    scan = os.scandir

    def locked(path):
        if str(path).endswith("Training_001"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(BratsDataError, match="Training_001.*cannot be read"):
        find_cases(root)


def test_A2_the_odd_label_map_beside_images_without_an_id(tmp_path):
    folder = write_case(tmp_path, "355", seg_name="W39_1998.09.19_Segm.nii")
    for path in folder.glob("355_*"):
        path.rename(folder / path.name.removeprefix("355_"))
    ((_, new),) = rename_odd_segmentation(tmp_path)
    assert new.name == "355_seg.nii"
    assert find_cases(tmp_path, labels="0124")[0].segmentation == new


def test_I1_a_dataset_json_that_is_not_understood_is_not_passed_over(tmp_path):
    channels = {}
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    toy = write_case(tmp_path / "toy", "H0")
    (toy / "H0_seg.nii").rename(tmp_path / "labelsTr" / "H0.nii")
    for number, name in enumerate(ALL_MODALITIES):
        (toy / f"H0_{name}.nii").rename(tmp_path / f"imagesTr/H0_{number:04}.nii")
        channels[str(number)] = name
    path, described = tmp_path / "dataset.json", {"channel_names": channels}
    names = {"background": 0, "whole tumor": 1}
    for labels in (names, {"background": 0, "edema": 2, "tumor bits": 1}):
        path.write_text(json.dumps({**described, "labels": labels}))
        with pytest.raises(BratsDataError, match=r"not certain .dataset.json.*labels="):
            find_cases(tmp_path)
    assert find_cases(tmp_path, labels="0213")[0].labels == "0213"


def test_B02_two_values_of_an_unknown_set_are_said_aloud(tmp_path):
    write_labelled(tmp_path, "patient", (0, 1, 2, 0))
    with pytest.warns(
        UserWarning, match="neither label 3 nor label 4.*1 is read as core"
    ):
        find_cases(tmp_path)


def test_R2_label_maps_in_a_folder_of_their_own(tmp_path):
    for number in range(2):
        folder = write_case(tmp_path / "images", f"P{number}", seed=number)
        (tmp_path / "masks").mkdir(exist_ok=True)
        old = folder / f"P{number}_seg.nii"
        old.rename(tmp_path / "masks" / f"p{number}_seg.nii")
    assert [c.segmentation.name for c in find_cases(tmp_path)] == [
        "p0_seg.nii",
        "p1_seg.nii",
    ]


def test_I1_a_description_counts_for_label_maps_beside_named_images(tmp_path):
    write_case(tmp_path / "imagesTr", "H0", seg_name=None)
    _, segmentation = toy_volumes(0, SHAPE)
    (tmp_path / "labelsTr").mkdir()
    stored = np.array([0, 2, 1, 0, 3], np.uint8)[segmentation]
    image = nib.Nifti1Image(stored, AFFINE)
    nib.save(image, tmp_path / "labelsTr" / "H0.nii")
    names = {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing tumor"}
    described = {
        "labels": names,
        "channel_names": {"0": "FLAIR", "1": "T1CE", "2": "T2"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    [case] = find_cases(tmp_path)
    assert case.labels == "0213"
    np.testing.assert_array_equal(load_case(case)[1], segmentation)


def test_R1_a_scaled_label_map_says_three_or_four_too(tmp_path):
    folder = write_case(tmp_path, "x", seg_name=None)
    _, segmentation = toy_volumes(0, SHAPE)
    stored = np.where(segmentation == 4, 3, segmentation)
    path = folder / "x_seg.nii"
    nib.save(nib.Nifti1Image((stored * 3).astype("u1"), AFFINE), path)
    raw = bytearray(path.read_bytes())
    raw[112:116] = np.float32(1 / 3).tobytes()  # scl_slope
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="label 3 and no label 4"):
        [case] = find_cases(tmp_path)
    np.testing.assert_array_equal(load_case(case)[1], segmentation)


def test_J4_an_id_is_no_path():
    with pytest.raises(ValueError, match="case is"):
        check_cases([Case("site/001", {"flair": "x.nii"})])


def test_J4_modalities_are_read_in_order(tmp_path):
    write_case(tmp_path, "x")
    [case] = find_cases(tmp_path)
    for wrong in ((m for m in ("flair", "t2")), {"flair"}, "flair"):
        with pytest.raises(ValueError, match="modalities is"):
            load_case(case, wrong)


def test_a_home_folder_may_be_named_by_a_tilde(tmp_path, monkeypatch):
    write_case(tmp_path / "raw", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [case.id for case in find_cases("~/raw")] == ["x"]
    with pytest.raises(ValueError, match="root is '~nobody-here/x'"):
        find_cases("~nobody-here/x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 5),
        ("images", "flair.nii"),
        ("images", ["flair.nii"]),
        ("images", {"flair": 5}),
        ("images", {"flair": None}),
        ("segmentation", 5),
    ],
)
def test_J4_a_case_is_made_of_paths(name, value):
    given = {"images": {"flair": "x.nii"}, name: value}
    with pytest.raises(ValueError, match=f"^Case: .*, expected .*{name}="):
        Case("x", **given)


def test_a_number_that_label_maps_have_too_belongs_to_the_id(tmp_path):
    """The images of nnU-Net end in the channel's number, label maps do not."""
    volumes, segmentation = toy_volumes()
    stacked = np.stack([volumes[m] for m in ("flair", "t1", "t1ce", "t2")], axis=-1)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    names = {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}
    for number in ("0001", "0002"):
        name = f"patient_{number}.nii.gz"
        nib.save(nib.Nifti1Image(stacked, AFFINE), tmp_path / "imagesTr" / name)
        nib.save(nib.Nifti1Image(segmentation, AFFINE), tmp_path / "labelsTr" / name)
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    cases = find_cases(tmp_path, labels="0124")
    assert [case.id for case in cases] == ["patient_0001", "patient_0002"]
    np.testing.assert_array_equal(load_case(cases[0])[1], segmentation)


def test_a_number_may_be_a_channel_in_one_id_and_belong_to_another(tmp_path):
    volumes, segmentation = toy_volumes()
    names = {"channel_names": {"0": "flair", "1": "t1ce", "2": "t2"}}
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    for case_id in ("p", "p_0001"):
        for number, modality in enumerate(("flair", "t1ce", "t2")):
            path = tmp_path / "imagesTr" / f"{case_id}_{number:04}.nii.gz"
            nib.save(nib.Nifti1Image(volumes[modality], AFFINE), path)
        image = nib.Nifti1Image(segmentation, AFFINE)
        nib.save(image, tmp_path / "labelsTr" / f"{case_id}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    cases = find_cases(tmp_path, labels="0124")
    assert [case.id for case in cases] == ["p", "p_0001"]
    np.testing.assert_array_equal(load_case(cases[0])[0][..., 1], volumes["t1ce"])


DESCRIBED = {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing tumor"}


@pytest.mark.parametrize(
    "name",
    ["labelsTr/H0_seg.nii", "labelsTr/H0.nii", "H0/H0_seg.nii", "HGG/H0/seg.nii"],
)
def test_I1_the_description_of_a_set_counts_wherever_its_label_maps_lie(tmp_path, name):
    path = tmp_path / name
    folder = path.parent.parent if path.parent.name == "H0" else tmp_path / "imagesTr"
    write_case(folder, "H0", seg_name=None)
    _, segmentation = toy_volumes(0, SHAPE)
    stored = nib.Nifti1Image(np.array([0, 2, 1, 0, 3], "u1")[segmentation], AFFINE)
    path.parent.mkdir(exist_ok=True)
    nib.save(stored, path)
    # The names of its channels do not matter: the files have names of their own.
    described = {"labels": DESCRIBED, "channel_names": {"0": "MRI_FLAIR"}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [case] = find_cases(tmp_path)
    np.testing.assert_array_equal(load_case(case)[1], segmentation)
    assert len(case.images) == 4


def test_I1_an_id_like_the_decathlons_in_another_layout_is_refused(tmp_path):
    _, segmentation = toy_volumes(0, SHAPE)
    stored = np.where(segmentation == 4, 3, segmentation)
    write_case(tmp_path, "BraTS_001", segmentation=stored)
    with pytest.raises(BratsDataError, match="Decathlon.*'0213'.*'0123'"):
        find_cases(tmp_path)
    [case] = find_cases(tmp_path, labels="0123")
    np.testing.assert_array_equal(load_case(case)[1], segmentation)
    write_case(tmp_path, "BraTS_002")  # its label 4 says which it is
    with pytest.raises(BratsDataError, match="BraTS_001.* label 3"):
        find_cases(tmp_path)
    case.segmentation.unlink()
    found = find_cases(tmp_path)
    assert [case.id for case in found] == ["BraTS_001", "BraTS_002"]
    assert 4 in load_case(found[1])[1]


def test_A21_the_current_folder_may_be_a_patients(tmp_path, monkeypatch):
    folder = write_case(tmp_path, "p7", seg_name="W39_1998.09.19_Segm.nii")
    for path in folder.glob("p7_*"):
        path.rename(folder / path.name.removeprefix("p7_"))
    (folder / "sub").mkdir()
    for here, root in ((folder, "."), (folder / "sub", "..")):
        monkeypatch.chdir(here)
        with pytest.warns(UserWarning, match="p7: W39"):
            [case] = find_cases(root, labels="0124")
        assert case.id == "p7" and load_case(case)[1].any()
    monkeypatch.chdir(folder)
    [(old, new)] = rename_odd_segmentation(".")
    assert (old.name, new.name) == ("W39_1998.09.19_Segm.nii", "p7_seg.nii")


def test_A21_the_current_folder_may_be_that_of_the_images(
    phantoms, tmp_path, monkeypatch
):
    in_layout("decathlon", phantoms[:1], tmp_path)
    images = tmp_path / "Task01_BrainTumour" / "imagesTr"
    expected = [case.id for case in find_cases(images)]
    monkeypatch.chdir(images)
    assert [case.id for case in find_cases(".")] == expected


def test_J4_label_tables_of_a_case_and_of_other_types(toy_set):
    case = find_cases(toy_set)[0]
    table = {1: 1, 2: 2, 3: 4}
    assert replace(case, labels=table).labels == "0123"
    with pytest.raises(ValueError, match="labels is"):
        replace(case, labels={1: 7})
    with pytest.raises(ValueError, match="labels is array"):
        find_cases(toy_set, labels=np.array([0, 1, 2, 4]))


@pytest.mark.parametrize("text", ["[1]", '{"labels": ["tumour"]}', "{"])
def test_I1_a_dataset_json_of_another_program_says_nothing(tmp_path, text):
    write_case(tmp_path, "BraTS20_Training_001")
    (tmp_path / "dataset.json").write_text(text)
    assert find_cases(tmp_path)[0].labels == "0124"


@pytest.mark.parametrize(
    "known, values, told",
    [
        ("BraTS20_Training_001", (0, 1, 2, 4), {1: 1, 2: 2, 3: 4, 4: 0}),
        ("BraTS-GLI-00001-000", (0, 1, 2, 3), {1: 4, 2: 1, 3: 1, 4: 2}),
        ("UPENN-GBM-00001_11", (0, 1, 2, 4), "0123"),
    ],
)
def test_I1_one_labels_for_two_conventions_is_refused(tmp_path, known, values, told):
    write_labelled(tmp_path, known, values)
    (case,) = find_cases(tmp_path, labels=told)  # the user may know better
    assert label_table(case.labels) == label_table(told)
    write_labelled(tmp_path, "BraTS-GLI-02000-100", (0, 1, 2, 3))
    with pytest.raises(BratsDataError, match=f"(?s){known}.*two conventions.*apart"):
        find_cases(tmp_path, labels=told)
    # Both are written as told: what the names say of 4 does not matter.
    shutil.rmtree(tmp_path / known)
    write_labelled(tmp_path, "BraTS-GLI-00001-000", (0, 1, 2, 3))
    cases = find_cases(tmp_path, labels={1: 1, 2: 2, 3: 4, 4: 0})
    assert [set(np.unique(load_case(c)[1])) for c in cases] == [{0, 1, 2, 4}] * 2


@pytest.mark.parametrize("folders", [("auto", "manual"), ("rater1", "rater2")])
def test_A02_two_label_maps_of_one_case_are_refused(tmp_path, folders):
    names = [f"images/BraTS20_001_{n}.nii" for n in ("flair", "t1", "t1ce", "t2")]
    write_named(tmp_path, [*names, f"labels/{folders[0]}/BraTS20_001_seg.nii"])
    assert find_cases(tmp_path)[0].segmentation is not None
    write_named(tmp_path, [None] * 4 + [f"labels/{folders[1]}/BraTS20_001_seg.nii"])
    with pytest.raises(BratsDataError, match="(?s)two files for seg.*auto|rater1") as e:
        find_cases(tmp_path)
    assert all(folder in str(e.value) for folder in folders)
    # Beside the images lies the label map; one elsewhere is named with its folder.
    shutil.copy(tmp_path / "labels" / folders[0] / "BraTS20_001_seg.nii", tmp_path)
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "derivatives").mkdir()
    shutil.move(tmp_path / "BraTS20_001_seg.nii", tmp_path / "derivatives")
    with pytest.warns(UserWarning, match="ignored.*derivatives.BraTS20_001_seg.nii"):
        assert find_cases(tmp_path)[0].segmentation is None


def test_I1_one_labels_for_one_set_is_taken_whatever_its_maps_hold(tmp_path):
    write_labelled(tmp_path, "BraTS20_Training_001", (0, 1, 2, 4))
    write_labelled(tmp_path, "BraTS20_Training_002", (0, 1, 2, 0))
    cases = find_cases(tmp_path, labels={1: 1, 2: 2, 4: 1})
    assert {case.labels for case in cases} == {"1:1 2:2 4:1"}
    shutil.rmtree(tmp_path / "BraTS20_Training_002")
    write_labelled(tmp_path / "other", "H1", (0, 1, 2, 0))
    names = {"background": 0, "edema": 2, "enhancing tumor": 4}
    for described in (names, {"background": 0, "enhancing tumor": 4}):
        text = json.dumps({"labels": described})
        (tmp_path / "other" / "dataset.json").write_text(text)
        assert len(find_cases(tmp_path, labels="0124")) == 2


def test_R2_a_folder_named_otherwise_than_its_files_changes_no_id(tmp_path):
    images = ("flair", "t1", "t1ce", "t2")
    names = [f"braTS20_001/BraTS20_001_{n}.nii" for n in (*images, "seg")]
    write_named(tmp_path, names)
    names = [f"P1_brain/P1_brain_{n}.nii" for n in images]
    write_named(tmp_path, [*names, "P1_brain/P1_seg.nii"])
    cases = find_cases(tmp_path)
    assert [case.id for case in cases] == ["BraTS20_001", "P1"]
    assert all(case.segmentation for case in cases)


def test_A21_files_of_a_case_may_mix_both_forms_of_unicode(tmp_path):
    names = [f"Müller_1_{n}.nii" for n in ("flair", "t1", "t1ce", "t2", "seg")]
    forms = ("NFC", "NFD", "NFD", "NFC", "NFD")
    pairs = zip(forms, names, strict=True)
    write_named(tmp_path, [unicodedata.normalize(*pair) for pair in pairs])
    (case,) = find_cases(tmp_path)
    assert case.id == unicodedata.normalize("NFC", "Müller_1")
    assert len(case.images) == 4 and case.segmentation is not None


def test_I1_both_conventions_of_brats_ped_are_named(tmp_path):
    write_labelled(tmp_path, "BraTS-PED-00002-000", (0, 1, 2, 3))
    with pytest.raises(BratsDataError, match="2024.*2023.*'0123'"):
        find_cases(tmp_path)


def test_R2_ids_that_end_like_a_modality_are_ids(tmp_path):
    ids = "P001_T0", "P001_T1", "P001_T2", "P002_flair"
    for number, case_id in enumerate(ids):
        names = [f"imagesTr/{case_id}_000{n}.nii.gz" for n in range(4)]
        label_map = f"labelsTr/{case_id}.nii.gz"
        write_named(tmp_path / "nnunet", [*names, label_map], number)
        names = [f"{n}.nii" for n in ("flair", "t1", "t1ce", "t2", "seg")]
        names = [f"{case_id}/{case_id}_{name}" for name in names]
        write_named(tmp_path / "folders", names, number)
    channels = dict(enumerate(("FLAIR", "T1", "T1CE", "T2")))
    described = {"background": 0, "NCR": 1, "edema": 2, "ET": 4}
    text = json.dumps({"channel_names": channels, "labels": described})
    (tmp_path / "nnunet" / "dataset.json").write_text(text)
    for folder in ("nnunet", "folders"):
        cases = find_cases(tmp_path / folder)
        assert [case.id for case in cases] == sorted(ids)
        assert all(len(c.images) == 4 and load_case(c)[1].any() for c in cases)


def test_A22_ids_that_differ_in_case_only_are_one_id_also_in_one_folder(tmp_path):
    for case_id in ("p1", "P1"):
        folder = write_case(tmp_path / case_id, case_id)
        for path in folder.iterdir():
            path.rename(tmp_path / path.name)
    with pytest.raises(BratsDataError, match="p1 appears twice: P1 in .* and p1 in "):
        find_cases(tmp_path)


def test_A25_a_missing_folder_has_no_segmentation_to_rename(tmp_path):
    with pytest.raises(BratsDataError, match="there is no folder .*nowhere"):
        rename_odd_segmentation(tmp_path / "nowhere")


def test_an_image_that_nobody_asked_for_is_not_checked(tmp_path):
    write_case(tmp_path, "P1")
    (case,) = find_cases(tmp_path, labels="0124")
    other = replace(case, images={**case.images, "adc": tmp_path / "missing.nii"})
    assert check_cases([other]).empty


def test_H1_a_saved_label_map_that_was_edited_is_left_as_it_is(toy_set, tmp_path):
    case, path = find_cases(toy_set)[0], tmp_path / "map.nii.gz"
    segmentation = load_case(case)[1]
    for _ in range(2):  # our own map is replaced
        save_segmentation(segmentation, case, path)
    image = nib.load(path)
    edited = np.array(image.dataobj)
    edited[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(edited, image.affine, image.header), path)
    with pytest.raises(ValueError, match="already exists and was not written by .* or"):
        save_segmentation(segmentation, case, path)
    assert nib.load(path).dataobj[0, 0, 0] == 1

"""The layouts in which people have the data: BraTS 2018 to 2023, the Decathlon."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import write_case

from brats_utils.cases import (
    ALL_MODALITIES,
    BratsDataError,
    check_cases,
    find_cases,
    load_case,
    load_labels,
    rename_odd_segmentation,
    save_segmentation,
)
from brats_utils.dataset import verify_dataset
from brats_utils.inference import predict_cases
from brats_utils.model import unet
from brats_utils.phantom import write_phantom
from brats_utils.prepare import prepare_dataset

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
    found = find_cases(root)
    assert {case.labels for case in found} == {labels}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_read_alike(layout, phantoms, tmp_path):
    found = in_layout(layout, phantoms, tmp_path)
    assert len(found) == len(phantoms) and check_cases(found).empty
    for case, phantom in zip(found, phantoms, strict=True):
        for modalities in (("flair", "t1ce", "t2"), ("t2", "t1"), ()):
            image, segmentation, affine = load_case(case, modalities)
            expected = load_case(phantom, modalities)
            np.testing.assert_array_equal(image, expected[0])
            np.testing.assert_array_equal(segmentation, expected[1])
            np.testing.assert_array_equal(affine, expected[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_prepared_alike(layout, phantoms, tmp_path):
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
    assert verify_dataset(tmp_path / "out").empty
    with open(found[0].images["t2"], "ab") as file:
        file.write(b"0")
    assert set(verify_dataset(tmp_path / "out")["case"]) == {found[0].id}
    with open(found[0].images["t2"], "rb+") as file:
        file.truncate(file.seek(0, 2) - 1)
    before = (tmp_path / "out" / "cases.csv").read_bytes()
    prepare_dataset(tmp_path / "raw", tmp_path / "out", **options)
    assert (tmp_path / "out" / "cases.csv").read_bytes() == before


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


def test_two_layouts_in_one_folder_are_refused(phantoms, tmp_path):
    in_layout("decathlon", phantoms[:1], tmp_path)
    write_case(tmp_path, "BraTS20_Training_001")
    with pytest.raises(BratsDataError, match="two layouts"):
        find_cases(tmp_path)


def test_four_images_in_one_file_are_refused_elsewhere(tmp_path):
    folder = write_case(tmp_path, "BraTS20_Training_001")
    path = folder / "BraTS20_Training_001_t1.nii"
    volume = np.asarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image(np.stack([volume] * 4, axis=-1), np.eye(4)), path)
    problems = check_cases(find_cases(tmp_path))
    assert "expected a 3-D volume" in problems["problem"][0]

import numpy as np
import pytest

from brats_utils.labels import (
    COLOURS,
    ENCODED_REGIONS,
    LABELS,
    REGIONS,
    decode_labels,
    encode_labels,
    label_table,
    naming,
    parse_name,
    read_channel_names,
    read_label_names,
    region_volumes_ml,
)


def test_labels_go_there_and_back():
    segmentation = np.array([[0, 1], [2, 4]], np.uint8)
    labels = encode_labels(segmentation)
    assert labels.tolist() == [[0, 1], [2, 3]]
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(decode_labels(labels), segmentation)


@pytest.mark.parametrize("value", [3, 5, 255, -1, 2.5, np.nan])
def test_another_value_is_refused_not_rounded(value):
    with pytest.raises(ValueError, match="expected only the labels .0, 1, 2, 4."):
        encode_labels(np.array([0, value]))


def test_label_three_is_refused_in_uint8_too():
    with pytest.raises(ValueError, match="found 3 in 1 voxels"):
        encode_labels(np.array([0, 3], np.uint8))
    with pytest.raises(ValueError, match="found 4 in 1 voxels"):
        decode_labels(np.array([0, 4], np.uint8))


def test_regions_nest_and_agree_in_both_encodings():
    assert set(REGIONS["ET"]) < set(REGIONS["TC"]) < set(REGIONS["WT"])
    for region, values in REGIONS.items():
        assert encode_labels(values).tolist() == list(ENCODED_REGIONS[region])
    assert set(COLOURS) == set(LABELS) - {0}


def test_region_volumes_by_hand():
    segmentation = np.zeros((4, 4, 4), np.uint8)
    segmentation[0, 0, :3] = [1, 2, 4]
    # A voxel of 2 x 5 x 10 mm is 0.1 ml; WT has 3 of them, TC 2, ET 1.
    volumes = region_volumes_ml(segmentation, (2, 5, 10))
    assert volumes == pytest.approx({"WT": 0.3, "TC": 0.2, "ET": 0.1})
    assert region_volumes_ml(segmentation * 0, (1, 1, 1))["ET"] == 0.0
    with pytest.raises(ValueError, match="3-D"):
        region_volumes_ml(segmentation[0], (1, 1, 1))


def test_I1_names_of_labels_since_2023_and_negations():
    since_2023 = {
        "background": 0,
        "Necrotic tumor core": 1,
        "Surrounding non-enhancing FLAIR hyperintensity": 2,
        "Enhancing tissue": 3,
    }
    assert read_label_names(since_2023) == {0: 0, 1: 1, 2: 2, 3: 4}
    short = {"0": "background", "1": "SNFH", "2": "NCR", "3": "ET"}
    assert read_label_names(short) == {0: 0, 1: 2, 2: 1, 3: 4}
    plain = {"background": 0, "not enhancing": 1, "edema": 2, "enhancing": 3}
    assert read_label_names(plain) == {0: 0, 1: 1, 2: 2, 3: 4}
    assert read_label_names({"background": 0, "tumour without enhancement": 1}) == {}


@pytest.mark.parametrize(
    "names, table",
    [
        (
            {"non-contrast-enhancing tumor core": 1, "edema": 2, "enhancing tumor": 3},
            {1: 1, 2: 2, 3: 4},
        ),
        ({"unenhancing core": 1, "edema": 2, "enhancing": 3}, {1: 1, 2: 2, 3: 4}),
        ({"enhancing part": 1, "edema": 2, "enhancing rim": 3}, {}),
        ({"whole tumor": [1, 2, 3], "tumor core": [2, 3], "ET": 3}, {1: 2, 2: 1, 3: 4}),
        ({"WT": [1, 2, 3], "TC": [2, 3], "necrosis": [3]}, {}),
        ({"brain": [1, 2, 3], "whole tumor": [2, 3], "tumor core": [3]}, {}),
        ({"whole tumor": [2, 3], "tumor core": [2, 3], "ET": [3, 1]}, {}),
    ],
)
def test_I1_names_that_are_not_understood_are_not_guessed(names, table):
    found = read_label_names({"background": 0, **names})
    assert {v: x for v, x in found.items() if v} == table


@pytest.mark.parametrize(
    "case_id, convention",
    [
        ("BraTS_2021_00001", "0124"),
        ("train_UPENN-GBM-00001_11", "0124"),
        ("BRATS_001", "0213"),
        ("BraTS-GLI-00001-000", "0123"),
        ("patient_7", ""),
        ("siteA_BraTS_001", ""),
    ],
)
def test_I1_the_sets_are_known_by_all_of_the_id(case_id, convention):
    assert naming(case_id)[1] == convention


@pytest.mark.parametrize(
    "case_id",
    ["sub-BraTS-GLI-02000-100", "BraTS_GLI_02000_100", "x_BraTS-PED-1-0"],
)
def test_I1_a_prefix_does_not_hide_an_uncertain_set(case_id):
    assert "labels=" in naming(case_id)[1]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("P0_T2-FLAIR.nii.gz", ("P0", "flair")),
        ("T2_FLAIR.nii.gz", ("", "flair")),
        ("brain_flair.nii", ("", "flair")),
        ("brain_001_flair.nii", ("brain_001", "flair")),
        ("sub-1_ce-gadolinium_T1w.nii.gz", ("sub-1", "t1ce")),
        ("sub-1_T1w.nii.gz", ("sub-1", "t1")),
        ("P0_T1-Gd.nii", ("P0", "t1ce")),
    ],
)
def test_R2_more_names_of_images(name, expected):
    assert parse_name(name) == expected


def test_J4_labels_out_of_range_are_a_plain_error():
    with pytest.raises(ValueError, match="labels is"):
        label_table({1: float("inf")})


@pytest.mark.parametrize(
    "name", ["post-contrast T1", "ce_T1", "T1 FLAIR", "FLAIR_T2", "T1 post", "ADC"]
)
def test_I1_a_channel_that_is_more_than_a_modality_is_refused(name):
    with pytest.raises(ValueError, match="its channels are"):
        read_channel_names({"channel_names": {"0": name}})
    named = {"modality": {"1": "T1w", "0": "FLAIR", "2": "t1 Gd", "3": "T2-FLAIR"}}
    assert read_channel_names(named) == ("flair", "t1", "t1ce", "flair")

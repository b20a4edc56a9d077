import numpy as np
import pytest
from conftest import toy_volumes
from sklearn.preprocessing import MinMaxScaler

from brats_utils.transforms import brain_box, crop_box, scale_volume


def test_minmax_is_sklearns_scaler_on_the_whole_volume():
    volume = toy_volumes()[0]["flair"]
    column = volume.reshape(-1, 1).astype(np.float64)
    expected = MinMaxScaler().fit_transform(column).reshape(volume.shape)
    np.testing.assert_allclose(scale_volume(volume), expected, atol=1e-7)


def test_zscore_by_hand_leaves_background_alone():
    scaled = scale_volume(np.array([[[0, 2, 4, 6]]]), "zscore")
    # Non-zero voxels 2, 4, 6: mean 4, SD sqrt(8 / 3).
    sd = np.sqrt(8 / 3)
    np.testing.assert_allclose(scaled[0, 0], [0, -2 / sd, 0, 2 / sd], rtol=1e-6)


def test_scaling_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match="blank"):
        scale_volume(np.full((2, 2, 2), 7))
    with pytest.raises(ValueError, match="NaN"):
        scale_volume(np.array([[[0, np.nan]]]))
    with pytest.raises(ValueError, match="method is"):
        scale_volume(np.zeros((2, 2, 2)), "slicewise")


def test_the_crop_holds_the_tumour_then_the_most_brain():
    image = np.zeros((20, 20, 20))
    image[2:18, 2:18, 2:18] = 1
    segmentation = np.zeros((20, 20, 20), int)
    segmentation[15:17, 9, 9] = 2
    x, y, z = crop_box(image, segmentation, (8, 16, 30))
    # X: 8 voxels that hold 15 and 16 and lie in the brain (2..17): start 9 or 10.
    assert x in (slice(9, 17), slice(10, 18))
    assert y == slice(2, 18)
    assert z == slice(0, 20)
    assert crop_box(image, shape=None) == (slice(2, 18),) * 3
    assert brain_box(image) == (slice(2, 18),) * 3


def test_a_tumour_larger_than_the_crop_keeps_its_most_voxels():
    image = np.ones((10, 4, 4))
    segmentation = np.zeros((10, 4, 4), int)
    segmentation[1:9, 0, 0] = 2
    segmentation[5:9, 1:3, 1:3] = 2
    x = crop_box(image, segmentation, (4, 4, 4))[0]
    assert x == slice(5, 9)


def test_the_crop_refuses_an_empty_image_and_a_wrong_shape():
    with pytest.raises(ValueError, match="no brain"):
        crop_box(np.zeros((4, 4, 4)), shape=(2, 2, 2))
    with pytest.raises(ValueError, match="no brain"):
        brain_box(np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match="three positive"):
        crop_box(np.ones((4, 4, 4)), shape=(2, 2))

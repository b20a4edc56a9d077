"""Slices: which one, which way up, and what is drawn over it."""

import numpy as np
from test_plotting import close_figures, drawn, toy  # noqa: F401

from brats_utils.slices import best_slice, plot_slices


def test_best_slice_by_content(toy):  # noqa: F811
    segmentation = toy[1]
    assert best_slice(segmentation, axis=2) == 4
    assert best_slice(segmentation, axis=0) == 7
    assert best_slice(np.zeros((4, 6, 9)), axis=1) == 3


def test_pictures_are_upright():
    volume = np.zeros((5, 4, 3))
    volume[0, 0, 0] = 1  # right, front, foot
    volume[4, 3, 2] = 2  # left, back, head
    axial = drawn(plot_slices([volume], index=0, axis=2)[0], 0)
    assert axial.shape == (4, 5) and axial[0, 0] == 1
    coronal = drawn(plot_slices([volume], index=3, axis=1)[0], 0)
    assert coronal.shape == (3, 5) and coronal[0, 4] == 2
    sagittal = drawn(plot_slices([volume], index=0, axis=0)[0], 0)
    assert sagittal.shape == (3, 4) and sagittal[2, 0] == 1


def test_plot_slices_outlines_a_box_and_keeps_it_in_view(toy):  # noqa: F811
    volume = toy[0][..., 0]
    box = (slice(0, 20), slice(3, 9), slice(0, 10))
    axes = plot_slices([volume, volume], ["box", "no box"], boxes=[box, None], axis=1)
    outline = axes[0].patches[0]
    # Z 0 to 9 of 12 lie in the rows 2 to 11, as the head is on top.
    assert outline.get_xy() == (-0.5, 1.5)
    assert (outline.get_width(), outline.get_height()) == (20, 10)
    assert axes[1].get_xlim() == axes[0].get_xlim() == (-0.5, 19.5)
    assert not axes[1].patches

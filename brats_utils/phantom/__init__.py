"""Synthetic patients, so that every notebook runs without a download.

`anatomy` draws heads with tumours, `wide` draws more varied ones, and `write` saves
them as a BraTS2020 data set.
"""

from brats_utils.phantom.write import write_phantom as write_phantom

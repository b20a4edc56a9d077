"""Helpers behind the notebooks: from BraTS2020 scans to a trained 3D U-Net.

Importing the package imports nothing heavy; take what you need from its modules,
`from brats_utils.cases import find_cases`, say.
"""

__version__ = "0.2.0.dev0"

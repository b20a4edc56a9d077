"""A training step of the tutorial recipe's U-Net, in Keras and in torch.

96 x 96 x 96 voxels, batch 2, float32. The peak is what the same machine reaches in a
matrix product; the backward pass counts as two forward passes.
"""

from statistics import median

import keras
import numpy as np
import seed_recipe
from common import in_turn, is_there, print_rows, print_times

from brats_utils.losses import dice_cross_entropy_loss
from brats_utils.model import model_table

SHAPE, BATCH, N = (96, 96, 96), 2, 4096


def torch_net():
    """Return the tutorial recipe's U-Net in torch."""
    import torch
    from torch import nn

    def block(n_in, n_out, dropout):
        return nn.Sequential(
            nn.Conv3d(n_in, n_out, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv3d(n_out, n_out, 3, padding=1),
            nn.ReLU(),
        )

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths = {16: 0.1, 32: 0.1, 64: 0.2, 128: 0.2, 256: 0.3}
            n_in, self.down, self.up, self.join = 3, *(nn.ModuleList() for _ in "123")
            for width, dropout in widths.items():
                self.down.append(block(n_in, width, dropout))
                n_in = width
            for width in (128, 64, 32, 16):
                self.up.append(nn.ConvTranspose3d(2 * width, width, 2, 2))
                self.join.append(block(2 * width, width, widths[width]))
            self.head = nn.Conv3d(16, 4, 1)

        def forward(self, x):
            skips = []
            for i, stage in enumerate(self.down):
                x = stage(nn.functional.max_pool3d(x, 2) if i else x)
                skips.append(x)
            for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
                x = join(torch.cat([up(x), skip], dim=1))
            return self.head(x)

    return UNet().to(memory_format=torch.channels_last_3d)


def torch_step():
    """Return a function that takes one step in torch."""
    import torch

    net = torch_net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    x = torch.randn(BATCH, 3, *SHAPE).to(memory_format=torch.channels_last_3d)
    y = torch.randint(0, 4, (BATCH, *SHAPE))

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def keras_step(loss):
    """Return a function that takes one step in Keras."""
    model = seed_recipe.tutorial_unet((*SHAPE, 3))
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=False)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, *SHAPE, 3), np.float32)
    y = rng.integers(0, 4, (BATCH, *SHAPE, 1))
    return lambda: model.train_on_batch(x, y)


def main():
    """Print the tables on a training step."""
    matrix = keras.random.normal((N, N))

    def product():
        keras.ops.convert_to_numpy(keras.ops.matmul(matrix, matrix)[0, 0])

    works = {
        "Keras, cross-entropy": keras_step("sparse_categorical_crossentropy"),
        "Keras, Dice and cross-entropy": keras_step(dice_cross_entropy_loss),
        f"matrix product of {N}": product,
    }
    if is_there("torch"):
        works["torch, cross-entropy"] = torch_step()
    seconds = in_turn(works)
    ours = "Keras, cross-entropy"
    title = "A training step, the recipe's U-Net, 96³, batch 2"
    print_times(title, seconds, ours=ours, aims={"torch, cross-entropy": "≥ 1.3"})
    forward = model_table(seed_recipe.tutorial_unet((*SHAPE, 3))).loc["total", "GFLOP"]
    peak = 2 * N**3 / 1e9 / median(seconds[f"matrix product of {N}"])
    rate = 3 * BATCH * forward / median(seconds[ours])
    rows = {
        "the machine's matrix product, GFLOP/s": (f"{peak:.0f}", ""),
        "a step, GFLOP/s": (f"{rate:.0f}", ""),
        "share of the peak": (f"{rate / peak:.0%}", "≥ 70 %"),
    }
    print_rows("Share of the machine's peak", rows)


if __name__ == "__main__":
    main()

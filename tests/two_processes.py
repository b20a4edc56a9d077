"""One training by several processes, on JAX: the loss is that of a single one.

    KERAS_BACKEND=jax python tests/two_processes.py HOST:PORT,HOST:PORT RANK

is started on each host with its own rank, 0 and 1; with one address, alone. Each
process gives its part of every batch; gradients are shared, weights are the same. On
CPUs JAX also wants JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo.
"""

import json
import sys

import keras
import numpy as np

from brats_utils.losses import batch_dice_cross_entropy_loss
from brats_utils.model import unet


class Batches(keras.utils.PyDataset):
    """Four batches of random patches, of which a process gives its part."""

    def __init__(self, rank, n_processes, size=2):
        super().__init__()
        rng = np.random.default_rng(0)
        x = rng.standard_normal((4, size, 8, 8, 8, 3), np.float32)
        y = rng.integers(0, 4, (4, size, 8, 8, 8, 1), np.uint8)
        part = slice(rank, None, n_processes)
        self.x, self.y = x[:, part], y[:, part]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def main(addresses, rank):
    """Train two epochs and print the losses."""
    n_processes = len(addresses.split(","))
    if n_processes > 1:
        keras.distribution.initialize(addresses, n_processes, rank)
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    keras.utils.set_random_seed(1)
    model = unet((8, 8, 8, 3), filters=2, depth=2)
    model.compile(keras.optimizers.SGD(0.1), batch_dice_cross_entropy_loss)
    history = model.fit(Batches(rank, n_processes), epochs=2, verbose=0)
    print(json.dumps(history.history["loss"]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

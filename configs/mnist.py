"""Improved MeanFlow on MNIST, 28x28, by class: one step on a laptop.

Row meanflow is MeanFlow itself, with more guidance; row fashion is the same on Fashion-MNIST.

OpenML has the data: they are fetched once, through scikit-learn. Without a network, name a file:
--config.data.name=arrays --config.data.path=FILE.npz (x uint8 [N, 28, 28, 1] and label).
Hardware: two CPU cores, 18 minutes at 0.42 s a step. 64 rows are computed at once, since more do
not fit the cache. Measured on 9,000 of 10,000 digits in a file: 98.7 % of one-step samples in their
class (real ones 98.5 %), Frechet distance 6.3 beside 3.6 of as many real ones. docs/recipes.md has
what was tried.
Command: bash launch/local.sh --config=configs/mnist.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits
from configs.rows import choose

# what docs/results.md compares, and Fashion-MNIST was measured with
MEANFLOW = {
    "objective.name": "meanflow",
    "objective.velocity": "head",
    "coupling.name": "independent",
    "guidance.omega": 1.8,
    "train.num_steps": 2400,
}
ROWS = {"": {}, "meanflow": MEANFLOW, "fashion": MEANFLOW | {"data.dataset": "Fashion-MNIST"}}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row; times and weight are those of the digits."""
    config = digits()
    config.data.name, config.data.dataset, config.data.image_size = "openml", "mnist_784", 28
    config.model.depth, config.model.width, config.model.num_heads = 4, 128, 4
    config.model.patch_size = 7
    config.objective.name, config.objective.velocity = "improved_meanflow", "boundary"
    config.optim.name, config.optim.lr = "muon", 0.015
    config.guidance.omega, config.draws.label_drop_share = 1.5, 0.1
    config.train.num_steps, config.train.batch_size, config.train.microbatch = 2500, 128, 64
    config.ema.decays = (0.998,)
    config.update_from_flattened_dict(choose("configs/mnist.py", row, ROWS))
    return config

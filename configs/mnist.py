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

from configs.digits import get_config as digits
from configs.rows import join, table

SHARED = dict(  # times and weight are those of the digits
    data=dict(name="openml", dataset="mnist_784", image_size=28),
    model=dict(depth=4, width=128, num_heads=4, patch_size=7),
    objective=dict(name="improved_meanflow", velocity="boundary"),
    optim=dict(name="muon", lr=0.015),
    guidance=dict(omega=1.5),
    draws=dict(label_drop_share=0.1),
    train=dict(num_steps=2500, batch_size=128, microbatch=64),
    ema=dict(decays=(0.998,)),
)
MEANFLOW = dict(  # what docs/results.md compares, and Fashion-MNIST was measured with
    objective=dict(name="meanflow", velocity="head"),
    coupling=dict(name="independent"),
    guidance=dict(omega=1.8),
    train=dict(num_steps=2400),
)
FASHION = join(MEANFLOW, dict(data=dict(dataset="Fashion-MNIST")))
ROWS = {"": {}, "meanflow": MEANFLOW, "fashion": FASHION}
get_config = table("configs/mnist.py", digits, SHARED, ROWS)

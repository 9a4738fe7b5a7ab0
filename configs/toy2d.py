"""MeanFlow on 2-D points: two moons; data.toy names four more, the checkerboard is the hardest.

Hardware: 2 CPU cores, under 2 minutes. Expected: one-step samples on both moons, see scatter.png.
Command: bash launch/local.sh --config=configs/toy2d.py
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name = "toy2d"
    config.data.toy = "two_moons"
    config.model.name = "mlp"
    config.model.depth = 3
    config.model.width = 128
    config.weight.p = 0.25
    config.times.name = "uniform"
    config.draws.instant_share = 0.5
    config.draws.label_drop_share = 0.0
    config.train.num_steps = 2500
    config.train.batch_size = 512
    config.optim.lr = 3e-3
    config.optim.schedule = "cosine"
    config.ema.decays = (0.995,)
    config.log.sample_every_steps = 500
    config.checkpoint.every_steps = 1000
    config.sample.num = 5000
    config.eval.num_samples = 5000
    return config

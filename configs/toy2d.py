"""MeanFlow on 2-D points: two moons; data.toy names four more, the checkerboard is the hardest.

Hardware: 2 CPU cores, under 2 minutes. Expected: one-step samples on both moons, see scatter.png.
Command: bash launch/local.sh --config=configs/toy2d.py
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name, config.data.toy = "toy2d", "two_moons"
    config.model.name, config.model.depth, config.model.width = "mlp", 3, 128
    config.weight.p, config.times.name = 0.25, "uniform"
    config.draws.instant_share, config.draws.label_drop_share = 0.5, 0.0
    config.train.num_steps, config.train.batch_size = 2500, 512
    config.optim.lr, config.optim.schedule = 3e-3, "cosine"
    config.ema.decays = (0.995,)
    config.log.sample_every_steps, config.checkpoint.every_steps = 500, 1000
    config.sample.num = config.eval.num_samples = 5000
    return config

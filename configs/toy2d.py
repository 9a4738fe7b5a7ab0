"""MeanFlow on 2-D points: a checkerboard by default; data.toy names four more.

Hardware: 2 CPU cores, under 2 minutes. Expected: scatter.png shows the board's fields with clear edges in one step.
Command: bash launch/local.sh --config=configs/toy2d.py
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name = "toy2d"
    config.model.name = "mlp"
    config.model.depth = 4
    config.model.width = 128
    config.weight.p = 0.5
    config.draws.instant_share = 0.5
    config.draws.label_drop_share = 0.0
    config.train.num_steps = 8000
    config.train.batch_size = 512
    config.optim.lr = 2e-3
    config.optim.schedule = "cosine"
    config.ema.decays = (0.995,)
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 2000
    config.sample.num = 5000
    config.eval.num_samples = 5000
    return config

"""MeanFlow on the 1,797 real 8x8 digits of scikit-learn, class-conditional, without guidance: the main job.

Hardware: 2 CPU cores, about 4 minutes. Expected at one step: a Fréchet distance near the real-data floor, 98 % of the
samples in their class. Times lean towards long intervals, which a single step needs most (see README, "Choices").
Command: bash launch/local.sh
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.times.t_mean, config.times.t_std = 0.4, 1.2
    config.times.r_mean, config.times.r_std = -2.0, 1.4
    config.draws.instant_share = 0.5
    config.draws.label_drop_share = 0.0
    config.weight.p = 0.5
    config.train.num_steps = 3600
    config.optim.lr = 2e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.ema.decays = (0.995,)
    config.log.sample_every_steps = 500
    return config

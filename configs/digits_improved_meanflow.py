"""Improved MeanFlow on the digits (arXiv 2512.02012): a second head for the velocity, guidance chosen when sampling.

Hardware: 2 CPU cores, about a quarter of an hour: 20 tokens of class, guidance and time stand before the 4 patches.
Sampled with another guidance by --mode=sample --config.sample.guidance=2.0,0.0,1.0.
Command: bash launch/local.sh --config=configs/digits_improved_meanflow.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.model.name = "in_context_dit"
    config.train.num_steps = 1500
    config.objective.name = "improved_meanflow"
    config.draws.label_drop_share = 0.1
    config.draws.omega_max = 4.0
    return config

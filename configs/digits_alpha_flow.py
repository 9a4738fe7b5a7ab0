"""alpha-Flow on the digits (arXiv 2510.20771): from flow matching to MeanFlow along a sigmoid over the run.

Hardware: 2 CPU cores, minutes. Until half of the run alpha is near 1.
Command: bash launch/local.sh --config=configs/digits_alpha_flow.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "alpha_flow"
    config.objective.anneal_to = config.train.num_steps
    return config

"""Terminal velocity matching on the digits (arXiv 2511.19797): the end of a step moves with the flow.

Hardware: 2 CPU cores, about 8 minutes: a step costs twice one of MeanFlow. An adaptive weight (p > 0) favours rows of
small error: here those that look at no data. Times are uniform: the identity in r must hold all the way from t down.
Command: bash launch/local.sh --config=configs/digits_terminal_velocity.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "terminal_velocity"
    config.objective.target_ema = 0.99
    config.times.name = "uniform"
    config.weight.p = 0.0
    return config

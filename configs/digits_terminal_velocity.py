"""Terminal velocity matching on the digits (arXiv 2511.19797): the end of a step moves with the flow.

Hardware: 2 CPU cores, about 8 minutes. A step costs 1.5 to 2 times one of MeanFlow.
Command: bash launch/local.sh --config=configs/digits_terminal_velocity.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "terminal_velocity"
    config.objective.target_ema = 0.99
    return config

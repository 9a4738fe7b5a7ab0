"""SoFlow on the digits (arXiv 2512.15657): alpha-Flow from 0.1 to 0.002 along an exponential, without derivative.

Hardware: 2 CPU cores, minutes. No JVP is computed.
Command: bash launch/local.sh --config=configs/digits_soflow.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "alpha_flow"
    config.objective.annealing = "exponential"
    config.objective.alpha_start, config.objective.alpha_end = 0.1, 0.002
    config.objective.derivative_below = 0.0
    config.objective.anneal_to = config.train.num_steps
    return config

"""Consistency training on the digits (arXiv 2303.01469): MeanFlow whose intervals all end at the data.

Hardware: 2 CPU cores, minutes. One step is all that it learns.
Command: bash launch/local.sh --config=configs/digits_consistency.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.times.name = "consistency"
    config.eval.steps = (1,)
    return config

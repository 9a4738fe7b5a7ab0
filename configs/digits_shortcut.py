"""Shortcut models on the digits (arXiv 2410.12557): SplitMeanFlow at the midpoint of dyadic steps.

Hardware: 2 CPU cores, minutes. No JVP is computed. An adaptive weight (p > 0) favours rows of small error: here those
that look at no data, which then agree with one another alone.
Command: bash launch/local.sh --config=configs/digits_shortcut.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "split_meanflow"
    config.objective.split = "midpoint"
    config.objective.target_ema = 0.99
    config.times.name = "dyadic"
    config.times.levels = 5
    config.weight.p = 0.0
    return config

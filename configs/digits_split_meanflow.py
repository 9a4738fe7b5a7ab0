"""SplitMeanFlow on the digits (arXiv 2507.16884): an interval is the sum of its two parts, split anywhere.

Hardware: 2 CPU cores, minutes. No JVP is computed. An adaptive weight (p > 0) favours rows of small error: here those
that look at no data, which then agree with one another alone.
Command: bash launch/local.sh --config=configs/digits_split_meanflow.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "split_meanflow"
    config.weight.p = 0.0
    return config

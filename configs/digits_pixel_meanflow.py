"""Pixel MeanFlow on the digits (arXiv 2601.22158): the network predicts the picture, and u follows.

Hardware: 2 CPU cores, about a quarter of an hour: 20 tokens of class, guidance and time stand before the 4 patches.
Times lean to noise, as published.
Command: bash launch/local.sh --config=configs/digits_pixel_meanflow.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.model.name = "in_context_dit"
    config.train.num_steps = 1500
    config.model.prediction = "data"
    config.objective.name = "pixel_meanflow"
    config.times.t_mean, config.times.t_std = 0.8, 0.8
    config.times.r_mean, config.times.r_std = 0.8, 0.8
    return config

"""Pixel MeanFlow on ImageNet 256x256, L/16 on pixels: 2.52 FID at one step with perceptual terms (arXiv 2601.22158).

410M parameters in sampling, 512M in training, 320 epochs, batch 1024. Without the perceptual terms, which are no part
of this project, expect a much higher figure.
Hardware: GPUs or TPUs; about 415 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 7 for t in [0.2, 0.7], the average of 1000 kimg.
Command: python -m mf_jax.main --config=configs/imagenet_pmf_l16.py
"""

from ml_collections import ConfigDict

from configs.imagenet_pmf_b16 import get_config as imagenet_pmf_b16


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_pmf_b16()
    config.model.size = "pixel_L"
    config.model.remat, config.model.scan = "dots", True
    config.draws.omega_power = 2.0
    config.sample.guidance, config.sample.ema = (7.0, 0.2, 0.7), "1000kimg"
    config.eval.emas = ("1000kimg",)
    config.eval.omegas, config.eval.intervals = (7.0,), ((0.2, 0.7),)
    return config

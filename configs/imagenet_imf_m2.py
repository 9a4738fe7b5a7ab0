"""Improved MeanFlow on ImageNet 256x256, M/2 on latents: 2.27 FID at one step (arXiv 2512.02012).

174M parameters in sampling, 231M in training, 640 epochs, batch 1024.
Hardware: GPUs or TPUs; about 345 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 10.5 for t in [0.4, 0.6].
Command: python -m mf_jax.main --config=configs/imagenet_imf_m2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_imf_b2 import get_config as imagenet_imf_b2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_imf_b2()
    config.model.size = "M"
    config.model.remat, config.model.scan = "dots", True
    config.sample.guidance = (10.5, 0.4, 0.6)
    config.eval.omegas, config.eval.intervals = (10.5,), ((0.4, 0.6),)
    return config

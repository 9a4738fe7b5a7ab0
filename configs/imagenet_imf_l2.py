"""Improved MeanFlow on ImageNet 256x256, L/2 on latents: 1.86 FID at one step (arXiv 2512.02012).

409M parameters in sampling, 510M in training, 640 epochs, batch 1024.
Hardware: GPUs or TPUs; about 765 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 10.5 for t in [0.4, 0.6].
Command: python -m mf_jax.main --config=configs/imagenet_imf_l2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_imf_m2 import get_config as imagenet_imf_m2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_imf_m2()
    config.model.size = "L"
    config.model.remat = "block"
    return config

"""Improved MeanFlow on ImageNet 512x512, XL/2 on latents of 64x64x4; no figure is published.

610M parameters in sampling and the recipe of configs/imagenet_imf_xl2.py; latents are taken to have the same mean and
spread.
Hardware: GPUs or TPUs; about 4,700 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not
measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at one step.
Command: python -m mf_jax.main --config=configs/imagenet512_imf_xl2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_imf_xl2 import get_config as imagenet_imf_xl2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_imf_xl2()
    config.data.path, config.data.image_size = "data/imagenet512_latents", 512
    config.eval.references = ("data/imagenet512_reference.npz",)
    config.eval.batch_size = 250
    return config

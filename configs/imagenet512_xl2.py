"""MeanFlow on ImageNet 512x512, DiT-XL/2 on latents of 64x64x4, guided; no figure is published.

676M parameters and the recipe of configs/imagenet_xl2.py; 1,024 tokens cost more than four times what 256 cost.
Hardware: GPUs or TPUs; about 1,020 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not
measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/imagenet512_xl2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_xl2 import get_config as imagenet_xl2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_xl2()
    config.data.path, config.data.image_size = "data/imagenet512_latents", 512
    config.eval.references = ("data/imagenet512_reference.npz",)
    config.eval.batch_size = 250
    return config

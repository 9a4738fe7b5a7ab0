"""Improved MeanFlow on ImageNet 256x256, XL/2 on latents: 1.72 FID at one step, 1.54 at two (arXiv 2512.02012).

610M parameters in sampling, 711M in training, 640 epochs, batch 1024.
Hardware: GPUs or TPUs; about 1,100 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not
measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, omega 8 for t in [0.42, 0.62]. Two steps want other
guidance: --config.eval.steps="(2,)" --config.eval.omegas="(4.0,)" --config.eval.intervals="((0.36,0.64),)".
Command: python -m mf_jax.main --config=configs/imagenet_imf_xl2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_imf_l2 import get_config as imagenet_imf_l2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_imf_l2()
    config.model.size = "XL"
    config.sample.guidance = (8.0, 0.42, 0.62)
    config.eval.omegas, config.eval.intervals = (8.0,), ((0.42, 0.62),)
    return config

"""MeanFlow on ImageNet 256x256, DiT-L/2 on latents, guided: 3.84 FID at one step (arXiv 2505.13447).

459M parameters, 240 epochs, batch 256, guidance 2.5 in the target for t up to 0.8.
Hardware: GPUs or TPUs; about 155 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/imagenet_l2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_m2 import get_config as imagenet_m2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_m2()
    config.model.size = "L"
    config.guidance.omega, config.guidance.kappa, config.guidance.t_end = 0.2, 0.92, 0.8
    return config

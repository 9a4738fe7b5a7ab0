"""MeanFlow on ImageNet 256x256, DiT-XL/2 on latents, guided: 3.43 FID at one step, 2.93 at two (arXiv 2505.13447).

676M parameters, 240 epochs, batch 256, guidance 2.5 in the target for t up to 0.75. 1000 epochs,
--config.train.num_steps=5004558, give 2.20 at two steps.
Hardware: GPUs or TPUs; about 255 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at 1 and 2 steps.
The objective of improved MeanFlow on this network, 2.99: --config.objective.name=improved_meanflow
--config.objective.velocity=boundary.
Command: python -m mf_jax.main --config=configs/imagenet_xl2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_l2 import get_config as imagenet_l2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_l2()
    config.model.size = "XL"
    config.model.remat = "block"
    config.guidance.t_end = 0.75
    return config

"""alpha-Flow on ImageNet 256x256, DiT-XL/2 on latents: 2.95 FID at one step, 2.34 at two (arXiv 2510.20771).

676M parameters, 240 epochs, batch 256; alpha moves between steps 600,000 and 1,000,000. The latents are those of
sd-vae-ft-ema. The two-step figure is of consistency sampling, which adds noise in between; here the flow is followed.
Hardware: GPUs or TPUs; about 255 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples of random classes, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/imagenet_alphaflow_xl2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_xl2 import get_config as imagenet_xl2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_xl2()
    config.data.autoencoder, config.data.path = "sd-vae-ft-ema", "data/imagenet256_latents_ema"
    config.objective.name = "alpha_flow"
    config.objective.anneal_from, config.objective.anneal_to = 600_000, 1_000_000
    config.draws.instant_share = 0.5
    config.optim.clip_norm = 16.0
    config.eval.labels = "random"
    return config

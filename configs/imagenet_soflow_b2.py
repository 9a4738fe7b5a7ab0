"""SoFlow on ImageNet 256x256, DiT-B/2 on latents: 4.85 FID at one step, 4.24 at two (arXiv 2512.15657).

131M parameters, 240 epochs, batch 256, no derivative. Guidance and weight are those of configs/imagenet_b2.py; the
published ones were not found.
Hardware: GPUs or TPUs; about 45 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/imagenet_soflow_b2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_b2 import get_config as imagenet_b2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_b2()
    config.objective.name, config.objective.annealing = "alpha_flow", "exponential"
    config.objective.alpha_start, config.objective.alpha_end = 0.1, 0.002
    config.objective.derivative_below = 0.0
    config.objective.anneal_to = config.train.num_steps
    return config

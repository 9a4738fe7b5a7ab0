"""Flow matching on ImageNet 256x256, DiT-B/2 on latents: the multi-step baseline of configs/imagenet_b2.py.

131M parameters, 240 epochs, batch 256, no guidance. It knows the velocity alone, so one step is poor and many are
good; no figure is published for this recipe.
Hardware: GPUs or TPUs; about 30 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at up to 250 steps.
Command: python -m mf_jax.main --config=configs/imagenet_fm_b2.py
"""

from ml_collections import ConfigDict

from configs.imagenet_b2 import get_config as imagenet_b2


def get_config() -> ConfigDict:
    """Return the config."""
    config = imagenet_b2()
    config.objective.name = "flow_matching"
    config.guidance.kappa = 0.0
    config.draws.instant_share = 1.0
    config.sample.steps = 64
    config.eval.steps = (1, 4, 16, 64, 250)
    return config

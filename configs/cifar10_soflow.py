"""SoFlow on CIFAR-10, unconditional, the U-Net: 2.86 FID at one step, 2.28 at two (arXiv 2512.15657).

56M parameters, 800,000 steps of batch 1024, no derivative. Batch, rates, times and weight are those of
configs/cifar10.py but for the share of rows with r = t; the published ones were not found.
Hardware: GPUs or TPUs; about 150 H100 hours, reckoned from its operations at 40 % of the TF32 peak, not measured.
Evaluation: --mode=eval, 50,000 samples, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/cifar10_soflow.py
"""

from ml_collections import ConfigDict

from configs.cifar10 import get_config as cifar10


def get_config() -> ConfigDict:
    """Return the config."""
    config = cifar10()
    config.draws.instant_share = 0.75
    config.objective.name, config.objective.annealing = "alpha_flow", "exponential"
    config.objective.alpha_start, config.objective.alpha_end = 0.1, 0.002
    config.objective.derivative_below = 0.0
    config.objective.anneal_to = config.train.num_steps
    return config

"""MeanFlow on CIFAR-10, unconditional, U-Net of 56M parameters: 2.92 FID (arXiv 2505.13447).

800,000 steps of batch 1024, three quarters of the rows with r < t. The published run also scales,
moves and stretches pictures as EDM does; here they are only mirrored. data.path is a flat folder of
the 50,000 training pictures. Later times give 2.8 to 2.9: times.t_mean=-0.6 t_std=1.6 r_mean=-4.0
r_std=1.6. Row soflow: SoFlow, 2.86 FID at one step, 2.28 at two (arXiv 2512.15657). Its batch,
rates, times and weight were not found; here they are MeanFlow's.
Hardware: GPUs or TPUs; 170 H100 hours (soflow 150), reckoned at 40 % of the TF32 peak.
Evaluation: --mode=eval, 50,000 samples, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/cifar10.py (or configs/cifar10.py:soflow)
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose, soflow

STEPS = 800_000
ROWS = {"": {}, "soflow": soflow(STEPS) | {"draws.instant_share": 0.75}}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row, by default of MeanFlow."""
    config = defaults()
    config.data.name, config.data.path = "image_folder", "data/cifar10"
    config.data.image_size, config.data.flip = 32, True
    config.data.held_out_share = 1e-6  # one picture: evaluation has its reference
    config.model.name, config.model.dropout = "unet", 0.2
    config.times.t_mean = config.times.r_mean = -2.0
    config.times.t_std = config.times.r_std = 2.0
    config.draws.instant_share, config.draws.label_drop_share = 0.25, 0.0
    config.weight.p, config.weight.c = 0.75, 1e-3
    config.train.num_steps, config.train.batch_size = STEPS, 1024
    config.optim.lr, config.optim.warmup_steps, config.optim.b2 = 6e-4, 10_000, 0.999
    config.ema.decays, config.ema.rampup = (0.99995,), 0.0
    config.log.sample_every_steps = config.checkpoint.every_steps = 5_000
    config.eval.num_samples, config.eval.steps = 50_000, (1, 2)
    config.eval.references = ("data/cifar10_reference.npz",)
    config.update_from_flattened_dict(choose("configs/cifar10.py", row, ROWS))
    return config

"""MeanFlow on CIFAR-10, unconditional, the U-Net: 2.92 FID at one step (arXiv 2505.13447).

56M parameters (55.7M and a second time embedding), 800,000 steps of batch 1024, three quarters of the rows with r <
t. The published run also scales, moves and stretches pictures as EDM does; here they are only mirrored. data.path is
a flat folder of the 50,000 training pictures.
Hardware: GPUs or TPUs; about 170 H100 hours, reckoned from its operations at 40 % of the TF32 peak, not measured.
Later times give 2.8 to 2.9: --config.times.t_mean=-0.6 --config.times.t_std=1.6 --config.times.r_mean=-4.0
--config.times.r_std=1.6.
Evaluation: --mode=eval, 50,000 samples, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/cifar10.py
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name, config.data.path = "image_folder", "data/cifar10"
    config.data.image_size, config.data.flip = 32, True
    config.data.held_out_share = 1e-6  # one picture: evaluation has its reference
    config.model.name, config.model.dropout = "unet", 0.2
    config.times.t_mean = config.times.r_mean = -2.0
    config.times.t_std = config.times.r_std = 2.0
    config.draws.instant_share, config.draws.label_drop_share = 0.25, 0.0
    config.weight.p, config.weight.c = 0.75, 1e-3
    config.train.num_steps, config.train.batch_size = 800_000, 1024
    config.optim.lr, config.optim.warmup_steps, config.optim.b2 = 6e-4, 10_000, 0.999
    config.ema.decays = (0.99995,)
    config.log.sample_every_steps = config.checkpoint.every_steps = 5_000
    config.eval.num_samples, config.eval.steps = 50_000, (1, 2)
    config.eval.references = ("data/cifar10_reference.npz",)
    return config

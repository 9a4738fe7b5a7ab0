"""MeanFlow on CIFAR-10, unconditional, U-Net of 56M parameters: 2.8 to 2.9 FID.

The settings are those of the published code, three quarters of the rows with r < t. Row paper has
the times of its paper, 2.92 FID (arXiv 2505.13447). Pictures are moved as EDM does, and the network
is told how. data.path is a flat folder of the 50,000 training pictures. Row soflow: SoFlow, 2.86
FID at one step, 2.28 at two (arXiv 2512.15657). Its batch, steps, warm-up and the decays of its
optimiser were not found; batch, steps and decays are MeanFlow's.
Hardware: GPUs or TPUs; 165 H100 hours (soflow 145), reckoned at 40 % of the TF32 peak.
Evaluation: --mode=eval, 50,000 samples, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/cifar10.py (or configs/cifar10.py:soflow)
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose, soflow_as_published

STEPS = 768_000
"""16,000 epochs of 48 batches."""
ROWS = {
    "": {},
    "paper": {"times.order": "swap"}
    | {f"times.{letter}_mean": -2.0 for letter in "tr"}
    | {f"times.{letter}_std": 2.0 for letter in "tr"},
    "soflow": soflow_as_published(STEPS)
    | {
        "objective.alpha_start": 1.0,
        "objective.alpha_end": 0.0003125,
        "times.t_mean": -0.9,
        "draws.instant_share": 0.0,
        "model.dropout": 0.30,
        "optim.name": "radam",
        "optim.lr": 1e-4,
        "optim.warmup_steps": 0,  # radam has its own
        "ema.decays": (0.9999,),
        "eval.emas": ("",),
    },
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row, by default of MeanFlow."""
    config = defaults()
    config.data.name, config.data.path = "image_folder", "data/cifar10"
    config.data.image_size, config.data.augment = 32, "edm"
    config.data.held_out_share = 1e-6  # one picture: evaluation has its reference
    config.model.name, config.model.dropout = "unet", 0.2
    config.times.t_mean, config.times.t_std = -0.6, 1.6
    config.times.r_mean, config.times.r_std, config.times.order = -4.0, 1.6, "clip"
    config.draws.instant_share, config.draws.label_drop_share = 0.25, 0.0
    config.weight.p, config.weight.c = 0.75, 1e-3
    config.train.num_steps, config.train.batch_size = STEPS, 1024
    config.optim.lr, config.optim.warmup_steps, config.optim.b2 = 6e-4, 9_600, 0.999
    config.ema.decays, config.ema.every_steps = (0.9999, 0.99995, 0.9996), 16
    config.ema.rampup = 0.0
    config.log.sample_every_steps = config.checkpoint.every_steps = 5_000
    config.eval.num_samples, config.eval.steps = 50_000, (1, 2)
    config.eval.emas = ("0.9999", "0.99995", "0.9996")
    config.eval.references = ("data/cifar10_reference.npz",)
    config.update_from_flattened_dict(choose("configs/cifar10.py", row, ROWS))
    return config

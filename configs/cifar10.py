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

from configs.default import get_config as defaults
from configs.rows import join, soflow_as_published, table

STEPS = 768_000
"""16,000 epochs of 48 batches."""
SHARED = dict(
    data=dict(name="image_folder", path="data/cifar10", image_size=32, augment="edm")
    | dict(held_out_share=1e-6),  # one picture: evaluation has its reference
    model=dict(name="unet", dropout=0.2),
    times=dict(t_mean=-0.6, t_std=1.6, r_mean=-4.0, r_std=1.6, order="clip"),
    draws=dict(instant_share=0.25, label_drop_share=0.0),
    weight=dict(p=0.75, c=1e-3),
    train=dict(num_steps=STEPS, batch_size=1024),
    optim=dict(lr=6e-4, warmup_steps=9_600, b2=0.999),
    ema=dict(decays=(0.9999, 0.99995, 0.9996), every_steps=16, rampup=0.0),
    log=dict(sample_every_steps=5_000),
    checkpoint=dict(every_steps=5_000),
    eval=dict(num_samples=50_000, steps=(1, 2), emas=("0.9999", "0.99995", "0.9996"))
    | dict(references=("data/cifar10_reference.npz",)),
)
PAPER = dict(times=dict(order="swap", t_mean=-2.0, t_std=2.0, r_mean=-2.0, r_std=2.0))
SOFLOW = dict(
    objective=dict(alpha_start=1.0, alpha_end=0.0003125),
    times=dict(t_mean=-0.9),
    draws=dict(instant_share=0.0),
    model=dict(dropout=0.30),
    optim=dict(name="radam", lr=1e-4, warmup_steps=0),  # radam has its own
    ema=dict(decays=(0.9999,)),
    eval=dict(emas=("",)),
)
ROWS = {"": {}, "paper": PAPER, "soflow": join(soflow_as_published(STEPS), SOFLOW)}
get_config = table("configs/cifar10.py", defaults, SHARED, ROWS)

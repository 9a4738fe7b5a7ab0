"""MeanFlow on your own pictures, 32x32: sub-folders are classes, a flat folder is unconditional.

Row laptop is small enough for 2 CPU cores; without a row, or with gpu, the network is DiT-S/4.
Choose train.num_steps by the size of the folder. Classes are learned sooner with guidance in the
target, --config.guidance.omega=1.8. docs/recipes.md has what was tried.
Hardware: a GPU; of laptop 2 CPU cores, under 15 minutes.
Command: python -m mf_jax.main --config=configs/pictures.py:laptop --config.data.path=FOLDER
"""

from configs.default import get_config as defaults
from configs.rows import table

SHARED = dict(
    data=dict(name="image_folder", image_size=32, flip=True),
    model=dict(patch_size=4),
)
_GPU = dict(
    model=dict(size="S"),
    train=dict(num_steps=100_000, batch_size=256),
    optim=dict(lr=1e-4, warmup_steps=1000),
    eval=dict(num_samples=10_000),
)
_LAPTOP = dict(  # times and weight of the digits, which lean to the long intervals of a single step
    model=dict(depth=4, width=192, num_heads=6, patch_size=8, prediction="data"),
    coupling=dict(name="optimal_transport"),
    times=dict(t_mean=0.4, t_std=1.2, r_mean=-2.0, r_std=1.4),
    draws=dict(instant_share=0.5),
    weight=dict(p=0.5),
    train=dict(num_steps=1200, batch_size=128, microbatch=64),  # more rows do not fit the cache
    optim=dict(name="muon", lr=0.015, warmup_steps=100, schedule="cosine"),
    ema=dict(decays=(0.998,)),
    log=dict(sample_every_steps=250),
)
ROWS = {"": _GPU, "gpu": _GPU, "laptop": _LAPTOP}
get_config = table("configs/pictures.py", defaults, SHARED, ROWS)

"""MeanFlow on your own pictures, 32x32: sub-folders are classes, a flat folder is unconditional.

Row laptop is small enough for 2 CPU cores; without a row, or with gpu, the network is DiT-S/4.
Choose train.num_steps by the size of the folder. Classes are learned sooner with guidance in the
target, --config.guidance.omega=1.8. docs/recipes.md has what was tried.
Hardware: a GPU; of laptop 2 CPU cores, under 15 minutes.
Command: python -m mf_jax.main --config=configs/pictures.py:laptop --config.data.path=FOLDER
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose

_GPU = {
    "model.size": "S",
    "train.num_steps": 100_000,
    "train.batch_size": 256,
    "optim.lr": 1e-4,
    "optim.warmup_steps": 1000,
    "eval.num_samples": 10_000,
}
_LAPTOP = {  # times and weight of the digits, which lean to the long intervals of a single step
    "model.depth": 4,
    "model.width": 192,
    "model.num_heads": 6,
    "model.patch_size": 8,
    "model.prediction": "data",
    "coupling.name": "optimal_transport",
    "times.t_mean": 0.4,
    "times.t_std": 1.2,
    "times.r_mean": -2.0,
    "times.r_std": 1.4,
    "draws.instant_share": 0.5,
    "weight.p": 0.5,
    "train.num_steps": 1200,
    "train.batch_size": 128,
    "train.microbatch": 64,  # more rows do not fit the cache
    "optim.name": "muon",
    "optim.lr": 0.015,
    "optim.warmup_steps": 100,
    "optim.schedule": "cosine",
    "ema.decays": (0.998,),
    "log.sample_every_steps": 250,
}
ROWS = {"": _GPU, "gpu": _GPU, "laptop": _LAPTOP}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row."""
    config = defaults()
    config.data.name, config.data.image_size, config.data.flip = "image_folder", 32, True
    config.model.patch_size = 4
    config.update_from_flattened_dict(choose("configs/pictures.py", row, ROWS))
    return config

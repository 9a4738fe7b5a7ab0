"""MeanFlow on your own pictures, 32x32: sub-folders are classes, a flat folder is unconditional.

Hardware: a GPU; on 2 CPU cores a step takes seconds. Choose model.size and train.num_steps by the
size of the folder.
Command: python -m mf_jax.main --config=configs/pictures.py --config.data.path=FOLDER
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name, config.data.image_size, config.data.flip = "image_folder", 32, True
    config.model.size, config.model.patch_size = "S", 4
    config.train.num_steps, config.train.batch_size = 100_000, 256
    config.optim.lr, config.optim.warmup_steps = 1e-4, 1000
    config.eval.num_samples = 10_000
    return config

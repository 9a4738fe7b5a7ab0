"""MeanFlow on ImageNet 256x256, DiT-B/4 on latents, guided: 11.4 FID at one step (arXiv 2505.13447).

131M parameters, 240 epochs, batch 256, guidance 2 in the target. The other configs of ImageNet are deltas of this
one.
Hardware: GPUs or TPUs; about 11 H100 hours, reckoned from its operations at 40 % of the bfloat16 peak, not measured.
The ablations of the paper, 80 epochs without guidance (61.06), need --config.train.num_steps=400365
--config.guidance.kappa=0.0.
Evaluation: --mode=eval, 50,000 samples, all classes in turn, at 1 and 2 steps.
Command: python -m mf_jax.main --config=configs/imagenet_b4.py
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults

IMAGES = 1_281_167
"""Training pictures of ImageNet: an epoch."""


def get_config() -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.data.name, config.data.path = "latents", "data/imagenet256_latents"
    config.data.image_size, config.data.flip = 256, True
    config.model.size, config.model.patch_size = "B", 4
    config.model.dtype = "bfloat16"
    config.guidance.omega, config.guidance.kappa = 1.0, 0.5
    config.train.num_steps, config.train.batch_size = 240 * IMAGES // 256, 256
    config.optim.lr = 1e-4
    config.log.sample_every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    config.eval.num_samples, config.eval.steps = 50_000, (1, 2)
    config.eval.references = ("data/imagenet256_reference.npz",)
    return config

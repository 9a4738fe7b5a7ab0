"""MeanFlow and its successors in JAX: train, evaluate and sample one-step generative models.

import mf_jax
generator = mf_jax.load("runs/digits")
images = generator.sample(labels=[3, 3, 7], steps=1, seed=0)
"""

from mf_jax.generator import Generator
from mf_jax.loading import load

__all__ = ["Generator", "load"]

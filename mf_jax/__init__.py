"""MeanFlow and its successors in JAX: train, evaluate and sample one-step generative models.

import mf_jax
generator = mf_jax.load("runs/digits")
images = generator.sample(labels=[3, 3, 7], steps=1, seed=0)
"""

import importlib

__version__ = "0.1.0"
_HOMES = {"Generator": "mf_jax.generator", "load": "mf_jax.loading"}
__all__ = ["Generator", "__version__", "load"]


def __getattr__(name: str):
    """Import a public name at its first use: `import mf_jax` alone brings no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

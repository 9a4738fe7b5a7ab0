"""MeanFlow and its successors in JAX: train, evaluate and sample one-step generative models.

import mf_jax
generator = mf_jax.load("runs/digits")
images = generator.sample(labels=[3, 3, 7], steps=1, seed=0)

Loss, sampler and self-check for any network, data and loop: docs/from_your_own_code.md.
"""

import importlib

__version__ = "0.1.0"
_NAMES = {
    "mf_jax.flow.errors": "BadInput",
    "mf_jax.flow.diagnostics": "check",
    "mf_jax.flow.couplings": "Coupling OptimalTransport",
    "mf_jax.flow.derivative": "Derivative",
    "mf_jax.flow.draws": "DrawScheme",
    "mf_jax.flow.guidance": "Guidance",
    "mf_jax.flow.records": "NO_LABEL Condition Draws Field GuidanceScale Prediction Rows",
    "mf_jax.flow.sampler": "sample",
    "mf_jax.flow.times": "ConsistencyTimes DyadicTimes GapTimes GridTimes LogitNormalTimes Times "
    "UniformTimes",
    "mf_jax.flow.velocities": "VelocityEstimate",
    "mf_jax.generator": "Generator",
    "mf_jax.loading": "load",
    "mf_jax.objectives.alpha_flow": "AlphaFlow",
    "mf_jax.objectives.wrappers": "Controlled Controls Estimated",
    "mf_jax.objectives.average_divergence": "AverageDivergence",
    "mf_jax.objectives.flow_matching": "FlowMatching",
    "mf_jax.objectives.improved_meanflow": "ImprovedMeanFlow",
    "mf_jax.objectives.meanflow": "MeanFlow",
    "mf_jax.objectives.pixel_meanflow": "PixelMeanFlow",
    "mf_jax.objectives.shortcut": "Shortcut",
    "mf_jax.objectives.split_meanflow": "SplitMeanFlow",
    "mf_jax.objectives.terminal_velocity": "TerminalVelocity",
    "mf_jax.objectives.terms": "AdaptiveWeight Objective",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    """Import a public name at its first use: `import mf_jax` alone brings no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

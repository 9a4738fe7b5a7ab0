"""Pure networks, and how a network becomes the `Field` that objectives and samplers see."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from mf_jax.flow.records import Condition, Field
from mf_jax.models.affine import Affine, LowRank
from mf_jax.models.data_prediction import DataPrediction
from mf_jax.models.dit import DIT_SIZES, DiT
from mf_jax.models.in_context_dit import IN_CONTEXT_SIZES, InContextDiT
from mf_jax.models.mlp import MLP
from mf_jax.models.unet import UNet

NETWORKS = {
    "dit": DiT,
    "in_context_dit": InContextDiT,
    "unet": UNet,
    "mlp": MLP,
    "affine": Affine,
    "low_rank": LowRank,
}

__all__ = [
    "DIT_SIZES",
    "IN_CONTEXT_SIZES",
    "MLP",
    "NETWORKS",
    "Affine",
    "DataPrediction",
    "DiT",
    "InContextDiT",
    "LowRank",
    "UNet",
    "as_field",
    "initial_params",
    "parameter_shapes",
]


def as_field(network: nn.Module) -> Field:
    """Return the pure function `field(params, z, *, r, t, condition)` of a network."""

    def field(params, z, *, r, t, condition):
        return network.apply({"params": params}, z, r=r, t=t, condition=condition)

    return field


def initial_params(network: nn.Module, shape: tuple[int, ...], key: PRNGKeyArray) -> PyTree:
    """Return a network's fresh float32 parameters.

    Args:
      network: one of `NETWORKS`.
      shape: of one element, (H, W, C) or (D,).
      key: for the random weights.

    Returns:
      The parameter tree.
    """
    time = jnp.zeros((1,))
    condition = Condition(labels=jnp.zeros((1,), jnp.int32))
    variables = jax.jit(network.init)(
        key, jnp.zeros((1, *shape)), r=time, t=time, condition=condition
    )
    return variables["params"]


def parameter_shapes(network: nn.Module, shape: tuple[int, ...]) -> PyTree:
    """Return the shapes and types of a network's parameters, computing nothing; arguments as `initial_params`."""
    return jax.eval_shape(lambda key: initial_params(network, shape, key), jax.random.key(0))

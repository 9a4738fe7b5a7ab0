"""Pure networks, and how one becomes the `Field` that objectives and samplers see."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import Points, per_row
from mf_jax.flow.records import Condition, Field, Prediction
from mf_jax.models.affine import Affine, LowRank
from mf_jax.models.dit import DiT
from mf_jax.models.in_context_dit import InContextDiT
from mf_jax.models.layers import Time
from mf_jax.models.mlp import MLP
from mf_jax.models.sizes import SIZES as SIZES
from mf_jax.models.unet import UNet

NETWORKS = {
    "dit": DiT,
    "in_context_dit": InContextDiT,
    "unet": UNet,
    "mlp": MLP,
    "affine": Affine,
    "low_rank": LowRank,
}


class DataPrediction(nn.Module):
    """Read a network's predictions x_hat as velocities: u = (z - x_hat) / max(t, t_clip).

    A second head is read likewise. The parameters are the network's own, under the same names.

    Source: pixel MeanFlow, arXiv 2601.22158, section 3.
    """

    network: nn.Module
    t_clip: float = 0.05

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def __call__(self, z: Points, *, r: Time, t: Time, condition: Condition) -> Prediction:
        clipped = per_row(jnp.maximum(t, self.t_clip), z)
        x, x_second = self.network(z, r=r, t=t, condition=condition)
        v = None if x_second is None else (z - x_second) / clipped
        return Prediction(u=(z - x) / clipped, v=v)


def as_field(network: nn.Module) -> Field:
    """Return the pure function `field(params, z, *, r, t, condition)` of a network."""

    def field(params, z, *, r, t, condition):
        if not isinstance(condition, Condition):
            fix = "tell it a mf_jax.Condition(labels), in draws by for_networks=True"
            raise BadInput(f"condition: this network is told no {type(condition).__name__}; {fix}")
        return network.apply({"params": params}, z, r=r, t=t, condition=condition)

    return field


def initial_params(network: nn.Module, shape: tuple[int, ...], key: PRNGKeyArray) -> PyTree:
    """Return a network's fresh float32 parameters for elements of a shape."""
    z, time = jnp.zeros((1, *shape)), jnp.zeros((1,))
    condition = Condition(labels=jnp.zeros((1,), jnp.int32))
    return _init(network, key, z, r=time, t=time, condition=condition)["params"]


_init = jax.jit(nn.Module.init, static_argnums=0)  # traced once for equal networks


def parameter_shapes(network: nn.Module, shape: tuple[int, ...]) -> PyTree:
    """Return the shapes and types of a network's parameters, computing nothing."""
    return jax.eval_shape(lambda key: initial_params(network, shape, key), jax.random.key(0))


def with_gather(network: nn.Module, gather: Callable) -> nn.Module:
    """Return a network whose blocks, if it has any, gather their parameters (`run_blocks`)."""
    if isinstance(network, DataPrediction):
        return network.clone(network=with_gather(network.network, gather))
    return network.clone(gather=gather) if hasattr(network, "gather") else network

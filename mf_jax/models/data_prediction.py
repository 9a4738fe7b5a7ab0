"""A network that predicts the data instead of the velocity."""

import flax.linen as nn
import jax.numpy as jnp

from mf_jax.flow.paths import Points
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models.layers import Time


class DataPrediction(nn.Module):
    """Read a network's predictions x_hat as velocities: u = (z - x_hat) / max(t, t_clip).

    A second head is read likewise. The parameters are the network's own, under the same names.

    Args:
      network: predicts x_hat instead of velocities.
      t_clip: smallest time divided by, above 0; bounds the velocity near the data.

    Source: pixel MeanFlow, arXiv 2601.22158, section 3.
    """

    network: nn.Module
    t_clip: float = 0.05

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def __call__(self, z: Points, *, r: Time, t: Time, condition: Condition) -> Prediction:
        clipped = jnp.maximum(t, self.t_clip).reshape(-1, *[1] * (z.ndim - 1))
        x, x_second = self.network(z, r=r, t=t, condition=condition)
        v = None if x_second is None else (z - x_second) / clipped
        return Prediction(u=(z - x) / clipped, v=v)

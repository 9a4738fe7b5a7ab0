"""A config with a source, a network and an objective of one's own, which have no trait of ours."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from configs.default import get_config as defaults
from mf_jax.data import SOURCES, Batch
from mf_jax.models import NETWORKS
from mf_jax.objectives import OBJECTIVES
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.types import Prediction


class Points:
    """Two clouds in 16 dimensions."""

    def __init__(self, *, split):
        rng = np.random.default_rng(split == "train")
        self.shape, self.num_classes, self.class_names, self.stored = (16,), 2, ("a", "b"), None
        self.labels = rng.integers(0, 2, 500).astype(np.int32)
        self.x = np.float32(0.3 * rng.normal(size=(500, 16)) + 2 * self.labels[:, None] - 1)

    def __len__(self):
        return len(self.x)

    def gather(self, indices):
        return Batch(self.x[indices], self.labels[indices])


class Network(nn.Module):
    width: int
    num_classes: int = 0

    @nn.compact
    def __call__(self, z, *, r, t, condition):
        labels = nn.Embed(self.num_classes + 1, self.width)(condition.labels % 3)
        hidden = nn.Dense(self.width)(jnp.concatenate([z, r[:, None], t[:, None], labels], -1))
        return Prediction(nn.Dense(z.shape[-1])(nn.gelu(hidden)))


class Objective(MeanFlow):
    pass


SOURCES["own"], NETWORKS["own"], OBJECTIVES["own"] = Points, Network, Objective


def get_config():
    config = defaults()
    config.data.name = config.model.name = config.objective.name = "own"
    return config

"""Diagnostics of a model on real data: its distance to the MeanFlow identity and the velocity."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mf_jax.config import learns_average, make_scheme
from mf_jax.data import Batch, Source
from mf_jax.flow import diagnostics
from mf_jax.flow.draws import key_of
from mf_jax.flow.records import Rows, Told
from mf_jax.models import as_field

_ROWS = 1024
_STREAM = 2**31  # sample i folds i into the same key, and i stays below


def diagnose(
    config: ConfigDict, network: nn.Module, params: PyTree, source: Source
) -> dict[str, float]:
    """Return the MeanFlow diagnostics on real data, with times and noise drawn as in training."""
    rows_key, draws_key = jax.random.split(jax.random.fold_in(key_of(config.eval.seed), _STREAM))
    size = config.train.batch_size  # noise is dealt within a batch
    num = max(_ROWS // size, 1) * size
    index = np.asarray(jax.random.randint(rows_key, (num,), 0, len(source)))
    scheme = make_scheme(config)
    # of rows with r < t, their labels kept, with the least guidance that the network knows
    plain = {"instant_share": 0.0, "instant_of_every_row": False, "label_drop_share": 0.0}
    plain |= {"omega_max": scheme.omega_min, "omega_window": False}
    scheme = dataclasses.replace(scheme, **plain)

    @jax.jit
    def drawn(key: Array, batch: Batch) -> Rows:
        told = batch.labels if batch.condition is None else Told(batch.labels, batch.condition)
        draws = scheme.draw(key, batch.x, told, e=batch.e, mask=batch.mask)
        return draws.interval.replace(dropout=None)

    batches = [source.gather(index[i : i + size]) for i in range(0, num, size)]
    rows = map(drawn, jax.random.split(draws_key, len(batches)), batches)
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    measures, field = [diagnostics.velocity_error], as_field(network)
    if learns_average(config):
        measures += [diagnostics.identity_residual, diagnostics.additivity_gap]

    @jax.jit
    def measure_all(params: PyTree, rows: Rows) -> dict[str, jax.Array]:
        return {each.__name__: each(field, params, rows) for each in measures}

    with jax.default_matmul_precision("highest"):
        return {name: float(value) for name, value in measure_all(params, rows).items()}

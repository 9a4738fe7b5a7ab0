"""Diagnostics of a model on real data: its distance to the MeanFlow identity and the velocity."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.config import make_objective, make_scheme
from mf_jax.data import Source
from mf_jax.flow import diagnostics
from mf_jax.flow.draws import key_of
from mf_jax.flow.records import Rows, Told
from mf_jax.models import as_field

_ROWS = 1024
_STREAM = 2**31  # sample i folds i into the same key, and i stays below


def diagnose(
    config: ConfigDict, network: nn.Module, params: PyTree, source: Source
) -> dict[str, float]:
    """Return the MeanFlow diagnostics on real data, at times of the run's own distribution."""
    key = jax.random.fold_in(key_of(config.eval.seed), _STREAM)
    rows_key, noise_key, times_key = jax.random.split(key, 3)
    index = jax.random.randint(rows_key, (_ROWS,), 0, len(source))
    x, labels, condition, e, mask = jax.tree.map(jnp.asarray, source.gather(np.asarray(index)))
    scheme = make_scheme(config)
    r, t = scheme.times.sample(times_key, _ROWS)
    e = scheme.noise_scale * jax.random.normal(noise_key, x.shape) if e is None else e
    if mask is not None:
        x, e = (jnp.where(mask, each, 0) for each in (x, e))
    told = {"condition": labels if condition is None else Told(labels, condition)}
    told |= {"dropped": jnp.zeros(labels.shape, bool), "mask": mask, "for_networks": True}
    rows = Rows(x=x, e=e, t=t, r=r, **told)
    measures: list[Callable] = [diagnostics.velocity_error]
    if make_objective(config).learns_average:
        measures += [diagnostics.identity_residual, diagnostics.additivity_gap]
    field = as_field(network)

    @jax.jit
    def measure_all(params: PyTree, rows: Rows) -> dict[str, jax.Array]:
        return {each.__name__: each(field, params, rows) for each in measures}

    with jax.default_matmul_precision("highest"):
        return {name: float(value) for name, value in measure_all(params, rows).items()}

"""Data that are stored in one form and drawn anew, on the device, at every visit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from steps import parts_of

from mf_jax.data import Batch, Stored, make_batches
from mf_jax.data.pipeline import stream_flips, stream_indices
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import DataSpec
from mf_jax.models.dit import DiT
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.step import initial_state, make_train_step

SHAPE = (4, 4, 1)


def _noisy(key, rows):
    """Two channels, a mean and a deviation, become one."""
    mean, deviation = jnp.split(rows.astype(jnp.float32), 2, axis=-1)
    return mean + deviation * jax.random.normal(key, mean.shape)


STORED = Stored(jax.ShapeDtypeStruct((4, 4, 2), jnp.float16), _noisy)


class Numbered:
    """Elements that are their own index, with mirrors of their own."""

    stored = STORED
    spec = DataSpec(SHAPE)

    def __len__(self):
        return 7

    def gather(self, indices):
        x = np.ones((1, 4, 4, 2), np.float16) * indices[:, None, None, None].astype(np.float16)
        return Batch(x, np.full(len(indices), -1, np.int32))


def test_mirrors_come_from_the_source_where_it_has_them():
    batches = make_batches(Numbered(), batch_size=10, seed=3, flip=True, threads=0)
    for step in range(3):
        batch = next(batches)
        assert batch.x.dtype == np.float16
        expected = stream_indices(np.arange(10 * step, 10 * step + 10), length=7, seed=3)
        expected = expected + 7 * stream_flips(10 * step, 10, seed=3)
        np.testing.assert_array_equal(batch.x[:, 0, 0, 0], expected)


def _error(state):
    return float(state.metrics["u_error"].compute())


def test_every_visit_draws_anew_and_the_step_sees_what_was_drawn():
    """A far mean gives a large error; the deviation counts too."""
    network = DiT(patch_size=4, depth=1, width=16, num_heads=2, num_classes=0)
    parts = parts_of(network, MeanFlow(Guidance()), shape=SHAPE, batch=8)
    parts = dataclasses.replace(parts, stored=STORED)
    state, train_step = jax.jit(lambda: initial_state(parts))(), jax.jit(make_train_step(parts))
    assert parts.batch[0].shape == (8, 4, 4, 2)
    rows = np.ones((8, 4, 4, 2), np.float16)
    labels = np.zeros(8, np.int32)
    first = _error(train_step(state, rows, labels))
    assert first == _error(train_step(state, rows, labels))
    assert first != _error(train_step(state.replace(step=state.step + 1), rows, labels))
    mean, deviation = np.zeros((2, 8, 4, 4, 2), np.float16)
    mean[..., 0], deviation[..., 1] = 100, 100
    base = _error(train_step(state, 0 * rows, labels))
    assert _error(train_step(state, mean, labels)) > 100 * base
    assert _error(train_step(state, deviation, labels)) > 100 * base

"""Signals `[B, length, channels]` with a Flax NNX module, told a class.

A signal is a wave of 2, 3, 4 or 5 periods (the class), as cosine and sine, of any phase. A sample
is right if its strongest frequency is the one told.

Right, seed 0: 0.980 in one step, 1.000 in two.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mf_jax

LENGTH, CLASSES = 32, 4


def signals(key, rows=128):
    """Return signals [B, 32, 2] and their classes [B]."""
    keys = jax.random.split(key)
    label = jax.random.randint(keys[0], (rows,), 0, CLASSES)
    turn = (label[:, None] + 2) * jnp.arange(LENGTH) / LENGTH + jax.random.uniform(
        keys[1], (rows, 1)
    )
    return jnp.stack([jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)], 2), label


class Network(nnx.Module):
    def __init__(self, width, rngs):
        self.label = nnx.Embed(CLASSES + 1, width, rngs=rngs)  # the last row is no label, -1
        ins, outs = (2 * LENGTH + width + 2, width, width), (width, width, 2 * LENGTH)
        first, middle, last = (nnx.Linear(*s, rngs=rngs) for s in zip(ins, outs, strict=True))
        self.layers = nnx.Sequential(first, nnx.gelu, middle, nnx.gelu, last)

    def __call__(self, z, *, r, t, condition):
        told = self.label(condition % (CLASSES + 1)), jnp.stack([t, t - r], 1)
        return self.layers(jnp.concatenate([z.reshape(len(z), -1), *told], 1)).reshape(z.shape)


def train(field, params, steps, seed):
    """Train; print and return the share of right samples."""
    scheme = mf_jax.DrawScheme(mf_jax.LogitNormalTimes(), instant_share=0.5)
    objective, optimizer = mf_jax.MeanFlow(), optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry, key):
        keys = jax.random.split(key)
        draws = scheme.draw(keys[0], *signals(keys[1]))
        gradient = jax.grad(lambda p: objective.loss(field, p, draws)[0])(carry[0])
        updates, state = optimizer.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    keys, found = jax.random.split(jax.random.key(seed), steps + 1), {}
    params = jax.lax.scan(step, (params, optimizer.init(params)), keys[1:])[0][0]
    e, label = jax.random.normal(keys[0], (512, LENGTH, 2)), jnp.arange(512) % CLASSES
    for n in (1, 2):
        x = mf_jax.sample(field, params, e, label, steps=n)
        strongest = jnp.argmax(jnp.abs(jnp.fft.fft(x[..., 0] + 1j * x[..., 1])), 1)
        found[f"steps_{n}"] = float(jnp.mean(strongest == label + 2))
    print("right:", found)
    return found


def main(steps=2000, seed=0):
    graph, params = nnx.split(Network(256, nnx.Rngs(seed)))
    return train(lambda p, z, **told: nnx.merge(graph, p)(z, **told), params, steps, seed)


if __name__ == "__main__":
    main()

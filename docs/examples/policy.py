"""A policy of action chunks: one step of MeanFlow against ten steps of flow matching.

A point rounds a disc, above or below, to a goal. A chunk `[8, 2]` holds the next positions as seen
from here; a mask hides those beyond the goal. The policy looks again after each chunk.
Success, seed 0: 0.898 in one step; flow matching 0.287 in one, 0.998 in ten. A minute of training.
"""

import jax
import jax.numpy as jnp
import optax

import mf_jax

SHAPES = (21, 256), (256, 256), (256, 256), (256, 16)
SCHEME = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5, label_drop_share=0.0)


def demonstrations(key, rows=256):
    side, start, off, draw = jax.random.split(key, 4)
    x = jax.random.uniform(start, (rows, 1), minval=-1) + 0.1 * jnp.arange(9)
    y = 0.7 * jax.random.rademacher(side, (rows, 1)) * jnp.cos(jnp.pi / 2 * x) ** 2
    path = jnp.stack([x, y], 2)
    here = path[:, 0] + 0.03 * jax.random.normal(off, (rows, 2))  # the chunk leads back to the path
    seen = {"here": here, "mask": x[:, 1:, None] < 1.05}
    return SCHEME.draw(draw, 2 * (path[:, 1:] - here[:, None]), seen, mask=seen["mask"])


def field(params, z, *, r, t, condition):
    z = jnp.where(condition["mask"], z, 0)  # never look at what is hidden
    h = jnp.column_stack([z.reshape(len(z), -1), condition["here"], t, t - r, t**0]) @ params[0]
    for matrix in params[1:]:
        h = jax.nn.gelu(h) @ matrix
    return h.reshape(z.shape)


def train(objective, steps, key):
    keys = jax.random.split(key, steps)
    params = [jax.random.normal(keys[i], s) * s[0] ** -0.5 for i, s in enumerate(SHAPES)]
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry, key):
        gradient = jax.grad(lambda p: objective.loss(field, p, demonstrations(key))[0])(carry[0])
        updates, state = optimizer.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def success(params, key, **how):
    """Return the share of 512 episodes that end at (1, 0) and never touch the disc."""
    here, touched = jnp.tile(jnp.array([-1.0, 0.0]), (512, 1)), False
    for e, left in zip(jax.random.normal(key, (3, 512, 8, 2)), (20, 12, 4), strict=True):
        seen = {"here": here, "mask": jnp.tile(jnp.arange(8)[:, None] < left, (512, 1, 1))}
        path = here[:, None] + mf_jax.sample(field, params, e, seen, **how)[:, :left] / 2
        touched |= jnp.any(jnp.linalg.norm(path, axis=2) < 0.2, 1)
        here = path[:, -1]
    return float(jnp.mean(~touched & (jnp.linalg.norm(here - jnp.array([1, 0]), axis=1) < 0.15)))


def main(steps=3000, seed=0):
    keys, even = jax.random.split(jax.random.key(seed)), mf_jax.AdaptiveWeight(p=0.0)
    found = {"mean_flow_1": success(train(mf_jax.MeanFlow(weight=even), steps, keys[0]), keys[1])}
    params = train(mf_jax.FlowMatching(weight=even), steps, keys[0])
    found |= {f"flow_{n}": success(params, keys[1], steps=n, learns_average=False) for n in (1, 10)}
    print("success:", found)
    return found


if __name__ == "__main__":
    main()

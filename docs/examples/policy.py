"""A policy of action chunks: one MeanFlow step against ten steps of flow matching.

A point rounds a disc to a goal; demonstrations pass above or below. A chunk `[8, 2]` is the
next positions as seen from here. A mask hides what lies beyond the goal, and the network, a dict
of arrays, is causal, so that it never looks at it.

    python docs/examples/policy.py

Success of 512 episodes, seed 0: MeanFlow 0.932 in one step; flow matching 0.922 in one, 0.998 in
ten. The two trainings take 8 minutes of one core.
"""

import jax
import jax.numpy as jnp
import optax

import mf_jax

CHUNK, WIDTH, DISC, LAYERS = 8, 64, 0.35, ("0", "1", "2")
SIZES = {"z": (2, WIDTH), "told": (8, WIDTH), "place": (CHUNK, WIDTH), "out": (WIDTH, 2)}
SIZES |= {"mix" + i: (CHUNK, CHUNK) for i in LAYERS} | {"up" + i: (WIDTH, 256) for i in LAYERS}
SIZES |= {"down" + i: (256, WIDTH) for i in LAYERS}


def demonstrations(key, rows):
    """Return observations [B, 4] (position, goal), chunks [B, 8, 2] and masks [B, 8, 1]."""
    side, goal, start, off = jax.random.split(key, 4)
    side = jax.random.rademacher(side, (rows, 1))
    goal = jax.random.uniform(goal, (rows, 1), minval=-0.3, maxval=0.3)
    x = jax.random.uniform(start, (rows, 1), minval=-1.1) + 0.1 * jnp.arange(CHUNK + 1)
    y = side * 0.65 * jnp.cos(jnp.pi / 2 * jnp.clip(x, -1, 1)) ** 2 + goal * (x + 1) / 2
    path = jnp.stack([x, y], 2)
    here = path[:, 0] + 0.03 * jax.random.normal(off, (rows, 2))  # the chunk leads back to the path
    seen = jnp.concatenate([here, jnp.ones_like(goal), goal], 1)
    return seen, (path[:, 1:] - here[:, None]) / 0.4, x[:, 1:, None] < 1.05


def field(params, z, *, r, t, condition):
    told = jnp.concatenate([condition, jnp.stack([t, t - r, t**2, (t - r) ** 2], 1)], 1)
    h = z @ params["z"] + (told @ params["told"])[:, None] + params["place"]
    for i in LAYERS:
        h += jnp.tril(params["mix" + i]) @ h
        normed = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
        h += jax.nn.gelu(normed @ params["up" + i]) @ params["down" + i]
    return h @ params["out"]


def train(objective, steps, seed):
    scheme = mf_jax.DrawScheme(mf_jax.LogitNormalTimes(), instant_share=0.5, label_drop_share=0)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    keys = jax.random.split(jax.random.key(seed), len(SIZES) + steps)
    params = {
        n: jax.random.normal(k, s) * s[0] ** -0.5
        for k, (n, s) in zip(keys, SIZES.items(), strict=False)
    }

    @jax.jit
    def step(params, state, key):
        seen, chunk, mask = demonstrations(key, 256)
        draws = scheme.draw(key, chunk, seen, mask=mask)
        gradient = jax.grad(lambda p: objective.loss(field, p, draws)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in keys[len(SIZES) :]:
        params, state = step(params, state, key)
    return params


def success(params, key, **how):
    """Return the share of episodes that reach the goal and never touch the disc."""
    goal = jnp.stack([jnp.ones(512), jax.random.uniform(key, (512,), minval=-0.3, maxval=0.3)], 1)

    def act(carry, key):  # four positions of a chunk, then look again
        here, hit, reached = carry
        e = jax.random.normal(key, (512, CHUNK, 2))
        chunk = mf_jax.sample(field, params, e, jnp.concatenate([here, goal], 1), **how)
        for i in range(4):
            there = here + 0.4 * chunk[:, i]
            hit |= ~reached & (jnp.linalg.norm(there, axis=1) < DISC)
            reached |= jnp.linalg.norm(there - goal, axis=1) < 0.1
        return (there, hit, reached), None

    no = jnp.zeros(512, bool)
    start = jnp.tile(jnp.array([-1.0, 0.0]), (512, 1)), no, no
    _, hit, reached = jax.lax.scan(act, start, jax.random.split(key, 9))[0]
    return float(jnp.mean(reached & ~hit))


def main(steps=3000, seeds=1):
    found = {"mean_flow_1": 0.0, "flow_matching_1": 0.0, "flow_matching_10": 0.0}
    for seed in range(seeds):
        mean, instant = (train(o, steps, seed) for o in (mf_jax.MeanFlow(), mf_jax.FlowMatching()))
        key, euler = jax.random.key(1000 + seed), {"learns_average": False}
        found["mean_flow_1"] += success(mean, key) / seeds
        found["flow_matching_1"] += success(instant, key, **euler) / seeds
        found["flow_matching_10"] += success(instant, key, steps=10, **euler) / seeds
    print("success: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()

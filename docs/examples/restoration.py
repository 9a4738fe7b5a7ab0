"""Restoration from pairs: degraded digits to digits, against plain regression.

A digit is averaged over 2x2 pixels. A pair is the digit x and e, the degraded picture plus noise;
the network is told the degraded picture. Regression has the least error, and is too smooth.

    python docs/examples/restoration.py        writes restoration.png

No figures are recorded yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import mf_jax

NOISE, SIZES = 0.5, (64 + 64 + 2, 512, 512, 512, 64)


def degrade(x):
    """Return pictures [B, 8, 8] of 4x4 averages, drawn 8x8."""
    return np.kron(x.reshape(-1, 4, 2, 4, 2).mean((2, 4)), np.ones((2, 2)))


def field(params, z, *, r, t, condition):
    flat = [a.reshape(len(z), -1) for a in (z, condition, t, t - r)]
    h = jnp.concatenate(flat, 1)
    for matrix, bias in params[:-1]:
        h = jax.nn.gelu(h @ matrix + bias)
    return (h @ params[-1][0] + params[-1][1]).reshape(z.shape)


def train(loss, x, steps, seed):
    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    sizes = zip(keys, SIZES, SIZES[1:], strict=False)
    params = [(jax.random.normal(k, (a, b)) * a**-0.5, jnp.zeros(b)) for k, a, b in sizes]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)

    @jax.jit
    def step(params, state, key):
        rows = jax.random.choice(key, len(x), (128,))
        gradient = jax.grad(loss)(params, key, x[rows], bad[rows])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    bad, x, state = jnp.asarray(degrade(x)), jnp.asarray(x), optimizer.init(params)
    for key in jax.random.split(keys[-1], steps):
        params, state = step(params, state, key)
    return params


def main(steps=1500, seed=0, picture=False):
    digits = np.float32(load_digits().images / 8 - 1)
    train_x, x = digits[:1400], digits[1400:]
    scheme = mf_jax.DrawScheme(mf_jax.LogitNormalTimes(), 0.5, label_drop_share=0)
    objective = mf_jax.MeanFlow()

    def flow(params, key, x, bad):
        e = bad + NOISE * jax.random.normal(key, x.shape)
        return objective.loss(field, params, scheme.draw(key, x, bad, e=e))[0]

    def regression(params, key, x, bad):
        zero = jnp.zeros(len(x))
        return jnp.mean((field(params, 0 * x, r=zero, t=zero, condition=bad) - x) ** 2)

    bad, zero = jnp.asarray(degrade(x)), jnp.zeros(len(x))
    params = train(regression, train_x, steps, seed)
    shown = {"degraded": bad, "regression": field(params, 0 * x, r=zero, t=zero, condition=bad)}
    params = train(flow, train_x, steps, seed)
    e = bad + NOISE * jax.random.normal(jax.random.key(seed), x.shape)
    shown |= {f"steps_{n}": mf_jax.sample(field, params, e, bad, steps=n) for n in (1, 8)}
    found = {name: float(jnp.mean((a - x) ** 2)) for name, a in shown.items()}
    print("mean squared error", found)
    if picture:
        rows = jnp.concatenate([jnp.concatenate([*a[:16]], 1) for a in (x, *shown.values())])
        plt.imsave(Path(__file__).with_suffix(".png"), np.kron(rows, np.ones((4, 4))), cmap="gray")
    return found


if __name__ == "__main__":
    main(picture=True)

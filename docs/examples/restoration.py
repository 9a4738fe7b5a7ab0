"""Restoration of degraded digits in one step, against regression and against eight steps.

A pair is the digit x and e, its 2x2 averages plus noise; the network is told the averages.
Regression has the least error, and is too smooth. restoration.png: degraded, restored, true.
Mean squared error, seed 0: one step 0.102, eight 0.093; regression 0.066, no restoration 0.196.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import mf_jax

SCHEME = mf_jax.DrawScheme(mf_jax.LogitNormalTimes(), instant_share=0.5, label_drop_share=0.0)


def degrade(key, x):
    bad = jnp.kron(x.reshape(-1, 4, 2, 4, 2).mean((2, 4)), jnp.ones((1, 2, 2))).reshape(x.shape)
    return bad, bad + 0.5 * jax.random.normal(key, x.shape)


def field(params, z, *, r, t, condition):
    h = jnp.column_stack([z, condition, t, t - r, t**0]) @ params[0]
    for matrix in params[1:]:
        h = jax.nn.gelu(h) @ matrix
    return h


def regression(params, key, x, bad, e):
    return jnp.mean((mf_jax.sample(field, params, e, bad) - x) ** 2)


def flow(params, key, x, bad, e):
    return mf_jax.MeanFlow().loss(field, params, SCHEME.draw(key, x, bad, e=e))[0]


def train(loss, digits, steps, key):
    keys, normal = jax.random.split(key, steps), jax.nn.initializers.lecun_normal()
    params = [normal(keys[i], shape) for i, shape in enumerate([(131, 256), (256, 256), (256, 64)])]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)

    def step(carry, key):
        draw, rows, noise = jax.random.split(key, 3)
        x = jax.random.choice(rows, digits, (128,))
        gradient = jax.grad(loss)(carry[0], draw, x, *degrade(noise, x))
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def main(steps=3000, seed=0, picture=None):
    keys, digits = jax.random.split(jax.random.key(seed)), jnp.float32(load_digits().data / 8 - 1)
    x, (bad, e) = digits[1400:], degrade(keys[0], digits[1400:])
    plain, params = (train(loss, digits[:1400], steps, keys[1]) for loss in (regression, flow))
    made = {"degraded": bad, "regression": mf_jax.sample(field, plain, e, bad)}
    made |= {f"steps_{n}": mf_jax.sample(field, params, e, bad, steps=n) for n in (1, 8)}
    found = {name: float(jnp.mean((value - x) ** 2)) for name, value in made.items()}
    print("mean squared error:", found)
    if picture:
        rows = jnp.stack([bad, made["steps_1"], x])[:, :12].clip(-1, 1).reshape(3, 12, 8, 8)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1))).swapaxes(1, 2).reshape(30, 120)
        plt.imsave(picture, jnp.kron(rows, jnp.ones((5, 5))), cmap="gray")
    return found


if __name__ == "__main__":
    main(picture=__file__.replace(".py", ".png"))

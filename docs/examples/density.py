"""One-step log-likelihood of a mixture of two Gaussians, against the exact one.

A MeanFlow network u is trained first, then q, its average divergence. One evaluation of each gives
a sample and its log-density in nats.

    python docs/examples/density.py        writes density.png

No figures are recorded yet.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.scipy.stats import multivariate_normal

import mf_jax

EVEN = mf_jax.AdaptiveWeight(p=0.0)  # of two numbers, p = 1 does not fit the mean
PARTS = [jnp.array([[1.2, 0.4], [0.4, 0.5]]) * 0.4, jnp.array([[0.3, -0.2], [-0.2, 0.8]]) * 0.4]
MEANS = [jnp.array([-1.0, 0.3]), jnp.array([1.0, -0.3])]


def data(key, rows):
    both = [
        jax.random.multivariate_normal(key, *part, (rows,))
        for part in zip(MEANS, PARTS, strict=True)
    ]
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (rows, 1)), *both)


def exact(x):
    each = [multivariate_normal.logpdf(x, *part) for part in zip(MEANS, PARTS, strict=True)]
    return jnp.logaddexp(*each) - jnp.log(2)


def u(params, z, *, r, t, condition=None):
    h = jnp.concatenate([z, t[:, None], (t - r)[:, None]], 1)
    for matrix, bias in params[:-1]:
        h = jax.nn.gelu(h @ matrix + bias)
    return h @ params[-1][0] + params[-1][1]


def q(params, z, **told):
    return u(params, z, **told)[:, 0]


def train(loss, width, steps, seed):
    keys, sizes = jax.random.split(jax.random.key(seed), 4 + steps), (4, 128, 128, width)
    layers = zip(keys, sizes, sizes[1:], strict=False)
    params = [(jax.random.normal(k, (a, b)) * a**-0.5, jnp.zeros(b)) for k, a, b in layers]
    scheme = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(params, state, key):
        gradient = jax.grad(loss)(params, scheme.draw(key, data(key, 512)))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in keys[4:]:
        params, state = step(params, state, key)
    return params


def main(steps=1000, seed=0, picture=False):
    flow, divergence = mf_jax.MeanFlow(weight=EVEN), mf_jax.AverageDivergence()
    params = train(lambda p, draws: flow.loss(u, p, draws)[0], 2, steps, seed)
    of_u = {"flow": u, "flow_params": params}
    q_params = train(lambda p, d: divergence.loss(q, p, d, **of_u)[0], 1, steps, seed + 1)
    e = jax.random.normal(jax.random.key(seed + 2), (2048, 2))
    x, log_p = divergence.log_likelihood(q, q_params, e, **of_u)
    error = log_p - exact(x)
    found = {"mean": float(error.mean()), "rms": float(jnp.sqrt(jnp.mean(error**2)))}
    print(f"log p - exact, in nats: mean {found['mean']:.3f}, rms {found['rms']:.3f}")
    if picture:
        axes = plt.subplots(1, 2, figsize=(6, 3), sharex=True, sharey=True)[1]
        for axis, value, name in zip(axes, (log_p, exact(x)), ("one step", "exact"), strict=True):
            axis.scatter(*x.T, c=value, s=2, vmin=-7, vmax=-1)
            axis.set(title=f"log p, {name}")
        plt.savefig(Path(__file__).with_suffix(".png"), dpi=80, bbox_inches="tight")
    return found


if __name__ == "__main__":
    main(picture=True)

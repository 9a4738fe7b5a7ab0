"""Log-likelihood in one step, against the exact one, of a mixture of two Gaussians.

A MeanFlow network is trained, then a second one for the average of its divergence. One evaluation
of each gives a sample and its log-density. density.png: samples coloured by it, exact at the right.

Log p - exact, in nats, seed 0: mean 0.062, rms 0.241.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.scipy.stats import multivariate_normal

import mf_jax

MEANS, COV = (jnp.array([-0.8, 0.3]), jnp.array([0.8, -0.3])), jnp.array([[0.4, 0.2], [0.2, 0.3]])


def exact(x):
    return jnp.logaddexp(*(multivariate_normal.logpdf(x, m, COV) for m in MEANS)) - jnp.log(2)


def u(params, z, *, r, t, condition=None):
    h = jnp.concatenate([z, t[:, None], (t - r)[:, None]], 1)
    for matrix, bias in params[:-1]:
        h = jax.nn.gelu(h @ matrix + bias)
    return h @ params[-1][0] + params[-1][1]


def train(loss, numbers, steps, key):
    keys, normal = jax.random.split(key, steps), jax.nn.initializers.lecun_normal()
    shapes = zip(keys, pairwise((4, 128, 128, 128, numbers)), strict=False)
    params = [(normal(k, shape), jnp.zeros(shape[1])) for k, shape in shapes]
    scheme = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry, key):
        draw, side, point = jax.random.split(key, 3)
        mean = jnp.where(jax.random.bernoulli(side, 0.5, (512, 1)), *MEANS)
        draws = scheme.draw(draw, jax.random.multivariate_normal(point, mean, COV))
        updates, state = optimizer.update(jax.grad(loss)(carry[0], draws), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def main(steps=2000, seed=0, picture=None):
    keys, q = jax.random.split(jax.random.key(seed), 3), lambda *a, **b: u(*a, **b)[:, 0]
    flow = mf_jax.MeanFlow(weight=mf_jax.AdaptiveWeight(p=0.0))  # p = 1 fits no mean of two numbers
    divergence = mf_jax.AverageDivergence()
    of_u = {"flow": u, "flow_params": train(lambda *a: flow.loss(u, *a)[0], 2, steps, keys[0])}
    params = train(lambda *a: divergence.loss(q, *a, **of_u)[0], 1, steps, keys[1])
    e = jax.random.normal(keys[2], (2048, 2))
    x, log_p = divergence.log_likelihood(q, params, e, **of_u)
    error = log_p - exact(x)
    found = {"mean": float(error.mean()), "rms": float(jnp.sqrt(jnp.mean(error**2)))}
    print("log p - exact, in nats:", found)
    if picture:
        for place, shown in ((121, log_p), (122, exact(x))):
            plt.subplot(place).scatter(*x.T, c=shown, s=2, vmin=-6, vmax=-1)
        plt.savefig(picture, dpi=80, bbox_inches="tight")
    return found


if __name__ == "__main__":
    main(picture=__file__.replace(".py", ".png"))

"""Time training steps in turns with a textbook's: a plain DiT-S/4, batch 16, float32, adamw, EMA.

The textbook differentiates the JVP of every row, and guides by two more forwards of every row, as
the published code does. Its FLOPs are those of the published step to 0.3 %.

Usage: python -m launch.textbook [TURNS]
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.imagenet import get_config
from mf_jax.bench import measure, step
from mf_jax.flow.records import DataSpec
from mf_jax.runtime.sharding import make_mesh

WIDTH, DEPTH, HEADS, PATCH, BATCH = 384, 12, 6, 4, 16
LATENT, CLASSES = (32, 32, 4), 1000
OPTIMIZER = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.0)
_norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)


def _modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class _Time(nn.Module):
    @nn.compact
    def __call__(self, t):
        angles = t[:, None] * 10_000 ** -jnp.linspace(0, 1, 128)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return nn.Dense(WIDTH)(nn.silu(nn.Dense(WIDTH)(waves)))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, c):
        shift, scale, gate, *mlp = jnp.split(nn.Dense(6 * WIDTH)(nn.silu(c)), 6, axis=1)
        qkv = nn.Dense(3 * WIDTH)(_modulated(_norm()(x), shift, scale))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5)
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + gate[:, None] * nn.Dense(WIDTH)(seen)
        shift, scale, gate = mlp
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(_modulated(_norm()(x), shift, scale)))
        return x + gate[:, None] * nn.Dense(WIDTH)(hidden)


class DiT(nn.Module):
    """A DiT without a thought for XLA."""

    @nn.compact
    def __call__(self, z, r, t, labels):
        """Return u like z."""
        patches = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH))(z)
        b, height, width, _ = patches.shape
        x = patches.reshape(b, height * width, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        c = _Time()(t) + _Time()(t - r) + nn.Embed(CLASSES + 1, WIDTH)(labels)
        for _ in range(DEPTH):
            x = _Block()(x, c)
        shift, scale = jnp.split(nn.Dense(2 * WIDTH)(nn.silu(c)), 2, axis=1)
        x = nn.Dense(PATCH**2 * z.shape[-1])(_modulated(_norm()(x), shift, scale))
        x = x.reshape(b, height, width, PATCH, PATCH, -1).swapaxes(2, 3)
        return x.reshape(z.shape)


def loss(params, key, x, labels, kind):
    """Return the loss of flow matching, or of MeanFlow, `guided` with omega 1 and kappa 0.5."""
    noise_key, times_key, drop_key = jax.random.split(key, 3)
    e = jax.random.normal(noise_key, x.shape)
    r, t = jnp.sort(jax.nn.sigmoid(jax.random.normal(times_key, (2, len(x))) - 0.4), axis=0)
    r = jnp.where(jnp.arange(len(x)) < len(x) * 3 // 4, t, r)
    told = jnp.where(jax.random.uniform(drop_key, labels.shape) < 0.1, CLASSES, labels)
    at = t[:, None, None, None]
    z, v = (1 - at) * x + at * e, e - x

    def u(z, r, t, labels=told):
        return DiT().apply(params, z, r, t, labels)

    if kind == "flow matching":
        value, target = u(z, t, t), v
    else:
        if kind == "guided":
            v = v + 0.5 * (u(z, t, t) - u(z, t, t, jnp.full_like(told, CLASSES)))
        v = jax.lax.stop_gradient(v)
        value, du_dt = jax.jvp(u, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
        target = v - (t - r)[:, None, None, None] * du_dt
    errors = jnp.sum((value - jax.lax.stop_gradient(target)) ** 2, axis=(1, 2, 3))
    return jnp.mean(errors * jax.lax.stop_gradient(1 / (errors + 0.01)))


def train_step(state, x, labels, *, kind):
    """Return the state after a step."""
    params, opt_state, ema, count = state
    key = jax.random.fold_in(jax.random.key(0), count)
    gradient = jax.grad(loss)(params, key, x, labels, kind)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, optax.incremental_update(params, ema, 1e-4), count + 1


def initial_state():
    """Return the state before the first step."""
    z, time = jnp.zeros((1, *LATENT)), jnp.zeros(1)
    params = DiT().init(jax.random.key(1), z, time, time, jnp.zeros(1, int))
    return params, OPTIMIZER.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0)


def lowered(kind):
    """Return the lowered step, whose cost analysis counts its FLOPs."""
    x, labels = (jax.ShapeDtypeStruct((BATCH, *s), t) for s, t in ((LATENT, "f4"), ((), "i4")))
    step_of_kind = jax.jit(functools.partial(train_step, kind=kind), donate_argnums=0)
    return step_of_kind.lower(jax.eval_shape(initial_state), x, labels)


def contender(program, batches):
    """Return a contender for `measure.take_turns`."""
    state = jax.jit(initial_state)()

    def advance(batch):
        nonlocal state
        state = program(state, *batch)
        return state

    return ((x, labels) for x, labels, *_ in batches), advance


def main():
    """Print FLOPs and seconds of both steps, and how ours compares."""
    parser = argparse.ArgumentParser(prog="python -m launch.textbook", description=__doc__)
    told = "timed steps of each, 8 if left out"
    parser.add_argument("turns", type=int, nargs="?", default=8, metavar="TURNS", help=told)
    repeats, say = parser.parse_args().turns, functools.partial(print, flush=True)
    if repeats < 1:
        parser.error(f"TURNS={repeats}: must be at least 1")
    guided = get_config("b4")
    guided.model.size, guided.model.dtype, guided.train.batch_size = "S", "float32", BATCH
    plain = step.changed(guided, {"guidance": {"kappa": 0.0}})
    configs = {"flow matching": step.flow_matching(guided), "plain": plain, "guided": guided}
    source, mesh = step.Noise(DataSpec(LATENT, CLASSES)), make_mesh(data=1, fsdp=1)
    for kind, config in configs.items():
        say(f"{kind}: compiling both, then timing {repeats} steps of each")
        textbook = lowered(kind)
        gflop = textbook.cost_analysis()["flops"] / 1e9
        theirs = contender(textbook.compile(), step.fresh_batches(config, source, mesh))
        row, program = step.compile_step(config, source, mesh, say)
        ours = step.contender(config, program, source, mesh)
        seconds = measure.take_turns(theirs, ours, repeats=repeats, dropped=2)
        first, median, third = np.quantile(np.divide(*seconds[::-1]), (0.25, 0.5, 0.75))
        say(
            f"{kind}: textbook {gflop:.1f} GFLOP, {np.median(seconds[0]):.2f} s; ours "
            f"{row['gflop']:.1f} GFLOP, {np.median(seconds[1]):.2f} s: {row['gflop'] / gflop:.3f} "
            f"of the FLOPs, {median:.3f} ({first:.3f} to {third:.3f}) of the time"
        )


if __name__ == "__main__":
    main()

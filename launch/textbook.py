"""Time training steps in turns with a textbook's: patches of 4, batch 16, float32, adamw, EMA.

The textbook differentiates the JVP of every row, and guides by two more forwards of every row, as
the published code does. Its network is a plain DiT-S. For improved MeanFlow it is ours of 12 blocks
with heads of 8, without a thought for XLA, and the velocity of the tangent is one forward more.
Guided and improved, its FLOPs are those of the published steps to 0.3 %.

Usage: python -m launch.textbook [TURNS]
"""

import argparse
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.digits import get_config as digits
from configs.imagenet import get_config as imagenet
from mf_jax.bench import measure, step
from mf_jax.config import make_network
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, GuidanceScale
from mf_jax.models import layers
from mf_jax.runtime.sharding import make_mesh

WIDTH, DEPTH, HEADS, PATCH, BATCH = 384, 12, 6, 4, 16
HEAD_DEPTH = 8  # blocks of each head of improved MeanFlow
LATENT, CLASSES = (32, 32, 4), 1000
SPEC = DataSpec(LATENT, CLASSES)
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


def _drawn(key, x, labels, null, share):
    """Return r, t, x_t, v and the labels told, of a step where a share of the rows has r = t."""
    noise_key, times_key, drop_key = jax.random.split(key, 3)
    e = jax.random.normal(noise_key, x.shape)
    r, t = jnp.sort(jax.nn.sigmoid(jax.random.normal(times_key, (2, len(x))) - 0.4), axis=0)
    r = jnp.where(jnp.arange(len(x)) < len(x) * share, t, r)
    told = jnp.where(jax.random.uniform(drop_key, labels.shape) < 0.1, null, labels)
    at = t[:, None, None, None]
    return r, t, (1 - at) * x + at * e, e - x, told


def _error(value, target):
    errors = jnp.sum((value - jax.lax.stop_gradient(target)) ** 2, axis=(1, 2, 3))
    return jnp.mean(errors * jax.lax.stop_gradient(1 / (errors + 0.01)))


def _along(u, z, r, t, v):
    """Return u, whatever else the network returns, and the derivative times (t - r)."""
    one_way = v, jnp.zeros_like(r), jnp.ones_like(t)
    value, du_dt, more = jax.jvp(u, (z, r, t), one_way, has_aux=True)
    return value, more, (t - r)[:, None, None, None] * du_dt


def loss(network, params, key, x, labels, kind):
    """Return the loss of flow matching, or of MeanFlow, `guided` with omega 1 and kappa 0.5."""
    r, t, z, v, told = _drawn(key, x, labels, CLASSES, share=0.75)

    def u(z, r, t, labels=told):
        return network.apply(params, z, r, t, labels), ()

    if kind == "flow matching":
        return _error(u(z, t, t)[0], v)
    if kind == "guided":
        v = v + 0.5 * (u(z, t, t)[0] - u(z, t, t, jnp.full_like(told, CLASSES))[0])
    v = jax.lax.stop_gradient(v)
    value, _, behind = _along(u, z, r, t, v)
    return _error(value, v - behind)


def improved_loss(network, params, key, x, labels):
    """Return the loss of improved MeanFlow with a second head and a drawn scale of guidance."""
    r, t, z, v, told = _drawn(key, x, labels, NO_LABEL, share=0.5)
    omega, t_min, t_max = jax.random.uniform(jax.random.fold_in(key, 3), (3, len(x)))
    drawn = GuidanceScale(omega=1 + 7 * omega, t_min=t_min / 2, t_max=(1 + t_max) / 2)

    def both(z, r, t, labels=told, scale=drawn):
        found = network.apply(params, z, r=r, t=t, condition=Condition(labels, guidance=scale))
        return found.u, found.v

    one = jnp.ones_like(t)
    no_class = jnp.full_like(told, NO_LABEL), GuidanceScale(one, 0 * one, one)
    own, of_class, unguided = (both(z, t, t, *ask)[1] for ask in ((told,), (labels,), no_class))
    is_guided = (told != NO_LABEL) & (drawn.t_min <= t) & (t <= drawn.t_max)
    extra = jnp.where(is_guided, 1 - 1 / drawn.omega, 0)
    target = v + extra[:, None, None, None] * (of_class - unguided)
    value, head, behind = _along(both, z, r, t, jax.lax.stop_gradient(own))
    return _error(value, target - behind) + _error(head, target)


def train_step(state, x, labels, *, loss):
    """Return the state after a step."""
    params, opt_state, ema, count = state
    key = jax.random.fold_in(jax.random.key(0), count)
    gradient = jax.grad(loss)(params, key, x, labels)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, optax.incremental_update(params, ema, 1e-4), count + 1


def config_of(kind):
    """Return the config of our step."""
    if kind == "improved":
        config = digits("improved_meanflow")
        sizes = {"size": "B", "width": WIDTH, "num_heads": HEADS, "patch_size": PATCH}
        sizes |= {"depth": DEPTH, "head_depth": HEAD_DEPTH, "prediction": "velocity"}
        more = {"draws": {"instant_share": 0.5}, "coupling": {"name": "independent"}}
        return step.changed(config, {"model": sizes, "train": {"batch_size": BATCH}, **more})
    config = imagenet("b4")
    config.model.size, config.model.dtype, config.train.batch_size = "S", "float32", BATCH
    if kind == "flow matching":
        return step.flow_matching(config)
    return config if kind == "guided" else step.changed(config, {"guidance": {"kappa": 0.0}})


@mock.patch.object(layers, "kept_in_memory", lambda x, other: x)
def lowered(kind):
    """Return the lowered step, whose cost analysis counts its FLOPs, and the first state."""
    z, t, labels = jnp.zeros((1, *LATENT)), jnp.zeros(1), jnp.zeros(1, int)
    if kind == "improved":
        network = make_network(config_of(kind), SPEC)
        of_params = functools.partial(improved_loss, network)
        init = functools.partial(network.init, r=t, t=t, condition=Condition(labels))
    else:
        network = DiT()
        of_params = functools.partial(loss, network, kind=kind)
        init = functools.partial(network.init, r=t, t=t, labels=labels)

    @jax.jit
    def first_state():
        params = init(jax.random.key(1), z)
        return params, OPTIMIZER.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0)

    batch = (jax.ShapeDtypeStruct((BATCH, *s), dtype) for s, dtype in ((LATENT, "f4"), ((), "i4")))
    one_step = jax.jit(functools.partial(train_step, loss=of_params), donate_argnums=0)
    return one_step.lower(jax.eval_shape(first_state), *batch), first_state


def contender(program, first_state, batches):
    """Return a contender for `measure.take_turns`."""
    state = first_state()

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
    source, mesh = step.Noise(SPEC), make_mesh(data=1, fsdp=1)
    for kind in ("flow matching", "plain", "guided", "improved"):
        config = config_of(kind)
        say(f"{kind}: compiling both, then timing {repeats} steps of each")
        textbook, first_state = lowered(kind)
        gflop = textbook.cost_analysis()["flops"] / 1e9
        batches = step.fresh_batches(config, source, mesh)
        theirs = contender(textbook.compile(), first_state, batches)
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

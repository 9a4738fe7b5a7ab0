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
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, GuidanceScale, Prediction
from mf_jax.models import layers
from mf_jax.runtime.sharding import make_mesh

WIDTH, DEPTH, HEADS, PATCH, BATCH = 384, 12, 6, 4, 16
HEAD_DEPTH = 8  # blocks of each head of improved MeanFlow
SPEC = DataSpec((32, 32, 4), 1000)
OPTIMIZER = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.0)


def _modulated(x, shift, scale):
    norm = nn.LayerNorm(use_bias=False, use_scale=False)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def _embedded(t):
    angles = t[:, None] * 10_000 ** -jnp.linspace(0, 1, 128)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return nn.Dense(WIDTH)(nn.silu(nn.Dense(WIDTH)(waves)))


def _block(x, c):
    shift, scale, gate, *mlp = jnp.split(nn.Dense(6 * WIDTH)(nn.silu(c)), 6, axis=1)
    qkv = nn.Dense(3 * WIDTH)(_modulated(x, shift, scale))
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5)
    seen = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = x + gate[:, None] * nn.Dense(WIDTH)(seen)
    shift, scale, gate = mlp
    hidden = nn.gelu(nn.Dense(4 * WIDTH)(_modulated(x, shift, scale)))
    return x + gate[:, None] * nn.Dense(WIDTH)(hidden)


class DiT(nn.Module):
    """A DiT without a thought for XLA."""

    @nn.compact
    def __call__(self, z, *, r, t, condition):
        """Return u; the null label, -1, is the last of the table."""
        patches = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH))(z)
        b, height, width, _ = patches.shape
        x = patches.reshape(b, height * width, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        labels = nn.Embed(SPEC.num_classes + 1, WIDTH)(condition.labels)
        c = _embedded(t) + _embedded(t - r) + labels
        for _ in range(DEPTH):
            x = _block(x, c)
        shift, scale = jnp.split(nn.Dense(2 * WIDTH)(nn.silu(c)), 2, axis=1)
        x = nn.Dense(PATCH**2 * z.shape[-1])(_modulated(x, shift, scale))
        x = x.reshape(b, height, width, PATCH, PATCH, -1).swapaxes(2, 3)
        return Prediction(x.reshape(z.shape))


def _error(value, target):
    errors = jnp.sum((value - jax.lax.stop_gradient(target)) ** 2, axis=(1, 2, 3))
    return jnp.mean(errors * jax.lax.stop_gradient(1 / (errors + 0.01)))


def loss(params, key, x, labels, *, network, kind):
    """Return the loss of flow matching, or of MeanFlow: plain, guided or improved.

    Guided has omega 1 and kappa 0.5, improved a second head and a drawn scale of guidance.
    """
    noise_key, times_key, drop_key, scale_key = jax.random.split(key, 4)
    e = jax.random.normal(noise_key, x.shape)
    r, t = jnp.sort(jax.nn.sigmoid(jax.random.normal(times_key, (2, len(x))) - 0.4), axis=0)
    r = jnp.where(jnp.arange(len(x)) < len(x) * (0.5 if kind == "improved" else 0.75), t, r)
    told = jnp.where(jax.random.uniform(drop_key, labels.shape) < 0.1, NO_LABEL, labels)
    at, one, null = t[:, None, None, None], jnp.ones_like(t), jnp.full_like(told, NO_LABEL)
    z, v, drawn = (1 - at) * x + at * e, e - x, None
    if kind == "improved":
        omega, t_min, t_max = jax.random.uniform(scale_key, (3, len(x)))
        drawn = GuidanceScale(omega=1 + 7 * omega, t_min=t_min / 2, t_max=(1 + t_max) / 2)

    def both(z, r, t, labels=told, scale=drawn):
        found = network.apply(params, z, r=r, t=t, condition=Condition(labels, guidance=scale))
        return found.u, found.v

    if kind == "flow matching":
        return _error(both(z, t, t)[0], v)
    if kind == "guided":
        v = v + 0.5 * (both(z, t, t)[0] - both(z, t, t, null)[0])
    tangent = v
    if kind == "improved":
        asked = (told,), (labels,), (null, GuidanceScale(one, 0 * one, one))
        tangent, of_class, unguided = (both(z, t, t, *each)[1] for each in asked)
        is_guided = (told != NO_LABEL) & (drawn.t_min <= t) & (t <= drawn.t_max)
        extra = jnp.where(is_guided, 1 - 1 / drawn.omega, 0)
        v = v + extra[:, None, None, None] * (of_class - unguided)
    along = jax.lax.stop_gradient(tangent), jnp.zeros_like(r), one
    value, du_dt, head = jax.jvp(both, (z, r, t), along, has_aux=True)
    error = _error(value, v - (t - r)[:, None, None, None] * du_dt)
    return error + _error(head, v) if kind == "improved" else error


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
    network = make_network(config_of(kind), SPEC) if kind == "improved" else DiT()
    of_params = functools.partial(loss, network=network, kind=kind)
    z, t, labels = jnp.zeros((1, *SPEC.shape)), jnp.zeros(1), jnp.zeros(1, int)

    @jax.jit
    def first_state():
        params = network.init(jax.random.key(1), z, r=t, t=t, condition=Condition(labels))
        return params, OPTIMIZER.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, x, labels):
        params, opt_state, ema, count = state
        key = jax.random.fold_in(jax.random.key(0), count)
        gradient = jax.grad(of_params)(params, key, x, labels)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, optax.incremental_update(params, ema, 1e-4), count + 1

    batch = jax.ShapeDtypeStruct((BATCH, *SPEC.shape), "f4"), jax.ShapeDtypeStruct((BATCH,), "i4")
    return train_step.lower(jax.eval_shape(first_state), *batch), first_state


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
        batches = ((x, labels) for x, labels, *_ in step.fresh_batches(config, source, mesh))
        theirs = step.contender(textbook.compile(), first_state(), batches)
        row, program = step.compile_step(config, source, mesh, say)
        ours = step.contender_of(config, program, source, mesh)
        seconds = measure.take_turns(theirs, ours, repeats=repeats, dropped=2)
        first, median, third = np.quantile(np.divide(*seconds[::-1]), (0.25, 0.5, 0.75))
        say(
            f"{kind}: textbook {gflop:.1f} GFLOP, {np.median(seconds[0]):.2f} s; ours "
            f"{row['gflop']:.1f} GFLOP, {np.median(seconds[1]):.2f} s: {row['gflop'] / gflop:.3f} "
            f"of the FLOPs, {median:.3f} ({first:.3f} to {third:.3f}) of the time"
        )


if __name__ == "__main__":
    main()

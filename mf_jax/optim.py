"""The optimiser, its schedule, and moving averages of the parameters."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.tree_util import DictKey, KeyPath, tree_map_with_path
from jaxtyping import Array, Int, PyTree
from optax.contrib import MuonDimensionNumbers

from mf_jax.flow.errors import BadInput, check_known

OPTIMIZERS = ("adamw", "muon", "radam")
SCHEDULES = ("constant", "cosine")
_NOT_HIDDEN = ("patch_embedding", "bottleneck")
"""Linear layers that see the data: convolutions, and so no matrices, in the published code."""
KIMG = "kimg"
"""The end of an average's name that is a half-life, in thousands of images."""


def learning_rate(*, lr: float, warmup_steps: int, schedule: str, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    A linear warm-up to the peak comes before a schedule, `constant`, or `cosine` to 0 at the last
    of all the steps.
    """
    after = optax.constant_schedule(lr)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, max(num_steps - warmup_steps, 1))
    if not warmup_steps:
        return after
    # the first step moves: step k of the warm-up uses (k + 1) / warmup_steps of the peak
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def _is_fused(path: KeyPath) -> bool:
    return path[-2:] == (DictKey("qkv"), DictKey("kernel"))


def _split_qkv(tree: PyTree, *, undo: bool = False) -> PyTree:
    """Make three matrices of each fused projection: `[..., in, 3 out]` to `[..., in, 3, out]`."""

    def split(path: KeyPath, x: Array) -> Array:
        if not _is_fused(path):
            return x
        return x.reshape(*x.shape[:-2], -1) if undo else x.reshape(*x.shape[:-1], 3, -1)

    return tree_map_with_path(split, tree)


def muon_dimensions(params: PyTree) -> PyTree:
    """Return the matrix axes of each parameter that muon moves, and None where adamw does.

    Muon moves the kernels of linear layers, except the patch embedding. Adamw moves tables, learned
    tokens and positions, gates, norms, biases and convolutions. Axes in front count matrices, each
    made orthogonal by itself: blocks in a loop (`model.scan`), parts that `_split_qkv` leaves.
    """

    def dimensions(path: KeyPath, leaf: Any) -> MuonDimensionNumbers | None:
        *layers, name = (entry.key for entry in path)
        axes = 2 + ("blocks" in layers) + _is_fused(path)
        if name != "kernel" or leaf.ndim != axes or set(layers) & set(_NOT_HIDDEN):
            return None
        return MuonDimensionNumbers(reduction_axis=-2 - _is_fused(path), output_axis=-1)

    return tree_map_with_path(dimensions, params)


def _on_split_qkv(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(_split_qkv(updates), state, _split_qkv(params))
        return _split_qkv(updates, undo=True), state

    return optax.GradientTransformation(lambda params: inner.init(_split_qkv(params)), update)


def make_optimizer(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    name: str = "adamw",
    momentum: float = 0.95,
) -> optax.GradientTransformation:
    """Return the optimiser with optional clipping.

    Args:
      weight_decay: decoupled.
      clip_norm: clip gradients to this global norm first; 0 = off.
      name: one of `OPTIMIZERS`. `muon` moves matrices by their orthogonalised momentum
        (`muon_dimensions`), all else by adam with Nesterov momentum, at the same rate. `radam`
        holds adam's first steps back, for a warm-up of its own.
      momentum: of muon.

    Source: Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; as pixel MeanFlow
    uses it, arXiv 2601.22158, appendix A; RAdam, arXiv 1908.03265.
    """
    check_known("optim.name", name, OPTIMIZERS)
    if name == "adamw":
        optimizer = optax.adamw(rate, b1, b2, weight_decay=weight_decay)
    elif name == "radam":
        decayed = optax.add_decayed_weights(weight_decay)
        moved = optax.scale_by_learning_rate(rate)
        optimizer = optax.chain(optax.scale_by_radam(b1, b2), decayed, moved)
    else:
        muon = optax.contrib.muon(
            rate,
            beta=momentum,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        optimizer = _on_split_qkv(muon)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def average_name(decay: float) -> str:
    """Return the name of the moving average with this decay, e.g. "0.9999"."""
    return repr(float(decay))


def decay_of(name: str, *, batch_size: int) -> float:
    """Return the decay per step of a moving average, which its name or its half-life says."""
    if name.endswith(KIMG):
        return 0.5 ** (batch_size / (1000 * float(name.removesuffix(KIMG))))
    return float(name)


def forgetful(names: Sequence[str], *, num_steps: int, batch_size: int, fixed: str = "") -> str:
    """Return a warning of averages that still are the initial parameters in part, "" if none is.

    `fixed`, the average of targets, may be a teacher that stays.
    """
    left = {name: decay_of(name, batch_size=batch_size) ** num_steps for name in names}
    late = [f"{n:.0%} of {name}" for name, n in left.items() if n > 0.01 and name != fixed]
    told = f"after {num_steps:,} steps {', '.join(late)} will still be the initial parameters"
    return f"{told}; set ema.rampup=0.05, or a smaller ema.decays" * bool(late)


def choose_ema(key: str, name: str, names: Sequence[str]) -> str:
    """Return the one of a run's averages that a name selects; `none` is no average.

    "" is the first that is no frozen teacher.
    """
    allowed = (*names, "none")
    if name not in ("", *allowed):
        raise BadInput(f"{key}={name!r}: this run has {', '.join(allowed)}")
    return name or next(each for each in allowed if each != average_name(1.0))


def update_averages(
    averages: dict[str, PyTree],
    params: PyTree,
    *,
    batch_size: int,
    step: Int[Array, ""] | int = 0,
    rampup: float = 0.0,
    every_steps: int = 1,
    fixed: str = "",
) -> dict[str, PyTree]:
    """Move each average towards the parameters: a <- d a + (1 - d) p, with the decay d.

    Args:
      step: steps done before this one.
      rampup: longest half-life as a share of those steps, or of their images; 0 = no limit.
      every_steps: steps after which the averages move, as far as in as many moves.
      fixed: the average that has no limit, and moves at each step.

    Source: EDM, arXiv 2206.00364, appendix F.2.
    """

    def move(name: str, average: PyTree) -> PyTree:
        every = 1 if name == fixed else every_steps
        share = 1 - decay_of(name, batch_size=batch_size) ** every
        if rampup and name != fixed:
            halved = -every * math.log(2) / (rampup * jnp.float32(step))
            share = jnp.maximum(share, -jnp.expm1(halved))
        if every == 1:
            return optax.incremental_update(params, average, share)
        moved = functools.partial(optax.incremental_update, params, step_size=share)
        return jax.lax.cond((step + 1) % every == 0, moved, lambda average: average, average)

    return {name: move(name, average) for name, average in averages.items()}

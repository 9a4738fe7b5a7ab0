"""What single keys of a config may hold: one table of ranges."""

import math
import os
from operator import attrgetter
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput, check_allowed, collected
from mf_jax.models import SIZES
from mf_jax.optim import OPTIMIZERS, SCHEDULES
from mf_jax.runtime.sharding import GATHERS

_LARGEST = 2**31 - 1
ALLOWED = {
    # an interval, where {KEY} is that key's value, or names: keys; of a tuple for each
    "(0, inf)": "optim.lr ema.halflives_kimg job.start_timeout_seconds bench.memory_gb",
    "[0, inf)": "prepare.max_bad model.depth model.head_depth model.r_blocks model.width "
    "model.num_heads model.bottleneck optim.weight_decay optim.clip_norm ema.rampup bench.repeats "
    "log.sample_every_steps eval.checkpoints eval.least_samples bench.dropped",
    "[1, inf)": "prepare.shards prepare.batch_size data.image_size model.patch_size model.channels "
    "model.rank model.num_blocks model.channel_multipliers model.attention_resolutions "
    "train.num_steps train.log_every_steps ema.every_steps checkpoint.every_steps times.levels "
    "checkpoint.keep job.heartbeat_timeout_seconds sample.num eval.num_samples bench.tokens",
    "[0, 1)": "model.dropout optim.b1 optim.b2 optim.momentum ema.decays",
    f"[0, {2**31})": "seed",
    "(0, 1)": "model.t_clip",
    "[0, {prepare.shards}]": "prepare.process_count",
    "[0, {train.num_steps}]": "optim.warmup_steps",
    "[0, 256)": "job.stopped_exit_code",
    f"[1, {2**14}]": "bench.devices",
    ("float32", "bfloat16"): "model.dtype",
    ("velocity", "data"): "model.prediction",
    ("number", "name"): "data.class_order",
    OPTIMIZERS: "optim.name",
    SCHEDULES: "optim.schedule",
    GATHERS: "mesh.gather",
    ("data", "balanced", "random"): "eval.labels",
}
_TUPLES = {
    # keys: of what, how this is called, an example; the command line checks only for a tuple
    "model.channel_multipliers model.attention_resolutions eval.steps eval.checkpoints bench.shape "
    "bench.tokens": (int, "a whole number", "(1,)"),
    "data.latent_mean data.latent_std ema.decays ema.halflives_kimg draws.label_drop_window "
    "sample.times sample.condition sample.guidance eval.omegas": (float, "a number", "(1.0,)"),
    "sample.labels": (int | str, "a class", "\"(1,'cat')\""),
    "sample.views eval.emas eval.references": (str, "a text", "\"('a','b')\""),
    "eval.intervals": (tuple, "(t_min, t_max)", "'((0.4, 0.6),)'"),
}


def check_values(config: ConfigDict) -> None:
    """Raise BadInput, naming all of them, if keys have values that nothing could work with."""
    check_tuples(config)
    if problems := wrong_values(config):
        raise BadInput("; ".join(problems))


def check_tuples(config: ConfigDict) -> None:
    """Raise BadInput unless tuples hold what they must."""
    for keys, (kind, wanted, example) in _TUPLES.items():
        for key in keys.split():
            if wrong := [each for each in attrgetter(key)(config) if not _fits(each, kind)]:
                raise BadInput(f"{key}: {wrong[0]!r} is not {wanted}; for example {key}={example}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, float) for each in value)
    kind = int | float if kind is float else kind
    return isinstance(value, kind) and not isinstance(value, bool)


def wrong_values(config: ConfigDict) -> list[str]:
    """Return what is wrong by `ALLOWED`."""
    problems = []
    for allowed, keys in ALLOWED.items():
        allowed = allowed.format(**config) if isinstance(allowed, str) else allowed
        for key in keys.split():
            with collected(problems):
                check_allowed(key, attrgetter(key)(config), allowed)
    for key in ("ema.decays", "ema.halflives_kimg"):
        values = attrgetter(key)(config)
        if len(set(values)) < len(values):
            problems.append(f"{key}={values}: must be different numbers")
    return problems


def check_sizes(config: ConfigDict, mode: str) -> None:
    """Raise BadInput, before anything is allocated, for values that a mode cannot work with."""
    if mode == "weights":
        return
    (check_tuples if mode == "train" else check_values)(config)  # training tells all at once
    is_of_others = mode == "bench" and config.bench.what == "fits"  # which starts JAX itself
    memory = math.inf if is_of_others else _memory()
    problems = [
        f"{keys}: needs at least {size / 1e9:.3g} GB; the machine has {memory / 1e9:.3g}: use less"
        for keys, size in _least_bytes(config, mode).items()
        if size > memory
    ]
    for key, value in flatten_dict(config.to_dict(), sep=".").items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, int) and abs(each) > _LARGEST for each in values):
            problems.append(f"{key}={value}: must be at most {_LARGEST}")
    if problems:
        raise BadInput("; ".join(problems))


def _memory() -> int | float:
    """Return the bytes of all devices, or of all machines where their devices are processors."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] * jax.device_count()
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    return pages * jax.process_count()


def _least_bytes(config: ConfigDict, mode: str) -> dict[str, int | float]:
    """Return {keys and values: bytes that a mode holds at once at the very least}."""
    data, model, sample, scored = config.data, config.model, config.sample, config.eval
    pixels = 1 if data.name == "toy2d" else data.image_size**2
    pixels = math.prod(config.bench.shape) if mode == "bench" and config.bench.shape else pixels
    rows = pixels // 64 if data.name == "latents" else pixels
    sizes = SIZES.get(model.name, {}).get(model.size, {})
    depth, width = (model[key] or sizes.get(key, 1) for key in ("depth", "width"))
    channels = model.channels * max((1, *model.channel_multipliers))
    squares = {
        "mlp": depth * width**2,
        "unet": 9 * model.num_blocks * channels**2,
        "affine": rows**2,
        "low_rank": rows * model.rank,
    }
    params = squares.get(model.name, width * (12 * depth * width + model.bottleneck))
    network = f"model.depth={depth}, model.width={width}"
    if model.name in squares:
        network = f"model.width={width}, model.channels={channels}, model.rank={model.rank}"
    side, batch = f"data.image_size={data.image_size}", config.train.batch_size
    tokens = max((rows // max(model.patch_size, 1) ** 2, *config.bench.tokens * (mode == "bench")))
    needs = {network: 4 * params}
    if mode in ("train", "bench"):
        needs[f"train.batch_size={batch}, {side}"] = 4 * batch * max(rows, tokens)
    if mode == "sample":
        needs[f"sample.num={sample.num}, {side}"] = sample.num * (8 + pixels)
        needs[f"sample.steps={sample.steps}"] = 64 * sample.steps
    if mode == "eval":
        needs[f"eval.num_samples={scored.num_samples}"] = 8 * scored.num_samples
        size = min(scored.batch_size, scored.num_samples)
        needs[f"eval.batch_size={size}, {side}"] = size * pixels
        needs[f"eval.steps={scored.steps}"] = 64 * max((1, *scored.steps))
    if mode == "prepare":
        batch = config.prepare.batch_size
        needs[f"prepare.batch_size={batch}, {side}"] = 12 * batch * pixels
    return needs

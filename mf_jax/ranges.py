"""What single keys of a config may hold: one table of ranges."""

import math
import os
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput, check_known
from mf_jax.models import SIZES
from mf_jax.optim import OPTIMIZERS, SCHEDULES
from mf_jax.runtime.sharding import GATHERS

_LARGEST = 2**31 - 1
RANGES = (
    # key, low, high (or the key that holds it), which ends belong to it; of a tuple for each number
    ("seed", 0, 2**31, "[)"),
    ("prepare.shards", 1, math.inf, "[)"),
    ("prepare.batch_size", 1, math.inf, "[)"),
    ("prepare.max_bad", 0, math.inf, "[)"),
    ("prepare.process_count", 0, "prepare.shards", "[]"),
    ("data.image_size", 1, math.inf, "[)"),
    # to write down a deeper network takes minutes, whatever its width
    *((f"model.{size}", 0, 1024, "[]") for size in ("depth", "head_depth", "r_blocks")),
    *((f"model.{size}", 0, math.inf, "[)") for size in ("width", "num_heads", "bottleneck")),
    ("model.num_blocks", 1, 1024, "[]"),
    *((f"model.{size}", 1, math.inf, "[)") for size in ("patch_size", "channels", "rank")),
    ("model.channel_multipliers", 1, math.inf, "[)"),
    ("model.attention_resolutions", 1, math.inf, "[)"),
    ("model.t_clip", 0, 1, "()"),
    ("model.dropout", 0, 1, "[)"),
    ("objective.alpha_start", 0, 1, "[]"),
    ("objective.alpha_end", 0, 1, "[]"),
    ("objective.anneal_from", 0, math.inf, "[)"),
    ("objective.derivative_below", 0, math.inf, "[)"),
    ("objective.target_ema", 0, 1, "[)"),
    ("times.levels", 1, math.inf, "[)"),
    ("train.num_steps", 1, math.inf, "[)"),
    ("train.log_every_steps", 1, math.inf, "[)"),
    ("optim.lr", 0, math.inf, "()"),
    ("optim.warmup_steps", 0, "train.num_steps", "[]"),
    ("optim.b1", 0, 1, "[)"),
    ("optim.b2", 0, 1, "[)"),
    ("optim.momentum", 0, 1, "[)"),
    ("optim.weight_decay", 0, math.inf, "[)"),
    ("optim.clip_norm", 0, math.inf, "[)"),
    ("ema.decays", 0, 1, "[)"),
    ("ema.halflives_kimg", 0, math.inf, "()"),
    ("ema.rampup", 0, math.inf, "[)"),
    ("ema.every_steps", 1, math.inf, "[)"),
    ("log.sample_every_steps", 0, math.inf, "[)"),
    ("checkpoint.every_steps", 1, math.inf, "[)"),
    ("checkpoint.keep", 1, math.inf, "[)"),
    ("job.start_timeout_seconds", 0, math.inf, "()"),
    ("job.heartbeat_timeout_seconds", 1, math.inf, "[)"),
    ("job.stopped_exit_code", 0, 256, "[)"),
    ("sample.num", 1, math.inf, "[)"),
    ("eval.num_samples", 1, math.inf, "[)"),
    ("eval.batch_size", 1, math.inf, "[)"),
    ("eval.seed", 0, 2**31, "[)"),
    ("eval.checkpoints", 0, math.inf, "[)"),
    ("eval.least_samples", 0, math.inf, "[)"),
    ("bench.repeats", 0, math.inf, "[)"),
    ("bench.dropped", 0, math.inf, "[)"),
    ("bench.tokens", 1, math.inf, "[)"),
    ("bench.devices", 1, 2**14, "[]"),
    ("bench.memory_gb", 0, math.inf, "()"),
)
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.prediction": ("velocity", "data"),
    "data.class_order": ("number", "name"),
    "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "mesh.gather": GATHERS,
    "eval.labels": ("balanced", "random"),
}
_TUPLES = {
    "data.latent_mean": float,
    "data.latent_std": float,
    "model.channel_multipliers": int,
    "model.attention_resolutions": int,
    "ema.decays": float,
    "ema.halflives_kimg": float,
    "draws.label_drop_window": float,
    "sample.times": float,
    "sample.labels": int | str,
    "sample.condition": float,
    "sample.views": str,
    "sample.guidance": float,
    "eval.steps": int,
    "eval.omegas": float,
    "eval.intervals": tuple,
    "eval.emas": str,
    "eval.checkpoints": int,
    "eval.references": str,
    "bench.shape": int,
    "bench.tokens": int,
}
"""What they hold: the command line checks only that they are tuples."""


def check_values(config: ConfigDict) -> None:
    """Raise BadInput, naming all of them, if keys have values that nothing could work with."""
    check_tuples(config)
    if problems := list(wrong_values(config)):
        raise BadInput("; ".join(problems))


def check_tuples(config: ConfigDict) -> None:
    """Raise BadInput unless tuples hold what they must."""
    words = {
        int: "a whole number",
        int | str: "a class",
        float: "a number",
        str: "a text",
        tuple: "(t_min, t_max)",
    }
    examples = {
        int: "(1,)",
        int | str: "\"(1,'cat')\"",
        float: "(1.0,)",
        str: "\"('a','b')\"",
        tuple: "'((0.4, 0.6),)'",
    }
    for key, kind in _TUPLES.items():
        for value in attrgetter(key)(config):
            if not _fits(value, kind):
                fix = f"write for example {key}={examples[kind]}"
                raise BadInput(f"{key}: {value!r} is not {words[kind]}; {fix}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, float) for each in value)
    return not isinstance(value, bool) and isinstance(
        value, (int, float) if kind is float else kind
    )


def wrong_values(config: ConfigDict) -> Iterator[str]:
    """Yield what is wrong by `RANGES` and `CHOICES`."""
    for key, low, high, brackets in RANGES:
        value = attrgetter(key)(config)
        end = attrgetter(high)(config) if isinstance(high, str) else high
        values = value if isinstance(value, tuple) else (value,)
        if not all(_is_within(each, low, end, brackets) for each in values):
            word = "at least" if brackets[0] == "[" else "above"
            limits = f"within {brackets[0]}{low}, {end}{brackets[1]}"
            yield f"{key}={value}: must be {f'{word} {low}' if end == math.inf else limits}"
    for key in ("ema.decays", "ema.halflives_kimg"):
        values = attrgetter(key)(config)
        if len(set(values)) < len(values):
            yield f"{key}={values}: must be different numbers"
    for key, known in CHOICES.items():
        try:
            check_known(key, attrgetter(key)(config), known)
        except BadInput as problem:
            yield str(problem)


def check_sizes(config: ConfigDict, mode: str) -> None:
    """Raise BadInput, before anything is allocated, for sizes that the machines cannot hold."""
    if mode == "weights":
        return
    check_tuples(config)
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


def _is_within(value: int | float, low: int | float, high: int | float, brackets: str) -> bool:
    above = value >= low if brackets[0] == "[" else value > low
    return above and (value <= high if brackets[1] == "]" else value < high)

"""From a config to the records it describes; every problem of a config in one error, before any device work."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from mf_jax.data import Source, make_source
from mf_jax.draws import DrawScheme, group_sizes
from mf_jax.guidance import Guidance
from mf_jax.models import DIT_SIZES, NETWORKS
from mf_jax.models.layers import TIME_CONDITIONINGS
from mf_jax.objectives import OBJECTIVES, Objective
from mf_jax.objectives.weighting import AdaptiveWeight
from mf_jax.optim import SCHEDULES
from mf_jax.samplers import time_grid
from mf_jax.times import TIMES
from mf_jax.types import NO_LABEL, BadInput, nearest

SECTIONS_OF_A_RUN = (
    "seed",
    "data",
    "model",
    "objective",
    "guidance",
    "weight",
    "times",
    "draws",
    "train",
    "optim",
    "ema",
)
"""What decides a run's numbers; the other sections may change when a run is continued."""


def look_up(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return a table's entry.

    Args:
      key: the config key that names it, for the error.
      name: the entry's name.
      table: the known entries.

    Raises:
      BadInput: if the name is unknown; lists the known ones.
    """
    if name not in table:
        raise BadInput(f"{key}={name!r}: must be one of {', '.join(table)}{nearest(name, table)}")
    return table[name]


def from_section(record: Callable, section: ConfigDict, **more: Any) -> Any:
    """Construct a record from the keys of a section that are its fields.

    Args:
      record: a dataclass.
      section: its values, and perhaps those of other records.
      more: fields that the config does not hold.
    """
    fields = {field.name for field in dataclasses.fields(record)}
    return record(**{key: value for key, value in section.items() if key in fields}, **more)


def make_objective(config: ConfigDict) -> Objective:
    """Return the objective that a config names, with its guidance and weight."""
    objective = look_up("objective.name", config.objective.name, OBJECTIVES)
    parts = {"guidance": (Guidance, config.guidance), "weight": (AdaptiveWeight, config.weight)}
    fields = {field.name for field in dataclasses.fields(objective)}
    more = {name: from_section(*part) for name, part in parts.items() if name in fields}
    return from_section(objective, config.objective, **more)


def make_scheme(config: ConfigDict) -> DrawScheme:
    """Return how a config draws its random numbers."""
    times = look_up("times.name", config.times.name, TIMES)
    return from_section(DrawScheme, config.draws, times=from_section(times, config.times))


def make_network(config: ConfigDict, *, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the network that a config names.

    Args:
      config: the run's config.
      shape: of one data element, (H, W, C) or (D,).
      num_classes: of the data; 0 makes an unconditional network.

    Raises:
      BadInput: for unknown names, or sizes that do not fit one another or the data.
    """
    model = config.model
    network = look_up("model.name", model.name, NETWORKS)
    look_up("model.time_conditioning", model.time_conditioning, TIME_CONDITIONINGS)
    look_up("model.dtype", model.dtype, {"float32": 0, "bfloat16": 0})
    if (model.name == "dit") != (len(shape) == 3):
        kind, fit = ("images", "dit") if len(shape) == 3 else ("vectors", "mlp")
        raise BadInput(
            f"model.name={model.name!r}: the data are {kind} of shape {shape}; use model.name={fit}"
        )
    sizes = {name: model[name] for name in ("depth", "width", "num_heads")}
    if model.name == "dit":
        row = look_up("model.size", model.size, DIT_SIZES)
        sizes = {name: given or default for (name, given), default in zip(sizes.items(), row, strict=True)}
        _check_dit(sizes, model.patch_size, shape)
    elif not (sizes["depth"] > 0 and sizes["width"] > 0):
        raise BadInput(
            f"model.depth={model.depth}, model.width={model.width}: an mlp needs both above 0; try 4 and 256"
        )
    return from_section(network, ConfigDict({**model, **sizes}), num_classes=num_classes)


def _check_dit(sizes: Mapping[str, int], patch_size: int, shape: tuple[int, ...]) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise BadInput(f"model.{name}={value}: must be above 0, or 0 for what model.size says")
    if patch_size <= 0 or shape[0] % patch_size or shape[1] % patch_size:
        raise BadInput(f"model.patch_size={patch_size}: must divide the image size {shape[0]}x{shape[1]}")
    if sizes["width"] % 4 or sizes["width"] % sizes["num_heads"]:
        raise BadInput(
            f"model.width={sizes['width']}: must be divisible by 4 and by model.num_heads={sizes['num_heads']}"
        )


def ema_names(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of a run's moving averages: their decays as written, e.g. ("0.999", "0.9999")."""
    return tuple(repr(float(decay)) for decay in config.ema.decays)


def choose_ema(config: ConfigDict, key: str, name: str) -> str:
    """Return which parameters `sample.ema` or `eval.ema` selects: a name of `ema_names`, or `none`.

    Raises:
      BadInput: if the run has no such moving average.
    """
    names = (*ema_names(config), "none")
    if name == "":
        return names[0]
    if name not in names:
        raise BadInput(f"{key}={name!r}: this run has {', '.join(names)}")
    return name


def validate(config: ConfigDict, *, num_devices: int) -> Source:
    """Check a whole config, data included.

    Args:
      config: the run's config.
      num_devices: over which the batch is split.

    Returns:
      The training split of the data.

    Raises:
      BadInput: one line with every problem found.
    """
    problems: list[str] = []

    def check(build: Callable[[], Any]) -> Any:
        try:
            return build()
        except BadInput as problem:
            problems.append(str(problem))
            return None

    source = check(lambda: make_source(config.data, split="train"))
    check(lambda: make_objective(config))
    check(lambda: make_scheme(config))
    check(lambda: _check_batch(config, num_devices))
    problems += [message for message, is_wrong in _wrong_numbers(config).items() if is_wrong]
    if source is not None:
        check(lambda: make_network(config, shape=source.shape, num_classes=source.num_classes))
        check(lambda: check_labels(config.sample.labels, source.num_classes))
        check(lambda: _check_conditioning(config, source))
    for build in _sampling_checks(config):
        check(build)
    if problems:
        raise BadInput("; ".join(problems))
    return source


def _check_batch(config: ConfigDict, num_devices: int) -> None:
    size, group = config.train.batch_size, sum(group_sizes(config.draws.instant_share))
    if size <= 0 or size % (group * num_devices):
        raise BadInput(
            f"train.batch_size={size}: must be a multiple of {group * num_devices}, since rows with r = t and r < t "
            f"are dealt in groups of {group} (draws.instant_share={config.draws.instant_share}) on each of "
            f"{num_devices} device{'s' * (num_devices > 1)}"
        )


def _check_conditioning(config: ConfigDict, source: Source) -> None:
    omega, kappa = config.guidance.omega, config.guidance.kappa
    if source.num_classes == 0 and (omega, kappa) != (1, 0):
        raise BadInput(
            f"guidance.omega={omega}, guidance.kappa={kappa}: the data have no labels to guide by; use omega=1, kappa=0"
        )
    if config.data.flip and len(source.shape) != 3:
        raise BadInput("data.flip=True: only images can be mirrored; use data.flip=False")


def _wrong_numbers(config: ConfigDict) -> dict[str, bool]:
    """Return what must hold of single keys, and whether it does not."""
    train, optim, decays = config.train, config.optim, config.ema.decays
    at_least_one = {
        "train.num_steps": train.num_steps,
        "log.every_steps": config.log.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "sample.num": config.sample.num,
        "sample.batch_size": config.sample.batch_size,
        "eval.num_samples": config.eval.num_samples,
        "eval.batch_size": config.eval.batch_size,
    }
    return {f"{key}={value}: must be at least 1": value < 1 for key, value in at_least_one.items()} | {
        f"seed={config.seed}: must be within [0, 2^31)": not 0 <= config.seed < 2**31,
        f"sample.seed={config.sample.seed}: must be within [0, 2^31)": not 0 <= config.sample.seed < 2**31,
        f"eval.seed={config.eval.seed}: must be within [0, 2^31)": not 0 <= config.eval.seed < 2**31,
        f"optim.lr={optim.lr}: must be above 0 and finite; try 1e-3": not 0 < optim.lr < math.inf,
        f"optim.schedule={optim.schedule!r}: must be one of {', '.join(SCHEDULES)}"
        f"{nearest(optim.schedule, SCHEDULES)}": optim.schedule not in SCHEDULES,
        f"optim.warmup_steps={optim.warmup_steps}: must be within [0, train.num_steps={train.num_steps}]": (
            not 0 <= optim.warmup_steps <= train.num_steps
        ),
        f"optim.b1={optim.b1}: must be within [0, 1)": not 0 <= optim.b1 < 1,
        f"optim.b2={optim.b2}: must be within [0, 1)": not 0 <= optim.b2 < 1,
        f"optim.weight_decay={optim.weight_decay}: must be at least 0": not 0
        <= optim.weight_decay
        < math.inf,
        f"optim.clip_norm={optim.clip_norm}: must be above 0, or 0 for off": not 0
        <= optim.clip_norm
        < math.inf,
        f"ema.decays={tuple(decays)}: must be different numbers within [0, 1)": (
            len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays)
        ),
        f"log.sample_every_steps={config.log.sample_every_steps}: must be at least 0": (
            config.log.sample_every_steps < 0
        ),
    }


def _sampling_checks(config: ConfigDict) -> list[Callable[[], Any]]:
    return [
        lambda: time_grid(config.sample.steps, config.sample.times, key="sample"),
        lambda: [time_grid(steps, key="eval") for steps in config.eval.steps],
        lambda: choose_ema(config, "sample.ema", config.sample.ema),
        lambda: choose_ema(config, "eval.ema", config.eval.ema),
    ]


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Raise BadInput unless every label is a class of the model or `NO_LABEL`."""
    wrong = [label for label in labels if not NO_LABEL <= label < num_classes]
    if wrong and num_classes == 0:
        raise BadInput(f"sample.labels={tuple(labels)}: this model has no classes; leave labels out")
    if wrong:
        raise BadInput(
            f"sample.labels: {wrong[0]} is not a class; they go from 0 to {num_classes - 1}, -1 for none"
        )


def as_json(config: ConfigDict) -> str:
    """Return a config as JSON, keys in their own order."""
    return json.dumps(config.to_dict(), indent=1)


def check_same_run(config: ConfigDict, stored: Mapping[str, Any], workdir: str) -> None:
    """Check that a config continues the run of a workdir.

    A run under a constant schedule may be continued for more steps; nothing else that decides its numbers may change.

    Args:
      config: of the command.
      stored: the workdir's config, as read from JSON.
      workdir: named in the error.

    Raises:
      BadInput: naming each key that differs, and both values.
    """
    ours = json.loads(as_json(config))
    if ours["optim"]["schedule"] == "constant" and ours["train"]["num_steps"] >= stored["train"]["num_steps"]:
        ours["train"]["num_steps"] = stored["train"]["num_steps"]
    differences = [
        f"{section}.{key} {theirs!r} -> {mine!r}" if key else f"{section} {theirs!r} -> {mine!r}"
        for section in SECTIONS_OF_A_RUN
        for key, theirs, mine in _differences(stored.get(section), ours[section])
    ]
    if differences:
        raise BadInput(
            f"workdir {workdir} holds a run of another config ({', '.join(differences)}); "
            "choose another --workdir, or set these back"
        )


def _differences(stored: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(stored, dict) or not isinstance(ours, dict):
        return [] if stored == ours else [("", stored, ours)]
    keys = list(dict.fromkeys([*stored, *ours]))
    return [(k, stored.get(k), ours.get(k)) for k in keys if stored.get(k) != ours.get(k)]

"""Checks of a config: every problem in one error, before any device work; and that it is the run that it continues."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mf_jax.build import (
    check_guidance,
    check_labels,
    choose_ema,
    make_network,
    make_objective,
    make_scheme,
)
from mf_jax.data import Source, make_source
from mf_jax.errors import BadInput, nearest
from mf_jax.flow.sampler import time_grid
from mf_jax.models import parameter_shapes
from mf_jax.objectives import Controlled
from mf_jax.optim import OPTIMIZERS, SCHEDULES
from mf_jax.runtime.sharding import GATHERS
from mf_jax.scoring.grid import cells

SECTIONS_OF_A_RUN = (
    "seed",
    "data",
    "model",
    "objective",
    "guidance",
    "weight",
    "controls",
    "times",
    "draws",
    "init",
    "train",
    "optim",
    "ema",
)
"""What decides a run's numbers; the other sections may change when a run is continued."""
_PLACES = ("data.copy_to",)
"""Keys of these sections that decide nothing."""


EVAL_LABELS = ("balanced", "random")
_TUPLES = (
    ("ema", "decays", float),
    ("ema", "halflives_kimg", float),
    ("sample", "times", float),
    ("sample", "labels", int),
    ("sample", "guidance", float),
    ("data", "latent_mean", float),
    ("data", "latent_std", float),
    ("eval", "omegas", float),
    ("eval", "checkpoints", int),
    ("model", "channel_multipliers", int),
    ("model", "attention_resolutions", int),
    ("eval", "steps", int),
)


def check_tuples(config: ConfigDict) -> None:
    """Raise BadInput unless tuples hold numbers of their kind: the command line checks only that they are tuples."""
    for section, key in (("eval", "references"), ("eval", "emas")):
        if wrong := [value for value in config[section][key] if not isinstance(value, str)]:
            raise BadInput(
                f"{section}.{key}: {wrong[0]!r} is not a text; write for example --config.{section}.{key}=\"('a','b')\""
            )
    for section, key, kind in _TUPLES:
        for value in config[section][key]:
            if isinstance(value, bool) or not isinstance(value, int | kind):
                what = "a whole number" if kind is int else "a number"
                raise BadInput(
                    f"{section}.{key}: {value!r} is not {what}; write for example {section}.{key}=(1,)"
                )


def check_numbers(config: ConfigDict) -> None:
    """Raise BadInput, naming all of them, if single keys have values that nothing could work with."""
    problems = _problems(config)
    if problems:
        raise BadInput("; ".join(problems))


def _problems(config: ConfigDict) -> list[str]:
    return [message for message, is_wrong in _wrong_numbers(config).items() if is_wrong]


def validate(config: ConfigDict, *, num_devices: int, source: Source | None = None) -> Source:
    """Check a whole config, data included.

    Args:
      config: the run's config.
      num_devices: over which the batch is split.
      source: takes the place of the data that the config names, which are not opened then.

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

    check_tuples(config)  # nothing below could read them
    source = check(lambda: _training_split(config)) if source is None else source
    check(lambda: make_objective(config))
    check(lambda: make_scheme(config))
    check(lambda: _check_batch(config, num_devices))
    problems += _problems(config)
    if source is not None:
        check(lambda: _check_network(config, source))
        check(lambda: check_labels(config.sample.labels, source.num_classes, config))
        check(lambda: _check_conditioning(config, source))
    for build in _sampling_checks(config):
        check(build)
    if problems:
        raise BadInput("; ".join(dict.fromkeys(problems)))  # several checks build the same part
    return source


def _training_split(config: ConfigDict) -> Source:
    try:
        return make_source(config.data, split="train")
    except BadInput as problem:  # a source names its argument, which is a key of this section
        raise BadInput(f"data.{problem}") from problem


def _check_batch(config: ConfigDict, num_devices: int) -> None:
    size, group = config.train.batch_size, make_scheme(config).group
    if size <= 0 or size % (group * num_devices):
        fixed = config.draws.label_drop == "fixed_rows"
        also = f", label_drop_share={config.draws.label_drop_share}" * fixed
        raise BadInput(
            f"train.batch_size={size}: must be a multiple of {group * num_devices}, since rows with r = t and r < t "
            f"are dealt in groups of {group} (draws.instant_share={config.draws.instant_share}{also}) on each of "
            f"{num_devices} device{'s' * (num_devices > 1)}"
        )


def _check_conditioning(config: ConfigDict, source: Source) -> None:
    omega, kappa = config.guidance.omega, config.guidance.kappa
    if source.num_classes == 0 and (omega, kappa) != (1, 0):
        raise BadInput(
            f"guidance.omega={omega}, guidance.kappa={kappa}: the data have no labels to guide by; use omega=1, kappa=0"
        )
    if (omega, kappa) != (1, 0) and config.objective.name == "flow_matching":
        raise BadInput(
            f"guidance.omega={omega}, guidance.kappa={kappa}: flow_matching has no guidance in its target; "
            "use omega=1, kappa=0, or objective.name=meanflow"
        )
    if config.draws.omega_max > 1 and ((omega, kappa) != (1, 0) or source.num_classes == 0):
        raise BadInput(
            f"draws.omega_max={config.draws.omega_max}: guidance is drawn in the place of guidance.omega={omega}, "
            f"guidance.kappa={kappa}, and needs labels ({source.num_classes} classes); use omega=1, kappa=0, "
            "or omega_max=1"
        )
    if config.draws.omega_max > 1 and config.model.name != "in_context_dit":
        raise BadInput(
            f"draws.omega_max={config.draws.omega_max}: only model.name=in_context_dit can be told a guidance scale; "
            "use omega_max=1"
        )
    if config.draws.omega_max > 1 and config.objective.name == "flow_matching":
        raise BadInput(
            "draws.omega_max: flow_matching has no guidance in its target; use omega_max=1"
        )
    if (
        (omega, kappa) != (1, 0) or config.draws.omega_max > 1
    ) and config.draws.label_drop_share == 0:
        raise BadInput(
            f"guidance.omega={omega}, guidance.kappa={kappa}: guidance needs rows trained without their label; "
            "use draws.label_drop_share=0.1"
        )
    if config.data.flip and len(source.shape) != 3:
        raise BadInput("data.flip=True: only images can be mirrored; use data.flip=False")


def _check_network(config: ConfigDict, source: Source) -> None:
    network = make_network(config, shape=source.shape, num_classes=source.num_classes)
    parameter_shapes(network, source.shape)  # finds what does not fit
    objective, model = config.objective, config.model
    if model.attention == "fused" and (
        objective.name == "terminal_velocity" or isinstance(make_objective(config), Controlled)
    ):
        raise BadInput(
            "model.attention='fused': terminal_velocity and controls take the gradient of a derivative, which only "
            "model.attention=xla has"
        )
    needs_head = (
        objective.name in ("improved_meanflow", "pixel_meanflow") and objective.velocity == "head"
    )
    if needs_head and not (model.name == "in_context_dit" and model.second_head):
        raise BadInput(
            "objective.velocity='head': the network has no second head; use model.name=in_context_dit with "
            "model.second_head=True, or objective.velocity=boundary"
        )
    if objective.name == "pixel_meanflow" and model.prediction != "data":
        raise BadInput(
            f"model.prediction={model.prediction!r}: pixel_meanflow needs a network that predicts data"
        )
    if (
        make_objective(config).learns_average
        and model.name != "in_context_dit"
        and model.time_conditioning == "t"
    ):
        raise BadInput(
            f"model.time_conditioning='t': a network that is not told r can only learn flow_matching, not "
            f"{objective.name}; use t,t-r, or t|r with model.name=dit"
        )


def _wrong_numbers(config: ConfigDict) -> dict[str, bool]:
    """Return what must hold of single keys, and whether it does not."""
    train, optim, gather = config.train, config.optim, config.mesh.gather
    decays, halflives = config.ema.decays, config.ema.halflives_kimg
    at_least_one = {
        "train.num_steps": train.num_steps,
        "train.log_every_steps": config.train.log_every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "sample.num": config.sample.num,
        "sample.batch_size": config.sample.batch_size,
        "eval.num_samples": config.eval.num_samples,
        "eval.batch_size": config.eval.batch_size,
    }
    return {
        f"{key}={value}: must be at least 1": value < 1 for key, value in at_least_one.items()
    } | {
        f"seed={config.seed}: must be within [0, 2^31)": not 0 <= config.seed < 2**31,
        f"sample.seed={config.sample.seed}: must be within [0, 2^31)": not 0
        <= config.sample.seed
        < 2**31,
        f"eval.seed={config.eval.seed}: must be within [0, 2^31)": not 0
        <= config.eval.seed
        < 2**31,
        f"optim.lr={optim.lr}: must be above 0 and finite; try 1e-3": not 0 < optim.lr < math.inf,
        f"mesh.gather={gather!r}: must be one of {', '.join(GATHERS)}{nearest(gather, GATHERS)}": (
            gather not in GATHERS
        ),
        f"optim.schedule={optim.schedule!r}: must be one of {', '.join(SCHEDULES)}"
        f"{nearest(optim.schedule, SCHEDULES)}": optim.schedule not in SCHEDULES,
        f"optim.warmup_steps={optim.warmup_steps}: must be within [0, train.num_steps={train.num_steps}]": (
            not 0 <= optim.warmup_steps <= train.num_steps
        ),
        f"optim.name={optim.name!r}: must be one of {', '.join(OPTIMIZERS)}{nearest(optim.name, OPTIMIZERS)}": (
            optim.name not in OPTIMIZERS
        ),
        f"optim.momentum={optim.momentum}: must be within [0, 1)": not 0 <= optim.momentum < 1,
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
        f"ema.halflives_kimg={tuple(halflives)}: must be different numbers above 0, in 1,000 images; try (500.0,)": (
            len(set(halflives)) < len(halflives)
            or not all(0 < each < math.inf for each in halflives)
        ),
        f"eval.labels={config.eval.labels!r}: must be one of {', '.join(EVAL_LABELS)}"
        f"{nearest(config.eval.labels, EVAL_LABELS)}": config.eval.labels not in EVAL_LABELS,
        f"eval.least_samples={config.eval.least_samples}: must be at least 0": config.eval.least_samples
        < 0,
        f"log.sample_every_steps={config.log.sample_every_steps}: must be at least 0": (
            config.log.sample_every_steps < 0
        ),
    }


def _sampling_checks(config: ConfigDict) -> list[Callable[[], Any]]:
    return [
        lambda: time_grid(config.sample.steps, config.sample.times, key="sample"),
        lambda: choose_ema(config, "sample.ema", config.sample.ema),
        lambda: cells(config),
        lambda: check_guidance(config.sample.guidance, config, key="sample.guidance"),
    ]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Return {"section.key": value} of a config, as JSON keeps values."""
    return flatten_dict(json.loads(as_json(config)), sep=".")


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
    if (
        ours["optim"]["schedule"] == "constant"
        and ours["train"]["num_steps"] >= stored["train"]["num_steps"]
    ):
        ours["train"]["num_steps"] = stored["train"]["num_steps"]
    differences = [
        f"{section}.{key} {theirs!r} -> {mine!r}" if key else f"{section} {theirs!r} -> {mine!r}"
        for section in SECTIONS_OF_A_RUN
        for key, theirs, mine in _differences(stored.get(section), ours[section])
        if f"{section}.{key}" not in _PLACES
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

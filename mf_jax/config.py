"""From a config to the records it describes, and its checks: every problem in one error, before any device work."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from mf_jax.data import Source, make_source, spec_of
from mf_jax.errors import BadInput, check_known, in_section, nearest
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import DataSpec
from mf_jax.flow.sampler import ONE_STEP, SamplePlan
from mf_jax.flow.times import TIMES
from mf_jax.models import NETWORKS, SIZES, DataPrediction, parameter_shapes
from mf_jax.models.attention import ATTENTIONS
from mf_jax.models.blocks import REMATS
from mf_jax.models.dit import DECOUPLED, DIT_TIME_CONDITIONINGS
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Objective
from mf_jax.objectives.terms import AdaptiveWeight
from mf_jax.optim import OPTIMIZERS, SCHEDULES, choose_ema, ema_names, learning_rate
from mf_jax.runtime.sharding import GATHERS


def look_up(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return a table's entry.

    Args:
      key: the config key that names it, for the error.
      name: the entry's name.
      table: the known entries.

    Raises:
      BadInput: if the name is unknown; lists the known ones.
    """
    check_known(key, name, table)
    return table[name]


def from_section(record: Callable, section: ConfigDict, **more: Any) -> Any:
    """Call a constructor with the keys of a section that are its arguments.

    Args:
      record: a dataclass or a function.
      section: its values, and perhaps those of other records.
      more: fields that the config does not hold.
    """
    fields = inspect.signature(record).parameters
    return record(**{key: value for key, value in section.items() if key in fields}, **more)


def make_objective(config: ConfigDict) -> Objective:
    """Return the objective that a config names, with its guidance, its weight and its control terms."""
    objective = look_up("objective.name", config.objective.name, OBJECTIVES)
    parts = {"guidance": (Guidance, config.guidance), "weight": (AdaptiveWeight, config.weight)}
    fields = inspect.signature(objective).parameters
    more = {name: from_section(*part) for name, part in parts.items() if name in fields}
    if "t_clip" in fields:  # the objective's is the network's
        more["t_clip"] = config.model.t_clip
    made = from_section(objective, config.objective, **more)
    controls = from_section(Controls, config.controls)
    return made if controls.are_off else Controlled(made, controls)


def make_scheme(config: ConfigDict) -> DrawScheme:
    """Return how a config draws its random numbers."""
    times = look_up("times.name", config.times.name, TIMES)
    return from_section(DrawScheme, config.draws, times=from_section(times, config.times))


def make_network(config: ConfigDict, spec: DataSpec, *, for_sampling: bool = False) -> nn.Module:
    """Return the network that a config names.

    Args:
      config: the run's config.
      spec: of the data; without classes the network is unconditional.
      for_sampling: leave out what only training needs, the second head.

    Raises:
      BadInput: for unknown names, or sizes that do not fit one another or the data.
    """
    model = config.model
    network = look_up("model.name", model.name, NETWORKS)
    look_up(
        "model.time_conditioning", model.time_conditioning, dict.fromkeys(DIT_TIME_CONDITIONINGS)
    )
    look_up("model.dtype", model.dtype, {"float32": 0, "bfloat16": 0})
    look_up("model.prediction", model.prediction, dict.fromkeys(PREDICTIONS))
    look_up("model.attention", model.attention, dict.fromkeys(ATTENTIONS))
    look_up("model.remat", model.remat, REMATS)
    kind = "images" if spec.is_picture else "vectors"
    if kind not in network.takes:
        fit = ", ".join(name for name, other in NETWORKS.items() if kind in other.takes)
        raise BadInput(
            f"model.name={model.name!r}: the data are {kind} of shape {spec.shape}; use one of {fit}"
        )
    sizes = _sizes(config) | ({"second_head": False} if for_sampling else {})
    made = from_section(network, ConfigDict({**model, **sizes}), num_classes=spec.num_classes)
    if model.prediction == "data":
        made = DataPrediction(made, t_clip=model.t_clip)
    _check_network(config, sizes)
    return made


PREDICTIONS = ("velocity", "data")


def _sizes(config: ConfigDict) -> dict[str, Any]:
    """Return the sizes of a network: those of the config that are not 0 or "", and else what `model.size` says."""
    model = config.model
    if model.name not in SIZES:
        return {}
    row = look_up("model.size", model.size, SIZES[model.name])
    sizes = {name: model[name] or default for name, default in row.items()}
    if "head_depth" in sizes and not model.head_depth:
        sizes["head_depth"] = min(sizes["head_depth"], sizes["depth"])
    return sizes


def _check_network(config: ConfigDict, sizes: Mapping[str, Any]) -> None:
    model = config.model
    if model.time_conditioning == DECOUPLED and model.name != "dit":
        raise BadInput(f"model.time_conditioning={DECOUPLED!r}: only a dit has it; use t,t-r")
    needed = {"mlp": ("depth", "width"), "affine": ("width",), "low_rank": ("width", "rank")}
    for name in needed.get(model.name, ()):
        if model[name] <= 0:
            raise BadInput(
                f"model.{name}={model[name]}: {model.name} needs it above 0; try 4 blocks, 256 wide, rank 8"
            )
    for name in ("depth", "width", "num_heads"):
        if sizes.get(name, 1) <= 0:
            raise BadInput(
                f"model.{name}={sizes[name]}: must be above 0, or 0 for what model.size says"
            )
    if model.name == "unet" and not (
        model.channels > 0 and model.num_blocks > 0 and 0 <= model.dropout < 1
    ):
        raise BadInput(
            f"model.channels={model.channels}, num_blocks={model.num_blocks}, dropout={model.dropout}: the first two "
            "must be above 0, dropout within [0, 1)"
        )


def sample_plan(config: ConfigDict) -> SamplePlan:
    """Return the plan of the section `sample`, which the run's network must be able to follow."""
    keys = ("steps", "times", "guidance", "seed", "batch_size")
    with in_section("sample"):
        plan = ONE_STEP.replace(**{key: config.sample[key] for key in keys})
        plan.check_guidable(config.draws.omega_max)
    return plan


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of a config as a function of the step."""
    return from_section(learning_rate, config.optim, num_steps=config.train.num_steps)


def averages(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of a run's moving averages; see `optim.ema_names`."""
    return ema_names(config.ema, make_objective(config).target_ema)


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
        check(lambda: _check_fit(config, source))
        check(lambda: _check_labels(config, source))
        check(lambda: _check_conditioning(config, source))
    for build in _sampling_checks(config):
        check(build)
    if problems:
        raise BadInput("; ".join(dict.fromkeys(problems)))  # several checks build the same part
    return source


def _training_split(config: ConfigDict) -> Source:
    with in_section("data"):
        return make_source(config.data, split="train")


def _check_labels(config: ConfigDict, source: Source) -> None:
    with in_section("sample"):
        has_null = config.draws.label_drop_share > 0
        spec_of(source).check_labels(config.sample.labels, has_null=has_null)


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


def _check_fit(config: ConfigDict, source: Source) -> None:
    network = make_network(config, spec_of(source))
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


def check_grid(config: ConfigDict) -> None:
    """Raise BadInput if `eval` lists nothing, or an entry that this run cannot be sampled with."""
    section, names = config.eval, averages(config)
    for key in ("steps", "omegas", "intervals", "emas"):
        if not section[key]:
            raise BadInput(f"eval.{key}=(): nothing to evaluate; name at least one")
    for steps in section.steps:
        with in_section("eval"):
            SamplePlan(steps)
    for name in section.emas:
        choose_ema("eval.emas", name, names)
    for interval in section.intervals:
        if not isinstance(interval, tuple | list) or not all(
            isinstance(t, int | float) for t in interval
        ):
            raise BadInput(
                f"eval.intervals: {interval!r} is not (t_min, t_max); "
                "write for example eval.intervals='((0.4, 0.6),)'"
            )
        for omega in section.omegas:
            with in_section("eval.omegas, eval.intervals"):
                plan = ONE_STEP.replace(guidance=(omega, *interval))
                plan.check_guidable(config.draws.omega_max)
    if wrong := [step for step in section.checkpoints if step < 0]:
        raise BadInput(f"eval.checkpoints: {wrong[0]} is no step; use () for the newest checkpoint")


def _sampling_checks(config: ConfigDict) -> list[Callable[[], Any]]:
    return [
        lambda: sample_plan(config),
        lambda: choose_ema("sample.ema", config.sample.ema, averages(config)),
        lambda: check_grid(config),
    ]

"""From a config to the records it describes; `validate` tells every problem in one error."""

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from mf_jax.data import SOURCES, Source, make_source, read
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.errors import BadInput, check_known, in_section
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import DataSpec
from mf_jax.flow.sampler import ONE_STEP, SamplePlan
from mf_jax.flow.times import TIMES
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.models import NETWORKS, SIZES, DataPrediction, parameter_shapes
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Estimated, Objective
from mf_jax.objectives.terms import AdaptiveWeight
from mf_jax.optim import choose_ema, ema_names, learning_rate
from mf_jax.ranges import check_tuples, wrong_values

_MOST_KNOWN = 2**26
PARTS = {"data": SOURCES, "model": NETWORKS, "objective": OBJECTIVES}
"""Tables where a config file may register parts of its own."""


def own_parts(config: ConfigDict) -> dict[str, str]:
    """Return the file of each part of a config that is not of this package, by section."""
    parts = {section: table[config[section].name] for section, table in PARTS.items()}
    own = (each for each in parts.items() if not isinstance(each[1], str))
    is_ours = __name__.partition(".")[0] + "."
    return {k: inspect.getfile(v) for k, v in own if not v.__module__.startswith(is_ours)}


def check_registered(config: ConfigDict, files: Mapping[str, str]) -> None:
    """Raise BadInput that names the file if a part that a run's file registered is unknown."""
    for section, file in files.items():
        name = config[section].name
        if name not in PARTS[section]:
            raise BadInput(
                f"{section}.name={name!r}: is registered by {file}; import this file first "
                f"(runpy.run_path({file!r})), at the command line add --config={file}"
            )


def look_up(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return a table's entry, which a config key names."""
    check_known(key, name, table)
    return table[name]


def from_section(record: Callable, section: ConfigDict, **more: Any) -> Any:
    """Call a constructor with the keys of a section that are its arguments, and with more."""
    fields = inspect.signature(record).parameters
    return record(**{key: value for key, value in section.items() if key in fields} | more)


def make_objective(config: ConfigDict, source: Source | None = None) -> Objective:
    """Return the objective that a config names, with its guidance, weight and control terms.

    Args:
      source: of the training data, which `velocity.source=data` must know to train.
    """
    objective = look_up("objective.name", config.objective.name, OBJECTIVES)
    parts = {"guidance": (Guidance, config.guidance), "weight": (AdaptiveWeight, config.weight)}
    fields = inspect.signature(objective).parameters
    more = {name: from_section(*part) for name, part in parts.items() if name in fields}
    if "t_clip" in fields:  # the objective's is the network's
        more["t_clip"] = config.model.t_clip
    if "levels" in fields:  # the objective's are the times'
        more["levels"] = config.times.levels
    kind, delta = config.objective.derivative, config.objective.derivative_delta
    with in_section("objective"):
        more |= {"derivative": Derivative(kind, delta)} if "derivative" in fields else {}
        if "derivative" not in fields and (kind, delta) != ("jvp", 0):
            able = [
                k for k, v in OBJECTIVES.items() if "derivative" in inspect.signature(v).parameters
            ]
            raise BadInput(
                f"derivative={kind!r}, derivative_delta={delta}: {config.objective.name} takes no "
                f"derivative in t; use jvp and 0, or objective.name={' | '.join(able)}"
            )
    made = from_section(objective, config.objective, **more)
    velocity = from_section(VelocityEstimate, config.velocity, **_known_data(config, source))
    if not velocity.is_off:
        made = Estimated(made, velocity, ema=config.velocity.ema)
    controls = from_section(Controls, config.controls)
    return Controlled(made, controls) if controls.is_on else made


def _known_data(config: ConfigDict, source: Source | None) -> dict[str, Any]:
    """Return the training data and labels for an estimate that knows them."""
    if source is None or config.velocity.source != "data":
        return {}
    if source.stored or len(source) * math.prod(source.spec.shape) > _MOST_KNOWN:
        raise BadInput("velocity.source='data': takes data of 2^26 numbers at most; use batch")
    whole = read(source)
    return {"data": whole.x, "labels": whole.labels if source.spec.num_classes else None}


def make_scheme(config: ConfigDict) -> DrawScheme:
    """Return how a config draws its random numbers."""
    record = look_up("times.name", config.times.name, TIMES)
    with in_section("times"):
        times = from_section(record, config.times)
    own = None
    if config.instant_times.name:  # its t is its own draw, whatever becomes of r
        record = look_up("instant_times.name", config.instant_times.name, TIMES)
        shared = {"order": "clip", "levels": config.times.levels}
        with in_section("instant_times"):
            own = from_section(record, ConfigDict({**config.instant_times, **shared}))
    parts = {"times": times, "instant_times": own}
    return from_section(DrawScheme, config.draws, **parts, for_networks=True)


def make_network(config: ConfigDict, spec: DataSpec, *, for_sampling: bool = False) -> nn.Module:
    """Return the network that a config names.

    Args:
      config: of the run.
      spec: of the data; without classes the network is unconditional.
      for_sampling: leave out what only training needs, the second head.
    """
    model = config.model
    network = look_up("model.name", model.name, NETWORKS)
    kind = {1: "vectors", 2: "signals"}.get(len(spec.shape), "images")
    if kind not in getattr(network, "takes", (kind,)):
        fit = ", ".join(k for k, each in NETWORKS.items() if kind in getattr(each, "takes", ()))
        data = f"the data are {kind} of shape {spec.shape}"
        raise BadInput(f"model.name={model.name!r}: {data}; use one of {fit}")
    fields = {**model, **_sizes(model)} | ({"second_head": False} if for_sampling else {})
    for key in _AT_LEAST_ONE & _fields_of(network):
        if fields[key] < 1:
            raise BadInput(f"model.{key}={model[key]}: {model.name} needs it above 0")
    for key in ("depth", "num_blocks", "head_depth", "r_blocks"):
        if fields.get(key, 0) > _MOST_LAYERS:  # also of a stored config, which another may write
            raise BadInput(f"model.{key}={fields[key]}: must be at most {_MOST_LAYERS}")
    told = {"num_classes": spec.num_classes}
    told |= {"levels": config.times.levels} if "levels" in _fields_of(network) else {}
    if spec.condition_size:
        told["condition_size"] = spec.condition_size
        able = [k for k, each in NETWORKS.items() if told.keys() <= _fields_of(each)]
        if model.name not in able:
            fit = f"use one of {', '.join(able)}, or data without `condition`"
            raise BadInput(f"model.name={model.name!r}: is told no condition but classes; {fit}")
    made = from_section(network, ConfigDict(fields), **told)
    return DataPrediction(made, t_clip=model.t_clip) if model.prediction == "data" else made


def _fields_of(network: Callable) -> set[str]:
    return set(inspect.signature(network).parameters)


_MOST_LAYERS = 500  # tracing more takes minutes
_AT_LEAST_ONE = {"depth", "width", "num_heads", "patch_size", "channels", "num_blocks", "rank"}


def _sizes(model: ConfigDict) -> dict[str, Any]:
    """Return a network's sizes: what the config sets, else what `model.size` says."""
    if model.name not in SIZES:
        return {}
    row = look_up("model.size", model.size, SIZES[model.name])
    sizes = {name: model[name] or size for name, size in row.items()}
    if "head_depth" in sizes and not model.head_depth:
        sizes["head_depth"] = min(sizes["head_depth"], sizes["depth"])
    return sizes


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


def validate(config: ConfigDict, *, num_devices: int, source: Source | None = None) -> Source:
    """Return the training split of the data; raise one BadInput with every problem of the config.

    Args:
      config: of the run.
      num_devices: over which the batch is split.
      source: takes the place of the data that the config names, which are not opened then.
    """
    check_tuples(config)  # nothing below could read them
    wrong = list(wrong_values(config))
    problems = list(wrong)

    @contextlib.contextmanager
    def collect() -> Iterator[None]:
        try:
            yield
        except BadInput as problem:
            problems.append(str(problem))

    with collect(), in_section("data"):
        source = make_source(config.data, split="train") if source is None else source
    with collect():
        _check_batch(config, num_devices)
    with collect():
        sample_plan(config)
    objective = None
    with collect():
        objective = make_objective(config)
        choose_ema("sample.ema", config.sample.ema, averages(config))
    with collect():
        check_grid(config)
    if source is not None:
        spec = source.spec
        with collect():
            network = make_network(config, spec)
            if not any(problem.startswith("model.") for problem in wrong):
                parameter_shapes(network, spec.shape)  # finds what does not fit
        if objective and config.model.name in NETWORKS:
            problems += _wrong_guidance(config, objective, spec)
            problems += _wrong_network(config, objective)
        with collect(), in_section("sample"):
            spec.check_labels(config.sample.labels, has_null=config.draws.label_drop_share > 0)
        if config.data.flip and not spec.is_picture:
            problems.append("data.flip=True: only images can be mirrored; use data.flip=False")
    if problems:
        raise BadInput("; ".join(dict.fromkeys(problems)))  # several checks build the same part
    return source


def _check_batch(config: ConfigDict, num_devices: int) -> None:
    size, group = config.train.batch_size, make_scheme(config).group
    if size <= 0 or size % (group * num_devices):
        share = f"draws.instant_share={config.draws.instant_share}"
        raise BadInput(
            f"train.batch_size={size}: must be a multiple of {group * num_devices}, since rows "
            f"with r = t and r < t are dealt in groups of {group} ({share}) on each of "
            f"{num_devices} device{'s' * (num_devices > 1)}"
        )
    part, least = config.train.microbatch, group * num_devices
    if part and (part < 0 or part % least or size % part):
        raise BadInput(
            f"train.microbatch={part}: must be a multiple of {least}, and divide "
            f"train.batch_size={size}; use {least}, or 0 for the whole batch"
        )


def _wrong_guidance(config: ConfigDict, objective: Objective, spec: DataSpec) -> Iterator[str]:
    """Yield why the data, the objective or the network cannot be guided as the config wants it."""
    omega, kappa, omega_max = config.guidance.omega, config.guidance.kappa, config.draws.omega_max
    is_guided, is_drawn = (omega, kappa) != (1, 0), omega_max > 1
    if not (is_guided or is_drawn):
        return
    setting = f"guidance.omega={omega}, guidance.kappa={kappa}, draws.omega_max={omega_max}"
    off = "use omega=1, kappa=0, omega_max=1"
    if spec.num_classes == spec.condition_size == 0:
        yield f"{setting}: the data have no labels to guide by; {off}"
    if not objective.guidable:
        yield f"{setting}: {config.objective.name} has no guidance in its target; {off}"
    if is_guided and is_drawn:
        yield f"{setting}: guidance is either fixed or drawn; use omega=1, kappa=0, or omega_max=1"
    able = [name for name, each in NETWORKS.items() if getattr(each, "can_be_told_guidance", False)]
    is_told = config.model.told_guidance or "told_guidance" not in _fields_of(
        NETWORKS[config.model.name]
    )
    if is_drawn and not (config.model.name in able and is_told):
        fix = f"use {', '.join(able)}, a dit with model.told_guidance=True"
        yield f"{setting}: model.name={config.model.name} cannot be told guidance; {fix}"
    if config.draws.label_drop_share == 0:
        yield f"{setting}: guidance needs rows without label; use draws.label_drop_share=0.1"


def _wrong_network(config: ConfigDict, objective: Objective) -> Iterator[str]:
    """Yield what the objective needs and the network does not have."""
    model, name = config.model, config.objective.name
    network = NETWORKS[model.name]
    if objective.second_order and model.attention == "fused":
        yield (
            f"model.attention='fused': {name}, with or without controls, takes the gradient of a "
            "derivative, which only model.attention=xla has"
        )
    has_second_head = getattr(network, "second_head", False) and model.second_head
    if objective.needs_second_head and not has_second_head:
        yield (
            "objective.velocity='head': the network has no second head; use model.name="
            "in_context_dit with model.second_head=True, or objective.velocity=boundary"
        )
    if objective.predicts == "data" and model.prediction != "data":
        yield f"model.prediction={model.prediction!r}: {name} needs a network that predicts data"
    knows_r = "time_conditioning" not in inspect.signature(network).parameters
    if objective.learns_average and model.time_conditioning == "t" and not knows_r:
        yield (
            "model.time_conditioning='t': a network that is not told r can only learn "
            f"flow_matching, not {name}; use t,t-r, or t|r with model.name=dit"
        )


def check_grid(config: ConfigDict) -> None:
    """Raise BadInput if `eval` lists nothing, or an entry that this run cannot be sampled with."""
    section, names = config.eval, averages(config)
    for key in ("steps", "omegas", "intervals", "emas"):
        if not section[key]:
            raise BadInput(f"eval.{key}=(): nothing to evaluate; name at least one")
    for name in section.emas:
        choose_ema("eval.emas", name, names)
    with in_section("eval"):
        for steps in section.steps:
            SamplePlan(steps)
        for omega, interval in itertools.product(section.omegas, section.intervals):
            plan = ONE_STEP.replace(guidance=(omega, *interval))
            plan.check_guidable(config.draws.omega_max)

"""What is wrong with a config: `validate` tells every problem in one error."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from mf_jax.config import (
    averages,
    check_plan,
    ends_at_data,
    fields_of,
    has_null,
    make_network,
    make_objective,
    make_scheme,
    sample_plan,
    sees_pictures,
)
from mf_jax.data import SOURCES, Source, make_source
from mf_jax.flow.errors import BadInput, in_section
from mf_jax.flow.records import DataSpec
from mf_jax.flow.sampler import NO_GUIDANCE, SamplePlan
from mf_jax.flow.velocities import PLUG_INS
from mf_jax.models import NETWORKS, parameter_shapes
from mf_jax.objectives import OBJECTIVES, Objective
from mf_jax.optim import choose_ema
from mf_jax.validation.ranges import check_tuples, wrong_values

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


def validate(config: ConfigDict, *, num_devices: int, source: Source | None = None) -> Source:
    """Return the training split of the data; raise one BadInput with every problem of the config.

    Args:
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
        eval_plans(config)
    if source is not None:
        spec = source.spec
        with collect():
            network = make_network(config, spec)
            if not any(problem.startswith("model.") for problem in wrong):
                parameter_shapes(network, spec.shape)  # finds what does not fit
        if objective and config.model.name in NETWORKS:
            problems += _wrong_guidance(config, objective, spec)
            problems += _wrong_network(config, objective, spec)
        with collect(), in_section("sample"):
            spec.check_asked(config.sample.labels)
            spec.check_labels(config.sample.labels, has_null=has_null(config))
        if config.data.flip and not spec.is_picture:
            problems.append("data.flip=True: only images can be mirrored; use data.flip=False")
        is_moved, dealt = config.data.augment != "none", config.coupling.name != "independent"
        if is_moved and (not spec.is_picture or spec.more or source.stored):
            problems.append("data.augment: only pictures that bring nothing are moved; use none")
        if is_moved and (dealt or config.velocity.source in PLUG_INS):
            fix = "use coupling.name=independent and velocity.source=sample, or data.augment=none"
            problems.append(f"data.augment: noise must not tell how a picture was moved; {fix}")
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
    able = [name for name, each in NETWORKS.items() if getattr(each, "guidance_inputs", ())]
    name = config.model.name
    is_told = config.model.told_guidance or "told_guidance" not in fields_of(NETWORKS[name])
    if is_drawn and not (name in able and is_told):
        fix = f"use {', '.join(able)}, a dit with model.told_guidance=True"
        yield f"{setting}: model.name={name} cannot be told guidance; {fix}"
    if is_drawn and config.draws.omega_min > 1 and config.velocity.source in ("network", "average"):
        problem = "is asked for the scale 1, which it would never learn"
        yield f"velocity.source={config.velocity.source!r}: {problem}; use draws.omega_min=1.0"
    if is_guided and config.objective.name == "shortcut" and config.times.name != "dyadic":
        problem = "guides the halves of its shortest steps alone; use times.name=dyadic"
        yield f"times.name={config.times.name!r}: guided, shortcut {problem}"
    if config.weight.of_interval == 1 and config.draws.label_drop != "any_row":
        problem = "leaves rows without label no weight, which guidance asks for"
        yield f"weight.of_interval=1.0: {problem}; use draws.label_drop=any_row"
    if config.draws.label_drop_share == 0:
        yield f"{setting}: guidance needs rows without label; use draws.label_drop_share=0.1"


def _wrong_network(config: ConfigDict, objective: Objective, spec: DataSpec) -> Iterator[str]:
    """Yield what the objective needs and the network, or the data, do not have."""
    model, name = config.model, config.objective.name
    network = NETWORKS[model.name]
    if objective.second_order and model.attention == "fused":
        problem = "with or without controls, takes the gradient of a derivative; use xla"
        yield f"model.attention='fused': {name}, {problem}"
    if (kind := config.objective.derivative) != "jvp" and model.dtype == "bfloat16":
        problem = "differences of bfloat16 numbers are rounding errors"
        yield f"objective.derivative={kind!r}: {problem}; use jvp, or float32"
    has_second_head = getattr(network, "second_head", False) and model.second_head
    if objective.needs_second_head and not has_second_head:
        fix = "model.name=in_context_dit with second_head=True, or objective.velocity=boundary"
        yield f"objective.velocity='head': the network has no second head; use {fix}"
    if objective.predicts == "data" and model.prediction != "data":
        yield f"model.prediction={model.prediction!r}: {name} needs a network that predicts data"
    if spec.has_pairs and config.coupling.name != "independent":
        problem = "deals the noise, and the data are pairs; use independent"
        yield f"coupling.name={config.coupling.name!r}: {problem}"
    if spec.has_pairs and config.velocity.source in PLUG_INS:
        problem = "takes noise and data for independent, and the data are pairs; use sample"
        yield f"velocity.source={config.velocity.source!r}: {problem}"
    if config.weight.of_interval and not (objective.learns_average and objective.interval_data):
        yield f"weight.of_interval: {name} learns the data from rows with r = t alone; use 0.0"
    draws = config.draws
    if not (objective.interval_data or draws.instant_share or draws.instant_of_every_row):
        yield f"draws.instant_share=0.0: {name} learns the data from rows with r = t; use 0.75"
    if not objective.interval_data and config.times.name == "consistency":
        problem = f"ends all intervals at the data, and {name} learns from others; use uniform"
        yield f"times.name='consistency': {problem}"
    is_guided = config.guidance.omega != 1 or config.guidance.kappa > 0 or draws.omega_max > 1
    has_choice = "velocity" in fields_of(OBJECTIVES[name])
    asks_own = has_choice and config.objective.velocity == "boundary"
    asks_own |= config.velocity.source == "network"
    has_instants = draws.instant_share > 0 or draws.instant_of_every_row
    if ends_at_data(config) and (is_guided or asks_own) and not has_instants:
        problem = "with times.name=consistency no row trains u(z, t, t), which targets ask for"
        yield f"draws.instant_share=0.0: {problem}; use 0.5"
    able = "perceptual" in fields_of(OBJECTIVES[name])
    if sees_pictures(config) and not (able and spec.shape[2:] == (3,)):
        yield (
            f"perceptual: {name} on data of shape {spec.shape}; only pixel_meanflow has such "
            "terms, on pictures with three channels; use perceptual.lpips=0.0 and convnext=0.0"
        )
    knows_r = "time_conditioning" not in fields_of(network)
    if objective.learns_average and model.time_conditioning == "t" and not knows_r:
        problem = f"a network that is not told r can only learn flow_matching, not {name}"
        yield f"model.time_conditioning='t': {problem}; use t,t-r, or t|r with model.name=dit"


def eval_plans(config: ConfigDict) -> list[tuple[str, SamplePlan]]:
    """Return the averages and plans that `eval` combines, which the run must be able to follow."""
    section, known = config.eval, averages(config)
    for key in ("steps", "omegas", "intervals", "emas"):
        if not section[key]:
            raise BadInput(f"eval.{key}=(): nothing to evaluate; name at least one")
    emas, plans = [choose_ema("eval.emas", name, known) for name in section.emas], []
    cells = itertools.product(section.steps, section.omegas, section.intervals)
    try:
        base = SamplePlan(**{key: section[key] for key in ("renoise", "seed", "batch_size")})
        for steps, omega, interval in cells:
            plan = base.replace(steps=steps, guidance=(omega, *interval))
            check_plan(config, plan)
            if omega == 1:  # no guidance has no interval
                plan = plan.replace(guidance=NO_GUIDANCE)
            plans.append(plan)
    except BadInput as problem:
        keys = f"eval.{problem}".replace("eval.guidance=", "eval.omegas, eval.intervals: ")
        raise BadInput(keys) from problem
    return list(itertools.product(emas, plans))

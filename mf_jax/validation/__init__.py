"""What is wrong with a config: `validate` tells every problem in one error."""

import functools
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
from mf_jax.flow.errors import BadInput, collected, in_section
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
            fix = f"runpy.run_path({file!r}) first, at the command line --config={file}"
            raise BadInput(f"{section}.name={name!r}: is registered by {file}; {fix}")


def validate(config: ConfigDict, *, num_devices: int, source: Source | None = None) -> Source:
    """Return the training split of the data; raise one BadInput with every problem of the config.

    Args:
      num_devices: over which the batch is split.
      source: takes the place of the data that the config names, which are not opened then.
    """
    check_tuples(config)  # nothing below could read them
    problems = [*(wrong := wrong_values(config))]
    collect = functools.partial(collected, problems)
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
        with collect(), in_section("sample"):
            spec.check_asked(config.sample.labels)
            spec.check_labels(config.sample.labels, has_null=has_null(config))
        if objective and config.model.name in NETWORKS:
            problems += _misfits(config, objective, source)
    if problems:
        raise BadInput("; ".join(dict.fromkeys(problems)))  # several checks build the same part
    return source


def _check_batch(config: ConfigDict, num_devices: int) -> None:
    size, part = config.train.batch_size, config.train.microbatch
    least = num_devices * (group := make_scheme(config).group)
    needed = f"must be a multiple of {least}"
    if size <= 0 or size % least:
        why = f"groups of {group} by draws.instant_share={config.draws.instant_share}"
        raise BadInput(f"train.batch_size={size}: {needed}, for {why} on {num_devices} devices")
    if part and (part < 0 or part % least or size % part):
        raise BadInput(f"train.microbatch={part}: {needed} that divides {size}, or 0 for all rows")


def _misfits(config: ConfigDict, objective: Objective, source: Source) -> Iterator[str]:
    """Yield what the data, the objective, the network and the guidance lack of one another."""
    model, draws, spec, times = config.model, config.draws, source.spec, config.times.name
    network, name, estimate = NETWORKS[model.name], config.objective.name, config.velocity.source
    omega, kappa, omega_max = config.guidance.omega, config.guidance.kappa, draws.omega_max
    is_fixed, is_drawn = (omega, kappa) != (1, 0), omega_max > 1
    is_plug_in, is_dealt = estimate in PLUG_INS, config.coupling.name != "independent"
    has_instants = draws.instant_share > 0 or draws.instant_of_every_row
    choices, inputs = fields_of(OBJECTIVES[name]), fields_of(network)
    if is_fixed or is_drawn:
        setting = f"guidance.omega={omega}, guidance.kappa={kappa}, draws.omega_max={omega_max}"
        off = "use omega=1, kappa=0, omega_max=1"
        if spec.num_classes == spec.condition_size == 0:
            yield f"{setting}: the data have no labels to guide by; {off}"
        if not objective.guidable:
            yield f"{setting}: {name} has no guidance in its target; {off}"
        if is_fixed and is_drawn:
            yield f"{setting}: is either fixed or drawn; use omega=1, kappa=0, or omega_max=1"
        able = [k for k, each in NETWORKS.items() if getattr(each, "guidance_inputs", ())]
        is_told = model.told_guidance or "told_guidance" not in inputs
        if is_drawn and not (model.name in able and is_told):
            fix = f"cannot be told guidance; use {', '.join(able)}, a dit with told_guidance=True"
            yield f"{setting}: model.name={model.name} {fix}"
        if is_drawn and draws.omega_min > 1 and estimate in ("network", "average"):
            yield f"velocity.source={estimate!r}: needs the scale 1; use draws.omega_min=1.0"
        if is_fixed and name == "shortcut" and times != "dyadic":
            yield f"times.name={times!r}: shortcut is guided in its shortest steps; use dyadic"
        if config.weight.of_interval == 1 and draws.label_drop != "any_row":
            yield "weight.of_interval=1.0: rows without label weigh 0; use draws.label_drop=any_row"
        if draws.label_drop_share == 0:
            yield f"{setting}: guidance needs rows without label; use draws.label_drop_share=0.1"
    if objective.second_order and model.attention == "fused":
        yield f"model.attention='fused': {name} takes the gradient of a derivative; use xla"
    if (kind := config.objective.derivative) != "jvp" and model.dtype == "bfloat16":
        yield f"objective.derivative={kind!r}: bfloat16 rounds differences away; use jvp or float32"
    has_second_head = getattr(network, "second_head", False) and model.second_head
    if objective.needs_second_head and not has_second_head:
        fix = "boundary, or model.name=in_context_dit with second_head=True"
        yield f"objective.velocity='head': the network has no second head; use {fix}"
    if objective.predicts == "data" and model.prediction != "data":
        yield f"model.prediction={model.prediction!r}: {name} needs a network that predicts data"
    if spec.has_pairs and is_dealt:
        yield f"coupling.name={config.coupling.name!r}: the data are pairs; use independent"
    if spec.has_pairs and is_plug_in:
        yield f"velocity.source={estimate!r}: the data are pairs; use sample"
    if config.weight.of_interval and not (objective.learns_average and objective.interval_data):
        yield f"weight.of_interval: {name} learns the data from rows with r = t alone; use 0.0"
    if not (objective.interval_data or has_instants):
        yield f"draws.instant_share=0.0: {name} learns the data from rows with r = t; use 0.75"
    if not objective.interval_data and times == "consistency":
        yield f"times.name='consistency': {name} learns from intervals within the path; use uniform"
    asks_own = "velocity" in choices and config.objective.velocity == "boundary"
    asks_own |= estimate == "network" or is_fixed or is_drawn
    if ends_at_data(config) and asks_own and not has_instants:
        problem = "with times.name=consistency no row trains u(z, t, t), which targets ask for"
        yield f"draws.instant_share=0.0: {problem}; use 0.5"
    if sees_pictures(config) and not ("perceptual" in choices and spec.shape[2:] == (3,)):
        problem = f"is for pixel_meanflow on colour pictures, not {name} on {spec.shape}"
        yield f"perceptual: {problem}; use perceptual.lpips=0.0 and convnext=0.0"
    is_untold = model.time_conditioning == "t" and "time_conditioning" in inputs
    if objective.learns_average and is_untold:
        fix = "use t,t-r, or t|r with model.name=dit"
        yield f"model.time_conditioning='t': {name} needs a network that is told r; {fix}"
    if config.data.flip and not spec.is_picture:
        yield "data.flip=True: only images can be mirrored; use data.flip=False"
    if config.data.augment != "none" and (not spec.is_picture or spec.more or source.stored):
        yield "data.augment: only pictures that bring nothing are moved; use none"
    if config.data.augment != "none" and (is_dealt or is_plug_in):
        fix = "use none, or coupling.name=independent and velocity.source=sample"
        yield f"data.augment: noise must not tell how a picture was moved; {fix}"


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
            # no guidance has no interval
            plans.append(plan.replace(guidance=NO_GUIDANCE) if omega == 1 else plan)
    except BadInput as problem:
        keys = f"eval.{problem}".replace("eval.guidance=", "eval.omegas, eval.intervals: ")
        raise BadInput(keys) from problem
    return list(itertools.product(emas, plans))

"""From a config to the records it describes."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from mf_jax.data import Source, read
from mf_jax.data.augment import AUGMENTATIONS
from mf_jax.flow.couplings import COUPLINGS
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.errors import BadInput, check_known, check_within, in_section
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import DataSpec, Told
from mf_jax.flow.sampler import ONE_STEP, SamplePlan
from mf_jax.flow.times import TIMES
from mf_jax.flow.velocities import PLUG_INS, VelocityEstimate
from mf_jax.models import NETWORKS, SIZES, DataPrediction
from mf_jax.models.distances import DISTANCES, distance_shapes
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Estimated, Objective
from mf_jax.objectives.perceptual import Distance, Perceptual
from mf_jax.objectives.terms import AdaptiveWeight
from mf_jax.optim import KIMG, average_name, learning_rate


def look_up(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return a table's entry, which a config key names."""
    check_known(key, name, table)
    return table[name]


def from_section(record: Callable, section: ConfigDict | dict, **more: Any) -> Any:
    """Call a constructor with the keys of a section that are its arguments, and with more."""
    fields = inspect.signature(record).parameters
    return record(**{key: value for key, value in section.items() if key in fields} | more)


def make_objective(config: ConfigDict, source: Source | None = None) -> Objective:
    """Return a config's objective; `velocity.source=data` must know the training data to train."""
    objective = look_up("objective.name", config.objective.name, OBJECTIVES)
    parts = {
        "guidance": from_section(Guidance, config.guidance),
        "weight": from_section(AdaptiveWeight, config.weight),
        "perceptual": _perceptual(config.perceptual),
        "t_clip": config.model.t_clip,
        "levels": config.times.levels,
    }
    fields = fields_of(objective)
    name, kind, delta = (config.objective[k] for k in ("name", "derivative", "derivative_delta"))
    with in_section("objective"):
        parts["derivative"] = Derivative(kind, delta)
        if "derivative" not in fields and parts["derivative"] != Derivative():
            fix = f"{name} takes no derivative in t; use jvp and 0"
            raise BadInput(f"derivative={kind!r}, derivative_delta={delta}: {fix}")
    own = {name: part for name, part in parts.items() if name in fields}
    made = from_section(objective, config.objective, **own)
    known = {"noise_scale": config.draws.noise_scale, **_known_data(config, source)}
    velocity = from_section(VelocityEstimate, config.velocity, **known)
    if not velocity.is_off:
        if velocity.source in PLUG_INS and config.coupling.name != "independent":
            fix = f"velocity.source={velocity.source!r} needs noise of its own; use independent"
            raise BadInput(f"coupling.name={config.coupling.name!r}: {fix}")
        made = Estimated(made, velocity, ema=config.velocity.ema)
    controls = from_section(Controls, config.controls)
    return Controlled(made, controls) if controls.is_on else made


def _known_data(config: ConfigDict, source: Source | None) -> dict[str, Any]:
    """Return the training data and labels for an estimate that knows them."""
    if source is None or config.velocity.source != "data":
        return {}
    if source.stored or len(source) * math.prod(source.spec.shape) > 2**26:
        raise BadInput("velocity.source='data': takes data of 2^26 numbers at most; use batch")
    if config.data.flip or config.data.augment != "none":
        raise BadInput("velocity.source='data': needs unmoved data; use flip=False, augment=none")
    whole = read(source)
    told = whole.labels if whole.condition is None else Told(whole.labels, whole.condition)
    return {"data": whole.x, "labels": told, "mask": whole.mask}


def _perceptual(section: ConfigDict) -> Perceptual:
    """Return the perceptual terms that a config names, with the shapes of their weights."""
    distances = [
        Distance({"params": distance_shapes(network)}, name, section[name], network.apply)
        for name, network in DISTANCES.items()
        if section[name]
    ]
    return from_section(Perceptual, section, distances=tuple(distances))


def sees_pictures(config: ConfigDict) -> bool:
    return any(config.perceptual[name] for name in DISTANCES)


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
            own = from_section(record, {**config.instant_times, **shared})
    coupling = look_up("coupling.name", config.coupling.name, COUPLINGS)
    coupling = coupling and from_section(coupling, config.coupling)
    parts = {"times": times, "instant_times": own, "coupling": coupling, "for_networks": True}
    parts["omega_window"] = _learns_windows(config)
    return from_section(DrawScheme, config.draws, **parts, crops=sees_pictures(config))


def make_network(config: ConfigDict, spec: DataSpec, *, for_sampling: bool = False) -> nn.Module:
    """Return a config's network for data; for sampling without what only training needs."""
    model = config.model
    network = look_up("model.name", model.name, NETWORKS)
    kind = {1: "vectors", 2: "signals"}.get(len(spec.shape), "images")
    if kind not in getattr(network, "takes", (kind,)):
        fit = ", ".join(k for k, each in NETWORKS.items() if kind in getattr(each, "takes", ()))
        raise BadInput(f"model.name={model.name!r}: data are {kind} {spec.shape}; use one of {fit}")
    fields = {**model, **sizes_of(model)} | ({"second_head": False} if for_sampling else {})
    for key, interval in _SIZES.items():  # also of a stored config, which another may write
        if key in fields_of(network):
            check_within(f"model.{key}", fields[key], interval)
    augment = look_up("data.augment", config.data.augment, AUGMENTATIONS)
    told = {"num_classes": spec.num_classes, "levels": config.times.levels}
    told |= {"condition_size": spec.condition_size, "augment_labels": augment.num_labels}
    for key in ("condition_size", "augment_labels"):
        if told[key] and key not in fields_of(network):
            able = ", ".join(k for k, each in NETWORKS.items() if key in fields_of(each))
            raise BadInput(f"model.name={model.name!r}: takes no {key} of data; use one of {able}")
    made = from_section(network, {**fields, **told})
    return DataPrediction(made, t_clip=model.t_clip) if model.prediction == "data" else made


def fields_of(part: Callable) -> set[str]:
    """Return the names of a part's fields, or of the arguments of another constructor."""
    return set(inspect.signature(part).parameters)


_SIZES = dict.fromkeys(("width", "num_heads", "patch_size", "channels", "rank"), "[1, inf)")
_SIZES |= dict.fromkeys(("depth", "num_blocks"), "[1, 500]")  # tracing more takes minutes
_SIZES |= dict.fromkeys(("head_depth", "r_blocks"), "[0, 500]")


def sizes_of(model: ConfigDict) -> dict[str, Any]:
    """Return a network's sizes: what the config sets, else what `model.size` says."""
    if model.name not in SIZES:
        return {}
    row = look_up("model.size", model.size, SIZES[model.name])
    sizes = {name: model[name] or size for name, size in row.items()}
    if "head_depth" in sizes and not model.head_depth:
        sizes["head_depth"] = min(sizes["head_depth"], sizes["depth"])
    return sizes


def learns_average(config: ConfigDict) -> bool:
    """Return whether a config's objective, if it is known, learns u(z, r, t) for r < t."""
    return getattr(OBJECTIVES.get(config.objective.name), "learns_average", True)


def ends_at_data(config: ConfigDict) -> bool:
    """Return whether all intervals that a config's network learns end at r = 0."""
    return config.times.name == "consistency" and learns_average(config)


def has_null(config: ConfigDict) -> bool:
    """Return whether a config's network learns to sample rows without their condition."""
    of_all = config.draws.label_drop == "any_row" or not learns_average(config)
    return config.draws.label_drop_share > 0 and of_all


def _learns_windows(config: ConfigDict) -> bool:
    """Return whether a config's network, told windows of guidance, can learn what they do.

    Rows with r = t have none; rows with r < t that see no data learn from these.
    """
    inputs = getattr(NETWORKS.get(config.model.name), "guidance_inputs", ())
    sees_data = getattr(OBJECTIVES.get(config.objective.name), "interval_data", True)
    return "t_min" in inputs and sees_data


def check_plan(config: ConfigDict, plan: SamplePlan) -> None:
    """Raise BadInput unless a config's network learns to follow a plan."""
    learnt = {"has_window": _learns_windows(config), "only_to_data": ends_at_data(config)}
    plan.check_learnt(config.draws.omega_min, config.draws.omega_max, **learnt)


def sample_plan(config: ConfigDict) -> SamplePlan:
    """Return the plan of the section `sample`, which the run's network must be able to follow."""
    keys = ("steps", "times", "guidance", "renoise", "seed", "batch_size")
    with in_section("sample"):
        plan = ONE_STEP.replace(**{key: config.sample[key] for key in keys})
        check_plan(config, plan)
    return plan


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of a config as a function of the step."""
    return from_section(learning_rate, config.optim, num_steps=config.train.num_steps)


def averages(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of a run's moving averages, e.g. ("0.9999", "500kimg").

    The objective's own average comes last.
    """
    names = [average_name(decay) for decay in config.ema.decays]
    names += [f"{halflife:.15g}{KIMG}" for halflife in config.ema.halflives_kimg]
    if target_ema := make_objective(config).target_ema:
        names.append(average_name(target_ema))
    return tuple(dict.fromkeys(names))

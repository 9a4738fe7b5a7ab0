"""From a config to the records it describes: objective, draws, network, optimiser."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from mf_jax.draws import DrawScheme
from mf_jax.guidance import Guidance
from mf_jax.models import DIT_SIZES, NETWORKS
from mf_jax.models.layers import TIME_CONDITIONINGS
from mf_jax.objectives import OBJECTIVES, Objective
from mf_jax.objectives.weighting import AdaptiveWeight
from mf_jax.optim import learning_rate
from mf_jax.times import TIMES
from mf_jax.types import NO_LABEL, BadInput, check_known


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
    """Return the objective that a config names, with its guidance and weight."""
    objective = look_up("objective.name", config.objective.name, OBJECTIVES)
    parts = {"guidance": (Guidance, config.guidance), "weight": (AdaptiveWeight, config.weight)}
    fields = inspect.signature(objective).parameters
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


def check_labels(labels: Iterable[int], num_classes: int, config: ConfigDict) -> None:
    """Check that a model can be sampled with these labels.

    Args:
      labels: wanted.
      num_classes: of the model; 0 for an unconditional one.
      config: of the run; without dropped labels a conditional model does not know `NO_LABEL`.

    Raises:
      BadInput: naming the first label that is no class, and what is allowed.
    """
    has_null = num_classes == 0 or config.draws.label_drop_share > 0
    wrong = [label for label in labels if not (NO_LABEL if has_null else 0) <= label < num_classes]
    if wrong and num_classes == 0:
        raise BadInput(f"sample.labels={tuple(labels)}: this model has no classes; leave labels out")
    if wrong:
        null = (
            "-1 for none"
            if has_null
            else "it was trained with draws.label_drop_share=0, so -1 means nothing to it"
        )
        raise BadInput(
            f"sample.labels: {wrong[0]} is not a class; they go from 0 to {num_classes - 1}, {null}"
        )


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of a config as a function of the step."""
    return from_section(learning_rate, config.optim, num_steps=config.train.num_steps)

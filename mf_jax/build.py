"""From a config to the records it describes: objective, draws, network, optimiser."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from mf_jax.errors import BadInput, check_known
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import NO_LABEL
from mf_jax.flow.times import TIMES
from mf_jax.models import DIT_SIZES, IN_CONTEXT_SIZES, NETWORKS, DataPrediction
from mf_jax.models.attention import ATTENTIONS
from mf_jax.models.blocks import REMATS
from mf_jax.models.dit import DECOUPLED, DIT_TIME_CONDITIONINGS
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Objective
from mf_jax.objectives.weighting import AdaptiveWeight
from mf_jax.optim import average_name, halflife_name, learning_rate


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


def make_network(
    config: ConfigDict, *, shape: tuple[int, ...], num_classes: int, for_sampling: bool = False
) -> nn.Module:
    """Return the network that a config names.

    Args:
      config: the run's config.
      shape: of one data element, (H, W, C) or (D,).
      num_classes: of the data; 0 makes an unconditional network.
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
    kinds = ("images", "vectors")
    kind = kinds[len(shape) != 3]
    if kind not in DATA_OF_NETWORK.get(model.name, kinds):
        fit = ", ".join(name for name in NETWORKS if kind in DATA_OF_NETWORK.get(name, kinds))
        raise BadInput(
            f"model.name={model.name!r}: the data are {kind} of shape {shape}; use one of {fit}"
        )
    sizes = _sizes(config) | ({"second_head": False} if for_sampling else {})
    made = from_section(network, ConfigDict({**model, **sizes}), num_classes=num_classes)
    if model.prediction == "data":
        made = DataPrediction(made, t_clip=model.t_clip)
    _check_network(config, sizes, shape)
    return made


PREDICTIONS = ("velocity", "data")
DATA_OF_NETWORK = {
    "dit": ("images",),
    "in_context_dit": ("images",),
    "unet": ("images",),
    "mlp": ("vectors",),
}
"""What kind of data a network takes; those not named take either."""
_SIZE_TABLES = {
    "dit": (DIT_SIZES, ("depth", "width", "num_heads")),
    "in_context_dit": (
        IN_CONTEXT_SIZES,
        ("depth", "width", "num_heads", "head_depth", "bottleneck", "positions"),
    ),
}


def _sizes(config: ConfigDict) -> dict[str, Any]:
    """Return the sizes of a network: those of the config that are not 0 or "", and else what `model.size` says."""
    model = config.model
    if model.name not in _SIZE_TABLES:
        return {}
    table, names = _SIZE_TABLES[model.name]
    row = look_up("model.size", model.size, table)
    sizes = {name: model[name] or default for name, default in zip(names, row, strict=True)}
    if "head_depth" in sizes and not model.head_depth:
        sizes["head_depth"] = min(sizes["head_depth"], sizes["depth"])
    return sizes


def _check_network(config: ConfigDict, sizes: Mapping[str, Any], shape: tuple[int, ...]) -> None:
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
    if model.name == "dit":
        p = model.patch_size
        if p <= 0 or shape[0] % p or shape[1] % p:
            raise BadInput(
                f"model.patch_size={p}: must divide the image size {shape[0]}x{shape[1]}"
            )
        if sizes["width"] % 4 or sizes["width"] % sizes["num_heads"]:
            raise BadInput(
                f"model.width={sizes['width']}: must be divisible by 4 and by model.num_heads={sizes['num_heads']}"
            )


def ema_names(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of a run's moving averages, e.g. ("0.9999", "500kimg"); that of the targets comes last."""
    target_ema = make_objective(config).target_ema
    names = [average_name(decay) for decay in config.ema.decays]
    names += [halflife_name(halflife) for halflife in config.ema.halflives_kimg]
    names += [average_name(target_ema)] if target_ema else []
    return tuple(dict.fromkeys(names))


def choose_ema(config: ConfigDict, key: str, name: str) -> str:
    """Return which parameters `sample.ema` or an entry of `eval.emas` selects: a name of `ema_names`, or `none`.

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
        raise BadInput(
            f"sample.labels={tuple(labels)}: this model has no classes; leave labels out"
        )
    if wrong:
        null = (
            "-1 for none"
            if has_null
            else "it was trained with draws.label_drop_share=0, so -1 means nothing to it"
        )
        raise BadInput(
            f"sample.labels: {wrong[0]} is not a class; they go from 0 to {num_classes - 1}, {null}"
        )


def check_guidance(guidance: Sequence[float], config: ConfigDict, *, key: str) -> None:
    """Check that a model can be sampled with this guidance.

    Args:
      guidance: (omega, t_min, t_max).
      config: of the run; only a network that was told guidance knows it.
      key: the setting that the error names.

    Raises:
      BadInput: if it is no scale and interval, or the model does not know it.
    """
    if len(guidance) != 3 or not (
        1 <= guidance[0] < float("inf") and 0 <= guidance[1] <= guidance[2] <= 1
    ):
        raise BadInput(
            f"{key}={tuple(guidance)}: must be (omega, t_min, t_max) with omega at least 1, 0 <= t_min <= t_max <= 1"
        )
    if guidance[0] != 1 and config.draws.omega_max == 1:
        raise BadInput(
            f"{key}={tuple(guidance)}: this run's network was told no guidance (draws.omega_max=1); use (1.0, 0.0, 1.0)"
        )


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of a config as a function of the step."""
    return from_section(learning_rate, config.optim, num_steps=config.train.num_steps)

"""What is run: the settings of every table, and the config of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.digits import get_config as digits
from mf_jax.errors import BadInput, nearest

NUM_STEPS = 1000  # of every run but those of `objectives`, which get what these cost
Overrides = Mapping[str, Any]

# the paper's settings, of all groups but `objectives`
PAPER: Overrides = {
    "times.t_mean": -0.4,
    "times.t_std": 1.0,
    "times.r_mean": -0.4,
    "times.r_std": 1.0,
    "draws.instant_share": 0.75,
    "draws.label_drop_share": 0.1,
    "weight.p": 1.0,
}
# what makes a run short, of all groups
SHORT: Overrides = {
    "model.depth": 2,
    "model.width": 96,
    "model.num_heads": 2,
    "ema.decays": (0.99,),
    "log.sample_every_steps": 0,
    "log.progress": False,
    "checkpoint.every_steps": 250,
    "checkpoint.keep": 1,
    "eval.steps": (1, 2),
}
# what the comparison of objectives adds
EQUAL_FLOPS: Overrides = {"eval.steps": (1, 2, 8)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table.

    label: in the table. published: FID of one step, None where there is none. run: folder of its run, shared by
    settings that coincide. overrides: what it changes, by dotted name.
    """

    label: str
    published: float | None
    run: str
    overrides: Overrides = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Group:
    """One table.

    name: of `--only` and of the picture. title: of its section. settings: its rows. equal_flops: whether each run has
    as many steps as the FLOPs of its first setting's `NUM_STEPS` pay for; the base is then configs/digits.py, and not
    the paper's settings.
    """

    name: str
    title: str
    settings: tuple[Setting, ...]
    equal_flops: bool = False


def _times(name: str, mean: float = 0.0, std: float = 1.0) -> Overrides:
    if name == "uniform":
        return {"times.name": name}
    return {"times.t_mean": mean, "times.r_mean": mean, "times.t_std": std, "times.r_std": std}


def _guidance(omega: float, kappa: float) -> Overrides:
    return {"guidance.omega": omega, "guidance.kappa": kappa}


_IN_CONTEXT: Overrides = {"model.name": "in_context_dit", "model.head_depth": 1}
_SPLIT: Overrides = {"objective.name": "split_meanflow"}
_SHORTCUT: Overrides = {**_SPLIT, "objective.split": "midpoint", "times.name": "dyadic"}
_TERMINAL: Overrides = {"objective.name": "terminal_velocity", "objective.target_ema": 0.99}
_PLAIN: Overrides = {"weight.p": 0.0}
BASELINE = "baseline"
SEEDS = (BASELINE, "baseline_seed_1", "baseline_seed_2")
"""Runs that differ in nothing but the seed."""
_ANY_ROW: Overrides = {
    "draws.label_drop": "any_row"
}  # where no row has r = t, others must lose their label

# In the order in which they are run; published: MeanFlow (arXiv 2505.13447) table 1, B/4, 80 epochs, 1-NFE.
GROUPS: tuple[Group, ...] = (
    Group(
        "tangent",
        "Direction of the derivative (dz, dr, dt)",
        (
            Setting("(v, 0, 1)", 61.06, BASELINE),
            Setting("(v, 0, 0)", 268.06, "tangent_v00", {"objective.tangent": "v00"}),
            Setting("(v, 1, 0)", 329.22, "tangent_v10", {"objective.tangent": "v10"}),
            Setting("(v, 1, 1)", 137.96, "tangent_v11", {"objective.tangent": "v11"}),
        ),
    ),
    Group(
        "share",
        "Share of rows with r < t",
        (
            Setting("0 %", 328.9, "share_0", {"draws.instant_share": 1.0}),
            Setting("25 %", 61.06, BASELINE),
            Setting("50 %", 63.14, "share_50", {"draws.instant_share": 0.5}),
            Setting("100 %", 67.32, "share_100", {"draws.instant_share": 0.0, **_ANY_ROW}),
        ),
    ),
    Group(
        "objectives",
        "All objectives at equal training FLOPs",
        (
            Setting("MeanFlow", 3.43, "objective_meanflow"),
            Setting(
                "flow matching",
                None,
                "objective_flow_matching",
                {"objective.name": "flow_matching", "draws.instant_share": 1.0},
            ),
            Setting(
                "improved MeanFlow",
                2.99,
                "objective_improved",
                {"objective.name": "improved_meanflow", "objective.velocity": "boundary"},
            ),
            Setting("alpha-Flow", 2.95, "objective_alpha_flow", {"objective.name": "alpha_flow"}),
            Setting(
                "SoFlow",
                2.96,
                "objective_soflow",
                {
                    "objective.name": "alpha_flow",
                    "objective.annealing": "exponential",
                    "objective.alpha_start": 0.1,
                    "objective.alpha_end": 0.002,
                    "objective.derivative_below": 0.0,
                },
            ),
            Setting("SplitMeanFlow, p = 0", None, "objective_split_plain", {**_SPLIT, **_PLAIN}),
            Setting("SplitMeanFlow", None, "objective_split", _SPLIT),
            Setting("Shortcut, p = 0", 10.60, "objective_shortcut_plain", {**_SHORTCUT, **_PLAIN}),
            Setting("Shortcut", None, "objective_shortcut", _SHORTCUT),
            Setting(
                "terminal velocity, p = 0, uniform times",
                3.29,
                "objective_terminal_uniform",
                {**_TERMINAL, **_PLAIN, "times.name": "uniform"},
            ),
            Setting(
                "terminal velocity, p = 0",
                None,
                "objective_terminal_plain",
                {**_TERMINAL, **_PLAIN},
            ),
            Setting("terminal velocity", None, "objective_terminal", _TERMINAL),
            Setting("consistency", None, "objective_consistency", {"times.name": "consistency"}),
            Setting(
                "improved MeanFlow, own network",
                None,
                "objective_improved_own",
                {"objective.name": "improved_meanflow", **_IN_CONTEXT},
            ),
            Setting(
                "pixel MeanFlow, own network",
                None,
                "objective_pixel",
                {"objective.name": "pixel_meanflow", "model.prediction": "data", **_IN_CONTEXT},
            ),
        ),
        equal_flops=True,
    ),
    Group(
        "conditioning",
        "What the network is told of the times",
        (
            Setting("t, r", 61.75, "conditioning_t_r", {"model.time_conditioning": "t,r"}),
            Setting("t, t-r", 61.06, BASELINE),
            Setting(
                "t, r, t-r", 63.98, "conditioning_t_r_h", {"model.time_conditioning": "t,r,t-r"}
            ),
            Setting("t-r", 63.13, "conditioning_h", {"model.time_conditioning": "t-r"}),
        ),
    ),
    Group(
        "times",
        "Distribution of the times",
        (
            Setting("uniform", 65.90, "times_uniform", _times("uniform")),
            Setting(
                "logit-normal(-0.2, 1.0)", 63.83, "times_m02_10", _times("logit_normal", -0.2, 1.0)
            ),
            Setting(
                "logit-normal(-0.2, 1.2)", 64.72, "times_m02_12", _times("logit_normal", -0.2, 1.2)
            ),
            Setting("logit-normal(-0.4, 1.0)", 61.06, BASELINE),
            Setting(
                "logit-normal(-0.4, 1.2)", 61.79, "times_m04_12", _times("logit_normal", -0.4, 1.2)
            ),
        ),
    ),
    Group(
        "weight",
        "Power p of the adaptive weight",
        (
            Setting("p = 0", 79.75, "weight_0", {"weight.p": 0.0}),
            Setting("p = 0.5", 63.98, "weight_05", {"weight.p": 0.5}),
            Setting("p = 1", 61.06, BASELINE),
            Setting("p = 1.5", 66.57, "weight_15", {"weight.p": 1.5}),
            Setting("p = 2", 69.19, "weight_2", {"weight.p": 2.0}),
        ),
    ),
    Group(
        "omega",
        "Scale omega of the guidance in the target",
        (
            Setting("omega = 1", 61.06, BASELINE),
            Setting("omega = 1.5", 33.33, "omega_15", _guidance(1.5, 0.0)),
            Setting("omega = 2", 20.15, "omega_2", _guidance(2.0, 0.0)),
            Setting("omega = 3", 15.53, "omega_3", _guidance(3.0, 0.0)),
            Setting("omega = 5", 20.75, "omega_5", _guidance(5.0, 0.0)),
        ),
    ),
    Group(
        "kappa",
        "Factor kappa at the effective scale omega / (1 - kappa) = 2",
        (
            Setting("kappa = 0", 20.15, "omega_2", _guidance(2.0, 0.0)),
            Setting("kappa = 0.5", 19.15, "kappa_05", _guidance(1.0, 0.5)),
            Setting("kappa = 0.9", 18.63, "kappa_09", _guidance(0.2, 0.9)),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and its evaluation.

    name: of its folder. overrides: of configs/digits.py, by dotted name. equal_flops: as `Group` has it.
    """

    name: str
    overrides: Overrides
    equal_flops: bool = False


def all_runs(only: str = "") -> list[Run]:
    """Return the runs of all groups, or of one, each once, the most important first.

    Args:
      only: name of a group; "" = all.

    Raises:
      BadInput: if there is no such group.
    """
    names = [group.name for group in GROUPS]
    if only and only not in names:
        raise BadInput(f"--only={only}: must be one of {', '.join(names)}{nearest(only, names)}")
    runs = {} if only else {name: Run(name, {**PAPER, "seed": i}) for i, name in enumerate(SEEDS)}
    for group in GROUPS:
        if only in ("", group.name):
            for setting in group.settings:
                base: Overrides = EQUAL_FLOPS if group.equal_flops else PAPER
                overrides = {**base, **setting.overrides}
                run = Run(setting.run, overrides, group.equal_flops)
                runs.setdefault(setting.run, run)
    return list(runs.values())


def make_config(run: Run, num_steps: int = NUM_STEPS) -> ConfigDict:
    """Return the config of a run of so many steps."""
    config = digits()
    steps = {
        "train.num_steps": num_steps,
        "optim.warmup_steps": num_steps // 10,
        "objective.anneal_to": num_steps,  # a curriculum over the whole run
    }
    for key, value in {**SHORT, **steps, **run.overrides}.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    return config

"""What the tables of configs share: how a row is chosen, and the settings of methods."""

from collections.abc import Mapping
from typing import Any

from mf_jax.flow.errors import check_known


def choose(file: str, row: str, rows: Mapping[str, Any]) -> Any:
    """Return the row that the command line names after the colon of `--config=configs/FILE:ROW`."""
    if row not in rows:
        check_known(f"--config={file}:ROW, ROW", row, filter(None, rows))
    return rows[row]


def soflow(num_steps: int) -> dict[str, Any]:
    """Return the settings of SoFlow: alpha-Flow from 0.1 to 0.002, without derivative.

    Source: SoFlow, arXiv 2512.15657.
    """
    return {
        "objective.name": "alpha_flow",
        "objective.annealing": "exponential",
        "objective.alpha_start": 0.1,
        "objective.alpha_end": 0.002,
        "objective.derivative_below": 0.0,
        "objective.anneal_to": num_steps,
    }


def soflow_as_published(num_steps: int) -> dict[str, Any]:
    """Return `soflow` with what all recipes of its published code share, and its paper leaves out.

    Errors are means over a row's numbers, the times of a pair never change places, and the gradient
    of rows with r < t counts half.
    """
    return soflow(num_steps) | {
        "objective.target_clip": float("inf"),
        "objective.interval_factor": 0.5,
        "objective.min_gap": 1e-4,
        "weight.of": "mean",
        "times.order": "clip",
        "times.min_gap": 1e-4,
        "sample.renoise": True,
        "eval.renoise": True,
    }


def shortcut(levels: int) -> dict[str, Any]:
    """Return the settings of Shortcut models whose smallest step is 2^-levels.

    One row in eight learns from the averaged network, all others from the data at that step.

    Source: Shortcut models, arXiv 2410.12557, and their published code.
    """
    return {
        "model.time_conditioning": "t,log2",
        "objective.name": "shortcut",
        "times.name": "dyadic",
        "times.levels": levels,
        "instant_times.name": "grid",
        "draws.instant_share": 0.875,
        "weight.p": 0.0,
        "weight.of": "mean",
    }

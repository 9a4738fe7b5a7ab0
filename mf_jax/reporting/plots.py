"""Plots of a run as PNG files: 2-D toy data and training curves.

Figures are objects drawn off screen: no pyplot, no global state, no display.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.special import ndtri

from mf_jax.errors import BadInput
from mf_jax.runtime.files import written_aside

EvaluateU = Callable[..., Float[np.ndarray, "n 2"]]
"""The average velocity of 2-D points as `evaluate_u(z, r=r, t=t)`: z float `[N, 2]`, r and t numbers -> `[N, 2]`."""

_INK, _MUTED, _FAINT = "#1f2933", "#66727f", "#d9dee4"
_BLUE = "#2563eb"
_LINES = ("#93c5fd", "#3b82f6", "#1d4ed8", "#172554")
_SPEEDS = LinearSegmentedColormap.from_list("speeds", ["#bfdbfe", "#3b82f6", "#6d28d9", "#db2777"])
_FIRST = ("loss", "u_error", "v_error", "du_dt", "grad_norm", "learning_rate")


def save_scatter(
    path: str | os.PathLike[str],
    samples: Float[np.ndarray, "n 2"],
    data: Float[np.ndarray, "m 2"],
    *,
    title: str,
) -> None:
    """Save 2-D data and samples side by side on the same axes.

    Args:
        path: PNG file to write.
        samples: float `[N, 2]`.
        data: float `[M, 2]`, M >= 1; its range sets the axes.
        title: a line on top.
    """
    figure, axes = _panels(1, 2, size=4.2, title=title)
    center = (data.min(axis=0) + data.max(axis=0)) / 2
    reach = 0.62 * np.ptp(data, axis=0).max()
    x_limits, y_limits = ((float(middle - reach), float(middle + reach)) for middle in center)
    for ax, points, name, color in zip(
        axes, (data, samples), ("data", "samples"), (_MUTED, _BLUE), strict=True
    ):
        _square(ax, x_limits, y_limits, f"{name} ({len(points):,})")
        ax.scatter(
            *points.T, s=5, c=color, alpha=min(0.6, 1200 / max(len(points), 1)), linewidths=0
        )
    _save(figure, path)


def save_field(
    path: str | os.PathLike[str],
    evaluate_u: EvaluateU,
    *,
    limits: tuple[float | int, float | int],
    times: Sequence[tuple[float, float]] = (
        (0.0, 1.0),
        (0.0, 0.5),
        (0.5, 1.0),
        (1.0, 1.0),
        (0.5, 0.5),
        (0.1, 0.1),
    ),
) -> None:
    """Save stream plots of the learned average velocity u(z, r, t) on 2-D data.

    Args:
        path: PNG file to write.
        evaluate_u: u of points at the times r and t.
        limits: (low, high) of both axes.
        times: pairs (r, t), 0 <= r <= t <= 1, a panel each; r = t is the velocity v.
    """
    line = np.linspace(*limits, 41)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2).astype(np.float32)
    fields = [np.asarray(evaluate_u(points, r=r, t=t)).reshape(41, 41, 2) for r, t in times]
    top = max(np.quantile(np.linalg.norm(u, axis=-1), 0.9) for u in fields)
    title = "Average velocity u(z, r, t), from data towards noise: a sampling step moves against the arrows"
    columns = min(3, len(times))
    figure, axes = _panels(-(-len(times) // columns), columns, size=3.3, title=title)
    for ax, u, (r, t) in zip(axes, fields, times, strict=False):
        _square(
            ax,
            limits,
            limits,
            f"r = t = {t:g}  (velocity v)" if r == t else f"r = {r:g},  t = {t:g}",
        )
        streams = ax.streamplot(
            line, line, *np.moveaxis(u, -1, 0), color=np.linalg.norm(u, axis=-1), cmap=_SPEEDS,
            norm=Normalize(0, top), density=1.1, linewidth=1.0, arrowsize=0.8,
        )  # fmt: skip
    bar = figure.colorbar(
        streams.lines, ax=list(axes), shrink=0.7, aspect=30, pad=0.02, extend="max"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=_MUTED, length=0)
    bar.set_label("|u|", color=_MUTED)
    _save(figure, path)


def save_transport(
    path: str | os.PathLike[str],
    evaluate_u: EvaluateU,
    data: Float[np.ndarray, "m 2"],
    *,
    limits: tuple[float | int, float | int],
) -> None:
    """Save where one step x = e - u(e, 0, 1) carries a regular grid of noise, over the data.

    Args:
        path: PNG file to write.
        evaluate_u: u of points at the times r and t.
        data: float `[M, 2]`, drawn in grey.
        limits: (low, high) of both axes of the data.
    """
    wires, dots = _noise_grid(40)
    e = np.concatenate([dots, *wires]).astype(np.float32)
    x = e - np.asarray(evaluate_u(e, r=0.0, t=1.0))
    figure, axes = _panels(1, 2, size=4.6, title="One-step transport of a regular grid of noise")
    _square(axes[0], (-2.6, 2.6), (-2.6, 2.6), "noise e  (equal probability around each dot)")
    _square(axes[1], limits, limits, "x = e − u(e, 0, 1), over the data")
    axes[1].scatter(
        *data.T, s=14, c="#c3cad2", alpha=min(0.6, 900 / max(len(data), 1)), linewidths=0
    )
    cuts = np.cumsum([len(dots), *map(len, wires)])[:-1]
    line_colors = _colors_of_noise(np.concatenate([wire[:-1] for wire in wires]))
    for ax, places in zip(axes, (e, x), strict=True):
        lines = np.split(places, cuts)[1:]
        segments = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in lines])
        ax.add_collection(LineCollection(segments, colors=line_colors, linewidths=0.5, alpha=0.35))
        ax.scatter(*places[: len(dots)].T, s=6, c=_colors_of_noise(dots), linewidths=0, zorder=3)
    _save(figure, path)


def save_curves(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Save training curves as small multiples, one panel a metric, bins of t together.

    Args:
        path: PNG file to write.
        rows: rows of metrics.jsonl, `{"step": int, name: number or None, ...}`; any name may be missing in a row.

    Raises:
        BadInput: no row has a number to draw.
    """
    panels = curve_panels(rows)
    if not panels:
        raise BadInput(
            f"rows has {len(rows)} rows without a metric to draw; pass rows read from metrics.jsonl"
        )
    columns = min(3, len(panels))
    figure, axes = _panels(-(-len(panels) // columns), columns, size=3.4, height=2.3)
    for ax, (title, names) in zip(axes, panels.items(), strict=False):
        shades = _LINES if len(names) > 1 else (_BLUE,)
        for i, name in enumerate(names):
            steps, values = _curve(rows, name)
            _draw_curve(ax, steps, values, shades[i % len(shades)], smooth=name != "learning_rate")
        ax.set_title(title, loc="left", fontsize=10, color=_INK)
        _finish_curves(ax, names, np.concatenate([_curve(rows, name)[1] for name in names]))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    _save(figure, path)


def curve_panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group the metrics of a run into the panels of `save_curves`.

    Args:
        rows: rows of metrics.jsonl.

    Returns:
        Title of each panel -> names of its metrics, the best known first; empty where no row has a number.
    """
    names = dict.fromkeys(
        k for row in rows for k, x in row.items() if k != "step" and _is_finite(x)
    )
    rank = {name: i for i, name in enumerate(_FIRST)}
    panels: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (rank.get(name, len(rank)), name)):
        binned = re.fullmatch(r"(.+)_t\d+", name)
        panels.setdefault(f"{binned[1]} by bin of t" if binned else name, []).append(name)
    return panels


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if _is_finite(row.get(name))]
    return tuple(np.array(pairs, float).T)


def _draw_curve(
    ax: Axes, steps: np.ndarray, values: np.ndarray, color: str, *, smooth: bool
) -> None:
    window = len(values) // 40
    if smooth and window > 1:
        ax.plot(steps, values, color=color, alpha=0.22, linewidth=0.7)
        # A centred mean, divided by the number of rows it really covers at the ends.
        kernel = np.ones(window)
        values = np.convolve(values, kernel, "same") / np.convolve(
            np.ones(len(values)), kernel, "same"
        )
    ax.plot(
        steps, values, color=color, linewidth=1.5, marker="o" * (len(values) == 1), markersize=3
    )


def _finish_curves(ax: Axes, names: Sequence[str], values: np.ndarray) -> None:
    if (
        0 < 4 * values.min() < values.max() < 1000 * values.min()
    ):  # beyond, the few smallest values would take it all
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.grid(axis="y", color=_FAINT, linewidth=0.6)
    ax.tick_params(which="both", labelsize=8, colors=_MUTED, length=0)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)
    if len(names) > 1:
        labels = [name.rsplit("_", 1)[1] for name in names]
        lines = [line for line in ax.lines if line.get_alpha() is None]
        ax.legend(
            lines, labels, fontsize=7.5, frameon=False, ncols=2, labelcolor=_MUTED, handlelength=1.2
        )


def _noise_grid(side: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the lines of a grid of N(0, I), each `[K, 2]`, and its dots `[side^2, 2]`, equal in probability."""
    line = ndtri((np.arange(side) + 0.5) / side)
    dots = np.stack(np.meshgrid(line, line), axis=-1)
    along = np.linspace(line[0], line[-1], 201)
    wires = [np.stack([along, np.full_like(along, place)], axis=1) for place in line[::3]]
    return [*wires, *(wire[:, ::-1] for wire in wires)], dots.reshape(-1, 2)


def _colors_of_noise(e: np.ndarray) -> np.ndarray:
    """Return RGB `[N, 3]`: the direction of each point gives the hue, its distance the strength."""
    hue = np.arctan2(e[:, 1], e[:, 0]) / (2 * np.pi) % 1.0
    strength = np.clip(np.linalg.norm(e, axis=1) / 1.4, 0.2, 0.85)
    return hsv_to_rgb(np.stack([hue, strength, np.full_like(hue, 0.88)], axis=1))


def _panels(
    rows: int, columns: int, *, size: float, height: float = 0.0, title: str = ""
) -> tuple[Figure, np.ndarray]:
    figure = Figure(
        figsize=(columns * size, rows * (height or size) + 0.35 * bool(title)), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _square(
    ax: Axes, x_limits: Sequence[float | int], y_limits: Sequence[float | int], title: str
) -> None:
    ax.set(xlim=tuple(x_limits), ylim=tuple(y_limits), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=9.5, color=_MUTED)
    ax.spines[:].set_color(_FAINT)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    with written_aside(epath.Path(path)) as aside:
        figure.savefig(aside, format="png", dpi=130, facecolor="white")

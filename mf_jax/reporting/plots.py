"""Plots of a run as PNG files: vectors, the field of 2-D toy data, and training curves.

Figures are drawn off screen, without pyplot.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from etils import epath, epy
from jaxtyping import Float

from mf_jax.reporting.sample_grid import CAPTION
from mf_jax.runtime.files import written_aside

with epy.lazy_imports():
    import matplotlib as mpl
    from matplotlib import collections, colors, figure
    from scipy import ndimage, special
    from sklearn import decomposition

Rows: TypeAlias = Float[np.ndarray, "_ ..."]
EvaluateU = Callable[..., Float[np.ndarray, "n 2"]]
"""The average velocity `evaluate_u(z, r=r, t=t)` of 2-D points z at two numbers r and t."""

_INK, _MUTED, _FAINT, _BLUE = "#1f2933", "#66727f", "#d9dee4", "#2563eb"
_BINS = ("#93c5fd", "#3b82f6", "#1d4ed8", "#172554")
_MARGINS = {"left": 0.17, "right": 0.98, "bottom": 0.14, "top": 0.96}
_STYLE = {
    "font.size": 8,
    "text.parse_math": False,  # a name may hold a $
    "text.color": _INK,
    "figure.titlesize": 11,
    "axes.titlesize": 9.5,
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
    **{f"figure.constrained_layout.{axis}_pad": 0.08 for axis in "wh"},
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _FAINT),
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "legend.labelcolor"), _MUTED),
    **dict.fromkeys(("xtick.color", "ytick.color"), _MUTED),
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "savefig.dpi": 180,
    # of curves, whose labels are short: a layout takes as long as the rest
    **{f"figure.subplot.{side}": x for side, x in _MARGINS.items()},
}
_SIGNAL_ROWS = 6
_FIRST = ("loss", "u_error", "v_error", "du_dt", "grad_norm", "learning_rate")


def save_scatter(path: epath.PathLike, samples: Rows, data: Rows, *, title: str) -> None:
    """Save data, whose range sets the axes, beside samples, both as vectors of any length.

    Of more than two coordinates it shows the data's first two principal components.
    """
    samples, data = (points.reshape(len(points), -1) for points in (samples, data))
    names = f"data ({len(data):,})", f"samples ({len(samples):,})"
    if data.shape[1] == 1:
        bins = np.histogram_bin_edges(data, min(100, max(10, len(data) // 20)))
        with _figure(path, 1, 1, width=6.4, height=3.2, title=title) as (_, (ax,)):
            how = {"density": True, "alpha": 0.5}
            ax.hist(data.ravel(), bins, color=_MUTED, label=names[0], **how)
            ax.hist(samples.ravel(), bins, color=_BLUE, label=names[1], **how)
            ax.legend()
        return
    if data.shape[1] > 2:
        components = decomposition.PCA(2, random_state=0).fit(data)
        samples, data = (components.transform(points) for points in (samples, data))
        title = f"{title}\nfirst two principal components of the data"
    middle = (data.min(axis=0) + data.max(axis=0)) / 2
    reach = 0.62 * np.ptp(data, axis=0).max()
    limits = np.stack([middle - reach, middle + reach], axis=1)
    with _figure(path, 1, 2, width=4.2, height=4.2, title=title) as (_, axes):
        panels = zip(axes, names, (data, samples), (_MUTED, _BLUE), strict=True)
        for ax, name, points, color in panels:
            _square(ax, *limits, name)
            alpha = min(0.6, 1200 / max(len(points), 1))
            ax.scatter(*points.T, s=5, c=color, alpha=alpha, linewidths=0)


def save_signals(path: epath.PathLike, samples: Rows, data: Rows, *, title: str) -> None:
    """Save signals `[N, L, C]`, 4 channels of each; the range of the data sets the axes."""
    middle, reach = (data.min() + data.max()) / 2, 0.6 * np.ptp(data) or 1.0
    panels = [(f"data ({len(data):,})", data), (f"samples ({len(samples):,})", samples)]
    rows = min(_SIGNAL_ROWS, -(-max(len(data), len(samples)) // 2))
    with _figure(path, rows, 4, width=2.1, height=1.1, title=title) as (_, axes):
        for i, ax in enumerate(axes):
            name, signals = panels[i % 4 // 2]
            ax.set(ylim=(middle - reach, middle + reach), xticks=[], yticks=[])
            ax.set_title(name if i in (0, 2) else "", loc="left")
            chosen = i // 4 * 2 + i % 2
            if chosen < len(signals):
                for line, shade in zip(signals[chosen].T, reversed(_BINS), strict=False):
                    ax.plot(line, color=shade if i % 4 > 1 else _MUTED, linewidth=0.9)


def save_field(
    path: epath.PathLike, evaluate_u: EvaluateU, *, reach: float, times: Sequence[tuple]
) -> None:
    """Save stream plots of u(z, r, t) up to a reach from 0, a panel for each pair (r, t)."""
    line, limits = np.linspace(-reach, reach, 41), (-reach, reach)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2).astype(np.float32)
    fields = [np.asarray(evaluate_u(points, r=r, t=t)).reshape(41, 41, 2) for r, t in times]
    speeds = np.linalg.norm(fields, axis=-1)
    norm = colors.Normalize(0, np.quantile(speeds, 0.9, axis=(1, 2)).max())
    title = "Average velocity u(z, r, t): a sampling step moves against the arrows"
    columns = min(3, len(times))
    rows = -(-len(times) // columns)
    with _figure(path, rows, columns, width=3.3, height=3.3, title=title) as (sheet, axes):
        for ax, u, speed, (r, t) in zip(axes, fields, speeds, times, strict=False):
            name = f"r = t = {t:g}  (velocity v)" if r == t else f"r = {r:g},  t = {t:g}"
            _square(ax, limits, limits, name)
            streams = ax.streamplot(
                line, line, *np.moveaxis(u, -1, 0), color=speed, cmap="plasma", norm=norm,
                density=1.1, linewidth=1.0, arrowsize=0.8,
            )  # fmt: skip
        bar = sheet.colorbar(streams.lines, ax=axes, shrink=0.7, aspect=30, extend="max")
        bar.outline.set_visible(False)
        bar.set_label("|u|")


def save_transport(
    path: epath.PathLike, evaluate_u: EvaluateU, data: Rows, *, reach: float
) -> None:
    """Save where one step x = e - u(e, 0, 1) carries a regular grid of noise, over the data.

    The grid has dots of equal probability under N(0, I), and wires through every third of them.
    """
    line = special.ndtri((np.arange(40) + 0.5) / 40)
    dots = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    wires = np.stack(np.meshgrid(np.linspace(line[0], line[-1], 201), line[::3]), axis=-1)
    wires = np.concatenate([wires, wires[..., ::-1]])
    e = np.concatenate([dots, wires.reshape(-1, 2)]).astype(np.float32)
    x = e - np.asarray(evaluate_u(e, r=0.0, t=1.0))
    wire_colors = _colors_of_noise(wires[:, :-1].reshape(-1, 2))
    title = "One-step transport of a regular grid of noise"
    with _figure(path, 1, 2, width=4.6, height=4.6, title=title) as (_, axes):
        _square(axes[0], (-2.6, 2.6), (-2.6, 2.6), "noise e  (equal probability around each dot)")
        _square(axes[1], (-reach, reach), (-reach, reach), "x = e − u(e, 0, 1), over the data")
        alpha = min(0.6, 900 / max(len(data), 1))
        axes[1].scatter(*data.T, s=14, c="#c3cad2", alpha=alpha, linewidths=0)
        for ax, points in zip(axes, (e, x), strict=True):
            lines = points[len(dots) :].reshape(wires.shape)
            segments = np.stack([lines[:, :-1], lines[:, 1:]], axis=2).reshape(-1, 2, 2)
            how = {"colors": wire_colors, "linewidths": 0.5, "alpha": 0.35}
            ax.add_collection(collections.LineCollection(segments, **how))
            shown = points[: len(dots)].T
            ax.scatter(*shown, s=6, c=_colors_of_noise(dots), linewidths=0, zorder=3)


def _colors_of_noise(e: np.ndarray) -> np.ndarray:
    """Return RGB `[N, 3]`: the hue is the direction of a point, the strength its distance."""
    hue = np.arctan2(e[:, 1], e[:, 0]) / (2 * np.pi) % 1.0
    strength = np.clip(np.linalg.norm(e, axis=1) / 1.4, 0.2, 0.85)
    return colors.hsv_to_rgb(np.stack([hue, strength, np.full_like(hue, 0.88)], axis=1))


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each metric and its curve as a PNG file, bins of t in one, `NAME_t`."""
    others = {name for row in rows for name in row} - {"step", *_FIRST}
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name in (*_FIRST, *sorted(others)):
        if known := [(row["step"], row[name]) for row in rows if row.get(name) is not None]:
            curves = panels.setdefault(re.sub(r"_t\d$", "_t", name), {})
            curves[name[-2:]] = np.array(known, float).T
    for name, curves in panels.items():
        content = io.BytesIO()
        with _figure(content, 1, 1, width=3.4, height=1.9) as (_, (ax,)):
            _draw_panel(ax, curves)
        yield name, content.getvalue()


def _draw_panel(ax: Any, curves: Mapping[str, np.ndarray]) -> None:
    """Draw curves `[2, N]` of steps and values, those of bins of t with a legend."""
    shades = itertools.cycle(_BINS if len(curves) > 1 else (_BLUE,))
    for (label, (steps, values)), color in zip(curves.items(), shades, strict=False):
        if (window := len(values) // 40) > 1:
            ax.plot(steps, values, color=color, alpha=0.22, linewidth=0.7)
            values = ndimage.uniform_filter1d(values, window, mode="nearest")
        marker = "o" if len(values) == 1 else ""
        ax.plot(steps, values, color=color, marker=marker, markersize=3, label=label)
    ax.locator_params(axis="both", nbins=4)
    ax.xaxis.get_major_locator().set_params(integer=True)
    drawn = np.concatenate([values for _, values in curves.values()])
    # beyond a factor of 1000 the few smallest values would take the whole axis
    if 0 < 4 * drawn.min() < drawn.max() < 1000 * drawn.min():
        ax.set_yscale("log", subs=(2, 5))
        ax.yaxis.set_minor_formatter("{x:.4g}")
    ax.yaxis.set_major_formatter("{x:.4g}")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(axis="y", which="both")
    ax.spines[["left", "right", "top"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(ncols=4, handlelength=1.2)


@contextlib.contextmanager
def _figure(
    path: epath.PathLike | io.BytesIO, rows: int, columns: int, *, title: str = "", **size: float
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield a figure and its axes, `width` x `height` inches each, and save it afterwards."""
    inches = columns * size["width"], rows * size["height"] + 0.3 * len(title.splitlines())
    with mpl.rc_context(_STYLE):
        sheet = figure.Figure(figsize=inches, layout="constrained" if title else None)
        if title:
            sheet.suptitle(title)
        yield sheet, sheet.subplots(rows, columns, squeeze=False).ravel()
        in_memory = isinstance(path, io.BytesIO)
        with contextlib.nullcontext(path) if in_memory else written_aside(epath.Path(path)) as file:
            sheet.savefig(file, format="png", metadata={CAPTION: title})


def _square(ax: Any, x_limits: Any, y_limits: Any, title: str) -> None:
    ax.set(xlim=tuple(x_limits), ylim=tuple(y_limits), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title)

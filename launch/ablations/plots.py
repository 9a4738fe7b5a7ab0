"""A picture for each table: our distances beside the published figures."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from launch.ablations.analysis import Results, as_text, noise_of, real_data, score
from launch.ablations.settings import BASELINE, Group

_INK, _MUTED, _FAINT, _BLUE, _PALE = "#1f2933", "#66727f", "#d9dee4", "#2563eb", "#bfdbfe"


def save_plot(path: Path, group: Group, results: Results) -> None:
    """Save a group's distances at one step beside the published ones, each panel with its own scale."""
    labels = [setting.label for setting in group.settings]
    ours = [score(results, setting.run) for setting in group.settings]
    figure = Figure(figsize=(9.2, 1.35 + 0.3 * len(labels)), layout="constrained")
    figure.suptitle(f"{group.title}: one step", fontsize=11, color=_INK)
    left, right = figure.subplots(1, 2, sharey=True)
    is_log = _bars(left, labels, ours)
    scale = ", log scale" if is_log else ""
    left.set_title(f"8x8 digits, Fréchet distance{scale}", fontsize=9.5, color=_MUTED)
    seeds = noise_of(results).values
    for i, setting in enumerate(group.settings):
        if setting.run == BASELINE:
            left.plot(
                seeds, [i] * len(seeds), "|", color=_INK, markersize=9, label=f"{len(seeds)} seeds"
            )
    floor = real_data(results)
    if floor is not None and any(value is not None for value in ours):
        left.axvline(
            floor, color=_INK, linewidth=1, linestyle=(0, (3, 3)), label="held-out real data"
        )
    if left.get_legend_handles_labels()[0]:
        figure.legend(
            loc="outside lower left", fontsize=8, frameon=False, ncols=2, labelcolor=_MUTED
        )
    _bars(right, labels, [setting.published for setting in group.settings])
    what = "XL/2, own recipes" if group.equal_flops else "B/4, 80 epochs"
    right.set_title(f"published FID, ImageNet, {what}", fontsize=9.5, color=_MUTED)
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(64).save(
        path, optimize=True
    )  # a third of the bytes, same to the eye


def _bars(ax: Axes, labels: Sequence[str], values: Sequence[float | None]) -> bool:
    """Draw a bar for each value, the smallest stressed; return whether the scale is logarithmic."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    top = max(known, default=1.0)
    is_log = bool(known) and top > 25 * min(known)  # else the smaller half would look alike
    first = 1.0 if is_log else 0.0
    for i, value in enumerate(values):
        is_number = value is not None and math.isfinite(value)
        end = value if is_number else first
        color = _BLUE if known and value == min(known) else _PALE
        ax.barh(i, end - first, left=first, height=0.66, color=color)
        text = "" if value is None else as_text(value, ".4g")
        ax.annotate(
            text,
            (end, i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    ax.set(ylim=(len(labels) - 0.4, -0.6))
    if is_log:
        ax.set(xscale="log", xlim=(first, 2.2 * top))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
    else:
        ax.set(xlim=(0, 1.16 * top))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_yticks(range(len(labels)), labels, fontsize=9, color=_INK)
    ax.tick_params(length=0, labelcolor=_INK)
    ax.tick_params(axis="x", labelsize=8, labelcolor=_MUTED)
    ax.grid(axis="x", color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)
    return is_log

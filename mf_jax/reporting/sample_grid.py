"""Grids of sample images as PNG files."""

import math
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import written_aside

_INK, _MUTED = "#1f2933", "#66727f"
_TILE, _GAP, _FONT = 56, 4, 13
_MOST_TILES, _MOST_CLASSES = 100, 10


def few_classes(num: int, num_classes: int) -> Int[np.ndarray, "n"]:
    """Return labels for a picture: at most ten classes, evenly spaced and equally often."""
    if not num_classes:
        return np.full(num, NO_LABEL, np.int32)
    chosen = np.linspace(0, num_classes - 1, min(num_classes, _MOST_CLASSES)).round()
    return np.resize(chosen.astype(np.int32), num)


def save_sample_grid(
    path: str | os.PathLike[str],
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
) -> None:
    """Save at most 100 samples: a row for each class, or labels below where classes are too many.

    Args:
      images: at least one; 3 channels are RGB, of any other number the first is shown in grey.
      labels: classes, `NO_LABEL` for none.
      class_names: empty for an unconditional model, whose samples bear no names.
    """
    classes, counts = np.unique(labels, return_counts=True)
    columns = min(_MOST_TILES // len(classes), int(counts.min()))
    if class_names and columns >= 2:
        chosen = np.concatenate([np.flatnonzero(labels == k)[:columns] for k in classes])
        row_names = [_class_name(k, class_names) for k in classes.tolist()]
        sheet = _sheet(images[chosen], columns, row_names=row_names)
    else:
        images, labels = images[:_MOST_TILES], labels[:_MOST_TILES]
        names = [_class_name(k, class_names) for k in labels.tolist()] if class_names else []
        sheet = _sheet(images, math.ceil(math.sqrt(len(images))), names=names)
    with written_aside(epath.Path(path)) as aside:
        sheet.save(aside, format="PNG")


def _sheet(
    images: np.ndarray, columns: int, *, row_names: Sequence[str] = (), names: Sequence[str] = ()
) -> Image.Image:
    """Return images row by row, tiny ones as large pixels, with names beside or below."""
    count, height, width, channels = images.shape
    font = ImageFont.load_default(_FONT)
    scale = max(1, round(_TILE / max(height, width)))
    left = round(max(map(font.getlength, row_names))) + 4 * _GAP if row_names else _GAP
    step_x, step_y = width * scale + _GAP, height * scale + _GAP + bool(names) * (_FONT + _GAP)
    size = (left + columns * step_x, _GAP + -(-count // columns) * step_y)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = left + i % columns * step_x, _GAP + i // columns * step_y
        tile = Image.fromarray(image if channels == 3 else image[..., 0])
        sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if names:
            place = (x + width * scale // 2, y + height * scale + 2)
            draw.text(place, _shorten(names[i], font, width * scale), _MUTED, font, anchor="ma")
    for row, name in enumerate(row_names):
        place = (left - 2 * _GAP, _GAP + row * step_y + height * scale // 2)
        draw.text(place, name, _INK, font, anchor="rm")
    return sheet


def _class_name(label: int, class_names: Sequence[str]) -> str:
    if label == NO_LABEL:
        return "no label"
    return str(class_names[label]) if 0 <= label < len(class_names) else str(label)


def _shorten(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(name) > width and len(name) > 2:
        name = name.rstrip("…")[:-1] + "…"
    return name

"""Grids of sample images as PNG files."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import written_aside

_INK, _MUTED = "#1f2933", "#66727f"
_TILE, _GAP, _FONT = 56, 4, 13
_MOST_TILES, _MOST_CLASSES = 100, 10


def save_grid(
    path: str | os.PathLike[str],
    images: UInt8[np.ndarray, "n h w c"],
    *,
    labels: Int[np.ndarray, "n"] | None = None,
    class_names: Sequence[str] = (),
    columns: int = 0,
    title: str = "",
) -> None:
    """Save images as a grid, tiny ones enlarged without smoothing to about 56 pixels.

    Args:
        path: PNG file to write.
        images: uint8 `[N, H, W, C]`, N >= 1, C 1 (grey) or 3 (RGB); filled in row by row.
        labels: int `[N]`, written once a row where a row has one class, else under each image.
        class_names: names of the classes; a class beyond them is shown as its number.
        columns: images in a row; 0 makes a row of each class where that is possible, else a square.
        title: a line on top.

    Raises:
        BadInput: no image, or C is neither 1 nor 3, or columns is negative.
    """
    count, height, width, channels = images.shape
    if count == 0 or channels not in (1, 3) or columns < 0:
        raise BadInput(
            f"save_grid got images of shape {images.shape} and columns {columns}; it takes [N, H, W, C] with N >= 1 "
            "and C 1 or 3, and columns >= 0; pass uint8 images of that shape"
        )
    columns = min(columns or _grid_columns(count, labels), count)
    names = [] if labels is None else [_class_name(int(k), class_names) for k in labels]
    rows = [names[i : i + columns] for i in range(0, len(names), columns)]
    by_row = bool(rows) and all(len(set(row)) == 1 for row in rows)
    font = ImageFont.load_default(_FONT)
    left = _GAP + by_row * (round(max(map(font.getlength, names), default=0)) + 3 * _GAP)
    top = _GAP + bool(title) * (_FONT + 3 * _GAP)
    scale = max(1, round(_TILE / max(height, width)))
    step_x = width * scale + _GAP
    step_y = height * scale + _GAP + (bool(rows) and not by_row) * (_FONT + _GAP)
    sheet = Image.new(
        "RGB", (left + columns * step_x, top + -(-count // columns) * step_y), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, font)
    for i, image in enumerate(images):
        x, y = left + i % columns * step_x, top + i // columns * step_y
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if by_row and i % columns == 0:
            draw.text((left - 2 * _GAP, y + height * scale // 2), names[i], _INK, font, anchor="rm")
        elif names and not by_row:
            name = _shorten(names[i], font, width * scale)
            draw.text(
                (x + width * scale // 2, y + height * scale + 2), name, _MUTED, font, anchor="ma"
            )
    with written_aside(epath.Path(path)) as aside:
        sheet.save(aside, format="PNG")


def save_sample_grid(
    path: str | os.PathLike[str],
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
) -> None:
    """Save at most 100 samples, a row for each class or, where classes are too many for that, a label under each.

    Args:
      path: PNG file to write.
      images: uint8 `[N, H, W, C]`, N >= 1.
      labels: int `[N]`, `NO_LABEL` for none.
      class_names: names of the classes, empty for an unconditional model.
    """
    classes, counts = np.unique(labels, return_counts=True)
    columns = min(_MOST_TILES // len(classes), int(counts.min()))
    if not class_names:
        save_grid(path, images[:_MOST_TILES])
    elif columns < 2:
        save_grid(path, images[:_MOST_TILES], labels=labels[:_MOST_TILES], class_names=class_names)
    else:
        rows = np.concatenate([np.flatnonzero(labels == c)[:columns] for c in classes])
        save_grid(path, images[rows], labels=labels[rows], class_names=class_names, columns=columns)


def few_classes(num: int, num_classes: int) -> Int[np.ndarray, "n"]:
    """Return labels for a picture: at most ten classes, evenly spaced among all, each equally often."""
    if not num_classes:
        return np.full(num, NO_LABEL, np.int32)
    chosen = (
        np.linspace(0, num_classes - 1, min(num_classes, _MOST_CLASSES)).round().astype(np.int32)
    )
    return np.resize(chosen, num)


def _grid_columns(count: int, labels: np.ndarray | None) -> int:
    """Return the length of the classes' equal runs, where labels come in such runs, or the side of a square."""
    if labels is not None:
        run = int(np.argmax(np.append(labels, labels[-1] + 1)[1:] != labels)) + 1
        if (
            2 <= run <= 24
            and count % run == 0
            and (np.ptp(labels.reshape(-1, run), axis=1) == 0).all()
        ):
            return run
    return int(np.ceil(np.sqrt(count)))


def _class_name(label: int, class_names: Sequence[str]) -> str:
    if label == NO_LABEL:
        return "no label"
    return str(class_names[label]) if 0 <= label < len(class_names) else str(label)


def _shorten(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(name) > width and len(name) > 2:
        name = name.rstrip("…")[:-1] + "…"
    return name

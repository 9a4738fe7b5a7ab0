"""Grids of sample images as PNG files."""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from etils import epath, epy
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import opened, written_aside

with epy.lazy_imports():  # brings the font, whose letters are many
    import matplotlib as mpl
    from matplotlib import ft2font

Images: TypeAlias = UInt8[np.ndarray, "_ h w c"]
Labels: TypeAlias = Int[np.ndarray, "n"]
Groups = Sequence[tuple[str, Images]]
CAPTION = "Description"  # key of the caption among the texts of a PNG file
REAL_FILE = "real.png"  # real pictures of a run, as its samples are shown
_INK, _MUTED = "#1f2933", "#66727f"
_TILE, _GAP, _FONT, _LINE = 56, 4, 11, 13
_MOST_TILES, _MOST_CLASSES = 100, 10
_WIDEST, _WIDEST_NAME, _MOST_OBLONG = 1600, 240, 1.6
_MOST_FRAMES, _WIDEST_FRAME, _WAIT = 60, 640, 200  # pixels, milliseconds


def few_classes(num: int, num_classes: int) -> Labels:
    """Return labels for a picture: at most ten classes, evenly spaced and equally often."""
    if not num_classes:
        return np.full(num, NO_LABEL, np.int32)
    chosen = np.linspace(0, num_classes - 1, min(num_classes, _MOST_CLASSES)).round()
    return np.resize(chosen.astype(np.int32), num)


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Return what people call a label."""
    if label == NO_LABEL:
        return "no label"
    return str(class_names[label]) if 0 <= label < len(class_names) else str(label)


def save_sample_grid(
    path: epath.PathLike, images: Images, labels: Labels, known: Sequence[str], *, caption: str = ""
) -> None:
    """Save at most 100 samples near a square: rows of each class, or names below if they are many.

    Args:
      images: at least one; 3 channels are RGB, of any other number the first is shown in grey.
      known: names of classes; none for an unconditional model, whose samples bear no names.
      caption: of the whole, above it and in the file.
    """
    classes, counts = np.unique(labels, return_counts=True)
    each = min(_MOST_TILES // len(classes), int(counts.min()))
    shape = images.shape[1:3]
    columns, oblong = _columns(len(classes), each, shape) if known and each else (0, math.inf)
    if oblong <= _MOST_OBLONG:
        each -= each % columns * (len(classes) > 1)  # whole rows
        rows = [(class_name(k, known), images[labels == k][:each]) for k in classes.tolist()]
        _draw(path, rows, columns, caption)
    else:
        images, labels = images[:_MOST_TILES], labels[:_MOST_TILES]
        names = [class_name(k, known) for k in labels.tolist()] if known else ()
        _draw(path, [("", images)], _columns(1, len(images), shape)[0], caption, names)


def save_rows(path: epath.PathLike, rows: Groups, caption: str) -> None:
    """Save named rows of equally many images, one below the other."""
    _draw(path, rows, len(rows[0][1]), caption)


def save_animation(path: epath.PathLike, pictures: Sequence[epath.Path]) -> None:
    """Save at most 60 pictures, from the first to the last, as an animated WebP."""
    chosen = np.linspace(0, len(pictures) - 1, min(len(pictures), _MOST_FRAMES)).round()
    frames = []
    for i in chosen.astype(int):
        with opened(pictures[i]) as file, Image.open(file, formats=["PNG"]) as picture:
            picture.thumbnail((_WIDEST_FRAME, _WIDEST_FRAME))
            frames.append(picture.convert("RGB").resize((frames or [picture])[0].size))
    waits = [_WAIT] * (len(frames) - 1) + [10 * _WAIT]
    options = {"save_all": True, "append_images": frames[1:], "duration": waits, "loop": 0}
    with written_aside(epath.Path(path)) as aside:
        frames[0].save(aside, format="WEBP", **options)


def _columns(groups: int, each: int, shape: Sequence[int]) -> tuple[int, float]:
    """Return the columns that bring whole rows of each group nearest to a square, and how near."""

    def oblong(columns: int) -> float:
        ratio = groups * -(-each // columns) * shape[0] / (columns * shape[1])
        return max(ratio, 1 / ratio)

    best = min(range(each, 0, -1), key=oblong)
    return best, oblong(best)


def _draw(
    path: epath.PathLike, groups: Groups, columns: int, caption: str, names: Sequence[str] = ()
) -> None:
    """Save images row by row, tiny ones as large pixels, with names of groups beside them.

    Other names stand below the images of the only group.
    """
    font, _ = _font()
    num, height, width, channels = groups[0][1].shape
    sides = [_shorten(name, _WIDEST_NAME) for name, _ in groups]
    left = round(max(map(font.getlength, sides))) + 4 * _GAP if any(sides) else _GAP
    most = ((_WIDEST - left) // columns - _GAP) / width
    scale = min(max(1, round(_TILE / max(height, width))), most)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    step_x, step_y = size[0] + _GAP, size[1] + _GAP + bool(names) * (_LINE + _GAP)
    top, group_height = _GAP + bool(caption) * (_LINE + _GAP), -(-num // columns) * step_y
    whole = left + columns * step_x, top + len(groups) * group_height
    sheet = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _shorten(caption, sheet.width - 2 * _GAP), _MUTED, font)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for i, (_, images) in enumerate(groups):
        first = top + i * group_height
        middle = left - 2 * _GAP, first + (group_height - _GAP) // 2
        draw.text(middle, sides[i], _INK, font, anchor="rm")
        for j, image in enumerate(images):
            x, y = left + j % columns * step_x, first + j // columns * step_y
            tile = Image.fromarray(image if channels == 3 else image[..., 0])
            sheet.paste(tile.resize(size, how), (x, y))
            if names:
                below = x + size[0] // 2, y + size[1] + 2
                draw.text(below, _shorten(names[j], size[0]), _MUTED, font, anchor="ma")
    info = PngInfo()
    info.add_itxt(CAPTION, caption)
    with written_aside(epath.Path(path)) as aside:
        sheet.save(aside, format="PNG", pnginfo=info)


@functools.cache
def _font() -> tuple[ImageFont.FreeTypeFont, frozenset[int]]:
    """Return a font of many letters, and their codes."""
    path = f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, _FONT), frozenset(ft2font.FT2Font(path).get_charmap())


def _shorten(name: str, width: int) -> str:
    """Return a name no wider than some pixels, letters that the font lacks by their codes."""
    font, known = _font()
    name = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in name)
    while font.getlength(name) > width and len(name) > 2:
        name = name.rstrip("…")[:-1] + "…"
    return name

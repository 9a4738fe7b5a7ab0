"""One HTML page of a run that opens from a disk or an attachment, without a server or a network.

`page.html` has its frame, its style and the script of its slider.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path as LocalPath
from string import Template
from typing import Any

import numpy as np
from etils.epath import Path, PathLike
from PIL import Image

from mf_jax.flow.errors import BadInput, left_out
from mf_jax.reporting.plots import draw_curves
from mf_jax.reporting.run_log import TIMING, TIMING_FILE, read_metrics
from mf_jax.reporting.sample_grid import CAPTION, REAL_FILE
from mf_jax.runtime.files import opened, replace_file
from mf_jax.runtime.json_files import read_json

Row = Mapping[str, Any]
_MOST_GRIDS = 24
_CONFIG = {"weight?": {}, "train?": {}}
_TABLE = {"protocol?": "", "rows?": [{"name?": ""}], "columns?": [""], "diagnostics?": {}}
_LARGE_BYTES, _LARGE_PIXELS = 400_000, 1400
# A dark page inverts the colours of a plot and keeps those of a grid, which mean something.
_PICTURES = (
    ("samples.png", "Samples", "grid"),
    ("steps.png", "The same noise in more steps", "grid"),
    ("walk.png", "From noise to noise", "grid"),
    ("nearest.png", "Samples and the training pictures nearest to them", "grid"),
    ("training.webp", "Samples while training", "grid"),
    ("scatter.png", "Data and samples", "plot"),
    ("signals.png", "Data and samples", "plot"),
    ("transport.png", "One-step transport of the noise", "grid"),
    ("field.png", "Learned average velocity", "plot"),
)
_CURVES = {
    "loss": "The objective, each row weighted by its own error; no unit.",
    "u_error": "Squared error of the average velocity u where r < t, per number of a sample, in "
    "squared units of the data. It does not fall to 0.",
    "v_error": "Squared error of the velocity v, where r = t, per number of a sample, in squared "
    "units of the data. It does not fall to 0.",
    "du_dt": "Size of the derivative of u along the path, in units of the data per unit of time.",
    "grad_norm": "Length of the gradient over all parameters, before clipping; no unit.",
    "learning_rate": "Step size of the optimiser; no unit.",
    "head_error": "Squared error of the second head's velocity, in squared units of the data.",
    "alpha": "Length of the finite step as a share of the interval; no unit.",
    "u_error_t": "u_error by quarter of t: t0 is next to the data, t3 next to the noise.",
    "v_error_t": "v_error by quarter of t: t0 is next to the data, t3 next to the noise.",
}


@left_out("report.html")
def write_report(workdir: PathLike) -> Path:
    """Write `report.html` from what the folder of a run holds so far; an error ends no run."""
    folder = Path(workdir)
    grids = sorted(folder.glob(f"samples/step_{8 * '[0-9]'}.png"))
    config, rows = _read_json(folder / "config.json", _CONFIG), read_metrics(folder)
    if config.get("weight", {}).get("p") == 1:  # then it says nothing: (error + c)^-p error is 1
        rows = [{name: x for name, x in row.items() if name != "loss"} for row in rows]
    sections = [
        ("Samples during training", _training_samples(grids, folder / REAL_FILE, config)),
        *((title, _picture(folder / name, title, kind)) for name, title, kind in _PICTURES),
        ("Evaluation", _evaluation(_read_json(folder / "eval.json", _TABLE))),
        ("Training curves, by step", _curves(rows)),
    ]
    parts = [f"<h2>{escape(title)}</h2>\n{body}" for title, body in sections if body]
    if config:
        text = escape(json.dumps(config, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Configuration</summary><pre>{text}</pre></details>")
    frame = Template(LocalPath(__file__).with_name("page.html").read_text("utf-8"))
    page = frame.substitute(
        title=escape(folder.resolve().name),
        state=escape(_state(rows, grids, _read_json(folder / TIMING_FILE, TIMING))),
        sections="".join(f"<section>{part}</section>\n" for part in parts),
    )
    path = folder / "report.html"
    replace_file(path, page.encode(errors="backslashreplace"))  # names of files may be any bytes
    return path


def _read_json(path: Path, like: Row) -> Row:
    """Return a JSON object, or a note where the file is damaged: a page never ends a run."""
    try:
        return read_json(path, like) if path.exists() else {}
    except BadInput as problem:
        return {"protocol": str(problem)}


def _state(rows: Sequence[Row], grids: Sequence[Path], timing: Row) -> str:
    """Return how far the run is, its newest errors, and where and how fast it was trained."""
    steps = [row["step"] for row in rows[-1:]] + [_step_of(grid) for grid in grids[-1:]]
    if not steps:
        return "No step recorded yet."
    latest = {name: value for row in rows for name, value in row.items()}
    names = [name for name in ("loss", "u_error", "v_error") if name in latest]
    seconds, speed = timing.get("wall_seconds"), timing.get("images_per_second")
    facts = [
        f"Step {max(steps):,}",
        *(f"{name} {_cell(latest[name])}" for name in names),
        timing.get("hardware"),
        seconds and f"{timedelta(seconds=int(seconds))} of training",
        speed and f"{_cell(speed)} examples/s",
    ]
    return " · ".join(filter(None, facts))


def _training_samples(grids: Sequence[Path], real: Path, config: Row) -> str:
    if not grids:
        return ""
    num_steps = config.get("train", {}).get("num_steps")
    of = f" of {escape(_cell(num_steps))}" if num_steps else ""
    last, shots = min(len(grids), _MOST_GRIDS) - 1, []
    for i in np.linspace(0, len(grids) - 1, last + 1).round().astype(int).tolist():
        caption, content = _read_picture(grids[i])
        step, hidden = f"step {_step_of(grids[i]):,}{of}", " hidden" * (i < len(grids) - 1)
        shots.append(_image("shot grid", caption or step, content, f' data-step="{step}"{hidden}'))
    body = (
        f'<div class="slider"><input id="when" type="range" min="0" max="{last}" value="{last}"'
        f' aria-label="training step"><output id="step">{step}</output></div>\n{"".join(shots)}'
    )
    if real.exists():
        image = _image("grid", "real pictures", _read_picture(real)[1])
        body = f'<div class="pair"><div>{body}</div><div><h3>Real pictures</h3>{image}</div></div>'
    return _note(caption) + body


def _picture(path: Path, title: str, kind: str) -> str:
    if not path.exists():
        return ""
    caption, content = _read_picture(path)
    note = caption * (" · " in caption)  # plots bear their titles
    return _note(note) + _image(kind, title, content)


def _curves(rows: Sequence[Row]) -> str:
    figures = [
        f"<div><h3>{escape(name.removesuffix('_t'))}{' by bin of t' * name.endswith('_t')}</h3>"
        f"{_note(_CURVES.get(name, 'As the objective reports it.'))}"
        f"{_image('plot', f'{name} by step', _as_text(content))}</div>\n"
        for name, content in draw_curves(rows)
    ]
    return f'<div class="curves">{"".join(figures)}</div>\n' if figures else ""


def _evaluation(evaluation: Row) -> str:
    columns, diagnostics = evaluation.get("columns", []), evaluation.get("diagnostics", {})
    rows = [[row.get(key) for key in ("name", *columns)] for row in evaluation.get("rows", [])]
    body = _note(evaluation.get("protocol", "")) + _table(["", *columns], rows)
    if diagnostics:
        rows = [[name.replace("_", " "), value] for name, value in diagnostics.items()]
        body += f"<h3>Diagnostics</h3>\n{_table([], rows)}"
    return body


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def _image(kind: str, alt: str, content: str, more: str = "") -> str:
    return f'<img class="{kind}" alt="{escape(alt)}" src="{content}"{more}>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head)
    cells = ("".join(f"<td>{escape(_cell(x))}</td>" for x in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    table = f'<div class="scroll"><table><tr>{top}</tr>\n{body}</table></div>\n'
    return table if rows else ""


def _cell(value: Any) -> str:
    """Return a number to 4 significant digits, counts in full, anything missing as a dash."""
    if not isinstance(value, float):
        return "–" if value is None else f"{value:,}" if type(value) is int else str(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3e}"
    value = float(f"{value:.3e}")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.4g}".rstrip(".")


def _step_of(grid: Path) -> int:
    return int(grid.stem.removeprefix("step_"))


def _read_picture(path: Path) -> tuple[str, str]:
    """Return the caption of a picture, and the picture as text; a large one becomes smaller."""
    with opened(path) as file:
        content, kind = file.read(), path.suffix[1:]
    with Image.open(io.BytesIO(content), formats=["PNG", "WEBP"]) as picture:
        caption = str(picture.info.get(CAPTION, ""))
        if len(content) > _LARGE_BYTES and kind == "png":  # the page can be mailed
            small, packed = picture.convert("RGB"), io.BytesIO()
            small.thumbnail((_LARGE_PIXELS, _LARGE_PIXELS))
            small.save(packed, "JPEG", quality=88)
            content, kind = packed.getvalue(), "jpeg"
    return caption, _as_text(content, kind)


def _as_text(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

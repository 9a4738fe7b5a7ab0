"""One HTML page of a run that opens from a disk or an attachment, without a server or a network."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import Any

import numpy as np
from etils.epath import Path, PathLike
from PIL import Image

from mf_jax.flow.errors import BadInput
from mf_jax.reporting.plots import draw_curves
from mf_jax.reporting.run_log import TIMING, TIMING_FILE, read_metrics
from mf_jax.reporting.sample_grid import CAPTION, REAL_FILE
from mf_jax.runtime.files import opened, replace_file
from mf_jax.runtime.json_files import read_json

_MOST_GRIDS = 24
_CONFIG = {"weight?": {}, "train?": {}}
_TABLE = {"rows?": [{"name?": ""}], "columns?": [""], "diagnostics?": {}}
_LARGE_BYTES, _LARGE_PIXELS = 400_000, 1400
# A dark page inverts the colours of a plot and keeps those of a grid, which mean something.
_PICTURES = {
    "samples.png": ("Samples", "grid"),
    "steps.png": ("The same noise in more steps", "grid"),
    "walk.png": ("From noise to noise", "grid"),
    "nearest.png": ("Samples and the training pictures nearest to them", "grid"),
    "training.webp": ("Samples while training", "grid"),
    "scatter.png": ("Data and samples", "plot"),
    "signals.png": ("Data and samples", "plot"),
    "transport.png": ("One-step transport of the noise", "grid"),
    "field.png": ("Learned average velocity", "plot"),
}
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
_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1f2933;--muted:#66727f;
--line:#e3e7ec;--accent:#2563eb}@media(prefers-color-scheme:dark){:root{--page:#111315;
--card:#1a1a1a;--ink:#e6e8eb;--muted:#98a2ad;--line:#2f3439;--accent:#6ea2ff}.plot{
filter:invert(.898) hue-rotate(180deg)}.grid{background:#fff;padding:4px}}*{box-sizing:border-box}
[hidden]{display:none!important}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0}.state{color:var(--muted);margin:6px 0 28px}
h2{font-size:16px;margin:0 0 12px}section{background:var(--card);border:1px solid var(--line);
border-radius:12px;padding:20px 22px;margin:0 0 18px}
img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{
padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}th{
color:var(--muted);font-weight:600;font-size:13px}.note{color:var(--muted);font-size:13px;
margin:0 0 10px}h2+.note,h3+.note{margin-top:-4px}h3{font-size:14px;margin:22px 0 6px}
input[type=range]{width:100%;accent-color:var(--accent);margin:0}.slider{display:flex;gap:16px;
align-items:center;margin:0 0 14px}.slider output{white-space:nowrap;min-width:7.5em;
text-align:right}summary{cursor:pointer;font-weight:600;font-size:16px}pre{
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-x:auto;margin:14px 0 0}
.pair,.curves{display:grid;gap:22px;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));
align-items:start}.curves h3,.pair h3{margin-top:0}.curves img{width:100%}
@media(max-width:600px){main{padding:24px 12px 40px}section{padding:16px 14px}}
"""
_SCRIPT = """
const slider=document.getElementById("when"),shots=[...document.querySelectorAll(".shot")];
function show(){shots.forEach((shot,i)=>{shot.hidden=i!=slider.value});
document.getElementById("step").textContent=shots[slider.value].dataset.step}
if(slider){slider.oninput=show;show()}
"""


def write_report(workdir: PathLike) -> Path:
    """Write `report.html` from what the folder of a run holds so far."""
    folder = Path(workdir)
    samples = folder / "samples"
    # no pattern: brackets in the name of a folder above would be part of it
    grids = [path for path in samples.iterdir() if _step_of(path) >= 0] if samples.exists() else []
    grids = sorted(grids, key=_step_of)
    title = escape(folder.resolve().name)
    config, rows = _read_json(folder / "config.json", _CONFIG), read_metrics(folder)
    timing = _read_json(folder / TIMING_FILE, TIMING)
    if config.get("weight", {}).get("p") == 1:  # then it says nothing: (error + c)^-p error is 1
        rows = [{name: x for name, x in row.items() if name != "loss"} for row in rows]
    sections = [
        _training_samples(grids, folder / REAL_FILE, config),
        *(_picture(folder / name, caption, kind) for name, (caption, kind) in _PICTURES.items()),
        _evaluation(_read_json(folder / "eval.json", _TABLE)),
        _curves(rows),
        _config(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main><h1>{title}</h1>\n"
        f'<p class="state">{escape(_state(rows, grids, timing))}</p>\n'
        f"{''.join(sections)}</main><script>{_SCRIPT}</script></body></html>\n"
    )
    path = folder / "report.html"
    replace_file(path, page.encode(errors="backslashreplace"))  # names of files may be any bytes
    return path


def _read_json(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object, or a note where the file is damaged: a page never ends a run."""
    try:
        return read_json(path, like) if path.exists() else {}
    except BadInput as problem:
        return {"protocol": str(problem)}


def _state(
    rows: Sequence[Mapping[str, Any]], grids: Sequence[Path], timing: Mapping[str, Any]
) -> str:
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


def _caption(path: Path) -> str:
    with opened(path) as file, Image.open(file, formats=["PNG", "WEBP"]) as picture:
        return str(picture.info.get(CAPTION, ""))


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    figures = [
        f"<div><h3>{escape(name.removesuffix('_t'))}{' by bin of t' * name.endswith('_t')}</h3>"
        f'<p class="note">{_CURVES.get(name, "As the objective reports it.")}</p>'
        f'<img class="plot" alt="{escape(name)} by step" src="{_uri(content)}"></div>\n'
        for name, content in draw_curves(rows)
    ]
    curves = f'<div class="curves">{"".join(figures)}</div>\n'
    return _section("Training curves, by step", curves) if figures else ""


def _training_samples(grids: Sequence[Path], real: Path, config: Mapping[str, Any]) -> str:
    if not grids:
        return ""
    num_steps = config.get("train", {}).get("num_steps")
    of = f" of {escape(_cell(num_steps))}" if num_steps else ""
    last = min(len(grids), _MOST_GRIDS) - 1
    chosen = [grids[i] for i in np.linspace(0, len(grids) - 1, last + 1).round().astype(int)]
    steps = [f"step {_step_of(grid):,}{of}" for grid in chosen]
    shots = "".join(
        f'<img class="shot grid" data-step="{step}" alt="{escape(_caption(grid) or step)}"'
        f' src="{_data_uri(grid)}"{" hidden" * (grid != chosen[-1])}>\n'
        for step, grid in zip(steps, chosen, strict=True)
    )
    slider = (
        f'<div class="slider"><input id="when" type="range" min="0" max="{last}" value="{last}"'
        f' aria-label="training step"><output id="step">{steps[-1]}</output></div>\n'
    )
    body = slider + shots
    if real.exists():
        image = f'<img class="grid" alt="real pictures" src="{_data_uri(real)}">'
        body = f'<div class="pair"><div>{body}</div><div><h3>Real pictures</h3>{image}</div></div>'
    note = f'<p class="note">{escape(_caption(grids[-1]))}</p>\n'
    return _section("Samples during training", note + body)


def _picture(path: Path, caption: str, kind: str) -> str:
    if not path.exists():
        return ""
    image = f'<img class="{kind}" alt="{escape(caption)}" src="{_data_uri(path)}">\n'
    note, shown = "", _caption(path)
    if " · " in shown:  # plots bear their titles
        note = f'<p class="note">{escape(shown)}</p>\n'
    return _section(caption, note + image)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    rows, columns = evaluation.get("rows", []), evaluation.get("columns", [])
    body = f'<p class="note">{escape(str(evaluation.get("protocol", "")))}</p>\n'
    cells = [[row.get("name"), *(row.get(column) for column in columns)] for row in rows]
    body += _table(["", *columns], cells) if rows else ""
    if diagnostics := evaluation.get("diagnostics"):
        cells = [[name.replace("_", " "), value] for name, value in diagnostics.items()]
        body += f"<h3>Diagnostics</h3>\n{_table([], cells)}"
    return _section("Evaluation", body)


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>"
    return f"<section><details><summary>Configuration</summary>{text}</details></section>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head)
    cells = ("".join(f"<td>{escape(_cell(x))}</td>" for x in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    return f'<div class="scroll"><table><tr>{top}</tr>\n{body}</table></div>\n'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def _cell(value: Any) -> str:
    """Return a number to 4 significant digits, counts in full, anything missing as a dash."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if not math.isfinite(value) or (value != 0 and not 1e-4 <= abs(value) < 1e7):
        return f"{value:.3e}"
    value = float(f"{value:.3e}")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.4g}".rstrip(".")


def _step_of(path: Path) -> int:
    """Return the step of a grid of samples, -1 for any other file."""
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() and path.suffix == ".png" else -1


def _data_uri(path: Path) -> str:
    """Return a picture as text, a large one smaller, so that the page can be mailed."""
    with opened(path) as file:
        content, kind = file.read(), path.suffix[1:]
    if len(content) > _LARGE_BYTES and kind == "png":
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            small = picture.convert("RGB")
        small.thumbnail((_LARGE_PIXELS, _LARGE_PIXELS))
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=88)
        content, kind = packed.getvalue(), "jpeg"
    return _uri(content, kind)


def _uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

"""The run log, the progress bar, the pictures, the report page and the README."""

import io
import itertools
import json
import re
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, refuses
from PIL import Image

from mf_jax.reporting import plots, progress, run_log
from mf_jax.reporting.page import write_report
from mf_jax.reporting.progress import ProgressBar, track
from mf_jax.reporting.run_log import RunLog, read_metrics
from mf_jax.reporting.sample_grid import few_classes, save_sample_grid


def _log(workdir, start_step=0, show_progress=False):
    numbers = {"num_steps": 10, "start_step": start_step, "batch_size": 4}
    return RunLog(workdir, **numbers, is_shown=show_progress)


def _write(log, steps):
    for step in steps:
        log.advance(step)
        log.write(step, {"loss": 1 / step, "u_error": np.float32(0.1) * step, "a $ b $": step})


def _events(workdir):
    """Yield every event: in a file after its length (8 bytes) and checksum (4), before another."""
    from tensorboardX.proto import event_pb2

    for path in sorted((workdir / "tensorboard").glob("events*")):
        content = path.read_bytes()
        while content:
            end = 12 + int.from_bytes(content[:8], "little")
            yield event_pb2.Event.FromString(content[12:end])
            content = content[end + 4 :]


def test_a_resumed_run_writes_the_same_bytes_as_one_never_stopped(tmp_path):
    """Only a last line may be torn."""
    with _log(tmp_path / "whole") as log:
        _write(log, range(1, 11))
    with _log(tmp_path / "resumed") as log:
        _write(log, range(1, 8))
    path = tmp_path / "resumed/metrics.jsonl"
    with path.open("a") as rows:
        rows.write('{"step": 8, "lo')
    with _log(tmp_path / "resumed", start_step=5) as log:
        assert [row["step"] for row in read_metrics(tmp_path / "resumed")] == [1, 2, 3, 4, 5]
        _write(log, range(6, 11))
    whole, resumed = (path.read_bytes() for path in tmp_path.glob("*/metrics.jsonl"))
    assert resumed == whole
    assert len(whole.splitlines()) == 10
    assert not list(tmp_path.glob("*/.*"))
    with _log(tmp_path / "resumed"):
        assert read_metrics(tmp_path / "resumed") == []
    for bad in ('{"step": 1, "lo', '{"step": 1, "loss": "low"}'):
        path.write_text(f'{bad}\n{{"step": 2}}\n')
        refuses(r"metrics.jsonl line 1 .* delete that line", read_metrics, tmp_path / "resumed")
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for its newline
    with _log(tmp_path / "resumed", start_step=2):
        assert [json.loads(line)["step"] for line in path.open()] == [1, 2]


def test_tensorboard_gets_the_scalars_the_throughput_and_the_purge_step(tmp_path, monkeypatch):
    Image.fromarray(np.full((3, 5, 3), 200, np.uint8)).save(tmp_path / "grid.png")
    clock = iter([100.0, 102.0, 106.0])
    hands = {"time": time.time, "monotonic": time.monotonic}
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: next(clock), **hands))
    with _log(tmp_path, start_step=2) as log:
        log.advance(3)  # at 100 s
        log.write(7, {"u_error": float("nan"), "loss": np.float32(0.25)})  # at 102 s: 4 steps of 4
        row = '"step": 7, "loss": 0.25, "u_error": null}\n'
        assert (tmp_path / "metrics.jsonl").read_text().endswith(row)  # at once, and valid JSON
        log.write(9, {"loss": 0.5})  # at 106 s
        log.picture("samples", 7, tmp_path / "grid.png")
    events = list(_events(tmp_path))
    assert [event.step for event in events if event.session_log.status == 1] == [3]
    values = {(event.step, x.tag): x for event in events for x in event.summary.value}
    image = values.pop((7, "samples")).image
    assert np.all(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == 200)
    assert (image.height, image.width) == (3, 5)
    tags = ("train/loss", "throughput/steps_per_second", "throughput/images_per_second")
    expected = zip(itertools.product((7, 9), tags), (0.25, 2, 8, 0.5, 0.5, 2), strict=True)
    assert {key: value.simple_value for key, value in values.items()} == dict(expected)


def test_each_row_prints_a_line_or_moves_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    with _log(tmp_path) as log:
        _write(log, [1])
    assert capsys.readouterr().out == ""
    with _log(tmp_path, show_progress=True) as log:
        log.advance(4)
        log.advance(5)
        log.write(5, {"loss": 1.0, "u_error": 0.123456, "v_error": 2.0, "grad_norm": 7.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 5/10 (50%)")
    assert line.endswith("  loss 1  u_error 0.1235  v_error 2")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with _log(tmp_path, show_progress=True) as log:
        print("saved [bold]")
        log.write(6, {"u_error": 0.5, "v_error": 0.25, "loss": 1.0})
        log.advance(7)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "saved [bold]" in shown
    last = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-1]
    assert re.search(r"step .* 70% 7/10 .*loss 1  u_error 0.5  v_error 0.25", last)
    assert "(70%)" not in shown


def test_work_without_a_terminal_prints_a_line_each_half_minute_and_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBar("first,", 8, per_step=5) as bar:
        bar._bar.get_time = bar._bar.tasks[0]._get_time = lambda: now[0]
        for count in (2, 2, 1, 0, 3, 0):
            now[0] += 20
            bar.name(f"shard {now[0] / 20:.0f},")
            bar.advance(count)
    assert capsys.readouterr().out.splitlines() == [
        "shard 2, 4/8 (50%)  0.50 images/s  0:00:40 left",
        "shard 5, 8/8 (100%)  0.38 images/s  0:00:00 left",
    ]
    assert list(track("abc", "letters", 3, is_wanted=False)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    assert list(track("abc", "letters", 3, unit="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().out.startswith("letters 3/3 (100%)")


def _grid(path, images, labels, class_names=()):
    save_sample_grid(path, images, np.array(labels, np.int32), class_names)
    return np.asarray(Image.open(path).convert("RGB"))


def test_grid_enlarges_tiny_images_and_places_them_row_by_row(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((8, 8, 1), 40, np.uint8)
    images[5, 0, 7] = 255
    pixels = _grid(tmp_path / "grid.png", images, [-1] * 6)
    assert pixels.shape == (4 + 2 * 60, 4 + 3 * 60, 3)
    assert np.all(pixels[34::60, 34::60] == 40 * np.arange(6).reshape(2, 3, 1))
    assert np.all(pixels[64:71, 173:180] == 255)  # one pixel becomes 7 x 7
    assert np.all(pixels[64:71, 172] == 200)
    assert np.all(pixels[:4] == 255)
    colours = np.zeros((3, 64, 64, 3), np.uint8)
    colours[1] = [10, 20, 30]
    pixels = _grid(tmp_path / "grid.png", colours, [-1] * 3)
    assert pixels.shape == (4 + 2 * 68, 4 + 2 * 68, 3)
    assert pixels[[30, 100], 100].tolist() == [[10, 20, 30], [255, 255, 255]]
    for count, side, names in ((100, 64, ["même"]), (90, 300, ["猫 a", "b", "c"]), (100, 8, ["x"])):
        labels = np.arange(count) * len(names) // count
        black = np.zeros((count, side, side, 3), np.uint8)
        height, width, _ = _grid(tmp_path / "a.png", black, labels, names).shape
        assert width <= 1600
        assert 0.5 < width / height < 2
    many = np.zeros((101, 8, 8, 2), np.uint8)
    assert _grid(tmp_path / "grid.png", many, [-1] * 101).shape == (604, 604, 3)


def test_grid_gives_each_class_a_row_or_labels_each_image_of_few_spread_classes(tmp_path):
    images = np.zeros((7, 8, 8, 1), np.uint8)
    images[1::2] = 200
    rows = _grid(tmp_path / "rows.png", images, [0, 7, 0, 7, 0, 7, 0], ["cat"])
    assert rows.shape[0] == 4 + 2 * 60  # 3 columns, no captions
    left = rows.shape[1] - 3 * 60
    assert left > 20
    for top, gray in ((4, 0), (64, 200)):
        assert rows[top : top + 56, : left - 4].min() < 128
        assert np.all(rows[top + 30, left + 30 :: 60] == gray)
    tiles = _grid(tmp_path / "tiles.png", images[:6], [0, 1, 0, 2, -1, 0], ["cat"])
    assert tiles.shape[:2] == (4 + 2 * 77, 4 + 3 * 60)
    assert tiles[61:77, 4:60].min() < 200
    few = [few_classes(*numbers).tolist() for numbers in ((4, 0), (5, 3), (10, 1000))]
    assert few == [[-1] * 4, [0, 1, 2, 0, 1], [111 * i for i in range(10)]]


@pytest.fixture
def drawn(monkeypatch):
    """Keep figures instead of rendering them."""
    figures = []
    keep = lambda sheet, *_, **__: figures.append(sheet)  # noqa: E731
    monkeypatch.setattr(plots.figure.Figure, "savefig", keep)
    monkeypatch.setattr(plots, "written_aside", lambda path: io.StringIO(str(path)))
    return figures


def test_transport_moves_the_noise_by_the_whole_interval(drawn):
    asked = []

    def evaluate_u(z, r, t):
        asked.append((r, t, z.dtype))
        return z - np.float32([1.0, 0.5])  # everything goes to one point

    data = np.random.default_rng(0).normal(size=(50, 2))
    plots.save_transport("transport.png", evaluate_u, data, reach=2.0)
    assert asked == [(0.0, 1.0, np.float32)]
    (before, after) = drawn[0].axes
    assert after.get_xlim() == (-2.0, 2.0)
    wires, dots = before.collections
    places = dots.get_offsets()
    assert np.std(places) == pytest.approx(1, abs=0.05)  # equal probability under N(0, I)
    segments = np.array(wires.get_segments())
    assert np.ptp(segments, axis=1).max() < 0.05
    moved = [np.array(after.collections[1].get_segments()), after.collections[2].get_offsets()]
    assert len(moved[0]) == len(segments)
    for points in moved:
        np.testing.assert_allclose(points, np.broadcast_to([1.0, 0.5], points.shape), atol=1e-6)


def test_field_draws_each_interval_and_u_not_its_transpose(drawn, monkeypatch):
    streams = []

    def evaluate_u(z, r, t):
        return np.stack([z[:, 0], np.full(len(z), r + 2 * t, np.float32)], axis=1)

    def streamplot(ax, *grid, **options):
        streams.append(grid)
        return SimpleNamespace(lines=ax.scatter([0], [0], c=[1.0]))

    monkeypatch.setattr("matplotlib.axes.Axes.streamplot", streamplot)
    times = ((0.0, 1.0), (0.5, 0.5))
    plots.save_field("field.png", evaluate_u, reach=1.0, times=times)
    for (x, _, across, up), (r, t) in zip(streams, times, strict=True):
        np.testing.assert_allclose(across, np.broadcast_to(x, across.shape), atol=1e-6)
        assert np.all(up == r + 2 * t)
        assert (x[0], x[-1]) == (-1.0, 1.0)
    titles = [ax.get_title() for ax in drawn[0].axes[:2]]
    assert titles == ["r = 0,  t = 1", "r = t = 0.5  (velocity v)"]


def test_scatter_shows_two_coordinates_of_both_whatever_their_length(drawn):
    points = np.random.default_rng(0).normal(size=(100, 2))
    plots.save_scatter("a.png", points + 0.5, points, title="both")
    for ax, shown in zip(drawn[0].axes, (points, points + 0.5), strict=True):
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), shown[:, :2])
        low, high = np.transpose([ax.get_xlim(), ax.get_ylim()])
        assert np.all((low < points[:, :2]) & (points[:, :2] < high))
    plots.save_scatter("b.png", points[:, :1], points[:, :1], title="one coordinate is enough")
    wide = points @ np.eye(2, 16) * 3
    plots.save_scatter("c.png", wide, wide, title="a plane in 16 dimensions")
    across = drawn[2].axes[0].collections[0].get_offsets()
    shown, data = (np.ptp(np.abs(each), axis=0).max() for each in (across, 3 * points))
    assert shown > 0.5 * data


def test_curves_skip_what_is_missing_and_put_bins_of_t_together(drawn):
    rows = [
        {"step": 1, "zeal": 1, "loss": None, "u_error_t1": 1.0, "u_error_t0": 2.0},
        {"step": 2, "loss": 3.0, "learning_rate": None},
        *({"step": step, "v_error": 7.0 + step % 2} for step in range(3, 203)),
    ]
    names = [name for name, _ in plots.draw_curves(rows)]
    panels = {name: drawn[i].axes[0] for i, name in enumerate(names)}
    assert names == ["loss", "v_error", "u_error_t", "zeal"]
    loss, raw_and_smooth, bins = (panels[k].lines for k in list(panels)[:3])
    assert [line.get_xydata().tolist() for line in loss] == [[[2, 3.0]]]
    assert [line.get_label() for line in bins] == ["t0", "t1"]
    raw, smooth = (line.get_ydata() for line in raw_and_smooth)
    assert len(raw) == len(smooth) == 200
    np.testing.assert_allclose(smooth[5:-5], 7.5, atol=0.11)
    assert set(raw) == {7.0, 8.0}
    assert list(plots.draw_curves([{"step": 1, "loss": None}])) == []


def test_report_is_self_contained_escaped_and_thinned(tmp_path):
    """Also of an empty folder, of damaged files and of metrics alone."""
    workdir = tmp_path / "a <b> & 'c'"
    (workdir / "samples").mkdir(parents=True)
    empty = write_report(workdir).read_text()
    assert {file.name for file in workdir.iterdir()} == {"report.html", "samples"}
    assert ("No step recorded yet." in empty, "<section>" in empty) == (True, False)
    with _log(tmp_path) as log:
        _write(log, [1, 2])
    (tmp_path / "eval.json").write_text("{")
    page = write_report(tmp_path).read_text()
    for text in ("Step 2 · loss 0.5000 · u_error 0.2000", "eval.json: cannot", "a $ b $"):
        assert text in page
    assert page.count("data:image/png") > 2
    for step in range(100, 5100, 100):
        Image.new("L", (8, 8), step // 100).save(workdir / f"samples/step_{step:08d}.png")
    Image.new("L", (8, 8)).save(workdir / "samples.png")
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(workdir / "field.png", compress_level=0)
    shown = {0.5: "0.5000", 0.0: "0.000", 9999.96: "10,000", 1000.0: "1000", 1e-4: "0.0001000"}
    shown |= {0.123456: "0.1235", 12345.678: "12,350"}
    evaluation = {
        "protocol": "<img src=x>",
        "columns": ["steps", "samples", "frechet_distance"],
        "rows": [
            {"name": "real <data>", "samples": 50000, "frechet_distance": 1.14},
            {"name": "1 step", "steps": 1, "samples": None, "frechet_distance": 0.0000123456},
        ],
        "diagnostics": {f"is_{text}": x for x, text in shown.items()},
    }
    (workdir / "eval.json").write_text(json.dumps(evaluation))
    (workdir / "config.json").write_text(json.dumps({"name": "</pre><script>alert(1)</script>"}))
    page = write_report(workdir).read_text()
    text = page.replace("&lt;img src=x&gt;", "")
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>\s)]*)""", text)
    assert len(links) == 24 + 2
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$", link) for link in links)
    assert "http" not in page
    assert "<title>a &lt;b&gt; &amp; &#x27;c&#x27;</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert len(page) < 2_000_000  # the noise alone is 4 MB as a PNG
    assert not list(workdir.glob(".*"))
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert [row for row in cells if row] == [
        ["real &lt;data&gt;", "–", "50,000", "1.140"],
        ["1 step", "1", "–", "1.235e-05"],
        *([f"is {text}", text] for text in shown.values()),
    ]
    shots = re.findall(r'data-step="step ([\d,]+)"( hidden)?', page)
    steps = [int(step.replace(",", "")) for step, _ in shots]
    assert (steps[0], steps[-1], len(steps)) == (100, 5000, 24)
    assert set(np.diff(steps)) == {200, 300}
    assert [bool(hidden) for _, hidden in shots] == [True] * 23 + [False]
    assert "Step 5,000" in page


def test_the_method_of_the_readme_is_exact_where_all_data_are_one_point():
    method, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(method, scope)
    point = jnp.array([0.3, -0.2])
    x, key = jnp.tile(point, (64, 1)), jax.random.key(0)
    exact = lambda z, r, t: (z - point) / t  # noqa: E731
    assert scope["loss"](exact, x, key) < 1e-8
    assert scope["loss"](lambda z, r, t: exact(z, r, t) * (1 + t - r), x, key) > 1e-2
    np.testing.assert_allclose(scope["sample"](exact, x + 1), x, atol=1e-6)

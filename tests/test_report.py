"""The run log, the pictures and the report page."""

import io
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mf_jax.errors import BadInput
from mf_jax.reporting import page as report_page
from mf_jax.reporting import plots
from mf_jax.reporting import run_log as report
from mf_jax.reporting import sample_grid as pictures
from mf_jax.reporting.page import write_report
from mf_jax.reporting.run_log import RunLog, read_metrics


def _log(workdir, start_step=0, **options):
    return RunLog(
        workdir,
        num_steps=10,
        start_step=start_step,
        batch_size=4,
        **{"show_progress": False} | options,
    )


def _write(log, steps):
    for step in steps:
        log.advance(step)
        log.write(step, {"loss": 1 / step, "u_error": np.float32(0.1) * step, "grad_norm": step})


def _events(workdir):
    """Return the (step, tag, number) triples of every event file, and whether one starts a session at a step."""
    from tensorboardX.proto import event_pb2

    scalars, starts = [], []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(
            content
        ):  # a record is its length (8 bytes), a checksum (4), the event, a checksum (4)
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            scalars += [(event.step, value.tag, value) for value in event.summary.value]
            starts += [event.step] * (event.session_log.status == 1)
    return scalars, starts


def test_a_resumed_run_writes_the_same_bytes_as_one_never_stopped(tmp_path):
    with _log(tmp_path / "whole") as log:
        _write(log, range(1, 11))
    with _log(tmp_path / "resumed") as log:
        _write(log, range(1, 8))
    with (tmp_path / "resumed/metrics.jsonl").open("a") as rows:
        rows.write('{"step": 8, "lo')
    with _log(tmp_path / "resumed", start_step=5) as log:
        assert [row["step"] for row in read_metrics(tmp_path / "resumed")] == [1, 2, 3, 4, 5]
        _write(log, range(6, 11))
    whole, resumed = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed")
    )
    assert len(whole.splitlines()) == 10
    assert resumed == whole
    assert not list(tmp_path.glob("*/.*"))


def test_a_row_is_on_disk_at_once_with_sorted_names_and_shortest_floats(tmp_path):
    with _log(tmp_path) as log:
        log.write(3, {"loss": 0.1, "du_dt": np.float64(2)})
        assert (
            tmp_path / "metrics.jsonl"
        ).read_text() == '{"step": 3, "du_dt": 2.0, "loss": 0.1}\n'


def test_a_fresh_start_empties_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    with _log(tmp_path):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_numbers_that_are_not_finite_make_valid_json(tmp_path):
    with _log(tmp_path) as log:
        log.write(1, {"loss": float("nan"), "grad_norm": float("-inf"), "u_error": 2.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {
        "step": 1,
        "grad_norm": None,
        "loss": None,
        "u_error": 2.0,
        "non_finite": {"grad_norm": "-inf", "loss": "nan"},
    }


def test_read_metrics_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl line 1 .* delete that line"):
        read_metrics(tmp_path)


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with _log(tmp_path, start_step=2):
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_gets_the_scalars_the_throughput_and_the_purge_step(tmp_path):
    Image.fromarray(np.full((3, 5, 3), 200, np.uint8)).save(tmp_path / "grid.png")
    with _log(tmp_path, start_step=5) as log:
        log.advance(5)
        log.write(7, {"loss": 0.25, "eval/distance": 3.0, "u_error": float("nan")})
        log.picture("samples", 7, tmp_path / "grid.png")
    triples, starts = _events(tmp_path)
    assert starts == [6]
    scalars = {tag: value.simple_value for step, tag, value in triples if step == 7}
    assert scalars["train/loss"] == 0.25
    assert scalars["eval/distance"] == 3.0
    assert "train/u_error" not in scalars
    assert scalars["throughput/images_per_second"] == pytest.approx(
        4 * scalars["throughput/steps_per_second"]
    )
    image = next(value.image for _, tag, value in triples if tag == "samples")
    assert (image.height, image.width) == (3, 5)
    assert np.all(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == 200)


def test_throughput_is_steps_over_seconds_since_the_first_step(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr(
        report,
        "time",
        SimpleNamespace(perf_counter=lambda: next(clock), time=time.time, monotonic=time.monotonic),
    )
    with _log(tmp_path, show_progress=True) as log:
        log.advance(1)  # at 100 s
        log.write(5, {"loss": 1.0})  # at 102 s: 4 steps of 4 images in 2 s, 5 steps left
        log.write(7, {"loss": 1.0})  # at 106 s: 2 steps of 4 images in 4 s, 3 steps left
    first, second = capsys.readouterr().out.splitlines()
    assert "  8.00 images/s  0:00:02 left  " in first
    assert "  2.00 images/s  0:00:06 left  " in second


def test_without_a_terminal_each_write_prints_one_plain_line(tmp_path, capsys):
    with _log(tmp_path, show_progress=True) as log:
        log.advance(4)
        log.advance(5, metrics={"u_error": 9.0})
        log.message("saved [bold]")
        log.write(5, {"loss": 1.0, "u_error": 0.123456, "v_error": 2.0, "grad_norm": 7.0})
    message, line = capsys.readouterr().out.splitlines()
    assert message == "saved [bold]"
    assert line.startswith("step 5/10 (50%)")
    assert line.endswith("  loss 1  u_error 0.1235  v_error 2")
    assert "\x1b" not in line
    assert "grad_norm" not in line


def test_a_terminal_gets_a_bar_with_the_latest_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with _log(tmp_path, show_progress=True) as log:
        log.message("saved [bold]")
        log.advance(6, metrics={"u_error": 0.5, "v_error": 0.25, "loss": 1.0})
        log.advance(7)
        log.write(7, {"grad_norm": 1.0})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "saved [bold]" in shown
    last = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-1]
    assert re.search(r" 70% 7/10 .*u_error 0.5  v_error 0.25", last)
    assert "step 7" not in shown


def test_quiet_prints_nothing(tmp_path, capsys):
    with _log(tmp_path) as log:
        log.message("hello")
        _write(log, [1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"start_step": 11}, r"start_step is 11; it must be in \[0, 10\]"),
        ({"start_step": -1}, "start_step is -1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_run_log_names_a_number_out_of_range(tmp_path, numbers, message):
    with pytest.raises(BadInput, match=message):
        RunLog(tmp_path, **{"num_steps": 10, "start_step": 0, "batch_size": 1} | numbers)


@pytest.mark.parametrize("name", ["step", "non_finite"])
def test_a_metric_may_not_take_a_name_of_the_row(tmp_path, name):
    with _log(tmp_path) as log, pytest.raises(BadInput, match=f"'{name}'.*rename"):
        log.write(1, {name: 1.0})


def _read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_grid_enlarges_tiny_images_and_places_them_row_by_row(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((8, 8, 1), 40, np.uint8)
    images[5, 0, 7] = 255
    pictures.save_grid(tmp_path / "grid.png", images, columns=3)
    pixels = _read(tmp_path / "grid.png")
    assert pixels.shape == (4 + 2 * 60, 4 + 3 * 60, 3)
    for i in range(6):
        assert np.all(pixels[4 + i // 3 * 60 + 30, 4 + i % 3 * 60 + 30] == 40 * i)
    assert np.all(pixels[64:71, 173:180] == 255)  # one pixel becomes 7 x 7
    assert np.all(pixels[64:71, 172] == 200)
    assert np.all(pixels[:4] == 255)


def test_grid_keeps_colours_and_leaves_the_last_row_open(tmp_path):
    images = np.zeros((3, 64, 64, 3), np.uint8)
    images[1] = [10, 20, 30]
    pictures.save_grid(tmp_path / "grid.png", images)
    pixels = _read(tmp_path / "grid.png")
    assert pixels.shape == (4 + 2 * 68, 4 + 2 * 68, 3)
    assert pixels[30, 100].tolist() == [10, 20, 30]
    assert pixels[100, 100].tolist() == [255, 255, 255]


def test_grid_writes_a_class_once_a_row_or_under_each_image(tmp_path):
    images = np.zeros((6, 8, 8, 1), np.uint8)
    pictures.save_grid(
        tmp_path / "rows.png", images, labels=np.array([0, 0, 0, 7, 7, 7]), class_names=["cat"]
    )
    rows = _read(tmp_path / "rows.png")
    assert rows.shape[0] == 4 + 2 * 60  # 3 columns found from the labels, no captions
    left = rows.shape[1] - 3 * 60
    assert left > 20
    assert rows[4:60, : left - 4].min() < 128
    assert rows[64:120, : left - 4].min() < 128
    pictures.save_grid(
        tmp_path / "tiles.png", images, labels=np.array([0, 1, 0, 2, -1, 0]), columns=3
    )
    tiles = _read(tmp_path / "tiles.png")
    assert tiles.shape[:2] == (4 + 2 * 77, 4 + 3 * 60)
    assert tiles[61:77, 4:60].min() < 200
    pictures.save_grid(tmp_path / "title.png", images, columns=3, title="Samples")
    assert _read(tmp_path / "title.png").shape[0] == 4 + 25 + 2 * 60


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (2, 8, 8, 2)])
def test_grid_names_a_wrong_shape(tmp_path, shape):
    with pytest.raises(BadInput, match=re.escape(str(shape))):
        pictures.save_grid(tmp_path / "grid.png", np.zeros(shape, np.uint8))


def test_transport_moves_the_noise_by_the_whole_interval(tmp_path, monkeypatch):
    asked, drawn = [], []

    def evaluate_u(z, r, t):
        asked.append((r, t, z.dtype))
        return z - np.float32([1.0, 0.5])  # everything goes to one point

    scatter = plots.Axes.scatter
    monkeypatch.setattr(
        plots.Axes,
        "scatter",
        lambda ax, x, y, **how: (drawn.append((x, y)), scatter(ax, x, y, **how))[1],
    )
    data = np.random.default_rng(0).normal(size=(50, 2))
    plots.save_transport(tmp_path / "transport.png", evaluate_u, data, limits=(-2.0, 2.0))
    assert asked == [(0.0, 1.0, np.float32)]
    _, noise, moved = drawn
    assert np.std(noise) == pytest.approx(1, abs=0.05)  # dots of equal probability under N(0, I)
    np.testing.assert_allclose(moved[0], 1.0, atol=1e-6)
    np.testing.assert_allclose(moved[1], 0.5, atol=1e-6)
    assert _read(tmp_path / "transport.png").std() > 5


def test_field_asks_for_each_interval_and_draws_u_not_its_transpose(tmp_path, monkeypatch):
    asked, streams = [], []

    def evaluate_u(z, r, t):
        asked.append((r, t))
        return np.stack([z[:, 0], np.full(len(z), 3.0, np.float32)], axis=1)

    plot = plots.Axes.streamplot
    monkeypatch.setattr(
        plots.Axes,
        "streamplot",
        lambda ax, *grid, **how: (streams.append(grid), plot(ax, *grid, **how))[1],
    )
    plots.save_field(
        tmp_path / "field.png", evaluate_u, limits=(-1.0, 1.0), times=((0.0, 1.0), (0.5, 0.5))
    )
    assert asked == [(0.0, 1.0), (0.5, 0.5)]
    x, _, across, up = streams[0]
    np.testing.assert_allclose(across, np.broadcast_to(x, across.shape), atol=1e-6)
    assert np.all(up == 3)
    assert _read(tmp_path / "field.png").std() > 5


def test_scatter_is_a_picture_of_both(tmp_path):
    points = np.random.default_rng(0).normal(size=(100, 2))
    plots.save_scatter(tmp_path / "a.png", points, points, title="same")
    plots.save_scatter(tmp_path / "b.png", points + 0.5, points, title="same")
    a, b = _read(tmp_path / "a.png"), _read(tmp_path / "b.png")
    half = a.shape[1] // 2
    assert a.shape == b.shape
    assert np.array_equal(a[:, :half], b[:, :half])  # the data
    assert not np.array_equal(a[:, half:], b[:, half:])  # the samples


def test_curves_skip_what_is_missing_and_put_bins_of_t_together(tmp_path):
    rows = [
        {"step": 1, "zeal": 1, "loss": None, "u_error_t1": 1.0, "u_error_t0": 2.0},
        {"step": 2, "loss": 3.0, "learning_rate": float("inf"), "non_finite": {"loss": "nan"}},
    ]
    assert plots.curve_panels(rows) == {
        "loss": ["loss"],
        "u_error by bin of t": ["u_error_t0", "u_error_t1"],
        "zeal": ["zeal"],
    }
    plots.save_curves(tmp_path / "curves.png", rows)
    assert _read(tmp_path / "curves.png").std() > 5
    with pytest.raises(BadInput, match="rows has 1 rows"):
        plots.save_curves(tmp_path / "none.png", [{"step": 1, "loss": None}])


def test_curves_smooth_a_constant_into_itself():
    ax = plots.Figure().subplots()
    plots._draw_curve(ax, np.arange(200), np.full(200, 3.0), "black", smooth=True)
    raw, smoothed = ax.lines
    assert len(raw.get_ydata()) == len(smoothed.get_ydata()) == 200
    np.testing.assert_allclose(smoothed.get_ydata(), 3.0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5000"),
        (0.0, "0.000"),
        (-12.3456, "-12.35"),
        (9999.96, "10,000"),
        (1000.0, "1000"),
        (1e-4, "0.0001000"),
    ],
)
def test_numbers_show_four_significant_digits(value, shown):
    assert report_page._cell(value) == shown


def test_report_of_an_empty_folder(tmp_path):
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert "No step recorded yet." in path.read_text()
    assert "<section>" not in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_report_of_metrics_alone(tmp_path):
    with _log(tmp_path) as log:
        _write(log, [1, 2])
    page = write_report(tmp_path).read_text()
    assert "Step 2 · loss 0.5000 · u_error 0.2000" in page
    assert "Training curves" in page


def _full_workdir(workdir):
    (workdir / "samples").mkdir(parents=True)
    for step in range(1, 51):
        pictures.save_grid(
            workdir / f"samples/step_{step * 100:08d}.png", np.full((1, 8, 8, 1), step, np.uint8)
        )
    pictures.save_grid(workdir / "samples.png", np.zeros((1, 8, 8, 1), np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(workdir / "field.png")
    evaluation = {
        "protocol": "<img src=x>",
        "columns": ["steps", "samples", "frechet_distance"],
        "rows": [
            {"name": "real <data>", "samples": 50000, "frechet_distance": 1.14},
            {"name": "1 step", "steps": 1, "samples": 360, "frechet_distance": 12345.678},
            {"name": "broken", "steps": 2, "samples": None, "frechet_distance": 0.0000123456},
        ],
        "diagnostics": {"identity_residual": 0.123456},
    }
    (workdir / "eval.json").write_text(json.dumps(evaluation))
    (workdir / "config.json").write_text(json.dumps({"name": "</pre><script>alert(1)</script>"}))


def test_report_is_self_contained_and_escaped(tmp_path):
    workdir = tmp_path / "a <b> & 'c'"
    _full_workdir(workdir)
    page = write_report(workdir).read_text()
    links = re.findall(
        r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>\s)]*)""", page.replace("&lt;img src=x&gt;", "")
    )
    assert len(links) == 24 + 2
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$", link) for link in links)
    assert "http" not in page
    assert "<title>a &lt;b&gt; &amp; &#x27;c&#x27;</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert len(page) < 2_000_000  # the noise alone is 4 MB as a PNG
    assert not list(workdir.glob(".*"))


def test_report_numbers_and_thinned_grids(tmp_path):
    _full_workdir(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert [row for row in cells if row] == [
        ["real &lt;data&gt;", "–", "50,000", "1.140"],
        ["1 step", "1", "360", "12,350"],
        ["broken", "2", "–", "1.235e-05"],
        ["identity residual", "0.1235"],
    ]
    steps = [int(step.replace(",", "")) for step in re.findall(r'data-step="step ([\d,]+)"', page)]
    assert (steps[0], steps[-1], len(steps)) == (100, 5000, 24)
    assert set(np.diff(steps)) == {200, 300}
    assert len(re.findall(r'class="shot grid"[^>]* hidden>', page)) == 23
    assert "Step 5,000" in page


def test_report_names_a_broken_file_or_folder(tmp_path):
    with pytest.raises(BadInput, match="missing', which is not a folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(BadInput, match=r"eval\.json is not a JSON object"):
        write_report(tmp_path)


def test_importing_touches_no_backend_and_no_other_framework():
    code = (
        "import sys, mf_jax.reporting.page, jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, 'a backend is initialised'\n"
        "print(*{'torch', 'tensorflow', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""--mode=bench: what it prints is what it writes, what it counts is what XLA counts; nothing here looks at a time."""

import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY

from configs.digits import ROWS
from configs.digits import get_config as digits
from configs.toy2d import get_config as toy2d
from mf_jax.bench import input as input_pipeline
from mf_jax.bench import measure
from mf_jax.bench import sample as sample_benchmark
from mf_jax.bench import scores as scores_benchmark
from mf_jax.bench import step as step_benchmark
from mf_jax.bench.attention import PASSES, heads
from mf_jax.bench.step import Noise, flow_matching_of, fresh_batches, hidden_work
from mf_jax.config import make_network, make_objective, validate
from mf_jax.data import Source
from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec
from mf_jax.generator import Generator
from mf_jax.models import as_field, parameter_shapes
from mf_jax.models.attention import ATTENTIONS
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.runtime.sharding import make_mesh
from mf_jax.step import initial_state, make_train_step
from mf_jax.train import step_parts

SMALL = {"depth": 2, "width": 64}
FLAGS = (
    *TINY,
    *(f"--config.model.{key}={value}" for key, value in SMALL.items()),
    "--config.draws.instant_share=0.75",
    "--config.bench.repeats=2",
    "--config.bench.dropped=1",
)
EVERYWHERE = (
    "what",
    "platform",
    "device_kind",
    "num_devices",
    "jax_version",
    "network",
    "num_parameters",
    "dtype",
    "shape",
    "num_classes",
    "repeats",
    "dropped",
    "batch_size",
    "notes",
    "rows",
    "config",
)


def _strictly(text):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Return a function that runs --mode=bench quickly and returns (exit code, stdout, stderr, the JSON or None)."""

    def run(what, *flags, workdir=None, config="digits"):
        workdir = workdir or tmp_path_factory.mktemp("bench") / "new" / "run"
        out, errors = io.StringIO(), io.StringIO()
        argv = [f"--config=configs/{config}.py", "--mode=bench", f"--workdir={workdir}"]
        argv += [*FLAGS, f"--config.bench.what={what}", *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("COLUMNS", "80")
            patch.setattr(sys, "argv", ["mf_jax", *argv])
            patch.setattr(measure, "PEAK_SIZES", {"cpu": (64, 128)})
            patch.setattr(input_pipeline, "LEAST_SECONDS", 0.01)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                from mf_jax.main import main

                code = main()
        path = Path(workdir) / f"bench_{what}.json"
        result = _strictly(path.read_text()) if path.exists() else None
        return code, out.getvalue(), errors.getvalue(), result

    return run


@pytest.fixture(scope="module")
def step(bench):
    """Return a run of `step`, of a network that compiles fast."""
    return bench("step", "--config.bench.repeats=3", config="toy2d")


def _config(defaults=digits):
    config = defaults()
    config.model.update(SMALL)
    config.train.update(num_steps=12, batch_size=16)
    config.draws.instant_share = 0.75
    config.optim.warmup_steps = 0
    return config


def _table(out):
    """Return the cells of the printed table's rows, its titles first."""
    lines = [re.split("[│┃]", line)[1:-1] for line in out.splitlines() if line[0] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


def _shown(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def _spread(row, name):
    quartiles = " to ".join(_shown(1e3 * q) for q in row[f"{name}_seconds_quartiles"])
    return f"{_shown(1e3 * row[f'{name}_seconds_median'])} ({quartiles})"


def _check_output(run, what, config, shape, num_classes):
    """Check what is alike for all that is measured; return the JSON and the table below its titles."""
    code, out, errors, result = run
    assert code == 0, errors
    assert [key for key in EVERYWHERE if key not in result] == []
    assert (result["what"], result["platform"], result["num_devices"]) == (what, "cpu", 1)
    network = make_network(config, DataSpec(shape, num_classes))
    num = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(network, shape)))
    assert (result["num_parameters"], result["network"]) == (num, config.model.name)
    assert (result["shape"], result["num_classes"]) == (list(shape), num_classes)
    assert result["config"]["model"]["width"] == 64
    for text in (
        config.model.name + ", ",
        f"{num:,} parameters",
        "float32",
        "JAX " + jax.__version__,
        "1 x cpu",
        f"bench_{what}.json",
    ):
        assert text in out
    assert f"batch {result['batch_size']}, data {shape}, {num_classes} classes" in out
    assert f"{result['repeats']} repeats after {result['dropped']} dropped" in out
    for note in result["notes"]:
        assert note in out.splitlines()
    if "matmul_peak_gflops" in result:
        assert f"{_shown(result['matmul_peak_gflops'])} GFLOP/s" in out
        assert result["matmul_peak_size"] in (64, 128)
    titles, *cells = _table(out)
    assert "…" not in out
    assert "\x1b" not in out
    assert all(len(row) == len(titles) for row in cells)
    return result, cells


def test_step_prints_what_it_writes(step):
    result, cells = _check_output(step, "step", _config(toy2d), (2,), 0)
    assert result["batch_size"] == 16
    assert [row["objective"] for row in result["rows"]] == ["meanflow", "flow_matching"]
    for row, shown in zip(result["rows"], cells, strict=False):
        assert len(row["step_seconds"]) == result["repeats"] == 3
        assert row["images_per_second"] == pytest.approx(16 / row["step_seconds_median"])
        share = row["gflop"] / row["step_seconds_median"] / result["matmul_peak_gflops"]
        assert row["peak_share"] == pytest.approx(share)
        assert shown == [
            row["objective"],
            _shown(row["gflop"]),
            _shown(row["temp_bytes"] / 1e6),
            _shown(row["argument_bytes"] / 1e6),
            _spread(row, "step"),
            _shown(row["images_per_second"]),
            f"{_shown(row['trace_seconds'])} + {_shown(row['compile_seconds'])}",
            _shown(row["peak_share"]),
        ]
    first, second = result["rows"]
    ratio = {key: value for key, value in result["ratio"].items() if key != "objective"}
    assert ratio == {key: pytest.approx(first[key] / second[key]) for key in ratio}
    names = ("gflop", "temp_bytes", "argument_bytes", "step_seconds_median", "images_per_second")
    compiling = f"{_shown(ratio['trace_seconds'])} + {_shown(ratio['compile_seconds'])}"
    assert cells[2] == ["ratio", *(_shown(ratio[name]) for name in names), compiling, "-"]


def _lower_step(config, mesh=None):
    parts = step_parts(config, validate(config, num_devices=1))
    state = jax.eval_shape(lambda: initial_state(parts))
    x = jax.ShapeDtypeStruct((16, *parts.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((16,), jnp.int32)
    return jax.jit(make_train_step(parts, mesh), donate_argnums=0).lower(state, x, labels)


def test_the_cost_of_a_step_is_xla_s(step):
    """That of flow matching too, whose config is made here in another way: nothing but its name has to change."""
    *_, result = step
    config = _config(toy2d)
    config.objective.name = "flow_matching"
    for row, each in zip(result["rows"], (_config(toy2d), config), strict=True):
        assert row["gflop_lowered"] == _lower_step(each).cost_analysis()["flops"] / 1e9
        assert row["gflop_compiled"] == pytest.approx(row["gflop_lowered"], rel=0.05)
        assert row["gflop"] == row["gflop_compiled"]
    compiled = _lower_step(config, make_mesh(data=0, fsdp=1)).compile()
    assert row["gflop"] == compiled.cost_analysis()["flops"] / 1e9
    assert row["temp_bytes"] == compiled.memory_analysis().temp_size_in_bytes
    assert row["argument_bytes"] == compiled.memory_analysis().argument_size_in_bytes
    assert result["gflop_counted"] == "compiled"
    assert result["notes"] == []


def test_meanflow_costs_little_more_than_flow_matching(step):
    assert 1.0 < step[3]["ratio"]["gflop"] < 1.3


@pytest.mark.parametrize("row", ROWS)
def test_every_config_has_a_flow_matching_of_the_same_network(row):
    config = digits(row)
    config.train.batch_size = 64
    if config.draws.omega_max == 1 and config.draws.label_drop_share:
        config.guidance.kappa = 0.5
    config.controls.lipschitz = config.controls.monotone = 1.0
    before = config.to_dict()
    plain = flow_matching_of(config)
    source = validate(plain, num_devices=1)
    assert isinstance(make_objective(plain), FlowMatching)
    assert plain.model == config.model
    assert (plain.optim, plain.train, plain.times) == (config.optim, config.train, config.times)
    assert step_parts(plain, source).scheme.omega_max == 1
    assert config.to_dict() == before


class NotCompiled(measure.Program):
    """A program of which XLA sees next to nothing."""

    flops = 1e9
    memory: ClassVar = {"temp_bytes": 1, "argument_bytes": 1}

    def __init__(self):
        fields = {
            "executable": lambda state, *batch: state,
            "trace_seconds": 1.0,
            "compile_seconds": 1.0,
        }
        for name, value in fields.items():  # past the check of types
            object.__setattr__(self, name, value)


def test_what_a_compiled_step_hides_is_counted_before(bench, monkeypatch):
    """For flow matching, which is then compared with itself."""
    monkeypatch.setattr(step_benchmark, "compile_program", lambda *arguments: NotCompiled())
    flags = ("model.scan=True", "model.attention=fused", "objective.name=flow_matching")
    code, out, errors, result = bench("step", *(f"--config.{flag}" for flag in flags))
    assert code == 0, errors
    assert result["gflop_counted"] == "lowered"
    assert [row["gflop_compiled"] for row in result["rows"]] == [1.0, 1.0]
    assert all(row["gflop"] == row["gflop_lowered"] for row in result["rows"])
    config = _config()
    config.objective.name = "flow_matching"
    assert result["rows"][0]["gflop"] == _lower_step(config).cost_analysis()["flops"] / 1e9
    assert result["ratio"]["gflop"] == 1
    reasons = "a loop would count once (model.scan), a kernel would not count (model.attention)"
    assert f"before it is compiled: {reasons}" in out


@pytest.mark.parametrize(("key", "value"), [("scan", True), ("attention", "fused")])
def test_one_reason_is_enough_to_count_before_compiling(key, value):
    config = _config()
    assert hidden_work(config) == []
    config.model[key] = value
    assert [f"(model.{key})" in reason for reason in hidden_work(config)] == [True]


def test_sample_prints_what_it_writes(bench):
    flags = ("--config.sample.batch_size=24", "--config.sample.steps=2")
    result, cells = _check_output(bench("sample", *flags), "sample", _config(), (8, 8, 1), 10)
    (row,), (shown,) = result["rows"], cells
    assert (result["batch_size"], row["evaluations"], len(row["batch_seconds"])) == (24, 2, 2)
    assert row["images_per_second"] == pytest.approx(24 / row["batch_seconds_median"])
    rate = 2 * 24 * row["gflop_per_image"] / row["batch_seconds_median"]
    assert row["peak_share"] == pytest.approx(rate / result["matmul_peak_gflops"])
    assert shown == [
        "2",
        _shown(row["gflop_per_image"]),
        _spread(row, "batch"),
        _shown(row["images_per_second"]),
        _shown(row["peak_share"]),
    ]
    network = make_network(_config(), DataSpec((8, 8, 1), 10))
    z, t = (
        jax.ShapeDtypeStruct((24, 8, 8, 1), jnp.float32),
        jax.ShapeDtypeStruct((24,), jnp.float32),
    )

    def forward(params, z, t):
        return as_field(network)(
            params, z, r=t, t=t, condition=Condition(jnp.zeros(24, jnp.int32))
        ).u

    compiled = jax.jit(forward).lower(parameter_shapes(network, (8, 8, 1)), z, t).compile()
    assert 24 * row["gflop_per_image"] == pytest.approx(
        compiled.cost_analysis()["flops"] / 1e9, rel=0.05
    )


def test_each_batch_is_sampled_from_other_noise(bench, monkeypatch):
    seen = []

    def sample(self, labels, *, plan, seed=0):
        seen.append((len(labels), seed, plan.steps, self.network.second_head))
        return np.zeros(())

    monkeypatch.setattr(Generator, "sample_raw", sample)
    monkeypatch.setattr(sample_benchmark, "initial_params", lambda *arguments: np.zeros(()))
    flags = ("--config.model.name=in_context_dit", "--config.sample.batch_size=24")
    assert bench("sample", *flags)[0] == 0
    assert seen == [(24, 0, 1, False), *((24, seed, 1, False) for seed in range(3))]


def test_input_prints_what_it_writes(bench):
    result, cells = _check_output(bench("input"), "input", _config(), (8, 8, 1), 10)
    assert result["batch_size"] == 16
    assert [row["into"] for row in result["rows"]] == ["host memory", "devices"]
    for row, shown in zip(result["rows"], cells, strict=True):
        assert row["batches"] == len(row["batch_seconds"]) >= 2
        assert row["batches_per_second"] == pytest.approx(
            row["batches"] / sum(row["batch_seconds"])
        )
        assert row["images_per_second"] == pytest.approx(16 * row["batches_per_second"])
        assert shown == [
            row["into"],
            _shown(row["batches"]),
            _spread(row, "batch"),
            _shown(row["batches_per_second"]),
            _shown(row["images_per_second"]),
        ]


def test_scores_prints_what_it_writes(bench, monkeypatch):
    monkeypatch.setattr(scores_benchmark, "WIDTHS", {"2048": 5, "spatial": 4, "logits_unbiased": 3})
    flags = ("--config.eval.num_samples=90", "--config.eval.batch_size=40")
    result, cells = _check_output(bench("scores", *flags), "scores", _config(), (8, 8, 1), 10)
    (row,), (shown,) = result["rows"], cells
    assert (row["samples"], result["batch_size"]) == (90, 40)
    assert row["peak_bytes"] >= 0
    assert {"fid", "sfid", "kid", "precision", "recall", "inception_score"} <= set(row)
    assert row["precision"] > 0.9  # samples and reference come from one distribution
    assert shown[:2] == ["90", _shown(row["reference_rows"])]


def test_attention_prints_what_it_writes(bench):
    run = bench("attention", "--config.bench.tokens=(8,)")
    result, cells = _check_output(run, "attention", _config(), (8, 8, 1), 10)
    assert (result["batch_size"], result["num_heads"], result["head_width"]) == (16, 2, 32)
    assert [(row["tokens"], row["pass"]) for row in result["rows"]] == [
        (8, name) for name in PASSES
    ]
    assert any("interpreted on cpu" in note for note in result["notes"])
    for row, shown in zip(result["rows"], cells, strict=True):
        ratio = row["fused_seconds_median"] / row["xla_seconds_median"]
        assert row["seconds_ratio"] == pytest.approx(ratio)
        memory = row["fused_temp_bytes"] / row["xla_temp_bytes"] if row["xla_temp_bytes"] else None
        assert row.get("temp_ratio") == memory
        assert shown == [
            "8",
            row["pass"],
            _spread(row, "xla"),
            _spread(row, "fused"),
            _shown(ratio),
            _shown(row["xla_temp_bytes"] / 1e6),
            _shown(row["fused_temp_bytes"] / 1e6),
            _shown(memory) if memory else "-",
        ]


def test_both_kinds_of_attention_compute_the_same():
    inputs = jax.random.normal(jax.random.key(0), (6, 2, 8, 2, 16))
    everything = jax.jit(PASSES["forward, tangent, gradient"], static_argnums=0)
    plain, fused = (everything(kind, *inputs) for kind in ATTENTIONS)
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [(), *[(2, 8, 2, 16)] * 3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), plain, fused)


def test_heads_are_those_of_the_network():
    config = _config()
    config.model.prediction = "data"
    assert heads(make_network(config, DataSpec((8, 8, 1), 10))) == (2, 32)
    config.model.name, config.model.size = "in_context_dit", "B"
    config.model.width = 0
    assert heads(make_network(config, DataSpec((8, 8, 1), 10))) == (12, 64)
    config.model.name = "unet"
    with pytest.raises(BadInput, match="dit and in_context_dit have it"):
        heads(make_network(config, DataSpec((8, 8, 1), 10)))


def test_a_given_shape_needs_no_data(bench):
    flags = (
        "--config.data.name=image_folder",
        "--config.data.path=/nowhere",
        "--config.bench.shape=(4, 4, 3)",
        "--config.bench.num_classes=7",
    )
    code, out, errors, result = bench("sample", *flags)
    assert code == 0, errors
    assert (result["shape"], result["num_classes"]) == ([4, 4, 3], 7)
    assert "data (4, 4, 3), 7 classes" in out
    code, _, errors, _ = bench("input", *flags)
    assert code == 2
    assert "/nowhere" in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "what=stp",
            ["bench.what='stp'", "step, sample, input, attention, scores", "did you mean step?"],
        ),
        ("repeats=-1", ["bench.repeats=-1", "at least 0"]),
        ("repeats=0 --config.bench.what=input", ["bench.repeats=0", "at least 1"]),
        ("dropped=-1", ["bench.dropped=-1", "at least 0"]),
        ("num_classes=-1", ["bench.num_classes=-1", "at least 0"]),
        ("shape=(8,8)", ["bench.shape=(8, 8)", "(height, width, channels)"]),
        ("shape=(8,8,0)", ["bench.shape=(8, 8, 0)", "at least 1"]),
        ("shape=(8,8,1.5)", ["bench.shape=(8, 8, 1.5)", "whole numbers"]),
        ("shape=(9,9,1)", ["model.patch_size=4", "9x9"]),
        ("shape=(2,)", ["model.name='dit'", "vectors"]),
        ("tokens=()", ["bench.tokens=()", "(256,)"]),
        ("tokens=(0,)", ["bench.tokens=(0,)", "at least 1"]),
        ("tokens=(True,)", ["bench.tokens=(True,)", "whole numbers"]),
        ("repeats=-1 --config.bench.dropped=-1", ["bench.repeats=-1", "; bench.dropped=-1"]),
        ("shape=(8,8,1) --config.optim.lr=-1.0", ["optim.lr=-1.0", "above 0"]),
        ("shape=(8,8,1) --config.train.batch_size=6", ["train.batch_size=6", "multiple of 4"]),
        ("repeats=1 --config.data.name=digit", ["data.name='digit'"]),
        (
            "what=attention --config.model.name=affine",
            ["bench.what='attention'", "use bench.what=step"],
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_writes_nothing(bench, tmp_path, flags, words):
    first, *more = flags.split(" ")
    code, out, errors, _ = bench("step", f"--config.bench.{first}", *more, workdir=tmp_path / "run")
    assert (code, out, errors.count("\n")) == (2, "", 1), errors
    assert all(word in errors for word in words), errors
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made(bench):
    code, _, errors, _ = bench("input", workdir="/dev/null/run")
    assert code == 2
    assert "/dev/null/run: cannot be written" in errors


def test_a_run_in_the_workdir_stays_as_it_is(bench, tmp_path):
    """Even one of another config, and one that is being trained."""
    files = (
        "config.json",
        "data.json",
        ".lock",
        "metrics.jsonl",
        "checkpoints/12/state",
        "report.html",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of the run: {name}")
    code, _, errors, _ = bench("input", workdir=tmp_path)
    assert code == 0, errors
    after = {
        str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()
    }
    assert set(after) == {*files, "bench_input.json"}
    assert all(after[name].read_text() == f"of the run: {name}" for name in files)


def test_what_is_done_is_said_on_stderr(bench):
    assert bench("input")[2] == "reading into host memory\nreading into devices\n"
    assert bench("input", "--config.log.progress=False")[2] == ""


class Clock:
    """A clock that shows what it is told to."""

    now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_contenders_take_turns_and_preparing_is_not_timed():
    clock, order = Clock(), []

    def contender(name, seconds):
        durations = iter(seconds)

        def run(prepared):
            order.append(name)
            clock.wait(prepared)

        def prepare():
            clock.wait(100.0)
            return next(durations)

        return measure.Contender(prepare, run)

    contenders = [contender("a", [9, 1, 2]), contender("b", [8, 4, 3])]
    times = measure.take_turns(contenders, repeats=2, dropped=1, clock=clock)
    assert times == [[1, 2], [4, 3]]
    assert order == list("ababab")


@pytest.mark.parametrize(
    ("repeats", "least_seconds", "counted"), [(3, 0.0, 3), (3, 2.5, 5), (7, 2.5, 7), (1, 0.5, 1)]
)
def test_a_stream_is_timed_long_enough(repeats, least_seconds, counted):
    clock = Clock()
    seconds = measure.time_stream(
        lambda: clock.wait(0.5),
        repeats=repeats,
        dropped=2,
        least_seconds=least_seconds,
        clock=clock,
    )
    assert seconds == [0.5] * counted
    assert clock.now == 0.5 * (counted + 2)


def test_spread_is_median_and_quartiles():
    spread = measure.spread("nap", [5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread["nap_seconds_median"] == 3
    assert spread["nap_seconds_quartiles"] == [2, 4]
    assert spread["nap_seconds"] == [5.0, 1.0, 2.0, 4.0, 3.0]


def test_peak_share():
    assert measure.peak_share(6.0, seconds=2.0, peak_gflops=12.0) == 0.25


def test_the_peak_is_the_best_size_and_the_best_time(monkeypatch):
    """A product takes 1, 2, ... of a unit, and the smaller one a unit twice as long."""
    clock = Clock()
    calls = []

    def turns(contenders, *, repeats, dropped, clock):
        (contender,) = contenders
        a, b = contender.prepare()
        np.testing.assert_allclose(contender.run((a, b)), a @ b, rtol=1e-5, atol=1e-5)
        calls.append((a.shape, b.shape, str(a.dtype)))
        return [[3e-3, 1e-3 if len(a) == 64 else 2e-3]]

    monkeypatch.setattr(measure, "PEAK_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(measure, "take_turns", turns)
    peak = measure.matmul_peak("bfloat16", clock=clock)
    assert calls == [((n, n), (n, n), "float32") for n in (64, 128)]
    assert peak == {
        "matmul_peak_gflops": pytest.approx(2 * 128**3 / 2e-3 / 1e9),
        "matmul_peak_size": 128,
        "matmul_peak_dtype": "float32",
    }


def test_compiling_is_timed_without_the_persistent_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache

    def stored_by_compiling(number):
        num = len(list(tmp_path.iterdir()))
        jax.jit(lambda x: x + number).lower(np.ones(3)).compile()
        return len(list(tmp_path.iterdir())) - num

    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        measure.reset_cache()
        assert stored_by_compiling(1.25) > 0
        with contextlib.suppress(ZeroDivisionError), measure.without_compilation_cache():
            assert stored_by_compiling(2.25) == 0
            raise ZeroDivisionError
        assert jax.config.jax_enable_compilation_cache == before[1]
        assert stored_by_compiling(3.25) > 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        measure.reset_cache()


def test_a_program_tells_its_seconds_of_tracing_and_of_compiling():
    ticks = iter([10.0, 12.0, 17.0])
    program = measure.compile_program(
        jax.jit(lambda x: 2 * x), jnp.ones(3), clock=lambda: next(ticks)
    )
    assert (program.trace_seconds, program.compile_seconds) == (2.0, 5.0)
    np.testing.assert_array_equal(program.executable(jnp.ones(3)), [2, 2, 2])


def test_counting_needs_the_cpu_backend(bench, monkeypatch, tmp_path):
    def devices(platform):
        raise RuntimeError(f"no {platform}")

    monkeypatch.setattr(jax, "devices", devices)
    code, _, errors, _ = bench("step", workdir=tmp_path / "run")
    assert code == 2
    assert "JAX_PLATFORMS" in errors
    assert not (tmp_path / "run").exists()


def test_every_timed_step_has_another_batch():
    batches = fresh_batches(_config(), Noise(DataSpec((8, 8, 1), 10)), make_mesh(data=0, fsdp=1))
    (x, labels), (other, _), _ = itertools.islice(batches, 3)
    assert isinstance(x, jax.Array)
    assert (x.shape, labels.shape) == ((16, 8, 8, 1), (16,))
    assert not jnp.any(x == other)


def test_noise_is_a_source_of_any_shape():
    noise = Noise(DataSpec((4, 4, 3), 5))
    assert isinstance(noise, Source)
    batch = noise.gather(np.arange(1000))
    assert (batch.x.shape, batch.x.dtype, batch.labels.dtype) == (
        (1000, 4, 4, 3),
        np.float32,
        np.int32,
    )
    assert set(batch.labels) == set(range(5))
    np.testing.assert_array_equal(batch.x, noise.gather(np.arange(1000)).x)
    assert not np.any(batch.x == noise.gather(np.arange(1000, 2000)).x)
    assert set(Noise(DataSpec((2,))).gather(np.arange(4)).labels) == {NO_LABEL}

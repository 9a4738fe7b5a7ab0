"""--mode=bench: it prints what it writes and counts what XLA counts; no test looks at a time."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, refuses
from jax.sharding import AbstractMesh
from jobs import assert_refused, here, keys

from configs.digits import get_config as digits
from configs.toy2d import get_config as toy2d
from mf_jax import bench
from mf_jax.bench import attention, measure, step, table
from mf_jax.bench import input as input_pipeline
from mf_jax.bench import scores as scores_benchmark
from mf_jax.bench.step import Noise, changed, flow_matching, fresh_batches
from mf_jax.config import make_network, make_objective
from mf_jax.data import Source
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, Prediction
from mf_jax.generator import Generator
from mf_jax.models import as_field, parameter_shapes
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.runtime.sharding import make_mesh, state_sharding
from mf_jax.step import initial_state, make_train_step
from mf_jax.train import step_parts
from mf_jax.validation import validate

DIGITS, POINTS = DataSpec((8, 8, 1), 10), DataSpec((2,), 0)
SMALL = {"depth": 1, "width": 64}
FLAGS = *TINY, *keys("model.width=64 draws.instant_share=0.75 bench.dropped=1 bench.repeats=2")
RUNS = {
    "step": "toy2d",
    "sample": "digits sample.batch_size=24 sample.steps=2",
    "input": "digits",
    "attention": "digits bench.tokens=(8,)",
    "scores": "digits eval.num_samples=90 eval.batch_size=40",
}
SCALES = {"_bytes": 1e-6, "_seconds_median": 1e3, "": 1.0}
OF_A_RESULT = "platform num_devices num_parameters dtype shape num_classes batch_size notes config"
OF_A_RUN = ("config.json", "data.json", ".lock", "metrics.jsonl", "checkpoints/12/state")


def _two_passes(kind, all_of=attention.passes):
    passes = all_of(kind)
    return {name: passes[name] for name in ("forward", "forward, tangent, gradient")}


def _run(what, config, workdir, overrides=""):
    """Run a quick benchmark in this process."""
    where = [f"--config=configs/{config}.py", "--mode=bench", f"--workdir={workdir}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(measure, "PEAK_SIZES", {"cpu": (64, 128)})
        patch.setattr(input_pipeline, "LEAST_SECONDS", 0.01)
        patch.setattr(scores_benchmark, "WIDTHS", {"2048": 5, "spatial": 4, "logits_unbiased": 3})
        patch.setattr(attention, "passes", _two_passes)
        return here(*where, *FLAGS, *keys(f"bench.what={what} {overrides}"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return (stdout, stderr, JSON) of each benchmark, all in the folder of one run."""
    workdir = tmp_path_factory.mktemp("run")
    for name in OF_A_RUN:
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(f"of the run: {name}")
    found = {}
    for what, run in RUNS.items():
        config, _, overrides = run.partition(" ")
        code, out, errors = _run(what, config, workdir, overrides)
        assert code == 0, errors
        text = (workdir / f"bench_{what}.json").read_text()
        assert not re.search("NaN|Infinity", text)
        found[what] = out, errors, json.loads(text)
    files = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    assert files == {*OF_A_RUN, *(f"bench_{what}.json" for what in RUNS)}
    assert all((workdir / name).read_text() == f"of the run: {name}" for name in OF_A_RUN)
    return found


def _config(defaults=digits):
    config = defaults()
    config.model.update(SMALL)
    config.train.update(num_steps=12, batch_size=16)
    config.draws.instant_share = 0.75
    config.optim.warmup_steps, config.ema.every_steps = 0, 5
    return config


def test_they_print_what_they_write(outcomes):
    for what, (out, errors, result) in outcomes.items():
        assert set(OF_A_RESULT.split()) <= result.keys()
        spec, config = (POINTS, toy2d()) if what == "step" else (DIGITS, digits())
        config.model.update(SMALL)
        shapes = parameter_shapes(make_network(config, spec), spec.shape)
        num = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        batch = {"sample": 24, "scores": 40}.get(what, 16)
        assert (result["num_parameters"], result["batch_size"]) == (num, batch)
        assert result["config"]["model"]["width"] == 64
        lines = out.splitlines()
        head = f"{what}: {config.model.name}, {num:,} parameters, float32, batch {batch}, data "
        assert lines[0] == f"{head}{list(spec.shape)}, {spec.num_classes} classes"
        assert lines[1].endswith("2 repeats after 1 dropped")
        assert set(result["notes"]) <= set(lines)
        assert f"bench_{what}.json" in lines[-1]
        cells = [[c.strip() for c in re.split("[│┃]", x)[1:-1]] for x in lines if x[0] in "│┃"]
        keys = importlib.import_module(f"mf_jax.bench.{what}").SHOWN.split()
        titles, *cells = [dict(zip(keys, each, strict=True)) for each in cells]
        for row, shown in zip(result["rows"], cells, strict=False):
            for key in keys:
                scale = next(scale for ending, scale in SCALES.items() if key.endswith(ending))
                assert shown[key] == table.cell(row, key, scale) != "-"
        if what == "step":
            first, _, ratio = cells
            expected = "objective|gflop|temp MB|argument MB|step ms (quartiles)|images per second"
            assert "|".join(titles.values()) == f"{expected}|trace s|compile s|peak share"
            seconds = result["rows"][0]["step_seconds_median"]
            assert re.match(rf"{1e3 * seconds:.4g} \(\S+ to \S+\)$", first["step_seconds_median"])
            assert ratio["gflop"] == f"{result['ratio']['gflop']:.4g}"
        assert errors


def _lower_step(config, spec, mesh=None):
    parts = step_parts(config, Noise(spec))
    state = jax.eval_shape(lambda: initial_state(parts))
    return jax.jit(make_train_step(parts, mesh), donate_argnums=0).lower(state, *parts.batch)


def test_flops_and_memory_of_a_step_are_xla_s(outcomes):
    """Of flow matching too, whose config is made here by its name alone."""
    result = outcomes["step"][2]
    first, second = result["rows"]
    flow = changed(_config(toy2d), {"objective": {"name": "flow_matching"}})
    assert [row["objective"] for row in (first, second)] == ["meanflow", "flow_matching"]
    for row, config in ((first, _config(toy2d)), (second, flow)):
        gflop, seconds = row["gflop"], row["step_seconds_median"]
        counted = _lower_step(config, POINTS).cost_analysis()["flops"] / 1e9
        assert gflop == row["gflop_lowered"] == counted
        assert row["gflop_compiled"] == pytest.approx(gflop, rel=0.05)
        assert row["images_per_second"] == pytest.approx(16 / seconds)
        share = gflop / seconds / result["matmul_peak_gflops"]
        assert row["peak_share"] == pytest.approx(share)
    compiled = _lower_step(flow, POINTS, make_mesh(data=0, fsdp=1)).compile()
    assert second["gflop_compiled"] == compiled.cost_analysis()["flops"] / 1e9
    for part in ("temp", "argument"):
        held = getattr(compiled.memory_analysis(), f"{part}_size_in_bytes")
        assert second[f"{part}_bytes"] == held
    ratio = result["ratio"]
    assert {"gflop", "temp_bytes", "step_seconds_median"} < ratio.keys()
    assert all(ratio[key] == first[key] / second[key] for key in ratio.keys() - {"objective"})
    assert 1.0 < ratio["gflop"] < 1.3
    assert "GFLOP of the published code's meanflow: 2.00" in result["notes"][1]


def test_a_loop_does_not_hide_flops(monkeypatch):
    program, costs = measure.compile_program(jax.jit(lambda x: x + 1), jnp.ones(3))
    monkeypatch.setattr(measure, "compile_program", lambda *arguments: (program, costs))
    config, mesh = _config(), make_mesh(data=0, fsdp=1)
    config.model.depth, config.objective.name = 2, "flow_matching"
    looped = changed(config, {"model": {"scan": True}, "train": {"microbatch": 8}})
    row, _ = step.compile_step(looped, Noise(DIGITS), mesh, lambda text: None)
    assert row["gflop"] == _lower_step(config, DIGITS).cost_analysis()["flops"] / 1e9
    assert row["gflop_compiled"] == program.cost_analysis()["flops"] / 1e9 > 0


def test_a_flow_matching_of_any_config_is_valid():
    config = _config()
    config.guidance.update(omega=2.0, kappa=0.5)
    config.controls.lipschitz = config.controls.monotone = config.controls.non_expansive = 1.0
    config.draws.label_drop_share, config.objective.derivative = 0.1, "backward"
    config.velocity.update(source="batch", target=0.5)
    before = config.to_dict()
    plain = flow_matching(config)
    assert isinstance(make_objective(plain), FlowMatching)
    assert step_parts(plain, validate(plain, num_devices=1)).scheme.omega_max == 1
    for section in ("model", "optim", "train", "times"):
        assert plain[section] == config[section]
    assert config.to_dict() == before


def test_rates_of_sampling_reading_and_attention(outcomes):
    result = outcomes["sample"][2]
    (row,) = result["rows"]
    assert (row["evaluations"], len(row["batch_seconds"]), len(row["forward_seconds"])) == (2, 2, 2)
    seconds, gflop = row["batch_seconds_median"], 2 * 24 * row["gflop_per_image"]
    network, z, t = make_network(_config(), DIGITS), jnp.ones((24, 8, 8, 1)), jnp.ones(24)
    more = {"r": t, "t": t, "condition": Condition(jnp.zeros(24, jnp.int32))}
    forward = jax.jit(lambda params: as_field(network)(params, z, **more).u)
    flops = forward.lower(parameter_shapes(network, (8, 8, 1))).cost_analysis()["flops"]
    assert gflop == pytest.approx(2 * flops / 1e9, rel=0.02)
    for key, value in (
        ("ratio_to_forwards", seconds / 2 / row["forward_seconds_median"]),
        ("images_per_second", 24 / seconds),
        ("peak_share", gflop / seconds / result["matmul_peak_gflops"]),
    ):
        assert row[key] == pytest.approx(value), key
    assert [row["into"] for row in outcomes["input"][2]["rows"]] == ["host memory", "devices"]
    for row in outcomes["input"][2]["rows"]:
        rate = row["batches"] / sum(row["batch_seconds"])
        assert row["batches"] == len(row["batch_seconds"]) >= 2
        assert (row["batches_per_second"], row["images_per_second"]) == (rate, 16 * rate)
    result = outcomes["attention"][2]
    assert (result["num_heads"], result["head_width"], len(result["rows"])) == (2, 32, 2)
    for row in result["rows"]:
        ratio = row["fused_seconds_median"] / row["xla_seconds_median"]
        assert row["seconds_ratio"] == pytest.approx(ratio)
    (row,) = outcomes["scores"][2]["rows"]
    assert {"fid", "sfid", "kid", "precision", "recall", "inception_score"} <= set(row)
    assert row["samples"] == 90
    assert row["precision"] > 0.9  # samples and reference come from one distribution


def test_each_batch_is_sampled_from_other_noise_without_the_second_head(tmp_path, monkeypatch):
    seen = []

    def sample(self, labels, *, plan, seed=0):
        seen.append((len(labels), seed, plan.steps, self.network.second_head))
        return np.zeros(())

    monkeypatch.setattr(Generator, "sample_raw", sample)
    monkeypatch.setattr("mf_jax.bench.sample.initial_params", lambda *arguments: np.zeros(()))
    monkeypatch.setattr(measure, "lowered_flops", lambda *arguments: 1.0)
    field = lambda params, z, **row: Prediction(z)  # noqa: E731
    monkeypatch.setattr("mf_jax.bench.sample.as_field", lambda network: field)
    network = "model.name=in_context_dit model.prediction=velocity sample.batch_size=24"
    shape = "bench.shape=(8,8,3) bench.num_classes=7"
    code, out, errors = _run("sample", "digits", tmp_path, f"{network} {shape}")
    assert code == 0, errors
    assert "data [8, 8, 3], 7 classes" in out
    assert seen == [(24, 0, 1, False), *((24, seed, 1, False) for seed in range(3))]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    for overrides, *words in (
        ("what=stp", "bench.what='stp'", "sample, input, attention", "did you mean step?"),
        ("repeats=-1", "bench.repeats=-1", "[0, inf)"),
        ("repeats=0 bench.what=input", "bench.repeats=0", "at least 1"),
        ("num_classes=-1 bench.shape=(8,8,1)", "num_classes=-1", "[0, inf)"),
        ("shape=(8,8,1.5)", "bench.shape: 1.5 is not a whole number"),
        ("shape=(8,)", "model.name='dit'", "vectors (8,)"),
        ("tokens=(0,)", "bench.tokens=(0,)", "[1, inf)"),
        ("shape=(8,8,1) train.batch_size=6", "train.batch_size=6", "multiple of 4"),
        ("what=input bench.shape=(4,4,1) data.name=image_folder data.path=/no", "/no"),
        ("what=attention model.name=affine", "bench.what='attention'", "use bench.what=step"),
        ("what=fits bench.devices=0", "bench.devices=0", "within [1, 16384]"),
        ("what=fits bench.devices=64", "bench.devices=64", "started with 1", "new process"),
    ):
        ended = _run("step", "digits", tmp_path / "run", f"bench.{overrides}")
        assert_refused(ended, *words)
        assert (ended.output, (tmp_path / "run").exists()) == ("", False)
    ended = _run("input", "digits", "/dev/null/run", "log.progress=False")
    assert_refused(ended, "/dev/null/run: cannot be written")


def test_pictures_and_latents_need_not_be_here():
    for name, shape in (("image_folder", (64, 64, 3)), ("latents", (8, 8, 4))):
        config = _config()
        config.data.update(name=name, path="/no", image_size=64)
        assert bench._source(config).spec == DataSpec(shape, 1000)
        config.bench.what = "input"
        refuses("/no", bench._source, config)
    assert bench._source(_config()).spec.shape == (8, 8, 1)


def test_a_step_fits_where_xla_says_so(tmp_path):
    """On 4 virtual devices of a process of their own, with parameters split or whole."""
    width, averages = 128, 3
    common = f"bench.what=fits bench.devices=4 model.depth=1 model.width={width}"
    common += " train.batch_size=64 objective.name=flow_matching ema.decays=(0.5,0.9,0.99)"
    asked = {"whole": "bench.memory_gb=1e-3", "split": "mesh.fsdp=4", "bad": "mesh.fsdp=3"}
    code = "import sys; from mf_jax.main import main\n"
    for name, key in asked.items():
        argv = f"mf_jax --config=configs/toy2d.py --mode=bench --workdir={tmp_path}/{name}".split()
        argv += keys(f"{common} {key}")
        code += f"sys.argv[:] = {argv}; print(f'exit code {{main()}}', flush=True)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert re.findall("exit code (.)", done.stdout) == ["0", "0", "2"], done.stderr
    assert done.stdout.count("temp: of XLA for CPUs") == done.stdout.count("bench_fits.json") == 2
    assert "mesh.fsdp=3: must multiply to the 4 devices" in done.stderr
    config, held = toy2d(), []
    config.model.update(depth=1, width=width)
    shapes = parameter_shapes(make_network(config, POINTS), (2,))
    for name, mesh, fits in (("whole", (4, 1), "no"), ("split", (1, 4), "yes")):
        result = json.loads((tmp_path / name / "bench_fits.json").read_text())
        (row,) = result["rows"]
        shardings = state_sharding(AbstractMesh(mesh, ("data", "fsdp")), shapes)
        sizes = jax.tree.map(lambda a, s: np.prod(s.shard_shape(a.shape)), shapes, shardings)
        params = 4 * sum(jax.tree.leaves(sizes))
        assert (result["mesh"], result["num_devices"], row["fits"]) == (list(mesh), 4, fits)
        parts = {"params": params, "ema": averages * params, "batch": 64 // 4 * (2 * 4 + 4)}
        parts["opt_state"] = 2 * params + 2 * 4  # the steps of adam and its schedule
        assert {part: row[f"{part}_bytes"] for part in parts} == parts
        rest = row["total_bytes"] - sum(parts.values()) - row["temp_bytes"]
        assert abs(rest) < 1000  # counters, without the labels, which nobody reads
        assert row["left_bytes"] == result["memory_gb"] * 1e9 - row["total_bytes"]
        held.append(params)
    assert held[1] < held[0] / 2


def test_contenders_take_turns_long_enough_and_preparing_is_not_timed(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    def contender(name, durations):
        def run(seconds):
            order.append(name)
            wait(seconds)

        return (wait(100.0) or seconds for seconds in durations), run

    contenders = contender("a", [9, 1, 2]), contender("b", [8, 4, 3])
    assert measure.take_turns(*contenders, repeats=2, dropped=1) == [[1, 2], [4, 3]]
    assert order == list("ababab")
    for repeats, least_seconds, counted in ((3, 0.0, 3), (3, 2.5, 5), (7, 2.5, 7), (1, 0.5, 1)):
        turns = {"repeats": repeats, "dropped": 2, "least_seconds": least_seconds}
        (seconds,) = measure.take_turns(contender("c", itertools.repeat(0.5)), **turns)
        assert (seconds, order.count("c")) == ([0.5] * counted, counted + 2)
        order.clear()
    times = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [*measure.spread("nap", times).values()] == [3, [2, 4], times]


def test_the_peak_is_the_best_size_and_the_best_time(monkeypatch):
    calls = []

    def turns(contender, *, repeats, dropped):
        a, b = next(contender[0])
        np.testing.assert_allclose(contender[1]((a, b)), a @ b, rtol=1e-5, atol=1e-5)
        calls.append((a.shape, b.shape, str(a.dtype)))
        return [[3e-3, 1e-3 if len(a) == 64 else 2e-3]]

    monkeypatch.setattr(measure, "PEAK_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(measure, "take_turns", turns)
    rate, *what = measure.matmul_peak("bfloat16").values()
    assert (rate, what) == (pytest.approx(2 * 128**3 / 2e-3 / 1e9), [128, "float32"])
    assert calls == [((n, n), (n, n), "float32") for n in (64, 128)]


def test_programs_are_compiled_without_the_persistent_cache(tmp_path):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    is_on = jax.config.jax_enable_compilation_cache
    try:
        for name, value in zip(names, (str(tmp_path), 0), strict=True):
            jax.config.update(name, value)
        program, costs = measure.compile_program(jax.jit(lambda x: x + 2.25), np.ones(3))
        assert list(tmp_path.iterdir()) == []
        assert jax.config.jax_enable_compilation_cache == is_on
        jax.jit(lambda x: x + 3.25)(np.ones(3))
        assert list(tmp_path.iterdir()) != []
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        measure.reset_cache()
    np.testing.assert_array_equal(program(jnp.ones(3)), np.full(3, 3.25))
    assert 0 < costs["trace_seconds"] < costs["compile_seconds"] + 1


def test_counting_needs_the_cpu_backend(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda kind: (_ for _ in ()).throw(RuntimeError(kind)))
    refuses("JAX_PLATFORMS", measure.lowered_flops, jnp.sin, jnp.ones(1))


def test_noise_is_a_source_of_any_shape_and_no_two_batches_are_alike():
    noise = Noise(DataSpec((4, 4, 3), 5))
    assert isinstance(noise, Source)
    batch = noise.gather(np.arange(1000))
    assert (batch.x.shape, batch.x.dtype) == ((1000, 4, 4, 3), np.float32)
    assert (set(batch.labels), batch.labels.dtype) == (set(range(5)), np.int32)
    np.testing.assert_array_equal(batch.x, noise.gather(np.arange(1000)).x)
    assert set(Noise(POINTS).gather(np.arange(4)).labels) == {NO_LABEL}
    batches = fresh_batches(_config(), Noise(DIGITS), make_mesh(data=0, fsdp=1))
    (x, labels, *_), (other, *_) = itertools.islice(batches, 2)
    assert (x.shape, labels.shape) == ((16, 8, 8, 1), (16,))
    assert not jnp.any(x == other)

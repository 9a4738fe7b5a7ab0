"""Starting from weights that exist: runs of ours, published checkpoints, and back out again."""

import contextlib

import jax
import numpy as np
import pytest
from conftest import TINY, refuses
from jobs import assert_refused, edit, here, tiny_config, works
from recorded import FOLDER

import mf_jax
from mf_jax import loading
from mf_jax.config import make_network
from mf_jax.flow.records import DataSpec
from mf_jax.loading import load_initial, load_weights
from mf_jax.models import parameter_shapes
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.sharding import make_mesh
from mf_jax.step import initial_state, make_train_step
from mf_jax.train import first_state, step_parts
from mf_jax.validation import validate

LABELS = [3, 1, 4, 1]
DIGITS = ("--config=configs/digits.py", *TINY)


def _from(place, kind="run", **more):
    return tiny_config(**{"init.path": str(place), "init.kind": kind}, **more)


def _weights(place, kind="run", **more):
    config = _from(place, kind, **more)
    network = make_network(config, DataSpec((8, 8, 1), 10))
    return load_weights(config, parameter_shapes(network, (8, 8, 1)))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Return the finished run as a generator, and its weights under published names."""
    path = tmp_path_factory.mktemp("exported") / "weights.npz"
    generator = mf_jax.load(trained)
    generator.export(path, kind="meanflow")
    return generator, path


def test_weights_that_are_not_finite_are_refused_by_name(exported, tmp_path):
    arrays = dict(np.load(exported[1]))
    name = sorted(arrays)[0]
    arrays[name] = arrays[name] * np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    told = f"{name} has numbers that are not finite"
    refuses(told, _weights, tmp_path / "nan.npz", "meanflow")
    params = jax.tree.map(lambda x: x * np.inf, exported[0].params)
    refuses("RUN: its parameters are not finite", loading._fit, params, params, "RUN")


def test_training_starts_from_another_run(trained, tmp_path):
    """From its moving average, or from the raw parameters."""
    config = _from(trained)
    parts, mesh = step_parts(config, validate(config, num_devices=1)), make_mesh(data=0, fsdp=1)
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        state = first_state(parts, mesh, checkpoints, _weights(trained))
    theirs = mf_jax.load(trained).params
    assert int(state.step) == 0
    for tree in (state.params, *state.ema.values()):
        jax.tree.map(np.testing.assert_array_equal, tree, theirs)
    raw = mf_jax.load(trained, ema="none").params
    started = _weights(trained, **{"init.which": "none"})
    jax.tree.map(np.testing.assert_array_equal, started, raw)


def test_weights_sample_the_same_though_their_data_are_not_there(trained, exported, tmp_path):
    """A run tells the shape of its data, published weights channels and classes."""
    generator, path = exported
    generator.export(tmp_path / "weights.safetensors", kind="meanflow")
    places = {path: "meanflow", tmp_path / "weights.safetensors": "meanflow", trained: "run"}
    expected = generator.sample(LABELS, seed=2)
    for place, kind in places.items():
        lost = {"data.name": "image_folder", "data.path": str(tmp_path / "nowhere")}
        again = load_initial(_from(place, kind, **lost))
        assert again.step == 0
        np.testing.assert_array_equal(again.sample(LABELS, seed=2), expected)


def test_a_loop_over_blocks_takes_and_gives_the_same_weights(trained, exported, tmp_path):
    """Weights of blocks one after another start a network that loops over them, and back."""
    generator, path = exported
    expected = generator.sample_raw(LABELS, seed=2)
    for place, kind in {trained: "run", path: "meanflow"}.items():
        loop = load_initial(_from(place, kind, **{"model.scan": True}))
        assert "blocks" in loop.params
        np.testing.assert_allclose(loop.sample_raw(LABELS, seed=2), expected, atol=1e-5)
        loop.export(tmp_path / "back.npz", kind="meanflow")
        back = load_initial(_from(tmp_path / "back.npz", "meanflow"))
        jax.tree.map(np.testing.assert_array_equal, back.params, generator.params)


def test_a_published_checkpoint_is_sampled_where_nothing_else_is(tmp_path):
    """Latents whose data are not there, decoded."""
    keys = f"init.path={FOLDER / 'official_checkpoint_meanflow'} init.kind=meanflow sample.num=13"
    keys += f" data.name=latents data.autoencoder={FOLDER / 'vae'} data.image_size=32 model.depth=2"
    keys += " model.prediction=velocity model.width=32 model.num_heads=4 model.patch_size=2"
    flags = (f"--config.{key}" for key in keys.split())
    works("--config=configs/digits.py", "--mode=sample", f"--workdir={tmp_path}", *flags)
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (13, 32, 32, 3)
    np.testing.assert_array_equal(samples["arr_1"], [*range(10), 0, 1, 2])


def test_runs_of_other_settings_are_refused(trained, copy_of_trained):
    """Flow matching is no flow map; the rest no name and no shape of a parameter shows."""
    told = {"model.prediction": "data", "model.time_conditioning": "t,log2"}
    for key, value in (told | {"model.num_heads": 8, "model.logit_power": -1.0}).items():
        refuses(f"{key}={value!r}: its run has", _weights, trained, **{key: value})
    refuses("draws.noise_scale=2.0", load_initial, _from(trained, **{"draws.noise_scale": 2.0}))
    edit(copy_of_trained / "config.json", objective={"name": "flow_matching"})
    refuses("no average velocity", load_initial, _from(copy_of_trained))
    load_initial(_from(copy_of_trained, **{"objective.name": "flow_matching"}))
    edit(copy_of_trained / "config.json", model={k.split(".")[1]: v for k, v in told.items()})
    for key, value in {"model.t_clip": 0.1, "times.levels": 3}.items():
        refuses(f"{key}={value}: its run has", _weights, copy_of_trained, **told | {key: value})
    edit(copy_of_trained / "config.json", data={"name": "latents"})
    for theirs, more in (trained, {}), (copy_of_trained, told | {"data.latent_std": (2.0,)}):
        message = r"data\.(name|latent_std)=.*: its run has"
        refuses(message, _weights, theirs, **{"data.name": "latents"}, **more)


def test_training_from_published_names_and_from_a_wrong_place(exported, tmp_path):
    """A wrong place leaves no workdir behind, so that the corrected command can be given."""
    arguments = (*DIGITS, f"--workdir={tmp_path / 'run'}", "--config.init.kind=meanflow")
    assert_refused(here(*arguments, f"--config.init.path={tmp_path / 'weight.npz'}"), "weight.npz")
    assert not (tmp_path / "run").exists()
    works(*arguments, f"--config.init.path={exported[1]}", "--config.train.num_steps=1")


def test_parameters_that_do_not_fit_are_listed(trained):
    sizes = {"model.depth": 2, "model.num_heads": 2, "model.patch_size": 2}
    message = r"missing: block_1/.*; left over: condition/h_embedding/.*; misshapen: .*"
    message += r"patch_embedding/kernel is \[16, 16\], must be \[4, 16\]"
    refuses(message, _weights, trained, **sizes, **{"model.time_conditioning": "t"})
    for kind, named in {"run": "nowhere", "imf": "nowhere", "ditt": "did you mean dit"}.items():
        refuses(named, _weights, "nowhere", kind)


def test_every_network_has_a_step():
    """Target averages are kept where an objective wants one."""
    for more in (
        {"model.name": "low_rank"},
        {"model.time_conditioning": "t|r", "model.depth": 2},
        {"model.scan": True, "model.depth": 2, "model.remat": "block"},
        {"objective.name": "terminal_velocity", "objective.target_ema": 0.99},
    ):
        config = tiny_config(**more)
        parts = step_parts(config, validate(config, num_devices=1))
        before = jax.eval_shape(lambda parts=parts: initial_state(parts))
        after = jax.eval_shape(make_train_step(parts), before, *parts.batch)
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)
        wants = parts.objective.target_ema
        assert set(before.ema) == ({"0.995", repr(wants)} if wants else {"0.995"})

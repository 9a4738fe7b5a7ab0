"""Starting from weights that exist: runs of ours, published checkpoints, and back out again."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from recorded import FOLDER

import mf_jax
from configs.digits import get_config
from mf_jax.config import make_network, validate
from mf_jax.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.loading import load_initial, load_weights
from mf_jax.models import parameter_shapes
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.sharding import make_mesh
from mf_jax.step import initial_state, make_train_step
from mf_jax.train import _first_state, step_parts

LABELS = [3, 1, 4, 1]


def _config(**more) -> ConfigDict:
    config = get_config()
    config.model.depth, config.model.width, config.train.batch_size = 1, 16, 16
    config.update_from_flattened_dict(more)
    return config


def _like(config):
    return parameter_shapes(make_network(config, DataSpec((8, 8, 1), 10)), (8, 8, 1))


def test_training_starts_from_another_run(trained, tmp_path):
    config = _config(**{"init.path": str(trained)})
    parts, mesh = step_parts(config, validate(config, num_devices=1)), make_mesh(data=0, fsdp=1)
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        state = _first_state(config, parts, mesh, checkpoints)
    theirs = mf_jax.load(trained).params
    assert int(state.step) == 0
    for tree in (state.params, *state.ema.values()):
        jax.tree.map(np.testing.assert_array_equal, tree, theirs)


def test_the_raw_parameters_can_be_chosen(trained):
    config = _config(**{"init.path": str(trained), "init.which": "none"})
    jax.tree.map(
        np.testing.assert_array_equal,
        load_weights(config, _like(config)),
        mf_jax.load(trained, ema="none").params,
    )


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_exported_weights_sample_the_same(trained, tmp_path, suffix):
    generator = mf_jax.load(trained)
    generator.export(tmp_path / f"weights.{suffix}", kind="meanflow")
    config = _config(**{"init.path": str(tmp_path / f"weights.{suffix}"), "init.kind": "meanflow"})
    again = load_initial(config)
    assert again.step == 0
    np.testing.assert_array_equal(again.sample(LABELS, seed=2), generator.sample(LABELS, seed=2))


@pytest.mark.parametrize("kind", ["run", "meanflow"])
def test_a_loop_over_blocks_takes_and_gives_the_same_weights(trained, tmp_path, kind):
    """Weights of blocks one after another, ours or published, start a network that loops over them, and back."""
    generator = mf_jax.load(trained)
    place = trained if kind == "run" else tmp_path / "weights.npz"
    if kind != "run":
        generator.export(place, kind=kind)
    config = _config(**{"init.path": str(place), "init.kind": kind, "model.scan": True})
    loop = load_initial(config)
    assert "blocks" in loop.params
    expected = generator.sample_raw(LABELS, seed=2)
    np.testing.assert_allclose(loop.sample_raw(LABELS, seed=2), expected, atol=1e-5)
    loop.export(tmp_path / "back.npz", kind="meanflow")
    config = _config(**{"init.path": str(tmp_path / "back.npz"), "init.kind": "meanflow"})
    back = load_initial(config)
    jax.tree.map(np.testing.assert_array_equal, back.params, generator.params)


def test_a_run_that_loops_over_its_blocks(command, tmp_path):
    flags = (
        "--config=configs/digits.py",
        f"--workdir={tmp_path}/run",
        *TINY,
        "--config.model.scan=True",
    )
    flags += ("--config.model.depth=2", "--config.model.remat=block", "--config.train.num_steps=4")
    for mode in ("train", "sample"):
        code, _, errors = command(*flags, f"--mode={mode}")
        assert code == 0, errors
    assert mf_jax.load(tmp_path / "run").params["blocks"]["expand"]["kernel"].shape == (2, 16, 64)


def test_a_flow_matching_network_is_a_flow_map_when_its_last_blocks_see_r(tmp_path):
    """Their parameters have the same names, so one is the other's warm start."""
    told = {
        name: _config(**{"model.depth": 2, "model.time_conditioning": name})
        for name in ("t", "t|r")
    }
    shapes = [
        {name: leaf.shape for name, leaf in flatten_dict(_like(config)).items()}
        for config in told.values()
    ]
    assert shapes[0] == shapes[1]


def test_command_line_samples_and_scores_weights_without_a_run(trained, tmp_path, command):
    mf_jax.load(trained).export(tmp_path / "weights.npz", kind="meanflow")
    start = (f"--config.init.path={tmp_path / 'weights.npz'}", "--config.init.kind=meanflow")
    for mode in ("sample", "eval"):
        arguments = (
            "--config=configs/digits.py",
            f"--workdir={tmp_path / 'run'}",
            f"--mode={mode}",
        )
        code, _, errors = command(*arguments, *TINY, *start)
        assert code == 0, errors
    assert (tmp_path / "run" / "eval.json").exists()
    assert np.load(tmp_path / "run" / "samples.npz")["arr_0"].shape == (100, 8, 8, 1)


def test_the_data_of_weights_need_not_be_there(trained, tmp_path):
    """A run tells the shape of its data, published weights channels and classes."""
    generator = mf_jax.load(trained)
    generator.export(tmp_path / "weights.npz", kind="meanflow")
    expected = generator.sample(LABELS, seed=2)
    for kind, place in (("run", trained), ("meanflow", tmp_path / "weights.npz")):
        lost = {"data.name": "image_folder", "data.path": str(tmp_path / "nowhere")}
        again = load_initial(_config(**lost, **{"init.path": str(place), "init.kind": kind}))
        np.testing.assert_array_equal(again.sample(LABELS, seed=2), expected)


def test_a_published_checkpoint_is_sampled_where_nothing_else_is(tmp_path, command):
    """Latents whose data are not there, decoded."""
    code, _, errors = command(
        "--config=configs/digits.py",
        "--mode=sample",
        f"--workdir={tmp_path}",
        f"--config.init.path={FOLDER / 'official_checkpoint_meanflow'}",
        "--config.init.kind=meanflow",
        "--config.data.name=latents",
        f"--config.data.autoencoder={FOLDER / 'vae'}",
        "--config.data.image_size=32",
        "--config.model.depth=2",
        "--config.model.width=32",
        "--config.model.num_heads=4",
        "--config.model.patch_size=2",
        "--config.sample.num=13",
    )
    assert code == 0, errors
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (13, 32, 32, 3)
    np.testing.assert_array_equal(samples["arr_1"], [*range(10), 0, 1, 2])


@pytest.mark.parametrize("more", [{}, {"data.latent_std": (2.0,)}], ids=["pictures", "scale"])
def test_a_run_on_other_latents_is_refused(trained, tmp_path, more):
    theirs = tmp_path / "theirs"
    shutil.copytree(trained, theirs)
    if more:
        stored = json.loads((theirs / "config.json").read_text())
        stored["data"]["name"] = "latents"
        (theirs / "config.json").write_text(json.dumps(stored))
    config = _config(**{"init.path": str(theirs), "data.name": "latents", **more})
    with pytest.raises(
        BadInput, match=r"its run was trained on .*latents.*set data.name, data.latent_mean"
    ):
        load_weights(config, _like(config))


def test_training_from_published_names_and_from_a_wrong_place(trained, tmp_path, command):
    """A wrong place leaves no workdir behind, so that the corrected command can be given."""
    mf_jax.load(trained).export(tmp_path / "weights.npz", kind="meanflow")
    arguments = (
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        *TINY,
        "--config.init.kind=meanflow",
    )
    code, _, errors = command(*arguments, f"--config.init.path={tmp_path / 'weight.npz'}")
    assert code == 2
    assert "weight.npz" in errors
    assert not (tmp_path / "run").exists()
    code, _, errors = command(*arguments, f"--config.init.path={tmp_path / 'weights.npz'}")
    assert code == 0, errors


def test_parameters_that_do_not_fit_are_listed(trained):
    config = _config(
        **{"init.path": str(trained), "model.depth": 2, "model.time_conditioning": "t"}
    )
    config.model.num_heads, config.model.patch_size = 2, 2
    with pytest.raises(BadInput) as error:
        load_weights(config, _like(config))
    for part in (
        "missing: block_1/",
        "extra: condition/h_embedding/",
        "misshapen: ",
        "patch_embedding/kernel (16, 16), not (4, 16)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"init.path": "nowhere"}, "nowhere"),
        ({"init.path": "nowhere", "init.kind": "imf"}, "nowhere"),
        ({"init.path": "nowhere", "init.kind": "dit"}, "init.kind"),
    ],
)
def test_bad_places_are_named(more, named):
    config = _config(**more)
    with pytest.raises(BadInput, match=named):
        load_weights(config, _like(config))


BAD_CONFIGS = [
    ({"objective.name": "improved_meanflow"}, "second head"),
    ({"objective.name": "pixel_meanflow", "objective.velocity": "boundary"}, "model.prediction"),
    ({"model.time_conditioning": "t"}, "flow_matching"),
    ({"model.time_conditioning": "t|r"}, "r_blocks"),
    ({"model.name": "unet", "model.time_conditioning": "t|r"}, "t|r"),
    ({"model.name": "unet", "model.channel_multipliers": (1, 2, 2, 2, 2)}, "channel_multipliers"),
    ({"model.name": "unet", "model.dropout": 1.0}, "dropout"),
    ({"model.name": "affine", "model.width": 0}, "model.width"),
    ({"model.name": "low_rank", "model.rank": 0}, "model.rank"),
    ({"model.name": "in_context_dit", "model.num_heads": 3}, "width"),
    ({"model.name": "in_context_dit", "model.size": "S"}, "model.size"),
    ({"model.prediction": "noise"}, "model.prediction"),
    ({"draws.omega_max": 4.0}, "omega_max"),
    ({"sample.guidance": (2.0, 0.0, 1.0)}, "sample.guidance"),
    ({"eval.intervals": ((0.5,),)}, "eval.intervals"),
    ({"sample.guidance": (0.5, 0.0, 1.0)}, "sample.guidance"),
    ({"objective.name": "alpha_flow", "objective.annealing": "linear"}, "annealing"),
    ({"controls.lipschitz": -1.0}, "lipschitz"),
    ({"times.name": "dyadic", "times.levels": 99}, "levels"),
]


@pytest.mark.parametrize(("more", "named"), BAD_CONFIGS, ids=lambda v: str(v)[:50])
def test_bad_config_is_one_error(more, named):
    with pytest.raises(BadInput) as error:
        validate(_config(**more), num_devices=1)
    assert named in str(error.value)
    problems = str(error.value).split("; ")
    assert len(problems) == len(set(problems))


GOOD_CONFIGS = [
    {
        "model.name": "in_context_dit",
        "model.num_heads": 2,
        "draws.omega_max": 4.0,
        "draws.label_drop_share": 0.1,
    },
    {
        "model.name": "unet",
        "model.channels": 8,
        "model.channel_multipliers": (1, 2),
        "model.num_blocks": 1,
        "model.dropout": 0.1,
    },
    {"model.name": "affine"},
    {"model.name": "low_rank"},
    {
        "model.prediction": "data",
        "objective.name": "pixel_meanflow",
        "objective.velocity": "boundary",
    },
    {"model.time_conditioning": "t|r", "model.depth": 2},
    {"objective.name": "terminal_velocity", "objective.target_ema": 0.99},
]


@pytest.mark.parametrize("more", GOOD_CONFIGS, ids=lambda v: next(iter(v.values())))
def test_every_network_trains(more):
    """One step changes the parameters, and target averages are kept where an objective wants one."""
    config = _config(**more)
    parts = step_parts(config, validate(config, num_devices=1))
    state = initial_state(parts)
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    after = jax.jit(make_train_step(parts))(state, x, np.arange(16, dtype=np.int32) % 10)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, after.params)
    assert any(jax.tree.leaves(moved))
    assert int(after.first_bad_step) == -1
    wants = parts.objective.target_ema
    assert tuple(state.ema) == (("0.995", repr(wants)) if wants else ("0.995",))

"""Checkpoints of PyTorch codes: their recorded outputs, what is refused, and the way back."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from recorded import FOLDER, note_difference

from configs.default import get_config
from mf_jax.flow.records import Condition
from mf_jax.loading import load_initial
from mf_jax.models import as_field
from mf_jax.published.checkpoints import find_kind, read_published

FILES = FOLDER / "torch_checkpoints"
SECTIONS = {
    "sit_training.pt": ("sit", "", "ema", "model"),
    "sit_release.pt": ("sit", ""),
    "zhuyu_meanflow_0000100.pt": ("zhuyu_meanflow", "", "ema", "model"),
    "soflow_25000.pt": ("soflow", "", "ema_model", "model"),
}


def _case(kind):
    case = np.load(FILES / f"{kind}.npz")
    return case, json.loads(str(case["meta"]))["sizes"]


def _config(kind, path, which="", **more):
    sizes = _case(kind)[1]
    config = get_config()
    config.data.image_size = sizes["side"]
    keys = {"width": sizes["width"], "depth": sizes["depth"], "num_heads": sizes["heads"]}
    config.model.update({"name": "dit", "patch_size": 2, **keys, **more})
    config.init.update({"path": str(path), "which": which})
    return config


def _output(generator, z, r, t, labels):
    r, t = (jnp.asarray(time, jnp.float32) for time in (r, t))
    condition = Condition(jnp.asarray(labels, jnp.int32))
    with jax.default_matmul_precision("highest"):
        field = as_field(generator.network)
        return field(generator.params, jnp.asarray(z), r=r, t=t, condition=condition).u


@pytest.mark.parametrize("file", SECTIONS)
def test_reference_torch_checkpoints_give_the_recorded_outputs(file, capsys):
    """A SiT does so for every r: it starts as the flow map u(z, r, t) = v(z, t)."""
    kind, *sections = SECTIONS[file]
    case, _ = _case(kind)
    assert find_kind(FILES / file) == kind
    for which in sections:
        generator = load_initial(_config(kind, FILES / file, which))
        assert f"of {kind}" in capsys.readouterr().out
        z, t, labels = case["in/z"], case["in/t"], case["in/y"]
        expected = case["out/model" if which == "model" else "out/ema"]
        intervals = [(case["in/r"], t)] if "in/r" in case else [(0 * t, 1 - t), (1 - t, 1 - t)]
        for r, at in intervals:
            u = _output(generator, z, r, at, labels) * (-1 if kind == "sit" else 1)
            error = np.abs(u - expected).max() / np.abs(expected).max()
            note_difference("outputs", error)
            assert error < 2e-6


def test_reference_networks_go_back_under_their_names(tmp_path):
    for file, (kind, *_) in list(SECTIONS.items())[1:]:
        generator = load_initial(_config(kind, FILES / file))
        path = tmp_path / f"{kind}.safetensors"
        generator.export(path, kind=kind)
        theirs, ours = read_published(FILES / file, kind), read_published(path, kind)
        assert set(ours) == set(theirs)  # the positions are among them
        if kind == "sit":  # which also has channels that are no velocity
            for flat in (ours, theirs):
                del flat["t_embedder.mlp.0.weight"]
                for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
                    flat[name] = flat[name].reshape(4, 2, -1, *flat[name].shape[1:])[:, 0]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        again = load_initial(_config(kind, path)).params
        close = functools.partial(np.testing.assert_allclose, atol=2e-8)  # cos and sin, in float32
        jax.tree.map(close, again, generator.params)


def test_an_interval_that_has_been_learned_is_kept_at_r_equal_t(tmp_path):
    generator = load_initial(_config("sit", FILES / "sit_release.pt"))
    out = generator.params["condition"]["h_embedding"]["out"]
    out["kernel"], out["bias"] = out["kernel"] + 0.1, out["bias"] - 0.2
    generator.export(tmp_path / "sit.npz", kind="sit")
    flow = load_initial(_config("sit", tmp_path / "sit.npz"))
    case, _ = _case("sit")
    z, t, labels = case["in/z"], case["in/t"], case["in/y"]
    np.testing.assert_allclose(
        _output(flow, z, t, t, labels), _output(generator, z, t, t, labels), atol=1e-5
    )


def test_a_dit_is_a_start_and_says_so(capsys):
    generator = load_initial(_config("dit", FILES / "dit_release.pt"))
    assert "of dit, which predicts noise" in capsys.readouterr().out
    assert generator.spec.shape == (8, 8, 4)


def test_torch_checkpoints_that_are_refused(tmp_path):
    content = (FILES / "sit_release.pt").read_bytes()
    unclear = tmp_path / "0050000.pt"
    unclear.write_bytes(content)
    (tmp_path / "edit.pt").write_bytes(content)  # which says neither
    (tmp_path / "sit.pt").write_bytes(content[:-2000])
    for path, more, message in (
        (unclear, {}, "set init.kind=sit or dit"),
        (tmp_path / "edit.pt", {}, "set init.kind=sit or dit"),
        (FILES / "sit_training.pt", {"which": "ema_params"}, "holds no ema_params, but ema, model"),
        (FILES / "sit_release.pt", {"width": 32, "num_heads": 2}, "blocks.0.adaLN"),
        (FILES / "soflow_25000.pt", {"time_conditioning": "t,r"}, "s_embedder.mlp.0.bias"),
        (FILES / "zhuyu_meanflow_0000100.pt", {"depth": 3}, "missing: blocks.2."),
        (tmp_path / "sit.pt", {}, "cannot be read"),
        (tmp_path / "none.pt", {}, "no such file or folder"),
    ):
        refuses(message, load_initial, _config("sit", path, **more))

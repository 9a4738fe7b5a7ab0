"""Published weights: names both ways, recorded checkpoints and outputs, files and their faults."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import refuses
from recorded import FOLDER, below, from_published, note_difference
from safetensors.numpy import save_file

from configs.default import get_config
from mf_jax.flow.records import Condition
from mf_jax.loading import load_initial
from mf_jax.models import as_field
from mf_jax.published import checkpoint_files, checkpoints
from mf_jax.published.checkpoints import load_published, read_published, write_published
from mf_jax.published.names import our_name, published_name, to_published

OF_CHECKPOINT = {"meanflow": "meanflow_cfg_kappa", "imf": "imf_default", "pmf": "pmf_no_perceptual"}
CHECKPOINTS = {kind: FOLDER / f"official_checkpoint_{kind}" for kind in OF_CHECKPOINT}
SUFFIXES = (".npz", ".safetensors")
FILES = FOLDER / "torch_checkpoints"
SECTIONS = {
    "sit_training.pt": ("sit", "", "ema", "model"),
    "sit_release.pt": ("sit", ""),
    "zhuyu_meanflow_0000100.pt": ("zhuyu_meanflow", "", "ema", "model"),
    "soflow_25000.pt": ("soflow", "", "ema_model", "model"),
}
each_kind = pytest.mark.parametrize("kind", OF_CHECKPOINT)


def _case(path):
    """Return the kind, the patch size and the flat published parameters of a recorded case."""
    case = dict(np.load(path))
    meta = json.loads(str(case["meta"]))
    return meta["kind"], meta["model"]["patch_size"], below(case, "params/net/")


def _published(kind):
    return _case(FOLDER / f"{OF_CHECKPOINT[kind]}.npz")[2]


def _like(kind, *, second_head=True):
    tree = from_published(kind, _published(kind))
    return tree if second_head else {name: tree[name] for name in tree if name != "v_head"}


def _assert_equal(ours, theirs):
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _save_file(path, flat):
    save_file(flat, path) if path.suffix == ".safetensors" else np.savez(path, **flat)
    return path


def _save_orbax(path, tree, *, one_database=True):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=one_database)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def _small_tree(value):
    return {"net": {"class_tokens": np.full((8, 4), value, np.float32)}}


def test_names_and_layouts_of_the_reference_there_and_back_and_those_that_are_refused():
    kinds = set()
    for path in (path for kind in OF_CHECKPOINT for path in FOLDER.glob(f"{kind}_*.npz")):
        kind, patch_size, flat = _case(path)
        kinds.add(kind)
        tree = from_published(kind, flat)
        assert all(leaf.ndim <= 2 for leaf in jax.tree.leaves(tree)), "vectors and matrices"
        back = to_published(kind, tree, patch_size=patch_size)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back, flat)
        ours = {name: our_name(kind, name) for name in flat}
        assert len(set(ours.values())) == len(flat)
        for published, (name, stored) in ours.items():
            assert published_name(kind, name) == (published, stored)
    assert kinds == set(OF_CHECKPOINT)
    ours = "u_head/block_107/attention/query_norm/scale"
    assert our_name("imf", "u_heads_107/attn/q_norm/kernel") == (ours, "same")
    assert published_name("imf", ours)[0] == "u_heads_107/attn/q_norm/kernel"

    for kind, name in (
        ("imf", "x_embedder/proj1/bias"),
        ("pmf", "x_embedder/proj/bias"),
        ("imf", "time_tokenses"),
        ("meanflow", "blocks/layers_x/attn/qkv/_flax_linear/bias"),
    ):
        assert our_name(kind, name) is None, name
    refuses(r"kind='imff'.*did you mean imf", our_name, "imff", "class_tokens")
    patches = {"patch_embedding": {"kernel": np.ones((12, 8))}}
    for kind, tree, size, message in (
        ("meanflow", {"u_head": np.ones(3)}, 2, "'u_head': unknown to published meanflow"),
        ("imf", patches, 4, r"patch_size=4: patch_embedding/kernel \[12, 8\]"),
        ("imf", patches, 0, "patch_size=0"),
    ):
        refuses(message, to_published, kind, tree, patch_size=size)


@each_kind
def test_reference_checkpoint_holds_the_averages_of_its_case(kind, tmp_path, monkeypatch):
    path, theirs, like = CHECKPOINTS[kind], _published(kind), _like(kind)
    newest, sizes = next(path.glob("checkpoint_*")), []
    monkeypatch.setattr(checkpoint_files, "check_claim", lambda claim, size: sizes.append(size))
    _assert_equal(read_published(newest, kind), theirs)
    assert sizes == [sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())]
    _assert_equal(load_published(path, kind, like), like)
    params = read_published(path, kind, section="params")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, theirs)
    assert not any(np.array_equal(params[name], array) for name, array in theirs.items())
    one_head = _like(kind, second_head=False)
    _assert_equal(load_published(path, kind, one_head), one_head)
    wanted = (3 if kind == "pmf" else 4, 10)
    assert checkpoints.describe_published(path, kind) == wanted
    rest = {name: array for name, array in theirs.items() if not name.startswith("y_embedder")}
    path = _save_file(tmp_path / "rest.npz", rest)
    assert checkpoints.describe_published(path, kind) == (wanted[0], 0)
    first = "bottleneck" if kind == "pmf" else "patch_embedding"
    del rest[published_name(kind, f"{first}/kernel")[0]]
    _save_file(path, rest)
    message = "rest.npz: holds no first layer of a published"
    refuses(message, checkpoints.describe_published, path, kind)


def test_the_newest_checkpoint_is_the_largest_number_of_which_no_other_array_is_read(tmp_path):
    source = next(CHECKPOINTS["meanflow"].glob("checkpoint_*"))
    shutil.copytree(source, tmp_path / "checkpoint_10")
    (tmp_path / "checkpoint_9").mkdir()
    (tmp_path / "checkpoint_11.orbax-checkpoint-tmp-1").mkdir()
    _assert_equal(read_published(tmp_path, "meanflow"), _published("meanflow"))

    tree = {"params": _small_tree(1), "ema_params": _small_tree(2)}
    tree |= {"opt_state": {"mu": np.ones(3)}, "step": 5}
    path = _save_orbax(tmp_path / "other" / "checkpoint_5", tree, one_database=False)
    for array in path.iterdir():
        if array.name.startswith(("params.", "opt_state.", "step")):
            shutil.rmtree(array)
    assert np.all(read_published(path, "imf")["class_tokens"] == 2)
    refuses("cannot be read as a published", read_published, path, "imf", section="params")


def test_one_of_several_averages_is_chosen_by_name(tmp_path):
    averages = {500: _small_tree(5), 1000: _small_tree(10)}
    path = _save_orbax(tmp_path / "an odd % folder#1" / "checkpoint_1", {"ema_params": averages})
    for name, value in (("500", 5), ("1000", 10)):
        flat = read_published(path, "imf", section=f"ema_params/{name}")
        assert np.all(flat["class_tokens"] == value)
    for section, message in (
        ("", "must be one of its averages: ema_params/1000, ema_params/500"),
        ("ema_params/7", "holds no ema_params/7, but ema_params"),
        ("opt_state", "section='opt_state': must be, or lie below, one of ema_params, ema"),
    ):
        refuses(message, read_published, path, "imf", section=section)
    one = _save_orbax(tmp_path / "one" / "checkpoint_1", {"ema_params": {500: _small_tree(3)}})
    assert np.all(read_published(one, "imf")["class_tokens"] == 3)


@each_kind
def test_written_weights_have_the_published_names_and_are_read_back(tmp_path, kind):
    _, patch_size, flat = _case(FOLDER / f"{OF_CHECKPOINT[kind]}.npz")
    params = jax.tree.map(jnp.asarray, from_published(kind, flat))
    for suffix in SUFFIXES:
        path = tmp_path / f"weights{suffix}"
        path.write_text("replaced")
        write_published(path, kind, params, patch_size=patch_size)
        assert [child.name for child in tmp_path.iterdir()] == [path.name]
        _assert_equal(read_published(path, kind), flat)
        path.unlink()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_narrow_numbers_and_with_sections(tmp_path, suffix):
    flat, path = _published("imf"), tmp_path / f"weights{suffix}"
    for dtype in (jnp.bfloat16, np.float16, np.float32):
        narrow = {name: array.astype(dtype) for name, array in flat.items()}
        wide = {name: array.astype(np.float32) for name, array in narrow.items()}
        _assert_equal(read_published(_save_file(path, narrow), "imf"), wide)
    for prefix in ("net/", "ema_params/", "ema_params/net/"):
        stored = {f"{prefix}{name}": array for name, array in flat.items()}
        if prefix.startswith("ema_params"):
            stored |= {"params/net/class_tokens": np.zeros(3), "step": np.zeros(1, np.int32)}
        _assert_equal(read_published(_save_file(path, stored), "imf"), flat)
    case = FOLDER / f"{OF_CHECKPOINT['imf']}.npz"
    _assert_equal(read_published(case, "imf", section="params"), flat)
    refuses("holds no ema_params, but params", read_published, case, "imf", section="ema_params")


def test_all_that_does_not_fit_is_named_in_one_error():
    """A second head may be absent where none is wanted."""
    flat, like = _published("imf"), _like("imf", second_head=False)
    sampling = {name: array for name, array in flat.items() if not name.startswith("v_")}
    _assert_equal(checkpoints.fit_published("imf", sampling, like), like)
    del flat["u_final_layer/linear/_flax_linear/bias"]
    flat["mystery"] = np.ones(3, np.float32)
    flat["shared_blocks_7/norm1/kernel"] = np.ones(32, np.float32)
    flat["x_embedder/proj/kernel"] = np.ones((2, 2, 3, 32), np.float32)
    flat["x_embedder/proj/bias"] = np.ones((1, 32), np.float32)
    message = r"missing: u_final_.*bias \(u_head/final/bias\); left over: mystery, "
    message += r"shared_blocks_7/norm1/kernel .*; .*proj/bias .* is \[1, 32\], must be \[32\].*"
    message += r"proj/kernel .* is \[12, 32\], must be \[16, 32\]"
    refuses(message, checkpoints.fit_published, "imf", flat, _like("imf"))
    another = r"missing: block_0/attention/key/kernel, .* and .* more"
    refuses(another, checkpoints.fit_published, "meanflow", _published("meanflow"), _like("imf"))
    path = CHECKPOINTS["imf"]
    message = f"{path}: published imf parameters do not fit"
    refuses(message, load_published, path, "imf", {"mystery": jnp.ones(3)})


def test_what_cannot_be_read_or_written_is_one_clear_line(tmp_path, capfd):
    damaged, numbers = "cannot be read as a published checkpoint", iter(range(99))
    folder = next(CHECKPOINTS["imf"].glob("checkpoint_*"))
    folder = shutil.copytree(folder, tmp_path / "damaged" / "checkpoint_3")
    for file in (folder / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    (folder.parent / "checkpoint_4").mkdir()

    def npz(flat):
        return _save_file(tmp_path / f"{next(numbers)}.npz", flat)

    texts = [tmp_path / f"weights{suffix}" for suffix in (".txt", *SUFFIXES)]
    for path in texts:
        path.write_text("not an archive")
    for path, message in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path, "must be a folder checkpoint_N"),
        (texts[0], r"must be a folder checkpoint_N, or end in .npz, .saf"),
        (texts[1], damaged),
        (texts[2], damaged),
        (folder, damaged),
        (folder.parent, damaged),
        (npz({}), "holds no parameters, but nothing"),
        (npz({"class_tokens": np.array([{}])}), damaged),
        (npz({"class_tokens": np.ones(3, int)}), "class_tokens is int64; must be"),
        (npz({"conv.weight": np.ones(3)}), "none of its parameters"),
        (npz(_published("pmf")), "kind='imf': its parameters .* kind='pmf'"),
        (CHECKPOINTS["meanflow"], "kind='imf': its parameters are those of kind='meanflow'"),
    ):
        refuses(f"{path}.*{message}", read_published, path, "imf")
        assert capfd.readouterr() == ("", "")
    params, place = {"u_head": {"final": {"bias": np.ones(16, np.float32)}}}, tmp_path / "written"
    names = [f"{name}{suffix}" for name in ("nothing/weights", "folder") for suffix in SUFFIXES]
    for name in names[2:]:
        (place / name).mkdir(parents=True)
    for name, kind, message in (
        ("weights.pt", "imf", r"weights.pt: must end in .npz or .safetensors"),
        ("weights.npz", "meanflow", "'u_head/final/bias'"),
        *((name, "imf", "cannot be written") for name in names),
    ):
        refuses(message, write_published, place / name, kind, params, patch_size=2)
    assert {path.name for path in place.iterdir()} == set(names[2:])


def _config(kind, path, which="", **more):
    sizes = json.loads(str(np.load(FILES / f"{kind}.npz")["meta"]))["sizes"]
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
    case = np.load(FILES / f"{kind}.npz")
    assert checkpoints.find_kind(FILES / file) == kind
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
    case = np.load(FILES / "sit.npz")
    at = case["in/z"], case["in/t"], case["in/t"], case["in/y"]
    np.testing.assert_allclose(_output(flow, *at), _output(generator, *at), atol=1e-5)


def test_a_dit_is_a_start_and_torch_checkpoints_of_no_kind_are_refused(tmp_path, capsys):
    generator = load_initial(_config("dit", FILES / "dit_release.pt"))
    assert "of dit, which predicts noise" in capsys.readouterr().out
    assert generator.spec.shape == (8, 8, 4)
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
    curved = {"model": "SiT-XL/2", "path_type": "GVP"}
    refuses("path_type='GVP'; must be 'Linear'", checkpoints._sit_or_dit, curved, "a.pt")

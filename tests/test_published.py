"""Published weights: names both ways, recorded checkpoints, files, and everything that can be wrong with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from recorded import FOLDER
from safetensors.numpy import save_file

from mf_jax.errors import BadInput
from mf_jax.published.checkpoints import (
    describe_published,
    fit_published,
    load_published,
    read_published,
    write_published,
)
from mf_jax.published.names import KINDS, from_published, our_name, published_name, to_published

CASES = sorted(path for kind in KINDS for path in FOLDER.glob(f"{kind}_*.npz"))
OF_CHECKPOINT = {"meanflow": "meanflow_cfg_kappa", "imf": "imf_default", "pmf": "pmf_no_perceptual"}
NETWORK = "params/net/"
each_kind = pytest.mark.parametrize("kind", KINDS)
each_suffix = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


def _case(path):
    """Return the meta and the flat published parameters of a recorded case."""
    case = dict(np.load(path))
    flat = {k.removeprefix(NETWORK): v for k, v in case.items() if k.startswith(NETWORK)}
    return json.loads(str(case["meta"])), flat


def _published(kind):
    meta, flat = _case(FOLDER / f"{OF_CHECKPOINT[kind]}.npz")
    return flat, meta["model"]["patch_size"]


def _like(kind, *, second_head=True):
    tree = from_published(kind, _published(kind)[0])
    if not second_head:
        del tree["v_head"]
    return jax.eval_shape(lambda: tree)


def _checkpoint(kind):
    return FOLDER / f"official_checkpoint_{kind}"


def _assert_equal(ours, theirs):
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def _save_file(path, flat):
    if path.suffix == ".npz":
        np.savez(path, **flat)
    else:
        save_file(flat, path)
    return path


def _save_orbax(path, tree, *, one_database=True):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=one_database)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


# ---- names


def test_recorded_cases_of_every_kind_are_there():
    kinds = [_case(path)[0]["kind"] for path in CASES]
    assert set(kinds) == set(KINDS), f"{FOLDER} holds cases of {sorted(set(kinds))}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_names_and_layouts_there_and_back(path):
    meta, flat = _case(path)
    tree = from_published(meta["kind"], flat)
    back = to_published(meta["kind"], tree, patch_size=meta["model"]["patch_size"])
    assert back.keys() == flat.keys()
    for name in flat:
        np.testing.assert_array_equal(back[name], flat[name], strict=True)
    assert all(leaf.ndim <= 2 for leaf in jax.tree.leaves(tree)), "ours are vectors and matrices"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_names_are_one_to_one(path):
    meta, flat = _case(path)
    ours = {name: our_name(meta["kind"], name) for name in flat}
    assert len(set(ours.values())) == len(flat)
    for published, (name, stored) in ours.items():
        assert published_name(meta["kind"], name) == (published, stored)


def test_block_numbers_of_many_digits():
    ours = our_name("imf", "u_heads_107/attn/q_norm/kernel")
    assert ours == ("u_head/block_107/attention/query_norm/scale", "same")
    assert published_name("imf", ours[0])[0] == "u_heads_107/attn/q_norm/kernel"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: our_name("imf", "x_embedder/proj1/bias"),
            "'x_embedder/proj1/bias': not a name of.* imf",
        ),
        (lambda: our_name("pmf", "x_embedder/proj/bias"), "'x_embedder/proj/bias'"),
        (lambda: our_name("imf", "shared_blocks_0/attn/q_norm/kernel/more"), "kernel/more"),
        (lambda: our_name("imf", "time_tokenses"), "'time_tokenses'"),
        (lambda: our_name("meanflow", "blocks/layers_x/attn/qkv/_flax_linear/bias"), "layers_x"),
        (lambda: our_name("imff", "class_tokens"), r"kind='imff'.*did you mean imf"),
        (lambda: published_name("meanflow", "u_head/final/bias"), "'u_head/final/bias'.*meanflow"),
        (lambda: published_name("dit", "final/bias"), "kind='dit'"),
        (
            lambda: from_published("imf", {"x_embedder/proj/kernel": np.ones((4, 8))}),
            r"\(4, 8\).*p, p, C, width",
        ),
        (
            lambda: from_published("pmf", {"pos_embed": np.ones((2, 4, 8))}),
            r"\(2, 4, 8\).*first axis of one",
        ),
        (
            lambda: to_published(
                "imf", {"patch_embedding": {"kernel": np.ones((12, 8))}}, patch_size=4
            ),
            r"patch_size=4: patch_embedding/kernel of shape \(12, 8\)",
        ),
        (
            lambda: to_published(
                "imf", {"patch_embedding": {"kernel": np.ones((12, 8))}}, patch_size=0
            ),
            "patch_size=0",
        ),
    ],
)
def test_names_and_layouts_that_are_refused(call, message):
    with pytest.raises(BadInput, match=message):
        call()


# ---- recorded checkpoints


@each_kind
@pytest.mark.parametrize("parent", [False, True], ids=["checkpoint_N", "parent"])
def test_recorded_checkpoint_holds_the_averages_of_its_case(kind, parent):
    path = _checkpoint(kind)
    flat = read_published(path if parent else next(path.glob("checkpoint_*")), kind)
    _assert_equal(flat, _published(kind)[0])


@each_kind
def test_params_on_request_are_other_numbers(kind):
    theirs, _ = _published(kind)
    ours = read_published(_checkpoint(kind), kind, section="params")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == array.shape for name, array in theirs.items())
    assert not any(np.array_equal(ours[name], array) for name, array in theirs.items())
    loaded = load_published(_checkpoint(kind), kind, _like(kind), section="params")
    _assert_equal(loaded, from_published(kind, ours))


@each_kind
def test_load_published_is_the_tree_of_the_network(kind):
    _assert_equal(
        load_published(_checkpoint(kind), kind, _like(kind)),
        from_published(kind, _published(kind)[0]),
    )


@pytest.mark.parametrize("kind", ["imf", "pmf"])
def test_load_published_without_the_second_head(kind):
    expected = from_published(kind, _published(kind)[0])
    del expected["v_head"]
    _assert_equal(load_published(_checkpoint(kind), kind, _like(kind, second_head=False)), expected)


def test_the_newest_checkpoint_is_the_largest_number(tmp_path):
    source = next(_checkpoint("meanflow").glob("checkpoint_*"))
    shutil.copytree(source, tmp_path / "checkpoint_10")
    (tmp_path / "checkpoint_9").mkdir()
    (tmp_path / "checkpoint_11.orbax-checkpoint-tmp-1").mkdir()
    _assert_equal(read_published(tmp_path, "meanflow"), _published("meanflow")[0])


def _small_tree(value):
    return {"net": {"class_tokens": np.full((8, 4), value, np.float32)}}


def test_other_arrays_of_a_checkpoint_are_not_read(tmp_path):
    tree = {
        "params": _small_tree(1),
        "ema_params": _small_tree(2),
        "opt_state": {"mu": np.ones(3)},
        "step": 5,
    }
    path = _save_orbax(tmp_path / "checkpoint_5", tree, one_database=False)
    for array in path.iterdir():
        if array.name.startswith(("params.", "opt_state.", "step")):
            shutil.rmtree(array)
    assert np.all(read_published(path, "imf")["class_tokens"] == 2)
    with pytest.raises(BadInput, match="cannot be read as a published checkpoint"):
        read_published(path, "imf", section="params")


def test_one_of_several_averages_is_chosen_by_name(tmp_path):
    averages = {500: _small_tree(5), 1000: _small_tree(10)}
    path = _save_orbax(tmp_path / "an odd % folder#1" / "checkpoint_1", {"ema_params": averages})
    for name, value in (("500", 5), ("1000", 10)):
        flat = read_published(path, "imf", section=f"ema_params/{name}")
        assert np.all(flat["class_tokens"] == value)
    with pytest.raises(
        BadInput, match="must be one of its averages: ema_params/1000, ema_params/500"
    ):
        read_published(path, "imf")
    with pytest.raises(BadInput, match="holds no ema_params/7, but ema_params"):
        read_published(path, "imf", section="ema_params/7")
    one = _save_orbax(tmp_path / "one" / "checkpoint_1", {"ema_params": {500: _small_tree(3)}})
    assert np.all(read_published(one, "imf")["class_tokens"] == 3)


# ---- files


@each_kind
def test_a_checkpoint_tells_its_channels_and_classes(kind, tmp_path):
    wanted = (3 if kind == "pmf" else 4, 10)
    assert describe_published(_checkpoint(kind), kind) == wanted
    flat, _ = _published(kind)
    np.savez(tmp_path / "all.npz", **flat)
    assert describe_published(tmp_path / "all.npz", kind) == wanted
    table = next(name for name in flat if name.startswith("y_embedder"))
    np.savez(
        tmp_path / "no_labels.npz", **{name: array for name, array in flat.items() if name != table}
    )
    assert describe_published(tmp_path / "no_labels.npz", kind) == (wanted[0], 0)
    rest = {name: array for name, array in flat.items() if "x_embedder" not in name}
    np.savez(tmp_path / "rest.npz", **rest)
    with pytest.raises(BadInput, match=r"rest.npz: holds no x_embedder/proj"):
        describe_published(tmp_path / "rest.npz", kind)


@each_kind
@each_suffix
def test_written_weights_are_read_back(tmp_path, kind, suffix):
    flat, patch_size = _published(kind)
    path = tmp_path / f"weights{suffix}"
    path.write_text("replaced")
    params = jax.tree.map(jnp.asarray, from_published(kind, flat))
    write_published(path, kind, params, patch_size=patch_size)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    _assert_equal(read_published(path, kind), flat)
    _assert_equal(load_published(path, kind, _like(kind)), params)


@each_suffix
def test_written_names_are_the_published_ones(tmp_path, suffix):
    flat, patch_size = _published("pmf")
    path = tmp_path / f"weights{suffix}"
    write_published(path, "pmf", from_published("pmf", flat), patch_size=patch_size)
    if suffix == ".npz":
        assert {name: array.shape for name, array in np.load(path).items()} == {
            name: array.shape for name, array in flat.items()
        }
    else:
        header = path.read_bytes()
        header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {
            name: array.shape for name, array in flat.items()
        }


@each_suffix
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, np.float16, np.float32], ids=lambda t: np.dtype(t).name
)
def test_narrow_numbers_become_float32(tmp_path, suffix, dtype):
    flat = {name: array.astype(dtype) for name, array in _published("imf")[0].items()}
    ours = read_published(_save_file(tmp_path / f"weights{suffix}", flat), "imf")
    _assert_equal(ours, {name: array.astype(np.float32) for name, array in flat.items()})


@each_suffix
@pytest.mark.parametrize("prefix", ["", "net/", "ema_params/", "ema_params/net/"])
def test_names_in_files_may_have_their_section(tmp_path, suffix, prefix):
    flat, _ = _published("imf")
    stored = {f"{prefix}{name}": array for name, array in flat.items()}
    if prefix.startswith("ema_params"):
        stored |= {"params/net/class_tokens": np.zeros(3), "step": np.zeros(1, np.int32)}
    _assert_equal(read_published(_save_file(tmp_path / f"weights{suffix}", stored), "imf"), flat)


def test_a_recorded_case_is_a_file_of_params():
    path = FOLDER / f"{OF_CHECKPOINT['imf']}.npz"
    _assert_equal(read_published(path, "imf", section="params"), _published("imf")[0])
    with pytest.raises(BadInput, match="holds no ema_params, but params"):
        read_published(path, "imf")


# ---- fitting


def test_a_second_head_may_be_absent_where_none_is_wanted():
    flat, _ = _published("imf")
    sampling = {name: array for name, array in flat.items() if not name.startswith("v_")}
    tree = fit_published("imf", sampling, _like("imf", second_head=False))
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, _like("imf", second_head=False))
    with pytest.raises(BadInput, match=r"missing: v_heads_0/\S+ \(v_head/block_0/\S+\)") as problem:
        fit_published("imf", sampling, _like("imf"))
    assert "unknown" not in str(problem.value)
    assert "shape" not in str(problem.value)


def test_all_that_does_not_fit_is_named_in_one_error():
    flat, _ = _published("imf")
    del flat["u_final_layer/linear/_flax_linear/bias"]
    flat["mystery"] = np.ones(3, np.float32)
    flat["shared_blocks_7/norm1/kernel"] = np.ones(32, np.float32)
    flat["x_embedder/proj/kernel"] = np.ones((2, 2, 3, 32), np.float32)
    flat["x_embedder/proj/bias"] = np.ones((1, 32), np.float32)
    with pytest.raises(BadInput) as problem:
        fit_published("imf", flat, _like("imf"))
    message = str(problem.value)
    assert "\n" not in message
    for part in (
        "missing: u_final_layer/linear/_flax_linear/bias (u_head/final/bias);",
        "unknown to the network: mystery, shared_blocks_7/norm1/kernel (block_7/attention_norm/scale);",
        "x_embedder/proj/kernel (patch_embedding/kernel) is [2, 2, 3, 32], must become [16, 32]",
        "x_embedder/proj/bias (patch_embedding/bias) is [1, 32], must become [32]",
    ):
        assert part in message


def test_an_array_without_the_axes_of_its_layout_is_of_another_shape():
    flat, _ = _published("pmf")
    flat["pos_embed"] = flat["pos_embed"][0]
    flat["x_embedder/proj2/kernel"] = flat["x_embedder/proj2/kernel"][0]
    with pytest.raises(BadInput, match="of another shape") as problem:
        fit_published("pmf", {**flat, "class_tokens": np.ones((2, 8, 32))}, _like("pmf"))
    assert "class_tokens (class_tokens/tokens) is [2, 8, 32], must become [8, 32]" in str(
        problem.value
    )
    assert "x_embedder/proj2/kernel (patch_embedding/kernel) is [1, 128, 32]" in str(problem.value)


def test_a_network_of_another_kind_and_long_lists():
    flat, _ = _published("meanflow")
    with pytest.raises(
        BadInput, match=r"attention/key/kernel \(which no published meanflow network has\)"
    ) as problem:
        fit_published("meanflow", flat, _like("imf"))
    assert " and " in str(problem.value)
    assert " more" in str(problem.value)


# ---- what can be wrong with a path


def _damaged_folder(folder):
    path = shutil.copytree(next(_checkpoint("imf").glob("checkpoint_*")), folder / "checkpoint_3")
    for file in (path / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    return path


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


def _text(path):
    path.write_text("not an archive")
    return path


DAMAGED = "cannot be read as a published checkpoint"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nothing", "no such file or folder"),
        (lambda d: d, "must be a folder checkpoint_N"),
        (
            lambda d: _text(d / "weights.txt"),
            r"must be a folder checkpoint_N, or a file ending in .npz or .saf",
        ),
        (lambda d: _text(d / "weights.npz"), DAMAGED),
        (lambda d: _text(d / "weights.safetensors"), DAMAGED),
        (lambda d: _cut_short(_save_file(d / "w.npz", _published("imf")[0])), DAMAGED),
        (lambda d: _cut_short(_save_file(d / "w.safetensors", _published("imf")[0])), DAMAGED),
        (_damaged_folder, DAMAGED),
        (lambda d: _save_file(d / "w.npz", {}), "holds no ema_params, but no parameters at all"),
        (lambda d: _save_file(d / "w.npz", {"class_tokens": np.array([{}])}), DAMAGED),
        (
            lambda d: _save_file(d / "w.npz", {"class_tokens": np.ones(3, int)}),
            "class_tokens is int64; must be",
        ),
        (lambda d: _save_file(d / "w.npz", {"conv.weight": np.ones(3)}), "none of its parameters"),
        (
            lambda d: _save_file(d / "w.npz", _published("pmf")[0]),
            "kind='imf': its parameters .* kind='pmf'",
        ),
        (
            lambda d: _checkpoint("meanflow"),
            "kind='imf': its parameters are those of kind='meanflow'",
        ),
    ],
)
def test_bad_paths_are_one_clear_line(tmp_path, make, message, capfd):
    path = make(tmp_path)
    with pytest.raises(BadInput, match=message) as problem:
        read_published(path, "imf")
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)
    assert capfd.readouterr() == ("", "")


def test_bad_kinds_and_sections():
    with pytest.raises(BadInput, match=r"kind='imff'.*did you mean imf"):
        read_published(_checkpoint("imf"), "imff")
    with pytest.raises(BadInput, match="section='opt_state': must be one of ema_params, params"):
        read_published(_checkpoint("imf"), "imf", section="opt_state")


def test_load_published_names_the_path():
    path = _checkpoint("imf")
    with pytest.raises(BadInput, match=f"{path}: published imf parameters do not fit"):
        load_published(path, "imf", {"mystery": jnp.ones(3)})


def test_weights_that_cannot_be_written(tmp_path):
    params = unflatten_dict({"u_head/final/bias": np.ones(16, np.float32)}, sep="/")
    with pytest.raises(BadInput, match=r"weights.pt: must end in .npz or .safetensors"):
        write_published(tmp_path / "weights.pt", "imf", params, patch_size=2)
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(BadInput, match="cannot be written"):
            write_published(tmp_path / "nothing" / f"weights{suffix}", "imf", params, patch_size=2)
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(BadInput, match="cannot be written"):
            write_published(tmp_path / f"folder{suffix}", "imf", params, patch_size=2)
        (tmp_path / f"folder{suffix}").rmdir()
    with pytest.raises(BadInput, match="'u_head/final/bias'"):
        write_published(tmp_path / "weights.npz", "meanflow", params, patch_size=2)
    assert list(tmp_path.iterdir()) == []

"""Published weights: names both ways, recorded checkpoints, files, and their faults."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import refuses
from flax.traverse_util import unflatten_dict
from recorded import FOLDER, from_published
from safetensors.numpy import save_file

from mf_jax.flow.errors import BadInput
from mf_jax.published import checkpoint_files
from mf_jax.published.checkpoints import (
    describe_published,
    fit_published,
    load_published,
    read_published,
    write_published,
)
from mf_jax.published.names import KINDS as ALL_KINDS
from mf_jax.published.names import TORCH_KINDS, our_name, published_name, to_published

KINDS = ALL_KINDS[: -len(TORCH_KINDS)]
CASES = sorted(path for kind in KINDS for path in FOLDER.glob(f"{kind}_*.npz"))
OF_CHECKPOINT = {"meanflow": "meanflow_cfg_kappa", "imf": "imf_default", "pmf": "pmf_no_perceptual"}
NETWORK = "params/net/"
SUFFIXES = (".npz", ".safetensors")
each_kind = pytest.mark.parametrize("kind", KINDS)


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
    return tree if second_head else {name: tree[name] for name in tree if name != "v_head"}


CHECKPOINTS = {kind: FOLDER / f"official_checkpoint_{kind}" for kind in KINDS}


def _assert_equal(ours, theirs):
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _save_file(path, flat):
    save = save_file if path.suffix == ".safetensors" else lambda flat, path: np.savez(path, **flat)
    save(flat, path)
    return path


def _save_orbax(path, tree, *, one_database=True):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=one_database)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


# ---- names


def test_names_and_layouts_of_the_reference_there_and_back():
    kinds = set()
    for path in CASES:
        meta, flat = _case(path)
        kind = meta["kind"]
        kinds.add(kind)
        tree = from_published(kind, flat)
        assert all(leaf.ndim <= 2 for leaf in jax.tree.leaves(tree)), "vectors and matrices"
        back = to_published(kind, tree, patch_size=meta["model"]["patch_size"])
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back, flat)
        ours = {name: our_name(kind, name) for name in flat}
        assert len(set(ours.values())) == len(flat)
        for published, (name, stored) in ours.items():
            assert published_name(kind, name) == (published, stored)
    assert kinds == set(KINDS), f"{FOLDER} holds cases of {sorted(kinds)}"
    ours = our_name("imf", "u_heads_107/attn/q_norm/kernel")
    assert ours == ("u_head/block_107/attention/query_norm/scale", "same")
    assert published_name("imf", ours[0])[0] == "u_heads_107/attn/q_norm/kernel"


def test_names_and_layouts_that_are_refused():
    patches = {"patch_embedding": {"kernel": np.ones((12, 8))}}
    of_another_size = r"patch_size=4: patch_embedding/kernel of shape \(12, 8\)"
    for kind, name in (
        ("imf", "x_embedder/proj1/bias"),
        ("pmf", "x_embedder/proj/bias"),
        ("imf", "time_tokenses"),
        ("meanflow", "blocks/layers_x/attn/qkv/_flax_linear/bias"),
    ):
        assert our_name(kind, name) is None
    refuses(r"kind='imff'.*did you mean imf", our_name, "imff", "class_tokens")
    with pytest.raises(BadInput, match="'u_head': unknown to published meanflow"):
        to_published("meanflow", {"u_head": np.ones(3)}, patch_size=2)
    for patch_size, message in ((4, of_another_size), (0, "patch_size=0")):
        refuses(message, to_published, "imf", patches, patch_size=patch_size)


# ---- recorded checkpoints


@each_kind
def test_reference_checkpoint_holds_the_averages_of_its_case(kind, tmp_path, monkeypatch):
    path, (theirs, _) = CHECKPOINTS[kind], _published(kind)
    _assert_equal(read_published(path, kind), theirs)
    newest, sizes = next(path.glob("checkpoint_*")), []
    monkeypatch.setattr(checkpoint_files, "check_claim", lambda claim, size: sizes.append(size))
    _assert_equal(read_published(newest, kind), theirs)
    assert sizes == [sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())]
    _assert_equal(load_published(path, kind, _like(kind)), _like(kind))
    params = read_published(path, kind, section="params")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, theirs)
    assert not any(np.array_equal(params[name], array) for name, array in theirs.items())
    loaded = load_published(path, kind, _like(kind), section="params")
    _assert_equal(loaded, from_published(kind, params))
    if kind != "meanflow":
        one_head = _like(kind, second_head=False)
        _assert_equal(load_published(path, kind, one_head), one_head)
    wanted = (3 if kind == "pmf" else 4, 10)
    assert describe_published(path, kind) == wanted
    rest = {name: array for name, array in theirs.items() if not name.startswith("y_embedder")}
    path = _save_file(tmp_path / "rest.npz", rest)
    assert describe_published(path, kind) == (wanted[0], 0)
    first = "bottleneck" if kind == "pmf" else "patch_embedding"
    del rest[published_name(kind, f"{first}/kernel")[0]]
    with pytest.raises(BadInput, match=r"rest.npz: holds no x_embedder/proj"):
        describe_published(_save_file(path, rest), kind)


def test_the_newest_checkpoint_is_the_largest_number(tmp_path):
    source = next(CHECKPOINTS["meanflow"].glob("checkpoint_*"))
    shutil.copytree(source, tmp_path / "checkpoint_10")
    (tmp_path / "checkpoint_9").mkdir()
    (tmp_path / "checkpoint_11.orbax-checkpoint-tmp-1").mkdir()
    _assert_equal(read_published(tmp_path, "meanflow"), _published("meanflow")[0])


def _small_tree(value):
    return {"net": {"class_tokens": np.full((8, 4), value, np.float32)}}


def test_other_arrays_of_a_checkpoint_are_not_read(tmp_path):
    tree = {"params": _small_tree(1), "ema_params": _small_tree(2)}
    tree |= {"opt_state": {"mu": np.ones(3)}, "step": 5}
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
    message = "must be one of its averages: ema_params/1000, ema_params/500"
    refuses(message, read_published, path, "imf")
    with pytest.raises(BadInput, match="holds no ema_params/7, but ema_params"):
        read_published(path, "imf", section="ema_params/7")
    one = _save_orbax(tmp_path / "one" / "checkpoint_1", {"ema_params": {500: _small_tree(3)}})
    assert np.all(read_published(one, "imf")["class_tokens"] == 3)


# ---- files


@each_kind
def test_written_weights_have_the_published_names_and_are_read_back(tmp_path, kind):
    flat, patch_size = _published(kind)
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
    flat, _ = _published("imf")
    path = tmp_path / f"weights{suffix}"
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


# ---- fitting


def test_all_that_does_not_fit_is_named_in_one_error():
    """A second head may be absent where none is wanted."""

    def check(kind, flat, *parts):
        with pytest.raises(BadInput) as problem:
            fit_published(kind, flat, _like("imf"))
        assert all(part in str(problem.value) for part in parts), problem.value

    flat, _ = _published("imf")
    sampling = {name: array for name, array in flat.items() if not name.startswith("v_")}
    like = _like("imf", second_head=False)
    _assert_equal(fit_published("imf", sampling, like), like)
    del flat["u_final_layer/linear/_flax_linear/bias"]
    flat["mystery"] = np.ones(3, np.float32)
    flat["shared_blocks_7/norm1/kernel"] = np.ones(32, np.float32)
    flat["x_embedder/proj/kernel"] = np.ones((2, 2, 3, 32), np.float32)
    flat["x_embedder/proj/bias"] = np.ones((1, 32), np.float32)
    check(
        "imf",
        flat,
        "missing: u_final_layer/linear/_flax_linear/bias (u_head/final/bias);",
        "unknown to the network: mystery, shared_blocks_7/norm1/kernel"
        " (block_7/attention_norm/scale);",
        "x_embedder/proj/kernel (patch_embedding/kernel) is [2, 2, 3, 32], must become [16, 32]",
        "x_embedder/proj/bias (patch_embedding/bias) is [1, 32], must become [32]",
    )
    of_another_kind = "nothing published (block_0/attention/key/kernel)"
    check("meanflow", _published("meanflow")[0], of_another_kind, " and ", " more")
    path = CHECKPOINTS["imf"]
    with pytest.raises(BadInput, match=f"{path}: published imf parameters do not fit"):
        load_published(path, "imf", {"mystery": jnp.ones(3)})


# ---- what can be wrong with a path


def test_bad_paths_are_one_clear_line(tmp_path, capfd):
    damaged = "cannot be read as a published checkpoint"
    numbers = iter(range(99))
    folder = next(CHECKPOINTS["imf"].glob("checkpoint_*"))
    folder = shutil.copytree(folder, tmp_path / "damaged" / "checkpoint_3")
    for file in (folder / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])

    def npz(flat):
        return _save_file(tmp_path / f"{next(numbers)}.npz", flat)

    texts = [tmp_path / f"weights{suffix}" for suffix in (".txt", *SUFFIXES)]
    for path in texts:
        path.write_text("not an archive")
    no_checkpoint = r"must be a folder checkpoint_N, or end in .npz or .saf"
    for path, message in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path, "must be a folder checkpoint_N"),
        *zip(texts, (no_checkpoint, damaged, damaged), strict=True),
        (folder, damaged),
        (npz({}), "holds no parameters, but nothing"),
        (npz({"class_tokens": np.array([{}])}), damaged),
        (npz({"class_tokens": np.ones(3, int)}), "class_tokens is int64; must be"),
        (npz({"conv.weight": np.ones(3)}), "none of its parameters"),
        (npz(_published("pmf")[0]), "kind='imf': its parameters .* kind='pmf'"),
        (CHECKPOINTS["meanflow"], "kind='imf': its parameters are those of kind='meanflow'"),
    ):
        with pytest.raises(BadInput, match=message) as problem:
            read_published(path, "imf")
        assert str(path) in str(problem.value)
        assert "\n" not in str(problem.value)
        assert capfd.readouterr() == ("", "")
    with pytest.raises(BadInput, match="section='opt_state': must be one of ema_params, ema"):
        read_published(CHECKPOINTS["imf"], "imf", section="opt_state")


def test_weights_that_cannot_be_written(tmp_path):
    params = unflatten_dict({"u_head/final/bias": np.ones(16, np.float32)}, sep="/")
    with pytest.raises(BadInput, match=r"weights.pt: must end in .npz or .safetensors"):
        write_published(tmp_path / "weights.pt", "imf", params, patch_size=2)
    for suffix in SUFFIXES:
        (tmp_path / f"folder{suffix}").mkdir()
        for name in ("nothing/weights", "folder"):
            with pytest.raises(BadInput, match="cannot be written"):
                write_published(tmp_path / f"{name}{suffix}", "imf", params, patch_size=2)
        (tmp_path / f"folder{suffix}").rmdir()
    with pytest.raises(BadInput, match="'u_head/final/bias'"):
        write_published(tmp_path / "weights.npz", "meanflow", params, patch_size=2)
    assert list(tmp_path.iterdir()) == []

"""The Inception of FID: recorded features, the tap of sFID, weight files without PyTorch."""

import functools
import hashlib
import json
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from recorded import FOLDER, inception_weights
from safetensors.numpy import save_file

from mf_jax.metrics.inception import FEATURES, inception_features, load_inception
from mf_jax.published.torch_file import fit_state_dict, read_state_dict

CASE = dict(np.load(FOLDER / "inception.npz"))
META = json.loads(str(CASE["meta"]))
SIDES = sorted(int(name.removeprefix("in/images_")) for name in CASE if name.startswith("in/"))
TOLERANCE = 1e-5  # relative to the largest number
MAGIC = 0x1950A86A20F9469CFC6C
BAD_SHAPES = (2, 8, 8, 2), (8, 8, 3), (0, 8, 8, 3)
KINDS = {"<f4": "Float", "<f8": "Double", "<f2": "Half", "<i8": "Long"}


def _opcodes(value):
    """Return the opcodes that push a value; a dict becomes ordered, bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"J" + struct.pack("<i", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
    pairs = b"".join(_opcodes(part) for pair in value.items() for part in pair)
    return b"ccollections\nOrderedDict\n)R(" + pairs + b"u"


def _pickle(value):
    return b"\x80\x02" + _opcodes(value) + b"."


def _tensor(storage, shape, strides, *, offset=0):
    rest = (storage + b"Q", offset, tuple(shape), tuple(strides), False, {})
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _opcodes(rest) + b"R"


def _storage(key, dtype, size, *view):
    kind = b"ctorch\n" + KINDS[dtype].encode() + b"Storage\n"
    return _opcodes(("storage", kind, key, "cpu", size, *view))


def _state_dict(arrays, *view):
    """Return the pickle of arrays, each over a storage of its own, and the storages' bytes."""
    tensors, data = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        storage = _storage(str(i), array.dtype.str, array.size, *view)
        tensors[name] = _tensor(storage, array.shape, strides)
        data[str(i)] = array.tobytes(order="A")
    return _pickle(tensors), data


def _write_zip(path, pickled, data, **records):
    with zipfile.ZipFile(path, "w") as archive:
        files = {f"data/{k}": v for k, v in data.items()}
        for name, content in ({"data.pkl": pickled} | files | records).items():
            archive.writestr(f"weights/{name}", content)
    return path


def _write_old(path, pickled, data, sizes, *, little=True):
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": little})]
    parts += [pickled, pickle.dumps(list(data), 2)]
    for size, content in zip(sizes, data.values(), strict=True):
        parts += [struct.pack("<q", size), content]
    path.write_bytes(b"".join(parts))
    return path


def _save_old(path, arrays):
    return _write_old(path, *_state_dict(arrays, None), [array.size for array in arrays.values()])


def _save_zip(path, arrays):
    return _write_zip(path, *_state_dict(arrays), byteorder=b"little")


def _small():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 2, 1, 2), np.float32),
        "a.half": rng.standard_normal(5).astype(np.float16),
        "a.double": rng.standard_normal((2, 2)),
        "a.num_batches_tracked": np.array(7),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.fixture(scope="module")
def drawn():
    """Return the weights of the recorded case."""
    return inception_weights(META["seed"])


@pytest.fixture(scope="module")
def inception(drawn, tmp_path_factory):
    return load_inception(_save_old(tmp_path_factory.mktemp("weights") / "inception.pth", drawn))


def test_reference_features(inception):
    recorded = {name.split("/")[2] for name in CASE if name.startswith("out/")}
    assert recorded == set(FEATURES) - {"spatial"}
    assert len(SIDES) >= 4
    for side in SIDES:
        images = CASE[f"in/images_{side}"]
        features = inception_features(inception.params, images)
        shapes = {name: array.shape for name, array in features.items()}
        assert shapes == {name: (len(images), width) for name, width in FEATURES.items()}
        for name in recorded:
            theirs = CASE[f"out/{side}/{name}"]
            assert np.abs(features[name] - theirs).max() < TOLERANCE * np.abs(theirs).max(), name


def test_spatial_features_are_seven_channels_of_mixed_6_pixel_by_pixel(inception):
    """With a kernel of 0 every pixel is the bias after its ReLU, of seven channels."""
    layer = inception.params["Mixed_6d.branch1x1"]
    bias = np.arange(layer["bias"].size, dtype=np.float32) - 2
    layer = {"kernel": jnp.zeros_like(layer["kernel"]), "bias": jnp.asarray(bias)}
    images = CASE[f"in/images_{SIDES[0]}"]
    features = inception_features(inception.params | {"Mixed_6d.branch1x1": layer}, images)
    expected = np.tile([0, 0, 0, 1, 2, 3, 4], (len(images), 17 * 17))
    np.testing.assert_array_equal(features["spatial"], expected)
    images = np.stack([images[0, ..., :1]] * len(images))  # of one channel, shown as three
    images[1, 0, 0] ^= 255
    spatial = inception_features(inception.params, images)["spatial"].reshape(-1, 17, 17, 7)
    change = np.abs(spatial[1] - spatial[0]).sum(-1)
    assert change[:8, :8].sum() > change[9:, 9:].sum()


def test_every_product_is_of_the_highest_precision(inception):
    image = CASE[f"in/images_{SIDES[0]}"]
    program = str(jax.make_jaxpr(inception_features)(inception.params, jnp.asarray(image)))
    products = program.count("conv_general_dilated[") + program.count("dot_general[")
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products > 90


def test_other_images_are_refused():
    for image in (np.zeros((2, 8, 8, 3)), *(np.zeros(n, np.uint8) for n in BAD_SHAPES)):
        refuses(r"images are .*; must be uint8", inception_features, {}, image)


def test_a_file_is_known_by_its_hash_and_may_lack_counters_of_batches(drawn, inception, tmp_path):
    without = {name: array for name, array in drawn.items() if "num_batches" not in name}
    assert len(without) < len(drawn)
    path = tmp_path / "inception.safetensors"
    save_file(without, path)
    other = load_inception(path)
    assert other.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != inception.sha256
    jax.tree.map(np.testing.assert_array_equal, other.params, inception.params)
    bias = without["fc.bias"]
    without |= {"fc.bias": bias[:1000], "AuxLogits.fc.bias": bias}
    del without["Mixed_7c.branch_pool.bn.running_var"]
    save_file(without, path)
    message = (
        "inception.safetensors: .*missing: Mixed_7c.branch_pool.bn.running_var; "
        r"left over: AuxLogits.fc.bias; misshapen: fc.bias is \[1000\], must be \[1008\];"
    )
    refuses(message, load_inception, path)


def test_files_are_read_whatever_their_name_and_fitted_as_float32(tmp_path):
    small = _small()
    path, dtypes = tmp_path / "weights", {name: array.dtype for name, array in small.items()}
    for write in (_save_zip, _save_old, lambda path, arrays: save_file(arrays, path)):
        write(path, small)
        state, digest = read_state_dict(path), hashlib.sha256(path.read_bytes()).hexdigest()
        assert (state.path, state.sha256) == (str(path), digest)
        np.testing.assert_equal(state.arrays, small)
        assert {name: array.dtype for name, array in state.arrays.items()} == dtypes
    state.arrays.pop("a.num_batches_tracked")
    shapes = {name: array.shape for name, array in state.arrays.items()}
    fitted = fit_state_dict(state, shapes)
    assert {name: array.shape for name, array in fitted.items()} == shapes
    assert {array.dtype.name for array in fitted.values()} == {"float32"}


def test_tensors_may_share_a_storage_and_be_turned(tmp_path):
    """And dictionaries of Python 2 are lists of pairs."""
    numbers = np.arange(12, dtype=np.float32)
    storage, data = _storage("0", "<f4", 12), {"0": numbers.tobytes()}
    turned, end = numbers.reshape(4, 3).T, numbers[8:].reshape(2, 2)
    wanted = {"turned": turned, "end": end, "repeated": np.stack([numbers[:3]] * 2)}
    views = ((3, 4), (1, 3), 0), ((2, 2), (2, 1), 8), ((2, 3), (0, 1), 0)
    tensors = {
        name: _tensor(storage, shape, strides, offset=offset)
        for name, (shape, strides, offset) in zip(wanted, views, strict=True)
    }
    pair = b"](" + _opcodes("w") + _tensor(storage, (12,), (1,)) + b"e"
    pairs = b"ccollections\nOrderedDict\n](" + pair + b"e\x85R"
    for path, expected in (
        (_write_zip(tmp_path / "a.pth", _pickle(tensors), data), wanted),
        (_write_old(tmp_path / "b.pth", _pickle(tensors), data, [12]), wanted),
        (_write_zip(tmp_path / "c.pth", _pickle(pairs), data), {"w": numbers}),
    ):
        np.testing.assert_equal(read_state_dict(path).arrays, expected)


def test_what_a_pickle_asks_to_run_is_refused_and_not_run(tmp_path):
    """And a pickle cannot alter the functions that it may ask for."""
    marker, old, first = (tmp_path / name for name in ("marker", "old.pth", "first.pth"))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    evil = pickle.dumps(Evil(), 2)
    pickle.loads(evil)
    marker.rmdir()  # it would do so
    _write_old(old, evil, {}, [])
    first.write_bytes(evil + MAGIC.to_bytes(10, "little"))
    cases = [
        (old, "posix.mkdir"),
        (first, ""),
        (_write_zip(tmp_path / "new", evil, {}), "posix.mkdir"),
    ]
    state = b"(N" + _opcodes({"__defaults__": 1}) + b"tb"
    asked = "torch load,torch._utils _rebuild_sparse_tensor,numpy FloatStorage,collections abc"
    altered = "collections OrderedDict,torch._utils _rebuild_tensor_v2"
    for names, more in ((asked, b""), (altered, state)):
        for name in names.split(","):
            pickled = _pickle(b"c" + name.replace(" ", "\n").encode() + b"\n" + more)
            refused = "BUILD" if more else name.replace(" ", ".")
            cases.append((_write_zip(tmp_path / name, pickled, {}), refused))
    for path, refused in cases:
        message = f"asks for {refused}, which is refused" if refused else "cannot be read"
        refuses(f"{path}: .*{message}", read_state_dict, path)
        assert not marker.exists()


def test_damaged_and_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    pickled, data = _state_dict({"w": np.arange(4, dtype=np.float32)})
    foreign, _ = _state_dict({"w": np.zeros(4, "f4")}, ("0", 1, 2))
    zipped, old = functools.partial(_write_zip, path), functools.partial(_write_old, path)
    whole = lambda value: zipped(pickle.dumps(value, 2), data)  # noqa: E731
    cut = lambda path, end: path.write_bytes(path.read_bytes()[:end])  # noqa: E731
    cases = [
        ("no such file", lambda: None),
        ("cannot be read", lambda: path.write_bytes(pickle.dumps({}, 2))),
        ("cannot be read", lambda: zipped(pickled, {"0": data["0"][:-4]})),
        ("cannot be read", lambda: zipped(pickled, {})),
        ("must be little-endian", lambda: zipped(pickled, data, byteorder=b"big")),
        ("must be little-endian", lambda: old(pickled, data, [4], little=False)),
        ("does not have the 4 numbers of storage 0", lambda: old(pickled, data, [3])),
        ("cannot be read", lambda: cut(old(pickled, data, [4]), 120)),
        ("not have the 4", lambda: cut(old(pickled, data, [4]), -4)),
        ("cannot be read", lambda: cut(zipped(pickled, data), 120)),
        ("cannot be read", lambda: old(pickled, {"1": data["0"]}, [4])),
        ("holds a list", lambda: whole([1])),
        ("holds a dict without tensors", lambda: whole({"epoch": 3})),
        ("refers to", lambda: zipped(foreign, data)),
        ("refers to", lambda: zipped(_pickle(_opcodes(("a", "b", "c")) + b"Q"), data)),
    ]
    for shape, strides, offset in (  # outside of their storage
        ((5,), (1,), 0),
        ((2, 2), (2, 1), 1),
        ((2,), (-1,), 0),
        ((2,), (1,), -1),
        ((-2,), (1,), 0),
        ((2,), (1, 1), 0),
    ):
        tensor = _tensor(_storage("0", "<f4", 4), shape, strides, offset=offset)
        outside = _pickle({"w": tensor})
        cases.append(("cannot be read", functools.partial(zipped, outside, data)))
    for message, write in cases:
        path.unlink(missing_ok=True)
        write()
        refuses(f"{path}: .*{message}", read_state_dict, path)

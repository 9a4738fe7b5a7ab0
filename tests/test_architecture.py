"""Who may import whom, and what importing must not do."""

import ast
import configparser
import itertools
import subprocess
import sys

from conftest import ROOT

LAYERS = [
    ["main", "arguments", "bench", "train", "evaluate", "sampling", "prepare"],
    ["loading", "generator", "scoring"],
    ["step", "validation", "config"],
    ["data", "metrics", "models", "objectives", "published", "reporting"],
    ["optim", "runtime"],
    ["types", "flow"],
]
"""Imports go down, or within a layer to the right."""
PLACES = {part: place for place, part in enumerate(itertools.chain(*LAYERS))}
APART = {"models", "metrics", "objectives"}
"""Packages that never import one another; `draws` alone stands between objectives and the rest."""
LAZY = {"couplings.py": {"optax"}}
"""Of the core, where a class imports it when it is used."""
CORE = {"jax", "flax", "jaxtyping", "mf_jax", *sys.stdlib_module_names}
"""What `flow` and `objectives` may import: they are a library for any other code."""


def _imports(tree):
    """Return the modules that a file imports, for example {"mf_jax.flow.times", "jax"}."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"mf_jax.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "mf_jax" else {node.module}
    return found


def test_imports_go_down_and_no_work_is_unfinished():
    for path in sorted((ROOT / "mf_jax").rglob("*.py")):
        part = path.relative_to(ROOT / "mf_jax").parts[0].removesuffix(".py")
        text = path.read_text()
        tree = ast.parse(text)
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), path
        assert not any(word in text for word in ("TODO", "FIXME", "XXX")), path
        if part == "__init__":
            continue
        modules = _imports(tree)
        for other in {name.split(".")[1] for name in modules if name.startswith("mf_jax.")} - {
            part
        }:
            assert PLACES[other] > PLACES[part], f"{path} imports {other}, which is not below it"
            assert not {part, other} <= APART, f"{path} imports {other}"
        if part in ("flow", "objectives"):
            parts = {name.split(".")[0] for name in modules}
            assert parts <= CORE | LAZY.get(path.name, set()), path


def _prints(code):
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


LIGHT = """
import os, sys
sys.modules["fcntl"] = None  # also where Python has no locks of files and does not count cores
del os.sched_getaffinity
from mf_jax.main import main
sys.argv[1:] = ["--config=configs/digit.py"]
print(main(), "jax" in sys.modules)  # a misspelt config
from mf_jax import data
print("PIL" in sys.modules)
import mf_jax.train
heavy = {"grain", "matplotlib", "orbax", "sklearn", "tensorflow_datasets"}
print(sorted(heavy & set(sys.modules)))
import mf_jax, mf_jax.evaluate, mf_jax.sampling, mf_jax.data.pictures, mf_jax.prepare
import tensorflow_datasets as tfds
with tfds.testing.mock_data(num_examples=5):
    keys = dict(path="", image_size=16, dataset="cifar10")
    keys |= dict(split_train="train", split_held_out="test")
    source = data.make_source(dict(name="tfds", **keys), split="train")
    x, labels, *_ = data.read(source)
    next(data.make_batches(source, batch_size=6, seed=0, flip=True))
    expected = [record["label"] for record in tfds.data_source("cifar10", split="train")]
print(x.shape, source.spec.num_classes, -1 <= x.min() < -0.5 < 0.5 < x.max() <= 1)
print(labels.tolist() == expected, sorted({"torch", "tensorflow"} & set(sys.modules)))
import jax
print(jax._src.xla_bridge.backends_are_initialized())
print(all(getattr(mf_jax, name) for name in mf_jax.__all__))
"""


def test_importing_is_light_and_neither_it_nor_a_set_of_tfds_needs_a_device_or_tensorflow():
    seen = ["2 False", "False", "[]", "(5, 16, 16, 3) 10 True", "True []", "False", "True"]
    assert _prints(LIGHT) == seen


CORE_ALONE = """
import sys, jax, jax.numpy as jnp, mf_jax
print(all(getattr(mf_jax, name) for name in set(mf_jax.__all__) - {"Generator", "load"}))
x = jax.random.normal(jax.random.key(0), (8, 2))
draws = mf_jax.DrawScheme(mf_jax.UniformTimes()).draw(jax.random.key(1), x)
field = lambda params, z, **told: params * z
jax.grad(lambda p: mf_jax.MeanFlow().loss(field, p, draws)[0])(1.0)
mf_jax.check(field, 1.0, draws), mf_jax.sample(field, 1.0, x)
try:
    mf_jax.sample(field, 1.0, x, steps=2.0)  # here nobody checks the types of arguments
except mf_jax.BadInput as problem:
    print(problem)
heavy = "orbax grain sklearn matplotlib tensorflow ml_collections optax"
print(sorted(set(heavy.split()) & set(sys.modules)))
"""


def test_the_core_brings_nothing_heavy():
    assert _prints(CORE_ALONE) == ["True", "steps=2.0: must be a whole number", "[]"]


def test_every_package_is_installed():
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    folders = {f"mf_jax.{path.parent.name}" for path in (ROOT / "mf_jax").glob("*/__init__.py")}
    packages = set(listed["options"]["packages"].split())
    assert packages == folders | {"mf_jax", "mf_jax.configs"}
    others = (path for path in (ROOT / "mf_jax").rglob("*.*") if path.suffix not in (".py", ".pyc"))
    data = {f"mf_jax.{path.parent.name}": path.name for path in others}
    assert data == dict(listed["options.package_data"])

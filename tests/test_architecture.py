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
        for other in {name.split(".")[1] for name in modules if name.startswith("mf_jax.")}:
            if other == part:
                continue
            assert PLACES[other] > PLACES[part], f"{path} imports {other}, which is not below it"
            assert not {part, other} <= APART, f"{path} imports {other}"
        if part in ("flow", "objectives"):
            assert {name.split(".")[0] for name in modules} <= CORE | LAZY.get(path.name, set()), (
                path
            )


def test_importing_is_light_and_starts_no_device():
    """Also where Python has no locks of files and does not count cores."""
    code = (
        "import os, sys; sys.modules['fcntl'] = None; del os.sched_getaffinity\n"
        "import mf_jax.main; print('jax' in sys.modules)\n"
        "import mf_jax.train\n"
        "print(sorted({'grain', 'matplotlib', 'orbax', 'sklearn'} & set(sys.modules)))\n"
        "import mf_jax.evaluate, mf_jax.sampling, jax\n"
        "import mf_jax.data.image_folder, mf_jax.prepare\n"
        "print(jax._src.xla_bridge.backends_are_initialized())\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))\n"
        "print(all(getattr(mf_jax, name) for name in mf_jax.__all__))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n") == ["False", "[]", "False", "[]", "True", ""]


def test_the_core_brings_nothing_heavy():
    code = (
        "import sys, jax, jax.numpy as jnp, mf_jax\n"
        "core = set(mf_jax.__all__) - {'Generator', 'load'}\n"
        "print(all(getattr(mf_jax, name) for name in core))\n"
        "x = jax.random.normal(jax.random.key(0), (8, 2))\n"
        "draws = mf_jax.DrawScheme(mf_jax.UniformTimes()).draw(jax.random.key(1), x)\n"
        "field = lambda params, z, **told: params * z\n"
        "jax.grad(lambda p: mf_jax.MeanFlow().loss(field, p, draws)[0])(1.0)\n"
        "mf_jax.check(field, 1.0, draws), mf_jax.sample(field, 1.0, x)\n"
        "heavy = 'orbax grain sklearn matplotlib tensorflow ml_collections optax'\n"
        "print(sorted(set(heavy.split()) & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n") == ["True", "[]", ""]


def test_every_package_is_installed():
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    folders = {f"mf_jax.{path.parent.name}" for path in (ROOT / "mf_jax").glob("*/__init__.py")}
    packages = set(listed["options"]["packages"].split())
    assert packages == folders | {"mf_jax", "mf_jax.configs"}
    others = (path for path in (ROOT / "mf_jax").rglob("*.*") if path.suffix not in (".py", ".pyc"))
    data = {f"mf_jax.{path.parent.name}": path.name for path in others}
    assert data == dict(listed["options.package_data"])

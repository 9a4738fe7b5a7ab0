"""Who may import whom, and what importing must not do."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

LAYERS = [
    ["main"],
    ["job"],
    ["bench"],
    ["train", "evaluate", "sample", "prepare"],
    ["fid"],
    ["score_rows"],
    ["judge"],
    ["loading"],
    ["generator", "warm_start"],
    ["workdir", "report_page"],
    ["config", "checkpoint"],
    ["grid"],
    ["build", "decoding", "state"],
    ["optim", "sharding", "data", "report", "pictures", "plots"],
    ["diagnostics", "objectives"],
    ["guidance", "samplers"],
    ["draws"],
    ["models", "metrics"],
    ["reference"],
    ["paths", "times", "weights"],
    ["processes", "files"],
    ["types"],
]
APART = ("models", "metrics", "objectives")
"""Packages that never import one another; `draws` alone stands between objectives and the rest."""


def _layer(part):
    (found,) = [i for i, layer in enumerate(LAYERS) if part in layer]
    return found


def _imports(path):
    """Return the parts of mf_jax that a file imports, for example {"paths", "models"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mf_jax":
            names = [f"mf_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("mf_jax.")}
    return found


def _files():
    for path in sorted((ROOT / "mf_jax").rglob("*.py")):
        part = path.relative_to(ROOT / "mf_jax").parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


@pytest.mark.parametrize(("part", "path"), list(_files()), ids=lambda v: getattr(v, "stem", v))
def test_imports_go_down(part, path):
    for other in _imports(path) - {part}:
        assert _layer(other) > _layer(part), f"{path.name} ({part}) imports {other}, which is not below it"
        assert not (part in APART and other in APART), f"{part} imports {other}"


def test_no_assert_and_no_unfinished_work_outside_tests():
    for _, path in _files():
        text = path.read_text()
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text))), path
        assert not any(word in text for word in ("TODO", "FIXME", "XXX")), path


def test_importing_starts_no_device_and_needs_no_other_framework():
    code = (
        "import sys, mf_jax, mf_jax.main, mf_jax.train, mf_jax.evaluate, mf_jax.sample, jax\n"
        "print(jax._src.xla_bridge.backends_are_initialized(), sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[0] == "False []"

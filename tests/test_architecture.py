"""Who may import whom, and what importing must not do."""

import ast
import itertools
import subprocess
import sys

import pytest
from conftest import ROOT

LAYERS = [
    ["main", "bench", "train", "evaluate", "fid", "sampling", "prepare"],
    ["loading", "generator", "scoring"],
    ["step", "config"],
    ["data", "metrics", "models", "objectives", "reporting", "published"],
    ["optim", "runtime"],
    ["flow", "errors"],
]
"""Imports go down, or within a layer to the right."""
PENDING = {
    ("scoring", "loading"),
}
APART = ("models", "metrics", "objectives")
"""Packages that never import one another; `draws` alone stands between objectives and the rest."""


def _place(part):
    (found,) = [i for i, name in enumerate(itertools.chain(*LAYERS)) if part == name]
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
        if (part, other) in PENDING:
            continue
        assert _place(other) > _place(part), (
            f"{path.name} ({part}) imports {other}, which is not below it"
        )
        assert not (part in APART and other in APART), f"{part} imports {other}"


def test_no_assert_and_no_unfinished_work_outside_tests():
    for _, path in _files():
        text = path.read_text()
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text))), path
        assert not any(word in text for word in ("TODO", "FIXME", "XXX")), path


def test_importing_starts_no_device_and_needs_no_other_framework():
    code = (
        "import sys, mf_jax, mf_jax.main, mf_jax.train, mf_jax.evaluate, mf_jax.sampling, jax\n"
        "print(jax._src.xla_bridge.backends_are_initialized(), sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[0] == "False []"

"""Every config is small, explained and sound."""

import ast
import importlib
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_published_configs import CONFIGS as PUBLISHED
from test_published_configs import stand_in

from mf_jax.config import validate

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "default")
HARDLY_A_DELTA = 25


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_a_small_delta_that_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert function.end_lineno - function.lineno < HARDLY_A_DELTA
    for word in ("Hardware:", "Command:"):
        assert word in ast.get_docstring(tree)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_valid(path, tmp_path):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    config.data.path = str(tmp_path)
    source = (
        stand_in(path.stem, config) if path.stem in PUBLISHED else None
    )  # their data are not here
    assert len(validate(config, num_devices=1, source=source)) > 0


def test_every_key_has_a_comment():
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    inside = [line for line in lines if line.startswith("        ") and "=" in line]
    assert len(inside) > 40
    assert [line for line in inside if "#" not in line] == []


def test_no_default_is_none():
    """The command line could not override it."""
    config = importlib.import_module("configs.default").get_config()
    assert all(
        value is not None
        for section in config.to_dict().values()
        if isinstance(section, dict)
        for value in section.values()
    )


def test_no_dead_option():
    """Every key is read somewhere: as an attribute of the config, or as an argument of what its section builds."""
    code = "\n".join(path.read_text() for path in (ROOT / "mf_jax").rglob("*.py"))
    config = importlib.import_module("configs.default").get_config()
    keys = [key for section in config.values() if hasattr(section, "keys") for key in section]
    assert [key for key in keys if not re.search(rf"\b{key}\b", code)] == []

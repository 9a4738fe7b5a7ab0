"""Every row of every config is sound, has the published network, and is what the docs print."""

import ast
import functools
import inspect
import json
import re

import jax
import numpy as np
import pytest
from conftest import ROOT, refuses
from flax.traverse_util import flatten_dict
from PIL import Image
from recorded import FOLDER

from configs import cifar10, digits, imagenet, imagenet_b2, mnist, pictures, toy2d
from configs.default import get_config as defaults
from mf_jax.bench.step import Noise
from mf_jax.config import averages, make_network, make_objective
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.records import DataSpec
from mf_jax.models import SIZES, parameter_shapes
from mf_jax.objectives import OBJECTIVES
from mf_jax.scoring.rows import cells
from mf_jax.validation import validate

CONFIGS = {
    f"{module.__name__.partition('.')[2]}:{row}": functools.partial(module.get_config, row)
    for module in (imagenet, cifar10, digits, mnist, pictures)
    for row in module.ROWS
}
PUBLISHED = {name: make for name, make in CONFIGS.items() if name[:5] in ("image", "cifar")}
CONFIGS |= {"imagenet_b2": imagenet_b2.get_config, "toy2d": toy2d.get_config}
COUNTS = json.loads((FOLDER / "parameter_counts.json").read_text())
UNET = 55_929_347, 55_932_419
"""Parameters of the published U-Net without and with the embedding of augmentation labels."""


def stand_in(config):
    """Return noise with the shape and the classes of the data of a published result."""
    side = config.data.image_size
    shape = (side // 8, side // 8, 4) if config.data.name == "latents" else (side, side, 3)
    return Noise(DataSpec(shape, 0 if side == 32 else 1000))


def _shapes(config, *, for_sampling=False):
    source, config.model.scan = stand_in(config), True  # as many parameters, traced sooner
    network = make_network(config, source.spec, for_sampling=for_sampling)
    return parameter_shapes(network, source.spec.shape)


def _sampled(shapes):
    """Return what sampling needs of the shapes of a network."""
    return {name: value for name, value in shapes.items() if name != "v_head"}


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_config_is_valid_and_so_is_its_evaluation(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    for name, get_config in CONFIGS.items():
        config = get_config()
        config.data.path, config.model.scan = str(tmp_path), True
        is_published = name in PUBLISHED or name == "imagenet_b2"
        source = stand_in(config) if is_published else None  # their data are not here
        source = Noise(DataSpec((28, 28, 1), 10)) if name.startswith("mnist") else source
        assert len(validate(config, num_devices=8 if is_published else 1, source=source)) > 0, name
        grid = cells(config)
        assert {cell.plan.steps for cell in grid} == set(config.eval.steps), name
        assert {cell.ema for cell in grid} <= set(averages(config)), name
        if is_published:
            data = "cifar10" if name.startswith("cifar10") else f"imagenet{config.data.image_size}"
            assert config.eval.references == (f"data/{data}_reference.npz",), name
            assert config.eval.num_samples == 50_000, name
            if config.draws.omega_max > 1:  # the pictures of a run are drawn as it is evaluated
                assert {cell.plan.guidance for cell in grid} == {config.sample.guidance}, name
                assert config.sample.ema in ("", *config.eval.emas), name


def test_every_config_file_says_what_it_is_for():
    files = [p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("default", "rows")]
    assert {path.stem for path in files} == {name.split(":")[0] for name in CONFIGS}
    for path in files:
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert "Hardware:" in text, path
        assert f"configs/{path.stem}.py" in text or path.stem == "digits", path


def test_networks_have_the_published_size_and_rows_say_it():
    for row in cifar10.ROWS:
        config = cifar10.get_config(row)
        assert _count(_shapes(config)) == UNET[1]
        config.data.augment = "none"
        assert _count(_shapes(config)) == UNET[0]
    for name, row in imagenet.ROWS.items():
        config = imagenet.get_config(name)
        kind, size, patch = re.split("[-/]", row.network)
        trained = _shapes(config)
        if name in ("b2", "imf_b2", "pmf_b16"):
            assert _shapes(config, for_sampling=True) == _sampled(trained)
        sampled = _count(_sampled(trained))
        published = {"DiT": "DiT", "iMF": "imfDiT", "pMF": "pmfDiT"}[kind]
        published = f"{published}_{size}_{patch}"
        if kind == "DiT":
            flat = flatten_dict(trained, sep="/")  # counted without a guidance input and its norms
            plain = {k: v for k, v in flat.items() if "guidance" not in k and "_norm" not in k}
            assert _count(plain) == COUNTS[published], name
        else:
            assert _count(trained) == COUNTS[f"{published}:training"], name
            head = trained["v_head"] if kind == "iMF" else {}  # published in part, never read
            dead = [head[key] for key in ("norm", "final") if key in head]
            assert sampled + _count(dead) == COUNTS[f"{published}:sampling"], name
        assert round(sampled / 1e6) == row.millions, name
    used = {imagenet.get_config(name).model.size for name in imagenet.ROWS if "mf_" in name}
    assert used == set(SIZES["in_context_dit"]) - {"digits"}


def test_rows_say_what_their_config_does_and_the_docs_print_them():
    docs = (ROOT / "docs" / "imagenet.md").read_text()
    assert imagenet.page(docs) == docs, "stale; python -m configs.imagenet --write"
    assert imagenet.page(docs.replace("| 3.43 |", "| 3.34 |")) == docs
    for name, row in imagenet.ROWS.items():
        config = imagenet.get_config(name)
        epochs = config.train.num_steps * config.train.batch_size / imagenet.IMAGES
        assert epochs == pytest.approx(row.epochs, abs=0.2), name
        guidance = config.guidance
        if config.draws.omega_max > 1:
            assert row.guidance == (config.eval.omegas[0], *config.eval.intervals[0]), name
        elif (guidance.omega, guidance.kappa) != (1, 0):
            scale = guidance.omega / (1 - guidance.kappa)
            assert row.guidance == pytest.approx((scale, 0.0, guidance.t_max)), name
        else:
            assert row.guidance == (), name
        assert row.one or f"- `{name}`: No figure is published." in docs, name
    assert CONFIGS["imagenet_b2"]().to_dict() == imagenet.get_config("b2").to_dict()


def test_every_key_has_a_comment_and_a_default_that_the_command_line_can_override():
    """And is read: as an attribute of the config, or as an argument of a record."""
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    inside = [line for line in lines if line.startswith("        ") and "=" in line]
    assert len(inside) > 40
    assert [line for line in inside if "#" not in line] == []
    sections = [part for part in defaults().to_dict().values() if isinstance(part, dict)]
    keys = [pair for section in sections for pair in section.items()]
    assert all(value is not None for _, value in keys)
    code = "\n".join(path.read_text() for path in (ROOT / "mf_jax").rglob("*.py"))
    assert [key for key, _ in keys if not re.search(rf"\b{key}\b", code)] == []


def test_the_derivative_and_the_sum_or_mean_of_the_weight_are_keys():
    config = defaults()
    for name, record in OBJECTIVES.items():
        config.objective.name, config.weight.of = name, "mean"
        config.objective.derivative, config.objective.derivative_delta = "central", 0.01
        if "derivative" not in inspect.signature(record).parameters:
            refuses(rf"^objective.derivative='central'.*{name} takes no", make_objective, config)
            config.objective.derivative, config.objective.derivative_delta = "jvp", 0.0
            assert make_objective(config).weight.of == "mean"
        else:
            assert make_objective(config).derivative == Derivative("central", 0.01)
    config.objective.name = "meanflow"
    for kind, delta, match in (("cental", 0.0, "central"), ("jvp", 0.1, "derivative_delta=0.1")):
        config.objective.derivative, config.objective.derivative_delta = kind, delta
        refuses(f"^objective.*{match}", validate, config, num_devices=1)

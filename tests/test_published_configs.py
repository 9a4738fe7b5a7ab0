"""The configs of published results: networks of the published size, valid evaluations, and a step that trains.

Their data are not here; `stand_in` takes their place.
"""

import ast
import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from recorded import FOLDER

from configs.imagenet_b4 import IMAGES
from mf_jax.bench.step import Noise
from mf_jax.config import averages, make_network, validate
from mf_jax.models import parameter_shapes
from mf_jax.scoring.grid import cells
from mf_jax.step import NEVER, initial_state, make_train_step
from mf_jax.train import step_parts

CONFIGS = sorted(
    path.stem
    for kind in ("imagenet*", "cifar10*")
    for path in (ROOT / "configs").glob(f"{kind}.py")
)
COUNTS = json.loads((FOLDER / "parameter_counts.json").read_text())
EDM_UNET = 55_733_891 - 9 * 128
"""What EDM prints for its U-Net, less its augmentation labels."""
ROWS = {  # one step, two steps where that is published
    "imagenet_b4": ("11.4",),
    "imagenet_b2": ("6.17",),
    "imagenet_m2": ("5.01",),
    "imagenet_l2": ("3.84",),
    "imagenet_xl2": ("3.43", "2.93"),
    "imagenet_imf_b2": ("3.39",),
    "imagenet_imf_m2": ("2.27",),
    "imagenet_imf_l2": ("1.86",),
    "imagenet_imf_xl2": ("1.72", "1.54"),
    "imagenet_pmf_b16": ("3.12",),
    "imagenet_pmf_l16": ("2.52",),
    "imagenet_pmf_h16": ("2.22",),
    "imagenet_pmf_b32": ("3.70",),
    "imagenet_pmf_l32": ("2.75",),
    "imagenet_pmf_h32": ("2.48",),
    "imagenet_alphaflow_xl2": ("2.95", "2.34"),
    "imagenet_soflow_b2": ("4.85", "4.24"),
    "imagenet_soflow_m2": ("3.73", "3.42"),
    "imagenet_soflow_l2": ("3.20", "2.90"),
    "imagenet_soflow_xl2": ("2.96", "2.66"),
    "cifar10": ("2.92",),
    "cifar10_soflow": ("2.86", "2.28"),
}
"""FID of every published result of these families."""
each_config = pytest.mark.parametrize("name", CONFIGS)


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def stand_in(name, config):
    """Return a source of noise with the shape and the classes of a config's data."""
    side = config.data.image_size
    shape = (side // 8, side // 8, 4) if config.data.name == "latents" else (side, side, 3)
    return Noise(shape, num_classes=0 if name.startswith("cifar10") else 1000)


def published_name(config):
    """Return what the table of published parameter counts calls the network of a config."""
    kind = {"dit": "DiT", "in_context_dit": "pmfDiT" if "pixel" in config.model.size else "imfDiT"}
    return f"{kind[config.model.name]}_{config.model.size.removeprefix('pixel_')}_{config.model.patch_size}"


traced = functools.cache(parameter_shapes)
"""Several configs have the same network."""


def parameters(name, *, for_sampling=False):
    config, source = load(name), stand_in(name, load(name))
    about = {"shape": source.shape, "num_classes": source.num_classes}
    return traced(make_network(config, **about, for_sampling=for_sampling), source.shape)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@each_config
def test_the_network_has_the_published_size(name):
    config = load(name)
    if (
        config.model.name == "unet"
    ):  # and an embedding of t - r beside that of t: two layers of 128 and 512 inputs
        assert count(parameters(name)) == EDM_UNET + 128 * 512 + 512 + 512 * 512 + 512
    elif config.model.name == "dit":
        assert count(parameters(name)) == COUNTS[published_name(config)]
    else:
        dead = parameters(name)["v_head"] if config.objective.name == "improved_meanflow" else {}
        dead = {
            key: value for key, value in dead.items() if key in ("norm", "final")
        }  # published, never read
        assert count(parameters(name)) == COUNTS[f"{published_name(config)}:training"]
        sampled = count(parameters(name, for_sampling=True)) + count(dead)
        assert sampled == COUNTS[f"{published_name(config)}:sampling"]


@each_config
def test_it_is_valid_on_8_devices_and_so_is_its_evaluation(name, monkeypatch):
    monkeypatch.setattr("mf_jax.config.parameter_shapes", traced)
    config = load(name)
    validate(config, num_devices=8, source=stand_in(name, config))
    grid = cells(config)
    assert {cell.steps for cell in grid} == set(config.eval.steps)
    assert {cell.ema for cell in grid} <= set(averages(config))
    assert config.eval.num_samples == 50_000
    assert config.eval.references == (
        f"data/{'cifar10' if 'cifar10' in name else _side(config)}_reference.npz",
    )
    if config.draws.omega_max > 1:  # the pictures of a run are drawn as it is evaluated
        assert [cell.guidance for cell in grid] == [config.sample.guidance]
        assert config.sample.ema in ("", *config.eval.emas)


def _side(config):
    return f"imagenet{config.data.image_size}"


def _reduced(name):
    """Return a config's copy whose network is tiny, and data to fit."""
    config = load(name)
    config.model.update(
        depth=1, width=16, num_heads=2, channels=8, channel_multipliers=(1,), num_blocks=1
    )
    config.model.update(dtype="float32", patch_size=2, scan=False, remat="none")
    if config.model.name == "in_context_dit":
        config.model.head_depth = 1
        config.model.bottleneck = 5 if config.model.size.startswith("pixel") else 0
    config.train.batch_size = 4
    full = stand_in(name, config)
    return config, Noise((4, 4, full.shape[-1]), num_classes=full.num_classes and 3)


def _random(shapes):
    """Return parameters drawn without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


PROGRAM = (
    "data",
    "model",
    "objective",
    "guidance",
    "weight",
    "controls",
    "times",
    "draws",
    "optim",
    "ema",
)
NO_MATTER = ("path", "image_size", "size", "anneal_from", "anneal_to")
"""The reduced copies are of one size."""


def _program(config):
    """Return what decides the program of a step: of numbers only whether they leave something out."""

    def kind(value):
        if isinstance(value, tuple | list):
            return tuple(map(kind, value))
        return value == 0 if isinstance(value, float) else value

    return tuple(
        (key, kind(value))
        for part in PROGRAM
        for key, value in config[part].items()
        if key not in NO_MATTER
    )


trained = {}
"""Of each program the state before a step and after it: compiling one takes most of ten seconds."""


@each_config
def test_a_step_of_a_tiny_copy_trains(name):
    config, source = _reduced(name)
    if (program := _program(config)) not in trained:
        parts = step_parts(config, source)
        batch = source.gather(np.arange(4))
        before = initial_state(parts, _random(parameter_shapes(parts.network, parts.shape)))
        trained[program] = before, jax.jit(make_train_step(parts))(before, batch.x, batch.labels)
    before, after = trained[program]
    assert int(after.first_bad_step) == NEVER
    assert jnp.isfinite(after.metrics["loss"].total)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, after.params)
    assert any(jax.tree.leaves(moved))
    for average in after.ema.values():
        nearer = jax.tree.map(lambda e, b: bool(jnp.any(e != b)), average, before.params)
        assert any(jax.tree.leaves(nearer))


def test_every_published_result_has_a_config_that_says_it():
    assert set(ROWS) <= set(CONFIGS)
    for name, figures in ROWS.items():
        docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
        first, *_ = docstring.split("\n\n")
        for figure in figures:
            assert figure in first, name
        assert ("perceptual" in docstring) == ("_pmf_" in name), name
        assert "Evaluation: --mode=eval" in docstring


def test_what_is_not_published_says_so():
    for name in set(CONFIGS) - set(ROWS):
        docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
        assert "no figure is published" in " ".join(docstring.split()), name


def _table():
    """Return the rows of the page's table by config."""
    lines = (ROOT / "docs" / "imagenet.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if re.match(r"\| `(imagenet|cifar)", line)
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


@each_config
def test_the_page_says_what_the_config_does(name):
    config = load(name)
    network, million, epochs, batch, one, two, told, _ = _table()[name]
    size = config.model.size.removeprefix("pixel_") if config.model.name != "unet" else ""
    assert size in network
    assert round(count(parameters(name, for_sampling=True)) / 1e6) == int(million.removesuffix("M"))
    assert config.train.batch_size == int(batch)
    if name.startswith("imagenet"):
        assert config.train.num_steps == int(epochs) * IMAGES // int(batch)
    else:
        assert config.train.num_steps == int(epochs.split()[0].replace(",", ""))
    assert (*ROWS.get(name, ()), "", "")[:2] == (one, two)
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", told)]
    if config.draws.omega_max > 1:
        assert tuple(numbers[:3]) == (config.eval.omegas[0], *config.eval.intervals[0])
    elif config.guidance.kappa:
        scale = config.guidance.omega / (1 - config.guidance.kappa)
        assert numbers == pytest.approx([scale, config.guidance.t_start, config.guidance.t_end])
    else:
        assert told == ""


def test_the_page_has_every_config():
    assert set(_table()) == set(CONFIGS)

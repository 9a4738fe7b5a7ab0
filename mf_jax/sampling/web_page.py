"""A generator as one HTML page that draws in a browser: no server, no library, no network access.

`page.html` computes the blocks of a dit in JavaScript, in float32. What depends on times alone is
computed here, for each interval of each number of steps: embeddings, and the factors of a step.
"""

import base64
import html
import itertools
import json
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from mf_jax.config import ends_at_data, has_null, learns_average
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import Condition, DataSpec
from mf_jax.flow.sampler import SamplePlan
from mf_jax.generator import Generator
from mf_jax.models import DataPrediction
from mf_jax.models.blocks import unstack_blocks
from mf_jax.models.dit import DECOUPLED, DiT, num_r_blocks
from mf_jax.models.layers import ConditionEmbedding, sine_cosine_positions
from mf_jax.runtime.files import replace_file

_STEPS, _MOST_STEPS = (1, 2, 4, 8), 64
_MOST_BYTES = 2**26  # of weights; a page is a third larger
_Times = Float[np.ndarray, "n"]


def write_page(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Write the page, which starts with the steps of a plan, into the folder of a run.

    BadInput says why a page cannot run the generator.
    """
    spec, network, clip = generator.spec, generator.network, 0.0
    if isinstance(network, DataPrediction):
        network, clip = network.network, network.t_clip
    _check(generator, network, plan)
    counts = sorted({*_STEPS, plan.steps})
    grids = [SamplePlan(steps).grid for steps in counts]
    t, r = np.float32([ends for grid in grids for ends in itertools.pairwise(grid)]).T
    is_map = learns_average(generator.config)
    # a and b of steps a z + b f, where f is the network's velocity or data
    share = (t - r) / np.maximum(t, clip) if clip else t - r
    factors = np.stack([1 - share, share] if clip else [np.ones_like(t), -share], axis=1)
    arrays = _weights(generator.params, network, spec)
    arrays["times"] = _embedded_times(generator, network, t, r if is_map else t)
    about = {
        "arrays": [(name, array.size) for name, array in arrays.items()],
        "steps": {steps: sum(counts[:i]) for i, steps in enumerate(counts)},
        "factors": factors.tolist(),
        "chosen": plan.steps,
        **_description(generator, network),
    }
    parts = {
        "title": html.escape(path.parent.resolve().name),
        "about": json.dumps(about).replace("<", r"\u003c"),
        "weights": base64.b64encode(b"".join(a.tobytes() for a in arrays.values())).decode(),
    }
    page = LocalPath(__file__).with_name("page.html").read_text("utf-8")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    replace_file(path, page.encode(errors="backslashreplace"))  # folders are named by any bytes


def _check(generator: Generator, network: Any, plan: SamplePlan) -> None:
    config, spec = generator.config, generator.spec
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(generator.params))
    limits = {
        f"model.name={config.model.name} (it runs dit)": type(network) is not DiT,
        f"model.norm={config.model.norm}": config.model.norm != "layer",
        "model.told_guidance": config.model.told_guidance,
        f"times.name={config.times.name}, of one step": ends_at_data(config),
        f"data.name={config.data.name}": config.data.name == "latents",
        f"samples of shape {spec.shape}": not spec.is_picture or spec.shape[-1] not in (1, 3),
        f"data with {', '.join(spec.more)}": bool(spec.more),
        f"sample.steps={plan.steps} (it takes {_MOST_STEPS})": plan.steps > _MOST_STEPS,
        f"{size / 1e6:.0f} MB of weights (it holds {_MOST_BYTES / 1e6:.0f})": size > _MOST_BYTES,
    }
    if found := [name for name, is_beyond in limits.items() if is_beyond]:
        raise BadInput(f"no page, which is not made for {', '.join(found)}")


def _weights(params: Any, network: DiT, spec: DataSpec) -> dict[str, Float[np.ndarray, "..."]]:
    """Return arrays by name; a row of a kernel is what one output is told of all inputs."""
    flat = flatten_dict(unstack_blocks(jax.device_get(params)), sep="/")
    arrays = {
        name: np.ascontiguousarray(array.T if name.endswith("/kernel") else array, "<f4")
        for name, array in flat.items()
        if not name.startswith("condition/")
    }
    grid = (side // network.patch_size for side in spec.shape[:2])
    arrays["positions"] = sine_cosine_positions(*grid, num_features=network.width)
    labels = flat.get("condition/label_embedding/embedding", np.zeros((1, network.width)))
    arrays["labels"] = np.float32(labels)
    return arrays


def _embedded_times(
    generator: Generator, network: DiT, t: _Times, r: _Times
) -> Float[np.ndarray, "k n d"]:
    """Return what blocks are told of times, from the network itself: of t|r that of t, then of r.

    The page adds the embedding of labels.
    """
    network = network.clone(num_classes=0)
    z, condition = jnp.zeros((len(t), *generator.spec.shape)), Condition(jnp.zeros(len(t), int))
    kept = {"capture_intermediates": lambda module, _: isinstance(module, ConditionEmbedding)}

    @jax.jit
    def embed(params: Any, t: Any, r: Any) -> Any:
        told = {"r": r, "t": t, "condition": condition}
        with jax.default_matmul_precision("highest"):
            _, seen = network.apply({"params": params}, z, **told, **kept, mutable="intermediates")
        return jnp.stack(seen["intermediates"]["condition"]["__call__"])

    return np.asarray(embed(generator.params, t, r), "<f4")


def _description(generator: Generator, network: DiT) -> Mapping[str, Any]:
    """Return what the page must know of the network and of the data, and tells of them."""
    spec, config = generator.spec, generator.config
    last = network.time_conditioning == DECOUPLED and num_r_blocks(network.depth, network.r_blocks)
    null = ["any"] * has_null(config)
    names = [*spec.class_names[: spec.num_classes], *null] * bool(spec.num_classes)
    count = sum(leaf.size for leaf in jax.tree.leaves(generator.params))
    return {
        "shape": spec.shape,
        "patch": network.patch_size,
        "heads": network.num_heads,
        "depth": network.depth,
        "first": network.depth - last,
        "power": network.logit_power,
        "noise": config.draws.noise_scale,
        "names": names,
        "note": f"{config.objective.name} · {count:,} parameters · step {generator.step:,}",
    }

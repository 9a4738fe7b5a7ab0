"""Parameter names and array shapes of published checkpoints, and how they become ours and back.

Published trees are flat dictionaries `{"blocks/layers_0/attn/qkv/_flax_linear/kernel": array, ...}`
of three kinds: `meanflow` (our `DiT`), `imf` and `pmf` (our `InContextDiT`). They store patch
embeddings as convolution kernels `[p, p, C, width]`, ours are matrices `[p * p * C, width]`. `pmf`
stores tables and tokens with a first axis of one.

Source: the recorded cases of the published implementations (tests/reference).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree, Shaped

from mf_jax.errors import BadInput, check_known

Leaf = Shaped[np.ndarray, "..."]


class _Rule(NamedTuple):
    """The names of one parameter, or of one in each block, `{i}` its number.

    A name that ends in / stands for its kernel, bias and embedding. The published array is `stored`
    as ours ("same"), as a kernel [p, p, C, width] ("patch") or [1, 1, C, width] ("pixel"), or with
    a first axis of one ("row").
    """

    published: str
    ours: str
    stored: str = "same"


_DIT = (
    _Rule("x_embedder/proj/kernel", "patch_embedding/kernel", "patch"),
    _Rule("x_embedder/proj/bias", "patch_embedding/bias"),
    *(
        _Rule(
            f"{letter}_embedder/mlp/layers_{i}/_flax_linear/",
            f"condition/{letter}_embedding/{layer}/",
        )
        for letter in "thr"
        for i, layer in ((0, "hidden"), (2, "out"))
    ),
    _Rule("y_embedder/embedding_table/_flax_embedding/", "condition/label_embedding/"),
    _Rule("blocks/layers_{i}/adaLN_modulation/layers_1/_flax_linear/", "block_{i}/modulation/"),
    _Rule("blocks/layers_{i}/attn/qkv/_flax_linear/", "block_{i}/attention/qkv/"),
    _Rule("blocks/layers_{i}/attn/proj/_flax_linear/", "block_{i}/attention/out/"),
    _Rule("blocks/layers_{i}/mlp/fc1/_flax_linear/", "block_{i}/expand/"),
    _Rule("blocks/layers_{i}/mlp/fc2/_flax_linear/", "block_{i}/contract/"),
    _Rule("final_layer/adaLN_modulation/layers_1/_flax_linear/", "final_modulation/"),
    _Rule("final_layer/linear/_flax_linear/", "final/"),
)
_GATED_BLOCK = {
    "attn/q_proj/_flax_linear/": "attention/query/",
    "attn/k_proj/_flax_linear/": "attention/key/",
    "attn/v_proj/_flax_linear/": "attention/value/",
    "attn/out_proj/_flax_linear/": "attention/out/",
    "attn/q_norm/kernel": "attention/query_norm/scale",
    "attn/k_norm/kernel": "attention/key_norm/scale",
    "attn_scale": "attention_gate",
    "mlp_scale": "perceptron_gate",
    "norm1/kernel": "attention_norm/scale",
    "norm2/kernel": "perceptron_norm/scale",
    "mlp/w1/_flax_linear/": "switch/",
    "mlp/w3/_flax_linear/": "expand/",
    "mlp/w2/_flax_linear/": "contract/",
}
_SCALARS = {  # published embedding and tokens, ours
    ("omega_embedder", "omega_tokens"): "omega_tokens",
    ("cfg_t_start_embedder", "t_min_tokens"): "t_min_tokens",
    ("cfg_t_end_embedder", "t_max_tokens"): "t_max_tokens",
    ("h_embedder", "time_tokens"): "h_tokens",
}


def _in_context(tokens: str) -> tuple[_Rule, ...]:
    """Return what `imf` and `pmf` share; they store the learned tokens differently."""
    blocks = {
        "shared_blocks_{i}": "block_{i}",
        "u_heads_{i}": "u_head/block_{i}",
        "v_heads_{i}": "v_head/block_{i}",
    }
    return (
        *(
            _Rule(f"{published}/{theirs}", f"{ours}/{name}")
            for published, ours in blocks.items()
            for theirs, name in _GATED_BLOCK.items()
        ),
        *(_Rule(f"{which}_final_layer/norm/kernel", f"{which}_head/norm/scale") for which in "uv"),
        *(
            _Rule(f"{which}_final_layer/linear/_flax_linear/", f"{which}_head/final/")
            for which in "uv"
        ),
        *(
            _Rule(f"{embedder}/mlp/layers_{i}/_flax_linear/", f"{ours}/embedding/{layer}/")
            for (embedder, _), ours in _SCALARS.items()
            for i, layer in ((0, "hidden"), (2, "out"))
        ),
        *(_Rule(published, f"{ours}/tokens", tokens) for (_, published), ours in _SCALARS.items()),
        _Rule("class_tokens", "class_tokens/tokens", tokens),
    )


_RULES = {
    "meanflow": _DIT,
    "imf": (
        *_in_context("same"),
        _Rule("x_embedder/proj/kernel", "patch_embedding/kernel", "patch"),
        _Rule("x_embedder/proj/bias", "patch_embedding/bias"),
        _Rule(
            "y_embedder/embedding_table/_flax_embedding/embedding",
            "class_tokens/embedding/embedding",
        ),
    ),
    "pmf": (
        *_in_context("row"),
        _Rule("x_embedder/proj1/kernel", "bottleneck/kernel", "patch"),
        _Rule("x_embedder/proj1/bias", "bottleneck/bias"),
        _Rule("x_embedder/proj2/kernel", "patch_embedding/kernel", "pixel"),
        _Rule("x_embedder/proj2/bias", "patch_embedding/bias"),
        _Rule("pos_embed", "positions", "row"),
        _Rule("y_embedder/embedding_table/embedding", "class_tokens/embedding/embedding", "row"),
    ),
}
KINDS = tuple(_RULES)


def our_name(kind: str, published: str) -> tuple[str, str]:
    """Return our name of a published parameter, and how the published array is stored (`_Rule`).

    For example `blocks/layers_0/attn/qkv/_flax_linear/kernel` is `block_0/attention/qkv/kernel`.
    """
    check_known("kind", kind, KINDS)
    for rule in _RULES[kind]:
        if name := _rename(published, rule.published, rule.ours):
            return name, rule.stored
    raise BadInput(
        f"parameter {published!r}: not a name of a published {kind} checkpoint; check the kind"
    )


def knows(kind: str, published: str) -> bool:
    """Return whether a published checkpoint of a kind has a parameter of this name."""
    return any(_rename(published, rule.published, rule.ours) for rule in _RULES[kind])


def published_name(kind: str, ours: str) -> tuple[str, str]:
    """Return the published name of one of our parameters, and how the array is stored there."""
    check_known("kind", kind, KINDS)
    for rule in _RULES[kind]:
        if name := _rename(ours, rule.ours, rule.published):
            return name, rule.stored
    raise BadInput(
        f"parameter {ours!r}: a published {kind} checkpoint has no such parameter; check the kind"
    )


def _rename(name: str, source: str, target: str) -> str | None:
    """Return a name after a rule, or None where the rule is for another name."""
    pattern = re.escape(source).replace(re.escape("{i}"), r"(?P<i>\d+)")
    leaf = r"(?P<leaf>kernel|bias|embedding)" if source.endswith("/") else "(?P<leaf>)"
    match = re.fullmatch(pattern + leaf, name)
    return match and target.format(**match.groupdict()) + match["leaf"]


def from_published(kind: str, flat: Mapping[str, Leaf]) -> PyTree:
    """Return published parameters as the tree of `models.DiT` or `models.InContextDiT`."""
    renamed = {}
    for published, array in flat.items():
        name, stored = our_name(kind, published)
        renamed[name] = as_ours(published, np.asarray(array), stored)
    return unflatten_dict(renamed, sep="/")


def as_ours(published: str, array: Leaf, stored: str) -> Leaf:
    """Return a published array in our layout."""
    if stored in ("patch", "pixel"):
        if array.ndim != 4:
            raise BadInput(
                f"parameter {published!r} of shape {array.shape}: must be [p, p, C, width]"
            )
        return array.reshape(-1, array.shape[-1])
    if stored == "row":
        if array.ndim < 2 or array.shape[0] != 1:
            raise BadInput(
                f"parameter {published!r} of shape {array.shape}: must have a first axis of one"
            )
        return array[0]
    return array


def to_published(kind: str, tree: PyTree, *, patch_size: int) -> dict[str, Leaf]:
    """Return our parameters under their published names, sorted; undoes `from_published`.

    Args:
      patch_size: of the network, which its parameters do not tell.
    """
    flat = {}
    for ours, leaf in flatten_dict(tree, sep="/").items():
        name, stored = published_name(kind, ours)
        flat[name] = _as_published(ours, np.asarray(leaf), stored, patch_size)
    return dict(sorted(flat.items()))


def _as_published(ours: str, array: Leaf, stored: str, patch_size: int) -> Leaf:
    if stored in ("patch", "pixel"):
        p = patch_size if stored == "patch" else 1
        if p <= 0 or array.shape[0] % p**2:
            raise BadInput(
                f"patch_size={p}: {ours} of shape {array.shape} is of another patch size"
            )
        return array.reshape(p, p, -1, array.shape[-1])
    return array[None] if stored == "row" else array

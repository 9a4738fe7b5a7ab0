"""Names and shapes of published parameters become ours, and back.

Published trees are flat dictionaries `{"blocks/layers_0/attn/qkv/_flax_linear/kernel": array, ...}`
of three kinds in JAX: `meanflow` (our `DiT`), `imf` and `pmf` (our `InContextDiT`). Codes in
PyTorch say `{"blocks.0.attn.qkv.weight": array, ...}`; their kinds, all of them a `DiT`, differ in
the names of the embeddings of times. `py_meanflow` is our `UNet`.

Source: the recorded cases of the published implementations (tests/reference).
"""

import functools
import re
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree, Shaped

from mf_jax.flow.errors import BadInput, check_known

Leaf = Shaped[np.ndarray, "..."]


class _Rule(NamedTuple):
    """The names of one parameter, or of one in each block, `{i}` its number, `{p}` its place.

    A name that ends in / stands for its kernel, bias and embedding. The published array is `stored`
    as ours ("same"), as a kernel [p, p, C, width] ("patch") or [1, 1, C, width] ("pixel"), with a
    first axis of one ("row"), as [out, in] ("transposed") or [width, C, p, p] ("convolution"), or
    we compute it ("computed"). Of a U-Net it is [out, in, h, w], ours [h, w, in, out] ("kernel") or
    [in, out] ("pointwise").
    """

    published: str
    ours: str
    stored: str = "same"


def _embedding(published: str, ours: str) -> list[_Rule]:
    return [
        _Rule(f"{published}/mlp/layers_{i}/_flax_linear/", f"{ours}/{layer}/")
        for i, layer in ((0, "hidden"), (2, "out"))
    ]


_DIT = (
    _Rule("x_embedder/proj/kernel", "patch_embedding/kernel", "patch"),
    _Rule("x_embedder/proj/bias", "patch_embedding/bias"),
    *(
        rule
        for letter in "thr"
        for rule in _embedding(f"{letter}_embedder", f"condition/{letter}_embedding")
    ),
    *_embedding("g_embedder", "guidance_embedding"),
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
    blocks = {"shared_blocks": "", "u_heads": "u_head/", "v_heads": "v_head/"}
    rules = [
        _Rule(f"{published}_{{i}}/{theirs}", f"{ours}block_{{i}}/{name}")
        for published, ours in blocks.items()
        for theirs, name in _GATED_BLOCK.items()
    ]
    for head in "uv":
        rules.append(_Rule(f"{head}_final_layer/norm/kernel", f"{head}_head/norm/scale"))
        rules.append(_Rule(f"{head}_final_layer/linear/_flax_linear/", f"{head}_head/final/"))
    for (embedder, learned), ours in _SCALARS.items():
        rules.append(_Rule(learned, f"{ours}/tokens", tokens))
        rules += _embedding(embedder, f"{ours}/embedding")
    return (*rules, _Rule("class_tokens", "class_tokens/tokens", tokens))


def _of_torch(**embeddings: str) -> tuple[_Rule, ...]:
    """Return the rules of a DiT in PyTorch, whose embeddings of t, h = t - r, r, g have names."""
    rules = [_Rule("pos_embed", "", "computed")]
    for published, ours, stored in _DIT:
        embedding = re.match("[thrg](?=_embedder)", published)
        if embedding and embedding[0] not in embeddings:
            continue
        name = re.sub("_flax_(linear|embedding)/|layers_", "", published).replace("/", ".")
        name = embeddings[embedding[0]] + name.removeprefix(embedding[0]) if embedding else name
        leaves = {"kernel": "transposed", "bias": "same"}
        if "label_embedding" in ours:
            leaves = {"embedding": "same"}
        if stored == "patch" or not ours.endswith("/"):
            leaves = {"": "convolution" if stored == "patch" else "same"}
        rules += [
            _Rule(re.sub("(kernel|embedding)$", "weight", f"{name}{leaf}"), f"{ours}{leaf}", how)
            for leaf, how in leaves.items()
        ]
    return tuple(rules)


_UNET_LAYERS = {  # published: ours, stored
    "norm0": ("norm_1", "same"),
    "conv0": ("conv_1", "kernel"),
    "affine": ("condition", "transposed"),
    "norm1": ("norm_2", "same"),
    "conv1": ("conv_2", "kernel"),
    "skip": ("shortcut", "kernel"),
    "norm2": ("norm_3", "same"),
    "qkv": ("attention/qkv", "pointwise"),
    "proj": ("attention/out", "pointwise"),
}


def _of_unet() -> tuple[_Rule, ...]:
    """Return the rules of the U-Net of CIFAR-10 in PyTorch."""
    named = {
        "map_augment": ("condition/augment", "transposed"),
        "map_layer0": ("condition/hidden", "transposed"),
        "map_layer1": ("condition/out", "transposed"),
        "enc.{p}_conv": ("encoder_{p}_conv", "kernel"),
        "dec.{p}_aux_norm": ("decoder_{p}_aux_norm", "same"),
        "dec.{p}_aux_conv": ("decoder_{p}_aux_conv", "kernel"),
    }
    rules = []
    for side, ours in (("enc", "encoder"), ("dec", "decoder")):
        for theirs, (layer, stored) in _UNET_LAYERS.items():
            named[f"{side}.{{p}}.{theirs}"] = (f"{ours}_{{p}}/{layer}", stored)
            rules.append(_Rule(f"{side}.{{p}}.{theirs}.resample_filter", "", "computed"))
    for theirs, (ours, stored) in named.items():
        leaf = "scale" if stored == "same" else "kernel"
        rules.append(_Rule(f"{theirs}.weight", f"{ours}/{leaf}", stored))
        rules.append(_Rule(f"{theirs}.bias", f"{ours}/bias"))
    return tuple(rules)


_RULES = {
    "meanflow": _DIT,
    "imf": (
        *_in_context("same"),
        _Rule("x_embedder/proj/kernel", "patch_embedding/kernel", "patch"),
        _Rule("x_embedder/proj/bias", "patch_embedding/bias"),
        _Rule("y_embedder/embedding_table/_flax_embedding/", "class_tokens/embedding/"),
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
_RULES |= {
    "sit": _of_torch(t="t"),
    "dit": _of_torch(t="t"),
    "zhuyu_meanflow": _of_torch(t="t", h="r"),
    "soflow": _of_torch(t="t", h="s"),
    "alphaflow": _of_torch(t="noise_labels", r="noise_labels_next"),
    "tvm": (
        *_of_torch(t="t", h="s", g="guidance"),
        *(
            _Rule(f"blocks.{{i}}.attn.{x[0]}_norm.weight", f"block_{{i}}/attention/{x}_norm/scale")
            for x in ("query", "key")
        ),
    ),
    "py_meanflow": _of_unet(),
}
KINDS = tuple(_RULES)
TORCH_KINDS = KINDS[3:]
KINDS_WITH_POSITIONS = TORCH_KINDS[:-1]
"""They store the computed embeddings of patches."""


def check_prediction(kind: str, prediction: str) -> None:
    """Raise BadInput unless networks of a kind predict what `model.prediction` says."""
    theirs = "data" if kind == "pmf" else "velocity"
    if prediction != theirs:
        raise BadInput(f"model.prediction={prediction!r}: networks of {kind} predict {theirs}")


def _renamed(kind: str, name: str, source: str, target: str) -> tuple[str, str] | None:
    """Return a name after its rule, from one field of `_Rule` to another."""
    check_known("kind", kind, KINDS)
    for rule in _RULES[kind]:
        if match := _pattern(getattr(rule, source)).fullmatch(name):
            return getattr(rule, target).format(**match.groupdict()) + match["leaf"], rule.stored
    return None


our_name = functools.partial(_renamed, source="published", target="ours")
published_name = functools.partial(_renamed, source="ours", target="published")
"""From a kind and a name to the other one, and how it is stored (`_Rule`), if it has one.

For example `blocks/layers_0/attn/qkv/_flax_linear/kernel` is `block_0/attention/qkv/kernel`.
"""


@functools.cache
def _pattern(name: str) -> re.Pattern:
    pattern = re.escape(name).replace(re.escape("{i}"), r"(?P<i>\d+)")
    pattern = pattern.replace(re.escape("{p}"), r"(?P<p>\w+)")
    return re.compile(pattern + f"(?P<leaf>{'kernel|bias|embedding' * name.endswith('/')})")


_OUT_FIRST = ("transposed", "convolution", "kernel", "pointwise")


def as_ours(array: Leaf, stored: str) -> Leaf:
    """Return a published array, stored so (`_Rule`), as ours: a kernel, a matrix or a vector."""
    if stored in _OUT_FIRST:
        array = array.transpose(*range(2, array.ndim), 1, 0)
    is_flat = array.ndim <= 2 or stored == "kernel"
    return array if is_flat else array.reshape(-1, array.shape[-1])


def to_published(kind: str, tree: PyTree, *, patch_size: int) -> dict[str, Leaf]:
    """Return our parameters under their published names, sorted."""
    flat = {}
    for ours, leaf in flatten_dict(tree, sep="/").items():
        if not (renamed := published_name(kind, ours)):
            raise BadInput(
                f"parameter {ours!r}: unknown to published {kind} checkpoints; check the kind"
            )
        (name, stored), array = renamed, np.asarray(leaf)
        is_patch = stored in ("patch", "convolution")
        if is_patch and (patch_size <= 0 or array.shape[0] % patch_size**2):
            raise BadInput(
                f"patch_size={patch_size}: {ours} of shape {array.shape} is of another patch size"
            )
        patch = patch_size, patch_size, -1
        before = {"row": (1, len(array)), **dict.fromkeys(("pixel", "pointwise"), (1, 1, -1))}
        before |= dict.fromkeys(("patch", "convolution"), patch)
        array = array.reshape(*before.get(stored, array.shape[:-1]), array.shape[-1])
        if stored in _OUT_FIRST:
            array = array.transpose(-1, -2, *range(array.ndim - 2))
        flat[name] = np.ascontiguousarray(array)
    return dict(sorted(flat.items()))

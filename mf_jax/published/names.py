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
    """The names of one parameter, or of one in each block.

    The published array is `stored` as ours ("same"), as a kernel [p, p, C, width] ("patch") or
    [1, 1, C, width] ("pixel"), with a first axis of one ("row"), as [out, in] ("transposed") or
    [width, C, p, p] ("convolution"), or we compute it ("computed"). Of a U-Net it is
    [out, in, h, w], ours [h, w, in, out] ("kernel") or [in, out] ("pointwise").
    """

    published: str
    ours: str
    stored: str


_PLACES = {"i": r"\d+", "p": r"\w+", "q": r"\w+", "e": "[thr]", "h": "[uv]", "s": "enc|dec"}
"""What {i}, {p} and so on stand for in both names of a rule."""
_JAX_LEAVES = {leaf: leaf for leaf in ("kernel", "bias", "embedding")}


def _rules(table: str, published: str = "", ours: str = "") -> list[_Rule]:
    """Read the rows "published ours [stored]" of a table, with these prefixes of both names.

    A published name that ends in / or . stands for all parameters of a layer in JAX or PyTorch.
    """
    rules = []
    for theirs, own, *more in map(str.split, table.strip().splitlines()):
        stored = more[0] if more else "same"
        torch_leaves = {"weight": "scale" if stored == "same" else "kernel", "bias": "bias"}
        leaves = {"/": _JAX_LEAVES, ".": torch_leaves}.get(theirs[-1], {"": ""})
        for leaf, our_leaf in leaves.items():
            names = f"{published}{theirs}{leaf}", f"{ours}{own}{our_leaf}"
            rules.append(_Rule(*names, "same" if leaf == "bias" else stored))
    return rules


_EMBEDDING = """
    mlp/layers_0/_flax_linear/  hidden/
    mlp/layers_2/_flax_linear/  out/
"""
_DIT = """
    x_embedder/proj/  patch_embedding/  patch
    y_embedder/embedding_table/_flax_embedding/  condition/label_embedding/
    blocks/layers_{i}/adaLN_modulation/layers_1/_flax_linear/  block_{i}/modulation/
    blocks/layers_{i}/attn/qkv/_flax_linear/   block_{i}/attention/qkv/
    blocks/layers_{i}/attn/proj/_flax_linear/  block_{i}/attention/out/
    blocks/layers_{i}/mlp/fc1/_flax_linear/    block_{i}/expand/
    blocks/layers_{i}/mlp/fc2/_flax_linear/    block_{i}/contract/
    final_layer/adaLN_modulation/layers_1/_flax_linear/  final_modulation/
    final_layer/linear/_flax_linear/           final/
"""
_GATED_BLOCK = """
    attn/q_proj/_flax_linear/    attention/query/
    attn/k_proj/_flax_linear/    attention/key/
    attn/v_proj/_flax_linear/    attention/value/
    attn/out_proj/_flax_linear/  attention/out/
    attn/q_norm/kernel           attention/query_norm/scale
    attn/k_norm/kernel           attention/key_norm/scale
    attn_scale                   attention_gate
    mlp_scale                    perceptron_gate
    norm1/kernel                 attention_norm/scale
    norm2/kernel                 perceptron_norm/scale
    mlp/w1/_flax_linear/         switch/
    mlp/w3/_flax_linear/         expand/
    mlp/w2/_flax_linear/         contract/
"""
_IN_CONTEXT = """
    {h}_final_layer/norm/kernel           {h}_head/norm/scale
    {h}_final_layer/linear/_flax_linear/  {h}_head/final/
    omega_tokens  omega_tokens/tokens  LEARNED
    t_min_tokens  t_min_tokens/tokens  LEARNED
    t_max_tokens  t_max_tokens/tokens  LEARNED
    time_tokens   h_tokens/tokens      LEARNED
    class_tokens  class_tokens/tokens  LEARNED
"""
_SCALARS = {"omega": "omega", "cfg_t_start": "t_min", "cfg_t_end": "t_max", "h": "h"}
_IMF = """
    x_embedder/proj/  patch_embedding/  patch
    y_embedder/embedding_table/_flax_embedding/  class_tokens/embedding/
"""
_PMF = """
    x_embedder/proj1/  bottleneck/       patch
    x_embedder/proj2/  patch_embedding/  pixel
    pos_embed          positions         row
    y_embedder/embedding_table/embedding  class_tokens/embedding/embedding  row
"""
_TORCH_DIT = """
    pos_embed                          -                     computed
    x_embedder.proj.                   patch_embedding/      convolution
    y_embedder.embedding_table.weight  condition/label_embedding/embedding
    blocks.{i}.adaLN_modulation.1.     block_{i}/modulation/     transposed
    blocks.{i}.attn.qkv.               block_{i}/attention/qkv/  transposed
    blocks.{i}.attn.proj.              block_{i}/attention/out/  transposed
    blocks.{i}.mlp.fc1.                block_{i}/expand/         transposed
    blocks.{i}.mlp.fc2.                block_{i}/contract/       transposed
    final_layer.adaLN_modulation.1.    final_modulation/         transposed
    final_layer.linear.                final/                    transposed
"""
_TORCH_EMBEDDING = """
    mlp.0.  hidden/  transposed
    mlp.2.  out/     transposed
"""
_TVM = """
    blocks.{i}.attn.q_norm.weight  block_{i}/attention/query_norm/scale
    blocks.{i}.attn.k_norm.weight  block_{i}/attention/key_norm/scale
"""
_UNET = """
    map_augment.     condition/augment/          transposed
    map_layer0.      condition/hidden/           transposed
    map_layer1.      condition/out/              transposed
    {s}.{p}_conv.    {s}oder_{p}_conv/           kernel
    {s}.{p}_norm.    {s}oder_{p}_norm/
    {s}.{p}.norm0.   {s}oder_{p}/norm_1/
    {s}.{p}.conv0.   {s}oder_{p}/conv_1/         kernel
    {s}.{p}.affine.  {s}oder_{p}/condition/      transposed
    {s}.{p}.norm1.   {s}oder_{p}/norm_2/
    {s}.{p}.conv1.   {s}oder_{p}/conv_2/         kernel
    {s}.{p}.skip.    {s}oder_{p}/shortcut/       kernel
    {s}.{p}.norm2.   {s}oder_{p}/norm_3/
    {s}.{p}.qkv.     {s}oder_{p}/attention/qkv/  pointwise
    {s}.{p}.proj.    {s}oder_{p}/attention/out/  pointwise
    {s}.{p}.{q}.resample_filter  -  computed
"""


def _of_torch(**embeddings: str) -> list[_Rule]:
    """Return the rules of a DiT in PyTorch, whose embeddings of t, h = t - r, r have names."""
    rules = _rules(_TORCH_DIT)
    for letter, name in embeddings.items():
        rules += _rules(_TORCH_EMBEDDING, f"{name}_embedder.", f"condition/{letter}_embedding/")
    return rules


def _in_context(learned: str) -> list[_Rule]:
    """Return what `imf` and `pmf` share; they store the learned tokens differently."""
    rules = _rules(_IN_CONTEXT.replace("LEARNED", learned))
    rules += _rules(_GATED_BLOCK, "shared_blocks_{i}/", "block_{i}/")
    rules += _rules(_GATED_BLOCK, "{h}_heads_{i}/", "{h}_head/block_{i}/")
    for name, ours in _SCALARS.items():
        rules += _rules(_EMBEDDING, f"{name}_embedder/", f"{ours}_tokens/embedding/")
    return rules


_RULES = {
    "meanflow": _rules(_DIT)
    + _rules(_EMBEDDING, "{e}_embedder/", "condition/{e}_embedding/")
    + _rules(_EMBEDDING, "g_embedder/", "guidance_embedding/"),
    "imf": _in_context("same") + _rules(_IMF),
    "pmf": _in_context("row") + _rules(_PMF),
    "sit": _of_torch(t="t"),
    "dit": _of_torch(t="t"),
    "zhuyu_meanflow": _of_torch(t="t", h="r"),
    "soflow": _of_torch(t="t", h="s"),
    "alphaflow": _of_torch(t="noise_labels", r="noise_labels_next"),
    "tvm": _of_torch(t="t", h="s")
    + _rules(_TORCH_EMBEDDING, "guidance_embedder.", "guidance_embedding/")
    + _rules(_TVM),
    "py_meanflow": _rules(_UNET),
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
            return getattr(rule, target).format(**match.groupdict()), rule.stored
    return None


our_name = functools.partial(_renamed, source="published", target="ours")
published_name = functools.partial(_renamed, source="ours", target="published")
"""From a kind and a name to the other one, and how it is stored (`_Rule`), if it has one.

For example `blocks/layers_0/attn/qkv/_flax_linear/kernel` is `block_0/attention/qkv/kernel`.
"""


@functools.cache
def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{", "{").replace(r"\}", "}").format(**_GROUPS))


_GROUPS = {key: f"(?P<{key}>{pattern})" for key, pattern in _PLACES.items()}
_OUT_FIRST = ("transposed", "convolution", "kernel", "pointwise")


def as_ours(array: Leaf, stored: str) -> Leaf:
    """Return a published array, stored so (`_Rule`), as ours: a kernel, a matrix or a vector."""
    if stored in _OUT_FIRST:
        array = array.transpose(*range(2, array.ndim), 1, 0)
    is_flat = array.ndim <= 2 or stored == "kernel"
    return array if is_flat else array.reshape(-1, array.shape[-1])


def to_published(kind: str, tree: PyTree, *, patch_size: int) -> dict[str, Leaf]:
    """Return our parameters under their published names, sorted."""
    flat, patch = {}, (patch_size, patch_size)
    sides = {"patch": patch, "convolution": patch, "pixel": (1, 1), "pointwise": (1, 1)}
    for ours, leaf in flatten_dict(tree, sep="/").items():
        if not (renamed := published_name(kind, ours)):
            raise BadInput(f"parameter {ours!r}: unknown to published {kind} checkpoints")
        (name, stored), array = renamed, np.asarray(leaf)
        if stored in sides:
            num = patch_size**2 if sides[stored] is patch else 1
            if patch_size <= 0 or array.shape[0] % num:
                raise BadInput(f"patch_size={patch_size}: {ours} {list(array.shape)} has another")
            array = array.reshape(*sides[stored], -1, array.shape[-1])
        elif stored == "row":
            array = array[None]
        if stored in _OUT_FIRST:
            array = array.transpose(-1, -2, *range(array.ndim - 2))
        flat[name] = np.ascontiguousarray(array)
    return dict(sorted(flat.items()))

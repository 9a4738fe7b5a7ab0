"""Parameter names of the published MeanFlow checkpoints, and how they become ours.

Published trees are flat dictionaries `{"blocks/layers_0/attn/qkv/_flax_linear/kernel": array, ...}`.
Patch embeddings are stored there as convolution kernels `[p, p, C, width]`, here as matrices `[p * p * C, width]`.

Source: the recorded cases of the published implementation (tests/reference).
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree, Shaped

from mf_jax.types import BadInput

_DIT_RULES = (
    (r"^x_embedder/proj/", "patch_embedding/"),
    (r"^([thr])_embedder/mlp/layers_0/", r"condition/\1_embedding/hidden/"),
    (r"^([thr])_embedder/mlp/layers_2/", r"condition/\1_embedding/out/"),
    (r"^y_embedder/embedding_table/", "condition/label_embedding/"),
    (r"^blocks/layers_(\d+)/adaLN_modulation/layers_1/", r"block_\1/modulation/"),
    (r"^blocks/layers_(\d+)/attn/qkv/", r"block_\1/attention/qkv/"),
    (r"^blocks/layers_(\d+)/attn/proj/", r"block_\1/attention/out/"),
    (r"^blocks/layers_(\d+)/mlp/fc1/", r"block_\1/expand/"),
    (r"^blocks/layers_(\d+)/mlp/fc2/", r"block_\1/contract/"),
    (r"^final_layer/adaLN_modulation/layers_1/", "final_modulation/"),
    (r"^final_layer/linear/", "final/"),
)
_WRAPPERS = re.compile(r"_flax_(linear|embedding)/")


def dit_name(published: str) -> str:
    """Return our name of a published MeanFlow DiT parameter.

    Args:
      published: e.g. `blocks/layers_0/attn/qkv/_flax_linear/kernel`.

    Returns:
      e.g. `block_0/attention/qkv/kernel`.

    Raises:
      BadInput: if no rule knows the name.
    """
    for pattern, replacement in _DIT_RULES:
        name, found = re.subn(pattern, replacement, published)
        if found:
            return _WRAPPERS.sub("", name)
    raise BadInput(f"parameter {published!r}: not a name of a published MeanFlow DiT checkpoint")


def dit_params(published: Mapping[str, Shaped[np.ndarray, "..."]]) -> PyTree:
    """Return published MeanFlow DiT parameters as ours.

    Args:
      published: flat names to arrays.

    Returns:
      The parameter tree of `models.DiT`.

    Raises:
      BadInput: if a name is unknown.
    """
    renamed = {dit_name(name): np.asarray(array) for name, array in published.items()}
    kernel = renamed["patch_embedding/kernel"]
    renamed["patch_embedding/kernel"] = kernel.reshape(-1, kernel.shape[-1])
    return unflatten_dict({tuple(name.split("/")): array for name, array in renamed.items()})

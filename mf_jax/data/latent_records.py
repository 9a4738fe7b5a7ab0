"""The files in a folder of latents: shards, a side file of each, settings, and a manifest.

A record is a label (int32), then the mean and standard deviation of a latent (float16
`[2, h, w, C]`), little-endian. Record 2i is of picture i of a shard, 2i + 1 of its mirror image.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float16

from mf_jax.data.crop import CROP
from mf_jax.flow.errors import BadInput
from mf_jax.runtime.json_files import read_json

FORMAT_VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "settings.json"
"""The manifest is written when all shards are there, the settings before the first."""
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Each record can be read alone, and as fast as it lies there: noise does not compress."""
_SIDE = {"count": 0, "bytes": 0, "sha256?": ""}
SIDE = _SIDE | {"labels": {}, "skipped": [""]}
_MANIFEST = {"format_version": 0, "crop": "", "image_size": 1, "latent_shape": [1]}
_MANIFEST |= {"autoencoder": {"name": "", "sha256": ""}, "classes": [{"name": ""}]}
_MANIFEST |= {"shards": [{"name": ""} | _SIDE], "num_pictures?": 1}
"""What the files are like; see `parse_json`."""
AGAIN = "delete it and prepare again"


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{shard:05d}-of-{shards:05d}.array_record"


def record_type(shape: Sequence[int]) -> np.dtype:
    """Return the type of a record of latents of a shape."""
    return np.dtype([("label", "<i4"), ("rows", "<f2", (2, *shape))])


def to_record(label: int, rows: Float16[np.ndarray, "2 h w c"]) -> bytes:
    """Return the record of a label and the mean and standard deviation of a latent."""
    return np.array((label, rows), record_type(rows.shape[1:])).tobytes()


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Return the manifest of a folder, whose places are not its to choose."""
    if not (path := folder / MANIFEST).exists():
        _refuse_unfinished(folder)
    manifest = read_json(path, _MANIFEST, AGAIN)
    shards, shape = manifest["shards"], manifest["latent_shape"]
    names = [shard_name(i, len(shards)) for i in range(len(shards))]
    total, length = sum(shard["count"] for shard in shards), 4 + 2 * 2 * math.prod(shape)
    fits = all(2 * length * shard["count"] <= shard["bytes"] for shard in shards)
    is_right = {
        "format_version": manifest["format_version"] == FORMAT_VERSION,
        "crop": manifest["crop"] == CROP,
        "a shard's name": [shard["name"] for shard in shards] == names,
        "num_pictures": 0 < total == manifest.get("num_pictures", total),
        "latent_shape, or the bytes of a shard,": len(shape) == 3 and fits,
    }
    if wrong := ", ".join(key for key, right in is_right.items() if not right):
        raise BadInput(f"{path}: {wrong} must be as in format {FORMAT_VERSION}, {CROP!r}: {AGAIN}")
    return manifest


def _refuse_unfinished(folder: epath.Path) -> None:
    if not (folder / SETTINGS).exists():
        raise BadInput(f"path={str(folder)!r} holds no latents: run --mode=prepare first")
    shards = read_json(folder / SETTINGS, {"num_shards": 0}, AGAIN)["num_shards"]
    present = sum(path.name.endswith(".array_record") for path in folder.iterdir())
    told = f"{present} of {shards} shards are there: run the same --mode=prepare again"
    raise BadInput(f"path={str(folder)!r} is not finished: {told}, which continues")

"""The files in a folder of latents: shards, a side file of each, settings, and a manifest.

A record is a label (int32), then the mean and standard deviation of a latent (float16
`[2, h, w, C]`), little-endian. Record 2i of a shard is of its picture i,
and record 2i + 1 of the mirror image.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float16

from mf_jax.data.crop import CROP
from mf_jax.flow.errors import BadInput
from mf_jax.runtime.files import opened

FORMAT_VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "settings.json"
"""The manifest is written when all shards are there, the settings before the first."""
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Each record can be read alone, and as fast as it lies there: noise does not compress."""
LABEL = np.dtype("<i4")
NUMBER = np.dtype("<f2")
_KEYS = {"image_size", "latent_shape", "autoencoder", "classes", "shards"}


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{shard:05d}-of-{shards:05d}.array_record"


def side_name(shard: int, shards: int) -> str:
    """Return the name of the side file, which counts and names what a shard holds and lacks."""
    return shard_name(shard, shards).replace(".array_record", ".json")


def to_record(label: int, rows: Float16[np.ndarray, "2 h w c"]) -> bytes:
    """Return the record of a label and the mean and standard deviation of a latent."""
    return np.array(label, LABEL).tobytes() + np.ascontiguousarray(rows, NUMBER).tobytes()


def read_json(path: epath.Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file, which is a `what`."""
    try:
        with opened(path) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(
            f"{path} is no {what} ({error}); must be a JSON object: delete it and prepare again"
        ) from error


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Return the manifest of a folder; of an unfinished one, say how much is there."""
    path = folder / MANIFEST
    if not path.exists():
        _refuse_unfinished(folder)
    manifest = read_json(path, "manifest of latents")
    needed = {"format_version": FORMAT_VERSION, "crop": CROP}
    stored = {key: manifest.get(key) for key in needed}
    if stored != needed:
        raise BadInput(f"{path} says {stored}; must say {needed}: prepare them again")
    if missing := _KEYS - set(manifest):
        raise BadInput(f"{path} lacks {', '.join(sorted(missing))}: delete it and prepare again")
    try:
        wrong = ", ".join(key for key, is_right in _checks(manifest) if not is_right)
    except (KeyError, TypeError, AttributeError) as error:  # an entry of another kind
        wrong = f"an entry ({type(error).__name__} {error})"[:200]
    if wrong:
        raise BadInput(f"{path}: {wrong} cannot be as it says: delete it and prepare again")
    return manifest


def _checks(manifest: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield keys of a manifest and whether they can be true; places are not its to choose."""
    shards, classes = manifest["shards"], manifest["classes"]
    names = [shard["name"] for shard in shards]
    yield "a shard's name", names == [shard_name(i, len(shards)) for i in range(len(shards))]
    counts = [shard["count"] for shard in shards]
    wholes = counts + [shard["bytes"] for shard in shards]
    yield "a count or size", all(type(whole) is int and whole >= 0 for whole in wholes)
    total = sum(counts)
    yield "num_pictures", total == manifest.get("num_pictures", total) and total > 0
    yield "a class's name", all(isinstance(each["name"], str) for each in classes)
    yield "image_size", type(manifest["image_size"]) is int
    shape = manifest["latent_shape"]
    yield "latent_shape", len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    length = LABEL.itemsize + 2 * NUMBER.itemsize * math.prod(shape)
    smallest = [2 * length * shard["count"] <= shard["bytes"] for shard in shards]
    yield "latent_shape, or the bytes of a shard,", all(smallest)
    made_by = manifest["autoencoder"]
    yield "autoencoder", all(isinstance(made_by[key], str) for key in ("name", "sha256"))


def _refuse_unfinished(folder: epath.Path) -> None:
    if not (folder / SETTINGS).exists():
        raise BadInput(f"path={str(folder)!r} holds no latents: run --mode=prepare first")
    shards = read_json(folder / SETTINGS, "settings of latents").get("num_shards", 0)
    present = sum(path.name.endswith(".array_record") for path in folder.iterdir())
    raise BadInput(
        f"path={str(folder)!r} is not finished: {present} of {shards} shards are there, and no "
        f"{MANIFEST}: run the same --mode=prepare again, which continues"
    )

"""The files in a folder of latents, shards, a side file of each, settings, a manifest; a copy.

A record is a label (int32), then the mean and standard deviation of a latent (float16
`[2, h, w, C]`), little-endian. Record 2i is of picture i of a shard, 2i + 1 of its mirror image.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float16

from mf_jax.data.crop import CROP
from mf_jax.flow.errors import BadInput
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, opened, sha256_of, written_aside
from mf_jax.runtime.json_files import misfit, read_json, write_json

FORMAT_VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "settings.json"
"""The manifest is written when all shards are there, the settings before the first."""
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Each record can be read alone, and as fast as it lies there: noise does not compress."""
LABEL = np.dtype("<i4")
NUMBER = np.dtype("<f2")
_SIDE = {"count": 0, "bytes": 0, "sha256?": ""}
SIDE = _SIDE | {"labels": {}, "skipped": [""]}
_MANIFEST = {"image_size": 1, "latent_shape": [1], "autoencoder": {"name": "", "sha256": ""}}
_MANIFEST |= {"classes": [{"name": ""}], "shards": [{"name": ""} | _SIDE]}
"""What the files are like; see `parse_json`."""
AGAIN = "delete it and prepare again"
_COPIED_AT_ONCE, _CHUNK_BYTES = 8, 2**24


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{shard:05d}-of-{shards:05d}.array_record"


def to_record(label: int, rows: Float16[np.ndarray, "2 h w c"]) -> bytes:
    """Return the record of a label and the mean and standard deviation of a latent."""
    return np.array(label, LABEL).tobytes() + np.ascontiguousarray(rows, NUMBER).tobytes()


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Return the manifest of a folder; of an unfinished one, say how much is there."""
    if not (path := folder / MANIFEST).exists():
        _refuse_unfinished(folder)
    manifest = read_json(path, {}, AGAIN)
    needed = {"format_version": FORMAT_VERSION, "crop": CROP}
    if (stored := {key: manifest.get(key) for key in needed}) != needed:
        raise BadInput(f"{path} says {stored}; must say {needed}: prepare them again")
    if problem := misfit(manifest, _MANIFEST, "it"):
        raise BadInput(f"{path}: {problem}: {AGAIN}")
    if wrong := ", ".join(key for key, is_right in _checks(manifest) if not is_right):
        raise BadInput(f"{path}: {wrong} cannot be as it says: {AGAIN}")
    return manifest


def _checks(manifest: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield keys of a manifest and whether they can be true; places are not its to choose."""
    shards, shape = manifest["shards"], manifest["latent_shape"]
    names = [shard["name"] for shard in shards]
    yield "a shard's name", names == [shard_name(i, len(shards)) for i in range(len(shards))]
    total = sum(shard["count"] for shard in shards)
    yield "num_pictures", total == manifest.get("num_pictures", total) and total > 0
    length = LABEL.itemsize + 2 * NUMBER.itemsize * math.prod(shape)
    smallest = [2 * length * shard["count"] <= shard["bytes"] for shard in shards]
    yield "latent_shape, or the bytes of a shard,", len(shape) == 3 and all(smallest)


def _refuse_unfinished(folder: epath.Path) -> None:
    if not (folder / SETTINGS).exists():
        raise BadInput(f"path={str(folder)!r} holds no latents: run --mode=prepare first")
    shards = read_json(folder / SETTINGS, {"num_shards": 0}, AGAIN)["num_shards"]
    present = sum(path.name.endswith(".array_record") for path in folder.iterdir())
    raise BadInput(
        f"path={str(folder)!r} is not finished: {present} of {shards} shards are there, and no "
        f"{MANIFEST}: run the same --mode=prepare again, which continues"
    )


def local_copy(source: epath.Path, target: epath.Path) -> epath.Path:
    """Copy the shards that a copy lacks, and return it: record by record, a network is too slow.

    Processes of one host may share a copy: one makes it, the others wait.
    """
    if in_bucket(target):
        raise BadInput(f"copy_to={str(target)!r}: is in a bucket; must be a folder of this host")
    manifest = read_manifest(source)
    shards = manifest["shards"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / ".lock", wait=True), ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
            if not (target / MANIFEST).exists():
                write_json(target / MANIFEST, manifest)
            elif read_manifest(target) != manifest:
                message = f"holds other latents than {source}; choose another folder"
                raise BadInput(f"copy_to={str(target)!r}: {message}")
            whole = pool.map(lambda shard: _is_there(target / shard["name"], shard), shards)
            names = [shard["name"] for shard, there in zip(shards, whole, strict=True) if not there]
            copied = pool.map(lambda name: _copy(source / name, target / name), names)
            shown = {"unit": "shards", "is_wanted": bool(names) and processes.is_first()}
            list(track(copied, "copying latents", len(names), **shown))
    except OSError as error:
        size = sum(shard["bytes"] for shard in shards)
        raise BadInput(
            f"copy_to={str(target)!r}: cannot hold the {size / 1e9:.3g} GB of {source} "
            f"({error.strerror or error}); choose another folder of this host"
        ) from error
    return target


def _is_there(path: epath.Path, shard: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().length != shard["bytes"]:
        return False
    return sha256_of(path) == shard["sha256"] if "sha256" in shard else True


def _copy(source: epath.Path, target: epath.Path) -> None:
    with written_aside(target) as aside, open(aside, "wb") as copy:
        for chunk in _chunks(source):
            copy.write(chunk)


def _chunks(path: epath.Path) -> Iterator[bytes]:
    """Yield a file's bytes; only errors of reading it are caught here."""
    try:
        with opened(path) as file:
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
    except OSError as error:
        raise BadInput(
            f"path={str(path.parent)!r}: {path.name} cannot be read ({error.strerror or error}); "
            "see to it, and run the same command again, which continues"
        ) from error

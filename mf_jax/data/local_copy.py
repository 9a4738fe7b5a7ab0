"""A copy of latents on a disk of this host: record by record, a network is too slow."""

import collections
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mf_jax.data.latent_records import MANIFEST, read_manifest
from mf_jax.flow.errors import BadInput
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, opened, sha256_of, written_aside
from mf_jax.runtime.json_files import write_json

_AT_ONCE = 8
_CHUNK_BYTES = 2**24


def local_copy(source: epath.Path, target: epath.Path) -> epath.Path:
    """Copy the shards of a folder of latents that its copy lacks, and return the copy.

    Processes of one host may share a copy: one makes it, the others wait.
    """
    if in_bucket(target):
        raise BadInput(f"copy_to={str(target)!r}: is in a bucket; must be a folder of this host")
    manifest = read_manifest(source)
    shards = manifest["shards"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / ".lock", wait=True), ThreadPoolExecutor(_AT_ONCE) as pool:
            if not (target / MANIFEST).exists():
                write_json(target / MANIFEST, manifest)
            elif read_manifest(target) != manifest:
                message = f"holds other latents than {source}; choose another folder"
                raise BadInput(f"copy_to={str(target)!r}: {message}")
            is_there = pool.map(lambda shard: _is_there(target / shard["name"], shard), shards)
            there = zip(shards, is_there, strict=True)
            names = [shard["name"] for shard, is_whole in there if not is_whole]
            copied = pool.map(lambda name: _copy(source / name, target / name), names)
            shown = {"unit": "shards", "is_wanted": bool(names) and processes.is_first()}
            collections.deque(track(copied, "copying latents", len(names), **shown), maxlen=0)
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

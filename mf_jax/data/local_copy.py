"""A copy of latents on a disk of this host: record by record, a network is too slow."""

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from mf_jax.data.latent_records import MANIFEST, read_manifest
from mf_jax.flow.errors import BadInput
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, opened, replace_file, to_json, written_aside

_AT_ONCE = 8
_CHUNK_BYTES = 2**24


def local_copy(source: epath.Path, target: epath.Path) -> epath.Path:
    """Copy the shards of a folder of latents that its copy lacks, and return the copy.

    Processes of one host may share a copy: one makes it, the others wait.
    """
    if in_bucket(target):
        raise BadInput(f"copy_to={str(target)!r}: is in a bucket; must be a folder of this host")
    manifest = read_manifest(source)
    lengths = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / ".lock", wait=True), ThreadPoolExecutor(_AT_ONCE) as pool:
            if not (target / MANIFEST).exists():
                replace_file(target / MANIFEST, to_json(manifest).encode())
            elif read_manifest(target) != manifest:
                message = f"holds other latents than {source}; choose another folder"
                raise BadInput(f"copy_to={str(target)!r}: {message}")
            names = [name for name in lengths if not _is_there(target / name, lengths[name])]
            copied = pool.map(lambda name: _copy(source / name, target / name), names)
            shown = {"unit": "shards", "is_wanted": bool(names) and processes.is_first()}
            collections.deque(track(copied, "copying latents", len(names), **shown), maxlen=0)
    except OSError as error:
        size = sum(lengths.values())
        raise BadInput(
            f"copy_to={str(target)!r}: cannot hold the {size / 1e9:.3g} GB of {source} "
            f"({error.strerror or error}); choose another folder of this host"
        ) from error
    return target


def _is_there(path: epath.Path, length: int) -> bool:
    return path.is_file() and path.stat().length == length


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

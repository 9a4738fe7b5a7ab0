"""Latents as --mode=prepare leaves them; training draws mean + std * noise at every visit."""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from jaxtyping import Array, Float32, Int, PRNGKeyArray

from mf_jax.data.latent_records import MANIFEST, read_manifest, record_type
from mf_jax.data.pipeline import Batch, Stored
from mf_jax.flow.errors import BadInput, check_within, refused
from mf_jax.flow.records import DataSpec
from mf_jax.published.fetch import PUBLISHED
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, opened, sha256_of, written_aside
from mf_jax.runtime.json_files import write_json

_DAMAGE = (RuntimeError, ValueError, IndexError, OSError)
_COPIED_AT_ONCE, _CHUNK_BYTES = 8, 2**24


class Latents:
    """Latents `[h, w, C]`, drawn anew at every visit; with mirror images."""

    def __init__(
        self,
        *,
        path: str,
        image_size: int,
        autoencoder: str,
        latent_mean: Sequence[float],
        latent_std: Sequence[float],
        copy_to: str,
        split: str,
    ) -> None:
        """Open the latents in a folder.

        Args:
          image_size, autoencoder: of the pictures, and that encoded them, by name or path.
          latent_mean, latent_std: give (latent - mean) / std; one number, or one a channel.
          copy_to: folder of this host to copy them to first; a bucket needs it, "" reads in place.
        """
        if split != "train":
            raise BadInput("name='latents': has no held-out pictures: set eval.references")
        folder, target = (epath.Path(each).expanduser() for each in (path, copy_to))
        if in_bucket(folder) and not copy_to:
            raise BadInput(f"path={path!r} is in a bucket: set copy_to to a folder of each host")
        if not path or not folder.is_dir():  # "" would be the current directory
            raise BadInput(f"path={path!r} is no folder that --mode=prepare has filled: set path")
        if copy_to:
            _copy(folder, target)
        self._folder = target if copy_to else folder
        again = "this command" if copy_to else "the same --mode=prepare"
        self._fix = f"delete it and run {again} again, which makes it anew"
        manifest = read_manifest(self._folder)
        _check_origin(manifest, image_size, autoencoder)
        shape = tuple(manifest["latent_shape"])
        self._mean = _per_channel("latent_mean", latent_mean, shape[-1])
        self._std = _per_channel("latent_std", latent_std, shape[-1])
        check_within("latent_std", tuple(latent_std), "(0, inf)")
        names = tuple(entry["name"] for entry in manifest["classes"])
        self.spec = DataSpec(shape, len(names), names, manifest["autoencoder"]["sha256"])
        self._record = record_type(shape)
        rows, _ = self._record.fields["rows"]
        self.stored = Stored(jax.ShapeDtypeStruct(rows.shape, rows.base), self._draw)
        self.digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        self._starts = np.cumsum([0, *(shard["count"] for shard in manifest["shards"])])
        self._paths = [self._folder / shard["name"] for shard in manifest["shards"]]
        for path, shard in zip(self._paths, manifest["shards"], strict=True):
            length = path.stat().length if path.is_file() else 0
            if length != shard["bytes"]:
                raise BadInput(f"{path} has {length} of {shard['bytes']} bytes: {self._fix}")
        self._reader = functools.cache(self._opened)  # which threads share

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return stored means and standard deviations `[n, 2, h, w, C]`; see `Source.gather`.

        Args:
          indices: in [0, 2 len); len + i is the mirror image of i.
        """
        mirrored, pictures = np.divmod(indices, len(self))
        shards = np.searchsorted(self._starts, pictures, side="right") - 1
        positions = 2 * (pictures - self._starts[shards]) + mirrored
        found = np.empty((len(indices), self._record.itemsize), np.uint8)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            with refused(_DAMAGE, f"{self._paths[shard]} is damaged", self._fix):
                # in one call, which does not hold Python's lock
                records = self._reader(shard).read(positions[rows].tolist())
                for row, record in zip(rows, records, strict=True):
                    found[row] = np.frombuffer(record, np.uint8)
        found = found.view(self._record)[:, 0]
        return Batch(found["rows"], found["label"])

    def _opened(self, shard: int) -> ArrayRecordReader:
        return ArrayRecordReader(
            str(self._paths[shard]),
            options="readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2**15,  # about a record; more is read for nothing
        )

    def _draw(self, key: PRNGKeyArray, rows: Array) -> Float32[Array, "n h w c"]:
        mean, std = rows[:, 0].astype(jnp.float32), rows[:, 1].astype(jnp.float32)
        return (mean + std * jax.random.normal(key, mean.shape) - self._mean) / self._std


def _check_origin(manifest: dict[str, Any], image_size: int, autoencoder: str) -> None:
    if (size := manifest["image_size"]) != image_size:
        raise BadInput(f"image_size={image_size}: these have {size} pixels: set image_size={size}")
    made_by, file = manifest["autoencoder"], epath.Path(autoencoder).expanduser()
    if not in_bucket(file) and file.is_dir():
        file = file / "diffusion_pytorch_model.safetensors"
    if autoencoder and not in_bucket(file) and file.exists():
        is_same = sha256_of(file) == made_by["sha256"]
    elif autoencoder in PUBLISHED:
        is_same = PUBLISHED[autoencoder][0].sha256 == made_by["sha256"]
    else:
        is_same = autoencoder == made_by["name"]
    if not is_same:
        told = f"{made_by['name']!r} (SHA-256 {made_by['sha256']}): set that, or path to others"
        raise BadInput(f"autoencoder={autoencoder!r}: these latents are of {told}")


def _per_channel(key: str, values: Sequence[float], channels: int) -> Float32[np.ndarray, "_"]:
    if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
        raise BadInput(f"{key}={tuple(values)}: must be 1 or {channels} finite numbers")
    return np.array(values, np.float32)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copy the shards that a copy lacks: record by record, a network is too slow.

    Processes of one host may share a copy: one makes it, the others wait.
    """
    if in_bucket(target):
        raise BadInput(f"copy_to={str(target)!r}: is in a bucket; must be a folder of this host")
    manifest = read_manifest(source)
    shards = manifest["shards"]

    def copy(shard: Mapping[str, Any]) -> None:
        path = target / shard["name"]
        is_whole = path.is_file() and path.stat().length == shard["bytes"]
        if is_whole and shard.get("sha256") in (None, sha256_of(path)):
            return
        with (
            opened(source / path.name) as file,
            written_aside(path) as aside,
            open(aside, "wb") as copied,
        ):
            shutil.copyfileobj(file, copied, _CHUNK_BYTES)

    size = sum(shard["bytes"] for shard in shards) / 1e9
    problem = f"copy_to={str(target)!r}: cannot be made a copy of {source}, {size:.3g} GB"
    with refused(OSError, problem, "see to both, or choose another folder of this host"):
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / ".lock", wait=True), ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
            if not (target / MANIFEST).exists():
                write_json(target / MANIFEST, manifest)
            elif read_manifest(target) != manifest:
                raise BadInput(f"copy_to={str(target)!r}: holds other latents: choose another")
            shown = {"unit": "shards", "is_wanted": processes.is_first()}
            list(track(pool.map(copy, shards), "copy of latents", len(shards), **shown))

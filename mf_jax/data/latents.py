"""Latents as --mode=prepare leaves them; training draws mean + std * noise at every visit."""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from jaxtyping import Array, Float32, Int, PRNGKeyArray

from mf_jax.data.latent_records import LABEL, NUMBER, local_copy, read_manifest
from mf_jax.data.pipeline import Batch, Stored
from mf_jax.flow.errors import BadInput, reason_of
from mf_jax.flow.records import DataSpec
from mf_jax.published.fetch import PUBLISHED
from mf_jax.runtime.files import in_bucket, sha256_of


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
        self._is_copy = bool(copy_to)
        self._folder = local_copy(folder, target) if copy_to else folder
        manifest = read_manifest(self._folder)
        _check_origin(manifest, image_size, autoencoder)
        shape = tuple(manifest["latent_shape"])
        self._mean = _per_channel("latent_mean", latent_mean, shape[-1])
        self._std = _per_channel("latent_std", latent_std, shape[-1])
        if not (self._std > 0).all():
            raise BadInput(f"latent_std={tuple(latent_std)}: must be above 0")
        names = tuple(entry["name"] for entry in manifest["classes"])
        self.spec = DataSpec(shape, len(names), names, manifest["autoencoder"]["sha256"])
        rows = jax.ShapeDtypeStruct((2, *shape), NUMBER)
        self.stored = Stored(rows, self._draw)
        self.digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        self._shards = manifest["shards"]
        self._starts = np.cumsum([0, *(shard["count"] for shard in self._shards)])
        for shard in self._shards:
            path = self._folder / shard["name"]
            if not path.is_file():
                self._refuse(shard, "is missing")
            if (length := path.stat().length) != shard["bytes"]:
                self._refuse(shard, f"has {length} bytes and must have {shard['bytes']}")
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
        rows = self.stored.rows
        x = np.empty((len(indices), *rows.shape), rows.dtype)
        batch = Batch(x, np.empty(len(indices), np.int32))
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)  # in one call, which does not hold Python's lock
            self._read(shard, positions[rows].tolist(), batch, rows)
        return batch

    def _read(self, shard: int, positions: list[int], batch: Batch, rows: np.ndarray) -> None:
        """Put records of a shard into rows of a batch."""
        try:
            for row, record in zip(rows, self._reader(shard).read(positions), strict=True):
                batch.labels[row] = np.frombuffer(record, LABEL, 1)[0]
                numbers = np.frombuffer(record, NUMBER, offset=LABEL.itemsize)
                batch.x[row] = numbers.reshape(batch.x.shape[1:])
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            self._refuse(self._shards[shard], f"is damaged ({reason_of(error)})")

    def _opened(self, shard: int) -> ArrayRecordReader:
        return ArrayRecordReader(
            str(self._folder / self._shards[shard]["name"]),
            options="readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2**15,  # about a record; more is read for nothing
        )

    def _refuse(self, shard: dict[str, Any], problem: str) -> None:
        path, command = self._folder / shard["name"], "this command again, which copies"
        if not self._is_copy:
            command = "the same --mode=prepare again, which makes"
        raise BadInput(f"{path} {problem}: delete it and run {command} it anew")

    def _draw(self, key: PRNGKeyArray, rows: Array) -> Float32[Array, "n h w c"]:
        mean, std = rows[:, 0].astype(jnp.float32), rows[:, 1].astype(jnp.float32)
        return (mean + std * jax.random.normal(key, mean.shape) - self._mean) / self._std


def _check_origin(manifest: dict[str, Any], image_size: int, autoencoder: str) -> None:
    if (size := manifest["image_size"]) != image_size:
        problem = f"image_size={image_size}: these latents are of pictures of {size} pixels"
        raise BadInput(f"{problem}: set image_size={size}, or path to others")
    made_by, sha256 = manifest["autoencoder"], _sha256(autoencoder)
    if (sha256 or autoencoder) != made_by["sha256" if sha256 else "name"]:
        raise BadInput(
            f"autoencoder={autoencoder!r}: these latents are of {made_by['name']!r} (SHA-256 "
            f"{made_by['sha256']}): set autoencoder={made_by['name']!r}, or path to others"
        )


@functools.lru_cache
def _sha256(autoencoder: str) -> str:
    """Return the SHA-256 of an autoencoder's weights, or "" for a path that is not there."""
    path = epath.Path(autoencoder).expanduser()
    path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    if autoencoder and not in_bucket(path) and path.exists():
        return sha256_of(path)
    return PUBLISHED[autoencoder][0].sha256 if autoencoder in PUBLISHED else ""


def _per_channel(key: str, values: Sequence[float], channels: int) -> Float32[np.ndarray, "_"]:
    if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
        raise BadInput(f"{key}={tuple(values)}: must be 1 or {channels} finite numbers")
    return np.array(values, np.float32)

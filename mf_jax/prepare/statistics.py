"""Reference statistics of the cropped pictures, neither mirrored nor decoded.

A process writes a file of its sums, in float64, anew after each shard. The process that finds all
shards in these files adds them up.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Array, Int, UInt8

from mf_jax.flow.errors import BadInput, in_section, refused
from mf_jax.metrics.frechet import Moments
from mf_jax.metrics.inception import FEATURES, inception_features
from mf_jax.metrics.reference_file import Statistics, write_reference
from mf_jax.metrics.suite import POOLED, SPATIAL
from mf_jax.prepare.stream import Pixels
from mf_jax.runtime.archives import UNREADABLE, read_npz, write_npz

KEPT_FEATURES = 10_000  # rows for precision and recall, spread evenly over the pictures
_LISTS = {
    "shards": np.int64,
    "skipped": np.str_,  # names of broken pictures
    "kept_indices": np.int64,  # numbers in the input of some pictures, and their pooled features
    "kept_features": np.float32,
}
"""What the file of a process holds beside its sums."""


def parts_folder(path: epath.Path) -> epath.Path:
    """Return the folder, beside the file of statistics, that processes keep their sums in."""
    return path.with_name(f"{path.name}.parts")


class ReferenceStatistics:
    """The statistics in one file, to which this process adds some shards.

    Args:
      params: of Inception, on the devices that pictures are given on.
      process: the number of this one and the count of all.
      settings: of the claimed folder of parts; the pictures listed include broken ones.
      crop: from numbers of pictures to blocks of them for the file; None leaves them out.
    """

    def __init__(
        self,
        path: epath.Path,
        params: dict[str, Any],
        process: tuple[int, int],
        settings: Mapping[str, Any],
        crop: Callable[[Int[np.ndarray, "n"]], Iterator[UInt8[np.ndarray, "b s s 3"]]] | None,
    ) -> None:
        self._path, self._parts, self._crop = path, parts_folder(path), crop
        self._params, self._num_shards = params, settings["num_shards"]
        num_listed = settings["num_listed"]
        kept = min(KEPT_FEATURES, num_listed)
        self._wanted = np.arange(kept) * num_listed // kept
        self._own = self._parts / "sums-{:05d}-of-{:05d}.npz".format(*process)
        self._add_up([self._own] if self._own.exists() else [])
        self._done = set(self._shards())

    def has(self, shard: int) -> bool:
        """See `LatentShards.has`."""
        return shard in self._done

    def skipped(self, shards: Sequence[int]) -> list[str]:
        """See `LatentShards.skipped`."""
        return self._lists["skipped"]

    def compute(self, images: UInt8[Array, "b s s 3"]) -> dict[str, Array]:
        """See `LatentShards.compute`."""
        return inception_features(self._params, images)

    @contextlib.contextmanager
    def shard(self, shard: int, skipped: list[str]) -> Iterator[Callable[[Pixels, Any], None]]:
        """See `LatentShards.shard`."""
        yield self._add
        self._lists["shards"].append(shard)
        self._lists["skipped"].extend(skipped)
        arrays = {name: np.array(self._lists[name], kind) for name, kind in _LISTS.items()}
        for name, sums in self._sums.items():
            arrays |= {f"{name}/{key}": np.asarray(x) for key, x in vars(sums).items()}
        write_npz(self._own, arrays)

    def _add(self, pixels: Pixels, features: dict[str, Array]) -> None:
        rows = {name: np.asarray(features[name])[: len(pixels.indices)] for name in self._sums}
        for name, x in rows.items():
            self._sums[name] += Moments.of(x)
        kept = np.isin(pixels.indices, self._wanted)
        self._lists["kept_indices"].extend(pixels.indices[kept])
        self._lists["kept_features"].extend(rows[POOLED][kept])

    def finish(self) -> str:
        """Write the file of statistics if all shards are in sums; see `LatentShards.finish`."""
        shards = self._shards()
        if twice := sorted({shard for shard in shards if shards.count(shard) > 1}):
            cause = "by runs of different prepare.process_count: delete the folder and run again"
            raise BadInput(f"{self._parts} holds shards {twice[:5]} twice, {cause}")
        if len(shards) < self._num_shards:
            share = f"{len(shards)} of {self._num_shards} shards are in the sums"
            return f"{self._path}: {share}; the process that finishes the last one writes the file"
        self._add_up(self._part_paths())
        order = np.argsort(self._lists["kept_indices"])
        kept, features = (
            np.array(self._lists[f"kept_{k}"])[order] for k in ("indices", "features")
        )
        gaussians = (sums.gaussian for sums in self._sums.values())
        statistics = Statistics(self._sums[POOLED].count, *gaussians, features)
        pictures = {"pictures": self._crop(kept), "num_pictures": len(kept)} if self._crop else {}
        write_reference(self._path, statistics, **pictures)
        return f"{self._path}: statistics of {statistics.num_images:,} pictures"

    def _add_up(self, paths: Sequence[epath.Path]) -> None:
        """Set the sums to those in the files of some processes."""
        self._sums = {name: Moments.none(FEATURES[name]) for name in (POOLED, SPATIAL)}
        self._lists = {name: [] for name in _LISTS}
        for stored in map(_read, paths):
            for name in self._sums:
                count, *more = (stored[f"{name}/{key}"] for key in ("count", "mean", "scatter"))
                self._sums[name] += Moments(int(count), *more)
            for name, rows in self._lists.items():
                rows.extend(stored[name])

    def _part_paths(self) -> list[epath.Path]:
        """Return the files of all processes, in their order."""
        return sorted(self._parts.glob("sums-*.npz"))

    def _shards(self) -> list[int]:
        """Return the shards in the sums of any process."""
        read = (_read(path, ["shards"]) for path in self._part_paths())
        return [shard for arrays in read for shard in arrays["shards"].tolist()]


def _read(path: epath.Path, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return the arrays in a file of sums, all or `only` some."""
    fix = "delete it and run again"
    with in_section(path, " "), refused(UNREADABLE, "is no file of sums", fix):
        return read_npz(path, only)

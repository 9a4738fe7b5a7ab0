"""Reference statistics of the cropped pictures, neither mirrored nor decoded.

A process writes a file of its sums, in float64, anew after each shard. The process that finds all
shards in these files adds them up.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int, UInt8

from mf_jax.flow.errors import BadInput
from mf_jax.metrics.frechet import Moments
from mf_jax.metrics.inception import FEATURES, inception_features
from mf_jax.metrics.reference_file import Statistics, write_reference
from mf_jax.prepare.stream import Pixels
from mf_jax.runtime.archives import UNREADABLE, read_npz, write_npz

KEPT_FEATURES = 10_000  # rows for precision and recall, spread evenly over the pictures
_NAMES = _POOLED, _SPATIAL = "2048", "spatial"
Crop = Callable[[Int[np.ndarray, "n"]], Iterator[UInt8[np.ndarray, "b s s 3"]]]


@dataclasses.dataclass
class _Part:
    """The work of one process.

    sums: by the name of the features. skipped: names of the shards' broken pictures. kept_indices,
    kept_features: numbers in the input and pooled features of some pictures.
    """

    sums: dict[str, Moments]
    shards: list[int] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    kept_indices: list[int] = dataclasses.field(default_factory=list)
    kept_features: list[np.ndarray] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "_Part":
        """Return the part that `arrays` has stored."""
        tree = unflatten_dict(dict(arrays), sep="/")
        sums = {name: Moments(int(tree[name].pop("count")), **tree[name]) for name in _NAMES}
        lists = {name: arrays[name].tolist() for name in ("shards", "skipped", "kept_indices")}
        return cls(sums, kept_features=list(arrays["kept_features"]), **lists)

    def add(
        self, sums: Mapping[str, Moments], indices: Sequence[int], features: Iterable[np.ndarray]
    ) -> None:
        """Add sums, and the numbers and features of more kept pictures."""
        for name, more in sums.items():
            self.sums[name] += more
        self.kept_indices.extend(indices)
        self.kept_features.extend(features)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the part as arrays, for a file."""
        rows = np.array(self.kept_features, np.float32)
        tree = {name: vars(sums) for name, sums in self.sums.items()} | {
            "shards": np.array(self.shards, np.int64),
            "skipped": np.array(self.skipped, np.str_),
            "kept_indices": np.array(self.kept_indices, np.int64),
            "kept_features": rows.reshape(-1, FEATURES[_POOLED]),
        }
        return {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}


def parts_folder(path: epath.Path) -> epath.Path:
    """Return the folder, beside the file of statistics, that processes keep their sums in."""
    return path.with_name(f"{path.name}.parts")


class ReferenceStatistics:
    """The statistics in one file, to which this process adds some shards.

    Args:
      params: of Inception, on the devices that pictures are given on.
      process: the number of this one and the count of all.
      num_listed: pictures of all shards, broken ones included.
      crop: from numbers of pictures to blocks of them for the file; None leaves them out.
    """

    def __init__(
        self,
        path: epath.Path,
        params: dict[str, Any],
        process: tuple[int, int],
        *,
        num_shards: int,
        num_listed: int,
        crop: Crop | None,
    ) -> None:
        self._path, self._parts, self._crop = path, parts_folder(path), crop
        self._params, self._num_shards = params, num_shards
        kept = min(KEPT_FEATURES, num_listed)
        self._wanted = np.arange(kept) * num_listed // kept
        self._own = self._parts / "sums-{:05d}-of-{:05d}.npz".format(*process)
        self._part = _Part({name: Moments.none(FEATURES[name]) for name in _NAMES})
        if self._own.exists():
            self._part = _Part.of(_read(self._own))
        self._done = set(self._shards())

    def has(self, shard: int) -> bool:
        """See `LatentShards.has`."""
        return shard in self._done

    def skipped(self, shards: Sequence[int]) -> list[str]:
        """See `LatentShards.skipped`."""
        return self._part.skipped

    def begin(self, shard: int) -> None:
        """See `LatentShards.begin`."""

    def compute(self, images: UInt8[Array, "b s s 3"]) -> dict[str, Array]:
        """See `LatentShards.compute`."""
        return inception_features(self._params, images)

    def add(self, pixels: Pixels, features: dict[str, Array]) -> None:
        """See `LatentShards.add`."""
        rows = {name: np.asarray(features[name])[: pixels.count] for name in _NAMES}
        indices = pixels.indices[: pixels.count]
        kept = np.isin(indices, self._wanted)
        sums = {name: Moments.of(x) for name, x in rows.items()}
        self._part.add(sums, indices[kept].tolist(), rows[_POOLED][kept])

    def end(self, shard: int, skipped: Sequence[str]) -> None:
        """See `LatentShards.end`."""
        self._part.shards.append(shard)
        self._part.skipped.extend(skipped)
        self._done.add(shard)
        write_npz(self._own, self._part.arrays())

    def finish(self) -> str:
        """Write the file of statistics if all shards are in sums; see `LatentShards.finish`."""
        shards = self._shards()
        if twice := sorted({shard for shard in shards if shards.count(shard) > 1}):
            cause = "from runs with different prepare.process_count at once"
            problem = f"{self._parts} holds shards {twice[:5]} twice, {cause}"
            raise BadInput(f"{problem}: delete the folder and run again")
        if len(shards) < self._num_shards:
            share = f"{len(shards)} of {self._num_shards} shards are in the sums"
            return f"{self._path}: {share}; the process that finishes the last one writes the file"
        statistics, kept = _statistics(_Part.of(_read(path)) for path in self._part_paths())
        pictures = {"pictures": self._crop(kept), "num_pictures": len(kept)} if self._crop else {}
        write_reference(self._path, statistics, **pictures)
        return f"{self._path}: statistics of {statistics.num_images:,} pictures"

    def _part_paths(self) -> list[epath.Path]:
        """Return the files of all processes, in their order."""
        return sorted(self._parts.glob("sums-*.npz"))

    def _shards(self) -> list[int]:
        """Return the shards in the sums of any process."""
        read = (_read(path, ["shards"]) for path in self._part_paths())
        return [shard for arrays in read for shard in arrays["shards"].tolist()]


def _read(path: epath.Path, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return the arrays in a file of sums, all or `only` some."""
    try:
        return read_npz(path, only)
    except UNREADABLE as error:
        raise BadInput(f"{path} is no file of sums ({error}): delete it and run again") from error


def _statistics(parts: Iterable[_Part]) -> tuple[Statistics, Int[np.ndarray, "n"]]:
    """Return the statistics of all pictures, and the numbers of those whose features are kept.

    Holds the sums of two processes at once, not of all.
    """
    whole = next(parts := iter(parts))
    for part in parts:
        whole.add(part.sums, part.kept_indices, part.kept_features)
    order = np.argsort(whole.kept_indices)
    features = np.stack(whole.kept_features)[order]
    statistics = Statistics.of(whole.sums[_POOLED], whole.sums[_SPATIAL], features)
    return statistics, np.array(whole.kept_indices)[order]

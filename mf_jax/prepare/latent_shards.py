"""Write latents of pictures and their mirror images, a shard at a time, and last the manifest."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Array, Float16, UInt8

from mf_jax.data import latent_records as records
from mf_jax.data.pixels import from_pixels
from mf_jax.flow.errors import BadInput, listed, refused
from mf_jax.models.autoencoder import Autoencoder
from mf_jax.prepare.stream import Pixels
from mf_jax.runtime.files import sha256_of, written_aside
from mf_jax.runtime.json_files import read_json, write_json


def claim(folder: epath.Path, settings: dict[str, Any], *, key: str) -> None:
    """Make a folder the place of files that settings decide; the first process stores them.

    Several processes may fill the folder side by side. The key is of the config, for errors.
    """
    path = folder / records.SETTINGS
    where = f"{key}={str(folder)!r}"
    with refused(OSError, f"{where} cannot be written", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        files = folder.iterdir() if folder.exists() else ()  # a bucket knows no empty folders
        present = {path.name for path in files if not path.name.startswith(".")}
        if present and records.SETTINGS not in present:
            raise BadInput(f"{where} holds other files; choose an empty folder")
        if not present:
            write_json(path, settings, indent=1)
    stored = read_json(path, {}, records.AGAIN)
    both = ((name, stored.get(name), settings.get(name)) for name in sorted(stored | settings))
    if changes := [f"{name} {old!r} -> {new!r}" for name, old, new in both if old != new]:
        told = f"other settings ({', '.join(changes)})"
        raise BadInput(f"{where} holds files of {told}: choose another folder, or set these back")


class LatentShards:
    """The shards of a claimed folder with its settings, some of which this process writes.

    class_names: in the order of the labels. autoencoder: on the devices that have the pictures.
    """

    def __init__(
        self,
        folder: epath.Path,
        settings: dict[str, Any],
        class_names: Sequence[str],
        autoencoder: Autoencoder,
    ) -> None:
        self._folder, self._settings, self._class_names = folder, settings, tuple(class_names)
        self._shards: int = settings["num_shards"]
        self._autoencoder = autoencoder
        problem = f"data.path={str(folder)!r}: a shard cannot be written"
        fix = "make room, and run again, which continues"
        self._room = functools.partial(refused, (OSError, RuntimeError), problem, fix)

    def has(self, shard: int) -> bool:
        """Return whether a shard is complete, whichever process has made it."""
        side, path = self._side_path(shard), self._path(shard)
        return side.exists() and path.exists() and path.stat().length == self._side(shard)["bytes"]

    def skipped(self, shards: Sequence[int]) -> list[str]:
        """Return the names of broken pictures in this process's complete shards."""
        return [name for shard in shards for name in self._side(shard)["skipped"]]

    def compute(self, images: UInt8[Array, "b s s 3"]) -> tuple[Array, Array]:
        """Encode pictures and their mirror images on the devices, without waiting."""
        return _encode(self._autoencoder, images), _encode(self._autoencoder, images[:, :, ::-1])

    @contextlib.contextmanager
    def shard(self, shard: int, skipped: list[str]) -> Iterator[Callable[[Pixels, Any], None]]:
        """Write a shard anew, of the pictures and what was computed of them that are added.

        At the end the side file comes first; skipped: its broken pictures, known by then.
        """
        counts: Counter[int] = Counter()
        with contextlib.ExitStack() as held:
            aside = held.enter_context(written_aside(self._path(shard)))
            writer = ArrayRecordWriter(aside, records.WRITER_OPTIONS)

            def add(pixels: Pixels, latents: tuple[Array, Array]) -> None:
                rows = np.stack(jax.device_get(latents), axis=1)
                if not np.isfinite(rows).all():
                    key = f"data.autoencoder={self._settings['autoencoder']['name']!r}"
                    raise BadInput(f"{key}: latents are not finite: use trained weights")
                with self._room():
                    for label, both in zip(pixels.labels.tolist(), rows, strict=False):
                        counts[label] += 1
                        for row in both:
                            writer.write(records.to_record(label, row))

            yield add
            with self._room():
                writer.close()
                side = {
                    "count": counts.total(),
                    "bytes": epath.Path(aside).stat().length,
                    "sha256": sha256_of(aside),
                    "labels": {str(label): counts[label] for label in sorted(counts)},
                    "skipped": skipped,
                }
                write_json(self._side_path(shard), side)
                held.close()  # puts the shard in its place

    def finish(self) -> str:
        """Write the manifest if all shards are there; return a line for the user."""
        present = sum(self.has(shard) for shard in range(self._shards))
        if present < self._shards:
            share = f"{present} of {self._shards} shards are there"
            return f"{self._folder}: {share}; the last one brings the manifest"
        sides = [self._side(shard) for shard in range(self._shards)]
        counts = sum((Counter(side["labels"]) for side in sides), Counter())
        classes = [
            {"name": name, "count": counts[str(label)]}
            for label, name in enumerate(self._class_names)
        ]
        if not (num_pictures := sum(side["count"] for side in sides)):
            raise BadInput("prepare.input: none of its pictures can be read; set another folder")
        if empty := [each["name"] for each in classes if not each["count"]]:
            fix = f"replace them, or remove the class, delete {self._folder} and prepare again"
            raise BadInput(f"prepare.input: no picture of class {listed(empty)} can be read: {fix}")
        skipped = self.skipped(range(self._shards))
        shards = [
            {"name": self._path(shard).name}
            | {key: side[key] for key in ("count", "bytes", "sha256") if key in side}
            for shard, side in enumerate(sides)
        ]
        found = {"num_pictures": num_pictures, "classes": classes, "skipped": skipped}
        manifest = self._settings | found | {"shards": shards}
        write_json(self._folder / records.MANIFEST, manifest, indent=1)
        told = f"{num_pictures:,} pictures in {self._shards} shards, {len(skipped)} skipped"
        return f"{self._folder}: {told}"

    def _path(self, shard: int) -> epath.Path:
        return self._folder / records.shard_name(shard, self._shards)

    def _side_path(self, shard: int) -> epath.Path:
        return self._path(shard).with_suffix(".json")

    def _side(self, shard: int) -> dict[str, Any]:
        return read_json(self._side_path(shard), records.SIDE, records.AGAIN)


@jax.jit
def _encode(autoencoder: Autoencoder, images: Array) -> Float16[Array, "b 2 h w c"]:
    return jax.numpy.stack(autoencoder.encode(from_pixels(images)), axis=1).astype(np.float16)

"""--mode=prepare: from pictures to latents and to reference statistics.

1. The pictures, in the order of their names, are dealt to a fixed number of shards. Process i of n
   takes the shards i, i + n, i + 2n, ...
2. A shard is renamed when it is whole: a restart makes what is missing, with the same bytes.
3. The process that finds all shards there writes the manifest; training waits for it.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree, UInt8
from ml_collections import ConfigDict
from orbax.checkpoint.multihost import get_barrier_sync_fn

from mf_jax.data.crop import CROP
from mf_jax.data.latent_records import FORMAT_VERSION
from mf_jax.data.picture_list import PicturesIn, digest, list_pictures
from mf_jax.flow.errors import BadInput, check_within
from mf_jax.metrics.inception import load_inception
from mf_jax.models.autoencoder import load_autoencoder
from mf_jax.prepare.latent_shards import LatentShards, claim
from mf_jax.prepare.statistics import ReferenceStatistics, parts_folder
from mf_jax.prepare.stream import PictureStream, Pixels
from mf_jax.published.fetch import find_weights, verify
from mf_jax.runtime import processes

_OF_AUTOENCODER = ("sha256", "scaling_factor")
Output = LatentShards | ReferenceStatistics  # what is made of the pictures, by shards


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Make this process's share of latents and statistics; a failure keeps what is finished."""
    process = index, count = check_prepare(config)
    prepare, data = config.prepare, config.data
    taken = {"tfds_split": data.split_train, "class_order": data.class_order}
    pictures = list_pictures(prepare.input, key="prepare.input", **taken)
    fix = f"the input has {(num_pictures := len(pictures))} pictures"
    check_within("prepare.shards", prepare.shards, f"[1, {num_pictures}]", fix)
    common = {
        "format_version": FORMAT_VERSION,
        "image_size": data.image_size,
        "crop": CROP,
        "num_shards": prepare.shards,
        "num_listed": num_pictures,
        "input_sha256": digest(pictures.lines()),
    }
    # what is to be made is opened before any work
    outputs: list[Output] = [_latents(config, common, pictures)] if prepare.latents else []
    outputs += [_reference(config, common, pictures, process)] if prepare.reference else []
    mine = range(index, prepare.shards, count)
    missing = {shard: [output for output in outputs if not output.has(shard)] for shard in mine}
    skipped = outputs[0].skipped([shard for shard in mine if not missing[shard]])
    if pending := {shard: outputs for shard, outputs in missing.items() if outputs}:
        _work(config, pictures, pending, skipped)
    if not prepare.process_count:  # a job's first process must outlive the others
        get_barrier_sync_fn()(key="prepared", timeout_ms=7 * 24 * 3600 * 1000)  # a week
    with processes.together():
        if prepare.process_count or processes.is_first():
            for output in outputs:
                print(output.finish(), flush=True)


def check_prepare(config: ConfigDict) -> tuple[int, int]:
    """Check the config; return the number of this process and the count of all."""
    prepare, data = config.prepare, config.data
    index, count = prepare.process_index, prepare.process_count
    if not (prepare.latents or prepare.reference):
        raise BadInput("prepare.latents=False, prepare.reference='': nothing to make; set one")
    if prepare.latents and not data.path:
        raise BadInput("data.path='' is not set: name a folder for the latents")
    check_within("prepare.process_index", index, f"[0, {max(count, 1)})", "set process_count too")
    return (index, count) if count else (jax.process_index(), jax.process_count())


def _latents(config: ConfigDict, common: dict[str, Any], pictures: PicturesIn) -> LatentShards:
    name, size = config.data.autoencoder, config.data.image_size
    autoencoder = load_autoencoder(find_weights(name, config.weights_dir, key="data.autoencoder"))
    verify(name, autoencoder.sha256)
    factor = autoencoder.network.factor
    if size % factor:
        fix = f"must be divisible by {factor}: try {max(1, round(size / factor)) * factor}"
        raise BadInput(f"data.image_size={size}: for autoencoder {name!r} {fix}")
    settings = common | {
        "mirrors": True,
        "latent_shape": [size // factor, size // factor, autoencoder.network.latent_channels],
        "autoencoder": {"name": name} | {k: getattr(autoencoder, k) for k in _OF_AUTOENCODER},
    }
    folder = epath.Path(config.data.path).expanduser()
    claim(folder, settings, key="data.path")
    return LatentShards(folder, settings, pictures.class_names, _on_devices(autoencoder))


def _reference(
    config: ConfigDict, common: dict[str, Any], pictures: PicturesIn, process: tuple[int, int]
) -> ReferenceStatistics:
    name, path = config.eval.inception, epath.Path(config.prepare.reference).expanduser()
    if path.suffix != ".npz":
        raise BadInput(f"prepare.reference={str(path)!r}: must end in .npz")
    parts = parts_folder(path)
    if path.exists() and not parts.exists():
        raise BadInput(f"prepare.reference={str(path)!r} exists; must be new: name another file")
    inception = load_inception(find_weights(name, config.weights_dir, key="eval.inception"))
    verify(name, inception.sha256)
    settings = common | {"inception_sha256": inception.sha256}
    claim(parts, settings, key="prepare.reference")
    params = _on_devices(inception.params)
    crop = functools.partial(_crop, config, pictures) if config.prepare.reference_pictures else None
    return ReferenceStatistics(path, params, process, settings, crop)


def _crop(
    config: ConfigDict, pictures: PicturesIn, indices: Int[np.ndarray, "n"]
) -> Iterator[UInt8[np.ndarray, "b s s 3"]]:
    """Yield blocks of pictures, as they were cropped before."""
    stream = PictureStream(config, pictures, indices, max_bad=0)
    with stream.bar:
        for pixels in stream.take(len(indices), []):
            yield pixels.images[: len(pixels.labels)]


def _on_devices(tree: PyTree, *axes: str) -> PyTree:
    """Put arrays on this process's own devices, which work at their own pace; axes split rows."""
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def _work(
    config: ConfigDict, pictures: PicturesIn, pending: dict[int, list[Output]], skipped: list[str]
) -> None:
    """Make the missing shards of each output."""
    starts = np.linspace(0, len(pictures), config.prepare.shards + 1).astype(np.int64)
    indices = {shard: np.arange(starts[shard], starts[shard + 1]) for shard in pending}
    wanted = np.concatenate(list(indices.values()))
    max_bad = config.prepare.max_bad
    stream = PictureStream(config, pictures, wanted, max_bad=max_bad, bad=skipped)
    with stream.bar:
        for shard, outputs in pending.items():
            skipped = list[str]()
            with contextlib.ExitStack() as held:
                adds = [held.enter_context(output.shard(shard, skipped)) for output in outputs]
                batches = stream.take(len(indices[shard]), skipped)
                for pixels, computed in _computed(batches, outputs):
                    for add, values in zip(adds, computed, strict=True):
                        add(pixels, values)


def _computed(
    batches: Iterator[Pixels], outputs: list[Output]
) -> Iterator[tuple[Pixels, list[Any]]]:
    """Yield batches and what outputs compute of them; the next is computed meanwhile."""
    ahead = []
    for pixels in batches:
        images = _on_devices(pixels.images, "batch")
        ahead.append((pixels, [output.compute(images) for output in outputs]))
        if len(ahead) > 1:
            yield ahead.pop(0)
    yield from ahead

"""A trained model that can be sampled: what sampling, evaluation, sample grids and notebooks share."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.config import check_guidance, check_labels, make_objective
from mf_jax.decoding import Decoder, load_decoder, pixels_of
from mf_jax.errors import BadInput
from mf_jax.flow import sampler as samplers
from mf_jax.flow.records import NO_LABEL, Condition, GuidanceScale
from mf_jax.flow.sampler import time_grid
from mf_jax.models import as_field
from mf_jax.models.blocks import unstack_blocks
from mf_jax.published.checkpoints import write_published
from mf_jax.runtime.processes import on_host
from mf_jax.runtime.sharding import batch_sharding

NO_GUIDANCE = (1.0, 0.0, 1.0)


def all_classes_in_turn(num: int, num_classes: int) -> Int[np.ndarray, "n"]:
    """Return labels 0, 1, ..., 0, 1, ... `[num]`, as balanced as can be; `NO_LABEL` without classes."""
    return (np.arange(num) % num_classes if num_classes else np.full(num, NO_LABEL)).astype(
        np.int32
    )


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained model, ready to sample.

    Args:
      config: of its run.
      network: the network.
      params: its parameters.
      shape: of one sample, (H, W, C) or (D,).
      num_classes: 0 for an unconditional model.
      class_names: of the classes.
      step: training steps behind the parameters.
      ema: which moving average they are, or `none`.
      origin: SHA-256 of the autoencoder whose latents it generates; "" where there is none, or it is not known.
    """

    config: ConfigDict
    network: nn.Module
    params: PyTree
    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    step: int
    ema: str
    origin: str = ""

    def sample(
        self,
        labels: Sequence[int] | Int[np.ndarray, "n"] | None = None,
        *,
        num: int | None = None,
        steps: int = 1,
        times: Sequence[float] = (),
        guidance: Sequence[float] = NO_GUIDANCE,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Shaped[np.ndarray, "n ..."]:
        """Return samples; sample i depends on (seed, i, its label) and the time grid alone.

        Args:
          labels: classes, one for each sample, -1 for none; by default all classes in turn.
          num: number of samples; by default one for each label. Labels are repeated to reach it.
          steps: network evaluations of one sample, at least 1.
          times: the time grid instead, falling from 1.0 to 0.0.
          guidance: (omega, t_min, t_max) for a network that is told guidance.
          seed: of the noise.
          batch_size: samples computed at once.

        Returns:
          Images uint8 `[N, H, W, C]` in [0, 255], or vectors float32 `[N, D]`.

        Raises:
          BadInput: for labels that are no classes, or a number of samples or steps below 1.
        """
        labels = self.labels_for(labels, num)
        convert = self.pixels if len(self.shape) == 3 else on_host
        how = {
            "steps": steps,
            "times": times,
            "guidance": guidance,
            "seed": seed,
            "batch_size": batch_size,
        }
        return np.concatenate([on_host(convert(x)) for x, _ in self.batches(labels, **how)])[
            : len(labels)
        ]

    def sample_raw(
        self,
        labels: Sequence[int] | Int[np.ndarray, "n"] | None = None,
        *,
        num: int | None = None,
        steps: int = 1,
        times: Sequence[float] = (),
        guidance: Sequence[float] = NO_GUIDANCE,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Float[np.ndarray, "n ..."]:
        """Return samples as `sample` does, but float32 as in training: not rounded, latents as they are."""
        labels = self.labels_for(labels, num)
        how = {
            "steps": steps,
            "times": times,
            "guidance": guidance,
            "seed": seed,
            "batch_size": batch_size,
        }
        return np.concatenate([on_host(x) for x, _ in self.batches(labels, **how)])[: len(labels)]

    def batches(
        self,
        labels: Int[np.ndarray, "n"],
        *,
        steps: int = 1,
        times: Sequence[float] = (),
        guidance: Sequence[float] = NO_GUIDANCE,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Iterator[tuple[Float[Array, "b ..."], Int[np.ndarray, "b"]]]:
        """Yield samples on the devices, batch by batch, and their numbers; see `sample`.

        All batches have the same size, a multiple of the number of devices. In the last one rows with a number of
        len(labels) or more are padding.
        """
        grid = time_grid(steps, times)
        check_guidance(guidance, self.config, key="guidance")
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size}: must be at least 1")
        if not 0 <= seed < 2**31:
            raise BadInput(f"seed={seed}: must be within [0, 2^31)")
        size = -(-min(batch_size, len(labels)) // self.mesh.size) * self.mesh.size
        sharding = batch_sharding(self.mesh)
        for first in range(0, len(labels), size):
            index = np.arange(first, first + size, dtype=np.int32)
            x = _sample(
                self.network,
                make_objective(self.config).learns_average,
                self.shape,
                self.params,
                seed,
                jnp.asarray(grid, jnp.float32),
                jnp.asarray(guidance, jnp.float32),
                jax.device_put(index, sharding),
                jax.device_put(labels[np.minimum(index, len(labels) - 1)], sharding),
            )
            yield x, index

    @property
    def mesh(self) -> Mesh:
        """The devices that it samples on."""
        return jax.tree.leaves(self.params)[0].sharding.mesh

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        """What turns its latents into pictures; None where the network generates pictures or vectors."""
        return load_decoder(self.config, origin=self.origin)

    def pixels(self, x: Float[Array, "b ..."]) -> UInt8[Array, "b h w c"]:
        """Return samples of `batches` as pictures of bytes, on the devices.

        Raises:
          BadInput: if the autoencoder of latents is missing, or another one than that of the run.
        """
        return pixels_of(self.mesh, self.decoder, x)

    def labels_for(
        self, labels: Sequence[int] | Int[np.ndarray, "n"] | None, num: int | None = None
    ) -> Int[np.ndarray, "n"]:
        """Return the label of each of num samples, int32 `[num]`; see `sample`."""
        given = np.asarray([] if labels is None else labels, np.int32).ravel()
        num = len(given) if num is None and len(given) else num
        if num is None or num < 1:
            raise BadInput(f"num={num}: must be at least 1; give num or labels")
        check_labels(given.tolist(), self.num_classes, self.config)
        return np.resize(given, num) if len(given) else all_classes_in_turn(num, self.num_classes)

    def average_velocity(
        self,
        z: Float[np.ndarray, "n ..."],
        *,
        r: float,
        t: float,
        labels: Int[np.ndarray, "n"] | None = None,
    ) -> Float[np.ndarray, "n ..."]:
        """Return u(z, r, t) for points z `[N, ...]`, without labels by default."""
        labels = np.full(len(z), NO_LABEL, np.int32) if labels is None else labels
        r, t = (jnp.full(len(z), time, jnp.float32) for time in (r, t))
        return np.asarray(
            _evaluate(self.network, self.params, jnp.asarray(z, jnp.float32), r, t, labels)
        )

    def export(self, path: str | Path, *, kind: str) -> None:
        """Write the parameters under the names of a published checkpoint, for programs that read those.

        Args:
          path: a `.npz` or `.safetensors` file.
          kind: `meanflow` (a dit), `imf` or `pmf` (an in_context_dit), as the network is.

        Raises:
          BadInput: if the network is of another kind, or the path is no such file.
        """
        params = unstack_blocks(jax.device_get(self.params))
        write_published(path, kind, params, patch_size=self.config.model.patch_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(
    network: nn.Module,
    learns_average: bool,
    shape: tuple[int, ...],
    params: PyTree,
    seed: Array,
    times: Array,
    guidance: Array,
    index: Array,
    labels: Array,
) -> Array:
    key = jax.random.key(seed)
    e = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)
    told = GuidanceScale(*(jnp.full(labels.shape, value) for value in guidance))
    # evaluation must not depend on what precision a platform calls its default
    with jax.default_matmul_precision("highest"):
        return samplers.sample(
            as_field(network),
            params,
            e,
            Condition(labels, guidance=told),
            times=times,
            learns_average=learns_average,
        )


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(
    network: nn.Module, params: PyTree, z: Array, r: Array, t: Array, labels: Array
) -> Array:
    with jax.default_matmul_precision("highest"):
        return as_field(network)(params, z, r=r, t=t, condition=Condition(labels)).u

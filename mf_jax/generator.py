"""A trained model that can be sampled: what sampling, evaluation, sample grids and notebooks share."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.config import make_objective
from mf_jax.decoding import Decoder, load_decoder, pixels_of
from mf_jax.errors import BadInput
from mf_jax.flow import sampler as samplers
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, GuidanceScale
from mf_jax.flow.sampler import ONE_STEP, SamplePlan
from mf_jax.models import as_field
from mf_jax.models.blocks import unstack_blocks
from mf_jax.published.checkpoints import write_published
from mf_jax.runtime.processes import on_host
from mf_jax.runtime.sharding import batch_sharding


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
      spec: of one sample.
      step: training steps behind the parameters.
      ema: which moving average they are, or `none`.
    """

    config: ConfigDict
    network: nn.Module
    params: PyTree
    spec: DataSpec
    step: int
    ema: str

    def sample(
        self,
        labels: Sequence[int] | Int[np.ndarray, "n"] | None = None,
        *,
        num: int | None = None,
        plan: SamplePlan = ONE_STEP,
        **changes: Any,
    ) -> Shaped[np.ndarray, "n ..."]:
        """Return images uint8 `[N, H, W, C]`, or vectors float32 `[N, D]`.

        Sample i depends on (seed, i, its label), the times and the guidance alone.

        Args:
          labels: classes, one for each sample, -1 for none; by default all classes in turn.
          num: number of samples; by default one for each label. Labels are repeated to reach it.
          plan: how to sample.
          changes: to the plan, by the names of its fields, e.g. `steps=2, seed=1`; or guidance=(omega, t_min, t_max).
        """
        convert = self.pixels if self.spec.is_picture else on_host
        return self._gather(convert, labels, num, plan.replace(**changes))

    def sample_raw(
        self,
        labels: Sequence[int] | Int[np.ndarray, "n"] | None = None,
        *,
        num: int | None = None,
        plan: SamplePlan = ONE_STEP,
        **changes: Any,
    ) -> Float[np.ndarray, "n ..."]:
        """Return samples as `sample` does, but float32 as in training: not rounded, latents as they are."""
        return self._gather(on_host, labels, num, plan.replace(**changes))

    def _gather(
        self,
        convert: Callable[[Array], Array],
        labels: Sequence[int] | Int[np.ndarray, "n"] | None,
        num: int | None,
        plan: SamplePlan,
    ) -> np.ndarray:
        labels = self.labels_for(labels, num)
        samples = [on_host(convert(x)) for x, _ in self.batches(labels, plan)]
        return np.concatenate(samples)[: len(labels)]

    def batches(
        self, labels: Int[np.ndarray, "n"], plan: SamplePlan
    ) -> Iterator[tuple[Float[Array, "b ..."], Int[np.ndarray, "b"]]]:
        """Yield samples on the devices, batch by batch, and their numbers; see `sample`.

        All batches have the same size, a multiple of the number of devices. In the last one rows with a number of
        len(labels) or more are padding.
        """
        plan.check_guidable(self.config.draws.omega_max)
        size = -(-min(plan.batch_size, len(labels)) // self.mesh.size) * self.mesh.size
        sharding = batch_sharding(self.mesh)
        for first in range(0, len(labels), size):
            index = np.arange(first, first + size, dtype=np.int32)
            x = _sample(
                self.network,
                make_objective(self.config).learns_average,
                self.spec.shape,
                self.params,
                plan.seed,
                jnp.asarray(plan.grid, jnp.float32),
                jnp.asarray(plan.guidance, jnp.float32),
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
        return load_decoder(self.config, origin=self.spec.origin)

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
        has_null = self.config.draws.label_drop_share > 0
        self.spec.check_labels(given.tolist(), has_null=has_null)
        classes = self.spec.num_classes
        return np.resize(given, num) if len(given) else all_classes_in_turn(num, classes)

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

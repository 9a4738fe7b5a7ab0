"""A trained model that can be sampled."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.config import check_plan, has_null, learns_average
from mf_jax.data.given import checked_given
from mf_jax.data.pipeline import MORE
from mf_jax.data.pixels import to_pixels
from mf_jax.flow import sampler
from mf_jax.flow.draws import key_of
from mf_jax.flow.errors import BadInput, check_known, check_within
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, GuidanceScale, Told
from mf_jax.flow.sampler import ONE_STEP, SamplePlan
from mf_jax.models import as_field
from mf_jax.models.autoencoder import Decoder, load_autoencoder
from mf_jax.models.blocks import unstack_blocks
from mf_jax.models.layers import sine_cosine_positions
from mf_jax.published.checkpoints import write_published
from mf_jax.published.fetch import find_weights, verify
from mf_jax.published.names import KINDS, KINDS_WITH_POSITIONS, check_prediction
from mf_jax.runtime.processes import on_host
from mf_jax.runtime.sharding import ROWS, batch_sharding, make_mesh

_LEAST_NUMBERS = 4096  # fewer are padded, which takes less time than to compile another size
_load_autoencoder = functools.lru_cache(1)(load_autoencoder)
Labels = Sequence[int | str] | Int[np.ndarray, "n"] | None


def load_decoder(config: ConfigDict, *, origin: str) -> Decoder | None:
    """Return the decoder of a run's latents, or None if its network generates pictures or vectors.

    The origin is the SHA-256 of the autoencoder that made the latents, "" where it is not known.
    """
    if config.data.name != "latents":
        return None
    path = find_weights(config.data.autoencoder, config.weights_dir, key="data.autoencoder")
    autoencoder = _load_autoencoder(path)
    verify(config.data.autoencoder, autoencoder.sha256)
    if origin not in ("", autoencoder.sha256):
        told = f"has SHA-256 {autoencoder.sha256}; use the one that made the latents, {origin}"
        raise BadInput(f"data.autoencoder={path}: {told}")
    scale = (config.data.latent_mean, config.data.latent_std)
    return Decoder(autoencoder, *(jnp.asarray(values, jnp.float32) for values in scale))


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained model, ready to sample.

    step: training steps behind the parameters. ema: name of the moving average that they are, or
    `none`.
    """

    config: ConfigDict
    network: nn.Module
    params: PyTree
    spec: DataSpec
    step: int
    ema: str

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        made = f"{self.config.model.name} of {count:,} parameters, step {self.step}, ema {self.ema}"
        return f"Generator({made}, samples of shape {self.spec.shape})"

    def caption(self, plan: SamplePlan) -> str:
        """Return whose samples of a plan are, and how they are made."""
        of = "average" if self.step else "weights"
        whose = {"none": "raw parameters"}.get(self.ema, f"{of} {self.ema}")
        num = len(plan.grid) - 1
        return f"step {self.step:,} · {num} evaluation{'s' * (num > 1)} a sample · {whose}"

    def sample(
        self,
        labels: Labels = None,
        *,
        num: int | None = None,
        plan: SamplePlan = ONE_STEP,
        **more: Any,
    ) -> Shaped[np.ndarray, "n ..."]:
        """Return images uint8 `[N, H, W, C]`, or float32 vectors `[N, D]` or signals `[N, L, C]`.

        Sample i depends on (seed, i, what it is told), the times and the guidance alone.

        Args:
          labels: classes or their names, one for each sample, -1 for none; by default all in turn.
          num: number of samples; by default one for each label, which are repeated to reach it,
            or for each class.
          plan: steps, times, guidance, seed and batch size.
          more: fields of the plan, such as steps=2 or guidance=(omega, t_min, t_max); e, the noise
            itself. Of a model that was trained with them also condition `[N, K]` (a row of NaN for
            none) and mask.
        """
        convert = self.pixels if self.spec.is_picture else on_host
        return self._collect(convert, labels, num, plan, **more)

    def sample_raw(self, labels: Labels = None, **request: Any) -> Float[np.ndarray, "n ..."]:
        """Return samples as the network makes them, not decoded; takes what `sample` takes."""
        return self._collect(on_host, labels, **request)

    def _collect(
        self, convert: Callable, labels: Labels, num: int | None = None, plan=ONE_STEP, **more: Any
    ) -> Shaped[np.ndarray, "n ..."]:
        given = self.given_for({key: more.pop(key, None) for key in MORE})
        if num is None and given:
            labels = labels if labels is None else np.ravel(np.asarray(labels, object)).tolist()
            num = max(len(each) for each in (*given.values(), labels) if each is not None)
        labels = self.labels_for(labels, num)
        least = max(len(labels), _LEAST_NUMBERS // math.prod(self.spec.shape))
        least = 1 << (least - 1).bit_length()
        batches = self.batches(labels, plan.replace(**more), given, least)
        return np.concatenate([on_host(convert(x)) for x, _ in batches])[: len(labels)]

    def batches(
        self,
        labels: Int[np.ndarray, "n"],
        plan: SamplePlan,
        given: Mapping[str, np.ndarray] = MappingProxyType({}),
        least_rows: int = 1,
    ) -> Iterator[tuple[Float[Array, "b ..."], Int[np.ndarray, "b"]]]:
        """Yield samples on the devices, batch by batch, and their numbers.

        All batches have one size, a multiple of the number of devices. Numbers from len(labels) on
        are padding. What `given_for` returns is repeated to reach all of them.
        """
        check_plan(self.config, plan)
        if plan.renoise and self.spec.has_pairs:
            raise BadInput("renoise=True: the noise of this model comes with its data; use False")
        rows = min(plan.batch_size, max(len(labels), least_rows))
        size = -(-rows // self.mesh.size) * self.mesh.size
        place = functools.partial(jax.device_put, device=batch_sharding(self.mesh))
        fixed = (self.network, learns_average(self.config), plan.renoise, self.spec.shape)
        times, num_steps = plan.padded_grid
        for first in range(0, len(labels), size):
            index = np.arange(first, first + size, dtype=np.int32)
            x, is_good = sample_rows(
                *fixed,
                self.params,
                plan.seed,
                (np.float32(times), num_steps, self.config.draws.noise_scale),
                np.float32(plan.guidance),
                place(index),
                place(labels[np.minimum(index, len(labels) - 1)]),
                {name: place(each[index % len(each)]) for name, each in given.items()},
            )
            if bad := int((~on_host(is_good) & (index < len(labels))).sum()):
                fix = "take an earlier checkpoint, or train with a lower optim.lr"
                raise BadInput(f"{bad} of {len(labels)} samples are not finite: {fix}")
            yield x, index

    @property
    def mesh(self) -> Mesh:
        """The devices that it samples on."""
        devices = jax.tree.leaves(self.params)[0].sharding.device_set
        return make_mesh(data=0, fsdp=1, devices=list(devices))

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        """The decoder of its latents; None where the network generates pictures or vectors."""
        return load_decoder(self.config, origin=self.spec.origin)

    def pixels(self, x: Float[Array, "b ..."]) -> UInt8[Array, "b h w c"]:
        """Return samples of `batches` as pictures of bytes, on the devices."""
        pixels, are_finite = _pixels(self.mesh, self.decoder, x)
        if not are_finite:
            raise BadInput("a decoded sample is not finite; see data.latent_mean, data.latent_std")
        return pixels

    def labels_for(self, labels: Labels, num: int | None = None) -> Int[np.ndarray, "n"]:
        """Return the label of each of num samples, int32 `[num]`; see `sample`."""
        given = np.asarray([] if labels is None else labels, object).ravel()
        given = np.array([self.spec.label_of(label) for label in given], np.int32)
        num = len(given) or max(self.spec.num_classes, 1) if num is None else num
        check_within("num", num, "[1, inf)")
        self.spec.check_labels(given.tolist(), has_null=has_null(self.config))
        if not len(given):
            given = np.arange(self.spec.num_classes) if self.spec.num_classes else [NO_LABEL]
        return np.resize(given, num).astype(np.int32)

    def given_for(self, given: Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Return what samples are given besides labels; see `checked_given`."""
        return checked_given(self.spec, given, has_null=has_null(self.config))

    def average_velocity(
        self, z: Float[np.ndarray, "n ..."], *, r: float, t: float
    ) -> Float[np.ndarray, "n ..."]:
        """Return u(z, r, t) without labels."""
        r, t = (jnp.full(len(z), time, jnp.float32) for time in (r, t))
        condition = Condition(jnp.full(len(z), NO_LABEL, jnp.int32))
        with jax.default_matmul_precision("highest"):
            field = as_field(self.network)
            return np.asarray(field(self.params, jnp.float32(z), r=r, t=t, condition=condition).u)

    def export(self, path: str | Path, *, kind: str) -> None:
        """Write the parameters under the names of a published checkpoint.

        Args:
          path: a `.npz` or `.safetensors` file.
          kind: `meanflow`, `sit`, `tvm`, `zhuyu_meanflow`, `soflow` or `alphaflow` of a dit, `imf`
            or `pmf` of an in_context_dit, `py_meanflow` of a unet. A `sit` has the velocity
            u(z, t, t) alone. Networks of a `pmf` predict the data, all others the velocity.
        """
        params, model = unstack_blocks(jax.device_get(self.params)), self.config.model
        check_known("kind", kind, KINDS)
        check_prediction(kind, model.prediction)
        positions = ()
        if kind in KINDS_WITH_POSITIONS:
            grid = (side // model.patch_size for side in self.spec.shape[:2])
            positions = sine_cosine_positions(*grid, num_features=model.width)
        write_published(path, kind, params, patch_size=model.patch_size, positions=positions)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sample_rows(
    network: nn.Module,
    learns_average: bool,
    renoise: bool,
    shape: tuple[int, ...],
    params: PyTree,
    seed: Array,
    grid: tuple[Array, Array, Array | float],
    guidance: Array,
    index: Array,
    labels: Array,
    given: Mapping[str, Array] = MappingProxyType({}),
) -> tuple[Array, Array]:
    """Return samples, and whether each is finite; grid: padded times, steps, scale of the noise."""
    key, (times, num, noise_scale) = key_of(seed), grid
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def noise(keys: Array) -> Array:
        return noise_scale * jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)

    def fresh(step: Array) -> Array:
        return noise(jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    scale = GuidanceScale(*(jnp.full(labels.shape, value) for value in guidance))
    told = Told(labels, given["condition"]) if "condition" in given else labels
    condition, field = Condition(told, guidance=scale), as_field(network)
    e = given["e"] if "e" in given else noise(keys)
    # evaluation must not depend on what precision a platform calls its default
    with jax.default_matmul_precision("highest"):
        more = {"times": times, "num_intervals": num, "renoise": fresh if renoise else None}
        more |= {"learns_average": learns_average, "mask": given.get("mask")}
        x = sampler.sample(field, params, e, condition, **more)
    return x, jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _pixels(mesh: Mesh, decoder: Decoder | None, x: Array) -> tuple[Array, Array]:
    """Return bytes, and whether all came of finite numbers; each device decodes its own rows."""
    if decoder is not None:
        rows = PartitionSpec(ROWS)
        specs = {"in_specs": (PartitionSpec(), rows), "out_specs": rows, "check_vma": False}
        x = jax.shard_map(Decoder.__call__, mesh=mesh, **specs)(decoder, x)
    return to_pixels(x), jnp.isfinite(x).all()

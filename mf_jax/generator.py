"""A trained model that can be sampled: what sampling, evaluation, sample grids and notebooks share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax import samplers
from mf_jax import workdir as run_folder
from mf_jax.build import check_guidance, check_labels, choose_ema, make_network, make_objective
from mf_jax.data import Source, make_source
from mf_jax.models import as_field, parameter_shapes
from mf_jax.models.blocks import unstack_blocks
from mf_jax.reference.weights import write_published
from mf_jax.samplers import time_grid
from mf_jax.sharding import batch_sharding, make_mesh
from mf_jax.types import NO_LABEL, BadInput, Condition, GuidanceScale
from mf_jax.warm_start import fit, load_weights, restore_run

NO_GUIDANCE = (1.0, 0.0, 1.0)


def to_pixels(x: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    """Return images in [-1, 1] as bytes: round((x + 1) * 127.5), clipped to [0, 255]."""
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def all_classes_in_turn(num: int, num_classes: int) -> Int[np.ndarray, "n"]:
    """Return labels 0, 1, ..., 0, 1, ... `[num]`, as balanced as can be; `NO_LABEL` without classes."""
    return (np.arange(num) % num_classes if num_classes else np.full(num, NO_LABEL)).astype(np.int32)


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
    """

    config: ConfigDict
    network: nn.Module
    params: PyTree
    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    step: int
    ema: str

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
        convert = to_pixels if len(self.shape) == 3 else np.asarray
        return self._sample(
            convert,
            labels,
            num=num,
            steps=steps,
            times=times,
            guidance=guidance,
            seed=seed,
            batch_size=batch_size,
        )

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
        """Return samples as `sample` does, but float32 in the range of the training data, not rounded or clipped."""
        how = {
            "steps": steps,
            "times": times,
            "guidance": guidance,
            "seed": seed,
            "batch_size": batch_size,
        }
        return self._sample(np.asarray, labels, num=num, **how)

    def _sample(
        self,
        convert: Callable[[Any], np.ndarray],
        labels: Sequence[int] | Int[np.ndarray, "n"] | None,
        *,
        num: int | None,
        steps: int,
        times: Sequence[float],
        guidance: Sequence[float],
        seed: int,
        batch_size: int,
    ) -> Shaped[np.ndarray, "n ..."]:
        grid = time_grid(steps, times)
        labels = self.labels_for(labels, num)
        check_guidance(guidance, self.config, key="guidance")
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size}: must be at least 1")
        if not 0 <= seed < 2**31:
            raise BadInput(f"seed={seed}: must be within [0, 2^31)")
        mesh = jax.tree.leaves(self.params)[0].sharding.mesh
        size = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size
        sharding = batch_sharding(mesh)
        parts = []
        for first in range(0, len(labels), size):
            index = np.arange(first, first + size, dtype=np.int32)
            chosen = labels[np.minimum(index, len(labels) - 1)]  # the last batch is padded, then cut
            x = _sample(
                self.network,
                make_objective(self.config).learns_average,
                self.shape,
                self.params,
                seed,
                jnp.asarray(grid, jnp.float32),
                jnp.asarray(guidance, jnp.float32),
                jax.device_put(index, sharding),
                jax.device_put(chosen, sharding),
            )
            parts.append(convert(np.asarray(x)))
        return np.concatenate(parts)[: len(labels)]

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
        self, z: Float[np.ndarray, "n ..."], *, r: float, t: float, labels: Int[np.ndarray, "n"] | None = None
    ) -> Float[np.ndarray, "n ..."]:
        """Return u(z, r, t) for points z `[N, ...]`, without labels by default."""
        labels = np.full(len(z), NO_LABEL, np.int32) if labels is None else labels
        r, t = (jnp.full(len(z), time, jnp.float32) for time in (r, t))
        return np.asarray(_evaluate(self.network, self.params, jnp.asarray(z, jnp.float32), r, t, labels))

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
def _evaluate(network: nn.Module, params: PyTree, z: Array, r: Array, t: Array, labels: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return as_field(network)(params, z, r=r, t=t, condition=Condition(labels)).u


def load(workdir: str | Path, *, ema: str = "") -> Generator:
    """Load the newest checkpoint of a run.

    Args:
      workdir: the run's folder.
      ema: a decay of the run's `ema.decays`, `none` for the raw parameters, "" for the first decay.

    Returns:
      The generator.

    Raises:
      BadInput: if there is no run or no checkpoint, or the run has no such moving average.
    """
    folder = Path(workdir)
    config = run_folder.stored_config(folder)
    return load_as(folder, config, ema=choose_ema(config, "ema", ema))


def load_as(folder: Path, config: ConfigDict, *, ema: str, step: int | None = None) -> Generator:
    """Load a checkpoint of a workdir, by default the newest, as the model that a config describes; see `load`."""
    shape, num_classes, class_names = run_folder.stored_data(folder)
    network = make_network(config, shape=shape, num_classes=num_classes, for_sampling=True)
    step, params = restore_run(folder, config, ema, step)
    params = fit(params, parameter_shapes(network, shape), where=str(folder))
    return Generator(config, network, params, shape, num_classes, class_names, step, ema)


def load_initial(config: ConfigDict, source: Source) -> Generator:
    """Return the weights that `init` names as a model that no run of ours has trained, at step 0.

    Args:
      config: describes the network, and the data that it was trained on.
      source: those data, for their shape and classes.

    Raises:
      BadInput: if the weights cannot be read, or do not fit the network.
    """
    about = (source.shape, source.num_classes)
    network = make_network(config, shape=about[0], num_classes=about[1], for_sampling=True)
    everywhere = NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec())
    params = jax.device_put(load_weights(config, parameter_shapes(network, source.shape)), everywhere)
    return Generator(config, network, params, *about, source.class_names, 0, config.init.path)


def load_for(workdir: Path, config: ConfigDict, *, ema: str, step: int | None = None) -> Generator:
    """Load the run of a workdir for a command's config, which must describe the same run.

    Where the workdir holds no run and `init.from` is set, the model is those weights as they are.

    Args:
      workdir: the run's folder.
      config: of the command.
      ema: a name of `choose_ema`.
      step: of the checkpoint; None for the newest.

    Raises:
      BadInput: as `load`, or if the config describes another run.
    """
    if config.init.path and not run_folder.exists(workdir):
        generator = load_initial(config, make_source(config.data, split="train"))
        workdir.mkdir(parents=True, exist_ok=True)
        return generator
    run_folder.check(workdir, config)
    run_folder.check_writable(workdir)
    return load_as(workdir, config, ema=ema, step=step)

"""From a workdir, or from weights that exist, to a model that can be sampled."""

import jax
import numpy as np
from etils.epath import Path, PathLike
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int
from ml_collections import ConfigDict

from mf_jax.config import averages, make_network
from mf_jax.decoding import load_decoder
from mf_jax.errors import check_known
from mf_jax.flow.records import DataSpec
from mf_jax.generator import Generator
from mf_jax.models import parameter_shapes
from mf_jax.optim import choose_ema
from mf_jax.published.checkpoints import describe_published
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.sharding import make_mesh
from mf_jax.scoring.grid import NEWEST
from mf_jax.warm_start import INIT_KINDS, fit, load_weights, restore_run


def load(workdir: PathLike, *, ema: str = "") -> Generator:
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
    return load_as(folder, config, ema=choose_ema("ema", ema, averages(config)))


def load_as(folder: Path, config: ConfigDict, *, ema: str, step: int | None = None) -> Generator:
    """Load a checkpoint of a workdir, by default the newest, as the model that a config describes; see `load`."""
    spec = run_folder.stored_data(folder)
    network = make_network(config, spec, for_sampling=True)
    step, params = restore_run(folder, config, ema, step)
    params = fit(params, parameter_shapes(network, spec.shape), where=str(folder))
    return Generator(config, network, params, spec, step, ema)


def load_initial(config: ConfigDict) -> Generator:
    """Return the weights that `init` names as a model that no run of ours has trained, at step 0.

    What they were trained on need not be there: a run tells the shape of its data, published weights tell theirs
    together with `data.image_size`.

    Args:
      config: describes the network, and the data that it was trained on.

    Raises:
      BadInput: if the weights cannot be read, or do not fit the network.
    """
    path = config.init.path
    check_known("init.kind", config.init.kind, INIT_KINDS)
    with processes.together():
        is_run = config.init.kind == "run"
        spec = run_folder.stored_data(Path(path)) if is_run else _data_of_published(config)
    network = make_network(config, spec, for_sampling=True)
    everywhere = NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec())
    params = jax.device_put(load_weights(config, parameter_shapes(network, spec.shape)), everywhere)
    return Generator(config, network, params, spec, 0, path)


def _data_of_published(config: ConfigDict) -> DataSpec:
    """Return what a published network generates; its classes are called by their numbers."""
    init = config.init
    channels, num_classes = describe_published(
        init.path, init.kind, section=init.which or "ema_params"
    )
    decoder = load_decoder(config, origin="")
    side = config.data.image_size // (decoder.autoencoder.network.factor if decoder else 1)
    return DataSpec((side, side, channels), num_classes, tuple(map(str, range(num_classes))))


def load_for(workdir: Path, config: ConfigDict, *, ema: str, step: int | None = None) -> Generator:
    """Load the run of a workdir for a command's config, which must describe the same run.

    Where the workdir holds no run and `init.path` is set, the model is those weights as they are.

    Args:
      workdir: the run's folder.
      config: of the command.
      ema: a name of `choose_ema`.
      step: of the checkpoint; None for the newest.

    Raises:
      BadInput: as `load`, or if the config describes another run.
    """
    if config.init.path and not run_folder.exists(workdir):
        generator = load_initial(config)
        workdir.mkdir(parents=True, exist_ok=True)
        return generator
    with processes.together():
        run_folder.check(workdir, config)
        run_folder.check_writable(workdir)
    return load_as(workdir, config, ema=ema, step=step)


def load_cell(config: ConfigDict, workdir: Path, checkpoint: int, ema: str) -> Generator:
    """Load the model of a cell of an evaluation's grid; see `load_for`."""
    return load_for(workdir, config, ema=ema, step=None if checkpoint == NEWEST else checkpoint)


def labels_of(config: ConfigDict, generator: Generator) -> Int[np.ndarray, "n"]:
    """Return the label of each sample of an evaluation: exactly balanced, or drawn from its seed."""
    num, classes = config.eval.num_samples, generator.spec.num_classes
    if config.eval.labels == "random" and classes:
        return np.random.default_rng(config.eval.seed).integers(classes, size=num, dtype=np.int32)
    return generator.labels_for(None, num)

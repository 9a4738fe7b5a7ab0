"""Start from weights that exist: a published checkpoint, or another run of ours.

`init.path` names the place and `init.kind` says what lies there: `run` for a workdir (a flow-matching run among them),
or the kind of a published checkpoint (mf_jax/published). Parameters must fit the network by name and shape.
"""

import contextlib

import jax
import numpy as np
from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.config import averages, make_network
from mf_jax.errors import BadInput, check_known
from mf_jax.models import parameter_shapes
from mf_jax.models.blocks import laid_out_like, unstack_blocks
from mf_jax.optim import choose_ema
from mf_jax.published.checkpoints import listed, load_published
from mf_jax.published.names import KINDS
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.sharding import make_mesh, placed

INIT_KINDS = ("run", *KINDS)


def load_weights(config: ConfigDict, like: PyTree) -> PyTree:
    """Return the parameters that `init` names.

    Args:
      config: `init.path` is not empty.
      like: shapes of the parameters wanted; a second head that is not wanted is left out.

    Returns:
      The parameter tree, float32.

    Raises:
      BadInput: if there are none, they cannot be read, or they do not fit; lists every parameter that does not.
    """
    path, kind, which = config.init.path, config.init.kind, config.init.which
    check_known("init.kind", kind, INIT_KINDS)
    if kind != "run":
        plain = jax.eval_shape(unstack_blocks, like)
        with processes.together():
            published = load_published(path, kind, plain, section=which or "ema_params")
        return laid_out_like(published, like)
    with processes.together():
        theirs = run_folder.stored_config(Path(path))
        _check_latents(config, theirs)
    _, params = restore_run(Path(path), theirs, which)
    return fit(params, like, where=str(path))


def _check_latents(config: ConfigDict, theirs: ConfigDict) -> None:
    """Raise BadInput if only one of two runs is on latents, or theirs are scaled in another way."""
    ours, others = (_scale(data) for data in (config.data, theirs.data))
    if ours != others:
        raise BadInput(
            f"init.path={config.init.path}: its run was trained on {_told(others)}, this config is of {_told(ours)}; "
            "set data.name, data.latent_mean and data.latent_std as they were"
        )


def _scale(data: ConfigDict) -> list[list[float]]:
    """Return mean and standard deviation of latents, each of one number where all channels have the same."""
    both = (data.latent_mean, data.latent_std) if data.name == "latents" else ()
    return [
        [float(x) for x in (values[:1] if len(set(values)) == 1 else values)] for values in both
    ]


def _told(scale: list[list[float]]) -> str:
    return "latents, mean {}, std {}".format(*scale) if scale else "no latents"


def restore_run(
    folder: Path, config: ConfigDict, ema: str, step: int | None = None
) -> tuple[int, PyTree]:
    """Return the step and the parameters of a run's checkpoint, on every device.

    Args:
      folder: the run's workdir.
      config: of the run.
      ema: a moving average of the run, `none` for the raw parameters, "" for the first average.
      step: of the checkpoint; None for the newest undamaged one.

    Raises:
      BadInput: if there is no such checkpoint, or no such average.
    """
    spec = run_folder.stored_data(folder)
    like = parameter_shapes(make_network(config, spec), spec.shape)
    everywhere = NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec())
    like = placed(like, jax.tree.map(lambda _: everywhere, like))
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        names = averages(config)
        name = choose_ema("ema", ema, names)
        return checkpoints.restore_params(like, ema=name, names=names, step=step)


def fit(params: PyTree, like: PyTree, *, where: str) -> PyTree:
    """Return those parameters that a network has, its blocks laid out as it has them; a second head may be left over.

    Args:
      params: found.
      like: shapes of those wanted.
      where: they were found, for the error.

    Raises:
      BadInput: lists missing, extra and misshapen parameters by name.
    """
    params = laid_out_like(params, like)
    found, wanted = flatten_dict(params, sep="/"), flatten_dict(like, sep="/")
    problems = {
        "missing": [name for name in wanted if name not in found],
        "extra": [name for name in found if name not in wanted and not name.startswith("v_head/")],
        "misshapen": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in wanted
            if name in found and np.shape(found[name]) != wanted[name].shape
        ],
    }
    parts = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if parts:
        raise BadInput(
            f"init.path={where}: its parameters do not fit the network; {'; '.join(parts)}"
        )
    return unflatten_dict({name: found[name] for name in wanted}, sep="/")

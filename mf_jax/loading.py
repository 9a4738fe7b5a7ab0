"""From weights that exist to a model: a run's, or published ones.

What lies at `init.path`, a run or a kind of published checkpoint, is found by its names, or told by
`init.kind`. Parameters must fit the network by name and shape.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils.epath import Path, PathLike
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.config import averages, learns_average, make_network, sizes_of
from mf_jax.flow.errors import BadInput, check_fit, check_known, in_section, listed
from mf_jax.flow.records import DataSpec
from mf_jax.generator import Generator, load_decoder
from mf_jax.models import parameter_shapes
from mf_jax.models.blocks import laid_out_like, unstack_blocks
from mf_jax.models.distances import DISTANCES, load_distance
from mf_jax.models.dit import STEPS
from mf_jax.objectives.perceptual import Perceptual
from mf_jax.optim import choose_ema
from mf_jax.published.checkpoints import describe_published, find_kind, load_published
from mf_jax.published.fetch import find_weights, verify
from mf_jax.published.names import KINDS, check_prediction
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import Checkpoints, UnreadableCheckpoint
from mf_jax.runtime.files import place, sha256_of
from mf_jax.runtime.json_files import tell_once
from mf_jax.runtime.sharding import everywhere, placed
from mf_jax.validation import check_registered

_NOTES = {
    "dit": ", which predicts noise: a start, not a flow map",
    "sit": ", as the flow map u(z, r, t) = v(z, t)",
}


def load(workdir: PathLike, *, ema: str = "") -> Generator:
    """Load the newest checkpoint of the run in a workdir.

    Args:
      ema: a decay of the run's `ema.decays`, `none` for the raw parameters, "" for the first decay.
    """
    folder = place(workdir, "workdir")
    return load_run(folder, run_folder.stored_config(folder), ema)


def holds_run(workdir: Path, config: ConfigDict) -> bool:
    """Return whether the model is a workdir's run, which a config must describe, or else `init`."""
    if config.init.path and not run_folder.exists(workdir):
        return False
    run_folder.check(workdir, config)
    return True


def load_for(workdir: Path, config: ConfigDict) -> Generator:
    """Load the run of a workdir, or `init` where it holds none; make a missing workdir."""
    ema = choose_ema("sample.ema", config.sample.ema, averages(config))
    with processes.together():
        is_run = holds_run(workdir, config)
    generator = load_run(workdir, config, ema) if is_run else load_initial(config)
    with processes.together():
        run_folder.make(workdir)
    return generator


def load_initial(config: ConfigDict) -> Generator:
    """Return the weights of `init` as a model at step 0; their data need not be there."""
    init = config.init
    with processes.together():
        if (kind := _kind(config)) == "run":
            folder = place(init.path, "init.path")
            spec = run_folder.stored_data(folder, "init.path")
            theirs = run_folder.stored_config(folder, "init.path")
            _check_meaning(config, theirs, lambda of: {"draws.noise_scale": of.draws.noise_scale})
            if learns_average(config) and not learns_average(theirs):
                fix = "its run has learnt no average velocity; use objective.name=flow_matching"
                raise BadInput(f"init.path={init.path}: {fix}")
        else:  # whose classes are called by their numbers
            channels, classes = describe_published(init.path, kind, section=init.which)
            decoder = load_decoder(config, origin="")
            side = config.data.image_size // (decoder.autoencoder.network.factor if decoder else 1)
            spec = DataSpec((side, side, channels), classes, tuple(map(str, range(classes))))
    network = make_network(config, spec, for_sampling=True)
    params = load_weights(config, parameter_shapes(network, spec.shape))
    weights_sha256(config)
    return Generator(config, network, jax.device_put(params, everywhere()), spec, 0, init.path)


def weights_sha256(config: ConfigDict) -> str:
    """Return and tell the SHA-256 of the file that `init` names; most formats have no checksum."""
    path = place(config.init.path, "init.path")
    if path.is_dir() or not path.exists():
        return ""
    sha256 = sha256_of(path)
    tell_once(f"init.path={path}: SHA-256 {sha256}")
    return sha256


def load_weights(config: ConfigDict, like: PyTree) -> PyTree:
    """Return the parameters that `init` names, float32, without a second head that shapes lack."""
    path, which = config.init.path, config.init.which
    with processes.together():
        kind = _kind(config)
    if kind != "run":
        plain = jax.eval_shape(unstack_blocks, like)
        with processes.together():
            check_prediction(kind, config.model.prediction)
            published = load_published(path, kind, plain, section=which)
        print(f"init.path={path}: {which or 'weights'} of {kind}{_NOTES.get(kind, '')}")
        return laid_out_like(published, like)
    with processes.together():
        folder = place(path, "init.path")
        theirs = run_folder.stored_config(folder, "init.path")
        _check_meaning(config, theirs, _latents)
    ema = choose_ema("init.which", which, averages(theirs))
    params = _fit(_restore(folder, theirs, ema)[1], like, path)
    _check_meaning(config, theirs, _meaning)
    return params


def _check_meaning(ours: ConfigDict, theirs: ConfigDict, meaning: Callable) -> None:
    """Raise BadInput where another run's parameters have another meaning, whatever their shapes."""
    known = meaning(theirs)
    for key, own in meaning(ours).items():
        if (other := known.get(key, own)) != own:
            fix = f"its run has {other!r}; use that"
            raise BadInput(f"init.path={ours.init.path}: {key}={own!r}: {fix}")


def _meaning(config: ConfigDict) -> dict[str, Any]:
    """Return what a network's parameters mean that neither their names nor their shapes show."""
    model = {**config.model, **sizes_of(config.model)}
    meaning = {key: model[key] for key in ("prediction", "num_heads", "logit_power")}
    if model["time_conditioning"] != "t":  # flow matching's, which becomes the flow map of t|r
        meaning["time_conditioning"] = model["time_conditioning"]
    if model["prediction"] == "data":
        meaning["t_clip"] = model["t_clip"]
    meaning = {f"model.{key}": value for key, value in meaning.items()}
    if model["time_conditioning"] == STEPS:
        meaning["times.levels"] = config.times.levels
    return meaning


def load_frozen(config: ConfigDict, frozen: PyTree) -> tuple[PyTree, dict[str, str]]:
    """Return an objective's `frozen` with published weights for its shapes, and their SHA-256."""
    if not isinstance(frozen, Perceptual):
        return frozen, {}
    loaded, digests = [], {}
    for distance in frozen.distances:
        name = config.perceptual[f"{distance.name}_weights"]
        key = f"perceptual.{distance.name}_weights"
        with processes.together():
            path = find_weights(name, config.weights_dir, key=key)
            params, sha256 = load_distance(DISTANCES[distance.name], path)
            verify(name, sha256)
        tell_once(f"{key}={name}: SHA-256 {sha256}")
        digests[key] = sha256
        loaded.append(distance.replace(params={"params": params}))
    return frozen.replace(distances=tuple(loaded)), digests


def load_run(folder: Path, config: ConfigDict, ema: str, step: int | None = None) -> Generator:
    """Load a checkpoint of a workdir that is known to hold the run of a config."""
    check_registered(config, run_folder.own_parts(folder))
    ema, spec = choose_ema("ema", ema, averages(config)), run_folder.stored_data(folder)
    network = make_network(config, spec, for_sampling=True)
    step, params = _restore(folder, config, ema, step)
    params = _fit(params, parameter_shapes(network, spec.shape), str(folder))
    return Generator(config, network, params, spec, step, ema)


def _kind(config: ConfigDict) -> str:
    """Return what lies at `init.path`: a run, or a kind of published checkpoint."""
    path, kind = config.init.path, config.init.kind
    check_known("init.kind", kind, ("auto", "run", *KINDS))
    if kind != "auto":
        return kind
    if run_folder.exists(there := place(path, "init.path")):
        return "run"
    with in_section("init.path", "="):
        return find_kind(there, section=config.init.which)


def _latents(config: ConfigDict) -> dict[str, Any]:
    """Return whether a config is on latents, and how they are scaled."""
    if config.data.name != "latents":
        return {"data.name": "no latents"}
    scale = {key: config.data[key] for key in ("latent_mean", "latent_std")}
    # one number where all channels have the same
    scale = {key: each[:1] if len(set(each)) == 1 else each for key, each in scale.items()}
    return {"data.name": "latents", **{f"data.{key}": each for key, each in scale.items()}}


def _restore(
    folder: Path, config: ConfigDict, ema: str, step: int | None = None
) -> tuple[int, PyTree]:
    """Return the step and the parameters of a run's checkpoint, on every device."""
    spec, names = run_folder.stored_data(folder), averages(config)
    like = parameter_shapes(make_network(config, spec), spec.shape)
    like = placed(like, jax.tree.map(lambda _: everywhere(), like))
    wanted = {"params": like} if ema == "none" else {"ema": dict.fromkeys(names, like)}
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        step, items = checkpoints.restore(wanted, step)
    return step, items["params"] if ema == "none" else items["ema"][ema]


def _fit(params: PyTree, like: PyTree, where: str) -> PyTree:
    """Return the parameters that a network has, its blocks laid out as it has them.

    A second head may be left over. Where the checkpoint lies is for the error.
    """
    stored, wanted = (flatten_dict(each, sep="/") for each in (laid_out_like(params, like), like))
    stored = {k: v for k, v in stored.items() if k in wanted or not k.startswith("v_head/")}
    problem = f"init.path={where}: its parameters do not fit the network"
    check_fit(problem, stored, wanted, "use its own config")
    if bad := [name for name in wanted if not np.isfinite(np.asarray(stored[name])).all()]:
        problem = f"{where}: its parameters are not finite ({listed(bad, 3)})"
        raise UnreadableCheckpoint(f"{problem}: the run has diverged; take an earlier checkpoint")
    return unflatten_dict(stored, sep="/")

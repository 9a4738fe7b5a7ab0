"""The folder of a run: whose it is, and where in it everything lies."""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput, refused
from mf_jax.flow.records import DataSpec
from mf_jax.runtime import processes
from mf_jax.runtime.checkpoint import saved_steps
from mf_jax.runtime.configs import defaults
from mf_jax.runtime.earlier import ALWAYS, BEFORE, RENAMED
from mf_jax.runtime.files import change_paths, in_bucket, locked, place, to_json
from mf_jax.runtime.json_files import misfit, read_json, tell_once, write_json

_CONFIG, _DATA, _LOCK = "config.json", "data.json", ".lock"
_FROZEN = ("perceptual.lpips_weights", "perceptual.convnext_weights")
"""Keys of weights that no checkpoint holds: data.json has their SHA-256."""
_LIKE = {
    _CONFIG: {},
    _DATA: {"shape": [1], "num_classes": 0, "class_names": [""], "origin?": "", "size?": 0}
    | {"digest?": "", "init_sha256?": "", **dict.fromkeys((f"{key}?" for key in _FROZEN), "")},
}
SECTIONS_OF_A_RUN = ("seed", "data", "model", "objective", "guidance", "weight", "controls")
SECTIONS_OF_A_RUN += ("velocity", "perceptual", "times", "instant_times", "coupling", "draws")
SECTIONS_OF_A_RUN += ("init", "train", "optim", "ema")
"""Sections that decide a run's numbers; the others may change when a run is continued."""
_FREE = ("data.path", "data.copy_to", "data.autoencoder", "train.log_every_steps")
_FREE += ("model.attention", "model.remat", "init.kind", "perceptual.rows_at_once")
_FREE += (*_FROZEN, "train.microbatch")
"""Keys of theirs that do not: data are told apart by what they hold, see `check_data`."""


def flat(config: ConfigDict) -> dict[str, Any]:
    """Return {"section.key": value} of a config, as JSON keeps values."""
    return flatten_dict(json.loads(as_json(config)), sep=".")


def as_json(config: ConfigDict) -> str:
    """Return a config as JSON, keys in their own order."""
    return to_json(config.to_dict(), indent=1)


def check(workdir: Path, config: ConfigDict) -> None:
    """Raise BadInput, naming keys that differ, unless a config continues the run of a workdir.

    What decides its numbers may not change, but `train.num_steps` under a constant schedule.
    """
    ours, theirs = flat(config), flat(stored_config(workdir))
    for values in (ours, theirs):  # one folder has many spellings
        values["init.path"] = values["init.path"] and os.path.realpath(values["init.path"])
    free, steps, done = set(_FREE), "train.num_steps", max(saved_steps(workdir), default=0)
    is_constant = ours["optim.schedule"] == "constant"
    if is_constant and ours[steps] >= done:
        free.add(steps)
    if ours["velocity.source"] == "batch":  # which knows the rows that are computed at once
        free.remove("train.microbatch")
    changes = {
        key: f"{key} {theirs.get(key)!r} -> {ours.get(key)!r}"
        for key in dict.fromkeys([*ours, *theirs])
        if key.split(".")[0] in SECTIONS_OF_A_RUN and key not in free
        if ours.get(key) != theirs.get(key)
    }
    if changes:
        reason = f"; {done} steps are done" if is_constant else f"; its rates fall to 0 at {steps}"
        told = f"({', '.join(changes.values())}){reason * (steps in changes)}"
        fix = "set these back (its own config is taken without --config), or choose another, where"
        told += f"; {fix} --config.init.path={workdir} starts from its weights"
        raise BadInput(f"--workdir={workdir}: holds a run of another config {told}")


def keep_habits(workdir: Path, config: ConfigDict) -> None:
    """Set keys that the run of a workdir has never heard of to what it has always done."""
    if not exists(workdir):
        return
    known = flatten_dict(_read(workdir, _CONFIG), sep=".")
    for key in BEFORE.keys() - known.keys() - {*_FREE}:
        old = BEFORE[key]
        if flat(config)[key] != old:
            print(f"{key}={old!r}: what this run has done since an earlier version began it")
        config.update_from_flattened_dict({key: old})


@contextlib.contextmanager
def own(
    workdir: Path, config: ConfigDict, data: Any, parts: Mapping[str, str], **weights: str
) -> Iterator[None]:
    """Hold a workdir for a run: make it, keep others out, and store the same config and data.

    See `own_parts` for the parts, `check_data` for its `mf_jax.data.Source` and the weights.
    """
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first():
                make(workdir)
                where, fix = f"--workdir={workdir}", "choose another"
                with (
                    refused(OSError, f"{where}: cannot be written", fix),
                    refused(BlockingIOError, f"{where}: another process is training in it", fix),
                ):
                    held.enter_context(locked(workdir / _LOCK, wait=False))
                about = _about(data) | weights
                if exists(workdir):
                    check(workdir, config)
                    about = check_data(workdir, data, **weights) | about
                write_json(workdir / _DATA, about | {"own_parts": dict(parts)})
                write_json(workdir / _CONFIG, _for_any_folder(config).to_dict(), indent=1)
        _check_shared(workdir)
        yield


def make(workdir: Path) -> None:
    """Make a workdir, if it is missing, that results can be written to."""
    with refused(OSError, f"--workdir={workdir}: cannot be written", "choose another"):
        workdir.mkdir(parents=True, exist_ok=True)
        if not in_bucket(workdir) and not os.access(workdir, os.W_OK):
            raise PermissionError("Permission denied")


def _check_shared(workdir: Path) -> None:
    """Raise BadInput on all processes of a job unless each sees what the first writes."""
    mark = workdir / f".seen_{processes.from_first(uuid.uuid4().hex)}"
    if processes.is_first():
        mark.touch()
    processes.from_first(None)
    with processes.together():
        if not mark.exists():
            fix = "process 0 writes; must be one folder for all hosts, shared or in a bucket"
            raise BadInput(f"--workdir={workdir}: does not show what {fix}")
    if processes.is_first():
        mark.unlink()


def _about(data: Any) -> dict[str, Any]:
    """Return what batches and labels depend on, and a digest of the data's own list of names."""
    more = {"size": len(data), "digest": getattr(data, "digest", "")}
    return json.loads(json.dumps(dataclasses.asdict(data.spec) | more))


def check_data(workdir: Path, data: Any, **weights: str) -> dict[str, Any]:
    """Return what is stored about a run's data; BadInput unless these, and its weights, are it.

    Weights are SHA-256 of files: `init_sha256` where the run starts, others by their keys.
    """
    stored, about = _read(workdir, _DATA), _about(data)
    if about["digest"] and not stored.get("digest"):
        stored.pop("digest", "")
        tell_once(f"--workdir={workdir}: keeps no digest of its data yet, to compare them by")
    for name, value in (about | weights).items():
        if (known := stored.get(name, value)) == value:
            continue
        change = "files" if name == "digest" else f"{name} {known} -> {value}"
        told = f"was trained on other data ({change}); restore them, or set --config.data.path"
        if name in weights:
            key = name.replace("init_sha256", "init.path")
            told = f"began with {key} of SHA-256 {known}, not {value}; restore that file"
        raise BadInput(f"--workdir={workdir}: its run {told}, or choose another --workdir")
    return stored


def _for_any_folder(config: ConfigDict) -> ConfigDict:
    """Return a config whose paths mean the same in every current folder."""

    def absolute(path: str, key: str) -> str:
        is_here = not in_bucket(place(path, key)) and Path(path).exists()
        return os.path.abspath(path) if is_here else path

    stored = config.copy_and_resolve_references()
    change_paths(stored, absolute)
    return stored


def exists(workdir: Path) -> bool:
    """Return whether there is a run in a workdir."""
    return (workdir / _CONFIG).exists()


def stored_config(workdir: Path, key: str = "--workdir") -> ConfigDict:
    """Return the config of the run in a workdir, which a key names, in today's keys."""
    stored = flatten_dict(_read(workdir, _CONFIG, key), sep=".")
    stored = {RENAMED.get(name, name): value for name, value in stored.items()}
    usual = flat(defaults())
    like = {name if name in ALWAYS else f"{name}?": _like(usual[name]) for name in usual}
    if problem := misfit(stored, like, "it"):
        raise BadInput(f"{key}={workdir}: its {_CONFIG} cannot be used ({problem}); restore it")
    values = {name: _tuples(value) for name, value in (usual | BEFORE | stored).items()}
    return ConfigDict(unflatten_dict(values, sep="."), convert_dict=True)


def _like(default: Any) -> Any:
    """Return what the values of a key are like, see `parse_json`: of the default's type."""
    if isinstance(default, list):
        return [_like(each) for each in default[:1]]
    return -(2**63) if type(default) is int else default  # the least that is accepted


def _tuples(value: Any) -> Any:
    """Return a value with tuples for the lists that JSON makes of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def stored_data(workdir: Path, key: str = "--workdir") -> DataSpec:
    """Return the spec of a run's data; see `stored_config`."""
    stored = _read(workdir, _DATA, key)
    names = {field.name for field in dataclasses.fields(DataSpec)}
    return DataSpec(**{name: _tuples(value) for name, value in stored.items() if name in names})


def own_parts(workdir: Path) -> dict[str, str]:
    """Return the files that registered parts of the user's own, by section of the config."""
    return dict(_read(workdir, _DATA).get("own_parts", {}))


def _read(workdir: Path, name: str, key: str = "--workdir") -> dict[str, Any]:
    path = place(workdir, key) / name
    if path.exists():
        return read_json(path, _LIKE[name], "restore it or train anew")
    fix = "train first: --mode=train with this --workdir"
    if key != "--workdir":
        fix = f"name the workdir of a run, or set init.kind to what {key} holds"
    raise BadInput(f"{key}={workdir}: holds no run ({name} is missing); {fix}")


def tell(workdir: Path, **places: str) -> None:
    """Print where the results of a run are, those that exist, one line each."""
    for what, name in places.items():
        if (workdir / name).exists():
            path = workdir / name
            print(f"  {what:<12}{path if in_bucket(path) else os.path.relpath(path)}")

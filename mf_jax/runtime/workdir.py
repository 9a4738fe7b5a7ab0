"""The folder of a run: whose it is, and where in it everything lies."""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mf_jax.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, replace_file, to_json

_CONFIG, _DATA, _LOCK = "config.json", "data.json", ".lock"
SECTIONS_OF_A_RUN = ("seed", "data", "model", "objective", "guidance", "weight", "controls")
SECTIONS_OF_A_RUN += ("times", "draws", "init", "train", "optim", "ema")
"""Sections that decide a run's numbers; the others may change when a run is continued."""
_RENAMED = {"guidance.t_start": "guidance.t_min", "guidance.t_end": "guidance.t_max"}
_RENAMED |= {"init.from": "init.path"}
"""Keys of a config.json that an earlier version has written."""


def flat(config: ConfigDict) -> dict[str, Any]:
    """Return {"section.key": value} of a config, as JSON keeps values."""
    return flatten_dict(json.loads(as_json(config)), sep=".")


def as_json(config: ConfigDict) -> str:
    """Return a config as JSON, keys in their own order."""
    return to_json(config.to_dict(), indent=1)


def check(workdir: Path, config: ConfigDict) -> None:
    """Raise BadInput, naming keys that differ, unless a config continues the run of a workdir.

    Under a constant schedule, a run may go on for more steps. Nothing else that decides its numbers
    may change.
    """
    ours, theirs = flat(config), flat(stored_config(workdir))
    steps = "train.num_steps"
    if ours["optim.schedule"] == "constant" and ours[steps] >= theirs[steps]:
        ours[steps] = theirs[steps]
    differences = [
        f"{key} {theirs.get(key)!r} -> {ours.get(key)!r}"
        for key in dict.fromkeys([*ours, *theirs])
        if key.split(".")[0] in SECTIONS_OF_A_RUN and key != "data.copy_to"  # a disk of the host
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise BadInput(
            f"workdir {workdir} holds a run of another config ({', '.join(differences)}); "
            "choose another --workdir, or set these back"
        )


@contextlib.contextmanager
def own(workdir: Path, config: ConfigDict, spec: DataSpec, size: int) -> Iterator[None]:
    """Hold a workdir for a training run: make it, keep other runs out, store config and data.

    Stored ones must describe the same run. Size is the number of examples.
    """
    data = json.loads(json.dumps(dataclasses.asdict(spec) | {"size": size}))
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first():
                with _writable(workdir):
                    workdir.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(workdir / _LOCK, wait=False))
                if exists(workdir):
                    check(workdir, config)
                    _check_same_data(workdir, data)
                replace_file(workdir / _DATA, to_json(data).encode())
                replace_file(workdir / _CONFIG, as_json(config).encode())
        _check_shared(workdir)
        yield


@contextlib.contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise BadInput(
            f"--workdir={workdir}: another process is training in it; choose another"
        ) from error
    except OSError as error:
        raise BadInput(
            f"--workdir={workdir}: cannot be written ({error.strerror}); choose another"
        ) from error


def _check_shared(workdir: Path) -> None:
    """Raise BadInput on all processes of a job unless each sees what the first writes."""
    mark = workdir / f".seen_{processes.from_first(uuid.uuid4().hex)}"
    if processes.is_first():
        mark.touch()
    processes.from_first(None)
    with processes.together():
        if not mark.exists():
            raise BadInput(
                f"--workdir={workdir}: does not show what process 0 writes there; must be one "
                "folder for all hosts: a shared file system or a bucket"
            )
    if processes.is_first():
        mark.unlink()


def _check_same_data(workdir: Path, ours: dict[str, Any]) -> None:
    # batches depend on the number of examples, labels on the order of the class names
    stored = _read(workdir, _DATA)
    for name, value in ours.items():
        if stored.get(name, value) != value:
            raise BadInput(
                f"--workdir={workdir}: its run was trained on other data ({name} "
                f"{stored.get(name)} -> {value}); restore the data, or choose another --workdir"
            )


def exists(workdir: Path) -> bool:
    """Return whether there is a run in a workdir."""
    return (workdir / _CONFIG).exists()


def make(workdir: Path) -> None:
    """Make a workdir that results can be written to."""
    with _writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    check_writable(workdir)


def check_writable(workdir: Path) -> None:
    """Raise BadInput if results cannot be written to a workdir, before they are computed."""
    if not in_bucket(workdir) and not os.access(workdir, os.W_OK):
        raise BadInput(f"--workdir={workdir}: cannot be written; change its permissions")


def stored_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in a workdir, in today's keys."""
    stored = flatten_dict(_read(workdir, _CONFIG), sep=".")
    values = {_RENAMED.get(key, key): value for key, value in stored.items()}
    return ConfigDict(unflatten_dict(values, sep="."), convert_dict=True)


def stored_data(workdir: Path) -> DataSpec:
    """Return the spec of a run's data."""
    stored = _read(workdir, _DATA)
    classes = stored["num_classes"], tuple(stored["class_names"])
    return DataSpec(tuple(stored["shape"]), *classes, stored.get("origin", ""))


def _read(workdir: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((workdir / name).read_text())
    except FileNotFoundError as error:
        raise BadInput(
            f"--workdir={workdir}: holds no run ({name} is missing); "
            "train first: --mode=train with this --workdir"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--workdir={workdir}: its {name} cannot be read ({error}); restore it or train anew"
        ) from error


def tell(workdir: Path, **places: str) -> None:
    """Print where the results of a run are, those that exist, one line each."""
    for what, name in places.items():
        if (workdir / name).exists():
            path = workdir / name
            print(f"  {what:<12}{path if in_bucket(path) else os.path.relpath(path)}")

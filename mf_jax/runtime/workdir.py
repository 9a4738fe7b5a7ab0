"""The folder of a run: whose it is, and where in it everything lies."""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils.epath import Path
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mf_jax.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, locked, replace_file

_CONFIG, _DATA, _LOCK = "config.json", "data.json", ".lock"
SECTIONS_OF_A_RUN = (
    "seed",
    "data",
    "model",
    "objective",
    "guidance",
    "weight",
    "controls",
    "times",
    "draws",
    "init",
    "train",
    "optim",
    "ema",
)
"""What decides a run's numbers; the other sections may change when a run is continued."""
_PLACES = ("data.copy_to",)
"""Keys of these sections that decide nothing."""


def flat(config: ConfigDict) -> dict[str, Any]:
    """Return {"section.key": value} of a config, as JSON keeps values."""
    return flatten_dict(json.loads(as_json(config)), sep=".")


def as_json(config: ConfigDict) -> str:
    """Return a config as JSON, keys in their own order."""
    return json.dumps(config.to_dict(), indent=1)


def check_same_run(config: ConfigDict, stored: Mapping[str, Any], workdir: str) -> None:
    """Check that a config continues the run of a workdir.

    A run under a constant schedule may be continued for more steps; nothing else that decides its numbers may change.

    Args:
      config: of the command.
      stored: the workdir's config, as read from JSON.
      workdir: named in the error.

    Raises:
      BadInput: naming each key that differs, and both values.
    """
    ours = json.loads(as_json(config))
    if (
        ours["optim"]["schedule"] == "constant"
        and ours["train"]["num_steps"] >= stored["train"]["num_steps"]
    ):
        ours["train"]["num_steps"] = stored["train"]["num_steps"]
    differences = [
        f"{section}.{key} {theirs!r} -> {mine!r}" if key else f"{section} {theirs!r} -> {mine!r}"
        for section in SECTIONS_OF_A_RUN
        for key, theirs, mine in _differences(stored.get(section), ours[section])
        if f"{section}.{key}" not in _PLACES
    ]
    if differences:
        raise BadInput(
            f"workdir {workdir} holds a run of another config ({', '.join(differences)}); "
            "choose another --workdir, or set these back"
        )


def _differences(stored: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(stored, dict) or not isinstance(ours, dict):
        return [] if stored == ours else [("", stored, ours)]
    keys = list(dict.fromkeys([*stored, *ours]))
    return [(k, stored.get(k), ours.get(k)) for k in keys if stored.get(k) != ours.get(k)]


@contextlib.contextmanager
def own(workdir: Path, config: ConfigDict, spec: DataSpec, size: int) -> Iterator[None]:
    """Hold a workdir for a training run: make it, keep other runs out, check and store the config.

    Args:
      workdir: the folder; made if missing.
      config: of the run; one stored there must describe the same run.
      spec, size: of the run's data, and the number of its elements; stored for sampling.

    Raises:
      BadInput: if the folder cannot be written, another process trains in it, or it holds another run.
    """
    about = json.loads(json.dumps(dataclasses.asdict(spec) | {"size": size}))
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first():
                held.enter_context(_locked(workdir))
                if (workdir / _CONFIG).exists():
                    check(workdir, config)
                    _check_same_data(workdir, about)
                replace_file(workdir / _DATA, json.dumps(about).encode())
                replace_file(workdir / _CONFIG, as_json(config).encode())
        _check_shared(workdir)
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(workdir / _LOCK, wait=False))
    except BlockingIOError as error:
        raise BadInput(
            f"--workdir={workdir}: another process is training in it; choose another"
        ) from error
    except OSError as error:
        raise BadInput(
            f"--workdir={workdir}: cannot be written ({error.strerror}); choose another"
        ) from error
    with lock:
        yield


def _check_shared(workdir: Path) -> None:
    """Raise BadInput on all processes of a job unless each sees what the first writes."""
    mark = workdir / f".seen_{processes.from_first(uuid.uuid4().hex)}"
    if processes.is_first():
        mark.touch()
    processes.from_first(None)
    with processes.together():
        if not mark.exists():
            raise BadInput(
                f"--workdir={workdir}: does not show what process 0 writes there; must be one folder for all hosts: a "
                "shared file system or a bucket"
            )
    if processes.is_first():
        mark.unlink()


def _check_same_data(workdir: Path, ours: dict[str, Any]) -> None:
    # batches are a function of the number of examples and their order, labels one of the class names
    stored = _read(workdir, _DATA)
    for name, value in ours.items():
        if stored.get(name, value) != value:
            raise BadInput(
                f"--workdir={workdir}: its run was trained on other data ({name} {stored.get(name)} -> {value}); "
                "restore the data, or choose another --workdir"
            )


def check(workdir: Path, config: ConfigDict) -> None:
    """Check that a workdir holds a run, and that a config describes this run.

    Raises:
      BadInput: if there is no run, or it is another one.
    """
    check_same_run(config, _read(workdir, _CONFIG), str(workdir))


def exists(workdir: Path) -> bool:
    """Return whether a workdir holds a run."""
    return (workdir / _CONFIG).exists()


def make(workdir: Path) -> None:
    """Make a workdir that results can be written to.

    Raises:
      BadInput: if it cannot be made or written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"--workdir={workdir}: cannot be written ({error.strerror}); choose another"
        ) from error
    check_writable(workdir)


def check_writable(workdir: Path) -> None:
    """Raise BadInput if results cannot be written to a workdir, before they are computed."""
    if not in_bucket(workdir) and not os.access(workdir, os.W_OK):
        raise BadInput(f"--workdir={workdir}: cannot be written; change its permissions")


def stored_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in a workdir.

    Raises:
      BadInput: if there is no run.
    """
    return ConfigDict(_read(workdir, _CONFIG), convert_dict=True)


def stored_data(workdir: Path) -> DataSpec:
    """Return what one element of a run's data is; BadInput if there is no run."""
    about = _read(workdir, _DATA)
    classes = about["num_classes"], tuple(about["class_names"])
    return DataSpec(tuple(about["shape"]), *classes, about.get("origin", ""))


def _read(workdir: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((workdir / name).read_text())
    except FileNotFoundError as error:
        raise BadInput(
            f"--workdir={workdir}: holds no run ({name} is missing); train first: --mode=train with this --workdir"
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

"""Checkpoints of a run: written in the background, read only if every bit is what was saved.

A checkpoint holds the items `params`, `ema` and `rest` of the training state, and an index: name,
shape, type and fingerprint of every array. Fingerprints notice what the format's own checks do not.
Orbax writes into a temporary folder and renames it at the end: a process may be killed at any time.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from etils import epath, epy
from jax.errors import JaxRuntimeError
from jaxtyping import PyTree

from mf_jax.flow.errors import BadInput, Failure, check_fit, reason_of, refused
from mf_jax.runtime import processes
from mf_jax.runtime.files import absolute

with epy.lazy_imports():  # takes a second
    import orbax.checkpoint as ocp

FOLDER = "checkpoints"
_State = TypeVar("_State")  # a flax.struct dataclass with the fields params and ema
_Items = dict[str, PyTree]
_Index = dict[str, dict[str, list]]  # {item: {name of an array: [shape, type, fingerprint]}}
_PASSING = ["EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ENETUNREACH", "EHOSTUNREACH"]
_PASSING_WORDS = "UNAVAILABLE|DEADLINE_EXCEEDED"
"""Numbers and words of errors where storage cannot be reached, and may be later."""


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was saved."""


class UnreadableCheckpoint(BadInput):
    """The checkpoint that was asked for is damaged or not there."""


_NOT_OF_FILES = (MemoryError, PermissionError, ConnectionError, TimeoutError, JaxRuntimeError)
_NOT_OF_FILES += (DamagedCheckpoint, BadInput)


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Return the steps of a workdir's finished checkpoints, oldest first."""
    folder = absolute(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def fingerprint(workdir: epath.PathLike, step: int) -> str:
    """Return hex digits that tell checkpoints of different arrays apart; reads the index alone."""
    checkpoints = Checkpoints(workdir, read_only=True)
    with contextlib.closing(checkpoints), checkpoints._asked_for(step), _damage():
        index = checkpoints._index(step)
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def index_of(tree: PyTree) -> dict[str, list]:
    """Return {name: [shape, type, fingerprint]}; all processes of a job must call it.

    A fingerprint is a sum of the array's bits modulo 2^32, weighted by position. It does not depend
    on how devices share the array.
    """
    prints = _named(jax.device_get(_fingerprints(tree)))
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(prints[name])]
        for name, leaf in _named(tree).items()
    }


@jax.jit
def _fingerprints(tree: PyTree) -> PyTree:
    @jax.jit  # traced once for all arrays of a shape
    def fingerprint(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jax.tree.map(fingerprint, tree)


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _items(state: _State) -> _Items:
    """Return the items of a state; a run without averages has no item for them."""
    rest = dict(vars(state))
    del rest["frozen"]  # published weights, which a run reads anew
    items = {name: rest.pop(name) for name in ("params", "ema")} | {"rest": rest}
    return {name: item for name, item in items.items() if item}


class Checkpoints:
    """The checkpoints of one workdir; the newest few are kept, and `read_only` changes nothing."""

    def __init__(self, workdir: epath.PathLike, *, keep: int = 1, read_only: bool = False) -> None:
        self._folder = _in_letters(absolute(workdir)) / FOLDER
        self._read_only = read_only
        if self._folder.exists() and not self._folder.is_dir():
            raise BadInput(f"{self._folder}: must be a folder for checkpoints; move it away")
        if not read_only:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        # each process reads by itself: one that cannot leaves no other waiting
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            create=False, enable_async_checkpointing=False, multiprocessing_options=alone
        )
        self._reader = ocp.CheckpointManager(self._folder, options=options)
        if read_only:
            self._manager = self._reader

    @property
    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: _State) -> None:
        """Save a state by its `step` in the background; it may be donated after this returns."""
        step, items = int(state.step), _items(state)
        if step in self.steps:
            return
        self.verify()
        index = ocp.args.JsonSave({name: index_of(item) for name, item in items.items()})
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(index=index, **arguments))

    def verify(self) -> None:
        """Wait for the newest checkpoint, and raise Failure unless its arrays can be opened."""
        self._manager.wait_until_finished()
        self._reader.reload()
        for step in processes.from_first(self.steps[-1:]):
            folder = self._folder / str(step)
            problem = f"{folder} was saved and cannot be read"
            fix = "see to its file system, or choose another --workdir"
            with refused(DamagedCheckpoint, problem, fix, Failure), _damage():
                for name in self._index(step):
                    ocp.StandardCheckpointHandler().metadata(folder / name)

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.close()
        self._reader.close()

    def restore_state(self, like: _State) -> _State | None:
        """Return the newest undamaged state, placed like another; None without a checkpoint."""
        if not processes.from_first(self.steps):
            return None
        _, items = self.restore(_items(like))
        return like.replace(params=items["params"], ema=items.get("ema", {}), **items["rest"])

    def restore(self, like: _Items, step: int | None = None) -> tuple[int, _Items]:
        """Return the step and some items of a checkpoint, the newest undamaged one for None.

        Items are shaped and placed like others. UnreadableCheckpoint where the step is damaged;
        without a step, damaged checkpoints are moved away.
        """
        if step is not None:
            with self._asked_for(step):
                return step, self._restore(step, like)
        damaged = []
        for step in reversed(processes.from_first(self.steps)):
            try:
                items = self._restore(step, like)
            except DamagedCheckpoint as problem:
                damaged.append(step)
                print(f"checkpoint {step} is damaged ({problem}); trying the one before it")
            else:
                self._set_aside(damaged)
                return step, items
        why = "every checkpoint is damaged: move it" if damaged else "no checkpoint: train first"
        raise BadInput(f"{self._folder}: {why}")

    @contextlib.contextmanager
    def _asked_for(self, step: int) -> Iterator[None]:
        """Raise UnreadableCheckpoint on all processes where a step is missing or damaged."""
        with processes.together(UnreadableCheckpoint):
            if step not in self.steps:
                kept = ", ".join(map(str, self.steps)) or "none"
                problem = f"has no checkpoint of step {step}; it has {kept}"
                raise UnreadableCheckpoint(f"{self._folder} {problem}")
        problem = f"{self._folder / str(step)} is damaged"
        with refused(DamagedCheckpoint, problem, "choose another step", UnreadableCheckpoint):
            yield

    def _restore(self, step: int, like: _Items) -> _Items:
        """Return the items of a checkpoint; all processes of a job find it damaged, or none."""
        with _damage():
            index = self._index(step)
            if missing := set(like) - set(index):
                raise DamagedCheckpoint(f"its index lacks {', '.join(sorted(missing))}")
            for name, item in like.items():
                theirs = {key: entry[0] for key, entry in index[name].items()}
                problem = f"checkpoint {self._folder / str(step)} is of another model"
                fix = "use its own config, or another --workdir"
                check_fit(problem, theirs, _named(item), fix)
            arguments = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
            items = self._reader.restore(step, args=ocp.args.Composite(**arguments))
        for name in like:  # fingerprints take every process
            if index_of(items[name]) != index[name]:
                raise DamagedCheckpoint(f"fingerprints of {name} differ")
        return {name: items[name] for name in like}

    def _index(self, step: int) -> _Index:
        arguments = ocp.args.Composite(index=ocp.args.JsonRestore())
        return self._reader.restore(step, args=arguments)["index"]

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints away: their steps can be saved again, and nothing is lost."""
        if self._read_only or not steps:
            return
        if processes.is_first():
            aside = self._folder.parent / "damaged_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                target = aside / str(step)
                if target.exists():  # the step was damaged before, and saved again
                    target = aside / f"{step}.{time.time_ns()}"
                (self._folder / str(step)).rename(target)
                print(f"moved damaged checkpoint {step} to {target}")
        processes.from_first(None)  # the others look when it is done
        self._manager.reload()


@functools.lru_cache
def _in_letters(folder: epath.Path) -> epath.Path:
    """Return a folder's path in UTF-8, which Orbax needs; Linux, where others occur, has one."""
    if os.fsencode(folder) == str(folder).encode(errors="replace") or not folder.exists():
        return folder
    return epath.Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}")


def _meet(*, key: str, timeout_ms: int) -> None:
    """Wait for the other processes at the end of a save, unless this one has failed to write.

    Orbax would wait for 20 minutes with its error in hand; raised, it ends this process.
    """
    if error := sys.exc_info()[1]:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Raise DamagedCheckpoint on all processes for what one cannot read.

    Errors where the machine, the network or the user is at fault stay what they are.
    """
    with processes.together(DamagedCheckpoint):
        # the type of an error depends on where a reader of damaged files stumbles
        try:
            yield
        except _NOT_OF_FILES:
            raise
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None)
            if errno.errorcode.get(number) in _PASSING or re.search(_PASSING_WORDS, str(error)):
                raise
            raise DamagedCheckpoint(f"{type(error).__name__}: {reason_of(error)}") from error

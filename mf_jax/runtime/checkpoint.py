"""Checkpoints of a run: written in the background, chosen only if every bit of them is what was saved.

A checkpoint holds the items `params`, `ema` and `rest` of the training state, so that sampling reads no more than it
needs, and an index: the name, shape, type and fingerprint of every array. A fingerprint is a sum of the array's bits
modulo 2^32, weighted by position; it does not depend on how the array is spread over devices. The format's own
checks notice a file that is cut short, fingerprints notice the rest.

Orbax writes into a temporary folder and renames it when all is there, so that a process may be killed at any moment.
"""

import contextlib
import errno
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint.multihost import get_barrier_sync_fn

from mf_jax.errors import BadInput
from mf_jax.runtime import processes
from mf_jax.step import TrainState

FOLDER = "checkpoints"
_DAMAGED_FOLDER = "damaged_checkpoints"
_NAMED_IN_ERROR = 4
_Found = TypeVar("_Found")
_NOT_OF_FILES = (
    MemoryError,
    PermissionError,
    ConnectionError,
    TimeoutError,
    jax.errors.JaxRuntimeError,
)
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}
_PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""What is said, by number or in words, where storage cannot be reached: another attempt may find it in order."""


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Return the steps of a workdir's finished checkpoints, oldest first."""
    folder = epath.Path(workdir).absolute() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def fingerprint(workdir: epath.PathLike, step: int) -> str:
    """Return hex digits that differ for any two checkpoints of different arrays; reads the index alone.

    Raises:
      UnreadableCheckpoint: if there is no such checkpoint, or its index is damaged.
    """
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        index = json.dumps(checkpoints.index(step), sort_keys=True)
    return hashlib.sha256(index.encode()).hexdigest()


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was saved."""


class UnreadableCheckpoint(BadInput):
    """The checkpoint that was asked for is damaged or not there (any more)."""


def _items(state: TrainState) -> dict[str, PyTree]:
    rest = {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics}
    items = {
        "params": state.params,
        "ema": state.ema,
        "rest": rest | {"first_bad_step": state.first_bad_step},
    }
    return {
        name: item for name, item in items.items() if item
    }  # a run without averages has no item for them


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit
def _fingerprints(tree: PyTree) -> list[jax.Array]:
    def fingerprint(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [fingerprint(leaf) for leaf in jax.tree.leaves(tree)]


def _index(item: PyTree) -> dict[str, list]:
    """Return {name: [shape, type, fingerprint]} of an item's arrays."""
    prints = jax.device_get(_fingerprints(item))
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(value)]
        for (name, leaf), value in zip(_named_leaves(item).items(), prints, strict=True)
    }


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: of the run, a local path or a bucket.
      keep: newest checkpoints kept.
      read_only: never change anything, for processes beside the one that trains.
      report: called with one line about each damaged checkpoint.

    Raises:
      BadInput: if the folder cannot be made.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 1,
        read_only: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        self._folder = epath.Path(workdir).absolute() / FOLDER
        self._read_only = read_only
        self._report = report
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        )
        if self._folder.exists() and not self._folder.is_dir():
            raise BadInput(f"{self._folder}: must be a folder for checkpoints; move it away")
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        # each process reads by itself: one that cannot leaves no other waiting
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            create=False, enable_async_checkpointing=False, multiprocessing_options=alone
        )
        self._reader = ocp.CheckpointManager(self._folder, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Save a state in the background; the state may be donated as soon as this returns."""
        step, items = int(state.step), _items(state)
        if step in self._manager.all_steps():
            return
        index = {name: _index(item) for name, item in items.items()}
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(
            step, args=ocp.args.Composite(index=ocp.args.JsonSave(index), **arguments)
        )

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
        self._reader.close()

    def restore_state(self, like: TrainState) -> TrainState | None:
        """Return the newest undamaged state, or None where there is no checkpoint.

        Args:
          like: the shapes, types and shardings wanted.

        Raises:
          BadInput: if the newest checkpoint is of another model, or all checkpoints are damaged.
        """
        restored = self._restore(_items(like))
        if restored is None:
            return None
        _, items = restored
        return TrainState(params=items["params"], ema=items.get("ema", {}), **items["rest"])

    def restore_params(
        self, like: PyTree, *, ema: str, names: tuple[str, ...], step: int | None = None
    ) -> tuple[int, PyTree]:
        """Return the step and the parameters of a checkpoint.

        Args:
          like: the shapes, types and shardings of the parameters.
          ema: a name of a moving average, or `none` for the raw parameters.
          names: of all moving averages of the run.
          step: of the checkpoint; None for the newest undamaged one.

        Raises:
          UnreadableCheckpoint: if the step has no checkpoint, or a damaged one.
          BadInput: if there is no checkpoint, it is of another model, or all checkpoints are damaged.
        """
        item = {"params": like} if ema == "none" else {"ema": dict.fromkeys(names, like)}
        if step is None:
            restored = self._restore(item)
        else:
            with self._chosen(step):
                restored = step, self._restore_step(step, item)
        if restored is None:
            raise BadInput(
                f"{self._folder} holds no checkpoint; train first: --mode=train with the same --workdir"
            )
        step, items = restored
        return step, items["params"] if ema == "none" else items["ema"][ema]

    def _restore(self, like: dict[str, PyTree]) -> tuple[int, dict[str, PyTree]] | None:
        damaged = []
        for step in reversed(processes.from_first(self.steps)):
            try:
                items = self._restore_step(step, like)
            except DamagedCheckpoint as problem:
                damaged.append(step)
                self._report(f"checkpoint {step} is damaged ({problem}); trying the one before it")
                continue
            self._set_aside(damaged)
            return step, items
        if damaged:
            raise BadInput(
                f"{self._folder}: every checkpoint is damaged; move the folder away to start again"
            )
        return None

    def index(self, step: int) -> dict[str, dict[str, list]]:
        """Return the index of a checkpoint.

        Raises:
          UnreadableCheckpoint: if there is no such checkpoint, or its index is damaged.
        """
        with self._chosen(step):
            return _together(lambda: self._read_index(step))

    @contextlib.contextmanager
    def _chosen(self, step: int) -> Iterator[None]:
        """Raise UnreadableCheckpoint, on all processes of a job, where a step is missing or turns out damaged."""
        kept = ", ".join(map(str, self.steps)) or "none"
        missing = f"{self._folder} has no checkpoint of step {step}; it has {kept}"
        if told := [
            problem
            for problem in processes.from_all("" if step in self.steps else missing)
            if problem
        ]:
            raise UnreadableCheckpoint(told[0])
        try:
            yield
        except DamagedCheckpoint as problem:
            raise UnreadableCheckpoint(
                f"{self._folder / str(step)} is damaged ({problem}); choose another step"
            ) from problem

    def _read_index(self, step: int) -> dict[str, dict[str, list]]:
        with _damage():
            arguments = ocp.args.Composite(index=ocp.args.JsonRestore())
            return self._reader.restore(step, args=arguments)["index"]

    def _restore_step(self, step: int, like: dict[str, PyTree]) -> dict[str, PyTree]:
        """Return the items of a checkpoint; all processes of a job find it damaged, or none."""
        index, items = _together(lambda: self._read_step(step, like))
        for name in like:  # fingerprints take every process
            if _index(items[name]) != index[name]:
                raise DamagedCheckpoint(f"fingerprints of {name} differ")
        return items

    def _read_step(
        self, step: int, like: dict[str, PyTree]
    ) -> tuple[dict[str, dict], dict[str, PyTree]]:
        """Return the index and this process's part of the items of a checkpoint."""
        index = self._read_index(step)
        missing = set(like) - set(index)
        if missing:
            raise DamagedCheckpoint(f"its index lacks {', '.join(sorted(missing))}")
        for name, item in like.items():
            _check_same_model(self._folder / str(step), index[name], item)
        with _damage():
            arguments = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
            items = self._reader.restore(step, args=ocp.args.Composite(**arguments))
        return index, {name: items[name] for name in like}

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints away, so that their steps can be saved again and nothing is lost."""
        if self._read_only or not steps:
            return
        if processes.is_first():
            aside = self._folder.parent / _DAMAGED_FOLDER
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                number = sum(1 for path in aside.iterdir() if path.name.split(".")[0] == str(step))
                target = aside / (f"{step}.{number}" if number else str(step))
                (self._folder / str(step)).rename(target)
                self._report(f"moved damaged checkpoint {step} to {target}")
        processes.from_first(None)  # the others look when it is done
        self._manager.reload()


def _meet(*, key: str, timeout_ms: int) -> None:
    """Wait for the other processes of a job at the end of a save, unless this one has failed to write its part.

    Orbax would wait for them with its error in hand, and they for this process, as long as the time-out: 20 minutes. So
    the error is raised, this process ends, and the others notice.
    """
    if error := sys.exc_info()[1]:
        raise error
    get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _together(read: Callable[[], _Found]) -> _Found:
    """Return what this process reads; if one process of a job finds damage, raise DamagedCheckpoint on all of them.

    Args:
      read: does not compute with the others.
    """
    problem, found = "", None
    try:
        found = read()
    except DamagedCheckpoint as error:
        problem = str(error)
    if told := [problem for problem in processes.from_all(problem) if problem]:
        raise DamagedCheckpoint(told[0])
    return found


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    # what a reader of damaged files raises depends on where it stumbles: any error means damage, unless it says that
    # this machine or the way to the file, not the file, is at fault
    try:
        yield
    except _NOT_OF_FILES:
        raise
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number in _PASSING or any(word in str(error) for word in _PASSING_WORDS):
            raise
        raise DamagedCheckpoint(
            f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        ) from error


def _check_same_model(path: epath.Path, index: dict[str, list], like: PyTree) -> None:
    ours = {name: list(leaf.shape) for name, leaf in _named_leaves(like).items()}
    theirs = {name: entry[0] for name, entry in index.items()}
    wrong = [
        f"{name} is {theirs.get(name, 'missing')}, not {ours.get(name, 'expected')}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - _NAMED_IN_ERROR} more" * (len(wrong) > _NAMED_IN_ERROR)
        raise BadInput(
            f"checkpoint {path} is of another model: {'; '.join(wrong[:_NAMED_IN_ERROR])}{more}; "
            "use its own config, or another --workdir"
        )

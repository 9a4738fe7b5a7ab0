"""Several processes as one job, by JAX's own multi-controller runtime, and signals to stop it.

JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe a
job, or JAX knows it by itself: TPU pods, SLURM, Open MPI.

A problem that only some processes see, such as a missing folder, goes to all before they compute
together. Otherwise the others would wait for ever, in a collective, for one that has given up.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped

from mf_jax.flow.errors import BadInput, reason_of, refused

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ALONE = ("coordinator_address should be defined", "must be called before")
"""What JAX says where it knows of no job, or this process has begun to compute by itself."""
_LAST_TO_LEAVE_SECONDS, _PATIENCE_SECONDS = 3, 10
_BAD_INPUT = 2
_LOST = "gloo|connection (reset|closed)|coordination service|heartbeat|socket closed"
"""Words in errors of computations where another process has gone."""


def start(*, start_timeout: float, heartbeat_timeout: int, stops_together: bool) -> None:
    """Become a process of a job, if the environment describes one; before anything else of JAX.

    Args:
      start_timeout: seconds within which all processes must come.
      heartbeat_timeout: seconds after which a silent process counts as dead and the others end.
      stops_together: tell SIGTERM to one process to all; else it ends that process.
    """
    if jax.distributed.is_initialized():  # by the program that calls this one
        return
    jax.config.update("jax_enable_x64", False)  # nothing here is computed in 64 bits
    job = _described()
    jax.config.update("jax_enable_preemption_service", stops_together)
    # process 0 goes last: the others lose their connection with it
    patience = start_timeout + _LAST_TO_LEAVE_SECONDS * (job.get("process_id") == 0)
    where = job.get("coordinator_address", "the coordinator of the job")
    fix = "start each (in SLURM: srun), at the address of process 0, whose port must be open"
    lost = f"{job.get('num_processes', 'all')} processes have not met there within"
    told = f"mf_jax: {where}: {lost} {start_timeout:g} s; {fix}"
    watch = _end_later(patience, _BAD_INPUT, told)
    try:
        jax.distributed.initialize(
            **job,
            # one that gives up says so itself, in one line; JAX aborts
            initialization_timeout=int(start_timeout + 4 * _LAST_TO_LEAVE_SECONDS),
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        if job or not any(reason in str(error) for reason in _ALONE):
            raise BadInput(f"{', '.join(_VARIABLES)}: {error}") from error
    finally:
        watch.cancel()
    if (platforms := jax.config.jax_platforms) in (None, "", "cpu"):
        return  # and a benchmark may still choose how many devices there are
    fix = 'unset it, or install its build of JAX: pip install -U "jax[cuda13]" or "jax[tpu]"'
    # of any type: a missing build fails an assertion
    with refused(Exception, f"JAX_PLATFORMS={platforms}: JAX finds no such device here", fix):
        jax.devices()


def _described() -> dict[str, Any]:
    """Return the job that the environment describes as arguments of JAX, or nothing."""
    address, num, index = given = [os.environ.get(name, "") for name in _VARIABLES]
    if not any(given):
        return {}
    are_counts = num.isdecimal() and index.isdecimal() and int(index) < int(num)
    if not are_counts or not re.fullmatch(r".+:[0-9]+", address):
        settings = ", ".join(map("{}={}".format, _VARIABLES, given))
        needed = "must be host:port, and whole numbers, 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES"
        raise BadInput(f"{settings}: {needed}; set all three or none")
    return {"coordinator_address": address, "num_processes": int(num), "process_id": int(index)}


def _end_later(seconds: float, code: int, text: str = "") -> threading.Timer:
    """End this process after a while with a line: JAX may wait, and not be interrupted."""

    def end() -> None:
        if text:
            print(text, file=sys.stderr, flush=True)
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def cpu_count() -> int:
    """Return how many cores this process may use, or that the machine has."""
    of_process = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(of_process(0)) if of_process else os.cpu_count() or 1


def are_several() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is the process that writes and talks."""
    return not are_several() or jax.process_index() == 0


def name() -> str:
    """Return the prefix of messages of this process: nothing where it is the only one."""
    return f"process {jax.process_index()}: " if are_several() else ""


def from_all(value: Any) -> list[Any]:
    """Return the value, which JSON can hold, of each process, in their order; all must call it."""
    if not are_several():
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Return the value of the first process; all must call it."""
    return from_all(value if is_first() else None)[0]


def on_host(x: Shaped[Array | np.ndarray, "*_"]) -> Shaped[np.ndarray, "*_"]:
    """Return an array that may be spread over all processes; all must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


@contextlib.contextmanager
def together(kind: type[Exception] = BadInput) -> Iterator[None]:
    """Raise such an error of any process on all; the body must not compute with the others."""
    try:
        yield
    except kind as error:
        from_all(str(error))
        raise
    for index, problem in enumerate(from_all("")):
        if problem:
            raise kind(f"process {index} has: {problem}")


def check_alike(settings: dict[str, Any]) -> None:
    """Raise BadInput on all processes, naming settings that differ and their values."""
    every = from_all(settings)
    lines = [
        f"process {index} has {key}={theirs.get(key)!r}, process 0 {every[0].get(key)!r}"
        for index, theirs in enumerate(every)
        for key in dict.fromkeys([*every[0], *theirs])
        if repr(theirs.get(key)) != repr(every[0].get(key))  # nan is not nan
    ]
    if lines:
        raise BadInput(f"{'; '.join(lines)}: start all processes of a job with the same command")


def explain(error: Exception) -> str:
    """Return one line for an error where another process has gone, else the traceback."""
    if not re.search(_LOST, str(error), re.IGNORECASE):
        return "".join(traceback.format_exception(error))
    told = "another process of the job has ended, and its output says why; the same command"
    return f"{told} continues from the newest checkpoint ({reason_of(error)})"


def leave(code: int) -> int:
    """Leave the job, waiting some seconds for the others; return the exit code."""
    if are_several():
        # after an error, or SIGTERM behind the last step agreed on, JAX would wait for ever
        _end_later(_PATIENCE_SECONDS, code)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        jax.distributed.shutdown()
    return code


@contextlib.contextmanager
def stop_signal(folder: Path, num_steps: int) -> Iterator[Callable[[int], bool]]:
    """Turn SIGTERM, and the first Ctrl-C, into the wish to save and end after the step at hand.

    Yields a function of the steps begun that says whether to stop; all processes say the same.
    """
    next_step, last_step, several = 0, None, are_several()

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal last_step
        signal.signal(number, before[number])  # a second one acts as it always does
        last_step = next_step if last_step is None else last_step
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells to all processes
        step = "the next step" if several or not last_step else f"step {min(last_step, num_steps)}"
        with contextlib.suppress(OSError, RuntimeError):  # amid another print
            print(f"stopping after {step}; the checkpoint of {step} will be saved in {folder}")
            sys.stdout.flush()

    def is_last(done: int) -> bool:
        nonlocal next_step
        next_step = done + 1  # what a signal from now on promises
        return last_step is not None and done >= last_step

    caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # it alone may catch signals
        caught = ()
    before = {number: signal.signal(number, ask) for number in caught}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else is_last
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

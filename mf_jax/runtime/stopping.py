"""Signals to stop, heard while the device computes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any

from etils.epath import Path
from jax.experimental import multihost_utils

from mf_jax.runtime import processes

_SECONDS_PER_LOOK = 1.0


def awaited(future: Future, meanwhile: Callable[[], None] | None) -> Any:
    """Return what a thread returns; signals reach this one every second, as `meanwhile` does."""
    while wait([future], timeout=_SECONDS_PER_LOOK).not_done:
        if meanwhile:
            meanwhile()
    return future.result()


@contextlib.contextmanager
def stop_signal(folder: Path, num_steps: int) -> Iterator[Callable[[int], bool]]:
    """Turn SIGTERM, and the first Ctrl-C, into the wish to save and end after the step at hand.

    Yields a function of the steps begun that says whether to stop; all processes say the same. The
    folder is where checkpoints are saved.
    """
    next_step, last_step, several = 0, None, processes.are_several()

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

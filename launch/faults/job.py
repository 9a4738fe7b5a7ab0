"""Several processes of the command line on this machine, as one job over loopback."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """What a process has left: its exit code, negative for a signal, and what it said."""

    code: int
    output: str
    errors: str


class Job:
    """Processes that have been started.

    Args:
      num: how many.
      arguments: of the command line.
      devices: of each process.
      own: more arguments of a process, from its number.
      cwd: the folder that a process is started in, from its number.
      env: more of the environment.
    """

    def __init__(
        self,
        num: int,
        *arguments: object,
        devices: int = 1,
        own: Callable[[int], Sequence[str]] = lambda index: (),
        cwd: Callable[[int], Path] = lambda index: ROOT,
        env: Mapping[str, str] | None = None,
    ):
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        shared = {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
        }
        if num > 1:
            shared |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
                "JAX_NUM_PROCESSES": str(num),
            }
        # files, as nobody empties pipes while the job runs; the last reference closes them
        self._said = [[tempfile.TemporaryFile() for _ in range(2)] for _ in range(num)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "mf_jax.main", *map(str, [*arguments, *own(index)])],
                cwd=cwd(index),
                env=os.environ
                | shared
                | ({"JAX_PROCESS_ID": str(index)} if num > 1 else {})
                | dict(env or {}),
                stdout=output,
                stderr=errors,
            )
            for index, (output, errors) in enumerate(self._said)
        ]

    def output(self, index: int = 0) -> str:
        """Return what a process has printed so far."""
        return _content(self._said[index][0])

    def wait_for(self, is_there: Callable[[], bool], timeout: float = 240) -> bool:
        """Wait until something is there; return whether it came before the first process ended, or in time."""
        end = time.monotonic() + timeout
        while not is_there():
            if time.monotonic() > end or any(
                process.poll() is not None for process in self.processes
            ):
                return False
            time.sleep(0.002)
        return True

    def send(self, number: int, *indices: int) -> None:
        """Send a signal to some of the processes, by default to all."""
        for index in indices or range(len(self.processes)):
            self.processes[index].send_signal(number)

    def finish(self, timeout: float = 240) -> list[Ended]:
        """Wait for the processes; none survives, whatever happens."""
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0, end - time.monotonic()))
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
        codes = [process.returncode for process in self.processes]
        said = [map(_content, files) for files in self._said]
        return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _content(file: BinaryIO) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

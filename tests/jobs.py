"""The command line as one or several processes of this machine, and in this process."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """What a command has left; the code of a process is negative for a signal."""

    code: int
    output: str
    errors: str


def here(*arguments):
    """Run a command line in this process."""
    from mf_jax.main import main

    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["mf_jax", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code = main()
    return Ended(code, output.getvalue(), errors.getvalue())


class Job:
    """Processes of one job over loopback, of a program or else of the command line.

    Args:
      num: how many.
      arguments: of all.
      program: arguments of the interpreter in front.
      devices: of each process.
      own: more arguments of a process, from its number.
      environment: more variables of all.
    """

    def __init__(
        self,
        num,
        *arguments,
        program=("-m", "mf_jax.main"),
        devices=1,
        own=lambda index: (),
        environment=(),
    ):
        xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        env = os.environ | env | {"XLA_FLAGS": xla} | dict(environment)
        if num > 1:
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
            env["JAX_NUM_PROCESSES"] = str(num)
        # files, as nobody empties pipes while the job runs; the last reference closes them
        self._texts = [[tempfile.TemporaryFile() for _ in range(2)] for _ in range(num)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, *program, *map(str, [*arguments, *own(index)])],
                cwd=ROOT,
                env=env | ({"JAX_PROCESS_ID": str(index)} if num > 1 else {}),
                stdout=output,
                stderr=errors,
            )
            for index, (output, errors) in enumerate(self._texts)
        ]

    def output(self, index=0):
        """Return what a process has printed so far."""
        return _content(self._texts[index][0])

    def wait_for(self, is_there, timeout=240):
        """Wait until something is there; return whether it comes before a process ends, in time."""
        end = time.monotonic() + timeout
        while not is_there():
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def send(self, number, *indices):
        """Send a signal to some of the processes, by default to all."""
        for index in indices or range(len(self.processes)):
            self.processes[index].send_signal(number)

    def finish(self, timeout=240):
        """Wait for the processes; none survives, whatever happens."""
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0, end - time.monotonic()))
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return [
            Ended(process.returncode, *map(_content, texts))
            for process, texts in zip(self.processes, self._texts, strict=True)
        ]


def free_port():
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _content(file):
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

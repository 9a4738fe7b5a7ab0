"""Several processes of the command line on this machine, as one job over loopback."""

import os
import signal
import socket
import subprocess
import sys

from conftest import ROOT


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """Processes that have been started.

    num: how many. arguments: of the command line. devices: of each process. own: more arguments of a process, from its
    number. cwd: the folder it is started in. env: more of the environment.
    """

    def __init__(self, num, *arguments, devices=1, own=lambda index: (), cwd=lambda index: ROOT, env=None):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        address = f"127.0.0.1:{free_port()}"
        shared = {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
        }
        shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "mf_jax.main", *map(str, [*arguments, *own(index)])],
                cwd=cwd(index),
                env=os.environ | shared | {"JAX_PROCESS_ID": str(index)} | (env or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(num)
        ]
        self.read = [""] * num

    def read_until(self, text, index=0):
        """Read a process's output up to the first line with a text."""
        for line in self.processes[index].stdout:
            self.read[index] += line
            if text in line:
                return
        raise AssertionError(
            f"{text!r} was not said: {self.read[index]} {self.processes[index].stderr.read()}"
        )

    def send(self, number, index):
        self.processes[index].send_signal(number)

    def finish(self, timeout=240):
        """Return (exit code, output, errors) of each process; none survives."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
        return [
            (process.returncode, read + output, errors)
            for process, read, (output, errors) in zip(self.processes, self.read, said, strict=True)
        ]

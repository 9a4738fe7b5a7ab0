"""The command line as one or several processes of this machine, and in this process."""

import contextlib
import io
import json
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

from configs.digits import get_config

ROOT = Path(__file__).parent.parent


def keys(text):
    """Return the flags of overrides of a config."""
    return [f"--config.{key}" for key in text.split()]


_KEYS = (
    "model.depth=1 model.width=16 train.num_steps=12 train.batch_size=16 train.log_every_steps=3 "
    "optim.warmup_steps=0 log.sample_every_steps=0 checkpoint.every_steps=4 eval.num_samples=80 "
    "eval.steps=1,2 model.prediction=velocity coupling.name=independent ema.every_steps=5"
)
"""No checkpoint falls on an average; the usual coupling compiles for long."""
TINY = tuple(keys(_KEYS))
"""Makes any config of digits or toy2d a matter of seconds."""
PICTURES = "--config.log.sample_every_steps=5"
"""Pictures before the last step too, each with a report: they take as long as the rest."""


class Ended(NamedTuple):
    """What a command has left; the code of a process is negative for a signal."""

    code: int
    output: str
    errors: str


def here(*arguments):
    from mf_jax.main import main

    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["mf_jax", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code = main()
    return Ended(code, output.getvalue(), errors.getvalue())


def works(*arguments):
    """Run a command line in this process, which must end well; return its output."""
    ended = here(*arguments)
    assert ended.code == 0, ended
    return ended.output


def assert_refused(ended, *words):
    """Assert that a command ended with code 2 and one line of errors, which has these words."""
    assert (ended.code, ended.errors.count("\n")) == (2, 1), ended
    assert [word for word in words if word not in ended.errors] == [], ended.errors


def edit(file, **sections):
    """Change keys of a run's config as who edits the file does."""
    stored = json.loads(file.read_text())
    stored.pop("checksum", None)
    for section, changes in sections.items():
        stored[section] |= changes
    file.write_text(json.dumps(stored))


def tiny_config(**more):
    """Return the config of digits with a tiny network; keys may hold dots."""
    config = get_config()
    config.model.depth, config.model.width, config.train.batch_size = 1, 16, 16
    config.model.prediction = "velocity"
    config.update_from_flattened_dict(more)
    return config


class Job:
    """Processes of one job over loopback, of a program or else of the command line.

    The program is the interpreter's arguments in front of all others. Each process has the devices.
    """

    def __init__(self, num, *arguments, program=("-m", "mf_jax.main"), devices=1):
        xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        env = os.environ | env | {"XLA_FLAGS": xla}
        if num > 1:
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
            env["JAX_NUM_PROCESSES"] = str(num)
        # files, as nobody empties pipes while the job runs; the last reference closes them
        self._texts = [[tempfile.TemporaryFile() for _ in range(2)] for _ in range(num)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                cwd=ROOT,
                env=env | ({"JAX_PROCESS_ID": str(index)} if num > 1 else {}),
                stdout=output,
                stderr=errors,
            )
            for index, (output, errors) in enumerate(self._texts)
        ]

    def output(self):
        """Return what the first process has printed so far."""
        return _content(self._texts[0][0])

    def wait_for(self, is_there, timeout=240):
        """Wait until something is there; return whether it comes before a process ends, in time."""
        end = time.monotonic() + timeout
        while not (found := is_there()) and time.monotonic() < end:
            if any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.002)
        return found

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

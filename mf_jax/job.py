"""A mode of the command line, alone or as one process of a job on many machines: its errors and its exit code."""

import errno
import importlib
import os
import sys

from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax.config import flat
from mf_jax.errors import BadInput
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket

_OK, _FAILED, _BAD_INPUT = 0, 1, 2
_NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What errors say, whatever their type: those of checkpoints come from a library in another language."""
_OF_BUCKETS = "gcsfs"
"""The package that a path in a bucket of Google needs."""
_OF_ONE_PROCESS = ("prepare.process_index",)
"""Settings in which the processes of a job may differ."""


def run(module: str, config: ConfigDict, mode: str, workdir: Path) -> int:
    """Run a mode.

    Args:
      module: has the mode's `run(config, workdir)`, which returns nothing or an exit code.
      config: of the command.
      mode: its name.
      workdir: of the command.

    Returns:
      The exit code: 0 done, 1 failed, 2 bad input, or what the mode says.
    """
    return processes.leave(_run(module, config, mode, workdir))


def _check_place(workdir: Path) -> None:
    """Raise BadInput for a bucket that cannot be reached."""
    try:
        in_bucket(workdir) and workdir.exists()
    except ImportError as error:
        raise BadInput(f"--workdir={workdir}: {_to_reach_buckets(error)}") from error


def _to_reach_buckets(error: ImportError) -> str:
    return f'{error}; pip install "etils[epath-gcs]"'


def _run(module: str, config: ConfigDict, mode: str, workdir: Path) -> int:
    try:
        processes.start(
            start_timeout=config.job.start_timeout_seconds,
            heartbeat_timeout=config.job.heartbeat_timeout_seconds,
            stops_together=mode == "train",
        )
        settings = {"--mode": mode, "--workdir": str(workdir), **flat(config)}
        processes.check_alike(
            {key: settings[key] for key in settings if key not in _OF_ONE_PROCESS}
        )
        with processes.together():
            _check_place(workdir)
        with processes.only_first_talks():
            code = importlib.import_module(module).run(config, workdir) or _OK
        processes.from_all(
            code
        )  # those that wait have not left before the first has written its last file
        return code
    except BadInput as error:
        print(f"mf_jax: {processes.name()}{error}", file=sys.stderr)
        return _BAD_INPUT
    except FloatingPointError as error:
        print(f"mf_jax: {processes.name()}{error}", file=sys.stderr)
        return _FAILED
    except Exception as error:
        if isinstance(error, ImportError) and _OF_BUCKETS in str(error):
            print(f"mf_jax: {processes.name()}{_to_reach_buckets(error)}", file=sys.stderr)
            return _BAD_INPUT
        if reason := next((reason for reason in _NO_ROOM if reason in str(error)), ""):
            told = f"--workdir={workdir}: {reason}; make room, and the same command continues"
            print(f"mf_jax: {processes.name()}{told}", file=sys.stderr, flush=True)
            return _FAILED
        if not processes.are_several():
            raise
        print(f"mf_jax: {processes.told_of(error)}", file=sys.stderr, flush=True)
        return _FAILED

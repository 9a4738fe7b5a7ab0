"""A mode of the command line, alone or as one process of a job on many machines: its errors and its exit code."""

import importlib
import sys

from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax import processes
from mf_jax.config import flat
from mf_jax.types import BadInput

_OK, _FAILED, _BAD_INPUT = 0, 1, 2
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


def _run(module: str, config: ConfigDict, mode: str, workdir: Path) -> int:
    try:
        processes.start(
            start_timeout=config.job.start_timeout_seconds,
            heartbeat_timeout=config.job.heartbeat_timeout_seconds,
            stops_together=mode == "train",
        )
        settings = {"--mode": mode, "--workdir": str(workdir), **flat(config)}
        processes.check_alike({key: settings[key] for key in settings if key not in _OF_ONE_PROCESS})
        with processes.only_first_talks():
            return importlib.import_module(module).run(config, workdir) or _OK
    except BadInput as error:
        print(f"mf_jax: {processes.name()}{error}", file=sys.stderr)
        return _BAD_INPUT
    except FloatingPointError as error:
        print(f"mf_jax: {processes.name()}{error}", file=sys.stderr)
        return _FAILED
    except Exception as error:
        if not processes.are_several():
            raise
        print(f"mf_jax: {processes.told_of(error)}", file=sys.stderr, flush=True)
        return _FAILED

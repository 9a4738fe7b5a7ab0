"""The command line.

python -m mf_jax.main --config=configs/NAME.py[:ROW] [--workdir=runs/NAME] [--config.KEY=VALUE ...]
  [--mode=train|eval|sample|bench|weights|prepare|config]

Every key of configs/default.py can be set, for example --config.optim.lr=1e-3. --mode=config prints
them all. A job on many machines is the same command on each; docs/pods.md.
"""

import contextlib
import errno
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from absl import flags, logging
from etils.epath import Path
from ml_collections import ConfigDict, config_flags

from mf_jax.errors import BadInput, check_known, nearest

MODES = {
    "train": "mf_jax.train",
    "eval": "mf_jax.evaluate",
    "sample": "mf_jax.sampling",
    "bench": "mf_jax.bench",
    "weights": "mf_jax.published.fetch",
    "prepare": "mf_jax.prepare",
    "config": "",
}
_OK, _FAILED, _BAD_INPUT = 0, 1, 2
_NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What errors say, whatever their type: a library in another language writes checkpoints."""
_OF_BUCKETS = "gcsfs"
"""The package that a path in a bucket of Google needs."""
_FIX_OF_BUCKETS = 'pip install "etils[epath-gcs]"'
_OF_ONE_PROCESS = ("prepare.process_index",)
"""Settings in which the processes of a job may differ."""


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, Path]:
    """Return the config, the mode and the workdir that a command line asks for.

    Args:
      argv: of this process (overrides of config keys are read from `sys.argv` itself).
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", flag_values=values)
    flags.DEFINE_string("mode", "train", "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    try:
        rest = values(list(argv))
        config = values.config
        if config is not None:
            config.lock()  # a file that could not be loaded says so at the first use
    except Exception as error:  # a config file is a program: it may raise anything
        raise BadInput(_explain(error, argv)) from error
    if len(rest) > 1:
        raise BadInput(
            f"{rest[1]!r}: not an option; options look like --mode=train or --config.seed=1"
        )
    if config is None:
        raise BadInput("--config is missing; for example --config=configs/digits.py")
    check_known("--mode", values.mode, MODES)
    file, _, row = values["config"].config_filename.partition(":")
    name = "_".join([Path(file).stem, row] if row else [Path(file).stem])
    return config, values.mode, Path(values.workdir or f"runs/{name}")


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """Return one line about an error of the flag parser."""
    text = str(error).replace("\\n", " ").replace("\n", " ").replace("\\", "")
    if "Error whilst parsing config file" in text:  # and the traceback of a ValueError
        while error.__context__:
            error = error.__context__
        if isinstance(error, BadInput):
            return str(error)
        return f"the config file raises {type(error).__name__}: {error}"
    if isinstance(error, OSError):
        paths = (Path(path) for path in re.findall(r"--config[= ]([^:\s]+)", " ".join(argv)))
        path = next((path for path in paths if not path.exists()), Path(""))
        similar = nearest(str(path), map(str, path.parent.glob("*.py")))
        return f"--config={path}: no such file{similar}"
    if isinstance(error, KeyError | AttributeError):
        similar = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
        key = similar[2] if similar else text.strip("'\" ")
        fix = f" (did you mean {similar[1]}?)" if similar else ""
        return f"--config has no key {key!r}{fix}"
    if isinstance(error, flags.Error):
        return text
    return f"the config file raises {type(error).__name__}: {text}"


def _last_of_each(arguments: Iterable[str]) -> list[str]:
    """Return arguments without settings of a key that is set again: tuples would be joined."""
    kept: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        key = re.match(r"--?(config\.[\w.]+)=", argument)
        name = key[1] if key else str(number)
        kept.pop(name, None)
        kept[name] = argument
    return list(kept.values())


def main() -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 bad input."""
    logging.set_verbosity(logging.WARNING)
    if {"-h", "--help", "--helpfull"} & set(sys.argv[1:]):
        print(__doc__)
        return _OK
    try:
        sys.argv[:] = _last_of_each(sys.argv)
        config, mode, workdir = parse(sys.argv)
    except BadInput as error:
        print(f"mf_jax: {error}", file=sys.stderr)
        return _BAD_INPUT
    if mode == "config":
        default = importlib.import_module("configs.default").get_config()
        print("\n".join(_differences(config, default)))
        return _OK
    return _run(mode, config, workdir)


def _differences(config: ConfigDict, default: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yield a line for each key, marked where its value is not the default."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _differences(value, default[key], f"{prefix}{key}.")
        elif value == default[key]:
            yield f"  {prefix}{key} = {value!r}"
        else:
            yield f"* {prefix}{key} = {value!r}  (default {default[key]!r})"


def _run(mode: str, config: ConfigDict, workdir: Path) -> int:
    """Run a mode, alone or as one process of a job on many machines; return the exit code."""
    # brings JAX, for which a typing error need not wait
    from mf_jax.runtime import processes

    try:
        return processes.leave(_one_process(mode, config, workdir))
    except BadInput as error:
        text, code = f"{processes.name()}{error}", _BAD_INPUT
    except FloatingPointError as error:
        text, code = f"{processes.name()}{error}", _FAILED
    except Exception as error:
        reason = next((reason for reason in _NO_ROOM if reason in str(error)), "")
        if isinstance(error, ImportError) and _OF_BUCKETS in str(error):
            text, code = f"{processes.name()}{error}; {_FIX_OF_BUCKETS}", _BAD_INPUT
        elif reason:
            fix = "make room, and the same command continues"
            text, code = f"{processes.name()}--workdir={workdir}: {reason}; {fix}", _FAILED
        elif processes.are_several():
            text, code = processes.explain(error), _FAILED
        else:
            raise
    with contextlib.suppress(OSError):  # standard error may lie on the disk that is full
        print(f"mf_jax: {text}", file=sys.stderr, flush=True)
    return processes.leave(code)


def _one_process(mode: str, config: ConfigDict, workdir: Path) -> int:
    from mf_jax.runtime import processes
    from mf_jax.runtime.workdir import flat

    processes.start(
        start_timeout=config.job.start_timeout_seconds,
        heartbeat_timeout=config.job.heartbeat_timeout_seconds,
        stops_together=mode == "train",
    )
    settings = {"--mode": mode, "--workdir": str(workdir), **flat(config)}
    processes.check_alike({k: v for k, v in settings.items() if k not in _OF_ONE_PROCESS})
    with processes.together():
        _check_place(workdir)
    with processes.only_first_talks():
        code = importlib.import_module(MODES[mode]).run(config, workdir) or _OK
    # those that wait have not left before the first has written its last file
    processes.from_all(code)
    return code


def _check_place(workdir: Path) -> None:
    """Raise BadInput for a bucket that cannot be reached."""
    try:
        if "://" in str(workdir):
            workdir.exists()
    except ImportError as error:
        raise BadInput(f"--workdir={workdir}: {error}; {_FIX_OF_BUCKETS}") from error


if __name__ == "__main__":
    sys.exit(main())

"""The command line.

python -m mf_jax.main --config=configs/NAME.py [--mode=train|eval|sample|bench|weights|prepare] [--workdir=runs/NAME]
  [--config.KEY=VALUE ...]

Every key of configs/default.py can be set, for example --config.optim.lr=1e-3. A job on many machines is
the same command on each; docs/pods.md.
"""

import errno
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence

from absl import flags, logging
from etils.epath import Path
from ml_collections import ConfigDict, config_flags

from mf_jax.errors import BadInput, nearest

MODES = {
    "train": "mf_jax.train",
    "eval": "mf_jax.evaluate",
    "sample": "mf_jax.sampling",
    "bench": "mf_jax.bench",
    "weights": "mf_jax.published.fetch",
    "prepare": "mf_jax.prepare",
}
_OK, _FAILED, _BAD_INPUT = 0, 1, 2
_NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What errors say, whatever their type: checkpoints are written by a library in another language."""
_OF_BUCKETS = "gcsfs"
"""The package that a path in a bucket of Google needs."""
_FIX_OF_BUCKETS = 'pip install "etils[epath-gcs]"'
_OF_ONE_PROCESS = ("prepare.process_index",)
"""Settings in which the processes of a job may differ."""


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, Path]:
    """Return the config, the mode and the workdir that a command line asks for.

    Args:
      argv: of this process (overrides of config keys are read from `sys.argv` itself).

    Raises:
      BadInput: for an unknown file, flag, key or mode, or a value of the wrong type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/.", flag_values=values, lock_config=True
    )
    flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.", flag_values=values)
    flags.DEFINE_string(
        "workdir", "", "Folder of the run; runs/NAME by default.", flag_values=values
    )
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
    if values.mode not in MODES:
        raise BadInput(
            f"--mode={values.mode}: must be one of {', '.join(MODES)}{nearest(values.mode, MODES)}"
        )
    name = Path(values["config"].config_filename).stem
    return config, values.mode, Path(values.workdir or f"runs/{name}")


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """Return one line about an error of the flag parser."""
    text = str(error).replace("\\n", " ").replace("\n", " ").replace("\\", "")
    if isinstance(error, OSError):
        given = [
            path
            for path in re.findall(r"--config[= ](\S+)", " ".join(argv))
            if not Path(path).exists()
        ]
        path = Path(given[0] if given else "")
        return (
            f"--config={path}: no such file{nearest(str(path), map(str, path.parent.glob('*.py')))}"
        )
    if isinstance(error, KeyError | AttributeError):
        similar = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
        key = similar[2] if similar else text.strip("'\" ")
        return f"--config has no key {key!r}" + (
            f" (did you mean {similar[1]}?)" if similar else ""
        )
    if isinstance(error, flags.Error):
        return text
    return f"the config file raises {type(error).__name__}: {text}"


def _without_keyword(argument: str) -> str:
    """Return `--config.init.from` as `--config.init.path`: a word of Python cannot be parsed as a key."""
    return re.sub(r"^(--?config\.init)\.from\b", r"\1.path", argument)


def _last_of_each(arguments: Iterable[str]) -> list[str]:
    """Return arguments without settings of a key that is set again later: tuples would be joined otherwise."""
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
        sys.argv[:] = _last_of_each(map(_without_keyword, sys.argv))
        config, mode, workdir = parse(sys.argv)
    except BadInput as error:
        print(f"mf_jax: {error}", file=sys.stderr)
        return _BAD_INPUT
    return _mode(mode, config, workdir)


def _check_place(workdir: Path) -> None:
    """Raise BadInput for a bucket that cannot be reached."""
    try:
        "://" in str(workdir) and workdir.exists()
    except ImportError as error:
        raise BadInput(f"--workdir={workdir}: {error}; {_FIX_OF_BUCKETS}") from error


def _mode(mode: str, config: ConfigDict, workdir: Path) -> int:
    """Run a mode, alone or as one process of a job on many machines; return the exit code."""
    # these bring JAX, for which a typing error need not wait
    from mf_jax.runtime import processes
    from mf_jax.runtime.workdir import flat

    def failed(text: str, code: int = _FAILED) -> int:
        print(f"mf_jax: {processes.name()}{text}", file=sys.stderr, flush=True)
        return code

    try:
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
        return processes.leave(code)
    except BadInput as error:
        return processes.leave(failed(str(error), _BAD_INPUT))
    except FloatingPointError as error:
        return processes.leave(failed(str(error)))
    except Exception as error:
        if isinstance(error, ImportError) and _OF_BUCKETS in str(error):
            return processes.leave(failed(f"{error}; {_FIX_OF_BUCKETS}", _BAD_INPUT))
        if reason := next((reason for reason in _NO_ROOM if reason in str(error)), ""):
            text = f"--workdir={workdir}: {reason}; make room, and the same command continues"
            return processes.leave(failed(text))
        if not processes.are_several():
            raise
        print(f"mf_jax: {processes.told_of(error)}", file=sys.stderr, flush=True)
        return processes.leave(_FAILED)


if __name__ == "__main__":
    sys.exit(main())

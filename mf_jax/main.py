"""The command line; `--help` prints the page below. See docs/pods.md for jobs on many machines."""

import codecs
import contextlib
import errno
import gc
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax.arguments import MODES, flat_items, last_of_each, parse, reachable
from mf_jax.flow.errors import BadInput, Failure
from mf_jax.runtime.configs import configs, defaults
from mf_jax.runtime.files import STORES, in_bucket

_HELP = """python -m mf_jax.main --config=NAME[:ROW] [--mode=MODE] [--workdir=runs/NAME]
  [--config.KEY=VALUE ...]

NAME is one of the configs below, or a FILE.py of your own.

A workdir that holds a run needs no --config: --mode=sample --workdir=runs/digits

modes:
  train     train, or continue the run of the workdir (the default)
  eval      score samples, into eval.json
  sample    write samples.npz and pictures
  export    write the generator as a program, and as a page that draws in a browser
  config    print every key and its value, * where it is not the default
  prepare   encode pictures to latents, and make reference statistics
  weights   fetch the published weights that a config names
  bench     time a step, sampling, the input; or tell whether a config fits a machine

examples:
  python -m mf_jax.main --config=digits:shortcut --config.train.num_steps=500
  python -m mf_jax.main --config=pictures --config.data.path=FOLDER --mode=train
  python -m mf_jax.main --mode=sample --workdir=runs/pictures --config.sample.num=64
  python -m mf_jax.main --mode=eval --workdir=runs/pictures --config.eval.steps=1,2

configs/default.py has every key, its default and its unit. docs/pods.md is about many machines."""
_OK, _FAILED, _BAD_INPUT = 0, 1, 2
_NO_ROOM = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What errors say, whatever their type: a library in another language writes checkpoints."""
_PLAIN = str.maketrans({"\u2014": "-", "\u2013": "-", "\u00b7": "-", "\u2026": "..."})
"""For terminals that know few letters."""


def main() -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 bad input."""
    logging.set_verbosity(logging.WARNING)
    gc.set_threshold(10_000)  # to look through all that is imported takes a second of a short run
    _say_anything(sys.stdout)
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        print("\n".join([_HELP, "", *_tables()]))
        return _OK
    try:
        sys.argv[:] = last_of_each(sys.argv)
        config, mode, workdir = parse(sys.argv)
    except BadInput as error:
        print(f"mf_jax: {error}", file=sys.stderr)
        return _BAD_INPUT
    if mode == "config":
        print("\n".join(_differences(config)))
        return _OK
    return _run(mode, config, workdir)


def _say_anything(stream: Any) -> None:
    """Let a stream take every letter, and outlive the reader of its pipe, as `| head` asks."""
    if stream is not sys.__stdout__ or not hasattr(stream, "reconfigure"):
        return

    def plain(error: UnicodeEncodeError) -> tuple[str, int]:
        text = error.object[error.start : error.end].translate(_PLAIN)
        return text.encode("ascii", "backslashreplace").decode(), error.end

    codecs.register_error("plain", plain)
    stream.reconfigure(errors="plain")

    def lasting(act: Any) -> Any:
        def call(*arguments: Any) -> Any:
            try:
                return act(*arguments)
            except BrokenPipeError:  # a run goes on though nobody reads
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                return None

        return call

    stream.write, stream.flush = lasting(stream.write), lasting(stream.flush)


def _tables() -> Iterator[str]:
    """Yield the lines of `--help` about configs."""
    yield "configs, and their rows:"
    for path in sorted(configs().glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if path.stem != "default" and hasattr(module, "get_config"):
            rows = ", ".join(filter(None, getattr(module, "ROWS", {})))
            yield f"  {path.stem}  {module.__doc__.splitlines()[0]}" + f"\n    {rows}" * bool(rows)


def _differences(config: ConfigDict) -> Iterator[str]:
    """Yield a line for each key, marked where its value is not the default."""
    usual = dict(flat_items(defaults()))
    for key, value in flat_items(config):
        default = usual.get(key, value)  # an own or an old key has none
        mark, more = (" ", "") if value == default else ("*", f"  (default {default!r})")
        yield f"{mark} {key} = {value!r}{more}"


def _run(mode: str, config: ConfigDict, workdir: Path) -> int:
    """Run a mode, alone or as one process of a job on many machines; return the exit code."""
    # brings JAX, for which a typing error need not wait
    from mf_jax.runtime import processes

    try:
        return processes.leave(_one_process(mode, config, workdir))
    except BadInput as error:
        text, code = str(error), _BAD_INPUT
    except (FloatingPointError, Failure) as error:
        text, code = str(error), _FAILED
    except Exception as error:
        reason = next((reason for reason in _NO_ROOM if reason in str(error)), "")
        if isinstance(error, ImportError) and re.search("gcsfs|s3fs", str(error)):  # of buckets
            fix = " or ".join(f'pip install "{package}"' for package in STORES.values())
            text, code = f"{error}; {fix}", _BAD_INPUT
        elif reason:
            fix = "make room, and the same command continues"
            text, code = f"--workdir={workdir}: {reason}; {fix}", _FAILED
        elif processes.are_several():
            text, code = processes.explain(error), _FAILED
        else:
            raise
    with contextlib.suppress(OSError):  # standard error may lie on the disk that is full
        print(f"mf_jax: {processes.name()}{text}", file=sys.stderr, flush=True)
    return processes.leave(code)


def _one_process(mode: str, config: ConfigDict, workdir: Path) -> int:
    from mf_jax.runtime import processes
    from mf_jax.runtime.compile_cache import keep_programs
    from mf_jax.runtime.workdir import flat, keep_habits
    from mf_jax.validation.ranges import check_sizes

    if mode != "bench":  # which times compiling
        keep_programs()
    processes.start(
        start_timeout=config.job.start_timeout_seconds,
        heartbeat_timeout=config.job.heartbeat_timeout_seconds,
        stops_together=mode == "train",
    )
    settings = {"--mode": mode, "--workdir": str(workdir), **flat(config)}
    del settings["prepare.process_index"]  # in which the processes of a job may differ
    processes.check_alike(settings)
    with processes.together(), reachable(workdir):
        check_sizes(config, mode)
        if in_bucket(workdir):
            workdir.exists()
        if mode in ("train", "sample", "eval", "export"):
            keep_habits(workdir, config)
    is_quiet = not processes.is_first()  # errors are told by all
    with contextlib.redirect_stdout(io.StringIO()) if is_quiet else contextlib.nullcontext():
        code = importlib.import_module(MODES[mode]).run(config, workdir) or _OK
    # those that wait have not left before the first has written its last file
    processes.from_all(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

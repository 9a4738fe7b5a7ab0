"""The command line; `--help` prints the page below. See docs/pods.md for jobs on many machines."""

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

from mf_jax.arguments import MODES, flat_items, parse
from mf_jax.flow.errors import BadInput, Failure
from mf_jax.runtime.configs import configs, defaults
from mf_jax.runtime.files import STORES

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


def main() -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 bad input."""
    logging.set_verbosity(logging.WARNING)
    gc.set_threshold(10_000)  # to look through all that is imported takes a second of a short run
    _say_anything(sys.stdout)
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        print("\n".join([_HELP, "", *_tables()]))
        return _OK
    processes = workdir = None
    try:
        config, mode, workdir = parse(sys.argv)
        if mode == "config":
            print("\n".join(_differences(config)))
            return _OK
        from mf_jax.runtime import processes  # brings JAX, for which a typing error need not wait

        return processes.leave(_one_process(mode, config, workdir))
    except Exception as error:
        text, code = _told(error, workdir)
        who = processes.name() if processes else ""
        if not text and not who:
            raise
        with contextlib.suppress(OSError):  # standard error may lie on the disk that is full
            text = text or processes.explain(error)
            print(f"mf_jax: {who}{text}", file=sys.stderr, flush=True)
        return processes.leave(code) if processes else code


def _say_anything(stream: Any) -> None:
    """Let a stream take every letter, and outlive the reader of its pipe, as `| head` asks."""
    if not hasattr(stream, "reconfigure"):
        return
    stream.reconfigure(errors="backslashreplace")

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


def _told(error: Exception, workdir: Path | None) -> tuple[str, int]:
    """Return one line about an error, "" where its traceback says more, and the exit code."""
    text = str(error)
    if isinstance(error, BadInput):
        return text, _BAD_INPUT
    if isinstance(error, ImportError) and re.search("gcsfs|s3fs", text):  # of buckets
        fix = " or ".join(f'pip install "{package}"' for package in STORES.values())
        return f"{text}; {fix}", _BAD_INPUT
    if reason := next((reason for reason in _NO_ROOM if reason in text), ""):
        return f"--workdir={workdir}: {reason}; make room, and the same command continues", _FAILED
    return text * isinstance(error, FloatingPointError | Failure), _FAILED


def _one_process(mode: str, config: ConfigDict, workdir: Path) -> int:
    from mf_jax.runtime import processes
    from mf_jax.runtime.compile_cache import keep_programs
    from mf_jax.runtime.workdir import flat, keep_habits
    from mf_jax.validation.ranges import check_sizes

    keep_programs()
    processes.start(
        start_timeout=config.job.start_timeout_seconds,
        heartbeat_timeout=config.job.heartbeat_timeout_seconds,
        stops_together=mode == "train",
    )
    settings = {"--mode": mode, "--workdir": str(workdir), **flat(config)}
    del settings["prepare.process_index"]  # in which the processes of a job may differ
    processes.check_alike(settings)
    with processes.together():
        check_sizes(config, mode)
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

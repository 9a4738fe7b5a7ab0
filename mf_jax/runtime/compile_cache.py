"""Programs that XLA has compiled are kept in a folder, so that the next start need not wait."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import jax

ENVIRONMENT_VARIABLE, _USUAL = "MF_CACHE", "~/.cache/mf_jax"
_MOST_BYTES = 2 * 2**30


def cache_folder() -> Path | None:
    """Return the folder for what can be made again, `$MF_CACHE`; None where none is wanted.

    RuntimeError where the user has no home folder.
    """
    given = os.environ.get(ENVIRONMENT_VARIABLE, _USUAL)
    return None if given in ("", "off") else Path(given).expanduser()


def keep_programs() -> None:
    """Let this process use the folder `$MF_CACHE`, unless JAX is told of one of its own.

    Of its files the first written go where they are too many. A folder that cannot be written costs
    a line on standard error, and time.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        if not (folder := cache_folder()):
            return
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # the second: there is no home folder
        given = os.environ.get(ENVIRONMENT_VARIABLE, _USUAL)
        fix = f"{ENVIRONMENT_VARIABLE}=off says that none is wanted"
        return print(f"programs are not kept in {given} ({error}); {fix}", file=sys.stderr)
    room = _MOST_BYTES
    with contextlib.suppress(OSError):  # another process may have deleted one
        files = [(path.stat(), path) for path in folder.iterdir() if path.is_file()]
        for stat, path in sorted(files, key=lambda pair: -pair[0].st_mtime_ns):
            room -= stat.st_size
            if room < 0:
                path.unlink()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # even small programs take longer to compile than to read
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

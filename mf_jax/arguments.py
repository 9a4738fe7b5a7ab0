"""What a command line asks for: a config, from a file or from the run of a workdir, and a mode."""

import contextlib
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from etils.epath import Path
from ml_collections import ConfigDict, config_flags

from mf_jax.flow.errors import BadInput, check_known, listed, nearest
from mf_jax.runtime.configs import configs, defaults
from mf_jax.runtime.files import STORES, change_paths, place

MODES = {
    "train": "mf_jax.train",
    "eval": "mf_jax.evaluate",
    "sample": "mf_jax.sampling",
    "export": "mf_jax.sampling.export",
    "bench": "mf_jax.bench",
    "weights": "mf_jax.published.fetch",
    "prepare": "mf_jax.prepare",
    "config": "",
}


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, Path]:
    """Return the config, the mode and the workdir that a command line asks for.

    Args:
      argv: of this process (overrides of config keys are read from `sys.argv` itself).
    """
    configs()
    values = flags.FlagValues()
    flags.DEFINE_string("mode", "train", "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    run = _run_without_config(argv)
    try:
        if run:
            config_flags.DEFINE_config_dict("config", _of_run(run), flag_values=values)
        else:
            config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        rest = values(list(argv))
        config = values.config
        if not isinstance(config, dict | None):
            config.lock()  # a file that could not be loaded says so at the first use
    except (Exception, SystemExit) as error:  # a config file is a program: it may raise anything
        raise BadInput(_explain(error, argv)) from error
    if len(rest) > 1:
        raise BadInput(
            f"{rest[1]!r}: not an option; options look like --mode=train or --config.seed=1"
        )
    check_known("--mode", values.mode, MODES)
    if run:
        return _checked(config, f"--workdir={run}"), values.mode, run
    file, _, row = values["config"].config_filename.partition(":")
    _checked(config, f"--config={file}")
    name = "_".join([Path(file).stem, row] if row else [Path(file).stem])
    return config, values.mode, place(values.workdir or f"runs/{name}", "--workdir")


def _with_file(argument: str) -> str:
    """Return an argument with the file of a config that it gives by name, as --config=digits."""
    flag, _, value = argument.partition("=")
    name, colon, row = value.partition(":")
    if flag.lstrip("-") != "config" or not re.fullmatch(r"\w+", name) or Path(name).is_file():
        return argument
    if not (file := configs() / f"{name}.py").exists():
        names = [path.stem for path in configs().glob("*.py")]
        fix = nearest(name, names) or f"; there are {listed(names, 12)}, or name a FILE.py"
        raise BadInput(f"--config={name}: no such config{fix}")
    return f"{flag}={file}{colon}{row}"


def _run_without_config(argv: Sequence[str]) -> Path | None:
    """Return the workdir that a command line names if it names no config, and a run is there."""
    given = dict(each.lstrip("-").split("=", 1) for each in argv if "=" in each)
    if given.get("config"):
        return None
    if not given.get("workdir"):
        fix = "for example --config=digits, or --workdir=RUN of a run"
        raise BadInput(f"--config is missing; {fix}")
    workdir = place(given["workdir"], "--workdir")
    with reachable(workdir):
        if (workdir / "config.json").exists():
            return workdir
    raise BadInput(f"--workdir={workdir}: holds no run; train first, and name a --config")


def _of_run(workdir: Path) -> ConfigDict:
    """Return the config that a run has stored, over the defaults of keys that are younger."""
    from mf_jax.runtime.workdir import stored_config  # brings JAX

    config, stored = defaults(), stored_config(workdir)
    with config.unlocked():
        config.update(stored)
    config.data.copy_to = ""  # a run, which another may have made, does not say where to write
    return config


def flat_items(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) of a config."""
    for key, value in config.items():
        is_section = isinstance(value, ConfigDict)
        yield from flat_items(value, f"{prefix}{key}.") if is_section else [(prefix + key, value)]


def _checked(config: Any, source: str) -> ConfigDict:
    """Return a config that has every key, with the paths that it holds expanded."""
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise BadInput(f"{source}: get_config returns a {kind}; end it with: return config")
    there = dict(flat_items(config))
    if missing := [key for key, _ in flat_items(defaults()) if key not in there]:
        fix = "start from configs.default.get_config(), and set single keys"
        raise BadInput(f"{source}: lacks {listed(missing, 4)}; {fix}")
    change_paths(config, lambda path, key: str(place(path, key)))
    return config


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    """Return one line about an error of the flag parser."""
    chain = [error]
    while chain[-1].__context__:
        chain.append(chain[-1].__context__)
    if problem := next((each for each in chain[::-1] if isinstance(each, BadInput)), None):
        return str(problem)
    text, where = " ".join(f"{error}".replace("\\n", " ").split()), _line_of_file(chain)
    everything = " ".join(map(str, chain)).replace("\\", "")
    if wrong := re.search(
        r"field '(\w+)'.*?\)\. (.*?) is of .*type <class '([\w.]+)'>", everything
    ):
        kinds = {"int": "a whole number", "float": "a number", "tuple": "a tuple", "str": "a text"}
        key, value, kind = wrong.groups()
        return f"{where}{key} = {value}: must be {kinds.get(kind, f'a {kind}')}"
    if unknown := re.search(r'Key "(\w+)" does not exist.*?present: "(.*)"', everything, re.DOTALL):
        known = list(dict.fromkeys(re.findall(r"'(\w+)':", unknown[2])))
        fix = nearest(unknown[1], known) or f"; there are {listed(known, 16)}"
        return f"{where}--config has no key {unknown[1]!r}{fix}"
    if number := re.search(r"flag (--[\w.]+=.*): invalid literal for int\(\)", text):
        return f"{number[1]}: must be a whole number, in digits alone"
    if isinstance(error, OSError):
        paths = (Path(path) for path in re.findall(r"--config[= ]([^:\s]+)", " ".join(argv)))
        for path in (path for path in paths if not path.exists()):
            similar = nearest(str(path), map(str, path.parent.glob("*.py")))
            return f"--config={path}: no such file{similar}"
    if isinstance(error, KeyError | AttributeError):
        similar = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
        key = similar[2] if similar else text.strip("'\" ")
        fix = f" (did you mean {similar[1]}?)" if similar else ""
        return f"{where}--config has no key {key!r}{fix}"
    if isinstance(error, flags.Error) and "parsing config file" not in text:
        return text
    return f"{where}the config file raises {type(chain[-1]).__name__}: {chain[-1]}"


def _line_of_file(chain: Sequence[BaseException]) -> str:
    """Return the line of a config file that raises one of some errors, or nothing."""
    frames = [frame for each in chain for frame in traceback.extract_tb(each.__traceback__)]
    own = [frame for frame in frames if frame.name == "get_config" and frame.line]
    return f"{own[-1].filename}, line {own[-1].lineno}, {own[-1].line!r}: " if own else ""


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """Return arguments, values joined to their flags, without flags that are set again later.

    A config that is given by its name becomes its file.
    """
    kept: dict[str, str] = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        flag = re.match(r"--?(no(?=config\.))?([A-Za-z][\w.]*)(=?)", argument)
        name = flag[2] if flag else str(len(left))
        if flag and not flag[1] and not flag[3] and left and not re.match("--?[A-Za-z]", left[0]):
            argument = f"--{name}={left.pop(0)}"
        kept.pop(name, None)
        kept[name] = argument
    return [_with_file(argument) for argument in kept.values()]


@contextlib.contextmanager
def reachable(workdir: Path) -> Iterator[None]:
    """Raise BadInput where the package that reaches a bucket is missing."""
    try:
        yield
    except ImportError as error:
        fix = f'pip install "{STORES[str(workdir).partition(":")[0]]}"'
        raise BadInput(f"--workdir={workdir}: {error}; {fix}") from error

"""What a command line asks for: a config, from a file or from the run of a workdir, and a mode."""

import ast
import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput, check_known, listed, nearest
from mf_jax.runtime.configs import configs, defaults
from mf_jax.runtime.files import change_paths, place

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
_SWITCHES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_KINDS = {"int": "a whole number", "float": "a number", "tuple": "a tuple", "str": "a text"}
_KINDS["bool"] = "True or False"


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, Path]:
    """Return the config, the mode and the workdir that the arguments of a process ask for."""
    given = _given(argv[1:])
    name, folder = given.pop("config", ""), given.pop("workdir", "")
    mode = given.pop("mode", "train")
    check_known("--mode", mode, MODES)
    if name:
        file, row = _file_of(name)
        config, source = _of_file(file, row), f"--config={file}"
        workdir = place(folder or "_".join(filter(None, (f"runs/{file.stem}", row))), "--workdir")
    elif folder:
        workdir, source = place(folder, "--workdir"), f"--workdir={folder}"
        config = _of_run(workdir)
    else:
        raise BadInput("--config is missing; use --config=digits, or --workdir=RUN of a run")
    known = dict(flat_items(config))
    if missing := [key for key, _ in flat_items(defaults()) if key not in known]:
        raise BadInput(f"{source}: lacks {listed(missing, 4)}; start from configs/default.py")
    for flag, text in given.items():
        key = flag.removeprefix("config.")
        if key == flag:
            fix = nearest(flag, ("config", "workdir", "mode")) or "; see --help"
            raise BadInput(f"--{flag}: no such option{fix}")
        if key not in known:
            raise BadInput(f"--config has no key {key!r}{nearest(key, known)}; see --mode=config")
        config.update_from_flattened_dict({key: _value(key, text, known[key])})
    change_paths(config, lambda path, key: str(place(path, key)))
    return config, mode, workdir


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the text of each flag, where it is set last, or whether it stands alone or negated."""
    given, left = {}, list(arguments)
    while left:
        argument = left.pop(0)
        flag = re.fullmatch(r"--?(no(?=config\.))?([A-Za-z][\w.]*)(?:=(.*))?", argument, re.DOTALL)
        if not flag:
            raise BadInput(f"{argument!r}: no option; they look like --mode=train, --config.seed=1")
        negated, name, text = flag.groups()
        if negated or text is None:
            has_value = left and not negated and not re.match("--?[A-Za-z]", left[0])
            text = left.pop(0) if has_value else not negated
            if text is True and not name.startswith("config."):
                raise BadInput(f"--{name}: needs a value")
        given[name] = text
    return given


def _value(key: str, text: str | bool, default: Any) -> Any:
    """Return what a text says, a value of a default's type."""
    kind = type(default).__name__
    try:
        if kind == "bool":
            return _SWITCHES[str(text).lower()]
        if isinstance(text, bool):
            raise ValueError("no value follows")
        if kind in ("int", "float", "str"):
            return type(default)(text)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if re.search("[, ]", text):
                raise
            value = text  # a single word
        if kind != "tuple" or isinstance(value, tuple):
            return value
        return tuple(value) if isinstance(value, list | set) else (value,)
    except (KeyError, ValueError, SyntaxError) as error:
        raise BadInput(f"{key}={text}: must be {_KINDS.get(kind, f'a {kind}')}") from error


def _file_of(name: str) -> tuple[Path, str]:
    """Return the file and the row that --config names, one of the package's by its bare name."""
    name, _, row = name.partition(":")
    file = Path(name)
    if re.fullmatch(r"\w+", name) and not file.is_file():
        file = configs() / f"{name}.py"
    if not file.is_file():
        known = [path.stem for path in configs().glob("*.py")]
        similar = nearest(name, [*known, *map(str, file.parent.glob("*.py"))])
        raise BadInput(f"--config={name}: no such config{similar}; use {listed(known, 12)}")
    return file, row


def _of_file(file: Path, row: str) -> ConfigDict:
    """Return what a config file makes of a row."""
    configs()  # which it may import
    loader = importlib.machinery.SourceFileLoader("mf_jax_config_file", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # which its classes ask for their file
    try:
        loader.exec_module(module)
        config = module.get_config(*filter(None, [row]))
    except BadInput:
        raise
    except (Exception, SystemExit) as error:  # it is a program: it may raise anything
        raise BadInput(_explain(error)) from error
    if not isinstance(config, ConfigDict):
        raise BadInput(f"--config={file}: gives {type(config).__name__}; end it by: return config")
    return config.lock()


def _explain(error: BaseException) -> str:
    """Return one line about an error of a config file."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.line]
    own = [each for each in frames if each.name == "get_config"]
    where = f"{own[-1].filename}, line {own[-1].lineno}, {own[-1].line!r}: " if own else ""
    text = " ".join(str(error).replace(r"\n", " ").replace("\\", "").split())
    wrong = r"Could not override field '(\w+)' .*?\. (.*) is of .* type <class '([\w.]+)'>"
    if found := re.match(wrong, text):
        key, value, kind = found.groups()
        return f"{where}{key} = {value}: must be {_KINDS.get(kind, f'a {kind}')}"
    if found := re.match(r"'(?:'|Key \")([\w.]+)", text):  # as ml_collections says it
        hint, known = re.search(r'Did you mean "(\w+)"', text), re.findall(r"'(\w+)':", text)
        fix = f" (did you mean {hint[1]}?)" if hint else f"; there are {listed(known, 16)}"
        return f"{where}--config has no key {found[1]!r}{fix}"
    return f"{where}the config file raises {type(error).__name__}: {error}"


def _of_run(workdir: Path) -> ConfigDict:
    """Return the config that a run has stored, over the defaults of keys that are younger."""
    if not (workdir / "config.json").exists():
        raise BadInput(f"--workdir={workdir}: holds no run; train first, and name a --config")
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

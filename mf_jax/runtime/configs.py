"""Where the configs lie that come with the package."""

import importlib.util
import sys
import types

from etils.epath import Path
from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Return the config of configs/default.py: every key, and its default."""
    configs()
    return importlib.import_module("configs.default").get_config()


def configs() -> Path:
    """Return the folder of the configs, in the package or beside it, and let `configs` be imported.

    A folder of that name in the caller's own project stays importable beside it.
    """
    home = Path(__file__).parents[1]
    folder = next(path for path in (home / "configs", home.parent / "configs") if path.exists())
    if "configs" not in sys.modules:
        spec, module = importlib.util.find_spec("configs"), types.ModuleType("configs")
        module.__path__ = [str(folder), *((spec and spec.submodule_search_locations) or ())]
        sys.modules["configs"] = module
    return folder

"""A folder that several processes fill side by side, with files of the same settings."""

import json
from typing import Any

from etils import epath

from mf_jax.data.latent_records import SETTINGS, read_json
from mf_jax.errors import BadInput
from mf_jax.runtime.files import replace_file


def claim(folder: epath.Path, settings: dict[str, Any], *, key: str) -> None:
    """Make a folder the place of files with these settings; the first process to come stores them.

    Args:
      folder: made if missing.
      settings: what decides the content of the files, as JSON keeps it.
      key: the config key that names the folder, for the error.

    Raises:
      BadInput: if the folder cannot be written, or holds files of other settings; names those.
    """
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if SETTINGS not in present:
            if present:
                raise BadInput(
                    f"{key}={str(folder)!r} holds other files; must be new or empty: choose another folder"
                )
            replace_file(path, json.dumps(settings, indent=1).encode())
    except OSError as error:
        raise BadInput(
            f"{key}={str(folder)!r} cannot be written ({error.strerror}): choose another folder"
        ) from error
    _check_same(folder, read_json(path, "settings file"), settings, key)


def _check_same(
    folder: epath.Path, stored: dict[str, Any], settings: dict[str, Any], key: str
) -> None:
    differing = sorted(name for name in stored | settings if stored.get(name) != settings.get(name))
    if differing:
        told = ", ".join(
            f"{name} {stored.get(name)!r} -> {settings.get(name)!r}" for name in differing
        )
        raise BadInput(
            f"{key}={str(folder)!r} holds files of other settings ({told}): choose another folder, or set these back"
        )

"""Data: a table of sources, and the pipeline that turns a source into batches."""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mf_jax.data.digits import Digits
from mf_jax.data.image_folder import ImageFolder
from mf_jax.data.latents import Latents
from mf_jax.data.pipeline import SPLITS, Batch, Source, Stored, make_batches, read, spec_of
from mf_jax.data.tfds_source import Tfds
from mf_jax.data.toy2d import Toy2D
from mf_jax.errors import BadInput, check_known

__all__ = [
    "SOURCES",
    "SPLITS",
    "Batch",
    "Source",
    "Stored",
    "make_batches",
    "make_source",
    "read",
    "spec_of",
]

SOURCES = {
    "digits": Digits,
    "toy2d": Toy2D,
    "image_folder": ImageFolder,
    "tfds": Tfds,
    "latents": Latents,
}


def make_source(section: Mapping[str, Any] | ConfigDict, *, split: str) -> Source:
    """Open one split of the source that a config section describes.

    Args:
      section: `name`, a key of `SOURCES`, and the arguments of that source's constructor under exactly their names;
        other keys are ignored.
      split: `train` or `held_out`.

    Returns:
      The source.

    Raises:
      BadInput: if the name or the split is unknown, a key is missing, or the source refuses its arguments.
    """
    check_known("split", split, SPLITS)
    check_known("name", section.get("name", ""), SOURCES)
    constructor = SOURCES[section["name"]]
    wanted = [key for key in inspect.signature(constructor).parameters if key != "split"]
    missing = [key for key in wanted if key not in section]
    if missing:
        raise BadInput(
            f"name={section['name']!r} also needs {', '.join(missing)}: set them beside name"
        )
    return constructor(**{key: section[key] for key in wanted}, split=split)

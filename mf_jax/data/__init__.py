"""Data: a table of sources, and the pipeline that turns a source into batches."""

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mf_jax.data.pipeline import SPLITS, Batch, Source, Stored, in_turn, make_batches, read
from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.records import DataSpec

__all__ = ["SOURCES", "SPLITS", "Batch", "Source", "Stored"]
__all__ += ["in_turn", "make_batches", "make_source", "read"]

SOURCES = {
    "digits": "mf_jax.data.digits:of_digits",
    "toy2d": "mf_jax.data.toy2d:of_toy2d",
    "image_folder": "mf_jax.data.pictures:of_folder",
    "tfds": "mf_jax.data.pictures:of_tfds",
    "latents": "mf_jax.data.latents:Latents",
    "arrays": "mf_jax.data.arrays:of_file",
    "openml": "mf_jax.data.digits:of_openml",
}
"""Where each source is defined; its module is imported when a config names it."""


def make_source(section: Mapping[str, Any] | ConfigDict, *, split: str) -> Source:
    """Open one of `SPLITS` of the source `name` of `SOURCES`, by the keys of a config section."""
    check_known("split", split, SPLITS)
    check_known("name", section.get("name", ""), SOURCES)
    constructor = SOURCES[section["name"]]  # of your own: a class
    if isinstance(constructor, str):
        constructor = pkgutil.resolve_name(constructor)
    parameters = inspect.signature(constructor).parameters
    given = {key: section[key] for key in parameters if key in section} | {"split": split}
    needed = (key for key, parameter in parameters.items() if parameter.default is parameter.empty)
    if missing := [key for key in needed if key not in given]:
        raise BadInput(f"name={section['name']!r} also needs {', '.join(missing)}: set these too")
    source = constructor(**given)
    if not hasattr(source, "spec"):  # of your own: plain attributes
        source.spec = DataSpec(source.shape, source.num_classes, source.class_names)
    return source

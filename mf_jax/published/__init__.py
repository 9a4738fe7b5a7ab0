"""Published weights: fetched, and read into the parameters of our networks."""

import contextlib
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Shaped

from mf_jax.flow.errors import BadInput, in_section, refused
from mf_jax.runtime.files import absolute

Arrays = dict[str, Shaped[np.ndarray, "..."]]


@contextlib.contextmanager
def reading(path: epath.PathLike, what: str) -> Iterator[None]:
    """Turn all that the body raises into a BadInput: the file is none of what it should be."""
    # the type of an error depends on where a reader stumbles over the damage
    damaged = refused(Exception, f"cannot be read as {what}", "fetch it again")
    with in_section(path, ": "), damaged:
        if not absolute(path).exists():
            raise BadInput(f"no such file or folder; must be {what}")
        yield

"""Published weights: fetched, and read into the parameters of our networks."""

import contextlib
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Shaped

from mf_jax.flow.errors import BadInput, reason_of

Arrays = dict[str, Shaped[np.ndarray, "..."]]


@contextlib.contextmanager
def reading(path: epath.PathLike, what: str) -> Iterator[None]:
    """Turn all that the body raises into a BadInput: the file is none of what it should be."""
    try:
        yield
    except BadInput as problem:
        raise BadInput(f"{path}: {problem}") from problem
    except Exception as error:  # its type depends on where a reader stumbles over the damage
        if not epath.Path(path).exists():
            raise BadInput(f"{path}: no such file or folder; must be {what}") from error
        reason = f"{type(error).__name__}: {reason_of(error)}"
        fix = "check the file, or fetch it again"
        raise BadInput(f"{path}: cannot be read as {what} ({reason}); {fix}") from error

"""Feature rows too many for memory: kept in a file that vanishes with the process, and read in blocks."""

import os
import tempfile
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float32, Int, Shaped

from mf_jax.errors import BadInput


@runtime_checkable
class RowSource(Protocol):
    """Feature rows that are read in blocks."""

    width: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Float32[np.ndarray, "n d"]:
        """Return rows start to stop, of which those beyond the end are missing."""
        ...


class RowArray:
    """Feature rows in memory, as a `RowSource`."""

    def __init__(self, rows: Shaped[np.ndarray, "n d"]):
        self._rows = rows
        self.width = rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Float32[np.ndarray, "n d"]:
        """Return rows start to stop, of which those beyond the end are missing."""
        return np.asarray(self._rows[start:stop], np.float32)


class RowFile:
    """Feature rows in a file, as a `RowSource`.

    Args:
      path: of the file, on a file system or in a bucket.
      offset: bytes before the first row.
      num_rows: how many there are.
      width: numbers of a row, float32, little-endian.
    """

    def __init__(self, path: epath.Path, offset: int, num_rows: int, width: int):
        self._path, self._offset, self._num_rows, self.width = path, offset, num_rows, width

    def __len__(self) -> int:
        return self._num_rows

    def read(self, start: int, stop: int) -> Float32[np.ndarray, "n d"]:
        """Return rows start to stop, of which those beyond the end are missing."""
        count = max(0, min(stop, self._num_rows) - start)
        with self._path.open("rb") as file:
            file.seek(self._offset + 4 * self.width * start)
            content = file.read(4 * self.width * count)
        return np.frombuffer(content, "<f4").reshape(count, self.width)


class RowStore:
    """A file of rows in float32, a `RowSource` once all are written.

    The file has no name and is gone when the store is closed or the process ends, however it ends.

    Args:
      num_rows: how many there will be.
      width: numbers of a row.
      folder: on a local disk, created if missing.

    Raises:
      BadInput: the folder cannot be written to, or its disk is too full.
    """

    def __init__(self, num_rows: int, width: int, folder: epath.PathLike):
        self._num_rows, self.width = num_rows, width
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the store
            os.posix_fallocate(self._file.fileno(), 0, 4 * num_rows * width)
        except OSError as error:
            raise BadInput(
                f"{folder}: cannot hold {4e-6 * num_rows * width:.0f} MB of feature rows ({error.strerror}); must be a "
                "folder on a local disk with that much space: choose another"
            ) from error

    def __len__(self) -> int:
        return self._num_rows

    def write(self, index: Int[np.ndarray, "b"], rows: Shaped[np.ndarray, "b d"]) -> None:
        """Write rows to their places.

        Args:
          index: `[B]`, the place of each in [0, num_rows).
          rows: `[B, d]`.
        """
        order = np.argsort(index)
        places, rows = index[order], np.asarray(rows, "<f4")[order]
        for run in np.split(np.arange(len(places)), 1 + np.flatnonzero(np.diff(places) != 1)):
            if len(run):
                self._file.seek(4 * self.width * int(places[run[0]]))
                self._file.write(rows[run[0] : run[-1] + 1].data)

    def read(self, start: int, stop: int) -> Float32[np.ndarray, "n d"]:
        """Return rows start to stop, of which those beyond the end are missing."""
        block = np.empty((max(0, min(stop, self._num_rows) - start), self.width), "<f4")
        self._file.seek(4 * self.width * start)
        self._file.readinto(block)
        return block

    def close(self) -> None:
        """Delete the rows."""
        self._file.close()

"""Published weight files: where they lie, that they are the right ones, and --mode=weights, which fetches them.

Networks that a config names by a published name ("sd-vae-ft-mse") are files under one folder, `weights_dir` or the
environment variable MF_WEIGHTS. Nothing but --mode=weights ever opens a connection.
"""

import contextlib
import hashlib
import http.client
import os
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mf_jax.errors import BadInput, nearest

ENVIRONMENT_VARIABLE = "MF_WEIGHTS"
_NAME_A_FOLDER = f"set --config.weights_dir=DIR or the environment variable {ENVIRONMENT_VARIABLE}"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_HUGGING_FACE = "https://huggingface.co/stabilityai"
_KL_CONFIG = "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"


class PublishedFile(NamedTuple):
    """A file as it was published.

    path: its place under the folder of weights. num_bytes: its size. sha256: of its bytes. address: where it is.
    """

    path: str
    num_bytes: int
    sha256: str
    address: str


def _autoencoder(name: str, revision: str, sha256: str) -> tuple[PublishedFile, ...]:
    """Return the two files of an autoencoder of Stable Diffusion; all of them have the same sizes and config."""
    files = (
        ("diffusion_pytorch_model.safetensors", 334_643_276, sha256),
        ("config.json", 547, _KL_CONFIG),
    )
    at = f"{_HUGGING_FACE}/{name}/resolve/{revision}"
    return tuple(PublishedFile(f"{name}/{file}", *about, f"{at}/{file}") for file, *about in files)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "inception-2015-12-05": (
        PublishedFile(
            "weights-inception-2015-12-05-6726825d.pth",
            95_628_359,
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        ),
    ),
    "sd-vae-ft-mse": _autoencoder(
        "sd-vae-ft-mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "sd-vae-ft-ema": _autoencoder(
        "sd-vae-ft-ema",
        "f04b2c4b98319346dad8c65879f680b1997b204a",
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
}
"""The files of each published name, that of the weights first."""


def find_weights(name_or_path: str, weights_dir: str, *, key: str = "weights") -> epath.Path:
    """Return where weights lie.

    Args:
      name_or_path: a path that exists, which is returned as it is, or a name of `PUBLISHED`.
      weights_dir: the folder of published files; "" for $MF_WEIGHTS.
      key: the config key that holds name_or_path, for the error.

    Returns:
      The path; for a published name of one file that file, for one of several files the folder that holds them.

    Raises:
      BadInput: if there is neither such a path nor such a name, or a published file is missing or of another size;
        says what to fetch, from where, and where to put it.
    """
    if name_or_path and (path := epath.Path(name_or_path).expanduser()).exists():
        return path
    files = PUBLISHED[_published(name_or_path, key)]
    folder = _named_folder(weights_dir)
    place = folder or epath.Path("DIR")
    problems = [] if folder else [f"no folder is named to hold {name_or_path}; {_NAME_A_FOLDER}"]
    problems += [
        f"{problem}; {_where_to_get(file, place)}"
        for file in files
        if (problem := _wrong_size(file, place))
    ]
    if problems:
        of_latents = " --config.data.name=latents" * (key == "data.autoencoder")
        command = f"python -m mf_jax.main --config=CONFIG --mode=weights --config.weights_dir={place}{of_latents}"
        raise BadInput(f"{key}={name_or_path!r}: {'; '.join(problems)}; or run {command}")
    return folder / files[0].path if len(files) == 1 else (folder / files[0].path).parent


def verify(name_or_path: str, sha256: str) -> None:
    """Check that what was read under a published name is what was published; a path may hold anything.

    Args:
      name_or_path: as given to `find_weights`.
      sha256: of the weight file that was read, in hex digits.

    Raises:
      BadInput: if the name's file has another checksum.
    """
    if name_or_path in PUBLISHED and sha256 != (file := PUBLISHED[name_or_path][0]).sha256:
        raise BadInput(
            f"weights {name_or_path!r}: the file has SHA-256 {sha256}; must be {file.sha256}: delete {file.path} in "
            "the folder of weights and fetch it again with --mode=weights, or name your own file by its path"
        )


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Fetch the published files that a config names into `config.weights_dir`.

    Args:
      config: of the command; eval.inception, and with data.name=latents or prepare.input also data.autoencoder.
      workdir: not used; the files belong to no run.

    Raises:
      BadInput: if a name is unknown or the folder cannot be written; else, after all files have been tried, with a
        line for each that could not be had or is wrong.
    """
    del workdir
    keys = {"eval.inception": config.eval.inception}
    if config.data.name == "latents" or config.prepare.input:
        keys["data.autoencoder"] = config.data.autoencoder
    named = {
        key: name
        for key, name in keys.items()
        if not (name and epath.Path(name).expanduser().exists())
    }
    files = [file for key, name in named.items() for file in PUBLISHED[_published(name, key)]]
    if not files:
        print("nothing to fetch: the config names paths that are there")
        return
    folder = _named_folder(config.weights_dir)
    if folder is None:
        raise BadInput(
            f"weights_dir='': no folder is named to hold {', '.join(named.values())}; {_NAME_A_FOLDER}"
        )
    problems = []
    with _progress(config.log.progress) as bar:
        for file in files:
            try:
                print(f"{folder / file.path}: {_obtain(file, folder, bar)}")
            except BadInput as problem:
                problems.append(str(problem))
    if problems:
        raise BadInput("\n".join(problems))


def _published(name: str, key: str) -> str:
    if name not in PUBLISHED:
        raise BadInput(
            f"{key}={name!r}: there is no such file, nor such a published name; must be a path, or one of "
            f"{', '.join(PUBLISHED)}{nearest(name, PUBLISHED)}"
        )
    return name


def _named_folder(weights_dir: str) -> epath.Path | None:
    folder = weights_dir or os.environ.get(ENVIRONMENT_VARIABLE, "")
    return epath.Path(folder).expanduser() if folder else None


def _where_to_get(file: PublishedFile, folder: epath.Path) -> str:
    about = f"{file.num_bytes} bytes, SHA-256 {file.sha256}"
    return f"fetch {file.address} ({about}) and put it at {folder / file.path}"


def _wrong_size(file: PublishedFile, folder: epath.Path) -> str:
    """Return what is wrong with a file that should be there, as far as its size tells, or nothing."""
    path = folder / file.path
    if not path.exists():
        return f"{path} is not there"
    length = path.stat().length
    return (
        ""
        if length == file.num_bytes
        else f"{path} has {length} bytes, so it is another file or cut off"
    )


def _obtain(file: PublishedFile, folder: epath.Path, bar: Progress) -> str:
    """Make sure that a published file is there; return what was done, and leave a wrong file as it is."""
    path = folder / file.path
    if path.exists():
        problem = _wrong_size(file, folder) or _wrong_checksum(file, _sha256(path), path)
        if problem:
            raise BadInput(
                f"{problem}; it is left as it is: delete or move it, then run the same command again"
            )
        return "already there"
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            digest = _download(file, folder, out.write, bar)
        if problem := _wrong_checksum(file, digest, file.address):
            raise BadInput(f"{problem}; {_where_to_get(file, folder)}")
        part.rename(path)
    except OSError as error:
        raise BadInput(
            f"weights_dir={folder}: cannot be written ({error.strerror or error}); choose another, or "
            f"{_where_to_get(file, folder)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return f"fetched, {file.num_bytes:,} bytes, checksum right"


def _download(file: PublishedFile, folder: epath.Path, write: Callable, bar: Progress) -> str:
    """Pass a file's bytes to a function; return their SHA-256."""
    task = bar.add_task(file.path, total=file.num_bytes)
    digest, done = hashlib.sha256(), 0
    for chunk in _chunks(file, folder):
        done += len(chunk)
        digest.update(chunk)
        write(chunk)
        bar.update(task, completed=done)
        if done > file.num_bytes:
            break
    if done != file.num_bytes:
        more = "more than " if done > file.num_bytes else f"{done} of "
        raise BadInput(
            f"{file.address} gave {more}{file.num_bytes} bytes; run the same command again, or "
            f"{_where_to_get(file, folder)}"
        )
    return digest.hexdigest()


def _chunks(file: PublishedFile, folder: epath.Path) -> Iterator[bytes]:
    """Yield what an address holds; only what the connection raises is caught here."""
    try:
        with urllib.request.urlopen(file.address, timeout=_TIMEOUT_SECONDS) as response:
            while True:
                chunk = response.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk
    except http.client.IncompleteRead as error:
        yield error.partial
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"{file.path}: cannot be fetched ({reason}); {_where_to_get(file, folder)}"
        ) from error


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wrong_checksum(file: PublishedFile, digest: str, where: epath.Path | str) -> str:
    return "" if digest == file.sha256 else f"{where} has SHA-256 {digest} instead of {file.sha256}"


def _progress(is_wanted: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_wanted or not console.is_terminal,
    )

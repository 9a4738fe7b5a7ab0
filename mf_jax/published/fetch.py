"""Find published weight files, check that they are whole, and fetch them by --mode=weights.

A config names published networks, such as "sd-vae-ft-mse". Their files lie in `weights_dir` or
$MF_WEIGHTS. For published weights only --mode=weights opens a connection.
"""

import os
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput, collected, nearest, refused
from mf_jax.reporting.progress import ProgressBar
from mf_jax.runtime.files import in_bucket, sha256_of, written_aside


class PublishedFile(NamedTuple):
    """A file as it was published: its place under the folder of weights, and its content.

    Size and SHA-256 may be unknown, 0 and "": names and shapes are checked when it is read.
    """

    path: str
    num_bytes: int
    sha256: str
    address: str


def _autoencoder(name: str, revision: str, sha256: str) -> tuple[PublishedFile, ...]:
    """Return the two files of an autoencoder of Stable Diffusion; all have one size and config."""
    config_sha256 = "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"
    at = f"https://huggingface.co/stabilityai/{name}/resolve/{revision}"
    weights = "diffusion_pytorch_model.safetensors"
    return (
        PublishedFile(f"{name}/{weights}", 334_643_276, sha256, f"{at}/{weights}"),
        PublishedFile(f"{name}/config.json", 547, config_sha256, f"{at}/config.json"),
    )


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "inception-2015-12-05": (
        PublishedFile(
            "weights-inception-2015-12-05-6726825d.pth",
            95_628_359,
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
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
    "lpips-vgg16": (
        PublishedFile(
            "lpips-vgg16/vgg16-397923af.pth",
            553_433_881,
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
        ),
        PublishedFile(
            "lpips-vgg16/vgg.pth",
            7_289,
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/"
            "weights/v0.1/vgg.pth",
        ),
    ),
    "convnextv2-base-22k-224": (
        PublishedFile(
            "convnextv2-base-22k-224/model.safetensors",
            0,
            "",
            "https://huggingface.co/facebook/convnextv2-base-22k-224/resolve/main/model.safetensors",
        ),
    ),
}
"""The files of each published name, the weights first."""


def find_weights(name_or_path: str, weights_dir: str, *, key: str = "weights") -> epath.Path:
    """Return where weights lie: a path as it is, a published name's file, or its files' folder.

    Args:
      weights_dir: the folder of published files; "" for $MF_WEIGHTS.
      key: the config key that holds name_or_path, for the error.
    """
    path = epath.Path(name_or_path).expanduser()
    if in_bucket(path):  # a stranger's config may name it; weights are mapped from a disk
        raise BadInput(f"{key}={name_or_path!r}: must be on a disk of this machine: copy it there")
    if name_or_path and path.exists():
        if not path.is_dir() and not os.path.isfile(path):
            raise BadInput(f"{key}={name_or_path!r}: is a pipe or a device; must be a file")
        return path
    files, folder, told = _files(name_or_path, key), _folder(weights_dir, name_or_path), []
    for file in files:
        if problem := _problem(file, folder / file.path, whole=False):
            told.append(f"{folder / file.path} {problem}; {_advice(file, folder)}")
    if told:
        of_latents = " --config.data.name=latents" * (key == "data.autoencoder")
        fix = f"--config=CONFIG --mode=weights --config.weights_dir={folder}{of_latents}"
        fix = f"{'; '.join(told)}; or run python -m mf_jax.main {fix}"
        raise BadInput(f"{key}={name_or_path!r}: {fix}")
    place = folder / files[0].path
    return place if len(files) == 1 else place.parent


def verify(name_or_path: str, sha256: str) -> None:
    """Check the SHA-256 of a file read under a published name; a path may hold anything."""
    for file in PUBLISHED.get(name_or_path, ())[:1]:
        if file.sha256 not in ("", sha256):
            fix = f"must be {file.sha256}: delete and fetch it again, or name your own by its path"
            raise BadInput(f"weights {name_or_path!r}: {file.path} has SHA-256 {sha256}; {fix}")


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Fetch the published files that a config names; an error has a line for each failure."""
    del workdir  # the files belong to no run
    keys = ["eval.inception"]
    keys += ["data.autoencoder"] * bool(config.data.name == "latents" or config.prepare.input)
    keys += [f"perceptual.{x}_weights" for x in ("lpips", "convnext") if config.perceptual[x]]
    names = {key: attrgetter(key)(config) for key in keys}
    wanted = {k: v for k, v in names.items() if not v or not epath.Path(v).expanduser().exists()}
    files = [file for key, name in wanted.items() for file in _files(name, key)]
    if not files:
        print("nothing to fetch: the config names paths that are there")
        return
    folder, problems = _folder(config.weights_dir, ", ".join(wanted.values())), []
    for file in files:
        with collected(problems):
            print(f"{folder / file.path}: {_obtain(file, folder, progress=config.log.progress)}")
    if problems:
        raise BadInput("\n".join(problems))


def _files(name: str, key: str) -> tuple[PublishedFile, ...]:
    if name not in PUBLISHED:
        known = f"{', '.join(PUBLISHED)}{nearest(name, PUBLISHED)}"
        raise BadInput(f"{key}={name!r}: is no file; must be one, or published: one of {known}")
    return PUBLISHED[name]


def _folder(weights_dir: str, names: str) -> epath.Path:
    if not (folder := weights_dir or os.environ.get("MF_WEIGHTS", "")):
        fix = "set --config.weights_dir=DIR or $MF_WEIGHTS; --mode=weights fetches into it"
        raise BadInput(f"weights_dir='': must be the folder that holds {names}; {fix}")
    return epath.Path(folder).expanduser()


def _advice(file: PublishedFile, folder: epath.Path) -> str:
    content = f"{file.num_bytes} bytes, SHA-256 {file.sha256}" if file.sha256 else "size not known"
    return f"fetch {file.address} ({content}) and put it at {folder / file.path}"


def _problem(file: PublishedFile, path: epath.Path, *, whole: bool) -> str:
    """Return what is wrong with a file by its size or, with `whole`, its content; or nothing."""
    if not path.exists():
        return "is not there"
    if file.num_bytes and (length := path.stat().length) != file.num_bytes:
        return f"has {length} bytes, so it is another file or cut off"
    is_small = file.num_bytes < 2**20  # the weights themselves are checked when read
    if file.sha256 and (whole or is_small) and (digest := sha256_of(path)) != file.sha256:
        return f"has SHA-256 {digest} instead of {file.sha256}"
    return ""


def _obtain(file: PublishedFile, folder: epath.Path, *, progress: bool) -> str:
    """Make sure that a file is there; return what was done, and leave a wrong file as it is."""
    import pooch  # with requests, which only this mode needs
    import requests

    path, fix = folder / file.path, _advice(file, folder)
    if path.exists():
        if problem := _problem(file, path, whole=True):
            raise BadInput(f"{path} {problem}; delete or move it, then run the same command again")
        return "already there"
    pooch.get_logger().setLevel("WARNING")
    shown = {"unit": "bytes", "is_wanted": progress}
    lost = requests.RequestException, ValueError  # a ValueError is about the checksum
    with (
        refused(OSError, f"weights_dir={folder}: cannot be written", f"choose another, or {fix}"),
        refused(lost, f"{file.path}: cannot be fetched", f"run the same command again, or {fix}"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, ProgressBar(file.path, file.num_bytes, **shown) as bar:
            get = pooch.HTTPDownloader(progressbar=_Received(bar), chunk_size=1 << 20)
            to, digest = Path(aside), file.sha256 or None
            pooch.retrieve(file.address, digest, to.name, to.parent, downloader=get)
    if not file.sha256:
        return f"fetched, {path.stat().length:,} bytes, SHA-256 {sha256_of(path)}, none is known"
    return f"fetched, {file.num_bytes:,} bytes, checksum right"


class _Received:
    """What pooch asks of a progress bar: it counts whole pieces, then all bytes anew."""

    def __init__(self, bar: ProgressBar):
        self._bar, self._count, self.total = bar, 0, 0

    def update(self, count: int) -> None:
        self._count = min(self._count + count, self.total)
        self._bar.move(self._count)

    def reset(self) -> None:
        """Leave the count, which never exceeds the total, and the bar to its `with`."""

    close = reset

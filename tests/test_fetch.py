"""Published weight files: the lookup and its errors, and --mode=weights against a local server."""

import hashlib
import http.server
import re
import threading

import pytest
from conftest import refuses
from etils import epath
from jobs import assert_refused, here

from mf_jax.flow.errors import BadInput
from mf_jax.published.fetch import PUBLISHED, PublishedFile, find_weights, verify

CONTENT = {"/inception": b"features" * 1000, "/vae": b"pictures" * 700_000, "/config": b"{}"}
"""The files of the server; the second is longer than a chunk."""
REAL = dict(PUBLISHED)
INCEPTION, VAE = "inception-2015-12-05", "sd-vae-ft-mse"
LATENTS = "--config.data.name=latents"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.content.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/config":  # there only the end of the connection ends the file
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.asked.append(self.path)  # before the client has all of it
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Yield a server of `content` that the published table points to; `asked` lists its files."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MF_WEIGHTS", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as made:
        made.content, made.asked = dict(CONTENT), []

        def file(path, address):
            body = CONTENT[address]
            where = f"http://127.0.0.1:{made.server_port}{address}"
            return PublishedFile(path, len(body), hashlib.sha256(body).hexdigest(), where)

        pair = file(f"{VAE}/vae.safetensors", "/vae"), file(f"{VAE}/config.json", "/config")
        monkeypatch.setitem(PUBLISHED, INCEPTION, (file("inception.pth", "/inception"),))
        monkeypatch.setitem(PUBLISHED, VAE, pair)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path):
    """Return a function that runs --mode=weights into tmp_path / "weights"."""
    where = f"--config.weights_dir={tmp_path / 'weights'}"
    return lambda *more: here("--config=configs/digits.py", "--mode=weights", where, *more)


def _refused(result, folder, *words):
    """Assert that a command failed in one line, and left no part of a file."""
    assert_refused(result, "mf_jax: ", *words)
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert set(left) <= {"inception.pth", "weights"}, "no part of a file"


def test_the_table_is_of_whole_checksums_and_plain_addresses():
    weights = set()
    for name, files in REAL.items():
        for path, num_bytes, sha256, address in files:
            is_known = re.fullmatch("[0-9a-f]{64}", sha256) and num_bytes > 100
            assert is_known or (num_bytes, sha256) == (0, "")
            assert re.fullmatch(f"https://.*/{re.escape(path.rsplit('/', 1)[-1])}", address)
            assert len(files) == 1 or path.startswith(f"{name}/")
            assert sha256 not in weights or "config" in path
            weights.add(sha256)
    assert REAL[INCEPTION][0].sha256.startswith("6726825d")


def test_fetches_what_the_config_names_once(fetch, server, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    for more, asked, said in (
        ((), ["/inception"], "inception.pth: fetched"),
        ((LATENTS,), ["/inception", "/vae", "/config"], "inception.pth: already there"),
        ((LATENTS,), ["/inception", "/vae", "/config"], "vae.safetensors: already there"),
    ):
        code, out, _ = fetch(*more)
        assert (code, server.asked, said in out) == (0, asked, True)
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = "inception.pth", "vae.safetensors", "config.json"
    assert files == dict(zip(names, CONTENT.values(), strict=True))
    assert find_weights(INCEPTION, str(folder)) == epath.Path(folder / "inception.pth")
    assert find_weights(VAE, str(folder)) == epath.Path(folder / VAE)
    monkeypatch.setenv("MF_WEIGHTS", str(folder))
    assert find_weights(INCEPTION, "") == epath.Path(folder / "inception.pth")
    refuses("elsewhere", find_weights, INCEPTION, str(tmp_path / "elsewhere"))
    for content, problem in ((b"{", "has 1 bytes"), (b"[]", "has SHA-256")):
        (folder / VAE / "config.json").write_bytes(content)
        refuses(rf"^weights='{VAE}': \S*config.json {problem}", find_weights, VAE, str(folder))


def test_a_file_of_unknown_content_is_fetched_and_its_checksum_is_told(fetch, server, tmp_path):
    name, (file,) = "convnextv2-base-22k-224", PUBLISHED[INCEPTION]
    path = tmp_path / "weights" / "model"
    PUBLISHED[INCEPTION] = (file._replace(path="model", num_bytes=0, sha256=""),)
    for said in ("none is known", "already there"):
        code, out, _ = fetch()
        assert (code, said in out) == (0, True)
        assert (file.sha256 in out) == (said == "none is known")
        assert path.read_bytes() == CONTENT["/inception"]
    verify(INCEPTION, "0" * 64)
    with pytest.raises(BadInput, match=f"{name}/model.safetensors is not there.*size not known"):
        find_weights(name, str(tmp_path))


def test_a_wrong_file_is_left_alone_and_a_bad_download_leaves_nothing(fetch, server, tmp_path):
    path, address = tmp_path / "weights" / "inception.pth", PUBLISHED[INCEPTION][0].address
    path.parent.mkdir()
    other = b"F" + CONTENT["/inception"][1:]
    for wrong, word in ((b"features" * 999, "7992 bytes"), (other, "SHA-256")):
        path.write_bytes(wrong)
        _refused(fetch(), tmp_path, str(path), "delete or move it", word)
        assert path.read_bytes() == wrong
    assert server.asked == []
    path.unlink()
    for body, word in ((b"features" * 999, "SHA256"), (None, "404")):
        server.content["/inception"] = body
        _refused(fetch(), tmp_path, "cannot be fetched", address, f"put it at {path}", word)
        assert not path.exists()


def test_each_file_that_cannot_be_had_has_its_line(fetch, server, tmp_path):
    del server.content["/vae"]
    (file,) = PUBLISHED[INCEPTION]
    dead = file._replace(address="http://127.0.0.1:9/inception")  # a port where nothing listens
    PUBLISHED[INCEPTION] = (dead,)
    code, out, errors = fetch(LATENTS, "--config.log.progress=False")
    assert (code, "config.json: fetched" in out) == (2, True)
    for line, lost in zip(errors.splitlines(), [dead, PUBLISHED[VAE][0]], strict=True):
        assert lost.address in line


def test_folders_and_names_that_are_wrong(fetch, server, tmp_path):
    unnamed = here("--config=configs/digits.py", "--mode=weights")
    _refused(unnamed, tmp_path, "weights_dir=''", "--config.weights_dir=DIR", "MF_WEIGHTS")
    unknown = fetch("--config.eval.inception=inception-2015")
    _refused(unknown, tmp_path, "eval.inception='inception-2015'", f"did you mean {INCEPTION}?")
    (tmp_path / "weights").write_bytes(b"")
    where = f"weights_dir={tmp_path / 'weights'}"
    _refused(fetch(), tmp_path, where, "cannot be written", "choose another")
    assert server.asked == []
    message = rf"data.autoencoder='':.*one of {INCEPTION}, {VAE}"
    refuses(message, find_weights, "", str(tmp_path), key="data.autoencoder")

    mine = tmp_path / "mine.pth"  # which needs no fetching
    mine.write_bytes(b"x")
    code, out, _ = fetch(f"--config.eval.inception={mine}")
    assert (code, server.asked, "nothing to fetch" in out) == (0, [], True)
    assert find_weights(str(mine), "") == epath.Path(mine)
    verify(str(mine), "0" * 64)


def test_a_missing_file_is_said_in_one_line_with_all_that_is_needed(tmp_path):
    with pytest.raises(BadInput) as caught:
        find_weights(VAE, str(tmp_path), key="data.autoencoder")
    message = str(caught.value)
    assert "\n" not in message
    for file in REAL[VAE]:
        words = file._replace(path=str(tmp_path / file.path))
        assert all(str(word) in message for word in words)
    assert f"--mode=weights --config.weights_dir={tmp_path}" in message
    (file,) = REAL[INCEPTION]
    verify(INCEPTION, file.sha256)
    verify(VAE, REAL[VAE][0].sha256)
    refuses(rf"SHA-256 {'0' * 64}; must be {file.sha256}", verify, INCEPTION, "0" * 64)

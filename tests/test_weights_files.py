"""Published weight files: the lookup and its errors, and --mode=weights against a server of this machine."""

import hashlib
import http.server
import importlib
import re
import threading

import pytest
from etils import epath

from mf_jax.errors import BadInput
from mf_jax.published import fetch as weights
from mf_jax.published.fetch import PUBLISHED, PublishedFile, find_weights, verify

CONTENT = {"/inception": b"features" * 1000, "/vae": b"pictures" * 700_000, "/config": b"{}"}
"""What the server holds; the second is longer than a chunk."""
REAL = dict(PUBLISHED)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.content.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if not self.path.endswith(
            "config"
        ):  # without a length only the end of the connection ends a file
            self.send_header("Content-Length", str(len(body) + self.server.cut))
        self.end_headers()
        self.server.asked.append(self.path)  # before the client has all of it
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Yield a server of `content`, the published table pointing to it; `asked` lists what was fetched."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MF_WEIGHTS", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as made:
        made.content, made.asked, made.cut = dict(CONTENT), [], 0

        def file(path, address):
            body = CONTENT[address]
            where = f"http://127.0.0.1:{made.server_port}{address}"
            return PublishedFile(path, len(body), hashlib.sha256(body).hexdigest(), where)

        monkeypatch.setitem(
            PUBLISHED, "inception-2015-12-05", (file("inception.pth", "/inception"),)
        )
        pair = (
            file("sd-vae-ft-mse/vae.safetensors", "/vae"),
            file("sd-vae-ft-mse/config.json", "/config"),
        )
        monkeypatch.setitem(PUBLISHED, "sd-vae-ft-mse", pair)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def fetch(command, tmp_path):
    """Return a function that runs --mode=weights into tmp_path / "weights"."""
    where = f"--config.weights_dir={tmp_path / 'weights'}"
    return lambda *more: command("--config=configs/digits.py", "--mode=weights", where, *more)


LATENTS = "--config.data.name=latents"


def test_the_table_is_of_whole_checksums_and_plain_addresses():
    for name, files in REAL.items():
        for file in files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.num_bytes > 100
            assert file.address.startswith("https://")
            assert file.address.rsplit("/", 1)[1] == file.path.rsplit("/", 1)[-1]
            assert len(files) == 1 or file.path.startswith(f"{name}/")
    assert REAL["inception-2015-12-05"][0].sha256.startswith("6726825d")
    everything = [
        file.sha256 for files in REAL.values() for file in files if "config" not in file.path
    ]
    assert len(set(everything)) == len(everything)


def test_the_defaults_are_published_names():
    config = importlib.import_module("configs.default").get_config()
    assert {config.eval.inception, config.data.autoencoder} <= set(REAL)


def test_fetches_what_the_config_names_once(fetch, server, tmp_path):
    folder = tmp_path / "weights"
    code, out, _ = fetch()
    assert (code, server.asked) == (0, ["/inception"])
    assert "inception.pth: fetched" in out
    code, out, _ = fetch(LATENTS)
    assert (code, server.asked) == (0, ["/inception", "/vae", "/config"])
    assert "inception.pth: already there" in out
    code, out, _ = fetch(LATENTS)
    assert (code, len(server.asked), out.count("already there")) == (0, 3, 3)
    assert (folder / "sd-vae-ft-mse" / "vae.safetensors").read_bytes() == CONTENT["/vae"]
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "inception.pth",
        "vae.safetensors",
    ]
    assert find_weights("inception-2015-12-05", str(folder)) == epath.Path(folder / "inception.pth")
    assert find_weights("sd-vae-ft-mse", str(folder)) == epath.Path(folder / "sd-vae-ft-mse")


def test_the_folder_may_be_named_by_the_environment(command, server, tmp_path, monkeypatch):
    monkeypatch.setenv("MF_WEIGHTS", str(tmp_path / "there"))
    assert command("--config=configs/digits.py", "--mode=weights")[0] == 0
    assert find_weights("inception-2015-12-05", "") == epath.Path(
        tmp_path / "there" / "inception.pth"
    )
    with pytest.raises(BadInput, match="elsewhere"):
        find_weights("inception-2015-12-05", str(tmp_path / "elsewhere"))


def _refused(result, folder, *words):
    """Assert that a command failed in one line, and left no part of a file."""
    code, _, errors = result
    assert code == 2
    assert errors.startswith("mf_jax: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(b"features" * 999, ["7992 bytes"]), (b"Features" + b"features" * 999, ["SHA-256"])],
    ids=["size", "checksum"],
)
def test_a_wrong_file_is_named_and_left_alone(wrong, words, fetch, server, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "inception.pth").write_bytes(wrong)
    _refused(fetch(), folder, str(folder / "inception.pth"), "delete or move it", *words)
    assert (folder / "inception.pth").read_bytes() == wrong
    assert server.asked == []


@pytest.mark.parametrize(
    ("body", "cut", "words"),
    [
        (b"features" * 999, 8, ["gave 7992 of 8000 bytes", "run the same command again"]),
        (b"features" * 999, 0, ["gave 7992 of 8000 bytes"]),
        (b"features" * 1001, 0, ["gave more than 8000 bytes"]),
        (b"Features" + b"features" * 999, 0, ["SHA-256"]),
        (None, 0, ["cannot be fetched", "Not Found"]),
    ],
    ids=["cut", "short", "long", "checksum", "404"],
)
def test_a_bad_download_leaves_nothing(body, cut, words, fetch, server, tmp_path):
    server.content["/inception"], server.cut = body, cut
    folder = tmp_path / "weights"
    address = PUBLISHED["inception-2015-12-05"][0].address
    _refused(fetch(), folder, address, f"put it at {folder / 'inception.pth'}", *words)
    assert not (folder / "inception.pth").exists()


def test_without_internet_each_file_has_its_line_and_the_others_are_fetched(
    fetch, server, tmp_path
):
    del server.content["/vae"]
    (file,) = PUBLISHED["inception-2015-12-05"]
    dead = file._replace(address="http://127.0.0.1:9/inception")  # a port where nothing listens
    PUBLISHED["inception-2015-12-05"] = (dead,)
    code, out, errors = fetch(LATENTS, "--config.log.progress=False")
    lines = errors.splitlines()
    assert (code, len(lines)) == (2, 2)
    for line, lost in zip(lines, [dead, PUBLISHED["sd-vae-ft-mse"][0]], strict=True):
        assert lost.address in line
        assert lost.sha256 in line
        assert str(tmp_path / "weights" / lost.path) in line
    assert "config.json: fetched" in out


def test_a_folder_that_cannot_be_written(fetch, server, tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    _refused(
        fetch(),
        tmp_path,
        f"weights_dir={tmp_path / 'weights'}",
        "cannot be written",
        "choose another",
    )


def test_a_folder_must_be_named(command, server, tmp_path):
    result = command("--config=configs/digits.py", "--mode=weights")
    _refused(result, tmp_path, "weights_dir=''", "--config.weights_dir=DIR", "MF_WEIGHTS")


def test_paths_need_no_fetching(command, server, tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"x")
    mine = f"--config.eval.inception={tmp_path / 'mine.pth'}"
    code, out, _ = command("--config=configs/digits.py", "--mode=weights", mine)
    assert (code, server.asked) == (0, [])
    assert "nothing to fetch" in out


def test_an_unknown_name_lists_the_known_ones(fetch, server, tmp_path):
    wrong = "--config.eval.inception=inception-2015"
    _refused(
        fetch(wrong),
        tmp_path,
        "eval.inception='inception-2015'",
        "did you mean inception-2015-12-05?",
    )
    with pytest.raises(
        BadInput, match=r"data.autoencoder='':.*one of inception-2015-12-05, sd-vae-ft-mse"
    ):
        find_weights("", str(tmp_path), key="data.autoencoder")


def test_a_path_is_returned_as_it_is(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    assert find_weights(str(tmp_path / "a.pth"), "") == epath.Path(tmp_path / "a.pth")
    verify(str(tmp_path / "a.pth"), "0" * 64)


def test_a_missing_file_is_said_in_one_line_with_all_that_is_needed(tmp_path):
    with pytest.raises(BadInput) as caught:
        find_weights("sd-vae-ft-mse", str(tmp_path), key="data.autoencoder")
    message = str(caught.value)
    assert "\n" not in message
    for file in REAL["sd-vae-ft-mse"]:
        for word in (str(tmp_path / file.path), file.address, file.sha256, str(file.num_bytes)):
            assert word in message
    assert f"--mode=weights --config.weights_dir={tmp_path}" in message
    assert message.startswith("data.autoencoder='sd-vae-ft-mse': ")


def test_a_file_of_another_size_is_not_found(server, fetch, tmp_path):
    assert fetch(LATENTS)[0] == 0
    (tmp_path / "weights" / "sd-vae-ft-mse" / "config.json").write_bytes(b"{")
    with pytest.raises(BadInput, match=r"config.json has 1 bytes") as caught:
        find_weights("sd-vae-ft-mse", str(tmp_path / "weights"))
    assert "vae.safetensors" not in str(caught.value)


def test_a_published_name_must_have_its_checksum():
    (file,) = REAL["inception-2015-12-05"]
    verify("inception-2015-12-05", file.sha256)
    verify("sd-vae-ft-mse", REAL["sd-vae-ft-mse"][0].sha256)
    with pytest.raises(BadInput, match=rf"SHA-256 {'0' * 64}; must be {file.sha256}"):
        verify("inception-2015-12-05", "0" * 64)


def test_reading_in_small_pieces_makes_no_difference(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 7)
    assert fetch()[0] == 0
    assert (tmp_path / "weights" / "inception.pth").read_bytes() == CONTENT["/inception"]

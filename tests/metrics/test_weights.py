"""What is fetched is whole or absent, and what a file holds is never run."""

from __future__ import annotations

import hashlib
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import load_extractor
from lit_diffusion.metrics.extractors import (
    CLIP,
    VGG16,
    DigitsFeatures,
    Inception,
)
from lit_diffusion.metrics.extractors.base import require_plain_weights
from lit_diffusion.metrics.weights import WEIGHTS, WeightsFile, fetch_weights, find_weights

CONTENT = bytes(range(256)) * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DIFFUSION_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """One file that can be fetched without a network."""
    (tmp_path / "net.pth").write_bytes(CONTENT)
    monkeypatch.setitem(WEIGHTS, "inception", WeightsFile("net", (tmp_path / "net.pth").as_uri(), SHA))
    return tmp_path / "net.pth"


@pytest.fixture
def server(monkeypatch):
    """Sends half of what it announces."""

    class Handler(BaseHTTPRequestHandler):
        reset = False

        def do_GET(self):
            self.send_response(200)
            if self.path.startswith("/chunked"):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"100000\r\n" + CONTENT[:1000])
                return
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2])

        def log_message(self, *args):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_published_files_are_named_by_their_whole_hash():
    for wanted in WEIGHTS.values():
        assert len(bytes.fromhex(wanted.sha256)) == 32
        assert wanted.url.startswith("https://")
        assert "/" not in wanted.name
    # Three of the four addresses hold the beginning of the hash, or all of it.
    assert WEIGHTS["inception"].sha256[:8] in WEIGHTS["inception"].url
    assert WEIGHTS["vgg16"].sha256[:8] in WEIGHTS["vgg16"].url
    assert WEIGHTS["clip"].sha256 in WEIGHTS["clip"].url


def test_a_fetched_file_is_found(published, folder):
    path = fetch_weights("inception")
    assert path.read_bytes() == CONTENT
    assert find_weights("inception") == (path, SHA)
    assert names(folder) == ["net.pth"]


def test_what_is_there_and_whole_is_not_fetched_again(published, folder):
    path = fetch_weights("inception")
    published.unlink()
    assert fetch_weights("inception") == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="cannot download"):
        fetch_weights("inception")


def test_a_damaged_file_is_replaced(published, folder):
    path = fetch_weights("inception")
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"damaged.*run `python -m lit_diffusion fetch weights inception`") as caught:
        find_weights("inception")
    one_line(caught)
    fetch_weights("inception")
    assert find_weights("inception")[1] == SHA


def test_another_file_than_the_published_one_is_not_kept(published, folder):
    published.write_bytes(CONTENT + b"x")
    with pytest.raises(UserError, match="not the published file") as caught:
        fetch_weights("inception")
    one_line(caught)
    assert names(folder) == []


@pytest.mark.parametrize("path", ["whole", "chunked"])
def test_half_a_transfer_leaves_nothing(server, path, folder, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "inception", WeightsFile("net", f"{server}/{path}/net.pth", SHA))
    with pytest.raises(UserError, match=r"not the published file|cannot download") as caught:
        fetch_weights("inception")
    assert "try again, or copy the file to" in one_line(caught)
    assert names(folder) == []


def test_a_lost_connection_is_not_called_a_full_disk(published, folder, monkeypatch):
    source = MagicMock(headers={})
    source.read.side_effect = ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **keys: source)
    with pytest.raises(UserError, match=r"cannot download.*Connection reset by peer") as caught:
        fetch_weights("inception")
    one_line(caught)
    assert names(folder) == []


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_are_asked_for_by_the_command_that_brings_them(name):
    with pytest.raises(UserError) as caught:
        load_extractor(name, (3, 32, 32))
    assert f"run `python -m lit_diffusion fetch weights {name}`" in one_line(caught)
    with pytest.raises(UserError, match="not on this machine"):
        find_weights(name)


def test_a_users_own_file_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no weights file .*nowhere.pth") as caught:
        find_weights("inception", tmp_path / "nowhere.pth")
    assert "fetch weights inception" in one_line(caught)
    with pytest.raises(UserError, match="weights is 'resnet'; choose one of inception"):
        find_weights("resnet")
    with pytest.raises(UserError, match="weights is 'resnet'"):
        fetch_weights("resnet")


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("extractor", [Inception, VGG16])
def test_a_file_with_code_is_refused_and_not_run(extractor, zipped, tmp_path):
    path, sprung = tmp_path / "w.pth", tmp_path / "sprung"
    if zipped:
        torch.save({"fc.weight": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps({"fc.weight": Trap(sprung)}))
    with pytest.raises(UserError, match=r"more than weights and is not opened|cannot read the weights") as caught:
        extractor(path)
    one_line(caught)
    assert not sprung.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, None])
@pytest.mark.parametrize("extractor", [Inception, VGG16, CLIP, DigitsFeatures])
def test_a_file_that_is_none_is_one_line(extractor, content, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.zeros(3000)}, path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=r"w\.pth"):
        extractor(path)


@pytest.mark.parametrize("extractor", [Inception, VGG16, CLIP, DigitsFeatures])
def test_another_networks_file_is_one_line(extractor, tmp_path):
    path, state = tmp_path / "w.pth", {"conv.weight": torch.zeros(3)}
    save_file(state, path) if extractor is DigitsFeatures else torch.save(state, path)
    with pytest.raises(UserError, match=r"w\.pth does not hold the weights of this network") as caught:
        extractor(path)
    one_line(caught)


@pytest.mark.parametrize("content", [{"model": {"conv.weight": torch.zeros(3)}}, [torch.zeros(3)], torch.zeros(3)])
def test_weights_are_a_table_of_tensors(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no table of weights"):
        require_plain_weights(tmp_path / "w.pth")

"""Fetching repositories from a Hugging Face endpoint on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptedge import pull as pulling
from gptedge.errors import DownloadError, UsageError
from gptedge.pull import pull
from tests.pull.folders import leftovers


class Hub:
    """A Hugging Face endpoint with one repository, me/tiny, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.cut_after: int | None = None  # bytes of a body after which the connection breaks
        self.ranges = True
        self.blobs = True
        self.corrupt: set[str] = set()
        self.redirect_to: str | None = None
        self.token: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def ranges_asked(self, name: str) -> list[str | None]:
        return [headers.get("Range") for path, headers in self.requests if path.endswith(f"/{name}")]

    def answer(self, h: BaseHTTPRequestHandler) -> None:
        self.requests.append((h.path, dict(h.headers)))
        if self.token and h.headers.get("Authorization") != f"Bearer {self.token}":
            h.send_error(401)
        elif h.path == "/api/models/me/tiny?blobs=true":
            self.send(h, json.dumps({"siblings": [self.row(n) for n in self.files]}).encode())
        elif h.path.startswith("/me/tiny/resolve/main/") and self.redirect_to:
            h.send_response(302)
            h.send_header("Location", self.redirect_to + h.path)
            h.send_header("Content-Length", "0")
            h.end_headers()
        elif (name := h.path.removeprefix("/me/tiny/resolve/main/")) in self.files:
            body = self.files[name]
            self.send(h, body[:-1] + b"\0" if name in self.corrupt else body)
        else:
            h.send_error(404)

    def row(self, name: str) -> dict[str, Any]:
        content, row = self.files[name], {"rfilename": name}
        if not self.blobs:
            return row
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        row |= {"size": len(content), "blobId": blob}
        if name.endswith((".safetensors", ".gguf")):
            row |= {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}
        return row

    def send(self, h: BaseHTTPRequestHandler, body: bytes) -> None:
        start = 0
        if self.ranges and (asked := h.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            h.send_response(206)
            h.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            h.send_response(200)
        rest = body[start:]
        h.send_header("Content-Length", str(len(rest)))
        h.end_headers()
        h.wfile.write(rest if self.cut_after is None or "/api/" in h.path else rest[: self.cut_after])


WEIGHTS = os.urandom(300_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.files = {
        ".gitattributes": b"*",
        "README.md": b"# tiny",
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "tokenizer.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "original/consolidated.safetensors": b"other",
    }
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_only_what_export_reads_is_fetched(hub: Hub, tmp_path: Path) -> None:
    result = pull("hf:me/tiny", tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert (result.path, result.cached) == (tmp_path / "out", False)
    assert result.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    asked = len(hub.requests)
    again = pull("hf:me/tiny", tmp_path / "out")
    assert again.cached
    assert again.sha256 == result.sha256
    assert len(hub.requests) == asked + 1  # the listing


def test_default_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    assert pull("hf:me/tiny").path == tmp_path / "home" / "models" / "me" / "tiny"


def test_a_changed_small_file_of_the_same_size_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    pull("hf:me/tiny", tmp_path / "out")
    hub.files["tokenizer.json"] = b"[]"
    assert not pull("hf:me/tiny", tmp_path / "out").cached
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"[]"


def test_shards(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(shards)}}
    hub.files |= shards | {"model.safetensors.index.json": json.dumps(index).encode(), "consolidated.safetensors": b"x"}
    pull("hf:me/tiny", tmp_path / "out")
    assert leftovers(tmp_path / "out") == [
        "config.json",
        *sorted(shards),
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(DownloadError, match=r"lacks model-00002"):
        pull("hf:me/tiny", tmp_path / "other")


def test_gguf_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"README.md": b"", "a.gguf": b"GGUF1"}
    result = pull("hf:me/tiny", tmp_path / "out")
    assert result.path == tmp_path / "out" / "a.gguf"
    assert result.sha256 == hashlib.sha256(b"GGUF1").hexdigest()
    hub.files["b.gguf"] = b"GGUF2"
    with pytest.raises(UsageError, match=r"2 \.gguf files.*a\.gguf, b\.gguf"):
        pull("hf:me/tiny", tmp_path / "out")
    assert pull("hf:me/tiny/b.gguf", tmp_path / "out").path.read_bytes() == b"GGUF2"


def test_interrupt_then_resume(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_CHUNK", 10_000)

    def interrupt(name: str, done: int, total: int | None) -> None:
        if name == "model.safetensors" and done >= 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("hf:me/tiny", tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "model.safetensors.partial").stat().st_size == 100_000
    seen: list[tuple[int, int | None]] = []
    pull("hf:me/tiny", tmp_path / "out", progress=lambda name, done, total: seen.append((done, total)))
    assert hub.ranges_asked("model.safetensors") == [None, "bytes=100000-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert leftovers(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert seen[-1] == (300_000, 300_000)
    assert min(done for done, total in seen if total == 300_000) > 100_000


def test_broken_connections_are_resumed_within_one_pull(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 120_000
    pull("hf:me/tiny", tmp_path / "out")
    assert hub.ranges_asked("model.safetensors") == [None, "bytes=120000-", "bytes=240000-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_keeps_breaking_ends_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 1000
    with pytest.raises(DownloadError, match="3000 of 300000 bytes"):
        pull("hf:me/tiny", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_server_without_ranges_starts_over(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.partial").write_bytes(WEIGHTS[:1000])
    pull("hf:me/tiny", tmp_path / "out")
    assert hub.ranges_asked("model.safetensors") == ["bytes=1000-"]  # and what came was not thrown away
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("partial", [b"another revision", b"x" * 300_000, b"x" * 400_000])
def test_a_partial_file_of_something_else_is_replaced(hub: Hub, tmp_path: Path, partial: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.partial").write_bytes(partial)
    pull("hf:me/tiny", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_is_thrown_away(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt = {name}
    with pytest.raises(DownloadError, match=f"{name} does not have"):
        pull("hf:me/tiny", tmp_path / "out")
    assert name not in leftovers(tmp_path / "out")
    assert f"{name}.partial" not in leftovers(tmp_path / "out")


def test_a_listing_without_sizes(hub: Hub, tmp_path: Path) -> None:
    hub.blobs = False
    for _ in range(2):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "model.safetensors.partial").write_bytes(b"unknown")
        assert not pull("hf:me/tiny", tmp_path / "out").cached
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    hub.cut_after = 1000
    with pytest.raises(DownloadError, match="broke off"):
        pull("hf:me/tiny", tmp_path / "other")
    assert "model.safetensors" not in leftovers(tmp_path / "other")


@pytest.mark.parametrize("name", ["../model.safetensors", "a/../../model.safetensors", "..\\model.safetensors"])
def test_names_outside_the_folder_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files[name] = b"evil"
    with pytest.raises(DownloadError, match="outside the folder"):
        pull("hf:me/tiny", tmp_path / "a" / "out")
    assert leftovers(tmp_path / "a") == []


def test_shards_outside_the_folder_are_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "../evil.safetensors"}}).encode()
    with pytest.raises(DownloadError, match="outside the folder"):
        pull("hf:me/tiny", tmp_path / "out")


@pytest.mark.parametrize("name", ["hf:", "hf:me", "hf:me/../x", "hf:../x", "hf:me/tiny/a/b.gguf", "hf:me/tiny?x=1"])
def test_names_that_are_not_repositories(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="OWNER/REPO"):
        pull(name, tmp_path / "out")
    assert hub.requests == []


def test_a_repository_without_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"README.md": b"", "pytorch_model.bin": b"pickle"}
    with pytest.raises(DownloadError, match="nothing was fetched"):
        pull("hf:me/tiny", tmp_path / "out")


def test_a_repository_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404") as caught:
        pull("hf:me/other", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        pull("hf:me/tiny", tmp_path / "out")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(UsageError, match="http"):
        pull("hf:me/tiny", tmp_path / "out")


def test_an_endpoint_that_answers_something_else(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "row", lambda name: "not a row")
    with pytest.raises(DownloadError, match="list of files"):
        pull("hf:me/tiny", tmp_path / "out")


def test_the_token_goes_to_the_endpoint_and_nowhere_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(DownloadError, match="HF_TOKEN"):
        pull("hf:me/tiny", tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "secret")
    store = Hub()  # where large files are kept: another host
    store.files, hub.redirect_to = hub.files, store.url
    pull("hf:me/tiny", tmp_path / "out")
    store.server.shutdown()
    store.server.server_close()
    assert all(headers.get("Authorization") == "Bearer secret" for _, headers in hub.requests[1:])
    assert len(store.requests) == 3
    assert not any("Authorization" in headers for _, headers in store.requests)


def test_the_token_survives_a_redirect_within_the_endpoint(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "secret"
    answer = hub.answer

    def renamed(h: BaseHTTPRequestHandler) -> None:
        if "/old/" in h.path:
            h.send_response(307)
            h.send_header("Location", h.path.replace("/old/", "/me/"))
            h.send_header("Content-Length", "0")
            h.end_headers()
        else:
            answer(h)

    monkeypatch.setattr(hub, "answer", renamed)
    pull("hf:old/tiny", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS

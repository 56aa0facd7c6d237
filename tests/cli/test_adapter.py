"""--adapter of the verbs that run a bundle."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import gptedge
from gptedge.cli import main
from gptedge.runtime.session import Session


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_and_chat_answer_as_the_merged_model(
    adapted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--adapter", adapted / "a.onnx_adapter")
    generated = [
        said(capsys, "generate", adapted / bundle, "The quick", "--max-tokens", 12, *more)["token_ids"]
        for bundle, more in (("bundle", options), ("a-bundle", ()), ("bundle", ()))
    ]
    assert generated[0] == generated[1] != generated[2]
    chats = []
    for bundle, more in (("bundle", options), ("a-bundle", ()), ("bundle", ())):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"over the lazy dog\n")))
        chats.append(said(capsys, "chat", adapted / bundle, "--max-tokens", 12, *more)["messages"])
    assert chats[0] == chats[1] != chats[2]


def test_bench_runs_with_it(adapted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used, call = [], Session._call

    def watched(self: Session, graph: Any, feeds: Any, cache: Any, *more: Any) -> Any:
        used.append(cache.adapter)
        return call(self, graph, feeds, cache, *more)

    monkeypatch.setattr(Session, "_call", watched)
    monkeypatch.setattr("gptedge.evaluate.bench.memory_bandwidth", lambda threads: 1e10)  # which takes seconds
    numbers = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--roofline")
    assert said(capsys, "bench", adapted / "bundle", *numbers, "--adapter", adapted / "a.onnx_adapter")
    assert used
    assert all(used)


@pytest.mark.parametrize("verb", ["generate", "chat", "bench", "serve"])
def test_what_is_no_adapter_is_refused(verb: str, adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--port", "0"] if verb == "serve" else ["hi"] if verb == "generate" else []
    assert main([verb, str(adapted / "bundle"), *more, "--adapter", str(adapted / "a")]) == 2
    assert "make a file of it with gptedge adapter" in capsys.readouterr().err


def test_it_can_be_loaded_with_the_bundle(adapted: Path) -> None:
    with (
        gptedge.load(adapted / "bundle", adapter=adapted / "a.onnx_adapter") as model,
        gptedge.load(adapted / "a-bundle") as merged,
    ):
        assert model.generate("The quick", max_tokens=12) == merged.generate("The quick", max_tokens=12)


async def _swapped(adapted: Path) -> list[str]:
    async with await gptedge.AsyncModel.load(adapted / "bundle") as model:
        texts = [await model.generate("The quick", max_tokens=12)]
        model.adapter = await model.load_adapter(adapted / "a.onnx_adapter")
        assert model.adapter is model.model.adapter
        return [*texts, await model.generate("The quick", max_tokens=12)]


def test_an_async_model_takes_it(adapted: Path) -> None:
    import asyncio

    plain, with_it = asyncio.run(_swapped(adapted))
    with gptedge.load(adapted / "a-bundle") as merged:
        assert with_it == merged.generate("The quick", max_tokens=12) != plain


def test_a_destination_that_is_a_folder_is_refused_at_once(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", str(adapted / "a"), str(adapted / "bundle"), str(tmp_path), "--force"]) == 2
    assert "is a folder, and the output is a file" in capsys.readouterr().err

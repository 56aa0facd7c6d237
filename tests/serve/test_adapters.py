"""LoRA adapters that a server offers as models of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import gptedge
from gptedge.errors import UsageError
from gptedge.serve.engine import load_variants
from gptedge.serve.settings import ServerSettings
from tests.serve.conftest import Running

QUESTION = "over the lazy dog"


@pytest.fixture(scope="module")
def server(adapted: Path) -> Iterator[Running]:
    """Of one slot, so that requests follow each other in one cache."""
    files = tuple(adapted / f"{name}.onnx_adapter" for name in "ab")
    with gptedge.load(adapted / "bundle", threads=1) as model:
        running = Running(model, ServerSettings(adapters=files, slots=1)).start()
        yield running
        running.client.close()
        running.stop()


def test_the_model_field_chooses_the_adapter(adapted: Path, server: Running) -> None:
    expected = {}
    for name, bundle in (("bundle", "bundle"), ("a", "a-bundle"), ("b", "b-bundle")):
        with gptedge.load(adapted / bundle, threads=1) as merged:
            expected[name] = merged.chat(max_tokens=12).send(QUESTION).text
    assert len(set(expected.values())) == 3
    for name in ("a", "bundle", "b", "b", "a"):
        answer = server.chat(QUESTION, model=name, max_tokens=12).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, expected[name])
    plain = server.chat(QUESTION, max_tokens=12).json()
    assert (plain["model"], plain["choices"][0]["message"]["content"]) == ("bundle", expected["bundle"])


def test_a_conversation_goes_on_in_the_cache_of_its_adapter(server: Running) -> None:
    def cached(name: str) -> int:
        usage = server.chat(QUESTION, model=name, max_tokens=4).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached("a")
    assert cached("a") > 5
    assert cached("b") == 0


def test_all_are_listed(server: Running) -> None:
    assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["bundle", "a", "b"]
    assert server.client.get("/v1/models/b").json()["id"] == "b"
    error = server.chat("hi", model="c").json()["error"]
    assert error["message"] == "the model \"c\" is not served here; 'bundle' and 'a' and 'b' are"


def test_two_of_one_name_are_refused(adapted: Path, tmp_path: Path) -> None:
    file = adapted / "a.onnx_adapter"
    (tmp_path / "bundle.onnx_adapter").write_bytes(file.read_bytes())
    with gptedge.load(adapted / "bundle", threads=1) as model:
        for files in ([file, file], [tmp_path / "bundle.onnx_adapter"]):
            with pytest.raises(UsageError, match="as another is; rename one of them"):
                load_variants(model, files)

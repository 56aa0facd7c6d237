"""The whole line on real input: the demo without a network, and SmolLM2 against transformers. It takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

import gptedge
from tests.conftest import gptedge_json

QUESTION = "What is gravity? Answer in two sentences."


@pytest.mark.slow
def test_demo_without_a_package_index(tmp_path: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "GPTEDGE_HOME": str(tmp_path / "home")}
    got = gptedge_json("demo", "--out", tmp_path / "demo", "--train-seconds", "20", **offline)
    assert [row["bundle"] for row in got["rows"]] == ["nano-fp32", "nano-int8", "nano-int4"]
    assert got["skipped"]
    fp32, int8, int4 = got["rows"]
    assert fp32["size_mb"] > int8["size_mb"] > int4["size_mb"]
    assert abs(int8["ppl_increase"]) < 0.02
    assert got["chat_command"] == f"gptedge chat {tmp_path / 'demo' / 'nano-int8'}"
    # What the trainer wrote is a checkpoint to others.
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "nano")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "demo" / "nano")
    with gptedge.load(tmp_path / "demo" / "nano-fp32") as ours:
        ids = tokenizer("The with statement is used to").input_ids
        assert ids == ours.tokenizer.encode("The with statement is used to")
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
        assert list(ours.run("The with statement is used to", max_tokens=60).token_ids) == theirs


@pytest.mark.slow
def test_smollm2_greedy_tokens_are_those_of_transformers(smollm2: Path) -> None:
    import torch
    import transformers

    (file,) = smollm2.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=file.name, dtype=torch.float32)
    with gptedge.load(smollm2 / "fp32") as model:
        for prompt in ("The history of the steam engine begins", "def quicksort(items):\n"):
            ids = model.tokenizer.encode(prompt)
            expected = theirs.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=80, do_sample=False
            )
            assert list(model.run(prompt, max_tokens=80).token_ids) == expected[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4-rtn"])
def test_smollm2_answers(smollm2: Path, recipe: str) -> None:
    got = gptedge_json("generate", smollm2 / recipe, QUESTION, "--chat")
    assert got["finish_reason"] == "stop"
    assert got["text"].startswith("Gravity is a fundamental concept in")
    with gptedge.load(smollm2 / recipe) as model:
        chat = model.chat(max_tokens=40)
        first = chat.send(QUESTION)
        second = chat.send("Who discovered it?")
        assert len(second.text) > 20
        assert second.timings.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1

"""Other runtimes, in environments of their own, give the greedy tokens that gptedge gives on the very same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest

import gptedge
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.session import Session

HERE = Path(__file__).parent
PROMPTS = ("Once upon a time, in a small village by the sea,", "def quicksort(items):\n")  # no recipe ends these early
SENTENCE = "It's 1,234 o'clock: naïve cafés in Zürich (and 東京) don't open  before 10\tAM!\n"
COUNT = 64

pytestmark = pytest.mark.slow


def greedy(session: Session, prompt: list[int]) -> list[int]:
    """Token by token, as peers run them: several rows at once, which check guesses, round otherwise."""
    cache = session.new_cache()
    logits, tokens = session.prefill(prompt, cache), []
    while logits is not None and len(tokens) < COUNT:
        tokens.append(int(logits.argmax()))
        logits = session.run(tokens[-1:], cache)[0]
    return tokens


def ask(peer: str, program: str, bundle: Path, **work: Any) -> dict[str, Any]:
    try:
        return peers.run_json(peer, HERE / program, {"bundle": str(bundle), "count": COUNT, **work})
    except peers.NoPackageIndex as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4-rtn"])
def test_onnxruntime_genai(smollm2: Path, recipe: str) -> None:
    check_in_genai(smollm2 / recipe)


def test_onnxruntime_genai_over_an_int8_cache(smollm2: Path, tmp_path: Path) -> None:
    text = Path(__file__).parents[2] / "README.md"
    check_in_genai(quantize(smollm2 / "fp32", tmp_path / "kv", recipe="int4-rtn", kv="int8", calibration=text).bundle)


def check_in_genai(bundle: Path) -> None:
    with gptedge.load(bundle) as model:
        prompts = [model.tokenizer.encode(text) for text in PROMPTS]
        encoded = model.tokenizer.encode(SENTENCE)
        ours = [greedy(model.session, ids) for ids in prompts]
    theirs = ask("genai", "genai_program.py", bundle, prompts=prompts, texts=[*PROMPTS, SENTENCE])
    assert theirs["tokens"] == ours
    assert theirs["encoded"] == [*prompts, encoded]


def test_optimum(smollm2: Path) -> None:
    with gptedge.load(smollm2 / "fp32") as model:
        prompts = [model.tokenizer.encode(text) for text in PROMPTS]
        ours = [greedy(model.session, model.tokenizer.encode(text)) for text in PROMPTS]
    assert ask("optimum", "optimum_program.py", smollm2 / "fp32", prompts=prompts)["tokens"] == ours

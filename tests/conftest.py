"""A tiny random model, exported and quantized once for all tests, with sizes that are not round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptedge.checkpoint import TOKENIZER, TOKENIZER_CONFIG, write_checkpoint
from gptedge.config import ModelConfig
from gptedge.families import tensor_shapes
from gptedge.runtime.generate import Result, Stream
from gptedge.tokenizer import Tokenizer, train_bpe

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. 0123456789 and then some more text, so that merges are learned; "
    "漢字かな交じり文と絵文字 👩‍👩‍👧 لغة עברית naïve café. "
) * 20


def pytest_configure() -> None:
    """A suite that a shell runs in the background ignores Ctrl+C, and so would the commands that it starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 330, special_tokens=[END, "<|system|>", USER, ASSISTANT])


def tiny_config(vocab_size: int, **changes: object) -> ModelConfig:
    shape = {
        "n_layer": 3,
        "n_head": 6,
        "n_kv_head": 2,
        "n_embd": 84,
        "head_dim": 16,
        "n_ff": 150,
        "context_length": 300,
    }
    return ModelConfig(**{**shape, "vocab_size": vocab_size, "rope_theta": 5000.0, **changes})  # type: ignore[arg-type]


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights whose logits are spread enough that greedy decoding does not hang on ties."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        scale = 1.0 if "embed" in name else 1.6 / np.sqrt(shape[-1])
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
        weights[name] = values if len(shape) == 2 else 1 + 0.2 * values
    return weights


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test stays in the user's own cache, or comes from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    folder.mkdir()
    tokenizer = make_tokenizer()
    config = tiny_config(tokenizer.vocab_size + 3)  # padded, as real vocabularies are
    end = tokenizer.token_to_id(END)
    assert end is not None
    side_files = {
        TOKENIZER: json.dumps(tokenizer.to_dict()).encode(),
        TOKENIZER_CONFIG: json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "bos_token": END,
                "chat_template": TEMPLATE,
            }
        ).encode(),
    }
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    write_checkpoint(folder, config, random_weights(config), side_files, token_ids=ids)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    from gptedge.export.exporter import export

    return export(tiny_checkpoint, tiny_checkpoint.parent / "fp32").bundle


@pytest.fixture(scope="session")
def adapted(tiny_checkpoint: Path) -> Path:
    """A folder with a bundle that takes adapters, two of them, and the merged models' bundles."""
    from gptedge.checkpoint import open_checkpoint
    from gptedge.export.adapter import make_adapter
    from gptedge.export.exporter import export
    from tests.adapters import write_random

    folder = tiny_checkpoint.parent / "adapted"
    export(tiny_checkpoint, folder / "bundle", lora_inputs=True)
    for seed, name in enumerate("ab"):
        write_random(open_checkpoint(tiny_checkpoint), folder / name, seed)
        export(folder / f"{name}-merged", folder / f"{name}-bundle", verify=False)
        make_adapter(folder / name, folder / "bundle", folder / f"{name}.onnx_adapter")
    return folder


@pytest.fixture(scope="session")
def portable_bundle(tiny_checkpoint: Path) -> Path:
    """The same model with standard operators alone; its KV cache grows."""
    from gptedge.export.exporter import export

    return export(tiny_checkpoint, tiny_checkpoint.parent / "portable", portable=True).bundle


@pytest.fixture(scope="session", params=["int8", "int8-block", "int8-weight", "int4-rtn", "int4"])
def quantized_bundle(request: pytest.FixtureRequest, tiny_bundle: Path) -> Path:
    from gptedge.quantize.quantizer import quantize

    return quantize(tiny_bundle, tiny_bundle.parent / request.param, recipe=request.param).bundle


@pytest.fixture(scope="session", params=["int8-weight", "int8", "int8-block", "int4-rtn"])
def small_cache_bundle(request: pytest.FixtureRequest, tiny_bundle: Path) -> Path:
    """A bundle whose keys and values are int8."""
    return _with_small_cache(tiny_bundle, request.param)


@pytest.fixture(scope="session")
def float_small_cache_bundle(tiny_bundle: Path) -> Path:
    """One of these whose activations are never rounded."""
    return _with_small_cache(tiny_bundle, "int8-weight")


def _with_small_cache(bundle: Path, recipe: str) -> Path:
    from gptedge.quantize.quantizer import quantize

    out = bundle.parent / f"{recipe}-kv"
    return out if out.exists() else quantize(bundle, out, recipe=recipe, kv="int8").bundle


def read_to_end(stream: Stream) -> Result:
    """A reply, read to its end."""
    for _ in stream:
        pass
    return stream.result


def prepared_prompts(vocab_size: int, count: int) -> list[list[int]]:
    """Token ids of prompts, half of which repeat themselves."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, vocab_size - 3, rng.integers(4, 60)).tolist() for _ in range(count)]
    return [p * 2 if i % 2 else p for i, p in enumerate(prompts)]


def gptedge_json(*arguments: object, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "gptedge", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the GGUF and the three bundles made of it, each by the command; half a minute."""
    folder = tmp_path_factory.mktemp("smollm2")
    pulled = gptedge_json("pull", "smollm2-135m-instruct", "--out", folder)
    exported = gptedge_json("export", pulled["path"], folder / "fp32")
    assert exported["parity"]["greedy_tokens_equal"] == exported["parity"]["greedy_tokens_compared"]
    for recipe, limit in (("int8", 142), ("int4-rtn", 92)):
        made = gptedge_json("quantize", folder / "fp32", folder / recipe, "--recipe", recipe, "--max-size-mb", limit)
        assert made["gates"][0]["ok"]
    return folder

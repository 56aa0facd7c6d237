"""The tokenizers that GGUF files describe, against Hugging Face's."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex as TokenizersRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.sources.gguf_file import open_gguf
from gptedge.export.sources.gguf_tokenizer import read_tokenizer
from tests.export.gguf_files import (
    Arrays,
    byte_alphabet,
    byte_tokens,
    hf_weights,
    llama_keys,
    save,
    tiny_llama,
    to_gguf,
)

TEXT = "The quick brown fox's 12345 jumps over 67 lazy dogs; été 東京!\n\n  x = y_1 + 3.14\r\n\tWE'RE done…  "


def trained(pre: Any, normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_alphabet(), special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3, "then they gather there"] * 3, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, name: str | None, /, **more: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t == "<|end|>" else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    metadata |= {"tokenizer.ggml.pre": name} if name else {}
    return metadata | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    made = read_tokenizer(Path("x.gguf"), metadata)
    assert made is not None
    return Tokenizer.from_str(json.dumps(made.tokenizer_json))


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizersRegex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PUBLISHED = {
    "gpt-2": (BYTE_LEVEL, None),
    "default": (BYTE_LEVEL, None),
    None: (BYTE_LEVEL, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]), None),
    "olmo": (BYTE_LEVEL, normalizers.NFC()),
    "dbrx": (split(WORDS % r"\p{N}{1,3}"), None),
    "llama-bpe": (split(WORDS % r"\p{N}{1,3}"), None),
    "qwen2": (split(WORDS % r"\p{N}"), normalizers.NFC()),
}


@pytest.mark.parametrize("pre", PUBLISHED, ids=str)
def test_byte_level_tokenizers_are_the_published_ones(pre: str | None) -> None:
    published = trained(*PUBLISHED[pre])
    ours = rebuilt(metadata_of(published, pre, add_bos_token=False))
    for text in (TEXT, "123456 1 22 333", "e\u0301te\u0301", "don't DON'T", "a<|end|>b", "  \n \n x", "\u2167 ½"):
        assert ours.encode(text).ids == published.encode(text).ids, text
        assert ours.pre_tokenizer.pre_tokenize_str(text) == published.pre_tokenizer.pre_tokenize_str(text)
        assert ours.decode(ours.encode(text).ids) == published.decode(published.encode(text).ids)


def test_published_patterns_differ_on_these_texts() -> None:
    """The test above can tell them apart."""
    made = trained(BYTE_LEVEL)
    splits = {
        pre: str(rebuilt(metadata_of(made, pre)).pre_tokenizer.pre_tokenize_str(TEXT)) for pre in PUBLISHED if pre
    }
    assert len(set(splits.values())) == len(splits) - 3  # default and olmo are as gpt-2, dbrx as llama-bpe


def test_llama3_takes_whole_tokens_before_merges() -> None:
    made = trained(*PUBLISHED["llama-bpe"])
    metadata = metadata_of(made, "llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"].append("Ġgathering")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert rebuilt(metadata).encode(" gathering").tokens == ["Ġgathering"]


def test_beginning_token_is_added_when_the_file_says_so() -> None:
    made = trained(*PUBLISHED["llama-bpe"])
    plain = made.encode("they").ids
    assert rebuilt(metadata_of(made, "llama-bpe")).encode("they").ids == [0, *plain]  # llama.cpp's default for it
    assert rebuilt(metadata_of(made, "llama-bpe", add_bos_token=False)).encode("they").ids == plain
    assert rebuilt(metadata_of(made, "gpt-2")).encode("they").ids == plain
    both = rebuilt(metadata_of(made, "gpt-2", add_bos_token=True, add_eos_token=True))
    assert both.encode("they").ids == [0, *plain, 0]
    assert both.encode("they", add_special_tokens=False).ids == plain


def test_kinds_of_tokens(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    llama_keys(w)
    vocab = byte_tokens(w, [("<s>", 3), ("<tool>", 4), ("[PAD260]", 5)])
    for name, array in to_gguf(hf_weights(np.random.default_rng(0), vocab)).items():
        w.add_tensor(name, array)
    save(w)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    tokenizer = json.loads(checkpoint.side_files["tokenizer.json"])
    added = {t["content"]: (t["id"], t["special"]) for t in tokenizer["added_tokens"]}
    assert added == {"<s>": (258, True), "<tool>": (259, False)}
    assert "[PAD260]" not in tokenizer["model"]["vocab"]
    assert checkpoint.hf_config["vocab_size"] == vocab == 261
    made = Tokenizer.from_str(checkpoint.side_files["tokenizer.json"].decode())
    assert made.encode("a<tool>the<s>").tokens == ["a", "<tool>", "the", "<s>"]
    assert made.decode(made.encode("a<tool>the<s>").ids) == "a<tool>the"


def test_side_files(llama: tuple[Path, Arrays]) -> None:
    files = open_gguf(llama[0]).side_files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_prefix_space": False,
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages[0]['content'] }}",
    }
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 258, "eos_token_id": 259}
    assert files["chat_template.jinja"] == b"{{ messages[0]['content'] }}"


def test_end_of_turn_stops_generation_too(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: w.add_eot_token_id(260))
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert json.loads(checkpoint.side_files["generation_config.json"])["eos_token_id"] == [259, 260]
    assert checkpoint.hf_config["eos_token_id"] == 259


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"pre": "tekken"}, UnsupportedModelError, "'tekken'"),
        ({"model": "bert"}, UnsupportedModelError, "'bert'"),
        ({"token_type": [1, 2]}, CheckpointError, "token_type"),
        ({"tokens": "x"}, CheckpointError, "tokens"),
        ({"merges": ["a b c"]}, CheckpointError, "'a b c'"),
        ({"eos_token_id": 9999}, CheckpointError, "9999"),
        ({"model": "llama"}, CheckpointError, "scores"),
    ],
)
def test_tokenizers_that_are_refused(change: dict[str, Any], kind: type[Exception], word: str) -> None:
    metadata = metadata_of(trained(BYTE_LEVEL), None, **change)
    with pytest.raises(kind, match=word):
        read_tokenizer(Path("x.gguf"), metadata)


# ---- SentencePiece -------------------------------------------------------------------------------------------------


def spm_metadata(pieces: list[str], scores: list[float], **more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 259 + scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}


def spm_encode(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's own rule, slowly: join the neighbours with the best score, leftmost first, while any can be."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_sentencepiece_is_exact() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        alphabet = "▁abc"[: 3 + seed % 2]
        pieces = sorted({"".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(25)} - set(alphabet))
        rng.shuffle(pieces)
        pieces += alphabet
        scores = {p: -float(i) for i, p in enumerate(pieces)}
        tokenizer = rebuilt(spm_metadata(pieces, list(scores.values()), add_bos_token=False))
        for _ in range(20):
            text = "".join(rng.choices(alphabet.replace("▁", " "), k=rng.randint(1, 30)))
            assert tokenizer.encode(text).tokens == spm_encode(text, scores), text
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_bytes_and_special_tokens() -> None:
    tokenizer = rebuilt(spm_metadata(["▁a", "▁", "a"], [-0.0, -1.0, -2.0]))
    encoded = tokenizer.encode("a é</s>")
    assert encoded.tokens == ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(encoded.ids) == "a é"


def test_sentencepiece_with_equal_scores_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="one score"):
        rebuilt(spm_metadata(["ab", "ba", "a", "b"], [-1.0, -1.0, -2.0, -3.0]))

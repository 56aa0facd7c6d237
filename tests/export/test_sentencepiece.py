"""SentencePiece models that the real trainer made, against SentencePiece itself and transformers' conversion."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from gptedge import safetensors
from gptedge.checkpoint import TOKENIZER
from gptedge.errors import CheckpointError, GptEdgeError, UnsupportedModelError
from gptedge.export.sources import open_source
from gptedge.export.sources.gguf_tokenizer import read_tokenizer
from gptedge.export.sources.sentencepiece_model import read_sentencepiece
from gptedge.tokenizer import Tokenizer
from tests.tokenizer.conftest import PROSE, fuzz_strings

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
GEMMA = {
    **PLAIN,
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁"],
    "allow_whitespace_only_pieces": True,
}


ODD = ["tab\tnew\nline", "𒀀 unseen 漢", "a  b   c", "", "<0x41>"]


def train(**options: Any) -> bytes:
    out = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "character_coverage": 0.98, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.split("\n") * 3),
        model_writer=out,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return out.getvalue()


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (PLAIN, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama, as it was": (PLAIN, {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_eos_token": True}),
    "phi3": (
        PLAIN,
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1": {"content": "<s>", "special": True},
                "2": {"content": "</s>", "special": False, "rstrip": True},
                "700": {"content": "<|im_start|>", "special": True},
                "701": {"content": "<tool>", "special": False, "rstrip": True},
            },
        },
    ),
    "gemma": (GEMMA, {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer.model and no tokenizer.json."""
    settings, config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("spm")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer.model").write_bytes(train(**settings))
    (path / "tokenizer_config.json").write_text(json.dumps({**names, "add_bos_token": True, **config}))
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    safetensors.write(path / "model.safetensors", {})
    return path


def ours_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_dict(json.loads(open_source(folder).side_files[TOKENIZER]))


def test_every_string_as_transformers_encodes_it(folder: Path) -> None:
    ours = ours_of(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in fuzz_strings(1500, seed=3):
        expected = theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), repr(text)


def test_ordinary_text_as_sentencepiece_encodes_it(folder: Path) -> None:
    """Without special tokens, and without spaces before it: there SentencePiece puts one more, as llama.cpp does."""
    ours = ours_of(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [PROSE, *map(str.strip, PROSE.split("\n")), *PROSE.split(), *ODD]:
        assert ours.encode(text) == theirs.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == text


def test_a_gguf_file_holds_the_same_tokenizer(folder: Path) -> None:
    """Pieces, scores and kinds as llama.cpp's converter writes them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = processor.get_piece_size()
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in range(count)
    ]
    pieces = [processor.id_to_piece(i) for i in range(count)]
    scores = [processor.get_score(i) for i in range(count)]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    defined = {"<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁"}
    kinds = [4 if p in defined else k for p, k in zip(pieces, kinds, strict=True)]
    pieces = [p.replace("▁", " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)]
    metadata = {
        "model": "llama",
        "tokens": pieces,
        "token_type": kinds,
        "scores": scores,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_bos_token": True,
        "add_space_prefix": config["tokenizer_class"] == "LlamaTokenizer",
    }
    made = read_tokenizer(Path("x.gguf"), {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    assert made is not None
    ours = Tokenizer.from_dict(json.loads(json.dumps(made.tokenizer_json)))
    for text in [PROSE, *PROSE.split("\n"), *PROSE.split(), *ODD, " lead", "   three"]:
        assert ours.encode(text) == processor.encode(text), repr(text)
        assert ours.encode(text, add_special_tokens=True) == [processor.bos_id(), *processor.encode(text)]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({**PLAIN, "model_type": "unigram"}, "unigram"),
        ({**PLAIN, "model_type": "char", "byte_fallback": False}, "char"),
        ({**PLAIN, "normalization_rule_name": "nmt_nfkc"}, "'nmt_nfkc'"),
        ({**PLAIN, "remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_models_that_are_refused_by_name(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    with pytest.raises(UnsupportedModelError, match=word):
        read_sentencepiece(tmp_path / "tokenizer.model", {})


DAMAGE: list[Callable[[bytes], bytes]] = [
    lambda b: b"",
    lambda b: b[:-7],
    lambda b: b"IQ== 0\nIg== 1\n",
    lambda b: b[1:],
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models_are_one_line(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(train(**PLAIN)))
    with pytest.raises(GptEdgeError) as caught:
        read_sentencepiece(path, {})
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("stated", [{"x": {}}, {"1": "a"}, [1], {"1": {"special": True}}])
def test_malformed_added_tokens(stated: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**PLAIN))
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        read_sentencepiece(tmp_path / "tokenizer.model", {"added_tokens_decoder": stated})

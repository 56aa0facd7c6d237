"""Tokenizers inside GGUF files, as Hugging Face's tokenizer.json and tokenizer_config.json.

A GGUF file holds tokens, their kinds and merges, but of the text splitting only a name (`tokenizer.ggml.pre`); what the
names stand for is a table here, and a name that is not in it is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gptedge.errors import CheckpointError, UnsupportedModelError

Json = dict[str, Any]

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Key of config.json and generation_config.json, and of tokenizer_config.json -> key of the metadata.
_SPECIAL = (
    ("bos_token_id", "bos_token", "bos_token_id"),
    ("eos_token_id", "eos_token", "eos_token_id"),
    ("pad_token_id", "pad_token", "padding_token_id"),
    (None, "unk_token", "unknown_token_id"),
)
_SPACE = "▁"  # what SentencePiece writes for a space
_ALSO_STOPS = ("eot_token_id", "eom_token_id")  # end of turn, end of message


@dataclass(frozen=True)
class GgufTokenizer:
    tokens: list[str]
    tokenizer_json: Json
    tokenizer_config: Json
    ids: Json
    """bos_token_id and the like, for config.json."""
    stop_ids: Json = field(default_factory=dict)
    """eos_token_id as a list, where more than one token ends a reply; for generation_config.json."""


def _byte_level(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# The pattern that Llama 3 and Qwen2 share, but for how many digits stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    steps: Json
    normalizer: Json | None = None
    ignore_merges: bool = False
    """A word that is a token as it stands is not built up from merges."""
    add_bos: bool = False
    """When the file does not say."""


_GPT2 = _PreTokenizer(_byte_level(use_regex=True))
_LLAMA3 = _PreTokenizer(
    _sequence(_split(_WORDS % "{1,3}"), _byte_level(use_regex=False)), ignore_merges=True, add_bos=True
)
_QWEN2 = _PreTokenizer(_sequence(_split(_WORDS % ""), _byte_level(use_regex=False)), normalizer={"type": "NFC"})
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _PreTokenizer(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))),
    "olmo": _PreTokenizer(_byte_level(use_regex=True), normalizer={"type": "NFC"}),  # GPT-NeoX's too
    "dbrx": _PreTokenizer(_LLAMA3.steps),  # OLMo 2's
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> GgufTokenizer | None:
    """The file's tokenizer; None when it has none. Raises UnsupportedModelError naming a kind that is not known."""
    model = metadata.get("tokenizer.ggml.model", "none")
    if model == "none":
        return None
    if model not in _MODELS:
        known = ", ".join(_MODELS)
        raise UnsupportedModelError(f"{path}: GGUF tokenizer {model!r} is not supported; known are {known}")
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type is not a list of {len(tokens)} kinds, one a token")
    return _MODELS[model](path, metadata, tokens, kinds)


def _byte_level_bpe(path: Path, metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> GgufTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UnsupportedModelError(f"{path}: GGUF pre-tokenizer {name!r} is not supported; known are {known}")
    row = _PRE_TOKENIZERS[name]
    special = _special_tokens(path, metadata, tokens)
    bos, eos = _added_around(metadata, special, default_bos=row.add_bos)
    merges = [_merge(path, line) for line in _strings(path, metadata, "tokenizer.ggml.merges")]
    byte_level = _byte_level(use_regex=True)
    tokenizer_json = _tokenizer_json(
        tokens,
        kinds,
        merges,
        normalizer=row.normalizer,
        pre_tokenizer=row.steps,
        post_processor=_template(tokens, bos, eos),
        decoder=byte_level | {"add_prefix_space": True},
        model={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": row.ignore_merges},
    )
    # The class that every runtime knows as byte-level BPE; how text is split stands in tokenizer.json.
    config = _tokenizer_config("GPT2Tokenizer", metadata, tokens, special, bos) | {"add_prefix_space": False}
    return GgufTokenizer(tokens, tokenizer_json, config, *_ids(special))


def _sentencepiece_bpe(path: Path, metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> GgufTokenizer:
    """Llama's SentencePiece model: pieces and scores become merges in the order of the scores."""
    special = _special_tokens(path, metadata, tokens)
    unknown = special.get("unknown_token_id", 0)
    bos, eos = _added_around(metadata, special, default_bos=True)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tokenizer_json = _tokenizer_json(
        tokens,
        kinds,
        _merges_by_score(path, metadata, tokens, kinds),
        normalizer={
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), to_mark],
        },
        pre_tokenizer=None,
        post_processor=_template(tokens, bos, eos),
        decoder={
            "type": "Sequence",
            "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
        },
        model={"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
    )
    config = _tokenizer_config("LlamaTokenizer", metadata, tokens, special, bos)
    config |= {"unk_token": tokens[unknown], "legacy": True, "add_prefix_space": prefix}
    return GgufTokenizer(tokens, tokenizer_json, config, *_ids(special))


def _merges_by_score(
    path: Path, metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first.

    SentencePiece joins the pair whose piece has the best score, the leftmost of equals. Ranks say the same as long as
    no two pieces that can be joined have one score, so a model that has such is refused.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores is not a list of {len(tokens)} numbers, one a token")
    number = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL}
    joined = {t: pairs for t in number if (pairs := _pairs(t, number))}
    in_order = sorted(joined, key=lambda t: scores[number[t]], reverse=True)
    for one, other in pairwise(in_order):
        if scores[number[one]] == scores[number[other]]:
            raise UnsupportedModelError(
                f"{path}: the SentencePiece tokens {one!r} and {other!r} have one score, "
                f"which tokenizer.json cannot express"
            )
    return [pair for t in in_order for pair in joined[t]]


def _pairs(piece: str, number: Mapping[str, int]) -> list[tuple[str, str]]:
    cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    return sorted(((a, b) for a, b in cuts if a in number and b in number), key=lambda p: (number[p[0]], number[p[1]]))


_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


# ---- pieces of tokenizer.json --------------------------------------------------------------------------------------


def _tokenizer_json(
    tokens: list[str],
    kinds: list[int],
    merges: Sequence[Sequence[str]],
    *,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    post_processor: Json | None,
    decoder: Json,
    model: Json,
) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, token, special=kind != _USER_DEFINED)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
            # Unused tokens only fill the table up to the embedding's rows.
            "vocab": {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED},
            "merges": merges,
        },
    }


def _added_token(number: int, content: str, *, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": content, **flags}


def _template(tokens: list[str], bos: int | None, eos: int | None) -> Json | None:
    """A post-processor that puts the beginning and end tokens around a text."""
    if bos is None and eos is None:
        return None

    def around(sequence: str, type_id: int) -> list[Json]:
        middle = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*mark(bos, type_id), middle, *mark(eos, type_id)]

    def mark(token: int | None, type_id: int) -> list[Json]:
        return [] if token is None else [{"SpecialToken": {"id": tokens[token], "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            tokens[t]: {"id": tokens[t], "ids": [t], "tokens": [tokens[t]]} for t in (bos, eos) if t is not None
        },
    }


def _merge(path: Path, line: str) -> list[str]:
    pair = line.split(" ")
    if len(pair) != 2:
        raise CheckpointError(f"{path}: the merge {line!r} is not two tokens")
    return pair


# ---- ids and configuration -----------------------------------------------------------------------------------------


def _strings(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{path} has no list of strings {key} in its metadata")
    return value


def _special_tokens(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Metadata's key (bos_token_id, …) -> token, of those that the file names."""
    found: dict[str, int] = {}
    for key in (*(theirs for _, _, theirs in _SPECIAL), *_ALSO_STOPS):
        number = metadata.get(f"tokenizer.ggml.{key}")
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.{key} is {number!r}, and there are {len(tokens)} tokens")
        found[key] = number
    return found


def _added_around(
    metadata: Mapping[str, Any], special: Mapping[str, int], *, default_bos: bool
) -> tuple[int | None, int | None]:
    """The tokens to put before and after every text, if any."""
    bos = special.get("bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", default_bos) else None
    eos = special.get("eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    return bos, eos


def _tokenizer_config(
    name: str, metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, int], bos: int | None
) -> Json:
    config: Json = {"tokenizer_class": name}
    config |= {ours: tokens[special[theirs]] for _, ours, theirs in _SPECIAL if theirs in special}
    if bos is not None or "tokenizer.ggml.add_bos_token" in metadata:
        config["add_bos_token"] = bos is not None
    if "tokenizer.ggml.add_eos_token" in metadata:
        config["add_eos_token"] = bool(metadata["tokenizer.ggml.add_eos_token"])
    return config


def _ids(special: Mapping[str, int]) -> tuple[Json, Json]:
    """Ids for config.json, and what generation_config.json says otherwise."""
    ids: Json = {ours: special[theirs] for ours, _, theirs in _SPECIAL if ours and theirs in special}
    stops = list(dict.fromkeys(special[key] for key in ("eos_token_id", *_ALSO_STOPS) if key in special))
    return ids, {"eos_token_id": stops} if len(stops) > 1 else {}

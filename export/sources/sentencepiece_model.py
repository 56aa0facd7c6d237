"""A SentencePiece model (tokenizer.model) as a tokenizer.json, for folders that have no other tokenizer.

Does: BPE models without text normalization, as Llama 2, Mistral, Phi-3 and Gemma publish them, with or without byte
fallback, and the added tokens that tokenizer_config.json lists. The result is what transformers makes of the same file.
Does not: unigram models and normalizing ones, which are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptedge.errors import CheckpointError, MissingExtraError, UnsupportedModelError

Json = dict[str, Any]

_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}  # TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.Type
_SPACE = "▁"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Json:
    """tokenizer.json's content; `config` is tokenizer_config.json's. CheckpointError, UnsupportedModelError."""
    model = _parse(path)
    kind = _KINDS.get(model.trainer_spec.model_type, "unknown")
    if kind != "BPE":
        raise UnsupportedModelError(f"{path} is a SentencePiece {kind} model; only BPE models are supported")
    _refuse_normalizing(path, model.normalizer_spec)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    prefix = bool(config.get("add_prefix_space", model.normalizer_spec.add_dummy_prefix))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(path, model, config),
        **_text_steps(prefix, legacy=bool(config.get("legacy", False))),
        "post_processor": _template(vocab, config),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab),
        },
    }


def _parse(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2  # the extra `export` has it; needed for such folders only
    except ImportError:
        raise MissingExtraError(
            f'reading {path} needs the sentencepiece package; pip install "gptedge[export]"'
        ) from None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made by protobuf at import
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as e:  # protobuf's DecodeError has no public home that stays put
        raise CheckpointError(f"{path} is not a SentencePiece model ({type(e).__name__})") from None
    if not model.pieces:
        raise CheckpointError(f"{path} is not a SentencePiece model: it has no pieces")
    return model


def _refuse_normalizing(path: Path, spec: Any) -> None:
    """What changes the text before it is split, and tokenizer.json could say only in part."""
    changes = {
        f"normalization {spec.name!r}": bool(spec.precompiled_charsmap),
        "remove_extra_whitespaces": spec.remove_extra_whitespaces,
        "no escape_whitespaces": not spec.escape_whitespaces,
    }
    for what, is_set in changes.items():
        if is_set:
            raise UnsupportedModelError(f"{path} is a SentencePiece model with {what}, which is not supported")


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others. Pieces are numbered in the order they were learned in."""
    pairs = (
        (i, cut, (piece[:cut], piece[cut:]))
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    return [pair for _, _, pair in sorted(pairs)]


def _text_steps(prefix: bool, *, legacy: bool) -> Json:
    """Normalizer, pre-tokenizer and decoder. Today's Llamas put a space only before a text, older ones before each part
    between special tokens, and Gemma nowhere."""
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    scheme = "always" if legacy else "first"
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    unmark = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": None if prefix else mark,
        "pre_tokenizer": metaspace if prefix else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
        },
    }


def _added_tokens(path: Path, model: Any, config: Mapping[str, Any]) -> list[Json]:
    """The model's own, then those of tokenizer_config.json, which may say something else of the same ones."""
    roles = {_content(value) for key, value in config.items() if key.endswith("_token") and value}
    roles |= {"<mask>"} if str(config.get("tokenizer_class")).startswith("Gemma") else set()  # its class's default
    found = {
        i: _added_token(i, piece.piece, special=piece.type != _USER_DEFINED or piece.piece in roles)
        for i, piece in enumerate(model.pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    try:
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            content, special = str(token["content"]), bool(token.get("special", False))
            made = _added_token(int(key), content, special=special or content in roles)
            stated = {flag: bool(token[flag]) for flag in _FLAGS[:-1] if flag in token}
            found[int(key)] = made | {"normalized": not made["special"], **stated}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path.parent}: added_tokens_decoder in tokenizer_config.json is malformed") from None
    return [found[i] for i in sorted(found)]


def _added_token(number: int, content: str, *, special: bool) -> Json:
    return {"id": number, "content": content, **dict.fromkeys(_FLAGS, False), "special": special}


def _template(vocab: Mapping[str, int], config: Mapping[str, Any]) -> Json | None:
    """A post-processor that puts the beginning and end tokens around a text, where tokenizer_config.json wants them."""
    wanted = (("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False))
    names = {role: _content(config.get(role)) for role, flag, default in wanted if config.get(flag, default)}
    known = {role: name for role, name in names.items() if name in vocab}
    if not known:
        return None

    def around(sequence: str, number: int) -> list[Json]:
        bos, eos = (
            [{"SpecialToken": {"id": known[role], "type_id": number}}] if role in known else []
            for role in ("bos_token", "eos_token")
        )
        return [*bos, {"Sequence": {"id": sequence, "type_id": number}}, *eos]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in known.values()},
    }


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")

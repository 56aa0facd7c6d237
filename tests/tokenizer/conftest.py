"""Strings that break tokenizers, and small tokenizers of every supported make beside Hugging Face's own."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from gptedge.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, Tokenizer

GPT4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_PATTERN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

PROSE = """The quick brown fox doesn't jump over the lazy dog's bed; it's 3,141.59 metres away, isn't it? We'll see —
they'd said "hello, world" in 1984. Naïve café owners déjà vu. Привет, как дела? Τι κάνεις; Straße, GROẞ.
İstanbul'da ılık. 今天天气很好，我们去公园散步吧。日本語の文章も少し。カタカナとひらがな。한국어 문장입니다.
مرحبا بالعالم، كيف حالك؟ שָׁלוֹם עוֹלָם.
def f(x: int) -> int:\n    return x ** 2 if x >= 0 else -x  # comment\n\n\tfor i in range(10):\n\t\tprint(f"{i:>3}")\n
https://example.com/a?b=c&d=%20e  <html><body class="x">&amp;</body></html> {"key": [1, 2, null]} 👩‍💻👍🏽 ∑∫√ ½ ① Ⅷ ٣٤
"""
WORDS = [
    *PROSE.split(),
    "'s",
    "'S",
    "'LL",
    "'ll",
    "’s",
    "I'VE",
    "don't",
    "'re",
    "'ſ",
    "Don'T",
    "we'D",
    "Kelvin K",
    "ﬁﬂﬆ",
]
EMOJI = ["👩‍💻", "👨‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "❤️", "‍", "️", "🏽", "1️⃣", "😀"]
SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\v",
    "\f",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u2029",
]
SPACES += ["\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\x1c", "\x1f", "▁", "▁▁", " ▁", "Ġ", "Ċ"]
MARKS = [
    "\u0301",
    "\u0323",
    "\u0308",
    "\u05b8",
    "\u05bc",
    "\u0651",
    "\u064e",
    "\u3099",
    "\u0f71",
    "\u0f72",
    "\u1ab0",
    "\u20dd",
    "\u1dfa",
    "\u0897",
]
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "<tool>",
    "Word",
    "<mask>",
    "[A]",
    "[a]",
    "<0x0A>",
    "<0xFF>",
]
PARTS = [
    "<|im_",
    "<|",
    "|>",
    "<|im_start",
    "im_end|>",
    "<s",
    "s>",
    "<",
    ">",
    "endoftext",
    "<|im_start|",
    "Words",
    "aWord",
    "<0x",
    "[",
    "]",
]
RANGES = [(0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x1100, 0x1200)]
RANGES += [(0x1E00, 0x2000), (0x2000, 0x2800), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xF900, 0xFFFE)]
RANGES += [
    (0x10000, 0x10400),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1FB00),
    (0x20000, 0x2A6E0),
    (0, 0xD800),
    (0xE000, 0x110000),
]
DIGITS = "0123456789٣٤५๗０９½²Ⅷ①〇五𝟘𝟡㊿"


def _scalars(rng: random.Random) -> str:
    low, high = rng.choice(RANGES)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 12)))


def _slice(rng: random.Random) -> str:
    start = rng.randrange(len(PROSE))
    return PROSE[start : start + rng.randrange(1, 60)]


PIECES: list[Callable[[random.Random], str]] = [
    lambda r: r.choice(WORDS),
    lambda r: " " + r.choice(WORDS),
    lambda r: r.choice(WORDS).upper(),
    lambda r: r.choice(EMOJI) * r.randrange(1, 4),
    lambda r: r.choice(SPACES) * r.randrange(1, 4),
    lambda r: r.choice("aeiouאبक가ß") + "".join(r.choices(MARKS, k=r.randrange(1, 4))),
    lambda r: "".join(r.choices(DIGITS, k=r.randrange(1, 9))),
    lambda r: r.choice(SPECIALS),
    lambda r: r.choice(SPECIALS) + r.choice(PARTS) + r.choice(SPECIALS),
    lambda r: r.choice(PARTS),
    lambda r: r.choice(["a", "ab", " ", "\n", "=", "-", "…", "哈", "'", "0"]) * r.randrange(2, 150),
    _scalars,
    _slice,
]


def fuzz_strings(count: int, seed: int) -> Iterator[str]:
    """`count` strings without lone surrogates, the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PIECES)(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6, 9))))


@dataclass(frozen=True)
class Pair:
    """The same tokenizer.json in both hands."""

    source: dict[str, Any]
    ours: Tokenizer
    theirs: tokenizers.Tokenizer


def added(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": 0, "content": content, **{n: flags.get(n, False) for n in names}, "special": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}
CHATML = [added("<|endoftext|>"), added("<|im_start|>"), added("<|im_end|>")]
LLAMA = [added("<unk>"), added("<s>"), added("</s>"), added("<tool>", special=False, normalized=True)]


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False, is_regex: bool = True) -> dict[str, Any]:
    kind = "Regex" if is_regex else "String"
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(field: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", field: list(blocks)}


def pre(*blocks: dict[str, Any]) -> dict[str, Any]:
    return sequence("pretokenizers", *blocks)


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def replace(old: str, new: str, *, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def template(*names: tuple[str, int], after: tuple[tuple[str, int], ...] = ()) -> dict[str, Any]:
    def piece(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*(piece(n) for n, _ in names), {"Sequence": {"id": "A", "type_id": 0}}, *(piece(n) for n, _ in after)]
    tokens = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in (*names, *after)}
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": tokens}


def byte_level_model() -> dict[str, Any]:
    """A model trained by Hugging Face on the prose, 256 bytes and 300 merges."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [t["content"] for t in CHATML]
    t.train_from_iterator(
        [PROSE] * 3,
        trainers.BpeTrainer(vocab_size=560, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return json.loads(t.to_str())["model"]


def sentencepiece_model(*, byte_fallback: bool, **options: Any) -> dict[str, Any]:
    """A model over characters with ▁ for a space, as Llama 2 has; half of the prose's characters are unknown to it."""
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256) if byte_fallback)]
    t.train_from_iterator(
        PROSE.split("\n")[::2], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    model = json.loads(t.to_str())["model"]
    return model | {"byte_fallback": byte_fallback, "fuse_unk": True} | options


def subword_model() -> dict[str, Any]:
    """A model with ## before inner subwords and </w> after last ones."""
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>"],
        continuing_subword_prefix="##",
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    t.train_from_iterator([PROSE], trainer)
    return json.loads(t.to_str())["model"]


def without_merges_of(model: dict[str, Any], start: int) -> dict[str, Any]:
    """Merges as older files hold them, "a b", from `start` on: vocabulary that only `ignore_merges` reaches."""
    return model | {
        "merges": [" ".join(m) for m in model["merges"][start:] if " " not in m[0] + m[1]],
        "ignore_merges": True,
    }


STRIP_START = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK = {"type": "ByteFallback"}
FUSE = {"type": "Fuse"}


@cache
def sources() -> dict[str, dict[str, Any]]:
    """tokenizer.json of each make, by name."""
    byte = byte_level_model()
    fallback = sentencepiece_model(byte_fallback=True)
    decode_llama = sequence("decoders", replace("▁", " "), FALLBACK, FUSE, STRIP_START)
    begin = template(("<s>", 1), after=(("</s>", 2),))
    nothing = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
    base = {"version": "1.0", "truncation": None, "padding": None} | nothing
    bytes_base = base | {"model": byte, "decoder": BYTE_LEVEL, "added_tokens": CHATML}
    pieces_base = base | {"model": fallback, "decoder": decode_llama, "added_tokens": LLAMA}
    prefixed = {"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))}
    return {
        "gpt2": bytes_base | {"pre_tokenizer": BYTE_LEVEL},
        "gpt2 prefix": bytes_base
        | {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}, "post_processor": BYTE_LEVEL},
        "llama3": bytes_base
        | {
            "pre_tokenizer": pre(split(LLAMA3_PATTERN), BYTES_ONLY),
            "model": without_merges_of(byte, 0),
            "post_processor": sequence("processors", BYTE_LEVEL, template(("<|endoftext|>", 0))),
            "added_tokens": [*CHATML, added("<s>"), added("</s>"), added("<tool>", special=False)],
        },
        "qwen2": bytes_base
        | {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": pre(split(QWEN2_PATTERN), BYTES_ONLY),
            "added_tokens": [*CHATML, added("<tool>", special=False), added("[A]", special=False, normalized=True)],
        },
        "gpt-neox": bytes_base
        | {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": BYTE_LEVEL | {"add_prefix_space": False},
            "added_tokens": [
                *CHATML,
                *(added(" " * n, special=False, normalized=True) for n in (4, 3, 2)),
                added("<tool>", special=False, normalized=True),
            ],
        },
        "smollm": bytes_base | {"pre_tokenizer": pre({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)},
        "gpt4o": bytes_base | {"pre_tokenizer": pre(split(GPT4O_PATTERN), BYTES_ONLY)},
        "deepseek": bytes_base
        | {"pre_tokenizer": pre(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_PATTERN), BYTES_ONLY)},
        "possessive": bytes_base
        | {"pre_tokenizer": pre(split(POSSESSIVE_PATTERN, "Removed", invert=True), BYTES_ONLY)},
        "ignore merges": bytes_base | {"model": without_merges_of(byte, 150), "pre_tokenizer": BYTE_LEVEL},
        "bytes then split": bytes_base
        | {"pre_tokenizer": pre(BYTES_ONLY, split("Ġ", "MergedWithNext", is_regex=False), {"type": "Punctuation"})},
        "llama2": pieces_base | prefixed | {"post_processor": begin},
        "llama2 normalized": pieces_base
        | prefixed
        | {
            "added_tokens": [added("<unk>"), added("<s>", normalized=True), added("</s>", normalized=True, rstrip=True)]
        },
        "mistral": pieces_base | {"pre_tokenizer": metaspace("first", split=False), "post_processor": begin},
        "gemma": pieces_base
        | {
            "normalizer": replace(" ", "▁"),
            "pre_tokenizer": split(" ", "MergedWithPrevious", is_regex=False),
            "decoder": sequence("decoders", replace("▁", " "), FALLBACK, FUSE),
        },
        "gemma3": pieces_base
        | {
            "normalizer": replace(" ", "▁"),
            "pre_tokenizer": split(" ", "MergedWithPrevious", is_regex=False),
            "post_processor": template(("<s>", 1)),
            "decoder": sequence("decoders", replace("▁", " "), FALLBACK, FUSE),
            "added_tokens": [*LLAMA, *(added(t, special=False) for t in ("\n\n", "\n", "▁▁", "▁▁▁", "<table>", "[A]"))],
        },
        "metaspace": pieces_base
        | {
            "normalizer": {"type": "Strip", "strip_left": True, "strip_right": False},
            "pre_tokenizer": pre({"type": "WhitespaceSplit"}, metaspace("always", split=True)),
            "decoder": metaspace("always", split=True),
            "model": sentencepiece_model(byte_fallback=False, fuse_unk=False),
        },
        "metaspace first": pieces_base
        | {
            "normalizer": sequence(
                "normalizers",
                {"type": "Strip", "strip_left": True, "strip_right": True},
                replace("[A-Z]{2}", "", kind="Regex"),
            ),
            "pre_tokenizer": pre(split("[.!]", "Removed"), metaspace("first", split=True)),
            "decoder": sequence("decoders", FALLBACK, metaspace("never", split=True)),
            "model": sentencepiece_model(byte_fallback=True, fuse_unk=False),
        },
        "subwords": base
        | {
            "normalizer": sequence("normalizers", {"type": "NFKC"}, {"type": "Lowercase"}),
            "pre_tokenizer": pre({"type": "Whitespace"}, {"type": "Digits", "individual_digits": False}),
            "model": subword_model() | {"fuse_unk": True},
            "added_tokens": [added("<unk>"), added("Word", special=False, normalized=True)],
        },
        "decomposed": bytes_base
        | {
            "normalizer": {"type": "NFD"},
            "pre_tokenizer": pre({"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL),
        },
        "compatibility": bytes_base
        | {"normalizer": {"type": "NFKD"}, "pre_tokenizer": pre(split(r"\w+|\s", "MergedWithPrevious"), BYTES_ONLY)},
        "flags": bytes_base
        | {
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": BYTE_LEVEL,
            "added_tokens": [
                *CHATML,
                added("<mask>", lstrip=True),
                added("</s>", rstrip=True),
                added("<s>", lstrip=True, rstrip=True),
                added("Word", single_word=True, special=False),
                added("[A]", normalized=True, special=False, single_word=True, lstrip=True),
                added("<tool>", normalized=True, rstrip=True),
            ],
        },
    }


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    return {
        name: Pair(source, Tokenizer.from_dict(source), tokenizers.Tokenizer.from_str(json.dumps(source)))
        for name, source in sources().items()
    }


@pytest.fixture(scope="session")
def strings() -> Callable[[int, int], Iterator[str]]:
    return fuzz_strings


@pytest.fixture
def gpt2_source() -> dict[str, Any]:
    """A byte-level tokenizer.json to change."""
    return copy.deepcopy(sources()["gpt2"])

"""Every id and every decoded character equals Hugging Face's."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import tokenizers

from gptedge.errors import DataError
from gptedge.tokenizer import Tokenizer

STRINGS_EACH = 2_600  # times 22 makes: 57,200
SCALARS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
MAKES = [
    "gpt2", "gpt2 prefix", "llama3", "qwen2", "smollm", "gpt4o", "deepseek", "possessive", "ignore merges",
    "bytes then split", "llama2", "llama2 normalized", "mistral", "gemma", "metaspace", "metaspace first", "subwords",
    "decomposed", "compatibility", "flags", "gpt-neox", "gemma3",
]  # fmt: skip


def both(source: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return Tokenizer.from_dict(source), tokenizers.Tokenizer.from_str(json.dumps(source))


def check(pair: Any, text: str, ids: list[int]) -> None:
    """Encode `text` and decode what comes out, and decode `ids`, in both hands."""
    expected = pair.theirs.encode(text, add_special_tokens=False).ids
    assert pair.ours.encode(text) == expected, repr(text)
    for some in (expected, ids):
        for skip in (True, False):
            theirs = pair.theirs.decode(some, skip_special_tokens=skip)
            assert pair.ours.decode(some, skip_special_tokens=skip) == theirs, some


def test_all_makes_are_fuzzed(pairs):
    assert sorted(MAKES) == sorted(pairs)
    assert STRINGS_EACH * len(MAKES) >= 50_000


@pytest.mark.parametrize("make", MAKES)
def test_fuzz(make, pairs, strings):
    rng = random.Random(make)
    size = pairs[make].theirs.get_vocab_size() + 3
    for text in strings(STRINGS_EACH, MAKES.index(make)):
        check(pairs[make], text, [rng.randrange(size) for _ in range(rng.randrange(12))])


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
def test_fuzz_long(make, pairs, strings):
    rng = random.Random(make)
    size = pairs[make].theirs.get_vocab_size() + 3
    for text in strings(10_000, 1000 + MAKES.index(make)):
        check(pairs[make], text, [rng.randrange(size) for _ in range(rng.randrange(12))])


@pytest.mark.slow
@pytest.mark.parametrize("make", ["qwen2", "subwords"])
def test_every_scalar_value(make, pairs):
    for i in range(0, len(SCALARS), 100):
        for gap in ("", "a", " 1"):
            check(pairs[make], gap.join(SCALARS[i : i + 100]), [])


@pytest.mark.parametrize("make", MAKES)
def test_special_tokens_around(make, pairs, strings):
    for text in strings(200, 5):
        assert pairs[make].ours.encode(text, add_special_tokens=True) == pairs[make].theirs.encode(text).ids


def test_a_text_that_goes_on_has_no_beginning(pairs):
    """Behind a special token, its tokens are those that the whole text has there: no space is put before it."""
    ours = pairs["mistral"].ours
    special = next(ours.id_to_token(i) for i in sorted(ours.special_ids))
    for rest in ("one two", "\none", "1"):
        whole = ours.encode(special + rest)
        assert ours.encode(special) + ours.encode(rest, continued=True) == whole, rest
        assert ours.encode(special) + ours.encode(rest) != whole, rest


def test_template_adds_tokens(pairs):
    llama2 = pairs["llama2"].ours
    ids = llama2.encode("a", add_special_tokens=True)
    assert (ids[0], ids[-1], ids[1:-1]) == (1, 2, llama2.encode("a"))


@pytest.mark.parametrize("make", MAKES)
def test_special_text_as_ordinary_text(make, pairs, strings):
    source = pairs[make].source
    ours, theirs = both(source)
    theirs.encode_special_tokens = True
    for text in strings(400, 9):
        ids = ours.encode(text, parse_special=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert not (ours.special_ids - {ours.token_to_id("<unk>")}) & set(ids)


def test_ordinary_text_never_reaches_a_special_id_through_the_vocabulary(gpt2_source):
    """Hugging Face leaks a special token that `ignore_merges` or a merge reaches."""
    model = gpt2_source["model"]
    gpt2_source["pre_tokenizer"]["use_regex"] = False
    model["ignore_merges"] = True
    merged = next("".join(m) for m in model["merges"] if "".join(m).isascii() and len("".join(m)) > 2)
    gpt2_source["added_tokens"] += [gpt2_source["added_tokens"][0] | {"content": merged}]
    tokenizer = Tokenizer.from_dict(gpt2_source)
    for text in ("<|im_start|>", merged, merged + merged):
        assert tokenizer.special_ids & set(tokenizer.encode(text))
        ids = tokenizer.encode(text, parse_special=False)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("make", ["gpt2", "llama2", "llama3"])
@pytest.mark.parametrize("unit", ["a", "ab", "The", "今天", "=-", "\n", "é"])
def test_long_word_is_exact_and_not_quadratic(make, unit, pairs):
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    ids = pairs[make].ours.encode(text)
    assert time.perf_counter() - start < 15  # a quadratic merge takes hours
    assert ids == pairs[make].theirs.encode(text, add_special_tokens=False).ids


def test_cache_stays_bounded(pairs, monkeypatch):
    monkeypatch.setattr("gptedge.tokenizer.bpe._CACHE_WORDS", 50)
    ours, theirs = both(pairs["gpt2"].source)
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400))
    assert ours.encode(text) == theirs.encode(text).ids
    assert 0 < len(ours._model) <= 50


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_refused_in_one_line(text, pairs):
    with pytest.raises(DataError, match=r"lone surrogate U\+D[8-F]") as e:
        pairs["gpt2"].ours.encode(text)
    assert "\n" not in str(e.value)


def test_unknown_token_that_the_vocabulary_lacks_is_named(pairs):
    source = dict(pairs["llama2"].source)
    source["model"] = source["model"] | {"unk_token": "<nope>", "byte_fallback": False}
    with pytest.raises(Exception, match="'<nope>' is not in the vocabulary"):
        Tokenizer.from_dict(source).encode("𒀀")


ODD_MERGES = [
    ["ab c", "a b", "a a", "aa b", "b c", "a bc", "aa a", "abc abc"],  # a high rank opens a low one
    ["b c", "a b", "a bc", "c a", "aa b", "a a"],  # a queued pair grows before its turn
    ["a a", "aa aa", "a b", "aa b", "aa a"],  # overlaps
]


@pytest.mark.parametrize("merges", ODD_MERGES)
def test_merge_ranks_that_training_never_writes(merges):
    tokens = dict.fromkeys(["a", "b", "c", *(m.replace(" ", "") for m in merges)])
    vocab = {c: i for i, c in enumerate(tokens)}
    empty = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    ours, theirs = both({"version": "1.0", "truncation": None, "padding": None, **empty, "model": model})
    rng = random.Random(3)
    for length in [*range(1, 40), 90, 101, 150, 400]:
        for _ in range(20):
            text = "".join(rng.choices("abc", k=length))
            assert ours.encode(text) == theirs.encode(text).ids, text

"""Decoding one id at a time gives the text of decoding all at once, whole characters only."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import tokenizers

from gptedge.tokenizer import Tokenizer


def stream_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    return "".join([*(stream.step(i) for i in ids), stream.flush()])


def test_random_ids_and_real_texts(pairs, strings):
    rng = random.Random(11)
    for pair in pairs.values():
        size = pair.ours.vocab_size + 3
        for text in strings(150, 21):
            random_ids = [rng.randrange(size) for _ in range(rng.randrange(40))]
            for ids in (random_ids, pair.ours.encode(text)):
                for skip in (True, False):
                    theirs = pair.theirs.decode(ids, skip_special_tokens=skip)
                    assert stream_text(pair.ours, ids, skip) == theirs


def test_bytes_of_broken_utf8(pairs):
    """Runs of bytes near the edges of UTF-8: overlong forms, surrogates, too large, cut short."""
    gpt2, llama2 = pairs["gpt2"], pairs["llama2"]
    interesting = [
        0x00,
        0x41,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC2,
        0xDF,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
        0xFF,
    ]
    by_byte = {gpt2.ours.token_bytes(i): i for i in range(gpt2.ours.vocab_size)}
    rng = random.Random(2)
    for _ in range(3000):
        run = rng.choices(interesting, k=rng.randrange(1, 7))
        theirs = [llama2.ours.token_to_id(f"<0x{b:02X}>") for b in run]
        for pair, ids in ((gpt2, [by_byte[bytes([b])] for b in run]), (llama2, theirs)):
            assert stream_text(pair.ours, ids, True) == pair.theirs.decode(ids)


def test_characters_arrive_whole_and_at_once(pairs):
    ours = pairs["gpt2"].ours
    text = "日本 👩‍💻 ok"
    stream = ours.decode_stream()
    parts = [stream.step(i) for i in ours.encode(text)]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert "" in parts  # some token ended inside a character
    assert stream.flush() == ""


def test_byte_fallback_waits_for_the_end_of_a_run(pairs):
    ours = pairs["llama2"].ours
    stream = ours.decode_stream()
    ids = [ours.token_to_id(f"<0x{b:02X}>") for b in "日".encode()] + [ours.token_to_id("a")]
    assert [stream.step(i) for i in ids] == ["", "", "", "日a"]


def test_an_incomplete_character_is_flushed_as_decode_gives_it(pairs):
    ours = pairs["gpt2"].ours
    ids = ours.encode("日")[:-1]
    stream = ours.decode_stream()
    assert "".join(stream.step(i) for i in ids) == ""
    assert stream.flush() == "\ufffd" == ours.decode(ids)


def test_two_streams_do_not_mix(pairs):
    ours = pairs["gpt2"].ours
    first, second = ours.decode_stream(), ours.decode_stream()
    ids = ours.encode("日")
    first.step(ids[0])
    assert second.flush() == ""


def test_each_step_costs_the_same(pairs):
    """400,000 steps; decoding the reply anew at each step would take hours."""
    ours = pairs["llama2"].ours
    ids = ours.encode("the lazy dog " * 10) * 4000
    stream = ours.decode_stream()
    start = time.perf_counter()
    for i in ids[:400_000]:
        stream.step(i)
    assert time.perf_counter() - start < 20


def strip(start: int, stop: int, content: str = "a") -> dict[str, Any]:
    return {"type": "Strip", "content": content, "start": start, "stop": stop}


def replace(kind: str, old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "a", "prepend_scheme": scheme, "split": True}


FUSE, FALLBACK = {"type": "Fuse"}, {"type": "ByteFallback"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
CHAINS = [
    [FUSE, replace("String", "ab", "X")],
    [FUSE, strip(2, 0)],
    [FUSE, strip(0, 1)],
    [FUSE, FALLBACK],
    [FUSE, metaspace("always")],
    [BYTES, strip(3, 0, "b")],
    [FUSE, BYTES],
    [strip(1, 0), replace("Regex", "b+", "<0x41>"), FALLBACK],
    [metaspace("first"), FUSE, FUSE],
    [replace("String", "a", "\u00a9"), metaspace("never"), BYTES],
]


@pytest.mark.parametrize("decoders", CHAINS)
def test_decoders_in_every_order(decoders, gpt2_source):
    """Stages behind a Fuse see the text as one token, also when it comes in parts."""
    vocab = {
        t: i for i, t in enumerate(["a", "b", "aab", "ba", "abab", "<0x42>", "<0xC3>", "<0xA9>", "<0x+1>", "é", " "])
    }
    gpt2_source |= {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
    gpt2_source |= {"decoder": {"type": "Sequence", "decoders": decoders}}
    ours, theirs = Tokenizer.from_dict(gpt2_source), tokenizers.Tokenizer.from_str(json.dumps(gpt2_source))
    rng = random.Random(4)
    for _ in range(600):
        ids = [rng.randrange(len(vocab)) for _ in range(rng.randrange(1, 7))]
        assert stream_text(ours, ids, True) == theirs.decode(ids) == ours.decode(ids), ids


def test_token_bytes(pairs):
    gpt2, llama2 = pairs["gpt2"].ours, pairs["llama2"].ours
    text = "日本 naïve 👩‍💻"
    assert b"".join(map(gpt2.token_bytes, gpt2.encode(text))) == text.encode()
    assert b"".join(map(llama2.token_bytes, llama2.encode(text))) == (" " + text).encode()
    assert gpt2.token_bytes(gpt2.token_to_id("<|im_start|>")) == b"<|im_start|>"

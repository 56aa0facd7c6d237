"""What answers look like: OpenAI's shapes, whole and streamed."""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

from gptedge import __version__
from gptedge.config import SamplingParams
from gptedge.runtime.sampling import TokenLogprob
from gptedge.serve.responses import OfText, Source
from gptedge.serve.transport import to_json
from gptedge.tokenizer import Tokenizer
from tests.conftest import make_tokenizer
from tests.serve.conftest import FakeTokenizer

PRINT = f"gptedge-{__version__}"


def test_health_and_models(shared: Any) -> None:
    assert shared.client.get("/health").json() == {"status": "ok"}
    listed = shared.client.get("/v1/models").json()
    created = listed["data"][0]["created"]
    model = {"id": "fake", "object": "model", "created": created, "owned_by": "gptedge"}
    assert listed == {"object": "list", "data": [model]}
    assert shared.client.get("/v1/models/fake").json() == model
    assert abs(created - time.time()) < 600


def test_whole_chat(shared: Any) -> None:
    response = shared.chat("whole", model="fake", max_tokens=3)  # the model continues "e"
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", body["id"])
    assert abs(body["created"] - time.time()) < 60
    assert body == {
        "id": body["id"],
        "object": "chat.completion",
        "created": body["created"],
        "model": "fake",
        "system_fingerprint": PRINT,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "fgh", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len("<user>whole"),
            "completion_tokens": 3,
            "total_tokens": len("<user>whole") + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_whole_completion(shared: Any) -> None:
    body = shared.complete("text x").json()
    assert re.fullmatch("cmpl-[0-9a-f]{24}", body["id"])
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "yz", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["completion_tokens"] == 3  # the end token counts


def test_streamed_chat_byte_for_byte(shared: Any) -> None:
    response = shared.chat("x", stream=True, max_tokens=3)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    answer_id = re.search(r"chatcmpl-[0-9a-f]{24}", response.text)
    created = re.search(r'"created":(\d+)', response.text)
    assert answer_id
    assert created
    head = (
        f'data: {{"id":"{answer_id[0]}","object":"chat.completion.chunk","created":{created[1]},"model":"fake",'
        f'"system_fingerprint":"{PRINT}","choices":[{{"index":0,'
    )
    none = '"logprobs":null,"finish_reason":null}]}\n\n'
    assert response.text == (
        f'{head}"delta":{{"role":"assistant","content":""}},{none}'
        f'{head}"delta":{{"content":"y"}},{none}'
        f'{head}"delta":{{"content":"z"}},{none}'
        f'{head}"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


def test_streamed_completion(shared: Any, events: Any) -> None:
    parts = events(shared.complete("w", stream=True, max_tokens=2))
    assert [p["choices"][0]["text"] for p in parts] == ["x", "y", ""]
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None, None, "length"]
    assert {p["object"] for p in parts} == {"text_completion"}
    assert len({p["id"] for p in parts}) == 1
    assert all("usage" not in p for p in parts)


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_usage_comes_last_and_only_when_asked_for(shared: Any, events: Any, route: str) -> None:
    parts = events(getattr(shared, route)("y", stream=True, stream_options={"include_usage": True}))
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 2
    assert all(p["usage"] is None and p["choices"] for p in parts[:-1])
    for options in (None, {"include_usage": False}, {}):
        parts = events(getattr(shared, route)("y", stream=True, stream_options=options))
        assert all("usage" not in p for p in parts)


def test_a_character_of_several_tokens_comes_whole(shared: Any, events: Any) -> None:
    parts = events(shared.complete("Hi!", stream=True))
    assert [p["choices"][0]["text"] for p in parts] == ["😀", ""]
    assert "😀".encode() in shared.complete("Hi!", stream=True).content


def test_chat_logprobs(shared: Any, events: Any) -> None:
    whole = shared.chat("x", logprobs=True, top_logprobs=2).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert [t["token"] for t in content] == ["y", "z"]  # not the end token
    assert content[0]["bytes"] == [ord("y")]
    assert -0.001 < content[0]["logprob"] <= 0
    assert [set(top) for top in content[0]["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    assert content[0]["top_logprobs"][0]["token"] == "y"
    assert whole["logprobs"]["refusal"] is None
    parts = events(shared.chat("x", logprobs=True, stream=True))
    streamed = [p["choices"][0]["logprobs"] for p in parts]
    assert [s and [t["token"] for t in s["content"]] for s in streamed] == [None, ["y"], ["z"], None]
    assert streamed[1]["content"][0]["top_logprobs"] == []


def test_logprobs_wait_for_the_character_they_belong_to(shared: Any, events: Any) -> None:
    parts = events(shared.complete("!", logprobs=0, stream=True))
    assert parts[0]["choices"][0]["logprobs"]["tokens"] == ["�"] * 4
    assert parts[0]["choices"][0]["text"] == "😀"


def test_completion_logprobs(shared: Any, events: Any) -> None:
    logprobs = shared.complete("w", logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["x", "y"]
    assert logprobs["text_offset"] == [0, 1]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["x"], ["y"]]
    assert logprobs["top_logprobs"][0]["x"] == logprobs["token_logprobs"][0]
    parts = events(shared.complete("w", logprobs=1, max_tokens=2, stream=True))
    assert [p["choices"][0]["logprobs"]["text_offset"] for p in parts[:-1]] == [[0], [1]]


@pytest.mark.parametrize("stop", ["yz", ["z!", "yz"]])
def test_logprobs_end_where_the_text_ends(shared: Any, events: Any, stop: Any) -> None:
    whole = shared.complete("v", logprobs=0, stop=stop).json()["choices"][0]
    assert whole["text"] == "wx"
    assert (whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]) == (["w", "x"], [0, 1])
    assert len(whole["logprobs"]["token_logprobs"]) == 2
    parts = [p["choices"][0] for p in events(shared.complete("v", logprobs=0, stop=stop, stream=True))]
    assert [(p["text"], p["logprobs"] and p["logprobs"]["tokens"]) for p in parts] == [
        ("w", ["w"]), ("x", ["x"]), ("", None),
    ]  # fmt: skip
    chat = shared.chat("x", logprobs=True, stop="y").json()["choices"][0]
    assert (chat["message"]["content"], chat["logprobs"]["content"]) == ("", [])


def test_a_token_of_which_a_part_is_shown_has_its_logprob() -> None:
    def pieces(*chunks: tuple[str, list[int]]) -> list[list[int]]:
        words = ["ba", "c.", "<end>"]
        tokenizer: Any = SimpleNamespace(
            decode_stream=lambda: SimpleNamespace(step=words.__getitem__),
            token_bytes=lambda token: words[token].encode(),
            special_ids=frozenset(),
        )
        of_text = OfText(Source("m", tokenizer, frozenset([2])))
        return [
            [t.token_id for _, t in of_text.take(text, [TokenLogprob(i, 0.0) for i in ids])] for text, ids in chunks
        ]

    assert pieces(("bac", [0, 1, 0, 2])) == [[0, 1]]
    # As a stop string "bab" has it: the second token may be the beginning of one, until there is a third.
    assert pieces(("", [0]), ("ba", [0]), ("bac.", [1]), ("", [2])) == [[], [0], [0, 1], []]


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: bytes for what is no token, and a space before every text, which decoding drops."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return Tokenizer.from_dict(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    back,
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [],
                "byte_fallback": True,
                "unk_token": "<unk>",
            },
        }
    )


@pytest.mark.parametrize("make", [make_tokenizer, byte_fallback])
@pytest.mark.parametrize("text", ["🎉a b", "日本🎉🎉a", "a日本 b🎉", "The quick é", "日"])
def test_a_token_is_placed_where_its_first_byte_is(make: Callable[[], Tokenizer], text: str) -> None:
    """Against all bytes decoded at once."""
    tokenizer = make()
    ids = tokenizer.encode(text)
    parts = [tokenizer.token_bytes(i) for i in ids]
    whole, starts = b"".join(parts), accumulate(map(len, parts[:-1]), initial=0)
    dropped = len(whole.decode()) - len(text)
    expected = [max(len(whole[: start + 1].decode("utf-8", "replace")) - 1 - dropped, 0) for start in starts]

    source, logprobs = Source("m", tokenizer, frozenset()), [TokenLogprob(i, 0.0) for i in ids]
    assert tokenizer.decode(ids) == text
    assert [begin for begin, _ in OfText(source).take(text, logprobs)] == expected
    stream, of_text = tokenizer.decode_stream(), OfText(source)
    streamed = [placed for t in logprobs for placed in of_text.take(stream.step(t.token_id), [t])]
    assert [*streamed, *of_text.take(stream.flush(), None)] == list(zip(expected, logprobs, strict=True))


def test_a_token_with_the_end_of_one_character_and_a_part_of_the_next() -> None:
    class Merged(FakeTokenizer):
        def token_bytes(self, token: int) -> bytes:
            return (b"a\xf0", b"\x9f", b"\x98", b"\x80b", b"c")[token]

        def decode_stream(self) -> Any:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return SimpleNamespace(step=lambda token: decoder.decode(self.token_bytes(token)))

    tokenizer: Any = Merged()
    placed = OfText(Source("m", tokenizer, frozenset())).take("a😀bc", [TokenLogprob(i, 0.0) for i in range(5)])
    assert [begin for begin, _ in placed] == [0, 1, 1, 1, 3]


def test_text_offsets_after_a_character_of_several_tokens(start_server: Any, events: Any) -> None:
    """The model goes on with a digit after the emoji, for ever."""
    server = start_server()
    server.session.follows_emoji = ord("0")
    whole = server.complete("!", logprobs=0, max_tokens=6).json()["choices"][0]
    assert (whole["text"], whole["logprobs"]["text_offset"]) == ("😀01", [0, 0, 0, 0, 1, 2])
    parts = [p["choices"][0] for p in events(server.complete("!", logprobs=0, max_tokens=6, stream=True))]
    assert [(p["text"], p["logprobs"] and p["logprobs"]["text_offset"]) for p in parts] == [
        ("😀", [0, 0, 0, 0]), ("0", [1]), ("1", [2]), ("", None),
    ]  # fmt: skip


def test_the_chosen_token_is_among_the_top_ones_even_when_it_is_not_likely(shared: Any) -> None:
    bias = {str(ord("q")): 50}
    choice = shared.complete("w", logprobs=1, max_tokens=1, logit_bias=bias).json()["choices"][0]
    assert choice["text"] == "q"
    assert list(choice["logprobs"]["top_logprobs"][0]) == ["x", "q"]


@pytest.mark.parametrize("stop", ["e", ["zz", "e"], ["de"]])
def test_stop(shared: Any, stop: Any) -> None:
    choice = shared.chat("a", stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == "bcd"[: 2 if stop == ["de"] else 3]
    assert choice["finish_reason"] == "stop"


def test_stop_is_not_streamed_even_in_part(shared: Any, events: Any) -> None:
    parts = events(shared.complete("a", stop="def", stream=True))
    assert "".join(p["choices"][0]["text"] for p in parts) == "bc"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_has_two_names(shared: Any, name: str) -> None:
    assert shared.chat("0", **{name: 4}).json()["choices"][0]["message"]["content"] == "1234"


def test_max_tokens_defaults_to_that_of_sampling_params(shared: Any) -> None:
    assert shared.chat("0").json()["usage"]["completion_tokens"] == SamplingParams().max_tokens


def test_a_reply_ends_where_the_context_does(start_server: Any) -> None:
    body = start_server(context_length=20).complete("0123456789", max_tokens=500).json()
    assert body["usage"]["total_tokens"] == 20
    assert body["choices"][0]["finish_reason"] == "length"


def test_roles_and_parts_reach_the_template(shared: Any) -> None:
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "A", "refusal": None, "tool_calls": None},
        {"role": "system", "content": "T"},
        {"role": "user", "content": "x", "name": "Ann"},
    ]
    usage = shared.client.post("/v1/chat/completions", json={"messages": messages}).json()["usage"]
    assert usage["prompt_tokens"] == len("<system>S<user>one\ntwoA<system>T<user>x")


def test_prompts_of_token_ids_and_lists_of_one(shared: Any) -> None:
    for prompt in ([ord("x")], ["x"], [[ord("x")]]):
        assert shared.complete(prompt).json()["choices"][0]["text"] == "yz"


def test_sampling_parameters_reach_the_sampler(shared: Any) -> None:
    def text(**p: Any) -> str:
        return str(shared.complete("a", max_tokens=12, temperature=20, **p).json()["choices"][0]["text"])

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text(seed=-1) == text(seed=-1)  # OpenAI's may be negative
    plain = "bcdefghijklm"
    assert text(seed=1) != plain
    assert text(top_k=1) == text(top_p=0.0) == text(min_p=1.0) == plain


@pytest.mark.parametrize("penalty", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_reach_the_sampler(shared: Any, penalty: str) -> None:
    bias = {str(ord("9")): 1}  # what comes instead of a digit that was there already
    text = shared.complete("8", max_tokens=12, logit_bias=bias).json()["choices"][0]["text"]
    assert text == "901234567890"
    text = shared.complete("5", max_tokens=12, logit_bias=bias, **{penalty: 100}).json()["choices"][0]["text"]
    assert text.startswith("67890")
    assert text != "678901234567"


def test_harmless_parameters_are_ignored_and_null_is_the_default(shared: Any) -> None:
    harmless = {"user": "u", "metadata": {}, "store": False, "service_tier": "auto", "n": 1, "tools": []}
    nothing = dict.fromkeys(("temperature", "stop", "logit_bias", "seed", "max_tokens", "top_logprobs", "stream"))
    formats = {"response_format": {"type": "text"}, "parallel_tool_calls": True, "reasoning_effort": "low"}
    assert shared.chat("y", **harmless, **nothing, **formats).json()["choices"][0]["message"]["content"] == "z"


def test_json_is_one_line_for_every_reader() -> None:
    value = {"text": "a\nb\u2028c\u0085d\ud800 é😀"}
    data = to_json(value)
    assert len(data.decode().splitlines()) == 1
    assert "é😀".encode() in data
    import json

    assert json.loads(data) == value

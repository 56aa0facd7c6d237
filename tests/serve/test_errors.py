"""What is refused, and how: status, message, param and code in OpenAI's error object."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from gptedge.serve.settings import MAX_BODY_BYTES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "a"}]

# Parameters added to a good chat request; the part of it at fault; words of the message; code.
BAD_CHAT: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"n": 2}, "n", "n is 2; this server takes only 1", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is", "unsupported_parameter"),
    ({"response_format": {"type": "xml"}}, "response_format", "text, json_object, json_schema", None),
    ({"response_format": "json"}, "response_format", "text, json_object, json_schema", None),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "an object with a schema", None),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
        "response_format.json_schema.schema",
        "known are object",
        None,
    ),
    ({"audio": {"voice": "x"}}, "audio", "takes only null", "unsupported_parameter"),
    ({"repeat_penalty": 1.1}, "repeat_penalty", "did you mean repetition_penalty?", "unknown_parameter"),
    ({"echo": True}, "echo", "not a parameter of this route", "unknown_parameter"),
    ({"temperature": -1}, "temperature", "temperature is -1; it must be a number from 0 to 100", None),
    ({"temperature": "hot"}, "temperature", 'temperature is "hot"; it must be a number', None),
    ({"temperature": True}, "temperature", "temperature is true", None),
    ({"temperature": float("nan")}, "temperature", "temperature is nan", None),
    ({"top_p": 1.5}, "top_p", "from 0 to 1", None),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1", None),
    ({"max_tokens": 2.5}, "max_tokens", "it must be an integer", None),
    ({"max_completion_tokens": "1"}, "max_completion_tokens", "it must be an integer", None),
    ({"top_k": 1.0}, "top_k", "it must be an integer", None),
    ({"seed": 1.5}, "seed", "it must be an integer", None),
    ({"stop": [""]}, "stop", "empty string", None),
    ({"stop": 7}, "stop", "a string or a list of strings", None),
    ({"stop": ["s"] * 17}, "stop", "stop has 17 strings; at most 16", None),
    ({"logit_bias": [1]}, "logit_bias", "an object", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", 'the key "x"', None),
    ({"logit_bias": {"260": 1}}, "logit_bias", "token 260; the model's vocabulary has 260", None),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100", None),
    ({"logprobs": 1}, "logprobs", "true or false", None),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20", None),
    ({"stream": "yes"}, "stream", "true or false", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream", None),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", '"x"', "unknown_parameter"),
    ({"stream": True, "stream_options": []}, "stream_options", "must be an object", None),
    ({"model": 5}, "model", "must be a string", None),
    ({"messages": None}, "messages", "at least one message", None),
    ({"messages": []}, "messages", "at least one message", None),
    ({"messages": ["hi"]}, "messages[0]", "role and content", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", 'is "tool"', None),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of", None),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "is null", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text", None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "null", None),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "text only",
        None,
    ),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "no such message, please", None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate", None),
    ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", "2006 tokens", "context_length_exceeded"),
]

BAD_TEXT: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"prompt": None}, "prompt", "prompt is null", None),
    ({"prompt": ""}, "prompt", "the prompt is empty", None),
    ({"prompt": []}, "prompt", "prompt has 0 prompts", None),
    ({"prompt": ["a", "b"]}, "prompt", "prompt has 2 prompts", None),
    ({"prompt": [1, True]}, "prompt", "a string or a list of token ids", None),
    ({"prompt": [300]}, "prompt", "token id 300 is outside the vocabulary of 260", None),
    ({"prompt": "a" * 2000}, "prompt", "context holds 2000", "context_length_exceeded"),
    ({"echo": True}, "echo", "echo is true", "unsupported_parameter"),
    ({"best_of": 3}, "best_of", "best_of is 3", "unsupported_parameter"),
    ({"suffix": "end"}, "suffix", "suffix is", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "it must be an integer", None),
    ({"messages": HELLO}, "messages", "not a parameter of this route", "unknown_parameter"),
    ({"max_completion_tokens": 3}, "max_completion_tokens", "did you mean max_tokens?", "unknown_parameter"),
]


def check(response: Any, status: int, param: str | None, words: str, code: str | None) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 250
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert error == {"message": error["message"], "type": kind, "param": param, "code": code}


def post(server: Any, route: str, body: dict[str, Any]) -> Any:
    import json

    return server.client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize(("change", "param", "words", "code"), BAD_CHAT, ids=[str(b[0])[:40] for b in BAD_CHAT])
def test_bad_chat(shared: Any, change: dict[str, Any], param: str, words: str, code: str | None) -> None:
    check(post(shared, CHAT, {"messages": HELLO, **change}), 400, param, words, code)


@pytest.mark.parametrize(("change", "param", "words", "code"), BAD_TEXT, ids=[str(b[0])[:40] for b in BAD_TEXT])
def test_bad_completion(shared: Any, change: dict[str, Any], param: str, words: str, code: str | None) -> None:
    check(post(shared, TEXT, {"prompt": "a", **change}), 400, param, words, code)


def test_a_client_is_not_told_what_only_the_server_can_set(shared: Any) -> None:
    message = post(shared, TEXT, {"prompt": "a" * 2000}).json()["error"]["message"]
    assert message.endswith("the reply included; shorten the prompt")


def test_a_streamed_request_is_refused_with_a_status_too(shared: Any) -> None:
    response = post(shared, TEXT, {"prompt": "a" * 2000, "stream": True})
    check(response, 400, "prompt", "tokens", "context_length_exceeded")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xff", b'{"n": 1e', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_bad_json(shared: Any, data: bytes) -> None:
    response = shared.client.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body is")


def test_json_that_is_no_object(shared: Any) -> None:
    response = shared.client.post(CHAT, content=b"[]", headers={"content-type": "application/json"})
    check(response, 400, None, "must be a JSON object", None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types(shared: Any, kind: str | None) -> None:
    """Those are what a web page can send anywhere without asking."""
    response = shared.client.post(CHAT, content=b"{}", headers={"content-type": kind} if kind else {})
    check(response, 415, None, "application/json", None)


def test_a_content_type_may_have_parameters(shared: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert shared.client.post(TEXT, content=b'{"prompt":"y"}', headers=headers).status_code == 200


def test_unknown_model_route_and_method(shared: Any) -> None:
    check(shared.chat("a", model="gpt-9"), 404, "model", "\"gpt-9\" is not served here; 'fake' is", "model_not_found")
    check(shared.client.get("/v1/models/gpt-9"), 404, "model", "gpt-9", "model_not_found")
    check(shared.client.get("/v2"), 404, None, "no route /v2", "unknown_url")
    check(shared.client.get("/health/"), 404, None, "no route /health/", "unknown_url")
    check(shared.client.post("/v1/embeddings", json={}), 404, None, "no route", "unknown_url")
    response = shared.client.get(CHAT)
    check(response, 405, None, "does not take GET", "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES])
def test_too_large_a_body(shared: Any, size: int) -> None:
    response = shared.client.post(CHAT, content=b" " * size, headers={"content-type": "application/json"})
    check(response, 413, None, f"the limit of {MAX_BODY_BYTES} bytes", "body_too_large")


def test_the_largest_body(shared: Any) -> None:
    data = b'{"prompt":"y"}'.ljust(MAX_BODY_BYTES)
    assert shared.client.post(TEXT, content=data, headers={"content-type": "application/json"}).status_code == 200


def test_an_unforeseen_failure_is_500_and_says_nothing_of_its_inside(start_server: Any, caplog: Any) -> None:
    server = start_server()
    server.session.fails = True
    check(server.chat("a"), 500, None, "internal error (ValueError)", None)
    streamed = server.chat("a", stream=True)
    assert streamed.text.endswith(
        'data: {"error":{"message":"internal error (ValueError)","type":"server_error","param":null,"code":null}}\n\n'
    )
    assert "secret detail" in caplog.text
    server.session.fails = False
    assert server.chat("y").json()["choices"][0]["message"]["content"] == "z"


def test_what_is_no_http_at_all(shared: Any) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert shared.client.get("/health").status_code == 200

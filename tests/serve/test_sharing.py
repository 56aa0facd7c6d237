"""Several clients at once: taking turns, waiting, leaving, and finding their KV cache again."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

TOKEN_S = 0.05
MANY = 1500  # tokens; minutes would pass


def test_streams_take_turns(start_server: Any) -> None:
    server = start_server(delay_s=0.01)
    order: list[str] = []

    def read(name: str) -> None:
        with server.streaming("0", max_tokens=60) as lines:
            order.extend(name for _ in lines)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, "ab"))
    assert order.count("a") == order.count("b") == 62  # 60 tokens, the ending, [DONE]
    changes = sum(x != y for x, y in pairwise(order))
    assert changes > 10  # one after the other would be 1


def test_a_second_request_leaves_the_first_alone(start_server: Any) -> None:
    server = start_server(delay_s=0.002, slots=2)
    with server.streaming("0", max_tokens=60) as lines:
        next(lines)
        assert server.complete("x").json()["choices"][0]["text"] == "yz"
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert len(rest) == 61


def test_a_full_context_drops_the_oldest_turns_where_the_server_is_told_to(start_server: Any) -> None:
    turn = [{"role": "user", "content": "abc" * 10}, {"role": "assistant", "content": "x" * 20}]
    body = {"messages": [{"role": "system", "content": "S"}, *turn * 10, {"role": "user", "content": "last"}]}
    assert start_server(context_length=300).client.post("/v1/chat/completions", json=body).status_code == 400
    server = start_server(context_length=300, context_overflow="shift")
    usage = server.client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] <= 150
    assert usage["prompt_tokens_details"]["dropped_tokens"] > 300
    text = server.complete("0" * 500, max_tokens=2).json()
    assert text["usage"]["prompt_tokens"] == 150
    body["messages"] = [{"role": "user", "content": "a" * 400}]
    refused = server.client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_stream_comes_as_it_is_made(start_server: Any) -> None:
    server = start_server(delay_s=TOKEN_S)
    with server.streaming("0", max_tokens=40) as lines:
        next(lines)
        assert server.session.n_tokens_run < 20
        assert len(list(lines)) == 41


def test_a_reader_who_leaves_a_stream_cancels_it(start_server: Any) -> None:
    server = start_server(delay_s=TOKEN_S)
    with server.streaming("0", max_tokens=MANY) as lines:
        next(lines)
    left_at = server.session.n_tokens_run
    server.wait_until_idle()
    assert server.session.n_tokens_run - left_at <= 5


def test_a_reader_who_leaves_a_whole_answer_cancels_it(start_server: Any) -> None:
    server = start_server(delay_s=TOKEN_S)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "0", "max_tokens": MANY}, timeout=0.6)
    left_at = server.session.n_tokens_run
    assert left_at > 1
    server.wait_until_idle()
    assert server.session.n_tokens_run - left_at <= 5


def test_a_reader_who_leaves_while_the_prompt_is_read(start_server: Any) -> None:
    server = start_server(delay_s=0.3, context_length=20_000)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "0" * 5000, "max_tokens": 9}, timeout=0.4)
    server.wait_until(lambda: n_active(server) == 0)
    assert server.session.n_tokens_run < 5000


def n_active(server: Any) -> int:
    return sum(not future.done() for future in list(server.server._engine._active))


def test_the_queue_has_a_bound_and_who_leaves_it_frees_the_place(start_server: Any) -> None:
    server = start_server(delay_s=TOKEN_S, slots=1, max_waiting=1)
    with ThreadPoolExecutor(1) as pool:
        with server.streaming("0", max_tokens=MANY) as lines:
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "waits"}, timeout=0.3)
            server.wait_until(lambda: n_active(server) == 1)
            waiting = pool.submit(server.complete, "x")
            server.wait_until(lambda: n_active(server) == 2)
            refused = server.complete("y")
            assert not waiting.done()
        assert waiting.result(10).json()["choices"][0]["text"] == "yz"
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "the queue of 1 waiting requests is full" in refused.json()["error"]["message"]


def test_a_reader_who_does_not_read_holds_up_nobody(start_server: Any) -> None:
    server = start_server(slots=1)
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    body = b'{"prompt":"0","stream":true,"max_tokens":1500}'  # some 400 kB, far more than is buffered
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.sock.getsockname())
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.wait_until(lambda: server.session.n_tokens_run > 10)
        assert server.complete("x").json()["choices"][0]["text"] == "yz"


def test_the_event_loop_is_free_while_the_model_computes(start_server: Any) -> None:
    server = start_server(delay_s=2.0)
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        answer = pool.submit(server.complete, "0", max_tokens=1)
        server.wait_until(lambda: n_active(server) > 0)
        for _ in range(5):
            assert client.get("/health").status_code == 200
        assert not answer.done()


def test_the_event_loop_is_free_while_a_long_text_is_tokenized(start_server: Any) -> None:
    server = start_server()
    tokenizer = server.server._engine.model.tokenizer
    begun, go_on = threading.Event(), threading.Event()

    def encode(text: str, **options: Any) -> list[int]:
        begun.set()
        assert go_on.wait(10)
        return list(text.encode())

    tokenizer.encode = encode
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, "x")
        assert begun.wait(10)
        assert server.client.get("/health", timeout=3).status_code == 200
        go_on.set()
        assert answer.result(10).status_code == 200


def test_the_next_turn_of_a_chat_runs_only_what_is_new(start_server: Any) -> None:
    server = start_server()
    messages = [{"role": "system", "content": "S" * 300}, {"role": "user", "content": "q 0"}]
    body = {"messages": messages, "max_tokens": 20}
    first = server.client.post("/v1/chat/completions", json=body).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    server.chat("another chat in between", max_tokens=5)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "w"}]
    before = server.session.n_tokens_run
    usage = server.client.post("/v1/chat/completions", json=body).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["total_tokens"] - 1
    assert server.session.n_tokens_run - before == usage["prompt_tokens"] - cached + usage["completion_tokens"] - 1


def test_cached_and_fresh_replies_are_equal(start_server: Any) -> None:
    server = start_server(slots=2)
    prompts = ["abc 5", "abc 57", "abc 5789", "xyz m", "abc 5", "abc 57"] * 3
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda p: server.complete(p, max_tokens=12).json()["choices"][0]["text"], prompts))
    expected = {p: start_server().complete(p, max_tokens=12).json()["choices"][0]["text"] for p in set(prompts)}
    assert texts == [expected[p] for p in prompts]

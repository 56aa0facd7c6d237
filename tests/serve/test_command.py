"""`gptedge serve` from start to end: what it prints, its exit codes, signals; and the official client."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptedge.cli.serve import command
from gptedge.errors import GptEdgeError
from gptedge.serve.server import Server, bind
from gptedge.serve.settings import ServerSettings
from tests.serve.conftest import fake_model

# The command with its bundle replaced by the model of conftest.py.
_SCRIPT = """
import runpy, signal, sys, pathlib
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, or what runs the tests, may have it ignored
import gptedge.loading
fakes = runpy.run_path(sys.argv[1])
def load(bundle, **options):
    model = fakes["fake_model"](pathlib.Path(bundle))
    model.session.delay_s = 0.01
    return model
gptedge.loading.load = load
from gptedge.cli import main
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Any]:
    arguments = [sys.executable, "-c", _SCRIPT, str(Path(__file__).with_name("conftest.py")), str(folder), *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_running_replies_and_the_server(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--port", "0", "--json") as process:
        ready = json.loads(process.stdout.readline())
        assert ready["model"] == "fake"
        body = {"prompt": "0", "max_tokens": 1900, "stream": True}
        with httpx.stream("POST", ready["url"] + "/completions", json=body, timeout=10) as response:
            lines = response.iter_lines()
            next(lines)
            start = time.monotonic()
            process.send_signal(number)
            last = [line for line in lines if line][-1]
        out, err = process.communicate(timeout=10)
    assert '"code":"server_closing"' in last
    assert process.returncode == 130
    assert time.monotonic() - start < 3
    assert out == ""
    assert err.splitlines() == [
        f"gptedge: serving fake at {ready['url']} (context of 2000 tokens); Ctrl+C stops",
        "gptedge: stopped",
    ]


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_hangup_is_handled_unless_it_is_ignored(tmp_path: Path, before: signal.Handlers) -> None:
    server = Server(fake_model(tmp_path), ServerSettings())
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with server.capture_signals():
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert ignored == (before == signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, kept)
        server._engine.close()


def test_a_warning_when_others_can_connect_without_a_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k\n")
    for options, n_warnings in (((), 1), (("--api-key-file", str(key)), 0)):
        with serving(tmp_path, "--port", "0", "--host", "0.0.0.0", "--json", *options) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        assert err.count("warning: anyone who can reach 0.0.0.0") == n_warnings
        assert len(err.splitlines()) == 2 + n_warnings


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(GptEdgeError, match=f"cannot listen on 127.0.0.1 port {port}: .*--port") as error:
            command(tmp_path, port=port)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["no such host", "a..b", "a" * 64 + ".b", "a\0b"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(GptEdgeError, match=f"the host {re.escape(repr(host))} cannot be used: .*; give an address"):
        bind(host, 0)


def test_requests_during_the_closing_get_503(start_server: Any) -> None:
    server = start_server(delay_s=0.01)
    with server.streaming("0", max_tokens=1900) as lines:
        next(lines)
        server.server._engine.close()
        for response in (server.complete("x"), server.client.get("/health")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "2"
            assert response.json()["error"]["code"] == "server_closing"
        assert "server_closing" in list(lines)[-1]


def test_a_whole_answer_under_way_gets_503_when_the_server_closes(start_server: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server = start_server(delay_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, "0", max_tokens=1900)
        server.wait_until(lambda: server.session.n_tokens_run > 3)
        server.server.should_exit = True
        assert answer.result(5).status_code == 503


def _fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_nothing_of_the_server_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, gptedge, gptedge.cli.serve, gptedge.serve\n"
        "print([m for m in ('starlette', 'uvicorn', 'onnxruntime') if m in sys.modules])"
    )
    assert _fresh(code).stdout == "[]\n"


def test_what_to_install_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        f"from gptedge.cli import main; sys.exit(main(['serve', {str(tmp_path)!r}, '--port', '0']))"
    )
    done = _fresh(code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "gptedge[serve]" in done.stderr


@pytest.mark.slow
def test_the_official_client(shared: Any) -> None:
    import openai

    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="any", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["fake"]
        question: list[Any] = [{"role": "user", "content": "a"}]
        answer = client.chat.completions.create(model="fake", messages=question, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == "bcdefghijklmnopqrstuvwxyz"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 26
        chunks = list(
            client.chat.completions.create(
                model="fake", messages=question, stream=True, stream_options={"include_usage": True}
            )
        )
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
        )
        assert chunks[-1].usage == answer.usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
        )
        text = client.completions.create(model="fake", prompt="x", logprobs=1, extra_body={"top_k": 3, "min_p": 0.1})
        assert text.choices[0].text == "yz"
        with pytest.raises(openai.BadRequestError, match="n is 2") as error:
            client.chat.completions.create(model="fake", messages=question, n=2)
        assert error.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-9", prompt="x")

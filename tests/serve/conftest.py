"""A small deterministic model with gptedge's own interface, and real servers of it on free loopback ports.

The model continues text byte by byte: "a" with "bcd…z" and an end, a digit with digits for ever, "!" with an emoji.
"""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from gptedge.bundle import Bundle
from gptedge.chat_template import ChatTemplate
from gptedge.errors import DataError, TokenizerError
from gptedge.graph_io import INPUT_IDS
from gptedge.model import Model
from gptedge.runtime.kv_cache import CacheLayout
from gptedge.runtime.session import Session
from gptedge.serve.server import Server, bind, url_of
from gptedge.serve.settings import ServerSettings

EOS = 256
VOCAB = 260
EMOJI = "😀".encode()
TEMPLATE = """
{%- for m in messages -%}
{%- if m.content == "refuse" %}{{ raise_exception("no such message, please") }}{% endif -%}
{% if m.role != "assistant" %}<{{ m.role }}>{% endif %}{{ m.content }}
{%- endfor -%}"""


def follower(token: int, after_emoji: int = EOS) -> int:
    """The byte that follows a byte."""
    if token in EMOJI:
        return int((*EMOJI, after_emoji)[EMOJI.index(token) + 1])
    text = chr(token)
    if text == "!":
        return EMOJI[0]
    if text.isdigit():
        return ord("0") + (token - ord("0") + 1) % 10
    return token + 1 if "a" <= text < "z" else EOS


class FakeTokenizer:
    """A token is a byte, or <end>."""

    bos_id = None
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = False, continued: bool = False) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError:
            raise DataError("text has a lone surrogate") from None

    def token_bytes(self, token: int) -> bytes:
        if token > EOS:
            raise TokenizerError(f"there is no token {token}")
        return b"<end>" if token == EOS else bytes([token])

    def decode_stream(self) -> Any:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(
            step=lambda token: "" if token == EOS else decoder.decode(bytes([token])),
            flush=lambda: decoder.decode(b"", True),
        )


class FakeSession(Session):
    """gptedge's session with its locking and limits; only the graph is replaced."""

    def __init__(self, bundle: Bundle, context_length: int) -> None:
        self._ort: Any = None
        self.bundle = bundle
        self.lock = threading.Lock()
        self.signature: Any = SimpleNamespace(
            n_head=1,
            cache=CacheLayout(shapes=(), dtype=np.float32, shared=True),
            logits_dtype=np.float32,
            takes_positions=False,
            picks_rows=False,
        )
        self.provider = "CPUExecutionProvider"
        self._session: Any = None
        self.vocab_size = VOCAB
        self.context_length = context_length
        self.delay_s = 0.0
        self.fails = False
        self.follows_emoji = EOS
        self.n_tokens_run = 0

    def room_to_guess(self, cache: Any, left: int) -> int:
        """None: the tests count the tokens that are run."""
        return 0

    def _call(self, graph: Any, feeds: Any, cache: Any, *logits: Any) -> Any:
        ids = feeds[INPUT_IDS][0]
        if self.fails:
            raise ValueError("secret detail")
        if self.delay_s:
            time.sleep(self.delay_s)
        self.n_tokens_run += len(ids)
        for row, token in zip(logits[0][0], ids, strict=True):
            row[:] = 0
            row[follower(int(token), self.follows_emoji)] = 20.0
        return logits[0]


def fake_model(folder: Path, context_length: int = 2000) -> Model:
    bundle = Bundle(folder / "fake", None, {}, {"eos_token_id": EOS}, {})
    model = Model(bundle, FakeSession(bundle, context_length), FakeTokenizer())  # type: ignore[arg-type]
    model.__dict__["chat_template"] = ChatTemplate(TEMPLATE, {})
    return model


class Running:
    """A server in a thread, and a client of it."""

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        self.session: Any = model.session
        self._ready = threading.Event()
        self.sock = bind(settings.host, 0)
        self.url = url_of(self.sock)
        self.server = Server(model, settings, on_ready=self._ready.set)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(self.sock,))
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def start(self) -> Running:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.sock.close()

    def chat(self, text: str, **parameters: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **parameters}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any, **parameters: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **parameters})

    @contextmanager
    def streaming(self, prompt: str, **parameters: Any) -> Iterator[Iterator[str]]:
        """Lines of a streamed completion."""
        body = {"prompt": prompt, "stream": True, **parameters}
        with (
            httpx.Client(base_url=self.url, timeout=20) as client,
            client.stream("POST", "/v1/completions", json=body) as r,
        ):
            assert r.status_code == 200
            yield (line for line in r.iter_lines() if line)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    def wait_until_idle(self) -> None:
        """Until no token is run any more."""

        def stands_still() -> bool:
            before = self.session.n_tokens_run
            time.sleep(max(0.1, 5 * self.session.delay_s))
            return bool(self.session.n_tokens_run == before)

        self.wait_until(stands_still)


StartServer = Callable[..., Running]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start a server with these settings; all are stopped after the test."""
    running: list[Running] = []

    def start(*, context_length: int = 2000, delay_s: float = 0.0, **settings: Any) -> Running:
        model = fake_model(tmp_path, context_length)
        model.session.delay_s = delay_s  # type: ignore[attr-defined]
        running.append(Running(model, ServerSettings(**settings)))
        return running[-1].start()

    yield start
    for r in running:
        r.client.close()
        r.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server with default settings for all tests of a file that leave it as it is."""
    running = Running(fake_model(tmp_path_factory.mktemp("serve")), ServerSettings()).start()
    yield running
    running.client.close()
    running.stop()


@pytest.fixture
def events() -> Callable[[httpx.Response], Sequence[dict[str, Any]]]:
    """JSON of each server-sent event, after checking that the stream ends as it should."""
    import json

    def parse(response: httpx.Response) -> list[dict[str, Any]]:
        parts = response.text.split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    return parse

"""Running the server: the listening socket, uvicorn, and an orderly end on Ctrl+C or a polite kill."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from gptedge.errors import GptEdgeError
from gptedge.interrupts import KILLS
from gptedge.model import Model
from gptedge.serve.app import build_app
from gptedge.serve.engine import Engine, load_variants
from gptedge.serve.settings import ServerSettings, bracketed

_GRACE_S = 3
"""How long answers may take to notice that they were cancelled: one token, or one piece of a prompt."""
_KEEP_ALIVE_S = 75


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address taken, not yet listening. Raises GptEdgeError when somebody else has it."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except (OSError, ValueError) as e:  # ValueError: what no name can be, such as a..b, is not even looked up
        problem = (e.strerror or e) if isinstance(e, OSError) else "it is not a valid name"
        raise GptEdgeError(f"the host {host!r} cannot be used: {problem}; give an address of this machine") from None
    try:
        if os.name == "posix":  # on Windows it would share the port with a stranger
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        sock.close()
        raise GptEdgeError(f"cannot listen on {host} port {port}: {e.strerror}; choose another with --port") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{bracketed(host)}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which tells when it listens, and cancels running replies before it waits for answers to end."""

    def __init__(self, model: Model, settings: ServerSettings, on_ready: Callable[[], None] = lambda: None) -> None:
        """Raises what `Model.load_adapter` raises, and UsageError for two adapters of one name."""
        self._engine = Engine(
            model,
            slots=settings.slots,
            max_waiting=settings.max_waiting,
            variants=load_variants(model, settings.adapters),
        )
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                build_app(self._engine, settings),
                # Named, so that what else is installed changes nothing.
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what goes wrong is said by the routes, in one line
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    @property
    def model_names(self) -> list[str]:
        """What clients may ask for; the model without an adapter first."""
        return list(self._engine.variants)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Kills that uvicorn does not know, such as SIGHUP, end the server as SIGTERM does.

        A handler that raises would often do so within a request, where uvicorn takes it for the request's own failure.
        """
        with super().capture_signals(), _handled(self.handle_exit):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.close()
        await super().shutdown(sockets)

    def serve_forever(self, sock: socket.socket) -> None:
        """Answer until `should_exit`, or until Ctrl+C or a polite kill, which then raise KeyboardInterrupt."""
        try:
            self.run(sockets=[sock])
        finally:
            self._engine.close()
            self._engine.join()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Polite kills go to `handler`, those that are ignored aside. Does nothing outside the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        # None: set by a program that is not Python, and could not be put back.
        before = {n: old for n in KILLS if (old := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

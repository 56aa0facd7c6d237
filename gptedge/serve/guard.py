"""Who may speak to the server: checks before any route. Host names, the API key; and the optional log of requests.

Plain ASGI wrappers, so that routes see a client that leaves.
"""

from __future__ import annotations

import hmac
import sys
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptedge.serve.errors import ApiError
from gptedge.serve.settings import ServerSettings
from gptedge.serve.transport import error_response

_OPEN_PATHS = frozenset(("/health",))


class Guard:
    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._hosts = settings.allowed_hosts
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        await (self._app if refusal is None else error_response(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            message = f"the host {host!r} is not this server; connect to localhost or 127.0.0.1, or serve with --host"
            return ApiError(403, message, code="host_not_allowed")
        if self._key is None or scope["path"] in _OPEN_PATHS or self._has_key(headers.get("authorization", "")):
            return None
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _has_key(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        assert self._key is not None
        return hmac.compare_digest(key.strip().encode(), self._key) and scheme.lower() == "bearer"


def host_name(header: str) -> str:
    """A Host header without its port, in lower case: "[::1]:8080" -> "[::1]"."""
    name = header.strip().lower()
    if name.startswith("["):
        end = name.find("]") + 1
        rest = name[end:]
    else:
        end = name.find(":") if ":" in name else len(name)
        rest = name[end:]
    return name[:end] if not rest or (rest[0] == ":" and rest[1:].isdigit()) else name


class RequestLog:
    """One line per request on stderr: who, what, status, duration; nothing of what was said."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client = (scope.get("client") or ("-",))[0]
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            ms = (time.perf_counter() - start) * 1000
            print(f"{client} {scope['method']} {path} {status or '-'} {ms:.0f} ms", file=sys.stderr, flush=True)

"""Bytes in and out: bodies read up to a limit, JSON answers, server-sent events, and clients that leave.

Does not use starlette's StreamingResponse: it would notice that a client has left only when there is something to send.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptedge.serve.errors import ApiError
from gptedge.serve.settings import MAX_BODY_BYTES

DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499
"""Status of an answer that nobody is there to read; nginx's number, seen only in the log."""
_DRAIN_BYTES = 16 * MAX_BODY_BYTES
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

# Some clients split events with str.splitlines, which takes these for line ends.
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def to_json(value: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON on one line; halves of surrogate pairs, which UTF-8 cannot hold, become JSON escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_LINE_ENDS).encode("utf-8", "backslashreplace")


def event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def json_response(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, dict(headers or {}), "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


class EventStream:
    """An ASGI response of server-sent events, each sent as it comes. Calls `on_leave` once the client has left."""

    def __init__(self, events: AsyncIterator[bytes], on_leave: Callable[[], None]) -> None:
        self._events = events
        self._on_leave = on_leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(call_when_left(receive, self._on_leave))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watch.cancel()
            self._on_leave()


async def call_when_left(receive: Receive, on_leave: Callable[[], None]) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_leave()


async def read_body(request: Request) -> bytes:
    """The body of a JSON request. Raises ApiError when it is declared as something else, or too large.

    Asking for the content type also keeps strange web pages out: browsers send JSON elsewhere only with permission.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind or 'missing'}; send the body as application/json")
    parts, size = [], 0
    async with aclosing(request.stream()) as stream:
        async for part in stream:
            size += len(part)
            # What is too much is read and dropped: a client that is still sending would not see an answer.
            parts.append(part if size <= MAX_BODY_BYTES else b"")
            if size > _DRAIN_BYTES:
                break
    if size > MAX_BODY_BYTES:
        message = f"the body is larger than the limit of {MAX_BODY_BYTES} bytes; shorten the request"
        raise ApiError(413, message, code="body_too_large")
    return b"".join(parts)

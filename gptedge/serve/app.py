"""The routes: health, models, chat completions and completions, over one engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gptedge.config import SamplingParams
from gptedge.errors import GptEdgeError, SchemaError
from gptedge.model import Model
from gptedge.runtime.context import Window
from gptedge.runtime.generate import Chunk, join
from gptedge.serve.engine import Engine, Reply
from gptedge.serve.errors import ApiError, about_prompt, about_schema, closing, failed
from gptedge.serve.guard import Guard, RequestLog
from gptedge.serve.requests import Job, known_model, parse_chat, parse_completion, parse_json, read_model
from gptedge.serve.responses import Answer, ChatAnswer, MakeAnswer, OfText, Source, TextAnswer, model_object, usage_of
from gptedge.serve.settings import ServerSettings
from gptedge.serve.transport import (
    CLIENT_LEFT,
    DONE,
    EventStream,
    call_when_left,
    error_response,
    event,
    json_response,
    read_body,
)
from gptedge.turns import Turns

_log = logging.getLogger("gptedge.serve")

_ENDED = ("stop", "length")

Parse = Callable[[dict[str, Any], int], Job]


def build_app(engine: Engine, settings: ServerSettings) -> ASGIApp:
    """The whole application: routes, then the guard, then CORS where it is asked for."""
    app: ASGIApp = Guard(_routes(_Api(engine, settings.context_overflow)), settings)
    if settings.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=settings.cors_origins, allow_methods=("GET", "POST"), allow_headers=("*",)
        )
    return RequestLog(app) if settings.log_requests else app


def _routes(api: _Api) -> Starlette:
    table = (
        ("GET", "/health", api.health),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.one_model),
        ("POST", "/v1/chat/completions", partial(api.complete, parse_chat, ChatAnswer)),
        ("POST", "/v1/completions", partial(api.complete, parse_completion, TextAnswer)),
    )
    routes = [Route(path, _answered(endpoint), methods=[method]) for method, path, endpoint in table]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return app


def _answered(endpoint: Callable[[Request], Awaitable[ASGIApp]]) -> Callable[[Request], Awaitable[ASGIApp]]:
    """The endpoint, with what it raises as an error object."""

    async def answer(request: Request) -> ASGIApp:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception as e:  # one request must not end the server; _api_error logs what nobody foresaw
            return error_response(_api_error(e))

    return answer


def _api_error(error: Exception) -> ApiError:
    """What to tell the client; what is the server's fault is also logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SchemaError):  # some are found out only as the reply goes on
        return about_schema(error)
    _log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG))
    return failed(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message, code = f"{request.url.path} does not take {request.method}", "method_not_allowed"
    else:
        message, code = f"there is no route {request.url.path}; the API is under /v1", "unknown_url"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


class _Api:
    def __init__(self, engine: Engine, context_overflow: str) -> None:
        self._engine, self._overflow = engine, context_overflow
        model = engine.model
        eos_ids = model.session.bundle.eos_ids
        self._sources = {name: Source(name, model.tokenizer, eos_ids) for name in engine.variants}
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        if self._engine.closing:
            raise closing()
        return json_response({"status": "ok"})

    async def models(self, request: Request) -> Response:
        data = [model_object(name, self._created) for name in self._sources]
        return json_response({"object": "list", "data": data})

    async def one_model(self, request: Request) -> Response:
        return json_response(model_object(known_model(request.path_params["name"], self._sources), self._created))

    async def complete(self, parse: Parse, make_answer: MakeAnswer, request: Request) -> ASGIApp:
        """A reply to the body's prompt, streamed or whole."""
        body = parse_json(await read_body(request))
        self._engine.check_open()
        model, name = self._engine.model, read_model(body, self._sources)
        job = parse(body, model.session.vocab_size)
        # Tokenizing a long text would hold the loop up.
        params = replace(job.params, context_overflow=self._overflow)
        reply = self._engine.start(await asyncio.to_thread(window_of, model, job, params), params, name)
        answer = make_answer(self._sources[name])
        if job.stream:
            return EventStream(_events(reply, answer, job.include_usage), reply.cancel)
        return await self._whole(request, reply, answer)

    async def _whole(self, request: Request, reply: Reply, answer: Answer) -> Response:
        watch = asyncio.create_task(call_when_left(request.receive, reply.cancel))
        try:
            parts = [chunk async for chunk in reply]
        finally:
            watch.cancel()
            reply.cancel()
        if parts and parts[-1].finish_reason in _ENDED:
            # Wording the log-probabilities of a long reply takes a while.
            return await asyncio.to_thread(lambda: json_response(answer.whole(join(parts))))
        if self._engine.closing:
            raise closing()
        return Response(status_code=CLIENT_LEFT)


async def _events(reply: Reply, answer: Answer, include_usage: bool) -> AsyncIterator[bytes]:
    """An answer as server-sent events. What fails on the way is the last of them, in place of [DONE]."""
    try:
        async for body in _bodies(reply, answer, include_usage):
            yield event(body)
        yield DONE
    except Exception as e:  # the status is sent already: what is left is to say it in the stream
        yield event(_api_error(e).body)


async def _bodies(reply: Reply, answer: Answer, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
    # With the usage asked for, OpenAI's chunks all have the entry, null in all but the last.
    no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
    for body in answer.opening():
        yield body | no_usage
    last, of_text = Chunk(""), OfText(answer.source)
    async for last in reply:
        logprobs = of_text.take(last.text, last.logprobs)
        if last.text:
            yield answer.piece(last.text, logprobs or None) | no_usage
    if last.finish_reason not in _ENDED or last.usage is None:
        raise closing()  # cancelled: by the server, or by a client that will not read this
    yield answer.ending(last.finish_reason) | no_usage
    if include_usage:
        yield answer.usage_only(usage_of(last.usage, last.timings))


def window_of(model: Model, job: Job, params: SamplingParams) -> Window:
    """The prompt, as far as the context holds it. Raises ApiError when the model cannot take it."""
    try:
        if job.messages is not None:
            turns = Turns(job.messages, 0, model.chat_prompt.render, model.chat_prompt.encode)
            return model.window(turns.ids, params, turns)
        prompt = job.prompt or ()
        ids = model.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        return model.window(ids, params)
    except GptEdgeError as e:
        raise about_prompt(e, "prompt" if job.messages is None else "messages") from None

"""`ApiError`: what goes wrong with one request, as a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptedge.errors import ContextOverflowError, DataError, GptEdgeError, SchemaError, TokenizerError, UsageError
from gptedge.serve.settings import RETRY_AFTER_S


class ApiError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` names the part of the request that is wrong, `code` is for programs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def busy(waiting: int) -> ApiError:
    message = f"the queue of {waiting} waiting requests is full; try again in {RETRY_AFTER_S} s"
    return ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(RETRY_AFTER_S)})


def closing() -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return ApiError(503, "the server is closing", code="server_closing", headers=headers)


def about_prompt(error: GptEdgeError, param: str) -> ApiError:
    """What the model said of a prompt that it cannot take."""
    if isinstance(error, SchemaError):
        return about_schema(error)
    if isinstance(error, ContextOverflowError):
        return invalid(error.problem, param, "context_length_exceeded")
    if isinstance(error, (UsageError, DataError, TokenizerError)):
        return invalid(str(error), param)
    return failed(error)


def about_schema(error: SchemaError) -> ApiError:
    return invalid(str(error), "response_format.json_schema.schema")


def failed(error: Exception) -> ApiError:
    """The server's own fault. Only gptedge's errors are worded for others to read."""
    return ApiError(500, str(error) if isinstance(error, GptEdgeError) else f"internal error ({type(error).__name__})")

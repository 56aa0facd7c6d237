"""Reading request bodies: OpenAI's parameters, checked by hand, into `SamplingParams` and a prompt.

Every parameter is in one of the tables below: it is read, or ignored because a reply is the same without it, or refused
by name. Defaults are those of `SamplingParams`, also where OpenAI's differ (greedy decoding, 256 tokens).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.serve.errors import ApiError, invalid
from gptedge.serve.settings import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS

Body = Mapping[str, Any]
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, understood."""

    prompt: str | list[int] | None = None
    messages: Messages | None = None
    """One of these two is there."""
    params: SamplingParams
    stream: bool
    include_usage: bool
    """The stream ends with a chunk that has the usage."""


def parse_chat(body: Body, vocab_size: int) -> Job:
    """A body of /v1/chat/completions. Raises ApiError naming the parameter that cannot be taken."""
    _check_names(body, {*_SAMPLING, *_OTHER, *_CHAT_ONLY})
    changes = _sampling(body, vocab_size) | _chat_logprobs(body) | _response_format(body)
    stream, include_usage = _streaming(body)
    messages = _messages(body.get("messages"))
    return Job(messages=messages, params=SamplingParams(**changes), stream=stream, include_usage=include_usage)


def parse_completion(body: Body, vocab_size: int) -> Job:
    """A body of /v1/completions."""
    _check_names(body, {*_SAMPLING, *_OTHER, *_COMPLETION_ONLY} - {"max_completion_tokens"})
    changes = _sampling(body, vocab_size) | _completion_logprobs(body)
    stream, include_usage = _streaming(body)
    prompt = _prompt(body.get("prompt"))
    return Job(prompt=prompt, params=SamplingParams(**changes), stream=stream, include_usage=include_usage)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(f"{name} is {_shown(value)}; it must be a number", name)
    return value


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"{name} is {_shown(value)}; it must be an integer", name)
    return value


def _seed(value: Any, name: str) -> int:
    """OpenAI's seeds may be negative, numpy's may not."""
    return _integer(value, name) % 2**63


def _stop(value: Any, name: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise invalid(f"{name} is {_shown(value)}; it must be a string or a list of strings", name)
    if len(strings) > MAX_STOP_STRINGS:
        raise invalid(f"{name} has {len(strings)} strings; at most {MAX_STOP_STRINGS} are taken", name)
    return tuple(strings)


def _logit_bias(value: Any, name: str) -> dict[int, float]:
    if not isinstance(value, dict):
        raise invalid(f"{name} is {_shown(value)}; it must be an object of token ids and numbers", name)
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"{name} has the key {_shown(key)}; keys must be token ids", name)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise invalid(f"{name} of token {key} is {_shown(bias)}; it must be a number from -100 to 100", name)
    return {int(key): float(bias) for key, bias in value.items()}


# Parameter -> the field of SamplingParams that it sets, and what reads it. Later rows win over earlier ones.
_SAMPLING: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "max_tokens": ("max_tokens", _integer),
    "max_completion_tokens": ("max_tokens", _integer),
    "temperature": ("temperature", _number),
    "top_p": ("top_p", _number),
    "top_k": ("top_k", _integer),
    "min_p": ("min_p", _number),
    "repetition_penalty": ("repetition_penalty", _number),
    "presence_penalty": ("presence_penalty", _number),
    "frequency_penalty": ("frequency_penalty", _number),
    "logit_bias": ("logit_bias", _logit_bias),
    "seed": ("seed", _seed),
    "stop": ("stop", _stop),
}

# Read elsewhere in this file or in app, or ignored: hints about billing, storing, caching and scheduling.
_OTHER = {
    *("model", "stream", "stream_options", "n", "logprobs", "user", "metadata", "store", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
_CHAT_ONLY = {
    *("messages", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("response_format", "modalities", "audio", "web_search_options", "prediction", "reasoning_effort", "verbosity"),
}
_COMPLETION_ONLY = {"prompt", "best_of", "echo", "suffix"}

# Parameters that change the reply in ways that are not built; these values ask for nothing. null is always taken.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


def _check_names(body: Body, known: set[str]) -> None:
    for name, value in body.items():
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise invalid(f"{_shown(name)} is not a parameter of this route{hint}", name, "unknown_parameter")
        if name in _ONLY and value is not None and value not in _ONLY[name]:
            taken = " or ".join(json.dumps(v) for v in (*_ONLY[name], None))
            raise invalid(f"{name} is {_shown(value)}; this server takes only {taken}", name, "unsupported_parameter")


def _sampling(body: Body, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams that the request sets, each checked by itself, so that an error names its parameter."""
    changes: dict[str, Any] = {}
    for name, (field, read) in _SAMPLING.items():
        if body.get(name) is not None:
            changes[field] = read(body[name], name)
            _check(name, **{field: changes[field]})
    outside = next((i for i in changes.get("logit_bias", ()) if i >= vocab_size), None)
    if outside is not None:
        raise invalid(f"logit_bias has token {outside}; the model's vocabulary has {vocab_size}", "logit_bias")
    return changes


def _check(name: str, **change: Any) -> None:
    try:
        SamplingParams(**change)
    except UsageError as e:
        raise invalid(str(e), name) from None


def _chat_logprobs(body: Body) -> dict[str, Any]:
    """`logprobs` asks for them, `top_logprobs` for how many alternatives."""
    top = body.get("top_logprobs")
    if not _boolean(body, "logprobs"):
        if top:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return {}
    return {"logprobs": _n_logprobs(0 if top is None else top, "top_logprobs")}


_FORMATS = ("text", "json_object", "json_schema")


def _response_format(body: Body) -> dict[str, Any]:
    """A schema that the reply follows. `strict` makes no difference: what cannot be kept is refused."""
    name = "response_format"
    value = body.get(name)
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _FORMATS:
        raise invalid(f"{name} is {_shown(value)}; its type must be one of {', '.join(_FORMATS)}", name)
    if kind != "json_schema":
        return {} if kind == "text" else {"schema": {"type": "object"}}
    described = value.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise invalid(f"{name}.json_schema must be an object with a schema", f"{name}.json_schema")
    return {"schema": described["schema"]}


def _completion_logprobs(body: Body) -> dict[str, Any]:
    value = body.get("logprobs")
    return {} if value is None else {"logprobs": _n_logprobs(value, "logprobs")}


def _n_logprobs(value: Any, name: str) -> int:
    if not 0 <= _integer(value, name) <= MAX_TOP_LOGPROBS:
        raise invalid(f"{name} is {_shown(value)}; it must be from 0 to {MAX_TOP_LOGPROBS}", name)
    return int(value)


def _streaming(body: Body) -> tuple[bool, bool]:
    """`stream`, and `stream_options.include_usage`."""
    stream, options = _boolean(body, "stream"), body.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    if not isinstance(options, dict):
        raise invalid(f"stream_options is {_shown(options)}; it must be an object", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise invalid(
            f"stream_options has an unknown entry {_shown(min(unknown))}", "stream_options", "unknown_parameter"
        )
    return stream, _boolean(options, "include_usage")


def _boolean(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise invalid(f"{name} is {_shown(value)}; it must be true or false", name)
    return value


# Models are taught these three; "developer" is OpenAI's later name of "system".
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list of at least one message", "messages")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise invalid(f"{where} is {_shown(value)}; it must be an object with role and content", where)
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{where}.role is {_shown(role)}; it must be one of {', '.join(_ROLES)}", f"{where}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if value.get(name):
            raise invalid(f"{where}.{name} is not supported: this server speaks text only", f"{where}.{name}")
    return {"role": _ROLES[role], "content": _content(value.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    """Text, or a list of parts that are text, which are then joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(f"{where} is {_shown(value)}; it must be a string or a list of text parts", where)
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise invalid(f"{where} is {_shown(value)}; only parts of type text are supported", where)
    text = value.get("text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text is {_shown(text)}; it must be a string", f"{where}.text")
    return text


def _prompt(value: Any) -> str | list[int]:
    """Text or token ids; a list that holds just one of these is taken as well."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if _is_ids(value):
        return list(value)
    if isinstance(value, list) and all(isinstance(v, (str, list)) for v in value):
        raise invalid(f"prompt has {len(value)} prompts; this server takes one per request", "prompt")
    raise invalid(f"prompt is {_shown(value)}; it must be a string or a list of token ids", "prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def read_model(body: Body, served: Collection[str]) -> str:
    """The name of the model that the request asks for; the first one that is served if it asks for none."""
    asked = body.get("model")
    if asked is None:
        return next(iter(served))
    if not isinstance(asked, str):
        raise invalid(f"model is {_shown(asked)}; it must be a string", "model")
    return known_model(asked, served)


def known_model(asked: str, served: Collection[str]) -> str:
    """`asked`, which must be one of those served."""
    if asked in served:
        return asked
    names = " and ".join(map(repr, served))
    are = "is" if len(served) == 1 else "are"
    raise ApiError(
        404, f"the model {_shown(asked)} is not served here; {names} {are}", param="model", code="model_not_found"
    )


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError with the place of the mistake."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as e:  # not JSON, or not UTF-8, or a number of thousands of digits
        raise invalid(f"the body is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    return value


def _shown(value: Any, most: int = 60) -> str:
    """A value as JSON, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= most else f"{text[:most]}…"

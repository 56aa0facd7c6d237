"""`response_format`, by OpenAI's own client and a real model."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

import gptedge
from gptedge.grammar.constraint import Grammar
from gptedge.serve.settings import ServerSettings
from tests.serve.conftest import Running

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "over the lazy dog"}]


@pytest.fixture(scope="module")
def client(adapted: Path) -> Iterator[openai.OpenAI]:
    with gptedge.load(adapted / "bundle", threads=1) as model:
        running = Running(model, ServerSettings()).start()
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as made:
            yield made
        running.client.close()
        running.stop()


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.create(
            model="bundle", messages=MESSAGES, response_format=FORMAT, temperature=1.0, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def test_a_stream_follows_it(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="bundle", messages=MESSAGES, response_format=FORMAT, temperature=1.0, seed=1, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="bundle", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=5
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_what_cannot_be_followed_names_the_place(client: openai.OpenAI) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"not": {}}}}}
    with pytest.raises(openai.BadRequestError, match="#/items has not") as error:
        client.chat.completions.create(model="bundle", messages=MESSAGES, response_format=bad)
    assert error.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_found_too_complicated_as_the_reply_goes_on(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """It is the client's fault, and nothing of it is kept."""
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    make = Grammar.__init__

    def noted(grammar: Grammar, *arguments: Any) -> None:
        made.add(grammar)
        make(grammar, *arguments)

    monkeypatch.setattr(Grammar, "__init__", noted)
    monkeypatch.setattr("gptedge.grammar.terms._MOST_TERMS", 600)
    schema = {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}
    nested: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ask = partial(client.chat.completions.create, model="bundle", messages=MESSAGES, response_format=nested)
    with pytest.raises(openai.APIError, match="too complicated") as error:
        list(ask(max_tokens=100, stream=stream))
    assert isinstance(error.value, openai.BadRequestError) is not stream
    assert error.value.type == "invalid_request_error"
    assert error.value.param == "response_format.json_schema.schema"
    error.value.__traceback__ = None
    for _ in range(50):
        gc.collect()
        if not made:
            break
        time.sleep(0.05)  # the server's threads may not have come to their end
    assert not made

"""Replies within a schema: which tokens may come, and whole replies of a model that knows nothing."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import gptedge
from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.grammar import constraint as constraint_module
from gptedge.grammar.constraint import Grammar, TokenConstraint, Vocabulary, grammar_of
from gptedge.grammar.json_schema import schema_term
from gptedge.grammar.terms import Terms
from gptedge.model import Model
from gptedge.runtime.sampling import Sampler
from gptedge.tokenizer import Tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["kind", "shy"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
}
WHOLE = '{"name": "Bé", "age": 99, "tags": ["shy"]}'
TOKENS = 100


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return gptedge.load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def vocabulary(model: Model) -> Vocabulary:
    return Vocabulary(model.tokenizer)


def made_of(schema: Any, vocabulary: Vocabulary) -> Grammar:
    terms = Terms()
    return Grammar(terms, schema_term(terms, schema), vocabulary)


def walked(grammar: Grammar, text: bytes) -> int:
    state = grammar.start
    for byte in text:
        state = grammar._step(state, byte)
    return state


def test_tokens_that_may_come_are_those_that_go_on(model: Model, vocabulary: Vocabulary) -> None:
    grammar, text = made_of(SCHEMA, vocabulary), WHOLE.encode()
    for cut in range(len(text) + 1):
        state = walked(grammar, text[:cut])
        going_on = [i for i in range(model.tokenizer.vocab_size) if grammar.after(state, i)]
        assert grammar.allowed(state).tolist() == going_on
        assert going_on or cut == len(text)
        assert grammar.may_end(state) == grammar.is_whole(state) == (cut == len(text))
    assert not set(going_on) & model.tokenizer.special_ids


def test_every_tokenization_of_a_whole_text_may_come(model: Model, vocabulary: Vocabulary) -> None:
    constraint = TokenConstraint(made_of(SCHEMA, vocabulary), model.bundle.eos_ids)
    for token in model.tokenizer.encode(WHOLE):
        assert constraint.allows(token)
        assert not constraint.is_whole
        assert not any(constraint.allows(i) for i in model.bundle.eos_ids)
        constraint.take(token)
    assert constraint.is_whole
    assert all(constraint.allows(i) for i in model.bundle.eos_ids)


def test_a_text_that_could_go_on_may_end_too(model: Model, vocabulary: Vocabulary) -> None:
    constraint = TokenConstraint(made_of({"type": "integer"}, vocabulary), model.bundle.eos_ids)
    logits = np.zeros(model.session.vocab_size, np.float32)
    eos = sorted(model.bundle.eos_ids)
    assert np.isneginf(constraint.limit(logits)[eos]).all()
    (one,) = model.tokenizer.encode("1")
    constraint.take(one)
    assert not constraint.is_whole
    assert not constraint.limit(logits)[eos].any()
    constraint.take(eos[0])
    constraint.take(one)  # what ends a text leads nowhere: there is no state of its own


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}], ids=str
)
def test_a_model_that_knows_nothing_writes_what_is_valid(model: Model, settings: dict[str, Any]) -> None:
    whole = 0
    for seed in range(10):
        result = model.run(f"Some words, {seed}:", schema=SCHEMA, max_tokens=TOKENS, seed=seed, **settings)
        assert result.finish_reason in ("stop", "length")
        if result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), SCHEMA)
            assert result.token_ids[-1] not in model.bundle.eos_ids  # it is over when nothing may follow
            whole += 1
    assert whole or not settings  # greedily it may write spaces, which are limited, or digits, for long


def test_any_json(model: Model) -> None:
    texts = [model.generate("a", schema={"type": "object"}, temperature=1.2, seed=s, max_tokens=200) for s in range(12)]
    assert any(_is_json(text) for text in texts)
    assert all(text.lstrip().startswith("{") for text in texts)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_guesses_change_nothing(tiny_bundle: Path, model: Model) -> None:
    slow = gptedge.load(tiny_bundle, threads=1, speculate=False)
    prompt = f"{WHOLE}\n{WHOLE}\n{WHOLE}"
    for settings in ({}, {"temperature": 0.8}):
        got, wanted = (m.run(prompt, schema=SCHEMA, seed=3, max_tokens=60, **settings) for m in (model, slow))
        assert got.token_ids == wanted.token_ids


def test_lists_keep_to_it(model: Model) -> None:
    settings: dict[str, Any] = {"schema": SCHEMA, "temperature": 1.0, "max_tokens": TOKENS}
    results = model.run([f"List {i}" for i in range(5)], seed=2, batch_size=3, **settings)
    whole = [r for r in results if r.finish_reason == "stop"]
    assert whole
    for result in whole:
        jsonschema.validate(json.loads(result.text), SCHEMA)
    alone = model.run("List 0", seed=2, **settings)
    assert alone.text[:10] == results[0].text[:10]


def test_two_replies_share_a_grammar(model: Model) -> None:
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        texts[seed] = model.generate("x", schema=SCHEMA, temperature=1.0, seed=seed, max_tokens=TOKENS)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, text in texts.items():
        assert text == model.generate("x", schema=SCHEMA, temperature=1.0, seed=seed, max_tokens=TOKENS)


def test_what_is_allowed_keeps_its_proportions(model: Model, vocabulary: Vocabulary) -> None:
    """Sampling is from the model's own distribution, given that the token may come."""
    grammar = made_of({"enum": [1, 2, 3]}, vocabulary)
    ids = [model.tokenizer.encode(str(n))[0] for n in (1, 2, 3)]
    logits = np.full(model.session.vocab_size, 5.0, np.float32)
    logits[ids] = np.log([0.5, 0.3, 0.2])
    drawn: Counter[int] = Counter()
    for seed in range(3000):
        constraint = TokenConstraint(grammar, model.bundle.eos_ids)
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], len(logits), constraint)
        drawn[sampler.choose(logits)] += 1
    allowed = set(grammar.allowed(grammar.start).tolist())
    assert set(drawn) <= allowed  # spaces before the value are among them
    assert [drawn[i] / sum(drawn[j] for j in ids) for i in ids] == pytest.approx([0.5, 0.3, 0.2], abs=0.12)
    best = Sampler(SamplingParams(top_k=1, temperature=1.0, seed=0), [], len(logits), TokenConstraint(grammar, ()))
    logits[ids[1]] = 9.0
    logits[0 if ids[1] else 1] = 20.0
    assert best.choose(logits) == ids[1]
    greedy = Sampler(SamplingParams(), [], len(logits), TokenConstraint(grammar, ()))
    assert greedy.choose(logits) == ids[1]


def test_what_cannot_be_kept_is_said_before_anything_runs(model: Model) -> None:
    for call in (model.generate, model.stream, lambda text, **changes: model.generate([text], **changes)):
        with pytest.raises(UsageError, match="has the type"):
            call("x", schema={"type": "strin"})
    with pytest.raises(UsageError, match="it must be a JSON Schema"):
        model.generate("x", schema=[1])
    with pytest.raises(UsageError, match="schema is not JSON"):
        model.generate("x", schema={"enum": [{1, 2}]})


def test_a_vocabulary_without_the_characters() -> None:
    source = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "[": 2, "]": 3}, "merges": []},
        "decoder": {"type": "Fuse"},
    }
    tokenizer = Tokenizer.from_dict(source)
    constraint = TokenConstraint(grammar_of({"type": "object"}, tokenizer), ())
    with pytest.raises(UsageError, match="no token of this model's vocabulary"):
        constraint.limit(np.zeros(4, np.float32))
    empty = TokenConstraint(grammar_of({"type": "array", "maxItems": 0}, tokenizer), ())
    for token in (2, 3):
        assert np.flatnonzero(empty.limit(np.zeros(4, np.float32)) == 0).tolist() == [token]
        empty.take(token)
    assert empty.is_whole


def test_only_the_last_grammars_are_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_KEPT_GRAMMARS", 2)
    first = grammar_of({"const": 1}, model.tokenizer)
    assert grammar_of({"const": 1}, model.tokenizer) is first
    for i in (2, 3):
        grammar_of({"const": i}, model.tokenizer)
    assert grammar_of({"const": 1}, model.tokenizer) is not first


def test_many_states_make_room(model: Model, vocabulary: Vocabulary) -> None:
    """A string of up to 500 characters has a state for each of them, and more."""
    grammar = made_of({"type": "string", "maxLength": 500}, vocabulary)
    state = walked(grammar, b'"' + b"x" * 500)
    assert grammar.allowed(state).tolist() == [
        i for i in grammar.allowed(state) if grammar.is_whole(grammar.after(state, i))
    ]
    assert len(grammar.allowed(state)) >= 1


def walked_by_tokens(grammar: Grammar, tokens: list[int]) -> None:
    state = grammar.start
    for token in tokens:
        grammar.allowed(state)
        state = grammar.after(state, token)


def test_a_grammar_that_became_too_large_is_not_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is not held, and a shorter reply may stay within a new one."""
    schema = {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}
    grammar = grammar_of(schema, model.tokenizer)
    assert grammar_of(schema, model.tokenizer) is grammar
    monkeypatch.setattr("gptedge.grammar.terms._MOST_TERMS", 600)
    with pytest.raises(UsageError, match="too complicated"):
        walked_by_tokens(grammar, model.tokenizer.encode('"' + "a" * 100))
    assert grammar not in constraint_module._grammars[model.tokenizer].values()
    assert grammar_of(schema, model.tokenizer) is not grammar

"""JSON Schemas: all that their languages hold is valid, as another implementation says, and what should be there is."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from gptedge.errors import UsageError
from gptedge.grammar.json_schema import schema_term
from gptedge.grammar.terms import Terms
from tests.grammar.conftest import drawn, holds

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "note": {"type": "string"}},
    "required": ["name", "age"],
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["v"],
        }
    },
}
# A schema, texts that its language holds, and texts that it does not.
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "anything": (
        True,
        ['{"a": [1, null, {"b": "c"}], "d": true}', "[]", "{}", '"x"', "-1.5e2", " null", "[ ]", "[[], {}]"],
        ["", "{", "[1,]", "nul", '{"a" 1}', '"\n"', '"\\ud800"', "[1  ,2]", "01"],
    ),
    "person": (
        PERSON,
        ['{"name": "Bo", "age": 3}', '{\n  "name":"",\n  "age":-1,\n  "note": "\\"x\\""\n}'],
        ['{"name": "Bo"}', '{"age": 3, "name": "Bo"}', '{"name": "Bo", "age": 3, "x": 1}', '{"name": "", "age": 3.5}'],
    ),
    "all optional": (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
        ["{}", '{"a":1}', '{"b":2}', '{"a":1, "c":3}', '{"a":1, "b":2, "c":3}'],
        ['{"a":1 "b":2}', '{,"b":2}', '{"a":1,}', '{"b":2, "a":1}'],
    ),
    "others allowed": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ["{}", '{"a": null}', '{"a": null, "b": 1}', '{"b": 1, "c": 2}', '{"aa": 1, "": 2}'],
        ['{"a": 1}', '{"b": null}', '{"b": 1, "a": 2}'],
    ),
    "a map": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "boolean"}},
        ["{}", '{"ab": true, "c": false}'],
        ['{"A": true}', '{"": true}', '{"a": 1}'],
    ),
    "required without a schema": (
        {"type": "object", "required": ["x"]},
        ['{"x": {"y": 1}}'],
        ["{}", '{"x": 1, "y": 2}'],
    ),
    "lists": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        ["[1]", "[1, 2,3]", "[\n  1,\n  2\n]"],
        ["[]", "[1,2,3,4]", '["1"]', "[1 2]"],
    ),
    "a list of nothing": ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    "tuples": (
        {"prefixItems": [{"const": "a"}, {"type": "integer"}], "items": {"type": "null"}, "minItems": 1, "maxItems": 4},
        ['["a"]', '["a", 1]', '["a", 1, null, null]'],
        ["[]", "[1]", '["a", null]', '["a", 1, null, null, null]', '["a", 1, 2]'],
    ),
    "closed tuples": ({"prefixItems": [{"type": "null"}] * 2, "items": False}, ["[]", "[null]"], ["[null,null,null]"]),
    "strings": (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"äöü"', '"🙂🙂"', '"\\n\\u00e4"'],
        ['"a"', '"abcd"', '"🙂"'],
    ),
    "patterns of a length": (
        {"type": "string", "pattern": "^[ab]+$", "minLength": 2, "maxLength": 3},
        ['"ab"', '"bbb"'],
        ['"a"', '"aaaa"', '"ac"'],
    ),
    "dates": ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"', '"24-01-01"']),
    "times": ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59.5Z"'], ['"2024-02-29 23:59:59Z"']),
    "unknown formats": ({"type": "string", "format": "color"}, ['"x"'], ["1"]),
    "enum": ({"enum": ["a", 1, None, {"b": []}]}, ['"a"', "1", "null", '{"b":[]}'], ['"b"', "true"]),
    "enum of large numbers": ({"enum": [10**20]}, ["1" + "0" * 20], ["1"]),
    "enum of a kind": (
        {"enum": ["ab", "b", 1, None], "type": ["string", "null"], "minLength": 2},
        ['"ab"', "null"],
        ["1", '"b"'],
    ),
    "const beside a kind": ({"const": 3, "type": "integer", "minimum": 0}, ["3"], ["4", "3.0"]),
    "kinds": ({"type": ["integer", "null"]}, ["1", "null"], ["1.5", '"1"']),
    "bounds": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, ["0.1", "1.5", "1"], ["0", "1.51", "-1"]),
    "any of": ({"anyOf": [{"type": "integer"}, {"type": "array", "items": True}]}, ["1", "[null]"], ["null", '"x"']),
    "one of": (
        {"type": "object", "oneOf": [PERSON, {"$ref": "#/$defs/node"}], "$defs": TREE["$defs"]},
        ['{"v": 1}', '{"name": "a", "age": 1}'],
        ["{}"],
    ),
    "all of": (
        {"allOf": [PERSON, {"properties": {"x": {"type": "null"}}, "required": ["x"]}], "title": "both"},
        ['{"name": "a", "age": 1, "x": null}'],
        ['{"name": "a", "age": 1}'],
    ),
    "references": (TREE, ['{"v": 1}', '{"v": 1, "kids": [{"v": 2, "kids": []}]}'], ['{"v": 1, "kids": [{}]}']),
    "names with slashes": (
        {"$defs": {"a/b": {"~": {"type": "null"}}}, "items": {"$ref": "#/$defs/a~1b/~0"}},
        ["[null]"],
        ["[1]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_holds_what_it_should(name: str) -> None:
    schema, good, bad = CASES[name]
    terms = Terms()
    term = schema_term(terms, schema)
    validator = jsonschema.Draft202012Validator(schema)
    for text in good:
        validator.validate(json.loads(text))
        assert holds(terms, term, text), text
    for text in bad:
        assert not holds(terms, term, text), text


@pytest.mark.parametrize("name", CASES)
def test_all_it_holds_is_valid(name: str) -> None:
    schema = CASES[name][0]
    validator, texts = jsonschema.Draft202012Validator(schema), 0
    terms = Terms()
    term = schema_term(terms, schema)
    for seed in range(40):
        text = drawn(terms, term, seed)
        if text is not None:
            validator.validate(json.loads(text))
            texts += 1
    assert texts


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "strin"}, r"schema: # has the type \['strin'\]; known are object"),
        ({"properties": {"a": {"not": {}}}}, "schema: #/properties/a has not, which is not supported"),
        ({"items": {"uniqueItems": True}}, "#/items has uniqueItems"),
        ({"items": 3}, "#/items is 3; it must be an object"),
        ({"$ref": "http://example.com"}, "references must stay within it"),
        ({"$ref": "#/$defs/x"}, "refers to #/[$]defs/x, which is not there"),
        ({"$ref": "#/$defs/x", "type": "object", "$defs": {"x": {}}}, "type beside [$]ref"),
        ({"anyOf": [{"type": "null"}], "type": "string"}, "type beside anyOf"),
        ({"anyOf": []}, "#/anyOf is \\[\\]; it must be a list that is not empty"),
        ({"$ref": "#"}, "# refers to itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "# refers to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite value can satisfy #"),
        ({"required": ["x"], "additionalProperties": False}, "no finite value"),
        (False, "no finite value can satisfy #"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no finite value"),
        ({"type": "integer", "minimum": "5"}, "#/minimum is '5'; it must be a number"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength below minLength"),
        ({"type": "string", "minLength": -1}, "#/minLength is -1"),
        ({"type": "string", "pattern": "("}, r"#: the pattern '\(' has a \("),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "no finite value"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "type twice within allOf"),
        ({"const": 1, "type": "string"}, "no finite value"),
        ({"enum": [float("nan")]}, "cannot be written as JSON"),
        ({"required": "a"}, "required that is a list"),
    ],
)
def test_what_cannot_be_kept_is_refused(schema: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        schema_term(Terms(), schema)


def test_deep_nests_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema, "type": "array"}
    with pytest.raises(UsageError, match="nested too deeply"):
        schema_term(Terms(), schema)


def test_many_properties_are_no_trouble() -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(400)}, "required": ["p399"]}
    terms = Terms()
    term = schema_term(terms, {"type": "array", "items": {"$ref": "#/$defs/many"}, "$defs": {"many": schema}})
    whole = json.dumps([{f"p{i}": i for i in range(400)}])
    assert holds(terms, term, whole)
    assert not holds(terms, term, whole.replace('"p399": 399', '"q": 1'))

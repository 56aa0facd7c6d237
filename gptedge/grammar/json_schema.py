"""JSON Schema (draft 2020-12) as a language of JSON texts.

Does: type, enum, const, properties, required, additionalProperties, propertyNames, items, prefixItems, minItems,
maxItems, minLength, maxLength, pattern, format (date, time, date-time, duration, uuid, ipv4, email),
minimum, maximum, exclusiveMinimum, exclusiveMaximum, anyOf, oneOf, allOf, $ref within the schema.
Does not: what is in _UNSUPPORTED, which is refused by name; all else says nothing of a value, and is ignored.

A language is never wider than its schema, and narrower in what only prolongs texts: properties come in the order in
which they are declared, others only where additionalProperties allows them outright, and space is limited. oneOf is
read as anyOf: alternatives are taken to exclude each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from gptedge.errors import SchemaError
from gptedge.grammar.characters import ANY, any_character, character
from gptedge.grammar.numbers import Bound, Numbers
from gptedge.grammar.pattern import pattern_term
from gptedge.grammar.terms import END, NOTHING, Term, Terms

_UNSUPPORTED = {
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "$dynamicRef"),
    *("patternProperties", "minProperties", "maxProperties", "unevaluatedProperties", "unevaluatedItems"),
    *("contains", "minContains", "maxContains", "uniqueItems", "multipleOf"),
}
_IDLE = {"uniqueItems": False, "unevaluatedProperties": False, "unevaluatedItems": False, "minProperties": 0}
"""What these say when they say nothing that a text of ours could break."""
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_TYPES_BY_KEYWORD = {
    **dict.fromkeys(("properties", "required", "additionalProperties", "propertyNames"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("pattern", "minLength", "maxLength", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
}
_DATE, _TIME = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?"
_ZONE, _BYTE = r"(Z|[+-]([01]\d|2[0-3]):[0-5]\d)", r"(25[0-5]|2[0-4]\d|1?\d?\d)"
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}{_ZONE}$",
    "date-time": f"^{_DATE}T{_TIME}{_ZONE}$",
    "duration": r"^P(\d{1,4}W|(\d{1,4}D)(T\d{1,4}H)?|T\d{1,4}[HMS])$",
    "uuid": r"^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "email": r"^[A-Za-z\d_+-]+(\.[A-Za-z\d_+-]+)*@[A-Za-z\d-]+(\.[A-Za-z\d-]+)*\.[A-Za-z]{2,24}$",
}
_ROOT = "#"
_MOST_ITEMS = 10_000
_INDENT = 32

Schema = Mapping[str, Any]


def schema_term(terms: Terms, schema: Schema | bool) -> Term:
    """JSON texts of values that `schema` allows. Raises SchemaError where it cannot be read, or allows none."""
    compiler = _Compiler(terms, schema)
    try:
        value = compiler.value(schema, _ROOT)
    except RecursionError:
        raise SchemaError("schema: it is nested too deeply") from None
    if name := terms.going_in_circles():
        raise SchemaError(f"schema: {name} refers to itself before anything is said")
    if value == NOTHING or (name := terms.without_end()):
        raise SchemaError(f"schema: no finite value can satisfy {_ROOT if value == NOTHING else name}")
    return terms.seq(compiler.gap, value)


class _Compiler:
    def __init__(self, terms: Terms, root: Schema | bool) -> None:
        t = self._terms = terms
        self._root = root
        self._numbers = Numbers(t)
        self._done: dict[str, Term] = {}
        """What references to a place became."""
        space = t.text(b" ")
        self.gap = t.either(END, space, t.seq(t.text(b"\n"), t.repeat(space, 0, _INDENT)))
        """What may stand between tokens: no more, or a model that has nothing to say might write space for ever."""
        self._colon = t.seq(t.text(b":"), t.optional(space))
        self._comma = t.seq(t.text(b","), self.gap)
        self._any_string = self._quoted(t.repeat(any_character(t)))
        self._anything = t.later("anything")
        scalars = [
            self._any_string,
            self._numbers.number(None, None),
            *(t.text(w) for w in (b"true", b"false", b"null")),
        ]
        pair = t.seq(self._any_string, self._colon, self._anything)
        lists = (self._enclosed(b"{}", pair, 0, None), self._enclosed(b"[]", self._anything, 0, None))
        t.define("anything", t.either(*scalars, *lists))

    def value(self, schema: Any, at: str) -> Term:
        """The values of the schema at a place."""
        if schema is True or schema == {}:
            return self._anything
        if schema is False:
            return NOTHING
        if not isinstance(schema, Mapping):
            raise SchemaError(f"schema: {at} is {_shown(schema)}; it must be an object, true or false")
        for name in schema:
            if name in _UNSUPPORTED and (name not in _IDLE or schema[name] != _IDLE[name]):
                raise SchemaError(f"schema: {at} has {name}, which is not supported")
        if "$ref" in schema:
            return self._referred(schema, at)
        if "allOf" in schema:
            return self.value(self._merged(schema, at), at)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._any_of(schema, name, at)
        return self._plain(schema, at)

    # ---- combinations --------------------------------------------------------------------------------------------

    def _referred(self, schema: Schema, at: str) -> Term:
        place = schema["$ref"]
        if others := sorted(set(schema) & (_TYPES_BY_KEYWORD.keys() | {"type", "enum", "const", "anyOf", "allOf"})):
            raise SchemaError(f"schema: {at} has {others[0]} beside $ref, which is not supported")
        target = self._find(place, at)
        if place not in self._done:
            self._done[place] = self._terms.later(place)
            self._terms.define(place, self.value(target, place))
        return self._done[place]

    def _find(self, place: Any, at: str) -> Any:
        if not isinstance(place, str) or not (place == _ROOT or place.startswith("#/")):
            raise SchemaError(
                f"schema: {at} refers to {_shown(place)}; references must stay within it and begin with #/"
            )
        found: Any = self._root
        for part in place.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(f"schema: {at} refers to {place}, which is not there") from None
        return found

    def _merged(self, schema: Schema, at: str) -> dict[str, Any]:
        """One schema of all that must hold; the same keyword twice only where what it says can be put together."""
        made = {name: value for name, value in schema.items() if name != "allOf"}
        for i, part in enumerate(self._listed(schema["allOf"], f"{at}/allOf")):
            while isinstance(part, Mapping) and set(part) == {"$ref"}:
                part = self._find(part["$ref"], f"{at}/allOf/{i}")
            if not isinstance(part, Mapping):
                raise SchemaError(f"schema: {at}/allOf/{i} is {_shown(part)}; it must be an object")
            for name, value in (self._merged(part, f"{at}/allOf/{i}") if "allOf" in part else part).items():
                if name == "properties" and isinstance(made.get(name), Mapping):
                    made[name] = {**made[name], **value}
                elif name == "required" and name in made:
                    made[name] = [*made[name], *value]
                elif name in made and name in (_TYPES_BY_KEYWORD.keys() | {"type"}) and made[name] != value:
                    raise SchemaError(f"schema: {at} has {name} twice within allOf, which is not supported")
                else:
                    made[name] = value
        return made

    def _any_of(self, schema: Schema, name: str, at: str) -> Term:
        if others := sorted(set(schema) & (_TYPES_BY_KEYWORD.keys() | {"enum", "const"})):
            raise SchemaError(f"schema: {at} has {others[0]} beside {name}, which is not supported; put it into each")
        options = self._listed(schema[name], f"{at}/{name}")
        if not all(self._states(option, schema.get("type"), at) for option in options):
            raise SchemaError(f"schema: {at} has type beside {name}, which is not supported; put it into each")
        return self._terms.either(*(self.value(option, f"{at}/{name}/{i}") for i, option in enumerate(options)))

    def _states(self, option: Any, kind: Any, at: str) -> bool:
        """Whether a schema says itself that values are of this kind, if any is given."""
        while isinstance(option, Mapping) and "$ref" in option:
            option = self._find(option["$ref"], at)
        return kind is None or (isinstance(option, Mapping) and option.get("type") == kind)

    # ---- kinds of values -----------------------------------------------------------------------------------------

    def _plain(self, schema: Schema, at: str) -> Term:
        if "const" in schema:
            return self._one_of([schema["const"]], schema, at)
        if "enum" in schema:
            return self._one_of(self._listed(schema["enum"], f"{at}/enum"), schema, at)
        kinds = schema.get("type", sorted({_TYPES_BY_KEYWORD[n] for n in schema if n in _TYPES_BY_KEYWORD}))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not all(kind in _TYPES for kind in kinds):
            raise SchemaError(f"schema: {at} has the type {_shown(kinds)}; known are {', '.join(_TYPES)}")
        if not kinds:
            return self._anything
        return self._terms.either(*(getattr(self, f"_{kind}")(schema, at) for kind in kinds))

    def _one_of(self, values: Iterable[Any], schema: Schema, at: str) -> Term:
        """Those of `values` that the rest of their schema allows."""
        rest = {name: value for name, value in schema.items() if name == "type" or name in _TYPES_BY_KEYWORD}
        allowed, texts = self._plain(rest, at), map(_json, values)
        kept = (text for text in texts if not rest or self._terms.holds(allowed, text))
        return self._terms.either(*map(self._terms.text, kept))

    def _null(self, schema: Schema, at: str) -> Term:
        return self._terms.text(b"null")

    def _boolean(self, schema: Schema, at: str) -> Term:
        return self._terms.either(self._terms.text(b"true"), self._terms.text(b"false"))

    def _integer(self, schema: Schema, at: str) -> Term:
        return self._numbers.integer(*self._bounds(schema, at))

    def _number(self, schema: Schema, at: str) -> Term:
        return self._numbers.number(*self._bounds(schema, at))

    def _bounds(self, schema: Schema, at: str) -> tuple[Bound | None, Bound | None]:
        found: list[Bound | None] = []
        for name, strict, pick in (("minimum", "exclusiveMinimum", max), ("maximum", "exclusiveMaximum", min)):
            bounds = [Bound(_decimal(schema[n], f"{at}/{n}"), n == strict) for n in (strict, name) if n in schema]
            found.append(pick(bounds, key=lambda b: b.value) if bounds else None)
        return found[0], found[1]

    def _string(self, schema: Schema, at: str) -> Term:
        t = self._terms
        least, most = self._counts(schema, "minLength", "maxLength", at)
        pattern = schema.get("pattern", _FORMATS.get(str(schema.get("format"))))
        if pattern is None:
            return self._quoted(t.repeat(any_character(t), least, most))
        if not isinstance(pattern, str):
            raise SchemaError(f"schema: {at}/pattern is {_shown(pattern)}; it must be a string")
        try:
            content = pattern_term(t, pattern)
        except SchemaError as e:
            raise SchemaError(f"schema: {at}: {e}") from None
        if least or most is not None:
            content = t.both(content, t.repeat(character(t, ANY), least, most))
        return self._quoted(content)

    def _quoted(self, content: Term) -> Term:
        return self._terms.seq(self._terms.text(b'"'), content, self._terms.text(b'"'))

    def _array(self, schema: Schema, at: str) -> Term:
        least, most = self._counts(schema, "minItems", "maxItems", at)
        first = [self.value(s, f"{at}/prefixItems/{i}") for i, s in enumerate(schema.get("prefixItems", ()))]
        rest = self.value(schema.get("items", not first), f"{at}/items")
        if not first:
            return self._enclosed(b"[]", rest, least, most)
        return self._tuple(first, rest, least, most)

    def _tuple(self, first: Sequence[Term], rest: Term, least: int, most: int | None) -> Term:
        """Items of which each of the first has a schema of its own; like all of them these may be missing."""
        t = self._terms
        more = None if most is None else max(most - len(first), 0)
        tail = t.repeat(t.seq(self._comma, rest), max(least - len(first), 0), more)
        for i in reversed(range(len(first) if most is None else min(most, len(first)))):
            item = t.seq(self._comma, first[i], tail) if i else t.seq(first[i], tail)
            tail = item if i < least else t.either(item, END)
        return t.seq(t.text(b"["), self.gap, tail, self.gap, t.text(b"]"))

    def _enclosed(self, brackets: bytes, item: Term, least: int, most: int | None) -> Term:
        t = self._terms
        opening, closing = t.text(brackets[:1]), t.text(brackets[1:])
        if most == 0:
            return t.seq(opening, closing)
        more = t.repeat(t.seq(self._comma, item), max(least - 1, 0), None if most is None else most - 1)
        full = t.seq(item, more)
        return t.seq(opening, self.gap, full if least else t.either(full, END), self.gap, closing)

    def _object(self, schema: Schema, at: str) -> Term:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise SchemaError(f"schema: {at} must have properties that are an object, and required that is a list")
        others = schema.get("additionalProperties", not properties and not required)
        missing = [name for name in required if name not in properties]
        declared = {**properties, **dict.fromkeys(missing, schema.get("additionalProperties", True))}
        pairs = [
            (self._pair(name, self.value(value, f"{at}/properties/{name}")), name in required)
            for name, value in declared.items()
        ]
        return self._pairs(pairs, self._additional(schema, others, list(declared), at))

    def _pair(self, name: str, value: Term) -> Term:
        return self._terms.seq(self._terms.text(_json(name)), self._colon, value)

    def _additional(self, schema: Schema, allowed: Any, declared: list[str], at: str) -> Term:
        """A pair of another name than the declared ones."""
        t = self._terms
        value = self.value(allowed, f"{at}/additionalProperties")
        if value == NOTHING:
            return NOTHING
        names = schema.get("propertyNames", True)
        key = self._quoted(t.repeat(character(t, ANY)))
        if names is not True:
            key = self.value(
                {"type": "string", **names} if isinstance(names, Mapping) else names, f"{at}/propertyNames"
            )
        if declared:
            key = t.both(key, t.other(t.either(*(t.text(_json(name)) for name in declared))))
        return t.seq(key, self._colon, value)

    def _pairs(self, declared: Sequence[tuple[Term, bool]], other: Term) -> Term:
        """Pairs in their order, of which some must be there, then any number of others."""
        t = self._terms
        others = t.repeat(t.seq(self._comma, other))
        none_yet, some = t.optional(other, others), others
        for pair, required in reversed(declared):
            with_first, with_next = t.seq(pair, some), t.seq(self._comma, pair, some)
            none_yet = with_first if required else t.either(with_first, none_yet)
            some = with_next if required else t.either(with_next, some)
        full = (
            t.either(t.seq(self.gap, none_yet, self.gap), END)
            if t.may_end(none_yet)
            else t.seq(self.gap, none_yet, self.gap)
        )
        return t.seq(t.text(b"{"), full, t.text(b"}"))

    # ---- reading -------------------------------------------------------------------------------------------------

    def _counts(self, schema: Schema, least: str, most: str, at: str) -> tuple[int, int | None]:
        for name in (least, most):
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_ITEMS:
                raise SchemaError(
                    f"schema: {at}/{name} is {_shown(value)}; it must be a whole number up to {_MOST_ITEMS}"
                )
        if schema.get(most, _MOST_ITEMS) < schema.get(least, 0):
            raise SchemaError(f"schema: {at} has {most} below {least}")
        return schema.get(least, 0), schema.get(most)

    def _listed(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise SchemaError(f"schema: {at} is {_shown(value)}; it must be a list that is not empty")
        return value


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as e:  # NaN, or half of a surrogate pair
        raise SchemaError(f"schema: {_shown(value)} cannot be written as JSON: {e}") from None


def _decimal(value: Any, at: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e15:
        raise SchemaError(f"schema: {at} is {_shown(value)}; it must be a number between -1e15 and 1e15")
    return Decimal(repr(value))


def _shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"

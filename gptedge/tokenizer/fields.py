"""Reading fields of a tokenizer.json block with an error that names the block and the field."""

from __future__ import annotations

from typing import Any

from gptedge.errors import TokenizerError

Block = dict[str, Any]
_NAMES = {str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}


def kind(block: Any, where: str) -> str:
    """The `type` of a block such as {"type": "ByteLevel", …}."""
    if not isinstance(block, dict):
        raise TokenizerError(f"{where} is {_show(block)}, and an object is needed")
    return str(field(block, "type", str, where))


def field(block: Block, name: str, wanted: type, where: str, default: Any = ...) -> Any:
    """`block[name]`, checked to be of type `wanted`; `default` stands in for a missing field or null."""
    value = block.get(name)
    if value is None and default is not ...:
        return default
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        state = "is missing" if name not in block else f"is {_show(value)}"
        raise TokenizerError(f"{where}: {name!r} {state}, and {_NAMES[wanted]} is needed")
    return value


def choice(block: Block, name: str, options: tuple[str, ...], where: str, default: str) -> str:
    """`block[name]`, checked to be one of `options`."""
    value = str(field(block, name, str, where, default))
    if value not in options:
        raise TokenizerError(f"{where}: {name!r} is {value!r}, and one of {', '.join(options)} is needed")
    return value


def pattern(block: Block, where: str) -> tuple[str, bool]:
    """A {"String": …} or {"Regex": …} pattern: its text, and whether it is a regular expression."""
    value = field(block, "pattern", dict, where)
    for name in ("String", "Regex"):
        if isinstance(value.get(name), str):
            return value[name], name == "Regex"
    raise TokenizerError(f"{where}: 'pattern' is {_show(value)}, and {{'String': …}} or {{'Regex': …}} is needed")


def unsupported(where: str, name: str) -> TokenizerError:
    return TokenizerError(f"{where} type {name!r} is not supported")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"

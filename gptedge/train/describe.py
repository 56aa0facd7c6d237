"""Tables of what the verbs that train can be set to, read off the code that says it: for --list-settings and docs/."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields

from gptedge.train.presets import PRESETS
from gptedge.train.settings import LoopConfig

Rows = list[list[str]]


def preset_rows() -> Rows:
    """A head, then a row for each preset."""
    head = ["preset", "parameters", "layers", "width", "vocabulary", "context", "tokens a step", "steps", "on 2 cores"]
    rows = []
    for name, p in PRESETS.items():
        sizes = [
            f"{n:,}" for n in (p.n_layer, p.n_embd, p.vocab_size, p.context_length, p.batch_size * p.context_length)
        ]
        rows.append([name, f"{p.parameters / 1e6:.1f}M", *sizes, f"{p.max_steps:,}", p.expected_time])
    return [head, *rows]


def setting_rows(kind: type[LoopConfig]) -> Rows:
    """A head, then a row for each key of the TOML file: its default, its bounds, and what its docstring says."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docs |= _field_docs(base)
    rows = [["key", "default", "bounds", "what it sets"]]
    for f in fields(kind):
        default = kind.unset.get(f.name, "the preset's") if f.default is None else f"{f.default}".lower()
        _kind, low, high = kind.bounds.get(f.name, (str, None, None))
        bounds = "" if low is None else f"{low:g} to {high:g}"
        rows.append([f.name, default, bounds, docs[f.name]])
    return rows


def markdown(rows: Rows) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs

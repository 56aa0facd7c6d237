"""The text that every Python brings along: its language reference's topics and its standard library's docstrings.

`gptedge demo` trains on it, so that nothing has to be downloaded. The library's source is parsed, never imported. The
same Python gives the same text; another version of Python gives slightly other text.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

# Parts of the library's folder that are tests, applications, tables, or other people's packages.
_SKIPPED = frozenset({"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data"}) | {
    "site-packages",
    "dist-packages",
    "__phello__",
}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_corpus() -> Iterator[str]:
    """Documents of 2.4 MB in all: each topic of `help()`, then each documented module, in the order of their names."""
    from pydoc_data.topics import topics  # half a megabyte of text, wanted only here

    for name in sorted(topics):
        yield topics[name].strip() + "\n"
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _SKIPPED & set(parts) and (text := _module_text(".".join(parts), file)):
            yield text


def _module_text(name: str, file: Path) -> str:
    """What `help(module)` would show: each documented thing's signature, and its docstring indented below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library has its own invalid escapes
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates, and examples that are broken on purpose
            return ""
    return "\n".join(f"{title}\n{textwrap.indent(doc, '    ')}\n" for title, doc in _docstrings(tree, name))


def _docstrings(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    """Signature and docstring of a node and of what it defines; what stands inside functions is left out."""
    if doc := (ast.get_docstring(node) or "").strip():
        yield _signature(node, name), doc
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    prefix = f"{name}." if isinstance(node, ast.ClassDef) else ""
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _docstrings(child, prefix + child.name)


def _signature(node: _Documented, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    return f"{name}({ast.unparse(node.args)})"

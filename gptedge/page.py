"""The frame of a page that is one file: no network, nothing beside it, light and dark. Style is page.css."""

from __future__ import annotations

from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")


def html_page(
    *, title: str, eyebrow: str, lede: str, body: str, footer: str, style: Path, script: Path | None = None
) -> str:
    """A whole page. `lede`, `body` and `footer` are HTML, the others text; `style` and `script` are files."""
    styles = _STYLE.read_text(encoding="utf-8") + style.read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    scripts = ""
    if script is not None:
        policy += "; script-src 'unsafe-inline'; img-src data:"
        scripts = f"<script>\n{script.read_text(encoding='utf-8')}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{styles}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n<h1>{escape(title)}</h1>\n{lede}</header>\n'
        f"{body}\n</main>\n<footer>{footer}</footer>\n{scripts}</body>\n</html>\n"
    )


def section(name: str, title: str, inside: str) -> str:
    """`name` is its anchor; `title` is text, `inside` HTML."""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{inside}</section>'

"""A text to measure on when none is given: Python's language reference, which every Python brings along."""

from __future__ import annotations

SAMPLE_NAME = "Python's language reference"


def sample_text() -> str:
    """The topics of `help()`, about 500,000 characters; the same Python gives the same text."""
    from pydoc_data.topics import topics  # half a megabyte, wanted only here

    return "\n\n".join(topics[name] for name in sorted(topics))

"""The command line: one verb, one file, one function. Nothing heavy is imported before its verb runs."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    try:
        from gptedge.cli import app
    except KeyboardInterrupt:  # which the command itself tells of once it is there
        from gptedge.errors import EXIT_INTERRUPTED

        print("gptedge: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return app.main(arguments)

"""The command line: one verb, one file, one function. Nothing heavy is imported before its verb runs."""

from __future__ import annotations

from gptedge.cli.app import main

__all__ = ["main"]

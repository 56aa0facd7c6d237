"""What a pull left behind."""

from __future__ import annotations

from pathlib import Path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []

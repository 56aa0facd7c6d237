"""gptedge verify: are a bundle's files those that its manifest describes?"""

from __future__ import annotations

from gptedge.bundle import open_bundle, verify
from gptedge.cli.common import BundleArgument, Json, emit


def command(bundle: BundleArgument, as_json: Json = False) -> None:
    """Compare every file of a bundle with its sha256."""
    opened = open_bundle(bundle)
    verify(opened)
    assert opened.manifest is not None
    count = len(opened.manifest["files"])
    emit(
        {"bundle": str(bundle), "files": count, "ok": True},
        as_json=as_json,
        lines=[f"{bundle}: {count} files, all as described"],
    )

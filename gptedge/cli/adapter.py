"""gptedge adapter: a LoRA adapter in PEFT's format becomes a file that a bundle loads while it runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptedge.cli.common import BundleArgument, Force, Json, check_new_file, emit, needs
from gptedge.text import counted


def command(
    source: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder that finetune --adapter, or PEFT, wrote.")
    ],
    bundle: BundleArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file, NAME.onnx_adapter.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA adapter for a bundle that was exported with --lora-inputs."""
    check_new_file(out, force=force)
    with needs("export"):
        from gptedge.export.adapter import make_adapter
    result = make_adapter(source, bundle, out, force=force)
    checked = "" if result.base_checked else "; it does not say which weights it was trained on"
    emit(
        {**asdict(result), "adapter": str(out)},
        as_json=as_json,
        lines=[f"{out}: {counted(result.layers, 'layer')} of the graph, updates of rank {result.rank}{checked}"],
    )

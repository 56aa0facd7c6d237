"""gptedge export: a checkpoint becomes a bundle that runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptedge.cli.common import Force, Json, SourceArgument, emit, needs, one_of, progress, say


def command(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder.")],
    dtype: Annotated[str, typer.Option(help="How weights are stored: fp32 or fp16.")] = "fp32",
    portable: Annotated[
        bool, typer.Option("--portable", help="Use ONNX's standard operators alone, for other runtimes; slower here.")
    ] = False,
    lora_inputs: Annotated[
        bool, typer.Option("--lora-inputs", help="Let the bundle take LoRA adapters; a little slower.")
    ] = False,
    via: Annotated[
        str | None, typer.Option(help="Another exporter, for an architecture that is not supported: optimum.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare logits and greedy tokens with the source.")
    ] = True,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, for a source that brings none.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX bundle with KV-cache inputs."""
    with needs("export"):
        from gptedge.export.exporter import DTYPES, EXPORTERS, export
    one_of("--dtype", dtype, DTYPES)
    if via is not None:
        one_of("--via", via, EXPORTERS)
    with progress("export") as report:
        result = export(
            source,
            out,
            dtype=dtype,
            portable=portable,
            lora_inputs=lora_inputs,
            via=via,
            verify=verify,
            tokenizer=tokenizer,
            force=force,
            report=report,
        )
    for warning in result.warnings:
        say(f"warning: {warning}; chats will be refused, plain text works")
    value = {**asdict(result), "bundle": str(result.bundle)}
    p = result.parity
    checked = "not verified" if p is None else (
        f"verified: {p.greedy_tokens_equal} of {p.greedy_tokens_compared} greedy tokens equal, "
        f"largest logit difference {p.max_abs_logit_diff:.1e}"
    )  # fmt: skip
    emit(
        value,
        as_json=as_json,
        lines=[
            f"{out}: {result.family}, context of {result.context_length} tokens, "
            f"{result.size_mb:g} MB in {result.seconds:g} s; {checked}"
        ],
    )

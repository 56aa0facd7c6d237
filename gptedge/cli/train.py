"""gptedge train: text becomes a checkpoint that the whole field can open."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptedge.cli.common import Force, Json, Threads, emit, needs, table
from gptedge.cli.training_settings import settings_from, show_settings
from gptedge.cli.watch import SampleEvery, SamplePrompt, TensorBoard, outcome, watching
from gptedge.errors import UsageError


def _print_presets(wanted: bool) -> None:
    if wanted:
        with needs("train"):
            from gptedge.train.describe import preset_rows
        for line in table(preset_rows()):
            print(line)
        raise typer.Exit


def _print_settings(wanted: bool) -> None:
    if wanted:
        with needs("train"):
            from gptedge.train.config import TrainConfig
        show_settings(TrainConfig)


def command(
    context: typer.Context,
    data: Annotated[list[Path], typer.Option(help="Text: files or folders; may be given several times.")],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.")],
    preset: Annotated[str | None, typer.Option(help="nano, micro, small or base (default nano).")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags win over it.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Weight updates to make.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Time to train for.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest of the schedule.")] = None,
    qat: Annotated[
        str | None, typer.Option(help="int4 or int8: train with weights rounded as quantize will round them.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the order of the data.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saves that --resume continues from.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave broken lines of JSONL out, and count them.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", help="FSDP2 under torchrun: a part of the model each.")] = False,
    sample_every: SampleEvery = None,
    sample_prompt: SamplePrompt = "",
    tensorboard: TensorBoard = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", is_eager=True, callback=_print_presets, help="Show the presets.")
    ] = False,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", is_eager=True, callback=_print_settings, help="Show what a TOML may set.")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a GPT from text."""
    if shard and sample_every is not None:
        raise UsageError("--sample-every needs the whole model in one process, and --shard spreads it; leave one out")
    with needs("train"):
        from gptedge.train.config import TrainConfig
        from gptedge.train.run import run_training
    options = {
        "preset": preset,
        "max_steps": max_steps,
        "max_seconds": max_seconds,
        "learning_rate": learning_rate,
        "qat": qat,
        "seed": seed,
        "save_every": save_every,
        "threads": threads,
    }
    settings = settings_from(TrainConfig, context, options, file=config, out=out, resume=resume)
    with watching(
        f"train {out}", out / "tensorboard", sample_every=sample_every, sample_prompt=sample_prompt, events=tensorboard
    ) as (on_model, on_step, on_message):
        result = run_training(
            data,
            out,
            config=settings,
            resume=resume,
            force=force,
            skip_bad=skip_bad,
            shard=shard,
            on_step=on_step,
            on_message=on_message,
            on_model=on_model,
        )
    if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process alone speaks
        return
    value = {**asdict(result), "checkpoint": str(result.checkpoint), "tokens": str(result.tokens)}
    line = f"{out}: {result.parameters:,} parameters, {outcome(result)}"
    line += f"; {result.tokens_per_second:,.0f} tokens/s, {result.mfu:.0%} of what matrix products reach here"
    emit(value, as_json=as_json, lines=[line, f"next: gptedge export {out} {out}-onnx"])

"""gptedge finetune: a model learns from conversations, and stays what the whole field can open."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptedge.cli.common import Force, Json, SourceArgument, Threads, emit, needs
from gptedge.cli.training_settings import settings_from, show_settings
from gptedge.cli.watch import SampleEvery, SamplePrompt, TensorBoard, outcome, watching
from gptedge.text import counted


def _print_settings(wanted: bool) -> None:
    if wanted:
        with needs("train"):
            from gptedge.train.finetune_config import FinetuneConfig
        show_settings(FinetuneConfig)


def command(
    ctx: typer.Context,
    source: SourceArgument,
    data: Annotated[
        list[Path],
        typer.Option(help="JSON lines of messages, of prompt and completion, or of text; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the model that learned, or of the adapter.")],
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the updates that are trained (default 8); 0 trains every weight.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Weight of the updates, times the rank (default 16).")
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Layers that get one, such as q,v (default: q,k,v,o,gate,up,down).")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the updates alone, in PEFT's format.")] = False,
    qat: Annotated[
        str | None, typer.Option(help="int4 or int8: train with weights rounded as quantize will round them.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="How often each example is seen (default 3).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Weight updates to make, whatever the epochs.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Time to train for, whatever the epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations in each step (default 16).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest (default 1e-3; 1e-4 at rank 0).")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a conversation that are read (default 1024).")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags win over it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the updates' first values and the order of the data.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saves that --resume continues from.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, for a source that brings none.")] = None,
    sample_every: SampleEvery = None,
    sample_prompt: SamplePrompt = "",
    tensorboard: TensorBoard = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", is_eager=True, callback=_print_settings, help="Show what a TOML may set.")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Teach a model conversations, by LoRA or every weight."""
    with needs("train"):
        from gptedge.train.finetune import finetune
        from gptedge.train.finetune_config import FinetuneConfig
    from gptedge.export.sources import open_source, with_tokenizer

    options = {
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "adapter": adapter or None,
        "lora_targets": None if lora_targets is None else [t.strip() for t in lora_targets.split(",") if t.strip()],
        "qat": qat,
        "epochs": epochs,
        "max_steps": max_steps,
        "max_seconds": max_seconds,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "context": context,
        "seed": seed,
        "save_every": save_every,
        "threads": threads,
    }
    settings = settings_from(FinetuneConfig, ctx, options, file=config, out=out, resume=resume)
    checkpoint = with_tokenizer(open_source(source), tokenizer)
    with watching(
        f"finetune {out}",
        out / "tensorboard",
        sample_every=sample_every,
        sample_prompt=sample_prompt,
        events=tensorboard,
    ) as (on_model, on_step, on_message):
        result = finetune(
            checkpoint,
            data,
            out,
            config=settings,
            skip_bad=skip_bad,
            resume=resume,
            force=force,
            on_step=on_step,
            on_message=on_message,
            on_model=on_model,
        )
    line = f"{out}: {counted(result.examples, 'example')}, {outcome(result)}"
    then = f"adapter {out} BUNDLE {out}.onnx_adapter" if settings.adapter else f"export {out} {out}-onnx"
    emit({**asdict(result), "checkpoint": str(out)}, as_json=as_json, lines=[line, f"next: gptedge {then}"])

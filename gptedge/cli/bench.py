"""gptedge bench: tokens per second on this machine."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from gptedge.cli.common import BundleArgument, Json, Provider, Threads, emit

_SHOWN_MS = 0.01


def command(
    bundle: BundleArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the random prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 128,
    repeat: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 3,
    roofline: Annotated[bool, typer.Option("--roofline", help="Also show where the time of a step goes.")] = False,
    threads: Threads = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure speed."""
    from gptedge.evaluate.bench import bench
    from gptedge.evaluate.profile import decode_profile
    from gptedge.model import load

    start = time.perf_counter()
    with load(bundle, threads=threads, provider=provider) as model:
        load_ms = round((time.perf_counter() - start) * 1000, 2)
        result = bench(
            model.session, load_ms=load_ms, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeat=repeat
        )
        spent = decode_profile(model.session, prompt_tokens=prompt_tokens) if roofline else {}
    lines = [
        f"prefill {result.prefill_tokens_per_s:g} tokens/s, first token after {result.ttft_ms:g} ms",
        f"decode  {result.decode_tokens_per_s:g} tokens/s, {result.roofline['decode_fraction']:.0%} of what "
        f"{result.roofline['memory_gb_per_s']:g} GB/s of memory allow",
        f"load    {result.load_ms:g} ms, peak memory {result.peak_rss_mb:g} MB",
        f"on      {result.threads} threads, {result.provider}",
    ]
    lines += [f"{ms:7.2f} ms  {name}" for name, ms in spent.items() if ms >= _SHOWN_MS]
    value = result.as_json()
    value["roofline"] |= {"decode_profile_ms": spent} if roofline else {}
    emit(value, as_json=as_json, lines=lines)

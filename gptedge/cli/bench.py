"""gptedge bench: tokens per second on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli.common import (
    AdapterOption,
    BundleArgument,
    Json,
    Loading,
    NoTune,
    Profile,
    Provider,
    Threads,
    emit,
    say,
)
from gptedge.errors import UsageError
from gptedge.text import counted

_SHOWN_MS = 0.01


def command(
    bundle: BundleArgument,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the random prompt (default 512, or what the context has room for).")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to decode after it (default 128, or half of the context).")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 3,
    roofline: Annotated[bool, typer.Option("--roofline", help="Also show where the time of a step goes.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find the best number of threads here, in under 3 s, and keep it.")
    ] = False,
    adapter: AdapterOption = None,
    threads: Threads = None,
    profile: Profile = None,
    no_tune: NoTune = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure speed."""
    from gptedge.evaluate.bench import bench, lengths
    from gptedge.evaluate.profile import PROFILED_STEPS, decode_profile
    from gptedge.loading import load

    if tune and (no_tune or profile is not None or threads is not None):
        raise UsageError("--tune finds the number of threads; leave out --threads, --profile and --no-tune")
    loading = Loading(threads=threads, profile=profile, tune=not no_tune, provider=provider, adapter=adapter)
    tuned = _tune(bundle, loading) if tune else {}
    start = time.perf_counter()
    with load(bundle, **loading) as model:
        load_ms = round((time.perf_counter() - start) * 1000, 2)
        context, least = model.session.context_length, PROFILED_STEPS if roofline else 0
        prompt_tokens, new_tokens = lengths(context, prompt_tokens, new_tokens, least_steps=least)
        result = bench(
            model.session,
            load_ms=load_ms,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            adapter=model.adapter,
        )
        spent = decode_profile(model.session, prompt_tokens=prompt_tokens, adapter=model.adapter) if roofline else {}
    lines = [
        f"prefill {result.prefill_tokens_per_s:g} tokens/s, first token after {result.ttft_ms:g} ms",
        f"decode  {result.decode_tokens_per_s:g} tokens/s, {result.roofline['decode_fraction']:.0%} of what "
        f"{result.roofline['memory_gb_per_s']:g} GB/s of memory allow",
        f"load    {result.load_ms:g} ms, peak memory {result.peak_rss_mb:g} MB",
        f"on      {counted(result.threads, 'thread')} ({model.threads_from}), {result.provider}",
    ]
    lines += [f"{ms:7.2f} ms  {name}" for name, ms in spent.items() if ms >= _SHOWN_MS]
    value = {**result.as_json(), "profile": {"source": model.threads_from, **tuned}}
    value["roofline"] |= {"decode_profile_ms": spent} if roofline else {}
    emit(value, as_json=as_json, lines=lines)


def _tune(bundle: Path, loading: Loading) -> dict[str, Any]:
    """Try numbers of threads and keep the fastest; what was seen, and where the profile is."""
    from gptedge.loading import load
    from gptedge.runtime import tuning

    start = time.perf_counter()
    with load(bundle, provider=loading["provider"], tune=False) as model:
        usual = model.session.threads
        trials = tuning.tune(model.session, load_s=time.perf_counter() - start)
        threads, path = tuning.fastest(usual, trials), None
        try:
            path = tuning.keep(model.bundle, threads)
        except OSError as e:
            say(f"gptedge: the profile could not be kept ({e.filename}: {e.strerror})")
            loading["threads"] = threads
    for trial in trials:
        differs = "" if trial.equal else ", with other numbers, so not to be used"
        say(f"{counted(trial.threads, 'thread')}: {trial.ratio:.2f} of the time of {usual}{differs}")
    say(f"{counted(threads, 'thread')} it is" + (f"; kept in {path}" if path else ""))
    return {"trials": [vars(trial) for trial in trials], "path": None if path is None else str(path)}

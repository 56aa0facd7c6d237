"""`gptedge.load`: a bundle's graph opens in a thread, while Python imports and reads what else generating text needs.

So this module imports little: numpy and the session, which opening the graph waits for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from gptedge.bundle import open_bundle
from gptedge.errors import GptEdgeError, UsageError
from gptedge.runtime.onnx_runtime import import_onnxruntime
from gptedge.runtime.session import PREFILL_AT_LEAST, Session
from gptedge.runtime.tuning import choose_threads

if TYPE_CHECKING:
    from gptedge.model import Model

_LETTERS_A_TOKEN = 4  # of English; most other texts have fewer


def load(
    bundle: str | Path,
    *,
    threads: int | None = None,
    provider: str | None = None,
    verify: bool = True,
    speculate: bool = True,
    tune: bool = True,
    profile: str | Path | None = None,
    adapter: str | Path | None = None,
    long_prompts: bool = False,
) -> Model:
    """Load a bundle folder.

    threads: cores to compute on (default: what `gptedge bench --tune` found best for this bundle on this machine, else
        the physical ones that the process may use).
    provider: "cpu", "cuda", or None for the best.
    verify: compare every file that is loaded with the manifest's sha256, which runs beside the loading.
    speculate: check tokens guessed from the text several at once; without, the same tokens take longer.
    tune: False leaves out of account what was found best; nothing is ever tried while loading.
    adapter: a LoRA adapter to begin with, as `Model.load_adapter` takes it and with what it raises.
    profile: a file that says how many threads, as `gptedge bench --tune` writes it, wherever it was measured.
    long_prompts: open the bundle's graph for prompts at once, beside the other, because prompts of more than 64 tokens
        will come; otherwise the first of them opens it, which takes some tenths of a second and the graph's memory.
    Raises BundleError when the folder is not a whole bundle, MissingExtraError without onnxruntime,
    UsageError when threads is no number of them, or the profile none.
    """
    if not isinstance(bundle, (str, PathLike)):
        raise UsageError(f"the bundle is {repr(bundle)[:60]}; it must be a path")
    opened = open_bundle(Path(bundle))
    import_onnxruntime()  # here, where Ctrl+C can be held back meanwhile
    choice = choose_threads(opened, threads, None if profile is None else Path(profile), tuned=tune)
    with ThreadPoolExecutor(1, "gptedge-session") as pool:
        session = pool.submit(
            Session,
            opened,
            threads=choice.threads,
            provider=provider,
            check=verify,
            speculate=speculate,
            long_prompts=long_prompts,
        )
        try:  # meanwhile, which takes a sixth off a start: what Python has to import and to read
            from gptedge.model import Model
            from gptedge.tokenizer import Tokenizer

            tokenizer = Tokenizer.from_folder(opened.path)
        except GptEdgeError:
            session.result()  # a file that is not the bundle's own says more than what is wrong in it
            raise
        model = Model(opened, session.result(), tokenizer, threads_from=choice.source)
    if adapter is not None:
        model.adapter = model.load_adapter(adapter)
    return model


def likely_long(prompt: str) -> bool:
    """Whether a prompt will go through the graph for prompts, as far as its letters tell."""
    return len(prompt) > _LETTERS_A_TOKEN * PREFILL_AT_LEAST

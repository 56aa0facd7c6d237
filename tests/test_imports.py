"""Who may import whom, seen in fresh processes: a program that only chats must not pay for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "textual", "gguf", "starlette", "uvicorn", "transformers", "tokenizers")
_LIST = "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after `code`, in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{_LIST}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import gptedge", ()),
        ("import gptedge.cli.app; gptedge.cli.app.build()", ()),
        ("import gptedge; gptedge.SamplingParams; gptedge.GptEdgeError", ()),
        ("import gptedge.loading", ()),
        ("import gptedge.model, gptedge.conversation, gptedge.aio", ()),
        ("import gptedge.runtime.session, gptedge.evaluate.divergence, gptedge.evaluate.bench", ()),
        ("import gptedge.tokenizer, gptedge.checkpoint, gptedge.families", ()),
        ("import gptedge.export.exporter", ("onnx",)),
        ("import gptedge.quantize.quantizer", ("onnx",)),
        ("import gptedge.train.trainer", ("torch",)),
        ("import gptedge.tui.app", ("textual",)),
    ],
)
def test_rooms_load_only_what_they_need(code: str, allowed: tuple[str, ...]) -> None:
    assert loaded_by(code) & set(HEAVY) <= set(allowed)


def test_a_graph_opens_before_the_rest_is_imported() -> None:
    """The tokenizer's modules come while it opens: `regex` alone takes 10 ms."""
    assert "regex" not in loaded_by("import gptedge.loading")


def test_generating_needs_no_torch(tiny_bundle: Path) -> None:
    loaded = loaded_by(f"import gptedge\nwith gptedge.load({str(tiny_bundle)!r}) as m: m.generate('The', max_tokens=2)")
    assert loaded & set(HEAVY) == {"onnxruntime"}


def test_exporting_a_folder_needs_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from gptedge.export.exporter import export
export(Path({str(tiny_checkpoint)!r}), Path({str(tmp_path / "out")!r}))
"""
    assert loaded_by(code) & set(HEAVY) == {"onnx", "onnxruntime"}


NAMES = ("ORT_DISABLE_TELEMETRY", "ORT_GQA_DISABLE_FLASH_ATTENTION")


def test_telemetry_and_tiled_attention_are_off_before_onnxruntime_loads(tiny_bundle: Path) -> None:
    code = f"""
import os, sys, gptedge
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("at import:", *(os.environ.get(name) for name in {NAMES}))
sys.meta_path.insert(0, Watch())
gptedge.load({str(tiny_bundle)!r})
"""
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "at import: 1 1\n"
    assert done.stderr == ""


def test_api_offers_what_it_lists() -> None:
    import gptedge

    for name in gptedge.__all__:
        assert getattr(gptedge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gptedge.nothing

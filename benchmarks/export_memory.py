"""Peak memory and time of exporting synthetic Llama-shaped checkpoints of several depths.

    python benchmarks/export_memory.py [--layers 4 28] [--width 1536 --ff 8960 --heads 12 --kv-heads 2 --vocab 151936]
                                       [--dtype fp32] [--no-verify] [--folder build/bench/export-memory] [--json]

Writes each checkpoint as bfloat16 in sharded safetensors, exports it in a fresh process, prints one line, and deletes
both. The defaults are 1.5 billion parameters at 28 layers: 3 GB of checkpoint and 6.2 GB of fp32 bundle on the disk.
The weights are random, small enough that activations stay finite; their values do not matter to memory or time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHARD_BYTES = 1 << 30
ROWS_AT_ONCE = 4096
EXPORT = """
import json, sys
from pathlib import Path
from gptedge.export.exporter import export
source, out, dtype, verify = json.loads(sys.argv[1])
r = export(Path(source), Path(out), dtype=dtype, verify=verify)
print(json.dumps([r.size_mb, r.seconds, r.peak_rss_mb, r.parity and r.parity.relative_logit_diff]))
"""


def hf_config(a: argparse.Namespace, n_layer: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": a.width,
        "intermediate_size": a.ff,
        "num_hidden_layers": n_layer,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "vocab_size": a.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """The shapes are those of gptedge's own table, under Llama's names."""
    from gptedge.families import checkpoint_name, family_of, tensor_shapes

    folder.mkdir(parents=True)
    shapes = tensor_shapes(family_of(config).config(config))
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, {checkpoint_name(name): shapes[name] for name in names})
        where |= {checkpoint_name(name): file for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random bfloat16, a few MB at a time."""
    rng = np.random.default_rng(0)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for shape in shapes.values():
            rows, width = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
            scale = np.float32(1 / np.sqrt(width)) if len(shape) == 2 else np.float32(0.1)
            for start in range(0, rows, ROWS_AT_ONCE):
                values = rng.standard_normal((min(ROWS_AT_ONCE, rows - start), width), np.float32) * scale
                values = values if len(shape) == 2 else 1 + values
                f.write((values.view(np.uint32) >> 16).astype(np.uint16).data)


def tokenizer() -> dict[str, Any]:
    """Two letters: an export needs some tokenizer, and reads no text."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "model": model}


def measure(a: argparse.Namespace, n_layer: int) -> dict[str, Any]:
    source, out = (a.folder / name for name in ("checkpoint", "bundle"))
    shutil.rmtree(a.folder, ignore_errors=True)
    try:
        write_checkpoint(source, hf_config(a, n_layer))
        work = json.dumps([str(source), str(out), a.dtype, not a.no_verify])
        command = [sys.executable, "-c", EXPORT, work]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        size, seconds, peak, difference = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(a.folder, ignore_errors=True)
    return {"layers": n_layer, "size_mb": size, "peak_rss_mb": peak, "seconds": seconds, "logit_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 28])
    for name, value in (("width", 1536), ("ff", 8960), ("heads", 12), ("kv-heads", 2), ("vocab", 151936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build") / "bench" / "export-memory")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    rows = []
    for n_layer in a.layers:
        row = measure(a, n_layer)
        rows.append(row)
        if not a.json:
            print(
                f"{n_layer:3} layers, {a.dtype}: {row['size_mb']:8.1f} MB written, peak {row['peak_rss_mb']:7.1f} MB "
                f"({row['peak_rss_mb'] / row['size_mb']:.2f} of it), {row['seconds']:.1f} s, "
                f"verified to {row['logit_difference']}",
                flush=True,
            )
    if a.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()

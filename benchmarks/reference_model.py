"""A reference with ordinary weights to judge quantization on: SmolLM2-135M-Instruct with its columns rescaled.

    python benchmarks/reference_model.py OUT [--seed N | --plain] [--gguf FILE]

The model comes as a 4-bit GGUF, so its weights lie on a 4-bit grid, and 4-bit rounding would look free of loss. Random
factors in exp(±0.25) on columns, undone where they come from, leave the function as it was and the grid behind:

    norm's gain ↔ columns of the matrices after it      v rows ↔ o columns      up rows ↔ down columns

Writes a Hugging Face checkpoint and, for llama.cpp, a float32 GGUF file with the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gptedge import safetensors
from gptedge.checkpoint import CONFIG, WEIGHTS, Checkpoint
from gptedge.export.sources import open_source
from gptedge.families import checkpoint_name
from gptedge.files import new_file, new_folder, write_json
from gptedge.pull import pull

MODEL = "smollm2-135m-instruct"
SPREAD = 0.25
Weights = dict[str, npt.NDArray[np.float32]]

# A norm -> the matrices that read it, by Hugging Face's names inside a layer.
_AFTER_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_GGUF_FLOAT32 = 0  # general.file_type
# Told anew by the writer, or no longer true.
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def rescale(weights: Weights, config: Mapping[str, Any], seed: int) -> None:
    """Multiply columns of a Llama-shaped model's matrices by random factors, in place, without changing its function.

    `weights` and `config` (config.json) are by Hugging Face's names; matrices are [out, in]."""
    rng = np.random.default_rng(seed)
    kv_heads = config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads  # query heads that share a KV head

    def factors(like: str, axis: int) -> npt.NDArray[np.float32]:
        return np.exp(rng.uniform(-SPREAD, SPREAD, weights[like].shape[axis])).astype(np.float32)

    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}.{{}}.weight".format
        for norm, matrices in _AFTER_NORMS.items():
            s = factors(name(norm), 0)
            weights[name(norm)] = weights[name(norm)] / s
            for matrix in matrices:
                weights[name(matrix)] = weights[name(matrix)] * s
        v, o, up, down = map(name, ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
        s = factors(v, 0)
        weights[v] = weights[v] / s[:, None]
        weights[o] = weights[o] * np.repeat(s.reshape(kv_heads, -1), group, axis=0).reshape(-1)
        s = factors(up, 0)
        weights[up] = weights[up] / s[:, None]
        weights[down] = weights[down] * s


def write_folder(out: Path, source: Checkpoint, weights: Weights) -> None:
    """A Hugging Face checkpoint: the source's configuration and tokenizer with these weights."""
    with new_folder(out, force=True) as folder:
        write_json(folder / CONFIG, source.hf_config)
        for name, content in source.side_files.items():
            (folder / name).write_bytes(content)
        safetensors.write(folder / WEIGHTS, weights)


def write_gguf(out: Path, source: Checkpoint, weights: Weights) -> None:
    """A float32 GGUF file: the metadata of the source, itself such a file, with these weights."""
    reader = gguf.GGUFReader(source.path)
    with new_file(out) as path:
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items():
            if key.startswith(_NOT_COPIED):
                continue
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            else:
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_file_type(_GGUF_FLOAT32)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.hf_config["num_hidden_layers"])
        for name, array in weights.items():
            writer.add_tensor(names.get_name(name, (".weight",)), _for_llama_cpp(name, array, source.hf_config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _for_llama_cpp(name: str, array: npt.NDArray[np.float32], config: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """llama.cpp rotates neighbouring rows of q and k, Hugging Face rows half a head apart."""
    keys = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = keys.get(name.split(".")[-2])
    if key is None:
        return array
    rows, columns = array.shape
    halves = array.reshape(config[key], 2, rows // config[key] // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def make(out: Path, *, seed: int | None, gguf_file: Path | None = None) -> None:
    """Write the checkpoint folder `out`, and its GGUF twin if asked. A seed of None leaves the weights as they were."""
    source = open_source(pull(MODEL).path)
    weights = {checkpoint_name(name): tensor.read() for name, tensor in source.weights().items()}
    if seed is not None:
        rescale(weights, source.hf_config, seed)
    write_folder(out, source, weights)
    if gguf_file:
        write_gguf(gguf_file, source, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="leave the weights as they were")
    parser.add_argument("--gguf", type=Path)
    a = parser.parse_args()
    make(a.out, seed=None if a.plain else a.seed, gguf_file=a.gguf)


if __name__ == "__main__":
    main()

"""What `open_source` takes for what, and nanoGPT's files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from gptedge import safetensors
from gptedge.bundle import open_bundle
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.exporter import export
from gptedge.export.sources import open_source
from gptedge.export.sources.nanogpt import open_nanogpt
from gptedge.runtime.session import Session
from gptedge.train.model import GPT
from tests.conftest import make_tokenizer


def small_gguf(path: Path) -> Path:
    w = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (w.add_context_length, 8),
        (w.add_embedding_length, 4),
        (w.add_block_count, 1),
        (w.add_feed_forward_length, 4),
        (w.add_head_count, 1),
        (w.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    w.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def small_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    safetensors.write(folder / "model.safetensors", {"x": np.ones(2, np.float32)})
    return folder


# ---- which is which ------------------------------------------------------------------------------------------------


def test_hugging_face_folder(tmp_path: Path) -> None:
    checkpoint = open_source(small_folder(tmp_path / "m"))
    assert checkpoint.tensors["x"].dtype == "F32"


def test_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = small_gguf(tmp_path / "m" / "a.gguf")
    assert open_source(file).path == file
    assert open_source(tmp_path / "m").path == file


def test_a_folder_with_config_json_is_hugging_faces_even_beside_a_gguf(tmp_path: Path) -> None:
    small_gguf(small_folder(tmp_path / "m") / "a.gguf")
    assert "x" in open_source(tmp_path / "m").tensors


def test_a_folder_with_two_gguf_files_asks_which(tmp_path: Path) -> None:
    small_gguf(tmp_path / "a.gguf")
    small_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt", "nothing.gguf", "nothing.pt"])
def test_anything_else_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "nothing.gguf").touch()
    (tmp_path / "nothing.pt").touch()
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_folders_and_gguf_files_load_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gptedge.export.sources import open_source\n"
        "for p in sys.argv[1:]: list(t.read() for t in open_source(Path(p)).tensors.values())\n"
        "sys.exit(', '.join({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)) or None)"
    )
    paths = [str(small_folder(tmp_path / "m")), str(small_gguf(tmp_path / "a.gguf"))]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- nanoGPT -------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, VOCAB, CONTEXT = 8, 2, 11, 6


def state_of(*, bias: bool, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state_dict as nanoGPT's model.py names things."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"wte": (VOCAB, WIDTH), "wpe": (CONTEXT, WIDTH), "ln_f": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"h.{i}.ln_1": (WIDTH,),
            f"h.{i}.attn.c_attn": (3 * WIDTH, WIDTH),
            f"h.{i}.attn.c_proj": (WIDTH, WIDTH),
            f"h.{i}.ln_2": (WIDTH,),
            f"h.{i}.mlp.c_fc": (4 * WIDTH, WIDTH),
            f"h.{i}.mlp.c_proj": (WIDTH, 4 * WIDTH),
        }
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        state[f"{prefix}transformer.{name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
        if bias and name not in ("wte", "wpe"):
            state[f"{prefix}transformer.{name}.bias"] = torch.randn(shape[:1], generator=generator).to(dtype)
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    return state


def content_of(state: dict[str, torch.Tensor], *, bias: bool) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    sizes = {"n_layer": LAYERS, "n_head": 2, "n_embd": WIDTH, "block_size": CONTEXT, "vocab_size": VOCAB}
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": {**sizes, "bias": bias, "dropout": 0.0},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_weights(tmp_path: Path, bias: bool, prefix: str) -> None:
    state = state_of(bias=bias)
    torch.save(content_of(state_of(bias=bias, prefix=prefix), bias=bias), tmp_path / "ckpt.pt")
    checkpoint = open_source(tmp_path / "ckpt.pt")
    weights = checkpoint.weights()
    qkv = state["transformer.h.1.attn.c_attn.weight"].numpy()
    for i, name in enumerate("qkv"):
        got = weights[f"blocks.1.attn.{name}.weight"].read()
        np.testing.assert_array_equal(got, qkv[i * WIDTH : (i + 1) * WIDTH])
    np.testing.assert_array_equal(weights["blocks.0.mlp.up.weight"].read(), state["transformer.h.0.mlp.c_fc.weight"])
    assert ("blocks.0.attn_norm.bias" in weights) == ("norm.bias" in weights) == bias
    assert checkpoint.side_files == {}


def test_nanogpt_config(tmp_path: Path) -> None:
    torch.save(content_of(state_of(bias=False), bias=False), tmp_path / "ckpt.pt")
    config = open_nanogpt(tmp_path / "ckpt.pt").config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_ff) == (LAYERS, 2, WIDTH, 4 * WIDTH)
    assert (config.vocab_size, config.context_length) == (VOCAB, CONTEXT)
    assert (config.activation, config.norm, config.position) == ("gelu", "layer", "learned")
    assert (config.qkv_bias, config.mlp_bias, config.tie_embeddings) == (False, False, True)


def test_nanogpt_computes_what_gpt2_with_the_exact_gelu_computes(tmp_path: Path) -> None:
    """In PyTorch and exported; transformers' GPT-2 has the same modules with their matrices transposed."""
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "vocab_size": 347}
    config = transformers.GPT2Config(
        **sizes, n_positions=96, activation_function="gelu", initializer_range=0.25, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    state = {
        name: value.T.contiguous() if ".c_" in name and value.ndim == 2 else value
        for name, value in peer.state_dict().items()
    }
    torch.save({"model": state, "model_args": {**sizes, "block_size": 96, "bias": True}}, tmp_path / "ckpt.pt")
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_tokenizer().to_dict()))
    bundle = export(tmp_path / "ckpt.pt", tmp_path / "out", tokenizer=tmp_path / "tokenizer.json").bundle
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 347, 60)]
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0].numpy()
        got = GPT.from_checkpoint(open_nanogpt(tmp_path / "ckpt.pt"))(torch.tensor([ids]))[0].numpy()
    session = Session(open_bundle(bundle))
    for logits in (got, session.run(ids, session.new_cache(), every_row=True)):
        assert np.abs(logits - expected).max() <= 1e-3 * expected.std()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_nanogpt_in_half_precision(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    state = state_of(bias=False, dtype=dtype)
    torch.save(content_of(state, bias=False), tmp_path / "ckpt.pt")
    tensor = open_nanogpt(tmp_path / "ckpt.pt").tensors["transformer.wpe.weight"]
    assert tensor.dtype == name
    np.testing.assert_array_equal(tensor.read(), state["transformer.wpe.weight"].float().numpy())


def test_nanogpt_mask_buffers_are_left_out_and_an_untied_head_is_seen(tmp_path: Path) -> None:
    state = state_of(bias=False)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(content_of(state, bias=False), tmp_path / "ckpt.pt")
    checkpoint = open_nanogpt(tmp_path / "ckpt.pt")
    assert "transformer.h.0.attn.bias" not in checkpoint.tensors
    assert checkpoint.hf_config["tie_word_embeddings"] is False


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("evil-was-here",))


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_args": Evil()}, "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"asks to run \w+\.mkdir,") as caught:
        open_source(Path("ckpt.pt"))
    assert "\n" not in str(caught.value)
    assert not Path("evil-was-here").exists()
    torch.load("ckpt.pt", weights_only=False)  # and it would have been
    assert Path("evil-was-here").exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": {}, "model_args": {}}))
    with pytest.raises(CheckpointError) as caught:
        open_nanogpt(tmp_path / "ckpt.pt")
    assert "\n" not in str(caught.value)


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(content_of(state_of(bias=False), bias=False), tmp_path / "ckpt.pt")
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for i in range(20):
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * i // 20])
        with pytest.raises(CheckpointError) as caught:
            open_nanogpt(tmp_path / "cut.pt")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_args": None}, "model_args"),
        ({"model": [1]}, "model"),
        ({"model_args": {"n_layer": "2"}}, "n_layer"),
        ({"model": {"transformer.wte.weight": torch.ones(2, dtype=torch.int32)}}, "int32"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    torch.save(content_of(state_of(bias=False), bias=False) | change, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=word):
        open_nanogpt(tmp_path / "ckpt.pt")


def test_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"architectures": ["BloomForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        open_source(folder).weights()


@pytest.mark.parametrize(
    ("file", "why"),
    [("adapter_config.json", "is a LoRA adapter, not a model"), ("model.onnx", "is a bundle, not a che")],
)
def test_what_is_made_of_a_source_is_none(file: str, why: str, tmp_path: Path) -> None:
    for name in ("config.json", file):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{tmp_path.name} {why}"):
        open_source(tmp_path)

"""Hugging Face folders: opened whole, or refused with the name of what is wrong; transformers opens what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptedge import safetensors
from gptedge.checkpoint import open_checkpoint, write_checkpoint
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.families import checkpoint_name, hf_config, tensor_shapes

CONFIG = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=16, head_dim=4, n_ff=24, vocab_size=30, context_length=32, norm_eps=1e-5
)

Arrays = dict[str, np.ndarray]


def random_weights(config: ModelConfig = CONFIG) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}


def stored_weights() -> Arrays:
    return {checkpoint_name(name): array for name, array in random_weights().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, CONFIG, random_weights(), {"tokenizer.json": b"{}\r\n"}, token_ids={"eos_token_id": 2})
    return folder


def shard(folder: Path, *, weight_map: dict[str, Any] | None = None) -> list[str]:
    """Turn the folder's one file into three and an index; returns the shards' names."""
    weights = stored_weights()
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {name: names[i % 3] for i, name in enumerate(weights)}
    for file in names:
        safetensors.write(folder / file, {n: weights[n] for n, f in where.items() if f == file})
    index = {"metadata": {}, "weight_map": where if weight_map is None else where | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message, of opening or of looking at the weights."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder).weights()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- whole ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.family.name == "llama"
    weights = checkpoint.weights()
    for name, array in random_weights().items():
        np.testing.assert_array_equal(weights[name].read(), array, err_msg=name)
    assert checkpoint.side_files["tokenizer.json"] == b"{}\r\n"  # byte for byte
    assert json.loads(checkpoint.side_files["generation_config.json"]) == {"eos_token_id": 2}
    assert checkpoint.hf_config["eos_token_id"] == 2


def test_transformers_opens_what_is_written(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    for name, array in stored_weights().items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)
    assert model.config.rope_parameters["rope_theta"] == CONFIG.rope_theta


def test_what_transformers_writes_is_opened(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(CONFIG)))
    model.save_pretrained(tmp_path / "m", max_shard_size="4KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == CONFIG
    weights = checkpoint.weights()
    state = model.state_dict()
    for name in weights:
        np.testing.assert_array_equal(weights[name].read(), state[checkpoint_name(name)].numpy(), err_msg=name)


def test_shards(folder: Path) -> None:
    shard(folder)
    weights = open_checkpoint(folder).weights()
    for name, array in random_weights().items():
        np.testing.assert_array_equal(weights[name].read(), array, err_msg=name)


def test_an_untied_head_and_a_head_that_is_the_table(folder: Path) -> None:
    spare = stored_weights() | {"lm_head.weight": np.ones((30, 16), np.float32)}
    safetensors.write(folder / "model.safetensors", spare)
    assert "head.weight" not in open_checkpoint(folder).weights()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert open_checkpoint(folder).weights()["head.weight"].read().max() == 1


# ---- what is missing or wrong --------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "file")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", "[" * 100_000])
def test_config_that_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(folder)


def test_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in refusal(folder)


def test_config_without_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "intermediate_size" in refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in refusal(folder, UnsupportedModelError)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "model.safetensors.index.json" in message


def test_missing_shard(folder: Path) -> None:
    names = shard(folder)
    (folder / names[1]).unlink()
    assert f"{names[1]} is missing" in refusal(folder)


def test_index_that_promises_what_no_shard_holds(folder: Path) -> None:
    names = shard(folder, weight_map={"model.layers.9.mlp.up_proj.weight": "model-00001-of-00003.safetensors"})
    assert names
    assert "model.layers.9.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "sub/other.safetensors"])
def test_shard_outside_the_folder(folder: Path, name: str) -> None:
    shard(folder, weight_map={"x": name})
    safetensors.write(folder.parent / "other.safetensors", {"x": np.ones(1, np.float32)})
    message = refusal(folder)
    assert "lies outside the folder" in message
    assert name in message


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": None}])
def test_index_without_a_map(folder: Path, index: Any) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(folder)


def test_missing_tensor(folder: Path) -> None:
    weights = stored_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.write(folder / "model.safetensors", weights)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_every_missing_and_every_unused_tensor_is_named(folder: Path) -> None:
    weights = stored_weights()
    gone = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    for name in gone:
        del weights[name]
    safetensors.write(folder / "model.safetensors", weights)
    assert all(name in refusal(folder) for name in gone)
    spare = {f"model.layers.0.self_attn.{x}": np.ones(4, np.float32) for x in "abc"}
    safetensors.write(folder / "model.safetensors", stored_weights() | spare)
    assert all(name in refusal(folder) for name in spare)
    many = {f"model.extra.{i:03}": np.ones(4, np.float32) for i in range(100)}
    safetensors.write(folder / "model.safetensors", stored_weights() | many)
    assert refusal(folder).endswith("model.extra.005 and 94 more")


def test_misshapen_tensor(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    safetensors.write(folder / "model.safetensors", stored_weights() | {name: np.ones((16, 16), np.float32)})
    message = refusal(folder)
    assert name in message
    assert "[16, 16]" in message
    assert "[8, 16]" in message


def test_unused_tensor(folder: Path) -> None:
    spare = {"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}
    safetensors.write(folder / "model.safetensors", stored_weights() | spare)
    assert "model.layers.0.self_attn.sinks" in refusal(folder)


def test_a_cut_shard(folder: Path) -> None:
    names = shard(folder)
    whole = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(whole[:-1])
    assert names[2] in refusal(folder)

"""The GPT computes what transformers computes, for every switch of ModelConfig that a family uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptedge.checkpoint import open_checkpoint
from gptedge.config import Activation, ModelConfig
from gptedge.errors import ContextOverflowError
from gptedge.families import tensor_shapes
from gptedge.train.batches import IGNORED
from gptedge.train.model import GPT, Cache

# Odd sizes: a vocabulary that is prime, three query heads to one of keys, a head that is not n_embd / n_head.
_SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 96, "initializer_range": 0.3}

PEERS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama-untied": transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=False, head_dim=32),
    "llama-bias": transformers.LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-llama3-rope": transformers.LlamaConfig(**_SHAPE, rope_scaling=_LLAMA3),
    "llama-linear-rope": transformers.LlamaConfig(**_SHAPE, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "mistral": transformers.MistralConfig(**_SHAPE, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "gpt2": transformers.GPT2Config(**_GPT2),
    "gpt2-erf-gelu": transformers.GPT2Config(**_GPT2, activation_function="gelu", n_inner=56),
}


def save_peer(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A random model of transformers whose biases and norm gains are not the zeros and ones it starts with."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(PEERS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    peer = save_peer(name, tmp_path)
    ours = GPT.from_checkpoint(open_checkpoint(tmp_path))
    ids = torch.randint(131, (2, 90))
    with torch.no_grad():
        expected, got = peer(ids).logits, ours(ids)
    assert got.shape == (2, 90, 131)
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.5  # otherwise equal would mean little


def test_the_peers_use_the_switches_they_are_here_for(tmp_path: Path) -> None:
    """Otherwise equal logits would say nothing of them."""
    configs = {}
    for name in PEERS:
        save_peer(name, tmp_path / name)
        configs[name] = open_checkpoint(tmp_path / name).config
    kinds = {name: config.rope_scaling.kind for name, config in configs.items() if config.rope_scaling}
    assert kinds == {"llama-llama3-rope": "llama3", "llama-linear-rope": "linear"}
    assert {name for name, config in configs.items() if config.qkv_bias} == {
        "llama-bias",
        "qwen2",
        "gpt2",
        "gpt2-erf-gelu",
    }
    assert {name for name, config in configs.items() if config.qk_norm} == {"qwen3"}
    assert {name for name, config in configs.items() if config.position == "learned"} == {"gpt2", "gpt2-erf-gelu"}
    assert {config.activation for config in configs.values()} == {"silu", "gelu", "gelu_tanh"}
    assert {config.tie_embeddings for config in configs.values()} == {True, False}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_cached_greedy_equals_uncached(name: str, tmp_path: Path) -> None:
    save_peer(name, tmp_path)
    model = GPT.from_checkpoint(open_checkpoint(tmp_path))
    ids = torch.randint(131, (2, 7))
    fast, slow = model.greedy(ids, 40), model.greedy(ids, 40, cached=False)
    assert torch.equal(fast, slow)
    assert fast.shape == (2, 47)
    assert len(fast[0, 7:].unique()) > 3


def test_cache_takes_many_tokens_at_once() -> None:
    """A prompt in uneven pieces gives the logits of the prompt in one piece."""
    model = GPT(tiny()).eval()
    ids, cache = torch.randint(131, (1, 30)), Cache()
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache) for piece in ids.split((4, 1, 17, 8), dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(ids), rtol=0, atol=1e-5)
    assert cache.length == 30


@pytest.mark.parametrize(
    "switches",
    [{}, {"attn_softcap": 5.0}, {"windows": (0, 6)}, {"position": "learned", "norm": "layer", "gated": False}],
)
def test_packed_sequences_equal_separate_ones(switches: dict[str, Any]) -> None:
    model = seeded(**switches)
    lengths = [(9, 1, 14), (4, 12, 8)]
    ids, targets = torch.randint(131, (2, 2, 24))
    targets[0, 3:12] = IGNORED
    segments = torch.stack([torch.repeat_interleave(torch.tensor([5, 0, 3]), torch.tensor(row)) for row in lengths])
    with torch.no_grad():
        packed = model(ids, segments=segments)
        pieces = [[model(piece[None])[0] for piece in row.split(n)] for row, n in zip(ids, lengths, strict=True)]
        separate = torch.stack([torch.cat(row) for row in pieces])
        torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
        assert (model(ids) - separate).abs().max() > 0.1  # otherwise packing had nothing to keep apart
        scored = targets != IGNORED
        expected = torch.nn.functional.cross_entropy(separate[scored], targets[scored])
        torch.testing.assert_close(model.loss(ids, targets, segments), expected)
        assert model.loss(ids, torch.full_like(targets, IGNORED), segments) == 0


def test_context_overflow_names_both_lengths() -> None:
    with pytest.raises(ContextOverflowError, match=r"65 tokens .* context of 64"):
        GPT(tiny())(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True, "qk_norm": True},
        {"norm": "layer", "position": "learned", "gated": False, "mlp_bias": True, "out_bias": True},
        {"norm": "layer", "position": "learned", "gated": False},
    ],
)
def test_state_dict_has_exactly_the_tensors_of_the_configuration(switches: dict[str, Any]) -> None:
    config = tiny(**switches)
    assert {name: tuple(t.shape) for name, t in GPT(config).state_dict().items()} == tensor_shapes(config)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_each_activation_is_computed_and_differs(activation: Activation, gated: bool) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = seeded(activation=activation, gated=gated)(ids)
        linear = seeded(activation="silu" if activation != "silu" else "gelu", gated=gated)(ids)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, linear, rtol=0, atol=1e-6)


def test_partial_rotary_leaves_the_other_dimensions_alone() -> None:
    """Where only 4 of 8 dimensions rotate, zeroing q's rotated rows makes attention blind to positions."""
    model = seeded(n_layer=1, rotary_dim=4)
    head = torch.arange(24) % 8
    with torch.no_grad():
        for layer in model.blocks:
            layer.attn.q.weight[head < 4] = 0
        ids = torch.tensor([[5, 9, 9, 9, 7]])
        swapped = torch.tensor([[9, 5, 9, 9, 7]])
        torch.testing.assert_close(model(ids)[:, -1], model(swapped)[:, -1], rtol=0, atol=1e-5)
        full = seeded(n_layer=1)
        assert not torch.allclose(full(ids)[:, -1], full(swapped)[:, -1], rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    model = GPT(tiny(qkv_bias=True, qk_norm=True, tie_embeddings=False, mlp_bias=True, out_bias=True))
    ids = torch.randint(131, (2, 16))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_is_drawn_in_training_alone() -> None:
    torch.manual_seed(0)
    model, ids = GPT(tiny(), dropout=0.5), torch.randint(131, (1, 30))
    assert list(model.state_dict()) == list(GPT(tiny()).state_dict())
    first, second = model.train()(ids), model(ids)
    assert not torch.allclose(first, second)
    assert torch.equal(model.eval()(ids), model(ids))


def test_z_loss_is_the_squared_log_of_the_softmaxs_sum_in_training_alone() -> None:
    model, ids = seeded(), torch.randint(131, (2, 17))
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORED
    logits = model(ids[:, :-1])
    squares = logits.logsumexp(-1).square()[targets != IGNORED]
    plain = model.loss(ids[:, :-1], targets)
    model.z_loss = 0.01
    assert model.loss(ids[:, :-1], targets) == plain
    torch.testing.assert_close(model.train().loss(ids[:, :-1], targets), plain + 0.01 * squares.mean())


def tiny(**switches: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "n_layer": 2,
            "n_head": 3,
            "n_kv_head": 1,
            "n_embd": 24,
            "head_dim": 8,
            "n_ff": 40,
            "vocab_size": 131,
            "context_length": 64,
            **switches,
        }
    )


def seeded(**switches: Any) -> GPT:
    torch.manual_seed(3)
    model = GPT(tiny(**switches)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def test_under_autocast_what_several_products_take_is_cast_once() -> None:
    model, seen = GPT(tiny()), list[torch.dtype]()
    for layer in (model.blocks[0].attn.q, model.blocks[0].mlp.up):
        layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].dtype))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    model(ids)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2

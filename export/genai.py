"""genai_config.json, which lets onnxruntime-genai load a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gptedge.bundle import GRAPH
from gptedge.graph_io import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    past_key,
    past_value,
    present_key,
    present_value,
)

# Any decoder with one KV cache a layer goes by this name there; "gpt2" would mean its older, joined cache.
_DECODER_TYPE = "llama"


class Sizes(Protocol):
    """ModelConfig's, by its names."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


def genai_config(c: Sizes, ids: Mapping[str, Any], *, shared: bool, positions: bool) -> dict[str, Any]:
    """`ids` holds bos_token_id, eos_token_id and pad_token_id, as in generation_config.json.

    `shared`: the graph appends to the KV cache in place, so that past and present can be one buffer. `positions`: it
    has an input for them.
    """
    eos = ids.get("eos_token_id")
    pad = ids.get("pad_token_id")
    inputs = {
        "input_ids": INPUT_IDS,
        "attention_mask": ATTENTION_MASK,
        "past_key_names": past_key("%d"),
        "past_value_names": past_value("%d"),
    }
    if positions:
        inputs["position_ids"] = POSITION_IDS
    outputs = {"logits": LOGITS, "present_key_names": present_key("%d"), "present_value_names": present_value("%d")}
    return {
        "model": {
            "type": _DECODER_TYPE,
            "context_length": c.context_length,
            "vocab_size": c.vocab_size,
            "bos_token_id": ids.get("bos_token_id") if ids.get("bos_token_id") is not None else _first(eos),
            "eos_token_id": eos if eos is not None else 0,
            "pad_token_id": pad if pad is not None else _first(eos),
            "decoder": {
                "filename": GRAPH,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": c.n_embd,
                "head_size": c.head_dim,
                "num_attention_heads": c.n_head,
                "num_key_value_heads": c.n_kv_head,
                "num_hidden_layers": c.n_layer,
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {
            "max_length": c.context_length,
            "past_present_share_buffer": shared,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        },
    }


def _first(ids: Any) -> int:
    if isinstance(ids, list):
        return int(ids[0])
    return int(ids or 0)

"""Names of the decoder graph's inputs and outputs, as onnxruntime-genai and optimum both spell them.

B = batch, T = new tokens, P = past tokens, S = P + T, K = n_kv_head, H = head_dim, V = vocab_size:

    input_ids               int64 [B, T]            logits             float [B, T, V]
    attention_mask          int64 [B, S]            present.{i}.key    float [B, K, S, H]
    position_ids            int64 [B, T]            present.{i}.value  float [B, K, S, H]
    past_key_values.{i}.key|value  float [B, K, P, H]
    first_logit, end_logit  int64 [1]   optional: logits are for the rows from the first on that come before the end

`position_ids` is there only when positions are learned. `first_logit` and `end_logit` have initializers, which makes
them optional, and hides them from `InferenceSession.get_inputs()`: programs that do not know them get every row.

Graphs that take LoRA adapters have two more optional inputs for each linear layer, named as its node, of any rank r:

    {node}.lora_a   float [in, r]    {node}.lora_b   float [r, out]    x @ a @ b is added to the layer's output

Without one, r is 0.
"""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
FIRST_LOGIT, END_LOGIT = "first_logit", "end_logit"
LOGITS = "logits"
LORA_A, LORA_B = ".lora_a", ".lora_b"

PAST_PREFIX = "past_key_values."
PRESENT_PREFIX = "present."


def past_key(layer: int | str) -> str:
    return f"{PAST_PREFIX}{layer}.key"


def past_value(layer: int | str) -> str:
    return f"{PAST_PREFIX}{layer}.value"


def present_key(layer: int | str) -> str:
    return f"{PRESENT_PREFIX}{layer}.key"


def present_value(layer: int | str) -> str:
    return f"{PRESENT_PREFIX}{layer}.value"


def past_names(n_layer: int) -> list[str]:
    """Inputs of the KV cache in the order key, value, layer by layer."""
    return [name(i) for i in range(n_layer) for name in (past_key, past_value)]


def present_names(n_layer: int) -> list[str]:
    """Outputs of the KV cache, in the order of `past_names`."""
    return [name(i) for i in range(n_layer) for name in (present_key, present_value)]

"""The PyTorch GPT: every model that a `ModelConfig` describes, in plain float32, to train and to check exports against.

The functions stand in the order of the forward pass, as in the ONNX graph's builder: embed, norm, attention, mlp,
block, then `GPT.forward`. Parameters carry gptedge's own names (see `families`), so any checkpoint's weights load as
they are. It does not sample, quantize or tokenize, and its cache is the simplest that is right: speed is the runtime's.

Shapes: B batch, T new tokens, S past and new tokens, H query heads, K key/value heads, D head_dim, C n_embd, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptedge.checkpoint import Checkpoint
from gptedge.config import Activation, ModelConfig, rope_frequencies
from gptedge.errors import ContextOverflowError
from gptedge.train.batches import IGNORED
from gptedge.train.blockwise import blockwise_attention, pays
from gptedge.train.cross_entropy import in_place_cross_entropy, in_place_pays

Rope: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, each [T, rope_dim / 2], or [B, 1, T, rope_dim / 2] where rows have their own positions."""

_INIT_STD = 0.02


@dataclass
class Cache:
    """Keys (rotated) and values of each layer so far, [B, K, S, D]; made empty, filled by `GPT.forward`."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append layer i's new keys and values; give all of them."""
        if i == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[i] = torch.cat((self.keys[i], k), dim=2)
            self.values[i] = torch.cat((self.values[i], v), dim=2)
        return self.keys[i], self.values[i]


# ---- the forward pass ----------------------------------------------------------------------------------------------


def embed(model: GPT, ids: Tensor, positions: Tensor) -> Tensor:
    """[B, T] ids -> [B, T, C]."""
    x: Tensor = model.embed(ids)
    x = x if model.position is None else x + model.position(positions)
    x = x if model.config.embed_scale == 1.0 else x * model.config.embed_scale
    return norm(model.config, model.embed_norm, x)


def norm(c: ModelConfig, layer: nn.Module | None, x: Tensor) -> Tensor:
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, in float32 under autocast too.

    x itself where the family has no such norm.
    """
    if layer is None:
        return x
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    if c.norm == "layer":
        return F.layer_norm(x.float(), weight.shape, weight, bias, c.norm_eps)
    return F.rms_norm(x.float(), weight.shape, weight, c.norm_eps)


def cast(x: Tensor) -> Tensor:
    """To what autocast computes products in: once, where it would for each of the two or three that take x."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def attention(
    c: ModelConfig, layer: Attention, x: Tensor, rope: Rope | None, i: int, cache: Cache | None, same: Tensor | None
) -> Tensor:
    """Causal grouped-query attention, [B, T, C] -> [B, T, C].

    q, k and v stay three products: one over their joined weights took 23.7 ms against 25.3 (forward and backward,
    4096 tokens, 256 wide, AVX2), less than it would cost in names. Flash attention with `enable_gqa`: 54 ms,
    with repeated heads 59, written out 184.
    """
    q, k, v = queries_keys_values(c, layer, x, rope)
    if cache is not None:
        k, v = cache.extend(i, k, v)  # [B, K, S, D]
    y = attend(q, k, v, window=c.window(i), scale=c.attn_scale, softcap=c.attn_softcap, same=same)  # [B, H, T, D]
    out: Tensor = layer.o(y.transpose(1, 2).flatten(2))
    return out


def queries_keys_values(
    c: ModelConfig, layer: Attention, x: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, C] -> normalised and rotated, [B, H, T, D] and twice [B, K, T, D]."""
    b, t, _ = x.shape
    q, k, v = layer.q(x), layer.k(x), layer.v(x)
    if c.qk_norm_joint:
        q, k = norm(c, layer.q_norm, q).to(v.dtype), norm(c, layer.k_norm, k).to(v.dtype)
    q = q.view(b, t, c.n_head, c.head_dim)  # [B, T, H, D]
    k = k.view(b, t, c.n_kv_head, c.head_dim)  # [B, T, K, D]
    v = v.view(b, t, c.n_kv_head, c.head_dim)  # [B, T, K, D]
    if c.qk_norm and not c.qk_norm_joint:
        q, k = norm(c, layer.q_norm, q).to(v.dtype), norm(c, layer.k_norm, k).to(v.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H|K, T, D]
    return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the leading `rope_dim` of each head; dimension j pairs with j + rope_dim / 2, as Llama's do."""
    cos, sin = (table.to(x.dtype) for table in rope)  # [T, R / 2] or [B, 1, T, R / 2]
    half = cos.shape[-1]
    x1, x2, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """Each of the T queries, which are the last of S positions, sees the keys up to its own: [B, H, T, D].

    With a window, only the last `window` of them; with `same` [B, 1, T, S], only those where it is true.
    """
    t, s = q.shape[2], k.shape[2]
    if softcap is not None:  # PyTorch's own has no such bound
        weights = attention_weights(q, k, window=window, scale=scale, softcap=softcap, same=same)
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    needs_mask = 1 < t < s or 0 < window < s or same is not None
    mask = _visible(q, k, window, same) if needs_mask else None
    causal = mask is None and t == s
    if causal and pays(q, k):
        return blockwise_attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """How each query spreads its attention over the keys, [B, H, T, S]; written out, and so the oracle of `attend`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, S, D]
    scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)  # [B, H, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~_visible(q, k, window, same), -torch.inf).softmax(-1)


def _visible(q: Tensor, k: Tensor, window: int, same: Tensor | None) -> Tensor:
    """Which of the S keys each of the T queries sees, bool [T, S], or [B, 1, T, S] with `same`."""
    t, s = q.shape[2], k.shape[2]
    mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    mask = mask & ~mask.tril(s - t - window) if window else mask
    return mask if same is None else mask & same


def mlp(c: ModelConfig, layer: MLP, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the family has no gate."""
    act = ACTIVATIONS[c.activation]
    hidden = act(layer.up(x)) if layer.gate is None else act(layer.gate(x)) * layer.up(x)
    out: Tensor = layer.down(hidden)
    return out


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def block(
    c: ModelConfig, layer: Block, x: Tensor, rope: Rope | None, i: int, cache: Cache | None, same: Tensor | None
) -> Tensor:
    """Residual block, [B, T, C] -> [B, T, C]."""
    update = attention(c, layer.attn, cast(norm(c, layer.attn_norm, x)), rope, i, cache, same)
    after = x + layer.dropout(norm(c, layer.attn_post_norm, update))
    seen = x if c.parallel else after
    update = mlp(c, layer.mlp, cast(norm(c, layer.mlp_norm, seen)))
    out: Tensor = after + layer.dropout(norm(c, layer.mlp_post_norm, update))
    return out


class GPT(nn.Module):
    """A decoder-only transformer whose state_dict is exactly `families.tensor_shapes(config)`."""

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0, z_loss: float = 0.0) -> None:
        """`dropout` and `z_loss` change training alone."""
        super().__init__()
        c = self.config = config
        self.dropout, self.z_loss = nn.Dropout(dropout), z_loss
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.position = nn.Embedding(c.context_length, c.n_embd) if c.position == "learned" else None
        self.embed_norm = _norm_of(c, c.n_embd) if c.embed_norm else None
        self.blocks = nn.ModuleList(Block(c, dropout) for _ in range(c.n_layer))
        self.norm = _norm_of(c, c.n_embd)
        self.head = None if c.tie_embeddings else nn.Linear(c.n_embd, c.vocab_size, bias=False)
        initialize(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> GPT:
        """The checkpoint's model in float32, ready to evaluate."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        weights = {name: torch.from_numpy(np.array(t.read())) for name, t in checkpoint.weights().items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def forward(self, ids: Tensor, cache: Cache | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of [B, T] ids; with a cache, ids follow what it holds, and are added to it.

        With segments [B, T], each run of one number is a sequence of its own: it sees nothing before it, and its
        positions begin at 0. A cache takes none.
        """
        return self.logits(self.hidden(ids, cache, segments))

    def hidden(self, ids: Tensor, cache: Cache | None = None, segments: Tensor | None = None) -> Tensor:
        """What `logits` are made of, [B, T, C]; arguments are `forward`'s."""
        assert cache is None or segments is None, "a cache holds one sequence"
        c, start = self.config, cache.length if cache is not None else 0
        end = start + ids.shape[1]
        if end > c.context_length:
            raise ContextOverflowError(f"{end} tokens do not fit the model's context of {c.context_length}")
        positions = torch.arange(start, end, device=ids.device)  # [T]
        same = None
        if segments is not None:
            positions, same = segment_positions(segments), (segments[:, :, None] == segments[:, None, :])[:, None]
        x = self.dropout(embed(self, ids, positions))
        ropes = {of: rope_tables(of, positions) for of in map(c.rope_of, range(c.n_layer)) if c.position == "rope"}
        for i, layer in enumerate(self.blocks):
            x = layer(x, ropes.get(c.rope_of(i)), i, cache, same)
        return norm(c, self.norm, x)

    def logits(self, x: Tensor) -> Tensor:
        """[…, C] -> […, V]"""
        cap = self.config.logit_softcap
        logits: Tensor = F.linear(x, self.embed.weight) if self.head is None else self.head(x)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats of the targets [B, T] after each of ids [B, T]; 0 where none is scored.

        Targets of `batches.IGNORED` are not scored. `segments` [B, T] are `forward`'s; with them, logits are computed
        of scored tokens alone: of a chat's few, and many are the logits of each.
        """
        x, scored = self.hidden(ids, segments=segments), targets != IGNORED
        if segments is not None:
            x, targets = x[scored], targets[scored]
        logits = self.logits(x).view(-1, self.config.vocab_size)  # [B * T, V] or [scored, V]
        return self._summed_loss(logits, targets.flatten()) / scored.sum().clamp(min=1)

    def _summed_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits [N, V], which are used up, and targets [N]."""
        with_z_loss = self.z_loss and self.training
        if in_place_pays(logits) and not with_z_loss:
            return in_place_cross_entropy(logits, targets)
        logits = logits.float()
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        if with_z_loss:
            total = total + self.z_loss * logits.logsumexp(-1).square().where(targets != IGNORED, 0).sum()
        return total

    @torch.no_grad()
    def greedy(self, ids: Tensor, n: int, *, cached: bool = True) -> Tensor:
        """ids [B, T] followed by the n likeliest tokens one after another, [B, T + n]; never stops early."""
        cache = Cache() if cached else None
        new = ids
        for _ in range(n):
            logits = self(new if cached else ids, cache)
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, new), dim=1)
        return ids

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def segment_positions(segments: Tensor) -> Tensor:
    """How far each token is from the first of its run of one number, [B, T] -> [B, T]."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - index.where(begins, 0).cummax(dim=1).values


def rope_tables(c: ModelConfig, positions: Tensor) -> Rope:
    """Rotations of positions [T] or [B, T], computed in float64: 0.2 ms for 512, so no table is kept."""
    frequencies = torch.tensor(rope_frequencies(c), dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * frequencies  # [T, R / 2] or [B, T, R / 2]
    angles = angles if positions.ndim == 1 else angles[:, None]
    factor = c.rope_attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


# ---- parameters: modules that hold them under their names, and leave computing to the functions above ----------------


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.q = nn.Linear(c.n_embd, c.q_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.n_embd, c.kv_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.n_embd, c.kv_size, bias=c.qkv_bias)
        self.q_norm = _norm_of(c, c.q_size if c.qk_norm_joint else c.head_dim) if c.qk_norm else None
        self.k_norm = _norm_of(c, c.kv_size if c.qk_norm_joint else c.head_dim) if c.qk_norm else None
        self.o = nn.Linear(c.q_size, c.n_embd, bias=c.out_bias)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.n_ff, bias=c.mlp_bias) if c.gated else None
        self.up = nn.Linear(c.n_embd, c.n_ff, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_ff, c.n_embd, bias=c.mlp_bias)


class Block(nn.Module):
    def __init__(self, c: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.config, self.dropout = c, nn.Dropout(dropout)
        self.attn_norm = _norm_of(c, c.n_embd) if c.pre_norm else None
        self.attn = Attention(c)
        self.attn_post_norm = _norm_of(c, c.n_embd) if c.post_norm else None
        self.mlp_norm = _norm_of(c, c.n_embd) if c.pre_norm else None
        self.mlp = MLP(c)
        self.mlp_post_norm = _norm_of(c, c.n_embd) if c.post_norm else None

    def forward(self, x: Tensor, rope: Rope | None, i: int, cache: Cache | None, same: Tensor | None) -> Tensor:
        """`block`, as the call that wrappers such as FSDP see."""
        return block(self.config, self, x, rope, i, cache, same)


def _norm_of(c: ModelConfig, width: int) -> nn.Module:
    """A LayerNorm has a bias where the linear layers have one, as `families.tensor_shapes` says."""
    return nn.LayerNorm(width, c.norm_eps, bias=c.mlp_bias) if c.norm == "layer" else nn.RMSNorm(width, c.norm_eps)


@torch.no_grad()
def initialize(model: GPT) -> None:
    """GPT-2's initialization: normal weights, those that write to the residual stream smaller by its depth."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
        else:
            into_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            scale = 1 / math.sqrt(2 * model.config.n_layer) if into_residual else 1.0
            parameter.normal_(0.0, _INIT_STD * scale)

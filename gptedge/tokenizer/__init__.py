"""Tokenizers in Hugging Face's tokenizer.json format, without Rust: read, write, encode, decode, train.

Does: byte-level and SentencePiece-style BPE, exact against the `tokenizers` library on every string.
Does not: other models, and chat templates.
"""

from __future__ import annotations

from gptedge.tokenizer.added_tokens import AddedToken
from gptedge.tokenizer.patterns import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN
from gptedge.tokenizer.tokenizer import DecodeStream, Tokenizer
from gptedge.tokenizer.train import train_bpe

__all__ = ["GPT2_PATTERN", "LLAMA3_PATTERN", "QWEN2_PATTERN", "AddedToken", "DecodeStream", "Tokenizer", "train_bpe"]

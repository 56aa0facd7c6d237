"""What a model in training writes, without a trace in its training: neither weights nor random numbers are touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from gptedge.errors import UsageError
from gptedge.tokenizer import Tokenizer
from gptedge.train.model import GPT, Cache

OnModel = Callable[[GPT, Tokenizer], None]
"""Shown a model and its tokenizer, before the model is trained."""
SAMPLE_TOKENS = 48
_TEMPERATURE = 0.8
_TOP_K = 40


class Sampler:
    """Text from the model after every `every` steps, always from the same prompt and the same draws."""

    def __init__(self, every: int, prompt: str, *, tokens: int = SAMPLE_TOKENS, seed: int = 0) -> None:
        if every < 1:
            raise UsageError(f"sample-every is {every}; it must be at least 1")
        self.every, self.prompt, self.tokens, self.seed = every, prompt, tokens, seed
        self._model: tuple[GPT, Tokenizer] | None = None

    def watch(self, model: GPT, tokenizer: Tokenizer) -> None:
        """The model that is about to be trained."""
        self._model = (model, tokenizer)

    def __call__(self, step: int) -> str | None:
        """None where it is not the step's turn, or nothing is watched."""
        if self._model is None or step % self.every:
            return None
        model, tokenizer = self._model
        return write(model, tokenizer, self.prompt, tokens=self.tokens, seed=self.seed)


@torch.no_grad()
def write(model: GPT, tokenizer: Tokenizer, prompt: str, *, tokens: int, seed: int) -> str:
    """The prompt and what follows it, up to an end of text or the end of the context.

    An empty prompt begins where a text begins: after an end-of-text token.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id or 0]
    ids = ids[-(model.config.context_length - 1) :]
    was_training = model.training
    model.eval()  # dropout would draw random numbers
    try:
        with parametrize.cached():  # rounded weights, where training rounds them, are made once
            made = _continue(model, ids, tokens, torch.Generator().manual_seed(seed), tokenizer.eos_id)
    finally:
        model.train(was_training)
    return prompt + tokenizer.decode(made)


def _continue(model: GPT, ids: list[int], n: int, generator: torch.Generator, end: int | None) -> list[int]:
    cache, new, made = Cache(), ids, list[int]()
    for _ in range(min(n, model.config.context_length - len(ids))):
        logits = model(torch.tensor([new]), cache)[0, -1].float()
        token = _draw(logits, generator)
        if token == end:
            break
        made.append(token)
        new = [token]
    return made


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    """One of the likeliest, with a generator of its own."""
    top, ids = torch.topk(logits / _TEMPERATURE, min(_TOP_K, len(logits)))
    return int(ids[torch.multinomial(top.softmax(-1), 1, generator=generator)])

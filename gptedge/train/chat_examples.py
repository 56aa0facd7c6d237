"""Token ids to learn from, and which of them are learned: of a conversation, only what the model is to write itself.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello!<|im_end|>   \\n<|im_start|>user\\n …
    ─────────────────── read only ─────────────────────────   ──── learned ────   ─── read only ────

The parts meet where they do in a chat: a prompt is encoded as `ChatPrompt` encodes it, a reply follows in tokens of its
own, and ends with the token that ends a text. So the model learns to go on from the very tokens it will be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptedge.chat_prompt import ChatPrompt
from gptedge.chat_template import ChatTemplate
from gptedge.errors import TokenizerError
from gptedge.tokenizer import Tokenizer
from gptedge.train.chat_data import ASSISTANT, Conversation, Message, Record


@dataclass(frozen=True)
class Example:
    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    """Which of `ids` are learned; the first never can be."""

    @property
    def n_learned(self) -> int:
        return int(self.learned[1:].sum())


@dataclass(frozen=True)
class Examples:
    items: list[Example]
    truncated: int
    """Conversations that lost their beginning."""
    dropped: int
    """Examples in which nothing is left to learn."""


@dataclass(frozen=True)
class Encoder:
    """Turns records into examples with a model's tokenizer and template."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end_ids: tuple[int, ...]
    """Tokens that end a text, the one to write first."""

    def examples(self, records: Iterable[Record], context: int) -> Examples:
        """At most `context` tokens to go on from in each: of longer conversations the last, of longer texts pieces.

        Raises TokenizerError when the template refuses a conversation.
        """
        prompt, items, truncated = ChatPrompt(self.template, self.tokenizer), list[Example](), 0
        for record in records:
            if isinstance(record, str):
                items += self._text(record, context)
                continue
            made = self._conversation(prompt, record)
            truncated += any(len(e.ids) > context + 1 for e in made)
            items += [Example(e.ids[-context - 1 :], e.learned[-context - 1 :]) for e in made]
        kept = [e for e in items if e.n_learned]
        return Examples(kept, truncated, len(items) - len(kept))

    def _text(self, text: str, context: int) -> list[Example]:
        """All of it is learned. Pieces share a token: what ends one begins the next."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        ids = np.array([*begin, *self.tokenizer.encode(text, parse_special=False), self.end_ids[0]], np.int32)
        pieces = [ids[start : start + context + 1] for start in range(0, len(ids) - 1, context)]
        return [Example(piece, np.ones(len(piece), np.bool_)) for piece in pieces]

    def _conversation(self, prompt: ChatPrompt, messages: Conversation) -> list[Example]:
        """One example, or several where the template rewrites what was said before, as some do with thoughts."""
        ends = [text for text in map(self.tokenizer.id_to_token, self.end_ids) if text]
        made, row = list[Example](), _Row(prompt)
        for i, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            asked, reply = _parts(prompt, messages[:i], message)
            if not asked.startswith(row.text):
                made.append(row.example())
                row = _Row(prompt)
            row.read(asked)
            cut = min((at + len(end) for end in ends if (at := reply.find(end)) >= 0), default=None)
            row.write(reply[:cut], learn=message.learn)
            if cut is None:  # the template does not end a reply, and without an end the model would talk on
                row.add([self.end_ids[0]], learn=message.learn)
                made.append(row.example())
                row = _Row(prompt)
        return [*made, row.example()] if row.ids else made


class _Row:
    """Tokens of one text that grows by prompts and replies."""

    def __init__(self, prompt: ChatPrompt) -> None:
        self._prompt = prompt
        self.text = ""
        self.ids: list[int] = []
        self._learned: list[bool] = []

    def read(self, text: str) -> None:
        """Grow to `text`, the prompt of the next reply."""
        self.add(self._prompt.encode(text[len(self.text) :], continued=bool(self.text)), learn=False)
        self.text = text

    def write(self, reply: str, *, learn: bool) -> None:
        """Grow by a reply: as it is encoded together with its prompt, where that leaves the prompt's tokens alone."""
        before, whole = self._prompt.encode(self.text), self._prompt.encode(self.text + reply)
        follows = whole[: len(before)] == before
        self.add(whole[len(before) :] if follows else self._prompt.encode(reply, continued=True), learn=learn)
        self.text += reply

    def add(self, ids: Sequence[int], *, learn: bool) -> None:
        self.ids += ids
        self._learned += [learn] * len(ids)

    def example(self) -> Example:
        return Example(np.array(self.ids, np.int32), np.array(self._learned, np.bool_))


def _parts(prompt: ChatPrompt, before: Sequence[Message], reply: Message) -> tuple[str, str]:
    """The text that asks for the reply, and what the template makes of the reply after it."""
    asked = prompt.render(_rows(before))
    said = prompt.render(_rows([*before, reply]), add_generation_prompt=False)
    if said.startswith(asked):
        return asked, said[len(asked) :]
    # The template asks with more than it later shows, such as the beginning of a thought.
    at = said.rfind(prompt.marked(reply.content.strip()))
    if at < 0:
        raise TokenizerError("the chat template changes replies, so that what is to be learned cannot be told")
    return asked, said[at:]


def _rows(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


# ---- a template for models that have none ----------------------------------------------------------------------------


def default_template(tokenizer: Tokenizer, end: str) -> str:
    """ChatML's form in tokens that the model has: a message ends as a text does, with `end`.

    Where the vocabulary lacks ChatML's own mark for the beginning of a message, there is an ordinary one: nobody can
    write another's turn, for only the template writes `end`.
    """
    start = "<|im_start|>" if tokenizer.token_to_id("<|im_start|>") in tokenizer.special_ids else "### "
    bos = tokenizer.id_to_token(tokenizer.bos_id) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""
    first = f"{{{{ {_quoted(bos)} }}}}" if bos else ""
    message = f"{_quoted(start)} + message['role'] + '\\n' + message['content'] + {_quoted(end)} + '\\n'"
    return (
        f"{first}{{% for message in messages %}}{{{{ {message} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {_quoted(start)} + 'assistant\\n' }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    """A string of Jinja's."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

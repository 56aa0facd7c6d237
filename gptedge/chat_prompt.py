"""From messages to the token ids of a prompt, such that nobody can write another's role.

A template marks roles with special tokens. The same letters inside a message are only letters: they are taken out
before rendering and encoded as ordinary text afterwards. Messages without such letters are encoded as one whole with
the template, as other programs do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gptedge.chat_template import ChatTemplate
from gptedge.tokenizer import Tokenizer

_MARK = "\uf8ff"  # of a private use area, where text rarely has letters; in a message it is marked itself
_MARKED = re.compile(f"{_MARK}(\\d+){_MARK}")


class ChatPrompt:
    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        names = (tokenizer.id_to_token(i) for i in sorted(tokenizer.special_ids))
        self._special = sorted([*filter(None, names), _MARK], key=len, reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, self._special)))

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt for a reply to `messages`."""
        return self.encode(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The template's text, with a mark wherever a message spells out a special token."""
        marked = [{**m, "content": self.marked(m["content"])} for m in messages]
        return self._template.render(marked, add_generation_prompt=add_generation_prompt)

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Token ids of what `render` gave; `continued` for a later part of it."""
        # A template writes the special tokens itself; only one that continues plain text leaves them to the tokenizer.
        begin = self._template.is_continuation and not continued
        pieces = _MARKED.split(text)
        if len(pieces) == 1:
            return self._tokenizer.encode(text, add_special_tokens=begin, continued=continued)
        ids: list[int] = []
        for plain, number in zip(pieces[0::2], [*pieces[1::2], None], strict=True):
            later = continued or bool(ids)
            ids += self._tokenizer.encode(plain, add_special_tokens=begin and not ids, continued=later) if plain else []
            if number is not None and int(number) < len(self._special):
                special, later = self._special[int(number)], continued or bool(ids)
                ids += self._tokenizer.encode(special, parse_special=False, continued=later)
        return ids

    def marked(self, content: str) -> str:
        """A message's text as `render` puts it into the template."""
        return self._find_special.sub(lambda found: f"{_MARK}{self._special.index(found[0])}{_MARK}", content)

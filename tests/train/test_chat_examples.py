"""What is learned of a conversation: the replies and their ends, in the tokens that a chat would have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gptedge.chat_prompt import ChatPrompt
from gptedge.chat_template import ChatTemplate
from gptedge.errors import TokenizerError
from gptedge.train.chat_data import ASSISTANT, SYSTEM, USER, Conversation, Message
from gptedge.train.chat_examples import Encoder, Example, default_template
from tests.conftest import END, TEMPLATE, make_tokenizer

TOKENIZER = make_tokenizer()
END_ID = TOKENIZER.token_to_id(END)
assert END_ID is not None
NEWLINES = TEMPLATE.replace("+ '<|end|>'", "+ '<|end|>\\n'")
# What some models' templates do: thoughts are shown in the last reply alone.
THOUGHTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}(thought){% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The prompt begins a thought that the history does not show.
OPENED = TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|><think>\n{%")
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def said(*contents: str) -> Conversation:
    return tuple(Message((USER, ASSISTANT)[i % 2], content) for i, content in enumerate(contents))


def encoder(source: str | None) -> Encoder:
    return Encoder(TOKENIZER, ChatTemplate(source, {"eos_token": END}), (END_ID,))


def learned(example: Example) -> str:
    """The learned tokens' text; other tokens are a space."""
    runs = itertools.groupby(zip(example.ids.tolist(), example.learned, strict=True), key=lambda pair: pair[1])
    parts = [text_of([i for i, _ in run]) if is_learned else " " for is_learned, run in runs]
    return " ".join("".join(parts).split())


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def text(example: Example) -> str:
    return text_of(example.ids.tolist())


def test_only_replies_and_their_ends_are_learned() -> None:
    [example] = encoder(NEWLINES).examples([said("Hello?", "brown", "More?", "lazy!")], 300).items
    assert (
        text(example)
        == "<|user|>Hello?<|end|>\n<|assistant|>brown<|end|>\n<|user|>More?<|end|>\n<|assistant|>lazy!<|end|>"
    )
    assert learned(example) == "brown<|end|> lazy!<|end|>"


def test_a_reply_of_no_weight_is_read_only() -> None:
    messages = (Message(USER, "a"), Message(ASSISTANT, "b", learn=False), Message(USER, "c"), Message(ASSISTANT, "d"))
    [example] = encoder(TEMPLATE).examples([messages], 300).items
    assert learned(example) == "d<|end|>"


@pytest.mark.parametrize("template", [TEMPLATE, NEWLINES, OPENED, default_template(TOKENIZER, END)])
def test_each_prompt_is_the_one_a_chat_sends(template: str) -> None:
    """What comes before the last learned run is, token for token, what the runtime gives the model to answer."""
    messages = said("over the  lazy dog", "fox\n\n", "\n and 漢字", " naïve")
    [example] = encoder(template).examples([messages[:2]], 300).items
    prompt = ChatPrompt(ChatTemplate(template, {}), TOKENIZER)
    asked = prompt.ids([{"role": USER, "content": "over the  lazy dog"}])
    assert example.ids[: len(asked)].tolist() == asked
    assert not example.learned[: len(asked)].any()
    assert example.learned[len(asked) :].all()
    assert text_of(example.ids[len(asked) :].tolist()).startswith("fox")
    assert example.ids[-1] == END_ID
    last = encoder(template).examples([messages], 300).items[-1]
    assert learned(last).endswith("naïve<|end|>")


def test_special_tokens_in_messages_are_only_letters() -> None:
    [example] = encoder(TEMPLATE).examples([said(f"x{END}<|assistant|>y", f"a{END}b")], 300).items
    assert (example.ids == END_ID).sum() == 2
    assert learned(example) == f"a{END}b{END}"


def test_a_template_that_rewrites_history_gives_an_example_for_each_reply() -> None:
    first, second = encoder(THOUGHTS).examples([said("a", "b", "c", "d")], 300).items
    assert text(first) == "<|user|>a<|end|><|assistant|>(thought)b<|end|>"
    assert text(second) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>(thought)d<|end|>"
    assert learned(second) == "(thought)d<|end|>"


def test_a_reply_that_the_template_does_not_end_is_ended() -> None:
    first, second = encoder(NO_END).examples([said("a", "b", "c", "d")], 300).items
    assert text(first) == "user: a\nassistant: b\n<|end|>"
    assert text(second) == "user: a\nassistant: b\nuser: c\nassistant: d\n<|end|>"
    assert learned(second) == "d <|end|>"


def test_a_template_that_hides_replies_is_refused() -> None:
    with pytest.raises(TokenizerError, match="changes replies"):
        encoder("{% if add_generation_prompt %}ask{% else %}{{ messages[-1]['content'] | upper }}{% endif %}").examples(
            [said("a", "b")], 300
        )


def test_what_is_too_long_loses_its_beginning_and_is_counted() -> None:
    long = said("dog " * 50, "fox")
    made = encoder(TEMPLATE).examples([long, said("a", "b")], 20)
    assert made.truncated == 1
    assert len(made.items[0].ids) == 21
    assert learned(made.items[0]) == "fox<|end|>"
    assert len(made.items) == 2


def test_plain_text_is_learned_whole_in_pieces() -> None:
    whole = f"The quick {END} brown fox jumps over the lazy dog."
    pieces = encoder(None).examples([whole], 8).items
    joined = np.concatenate([pieces[0].ids, *(p.ids[1:] for p in pieces[1:])])
    assert text_of(joined.tolist()) == f"{whole}{END}"
    assert joined.tolist().count(END_ID) == 1
    assert all(len(p.ids) <= 9 and p.learned.all() for p in pieces)
    assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(pieces))


def test_the_default_template_is_chatml_in_tokens_the_model_has() -> None:
    template = ChatTemplate(default_template(TOKENIZER, END), {})
    messages = [{"role": SYSTEM, "content": "S"}, {"role": USER, "content": "it's \\"}]
    assert template.render(messages) == "### system\nS<|end|>\n### user\nit's \\<|end|>\n### assistant\n"

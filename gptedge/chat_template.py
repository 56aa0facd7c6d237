"""Chat templates: Jinja programs that come with a model and turn messages into its prompt.

They are other people's code, so they run in Jinja's immutable sandbox. Names and filters are those that Hugging Face's
`apply_chat_template` offers (transformers documentation, "Chat templates").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from gptedge.bundle import CHAT_TEMPLATE, TOKENIZER_CONFIG
from gptedge.errors import TokenizerError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}"""

_CONTINUATION = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class ChatTemplate:
    def __init__(self, source: str | None, variables: Mapping[str, Any]) -> None:
        """`source` None stands for a model that was never taught to chat: it continues the messages' text."""
        self.is_continuation = source is None
        self._source = _CONTINUATION if source is None else source
        self._variables = variables

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`. Raises TokenizerError when the template refuses them."""
        compiled = self._compiled
        try:
            return str(
                compiled.render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._variables,
                )
            )
        except Exception as e:  # a template is a program, and can fail in any way
            raise TokenizerError(f"the chat template refuses these messages: {e}") from None

    @property
    def problem(self) -> str | None:
        """Why it cannot be read, if it cannot."""
        try:
            _ = self._compiled
        except TokenizerError as e:
            return str(e)
        return None

    @cached_property
    def _compiled(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(self._source)
        except jinja2.TemplateError as e:
            raise TokenizerError(f"the chat template cannot be read: {e}") from None


def _generation_tag() -> Any:
    """{% generation %} … {% endgeneration %} marks what is learned of an assistant; a prompt is the same without."""
    from jinja2.ext import Extension

    class Generation(Extension):
        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    Generation.tags = {"generation"}
    return Generation


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of a bundle: chat_template.jinja, or the entry in tokenizer_config.json."""
    names = (CHAT_TEMPLATE, TOKENIZER_CONFIG)
    return chat_template_of({name: (folder / name).read_bytes() for name in names if (folder / name).is_file()})


def chat_template_of(files: Mapping[str, bytes]) -> ChatTemplate:
    """The template in the contents of a model's files, by their names."""
    config: dict[str, Any] = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    source: Any = config.get("chat_template")
    if CHAT_TEMPLATE in files:
        source = files[CHAT_TEMPLATE].decode("utf-8")
    if isinstance(source, list):  # several named ones
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    variables = {
        key: _token_text(config[key]) for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)
    }
    return ChatTemplate(source, variables)


def _token_text(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)

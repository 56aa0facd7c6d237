"""What the app and the line by line chat share: commands, wording, how a reply is made anew. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gptedge.errors import GptEdgeError

if TYPE_CHECKING:
    from gptedge import Result, SamplingParams

CONTINUATION = "This model was not taught to chat: it continues your text."
UNANSWERED = "The last question has no answer yet: /regenerate answers it."
REGENERATE_TEMPERATURE = 0.7
COMMANDS = {
    "/new": "forget this conversation and start another",
    "/regenerate": "answer the last question again",
    "/help": "show this",
    "/quit": "leave",
}


def is_command(text: str) -> bool:
    """Whether a message is a single word after a slash: a command, known or not, rather than a question."""
    return re.fullmatch(r"/\w+", text) is not None


def answer_to(command: str) -> str:
    """What to say of /help, or of a command that is none."""
    if command == "/help":
        return "\n".join(f"{name:<12} {does}" for name, does in COMMANDS.items())
    return f"{command} is no command; known are {', '.join(COMMANDS)}"


def changes_to_regenerate(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters for another reply to the same question: greedy decoding, and a seed, give the same again."""
    warmer = {"temperature": REGENERATE_TEMPERATURE} if params.temperature == 0 else {}
    return warmer if params.seed is None else {**warmer, "seed": None}


def dropped(result: Result) -> str:
    """What to say of a reply for which the context was full; nothing of others."""
    n = result.usage.dropped_tokens
    return f"the context was full; the model no longer sees the oldest {n} tokens" if n else ""


def one_line(problem: Exception | str) -> str:
    """What went wrong, as one line; errors that are not ours also say their type."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, (str, GptEdgeError)) else f"{type(problem).__name__}: {text}"

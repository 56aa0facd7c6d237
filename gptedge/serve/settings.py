"""What a server can be told, and the key file. The only place where the server's own defaults and limits stand."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from gptedge.config import SamplingParams
from gptedge.errors import DataError, UsageError

MAX_BODY_BYTES = 4 * 2**20
"""Largest request body; a context of a million tokens of English fits."""
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
RETRY_AFTER_S = 2
"""What a client is told to wait when the queue is full."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes any free port."""
    api_key: str | None = None
    """Clients must send it as `Authorization: Bearer KEY`; None lets everyone in who can connect."""
    cors_origins: tuple[str, ...] = ()
    """Web pages from these origins may read answers; "*" is any."""
    slots: int = 4
    """Replies computed at once, and KV caches kept: each takes up to `context_length` tokens of memory."""
    max_waiting: int = 64
    """Requests that may wait for a slot; more are refused with 429."""
    context_overflow: str = SamplingParams().context_overflow
    """What is done where a prompt no longer fits the context, or its reply; requests cannot say."""
    log_requests: bool = False
    """One line per request on stderr, without what was said."""
    adapters: tuple[Path, ...] = ()
    """LoRA adapters; each is served as a model of its own, by its file's name without the ending."""

    def __post_init__(self) -> None:
        for name, low, high in (("port", 0, 65535), ("slots", 1, 64), ("max_waiting", 0, 10_000)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it must be from {low} to {high}")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise UsageError(f"the origin {origin!r} is none; give one such as https://example.com, or *")
        SamplingParams(context_overflow=self.context_overflow)  # which checks it

    @property
    def is_loopback(self) -> bool:
        """Only programs on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """Names a request's Host header may have, ports aside; None allows all.

        A web page can point a name of its own at 127.0.0.1 (DNS rebinding) and would then read our answers as its own.
        """
        return (
            frozenset({"localhost", "127.0.0.1", "[::1]", bracketed(self.host.lower())}) if self.is_loopback else None
        )


def bracketed(host: str) -> str:
    """A host as URLs write it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def read_api_key(path: Path) -> str:
    """The key in a file of one non-empty line. Raises DataError when it is anything else."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a key file: a key is plain ASCII, as HTTP headers are") from None
    if len(lines) != 1:
        raise DataError(
            f"{path} has {len(lines)} lines with text; a key file holds the key on one line and nothing else"
        )
    return lines[0]

"""Tokenizer: text to ids and back, from and to Hugging Face's tokenizer.json, without Rust.

    text ─added tokens─▶ pieces ─normalizer─▶ ─added tokens─▶ ─pre-tokenizer─▶ words ─BPE─▶ ids ─post-processor─▶ ids

Does: encode and decode as `tokenizers` 0.23 does, on every string; stream decoding; BPE models with the parts that
GPT-2, Llama, Mistral, Gemma, Qwen and SmolLM use.
Does not: other models (Unigram, WordPiece), pairs of texts, offsets, nor the `truncation` and `padding` that a file may
ask for: they are kept when the file is saved, and never applied, so that no text is cut silently.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from gptedge.errors import TokenizerError
from gptedge.files import new_file, write_json
from gptedge.text import check_scalars
from gptedge.tokenizer.added_tokens import AddedToken, Matcher, read_added_tokens
from gptedge.tokenizer.bpe import BPE, build_model
from gptedge.tokenizer.decode import Chain, Decoder
from gptedge.tokenizer.fields import field
from gptedge.tokenizer.normalize import build_normalizer
from gptedge.tokenizer.postprocess import build_post_processor
from gptedge.tokenizer.pretokenize import build_pre_tokenizer

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A loaded tokenizer. It may be shared by threads; encoding only fills a cache."""

    def __init__(self, source: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
        """`source` is the content of tokenizer.json, `config` that of tokenizer_config.json."""
        if source.get("version", "1.0") != "1.0":
            raise TokenizerError(f"version {source['version']!r} is not supported, only '1.0'")
        self._source = source
        self._config = config or {}
        self._normalizer = build_normalizer(source.get("normalizer"))
        self._pre_tokenizer = build_pre_tokenizer(source.get("pre_tokenizer"))
        self._model = build_model(source.get("model"), byte_level=self._pre_tokenizer.byte_level)
        self._post_processor = build_post_processor(source.get("post_processor"))
        self._decoder = Decoder(source.get("decoder"))
        entries = field(dict(source), "added_tokens", list, "tokenizer.json", [])
        self._added, self._added_ids = read_added_tokens(entries, self._model.vocab, self._normalizer)
        self._raw_matcher = Matcher([t for t in self._added.values() if not t.normalized])
        self._normalized_matcher = Matcher([t for t in self._added.values() if t.normalized])

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer.json. Raises TokenizerError naming the file and what is wrong or not supported in it."""
        return cls._load(Path(path), None)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read tokenizer.json, and the roles of special tokens from tokenizer_config.json where there is one."""
        config = Path(folder) / "tokenizer_config.json"
        return cls._load(Path(folder) / "tokenizer.json", _read_json(config) if config.is_file() else None)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Tokenizer:
        """From the content of a tokenizer.json, which must not be changed afterwards. Raises TokenizerError."""
        return cls(source, config)

    @classmethod
    def _load(cls, path: Path, config: Mapping[str, Any] | None) -> Tokenizer:
        with _collector_paused():
            source = _read_json(path)
            try:
                return cls(source, config)
            except TokenizerError as e:
                raise TokenizerError(f"{path}: {e}") from e

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True, continued: bool = False
    ) -> list[int]:
        """Token ids of `text`, as `tokenizers` gives them.

        `continued`: it is what a longer text goes on with, and nothing is put before it that only a beginning has.

        `add_special_tokens` puts around them what the file's post-processor says. With `parse_special` false a special
        token's text is encoded as ordinary text; no special id comes out but the unknown token's and byte fallback's.
        Raises DataError for a lone surrogate, which no UTF-8 text can hold.
        """
        check_scalars(text)
        model = self._model if parse_special else self._plain_model
        ids: list[int] = []
        for token_id, piece, start in self._raw_matcher.split(text, parse_special=parse_special):
            if token_id is not None:
                ids.append(token_id)
            else:
                self._encode_piece(piece, start == 0 and not continued, model, parse_special, ids)
        return self._post_processor(ids, add_special_tokens)

    def _encode_piece(self, piece: str, first: bool, model: BPE, parse_special: bool, ids: list[int]) -> None:
        """Append the ids of a piece without raw added tokens; `first`: the text begins with it."""
        if self._normalizer is not None:
            piece, first = self._normalizer(piece, first)
        for token_id, part, start in self._normalized_matcher.split(piece, parse_special=parse_special):
            if token_id is not None:
                ids.append(token_id)
                continue
            for word in self._pre_tokenizer(part, first and start == 0):
                ids += model[word]

    @cached_property
    def _plain_model(self) -> BPE:
        return self._model.avoiding(self.special_ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, as `tokenizers` gives it: U+FFFD for bytes that are not UTF-8, nothing for unknown ids."""
        surfaces = self._surfaces
        hidden = self._hidden_ids if skip_special_tokens else ()
        return self._decoder.decode([surfaces[i] for i in ids if i in surfaces and i not in hidden])

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Decode ids one by one as they are generated; see DecodeStream."""
        return DecodeStream(self._surfaces, self._hidden_ids if skip_special_tokens else (), self._decoder.stream())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text. Raises TokenizerError for an unknown id."""
        token = self._surfaces.get(token_id)
        if token is None:
            raise TokenizerError(f"there is no token with the id {token_id}; ids go from 0 to {self.vocab_size - 1}")
        return self._decoder.token_bytes(token)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as tokenizer.json spells it ("Ġthe"), or None."""
        return self._added_ids.get(token, self._model.vocab.get(token))

    def id_to_token(self, token_id: int) -> str | None:
        """The token as tokenizer.json spells it, or None."""
        added = self._added.get(token_id)
        return self._surfaces.get(token_id) if added is None else added.content

    @cached_property
    def _surfaces(self) -> dict[int, str]:
        """What the decoder is given for each id."""
        of_model = {i: token for token, i in self._model.vocab.items()}
        return of_model | {i: token.surface for i, token in self._added.items()}

    @cached_property
    def _hidden_ids(self) -> frozenset[int]:
        """What `skip_special_tokens` leaves out: as in Hugging Face, every id that shows a special token's content."""
        contents = {token.content for token in self._added.values() if token.special}
        return frozenset(i for i, surface in self._surfaces.items() if surface in contents)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included."""
        return max([*self._model.vocab.values(), *self._added], default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens marked special."""
        return frozenset(i for i, token in self._added.items() if token.special)

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """Added tokens in the order of their ids."""
        return tuple(self._added[i] for i in sorted(self._added))

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token that tokenizer_config.json names."""
        return self._role("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token that tokenizer_config.json names."""
        return self._role("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token that tokenizer_config.json names."""
        return self._role("pad_token")

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token that tokenizer_config.json names."""
        return self._role("unk_token")

    @property
    def adds_bos(self) -> bool:
        """Whether `encode(…, add_special_tokens=True)` begins with the beginning-of-text token."""
        return self.bos_id is not None and self._post_processor([], True)[:1] == [self.bos_id]

    @property
    def adds_eos(self) -> bool:
        """Whether `encode(…, add_special_tokens=True)` ends with the end-of-text token."""
        return self.eos_id is not None and self._post_processor([-1], True)[-1:] == [self.eos_id]

    def _role(self, name: str) -> int | None:
        value = self._config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return self.token_to_id(content) if isinstance(content, str) else None

    def to_dict(self) -> dict[str, Any]:
        """The content of tokenizer.json, a copy."""
        return copy.deepcopy(dict(self._source))

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json; the same tokenizer gives the same bytes."""
        with new_file(Path(path)) as work:
            write_json(work, self._source)


class DecodeStream:
    """Text of ids as they come. The steps and the flush together equal `decode` of all ids, whatever the ids."""

    def __init__(self, surfaces: Mapping[int, str], hidden_ids: Container[int], chain: Chain) -> None:
        self._surfaces = surfaces
        self._hidden_ids = hidden_ids
        self._chain = chain

    def step(self, token_id: int) -> str:
        """Text that became final with this id; empty while a character or a run of bytes is incomplete."""
        token = self._surfaces.get(token_id)
        return "" if token is None or token_id in self._hidden_ids else self._chain.push(token)

    def flush(self) -> str:
        """What was held back, with U+FFFD for an incomplete character. The stream ends here."""
        return self._chain.finish()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Building 150,000 small objects wakes the cycle collector often; without it a load takes half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises TokenizerError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise TokenizerError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"{path} is not JSON: {e}; download or write it again") from e
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return value

"""Text files as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptedge.errors import DataError
from gptedge.text import counted, read_text


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
    assert read_text(tmp_path / "marked") == "one\ufeff"


def test_what_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin is not UTF-8 text: byte 3 is 0xe9"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize(("count", "said"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (1200, "1,200 tokens")])
def test_one_is_not_several(count: int, said: str) -> None:
    assert counted(count, "token") == said

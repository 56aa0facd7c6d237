"""A whole little GGUF file that several modules read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.gguf_files import (
    Arrays,
    tiny_llama,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_llama(path)

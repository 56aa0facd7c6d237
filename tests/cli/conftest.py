"""A text that commands read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TEXT


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path

"""Nothing of the environment reaches a pull."""

from __future__ import annotations

from pathlib import Path

import pytest

PROXIES = [f"{p}{s}" for p in ("http_proxy", "https_proxy", "all_proxy") for s in ("",)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment's, and models under a folder of the test's own."""
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_TOKEN", "HF_ENDPOINT", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTEDGE_HOME", str(tmp_path / "home"))

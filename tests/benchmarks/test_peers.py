"""Environments of peers are made once, made anew when half-made, and one line says it when no package index answers."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import peers
import pytest


@pytest.fixture
def tiny_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A peer of one package that lies in a folder, with no index to ask; the folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_peer.py", "VALUE = 3\n")
        info = "tiny_peer-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(peers, "PEERS", {"tiny": peers.Peer(("tiny-peer==1.0",))})
    monkeypatch.setenv("GPTEDGE_PEERS", str(tmp_path / "peers"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


@pytest.mark.slow
def test_made_once_and_anew_when_half_made(tiny_peer: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import json, sys, tiny_peer\nprint('noise')\nprint(json.load(sys.stdin) * tiny_peer.VALUE)\n")
    assert peers.run_json("tiny", program, 14) == 42
    for wheel in tiny_peer.iterdir():
        wheel.unlink()
    assert peers.run_json("tiny", program, 5) == 15
    folder = peers.environment("tiny").parent.parent
    (folder / "complete.json").unlink()
    with pytest.raises(peers.NoPackageIndex, match=r"no package index answers for the environment tiny: .*tiny-peer"):
        peers.environment("tiny")
    program.write_text("raise SystemExit('boom')")
    with pytest.raises(peers.NoPackageIndex):  # not what was there before
        peers.run_json("tiny", program, 5)


@pytest.mark.slow
def test_a_package_that_breaks_is_not_a_missing_index(tiny_peer: Path, tmp_path: Path) -> None:
    (tiny_peer / "tiny_peer-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(peers.PeerError) as caught:
        peers.environment("tiny")
    assert not isinstance(caught.value, peers.NoPackageIndex)
    assert len(str(caught.value).splitlines()) == 1


def test_a_program_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(peers, "environment", lambda name: Path(sys.executable))
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('the bundle is broken')")
    with pytest.raises(peers.PeerError, match="the bundle is broken"):
        peers.run_json("genai", program, 1)


def test_names_on_the_command_line() -> None:
    import sys

    done = subprocess.run([sys.executable, peers.__file__, "genia"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "genai" in done.stderr
    with pytest.raises(peers.PeerError, match="no peer is called 'genia'"):
        peers.environment("genia")

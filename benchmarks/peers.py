"""Environments of other tools, each made once and kept: their requirements conflict with ours and with each other's.

    python benchmarks/peers.py genai        # makes the environment if need be, and prints the path of its Python

They lie in $GPTEDGE_PEERS, or ~/.cache/gptedge/peers, in a folder for each set of requirements. An environment cannot
be moved once it is made, so a half-made one is known by the stamp that it lacks, and made anew.
Works on Linux and macOS.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ONNXRUNTIME, TORCH = "onnxruntime==1.31.1", "torch==2.13.0"
GENAI = ("onnxruntime-genai==0.18.0", ONNXRUNTIME)
OFFLINE = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_STAMP = "complete.json"
_BORROWED = "borrowed.pth"
# The build of llama.cpp for AMX crashes on processors that have it; AVX2 is what every peer here can count on.
_LLAMA_CPP_BUILD = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF"


class PeerError(RuntimeError):
    """An environment could not be made, or a program in it failed."""


class NoPackageIndex(PeerError):
    """pip found no index that knows what is asked for."""


@dataclass(frozen=True)
class Peer:
    requirements: tuple[str, ...]
    borrows: str | None = None
    """A requirement so large that it is not installed again where the environment of this Python has it. All of that
    environment's packages then follow the peer's own on its path."""
    pip_options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """For pip, when it builds."""


PEERS: Mapping[str, Peer] = {
    "genai": Peer(GENAI),
    "genai-builder": Peer((*GENAI, TORCH, "transformers==5.23.0", "onnx-ir==1.1.0", "onnx==1.23.2"), borrows=TORCH),
    "optimum": Peer(("optimum-onnx==0.1.0", "transformers==4.57.6", TORCH, ONNXRUNTIME), borrows=TORCH),
    "llama-cpp": Peer(
        ("llama-cpp-python==0.3.36",),
        # A wheel in pip's cache may have been built with other options.
        pip_options=("--no-binary", "llama-cpp-python", "--no-cache-dir"),
        variables={"CMAKE_ARGS": _LLAMA_CPP_BUILD, "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
}


def environment(name: str) -> Path:
    """The Python of one of PEERS, its environment made first if need be.

    Raises NoPackageIndex when no index answers, PeerError when a package cannot be installed.
    """
    if name not in PEERS:
        raise PeerError(f"no peer is called {name!r}; known are {', '.join(PEERS)}")
    peer = PEERS[name]
    borrowed = _borrowed(peer)
    key = json.dumps([sys.version_info[:2], peer.requirements, peer.pip_options, dict(peer.variables), str(borrowed)])
    folder = _root() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    with _locked(folder.with_suffix(".lock")):
        if not (folder / _STAMP).exists():
            _make(folder, name, peer, borrowed)
    return folder / "bin" / "python"


def run_json(name: str, program: Path, work: Any) -> Any:
    """Run a program of ours with a peer's Python: `work` goes in as JSON on stdin, the last line of stdout comes back.

    Nothing is fetched from hubs meanwhile. Raises PeerError with the program's last lines when it fails.
    """
    done = subprocess.run(
        [environment(name), program], input=json.dumps(work), capture_output=True, text=True, env=os.environ | OFFLINE
    )
    if done.returncode:
        raise PeerError(f"{program.name} failed in {name} with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _root() -> Path:
    return Path(os.environ.get("GPTEDGE_PEERS") or Path.home() / ".cache" / "gptedge" / "peers").absolute()


def _borrowed(peer: Peer) -> Path | None:
    """This environment's packages, when the version of what the peer borrows is right."""
    if peer.borrows is None:
        return None
    name, version = peer.borrows.split("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    same = distribution.version.partition("+")[0] == version
    return Path(str(distribution.locate_file(""))).absolute() if same else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _make(folder: Path, name: str, peer: Peer, borrowed: Path | None) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    venv.create(folder, with_pip=True, symlinks=True)
    if borrowed:
        site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (Path(site) / _BORROWED).write_text(f"{borrowed}\n")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += [*peer.pip_options, *peer.requirements]
    # Five tries at a dead network would take minutes.
    variables = {"PIP_RETRIES": "1"} | os.environ | peer.variables
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    if done.returncode:
        raise _failure(name, done.stdout)
    (folder / _STAMP).write_text(json.dumps(peer.requirements) + "\n")


def _failure(name: str, log: str) -> PeerError:
    errors = re.findall(r"^\s*(?:ERROR|error): (.+)$", log, re.MULTILINE)
    if "(from versions: none)" in log:
        return NoPackageIndex(f"no package index answers for the environment {name}: {errors[0]}")
    return PeerError(f"the environment {name} cannot be made; pip says: {'; '.join(errors) or log[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    try:
        print(environment(parser.parse_args().name))
    except PeerError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()

"""Writing so that an interrupt, a crash or a full disk leaves either the old thing or the new, never half of one."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptedge.errors import GptEdgeError, OutputExistsError, UsageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where a disk, or a user's part of it, holds no more, or a file may not grow."""
_HASH_CHUNK = 1 << 20
_WORK_NAME = re.compile(r"(?P<pid>\d+)-[\w-]+\.(?P<kind>partial|old)")  # after the destination's own name


@contextmanager
def new_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; rename it into place on success, remove it on any exception.

    Raises OutputExistsError when `destination` exists and `force` is false. With `force` the old folder stays until
    the new one is complete.
    """
    destination = Path(destination)
    _clean_up(destination)
    check_destination(destination, force=force)
    work = _work_path(destination)
    try:
        with named_when_full(destination, work):
            work.mkdir(parents=True)
            yield work
            _sync_tree(work)
            _replace(work, destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside `destination` to write to; rename it over `destination` on success, remove it otherwise."""
    destination = Path(destination)
    _clean_up(destination)
    work = _work_path(destination)
    try:
        with named_when_full(destination, work):
            yield work
            _sync(work)
            os.replace(work, destination)
    finally:
        with suppress(OSError):  # a folder that is read-only refuses this too, which must not hide the first refusal
            work.unlink(missing_ok=True)


@contextmanager
def named_when_full(destination: Path, work: Path | None = None) -> Iterator[None]:
    """A full disk's error names `destination`: of itself it names no file, or the one that is written for its place.
    So does any error that names `work`, which nobody knows of."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL and (work is None or e.filename != str(work)):
            raise
        raise OSError(e.errno, e.strerror, str(destination)) from e


@contextmanager
def writing(path: Path, error: type[GptEdgeError], advice: str) -> Iterator[None]:
    """The system's refusal, such as a full disk, as a line with a way out, which may begin with making room."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            advice = advice.removeprefix("make room there, or ").removeprefix("make room and ")
        raise error(f"{path} cannot be written: {e.strerror or e}; {advice}") from None


def check_writable(path: Path, error: type[GptEdgeError]) -> None:
    """Refuse early, before there is something to write, what the system would refuse late."""
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise error(f"{path} cannot be written: {os.strerror(errno.EACCES)}; choose another output")


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse early what `new_folder` would refuse late."""
    destination = Path(destination)
    if destination.is_symlink() or destination.exists():
        if not force:
            raise OutputExistsError(f"{destination} exists already; choose another output or add --force")
        if not destination.is_dir():
            raise UsageError(f"{destination} is a file, and the output is a folder; choose another output")


def user_folder(kind: str) -> Path:
    """Where this user's `kind` of things are kept: below $GPTEDGE_HOME, or the system's place for a program's data."""
    if home := os.environ.get("GPTEDGE_HOME"):
        return Path(home) / kind
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "gptedge" / kind
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "gptedge" / kind


def cache_folder(kind: str) -> Path:
    """Where this user's `kind` of things that can be made again is kept: below $GPTEDGE_CACHE, or the usual place."""
    if home := os.environ.get("GPTEDGE_CACHE"):
        return Path(home) / kind
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "gptedge" / "cache" / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptedge" / kind


def write_json(path: Path, value: Any) -> None:
    """Pretty JSON with a final newline, UTF-8, keys in the given order: the same value gives the same bytes."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as f:
        while chunk := f.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _replace(work: Path, destination: Path) -> None:
    """Folders cannot be renamed over a full folder: move the old one aside first, and back if the second one fails."""
    if not destination.exists():
        os.rename(work, destination)
        return
    old = work.with_suffix(".old")
    try:
        os.rename(destination, old)
        os.rename(work, destination)
    except BaseException:  # an interrupt may come here too, before or after either
        if not destination.exists():
            os.rename(old, destination)
        raise
    finally:
        if destination.exists():
            _remove(old)


def _clean_up(destination: Path) -> None:
    """Remove what killed processes left beside `destination`; put back what one moved aside and did not replace."""
    for stale in destination.parent.glob(f".{glob.escape(destination.name)}.*"):
        match = _WORK_NAME.fullmatch(stale.name.removeprefix(f".{destination.name}."))
        if match is None or _is_running(int(match["pid"])):
            continue
        if match["kind"] == "old" and not destination.exists():
            os.rename(stale, destination)
        else:
            _remove(stale)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _work_path(destination: Path) -> Path:
    """A fresh hidden name beside `destination`."""
    return destination.parent / f".{destination.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def seal(path: Path) -> str:
    """Put a file that is complete on the disk now rather than with its folder; its sha256, in hex."""
    _sync(path)
    return sha256(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)  # Windows syncs only what is open for writing
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

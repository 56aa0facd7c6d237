"""Writing beside the destination and renaming: whatever happens, the old thing or the new thing, never half of one."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptedge import files
from gptedge.errors import OutputExistsError, UsageError
from gptedge.files import new_file, new_folder, sha256, write_json


def fill(folder: Path, text: str) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "a.txt").write_text(text)


def content(folder: Path) -> str:
    return (folder / "inside" / "a.txt").read_text()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def test_new_folder(out: Path) -> None:
    with new_folder(out) as work:
        assert work.parent == out.parent
        assert not out.exists()
        fill(work, "new")
    assert content(out) == "new"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(out: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with new_folder(out) as work:
            fill(work, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(out.parent) == []


def test_an_existing_destination_is_refused_before_anything_is_done(out: Path) -> None:
    out.mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="--force"), new_folder(out):
        pytest.fail("the body ran")
    assert os.listdir(out.parent) == ["out"]


def test_force_keeps_the_old_folder_until_the_new_one_is_complete(out: Path) -> None:
    with new_folder(out) as work:
        fill(work, "old")
    with new_folder(out, force=True) as work:
        fill(work, "new")
        assert content(out) == "old"
    assert content(out) == "new"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_with_force_keeps_the_old_folder(out: Path, error: type[BaseException]) -> None:
    with new_folder(out) as work:
        fill(work, "old")

    def interrupted() -> None:
        with new_folder(out, force=True) as work:
            fill(work, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(out) == "old"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupt_between_the_two_renames(
    out: Path, monkeypatch: pytest.MonkeyPatch, failing: int, when: str, error: type[BaseException]
) -> None:
    """Of the two renames that replace a folder, one fails, or is interrupted before or after it is done."""
    with new_folder(out) as work:
        fill(work, "old")
    rename, calls = os.rename, []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing and when == "before":
            raise error
        rename(source, target)
        if len(calls) == failing:
            raise error

    monkeypatch.setattr(os, "rename", fail)

    def replace() -> None:
        with new_folder(out, force=True) as work:
            fill(work, "new")

    with pytest.raises(error):
        replace()
    assert content(out) == ("new" if (failing, when) == (2, "after") else "old")
    assert os.listdir(out.parent) == ["out"]


def test_force_on_a_file_is_refused(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"), new_folder(out, force=True):
        pytest.fail("the body ran")
    assert out.read_text() == "a file"


def test_a_folder_that_is_read_only_is_named_by_the_file_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the hidden one beside it, which can be neither made nor removed."""

    def refused(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="Read-only") as caught, new_file(tmp_path / "page.html") as work:
        work.write_text("page")
    assert caught.value.filename == str(tmp_path / "page.html")


def test_a_link_that_leads_nowhere_counts_as_existing(out: Path) -> None:
    out.parent.mkdir()
    out.symlink_to("nowhere")
    with pytest.raises(OutputExistsError), new_folder(out):
        pytest.fail("the body ran")


def test_force_on_a_link_replaces_the_link_and_not_what_it_leads_to(out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", "precious")
    out.parent.mkdir()
    out.symlink_to(tmp_path / "elsewhere")
    with new_folder(out, force=True) as work:
        fill(work, "new")
    assert content(out) == "new"
    assert content(tmp_path / "elsewhere") == "precious"
    assert os.listdir(out.parent) == ["out"]


# ---- what killed processes leave -----------------------------------------------------------------------------------


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_partial_things_of_dead_processes_are_removed_and_no_others(out: Path) -> None:
    out.parent.mkdir()
    dead, alive = dead_pid(), os.getpid()
    kept = [f".out.{alive}-0123abcd.partial", f".other.{dead}-0123abcd.partial", ".out.notes.partial", ".out.5-x.txt"]
    kept += [f".out.b.{dead}-0123abcd.partial"]  # belongs to out.b
    for name in (f".out.{dead}-0123abcd.partial", *kept):
        fill_dir = out.parent / name
        fill_dir.mkdir()
        fill(fill_dir, "stale")
    (out.parent / f".out.{dead}-4567abcd.partial").write_text("a file")
    with new_folder(out) as work:
        fill(work, "new")
    assert sorted(os.listdir(out.parent)) == sorted(["out", *kept])


def test_names_with_brackets_are_cleaned_too(tmp_path: Path) -> None:
    stale = tmp_path / f".out[1].{dead_pid()}-0123abcd.partial"
    stale.mkdir()
    with new_folder(tmp_path / "out[1]") as work:
        fill(work, "new")
    assert os.listdir(tmp_path) == ["out[1]"]


def test_a_folder_moved_aside_by_a_killed_process_is_put_back(out: Path) -> None:
    moved = out.parent / f".out.{dead_pid()}-0123abcd.old"
    moved.mkdir(parents=True)
    fill(moved, "old")
    with pytest.raises(OutputExistsError), new_folder(out):
        pytest.fail("the body ran")
    assert content(out) == "old"
    assert os.listdir(out.parent) == ["out"]


def test_a_folder_moved_aside_and_replaced_is_removed(out: Path) -> None:
    moved = out.parent / f".out.{dead_pid()}-0123abcd.old"
    moved.mkdir(parents=True)
    out.mkdir()
    with new_folder(out, force=True) as work:
        fill(work, "new")
    assert os.listdir(out.parent) == ["out"]


def test_killed_in_the_middle(out: Path) -> None:
    """A process killed outright while it writes leaves no destination, and the next run leaves no rest of it."""
    script = (
        "import sys, time; from pathlib import Path; from gptedge.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len(os.listdir(out.parent)) == 1
    with new_folder(out) as work:
        fill(work, "new")
    assert os.listdir(out.parent) == ["out"]


# ---- a full disk ---------------------------------------------------------------------------------------------------


FULL = re.escape(os.strerror(errno.EFBIG))


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writing fails as it does on a full disk, at once or when flushed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_keeps_the_old_folder(out: Path) -> None:
    with new_folder(out) as work:
        fill(work, "old")

    def write_too_much() -> None:
        with files_limited_to(1000), new_folder(out, force=True) as work:
            (work / "a").write_bytes(b"x" * 2000)

    with pytest.raises(OSError, match=FULL) as e:
        write_too_much()
    assert e.value.filename == str(out)
    assert content(out) == "old"
    assert os.listdir(out.parent) == ["out"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write_too_much() -> None:
        with files_limited_to(1000), new_file(tmp_path / "a") as work:
            work.write_bytes(b"x" * 2000)

    with pytest.raises(OSError, match=FULL) as e:
        write_too_much()
    assert e.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_told_of_what_was_to_be_written(out: Path, tmp_path: Path) -> None:
    """Not of a file that is copied from, which shutil names, or one in a folder that is gone by then."""
    (tmp_path / "big").write_bytes(b"x" * 2000)

    def copy_too_much() -> None:
        with files_limited_to(1000), new_folder(out) as work, new_file(work / "inside") as file:
            shutil.copyfile(tmp_path / "big", file)

    with pytest.raises(OSError, match=FULL) as e:
        copy_too_much()
    assert e.value.filename == str(out)
    with pytest.raises(FileNotFoundError) as e, new_folder(out) as work:
        (work / "nowhere").read_bytes()
    assert e.value.filename != str(out), "no error of a full disk"


# ---- files ---------------------------------------------------------------------------------------------------------


def test_new_file_replaces_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with new_file(tmp_path / "a") as work:
        work.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_file_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with new_file(tmp_path / "a") as work:
            work.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_new_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(files, "_sync", lambda path: order.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with new_file(tmp_path / "a") as work:
        work.touch()
    assert order == ["sync", "replace"]


def test_sha256_and_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "ü", "a": [1]})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "b": "ü",\n  "a": [\n    1\n  ]\n}\n'.encode()
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

"""The parts that need no screen: the file, the status line, the terminal's colours, the verb, and who imports whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptedge.errors import DataError, UsageError
from gptedge.tui import colours, store
from gptedge.tui.status import Facts, line

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_file_appears_with_the_first_words_and_is_whole_or_old(tmp_path: Path, monkeypatch: Any) -> None:
    file = store.ChatFile.new(tmp_path / "chats", "bundle")
    assert file.save([{"role": "system", "content": "s"}]) is None
    assert not (tmp_path / "chats").exists()
    assert file.save(TALK) is None
    before = file.path.read_bytes()

    def fail(path: Path, _: object) -> None:
        path.write_text('{"half')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_json", fail)
    assert "No space left" in (file.save([*TALK, *TALK]) or "")
    assert file.path.read_bytes() == before
    assert [p.name for p in file.path.parent.iterdir()] == [file.path.name]
    monkeypatch.undo()
    assert file.save([*TALK, *TALK]) is None  # it tries again
    assert store.read(file.path).messages == [*TALK, *TALK]
    assert store.read(file.path).bundle == str(Path("bundle").resolve())


def test_what_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    file = store.ChatFile.new(tmp_path, "bundle")
    file.save(TALK)
    file.path.unlink()
    file.save([dict(m) for m in TALK])
    assert not file.path.exists()


def test_the_latest_is_what_was_written_last(tmp_path: Path) -> None:
    for age, name in ((5, "z"), (1, "b"), (9, "a")):
        file = store.ChatFile(tmp_path / f"{name}.json", name)
        file.save(TALK)
        os.utime(file.path, (1000 - age, 1000 - age))
    assert Path(store.latest(tmp_path).bundle).name == "b"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 1, "messages": [{"role": "x"}]}', "\udcff"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError):
        store.latest(tmp_path)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no conversation to resume"):
        store.latest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("GPTEDGE_HOME", "/h", "/h/chats"),
        ("XDG_DATA_HOME", "/x", "/x/gptedge/chats"),
        ("HOME", "/u", "/u/.local/share/gptedge/chats"),
    ],
)
def test_where_chats_are_kept(monkeypatch: Any, name: str, value: str, expected: str) -> None:
    for other in ("GPTEDGE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert store.chats_folder() == Path(expected)


FULL = Facts("smollm2", recipe="int4", used_tokens=1234, context_length=8192, tokens_per_s=87.4, ttft_ms=123.0)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (80, ("smollm2 · int4", "1,234 / 8,192 tokens · 87 tok/s · first after 0.12 s")),
        (60, ("smollm2 · int4", "1,234 / 8,192 tokens · 87 tok/s")),
        (40, ("smollm2 · int4", "1,234 / 8,192 tokens")),
        (30, ("smollm2", "1,234 / 8,192 tokens")),
        (20, ("smollm2", "")),
        (4, ("smol", "")),
    ],
)
def test_the_status_line_drops_what_matters_least(width: int, expected: tuple[str, str]) -> None:
    assert line(FULL, width) == expected


def test_the_status_line_counts_cells() -> None:
    left, right = line(Facts("重力模型"), 6)
    assert (left, right) == ("重力模", "")


@pytest.mark.parametrize(
    ("got", "colour", "typed"),
    [
        (b"\x1b]11;rgb:ffff/ffff/ffff\x07\x1b[?62;22c", (255, 255, 255), ""),
        (b"\x1b]11;rgb:00/2b/36\x1b\\\x1b[?6c", (0, 43, 54), ""),
        (b"\x1b]11;rgba:0000/0000/0000/ffff\x1b\\\x1b[?6c", (0, 0, 0), ""),
        (b"\x1b[?6c", None, ""),
        (b"hi \x1b]11;rgb:ffff/ffff/ffff\x07t\xc3\xa9\x1b[?6c", (255, 255, 255), "hi té"),
        (b"x\x1b[A", None, "x"),
        (b"", None, ""),
    ],
)
def test_what_terminals_answer(got: bytes, colour: Any, typed: str) -> None:
    assert colours.parse(got) == colours.Answer(colour, typed)


def test_dark_and_light_themes_stand_on_the_terminals_own_background() -> None:
    assert colours.theme((0, 43, 54)).background == "#002b36"
    assert colours.theme((0, 43, 54)).dark
    assert not colours.theme((253, 246, 227)).dark
    assert colours.theme(None).dark


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GPTEDGE_")}
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean, **environment},
        check=False,
    )


def test_without_a_bundle_the_next_step_is_named() -> None:
    done = run("-m", "gptedge", "chat")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "GPTEDGE_CHAT_BUNDLE" in done.stderr
    assert "gptedge demo" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_bundle_may_come_from_the_environment(tmp_path: Path) -> None:
    done = run("-m", "gptedge", "chat", "--plain", GPTEDGE_CHAT_BUNDLE=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "nowhere does not exist" in done.stderr


def test_resume_without_a_conversation(tmp_path: Path) -> None:
    done = run("-m", "gptedge", "chat", "--resume", GPTEDGE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "no conversation to resume" in done.stderr


def loaded_after(code: str) -> set[str]:
    done = run("-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_plain_imports_no_textual() -> None:
    fakes = Path(__file__).parent / "tui_fakes.py"
    code = (
        f"import sys, io; sys.path.insert(0, {str(fakes.parent)!r}); import tui_fakes, gptedge.cli.chat\n"
        "import gptedge.tui.plain, tempfile; tui_fakes.main('plain', tempfile.mkdtemp(), 1)"
    )
    assert "textual" not in loaded_after(code)


def test_the_app_imports_no_onnxruntime_and_the_verb_nothing_heavy() -> None:
    everything = "import gptedge.tui.app, gptedge.tui.plain, gptedge.tui.colours"
    names = loaded_after(everything)
    assert "textual" in names
    assert not names & {"onnxruntime", "onnx", "torch", "numpy"}
    assert not loaded_after("import gptedge.cli.chat") & {"onnxruntime", "textual", "numpy", "rich"}


def test_without_textual_the_way_out_is_named(monkeypatch: Any) -> None:
    from gptedge.cli import chat
    from gptedge.cli.common import Loading
    from gptedge.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "textual", None)
    for name in [n for n in sys.modules if n.startswith(("textual.", "gptedge.tui.app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(colours.BackgroundQuery, "ask", lambda self: None)
    from gptedge.config import SamplingParams

    loading = Loading(threads=None, profile=None, tune=True, provider=None, adapter=None)
    with pytest.raises(MissingExtraError, match=r"gptedge\[tui\], or use --plain"):
        chat._app(Path("x"), None, None, SamplingParams(), loading)


@pytest.mark.parametrize(("elsewhere", "shown"), [("", "_app"), ("stdin", "_plain"), ("stderr", "_plain")])
def test_the_app_needs_a_terminal_to_draw_on(monkeypatch: Any, elsewhere: str, shown: str) -> None:
    from gptedge.cli import chat

    used: list[str] = []
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}.isatty", lambda name=name: name != elsewhere)
    for name in ("_app", "_plain"):
        monkeypatch.setattr(chat, name, lambda *_, name=name: used.append(name))
    chat.command(Path("bundle"))
    assert used == [shown]

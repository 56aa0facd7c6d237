"""What the command cannot use: one clear line, the right code, nothing left."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptedge import safetensors
from gptedge.cli.common import text_argument
from tests.cli.run import run


def truncated(tiny_checkpoint: Path, at: Path) -> Path:
    shutil.copytree(tiny_checkpoint, at)
    data = (at / "model.safetensors").read_bytes()
    (at / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])
    return at


def changed_config(tiny_checkpoint: Path, at: Path, **changes: object) -> Path:
    shutil.copytree(tiny_checkpoint, at)
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, **changes}))
    return at


def sharded(tiny_checkpoint: Path, at: Path, shard: str) -> Path:
    """Half of the tensors are said to be in `shard`, which is not there."""
    shutil.copytree(tiny_checkpoint, at)
    first = "model-00001-of-00002.safetensors"
    (at / "model.safetensors").rename(at / first)
    names = sorted(safetensors.read(at / first))
    where = {name: first if i % 2 else shard for i, name in enumerate(names)}
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return at


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("code-was-run",))


def evil_pickle(tiny_checkpoint: Path, at: Path) -> Path:
    import torch

    path = at.with_suffix(".pt")
    torch.save({"model": {}, "model_args": Code()}, path)
    return path


def gguf_of(architecture: str, at: Path) -> Path:
    import gguf

    path = at.with_suffix(".gguf")
    w = gguf.GGUFWriter(path, architecture)
    w.add_tensor("token_embd.weight", np.ones((9, 32), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def cut_gguf(tiny_checkpoint: Path, at: Path) -> Path:
    path = gguf_of("llama", at)
    path.write_bytes(path.read_bytes()[:-200])
    return path


Make = Callable[[Path, Path], Path]
BAD_SOURCES: dict[str, tuple[Make, int, str]] = {
    "missing": (lambda c, at: at, 1, "does not exist"),
    "truncated": (truncated, 1, "is cut short"),
    "empty folder": (lambda c, at: at.mkdir() or at, 1, "config.json"),
    "unknown architecture": (
        lambda c, at: changed_config(c, at, architectures=["WhaleForCausalLM"]), 5, "WhaleForCausalLM",
    ),
    "unknown rope scaling": (lambda c, at: changed_config(c, at, rope_scaling={"rope_type": "ntk"}), 5, "'ntk'"),
    "rope scaling that follows the length": (
        lambda c, at: changed_config(c, at, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 5, "'dynamic'",
    ),
    "rope scaling without its number": (
        lambda c, at: changed_config(c, at, rope_scaling={"rope_type": "linear"}), 1, "factor",
    ),
    "missing shard": (
        lambda c, at: sharded(c, at, "model-00002-of-00002.safetensors"), 1, "00002-of-00002.safetensors is missing",
    ),
    "shard outside the folder": (lambda c, at: sharded(c, at, "../other.safetensors"), 1, "lies outside the folder"),
    "a .pt that runs code": (evil_pickle, 1, "asks to run"),
    "a .gguf cut short": (cut_gguf, 1, "is cut short"),
    "a .gguf of another kind": (lambda c, at: gguf_of("mamba", at), 5, "'mamba'"),
    "head_dim without a kernel": (
        lambda c, at: changed_config(c, at, head_dim=8, num_attention_heads=12, num_key_value_heads=4), 5, "head_dim 8",
    ),
    "wrong shape": (lambda c, at: changed_config(c, at, intermediate_size=151), 1, "implies [151, 84]"),
    "missing layer": (lambda c, at: changed_config(c, at, num_hidden_layers=4), 1, "has no tensor model.layers.3"),
    "unused layer": (lambda c, at: changed_config(c, at, num_hidden_layers=2), 1, "does not use"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_checkpoints(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    make, expected, message = BAD_SOURCES[kind]
    source = make(tiny_checkpoint, tmp_path / "source")
    (tmp_path / "work").mkdir()
    code, out, err = run(capsys, "export", source, tmp_path / "work" / "out")
    assert (code, out) == (expected, "")
    assert err.count("\n") == 1
    assert message in err
    assert list((tmp_path / "work").iterdir()) == []


SPOILED = "model.layers.1.mlp.up_proj.weight"


def spoiled(tiny_checkpoint: Path, at: Path, value: float) -> Path:
    """A checkpoint with one number of one tensor replaced."""
    shutil.copytree(tiny_checkpoint, at)
    tensors = {name: t.read().copy() for name, t in safetensors.read(at / "model.safetensors").items()}
    tensors[SPOILED][3, 5] = value
    safetensors.write(at / "model.safetensors", tensors)
    return at


@pytest.mark.parametrize(
    ("value", "flags", "expected", "message"),
    [
        (np.nan, [], 1, f"{SPOILED} holds numbers that are not finite"),
        (np.inf, [], 1, f"{SPOILED} holds numbers that are not finite"),
        (-np.inf, ["--portable"], 1, f"{SPOILED} holds numbers that are not finite"),
        (7e4, ["--dtype", "fp16"], 5, "blocks.1.mlp.up.weight holds 70000, and float16 ends at 65504"),
    ],
)
def test_numbers_that_cannot_be(
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    value: float,
    flags: list[str],
    expected: int,
    message: str,
) -> None:
    """Refused by the tensor's name, without the help of verification."""
    source = spoiled(tiny_checkpoint, tmp_path / "source", value)
    (tmp_path / "work").mkdir()
    code, out, err = run(capsys, "export", source, tmp_path / "work" / "out", "--no-verify", *flags)
    assert (code, out) == (expected, "")
    assert err.count("\n") == 1
    assert message in err
    assert list((tmp_path / "work").iterdir()) == []


def test_huge_but_finite_numbers_are_no_fault(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = spoiled(tiny_checkpoint, tmp_path / "source", 1e30)
    assert run(capsys, "export", source, tmp_path / "out", "--no-verify")[0] == 0


def test_another_exporter_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    (tmp_path / "work").mkdir()
    code, out, err = run(capsys, "export", tiny_checkpoint, tmp_path / "work" / "out", "--via", "optimum")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "--via optimum needs optimum" in err
    assert "install gptedge[optimum]" in err
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--via", "optimim"], "did you mean optimum?"),
        (["--via", "optimum", "--portable"], "leave out --portable, --lora-inputs and --dtype"),
        (["--via", "optimum", "--dtype", "fp16"], "leave out --portable, --lora-inputs and --dtype"),
    ],
)
def test_exporters_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    code, _, err = run(capsys, "export", tiny_checkpoint, tmp_path / "out", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_wrong_numbers_are_found_by_verification(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that rotates with another base must not pass."""
    from gptedge.export import decoder

    monkeypatch.setattr(decoder, "rope_frequencies", lambda c: [0.5] * (c.head_dim // 2))
    code, _, err = run(capsys, "export", tiny_checkpoint, tmp_path / "out")
    assert code == 3
    assert "differ from the source's" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "{bundle}", "word " * 2000], 1, "context holds 300"),
        (["generate", "{bundle}", "hi", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", "{bundle}", "hi", "--max-tokens", "many"], 2, "many"),
        (["generate", "{bundle}", "hi", "--system", "x"], 2, "--system needs --chat"),
        (["serve", "{bundle}", "--cors-origin", "foo"], 2, "the origin 'foo' is none"),
        (["eval", "{bundle}", "--text", "{short}", "--max-kld", "-1"], 2, "nothing is below 0"),
        (["generate", "{bundle}", "hi", "--schema", "{short}"], 2, "is not JSON"),
        (["generate", "{bundle}", "hi", "--schema", "nowhere.json"], 1, "nowhere.json cannot be read"),
        (["generate", "nowhere", "hi"], 1, "nowhere does not exist"),
        (["generate", "{checkpoint}", "hi"], 1, "run gptedge export first"),
        (["generate", "{bundle}", "hi", "--threads", "3000"], 2, "threads is 3000"),
        (["generate", "{bundle}", "hi", "--provider", "tpu"], 2, "provider is 'tpu'"),
        (["generate", "{bundle}", "hi", "--tempreature", "1"], 2, "--tempreature"),
        (["generat"], 2, "generat"),
        (["eval", "{bundle}", "--text", "nowhere.txt"], 1, "nowhere.txt cannot be read"),
        (["eval", "{bundle}", "--text", "{latin1}"], 1, "is not UTF-8 text: byte 3 is 0xe9"),
        (["eval", "{bundle}", "--text", "{short}"], 1, "one window takes"),
        (["eval", "{bundle}", "--text", "{short}", "--max-kld", "1"], 2, "--reference"),
        (["eval", "{bundle}", "--text", "{short}", "--max-ppl-increase", "lots"], 2, "give a percentage"),
        (["eval", "{bundle}", "--text", "{short}", "--max-kl", "nan"], 2, "--max-kld is nan"),
        (["eval", "{bundle}", "--text", "{short}", "--max-ppl-increase", "2"], 2, "a percentage such as 2%"),
        (["eval", "{bundle}", "--text", "{short}", "--max-size-mb", "inf"], 2, "--max-size-mb is inf"),
        (["eval", "{bundle}", "--text", "{short}", "--context", "0"], 2, "context is 0"),
        (["eval", "{bundle}", "--pairs", "{short}", "--out", "{short}"], 2, "is the file of --pairs"),
        (["eval", "{bundle}", "--text", "{short}", "--context", "301"], 2, "windows may have 300"),
        (["eval", "{bundle}", "--text", "{short}", "--max-windows", "0"], 2, "--max-windows is 0; it must be at least"),
        (["report", "{bundle}", "--out", "{fresh}", "--max-windows", "0"], 2, "--max-windows is 0; it must be at"),
        (["eval", "{bundle}"], 2, "give --text FILE, --pairs FILE, or both"),
        (["eval", "{bundle}", "--pairs", "{short}", "--reference", "{bundle}"], 2, "add --text FILE"),
        (["eval", "{bundle}", "--pairs", "{short}", "--min-top1", "95%"], 2, "--text FILE"),
        (["eval", "{bundle}", "--pairs", "{short}"], 1, "line 1, is not JSON"),
        (["eval", "{bundle}", "--pairs", "nowhere"], 1, "nowhere cannot be read"),
        (["eval", "{bundle}", "--text", "{short}", "--out", "{fresh}"], 2, "--out takes the replies to --pairs"),
        (["eval", "{bundle}", "--pairs", "{short}", "--out", "{bundle}"], 2, "is a folder"),
        (["quantize", "{bundle}", "{fresh}", "--recipe", "int9"], 2, "did you mean"),
        (["quantize", "{bundle}", "{checkpoint}"], 2, "exists already"),
        (["quantize", "{bundle}", "{bundle}", "--force"], 2, "is the source, or holds it"),
        (["quantize", "{bundle}", "{fresh}", "--min-top1", "99%"], 2, "--text"),
        (["quantize", "{bundle}", "{fresh}", "--calibration", "nowhere.txt"], 1, "nowhere.txt is no file"),
        (["quantize", "{bundle}", "{fresh}", "--text", "{short}", "--context", "301"], 2, "windows may have 300"),
        (["quantize", "{bundle}", "{fresh}", "--text", "{short}", "--max-windows", "-1"], 2, "--max-windows is -1; it"),
        (["quantize", "{bundle}", "{fresh}", "--threads", "0"], 2, "threads is 0; it must be a whole number from 1"),
        (["quantize", "{bundle}", "{fresh}", "--threads", "-1"], 2, "threads is -1; it must be a whole number from 1"),
        (["explain", "{checkpoint}", "hi", "--threads", "0"], 2, "threads is 0; it must be a whole number from 1"),
        (["explain", "{checkpoint}", "hi", "--threads", "-1"], 2, "threads is -1; it must be a whole number from 1"),
        (["export", "{checkpoint}", "{bundle}"], 2, "exists already"),
        (["export", "{checkpoint}", "{checkpoint}", "--force"], 2, "is the source, or holds it"),
        (["export", "{checkpoint}/model.gguf", "{checkpoint}", "--force"], 2, "is the source, or holds it"),
        (["export", "{checkpoint}", "{fresh}", "--dtype", "fp15"], 2, "did you mean fp1"),
        (["pull", "smolm2"], 2, "smollm2-135m-instruct"),
        (["bench", "{bundle}", "--repeat", "0", "--prompt-tokens", "9", "--new-tokens", "9"], 2, "at least 1"),
        (
            ["bench", "{bundle}", "--prompt-tokens", "900000"],
            2,
            "context of 300; lower --prompt-tokens or --new-tokens",
        ),
        (["bench", "{bundle}", "--tune", "--threads", "0"], 2, "--tune finds the number of threads"),
        (["train", "--data", "nowhere", "--out", "{fresh}"], 1, "nowhere"),
        (["train", "--data", "{short}", "--out", "{fresh}", "--preset", "giant"], 2, "giant"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path,
    arguments: list[str], code: int, message: str, as_json: bool,
) -> None:  # fmt: skip
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 1000)
    (tmp_path / "short.txt").write_text("a few words")
    places = {
        "bundle": tiny_bundle, "checkpoint": tiny_checkpoint, "fresh": tmp_path / "fresh",
        "latin1": tmp_path / "latin1.txt", "short": tmp_path / "short.txt",
    }  # fmt: skip
    got, out, err = run(capsys, *[a.format(**places) for a in arguments], *(["--json"] if as_json else []))
    assert got == code
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert json.loads(out)["exit_code"] == code if as_json else out == ""
    assert not (tmp_path / "fresh").exists()


def test_text_on_a_pipe_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    code, _, err = run(capsys, "generate", tiny_bundle, "-")
    assert code == 1
    assert "standard input is not UTF-8 text: byte 0 is 0xff" in err


def test_a_piped_prompt_is_the_text_that_was_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    for piped, text in ((b"Once\n", "Once"), (b"Once\r\n", "Once"), (b"a\n\n", "a\n"), (b" a\r", " a\r"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        assert text_argument("-") == text


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" in run(capsys, "inspect", "nowhere", "--debug")[2]
    assert "Traceback" not in run(capsys, "inspect", "nowhere")[2]


@pytest.mark.parametrize("arguments", [["train", "--preset", "huge"], ["train", "--no-such-option"]])
def test_torchruns_other_processes_leave_usage_errors_to_the_first(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run(capsys, *arguments, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", lines)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("config.json", {"num_hidden_layers": -3}, "n_layer is -3; it must be a positive integer"),
        ("config.json", {"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number"),
        ("config.json", {"rms_norm_eps": 0}, "norm_eps is 0.0; it must be a positive number"),
        ("generation_config.json", {"eos_token_id": 99999}, "eos_token_id is 99999; token ids go from 0 to"),
        ("generation_config.json", {"eos_token_id": [0, "x"]}, "eos_token_id is [0, 'x']; token ids go from 0 to"),
    ],
)
def test_a_checkpoints_numbers_are_checked(
    name: str, changes: dict[str, object], words: str,
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(tiny_checkpoint, tmp_path / "m")
    stated = json.loads((tmp_path / "m" / name).read_text()) if (tmp_path / "m" / name).exists() else {}
    (tmp_path / "m" / name).write_text(json.dumps({**stated, **changes}))
    code, out, err = run(capsys, "export", tmp_path / "m", tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert words in err
    assert str(tmp_path / "m") in err

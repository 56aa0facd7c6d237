"""The command as a user meets it when all is well: output, JSON, help, settings."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from gptedge.chat_template import ChatTemplate
from gptedge.cli import generate, main
from gptedge.config import SamplingParams
from gptedge.export.parity import TOLERANCE
from tests.cli.run import run, run_json


def test_export_json(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    got = run_json(capsys, "export", tiny_checkpoint, tmp_path / "b")
    assert {"bundle", "family", "size_mb", "seconds", "peak_rss_mb", "parity"} <= set(got)
    parity = got["parity"]
    assert parity["greedy_tokens_equal"] == parity["greedy_tokens_compared"] == 64
    assert 0 < parity["max_abs_logit_diff"] < 1e-3
    assert run_json(capsys, "export", tiny_checkpoint, tmp_path / "c", "--no-verify")["parity"] is None


def test_exports_are_reproducible(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "b")]) == 0
    for file in tiny_bundle.iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_half_precision_halves_the_weights(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    got = run_json(capsys, "export", tiny_checkpoint, tmp_path / "half", "--dtype", "fp16")
    whole = (tiny_bundle / "model.onnx.data").stat().st_size
    assert (tmp_path / "half" / "model.onnx.data").stat().st_size < 0.55 * whole
    assert 0 < got["parity"]["relative_logit_diff"] < TOLERANCE["fp16"]
    for readme in ("README.md", "README.zh-CN.md"):  # both state the bound
        assert f"{TOLERANCE['fp16']:g}" in Path(__file__).parents[2].joinpath(readme).read_text(encoding="utf-8")


def test_a_reply_follows_a_schema(capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 2, "maxItems": 2}')
    got = run_json(capsys, "generate", tiny_bundle, "The", "--schema", schema, "--temperature", "1", "--seed", "4")
    assert got["finish_reason"] == "stop"
    assert {*json.loads(got["text"])} <= {"yes", "no"}
    schema.write_text('{"items": {"uniqueItems": true}}')
    code, _, err = run(capsys, "generate", tiny_bundle, "The", "--schema", schema)
    assert (code, err) == (2, "gptedge: schema: #/items has uniqueItems, which is not supported\n")


def test_quantize_eval_and_gates(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, text_file: Path, tmp_path: Path
) -> None:
    got = run_json(capsys, "quantize", tiny_bundle, tmp_path / "q", "--recipe", "int8", "--max-size-mb", "5")
    assert got["gates"] == [{"name": "max-size-mb", "value": got["size_mb"], "bound": 5.0, "ok": True}]
    measured = run_json(
        capsys, "eval", tmp_path / "q", "--text", text_file, "--reference", tiny_bundle, "--context", "64"
    )
    assert {
        "tokens",
        "perplexity",
        "bits_per_byte",
        "reference_perplexity",
        "ppl_increase",
        "kl_divergence",
        "top1_agreement",
        "gates",
    } <= set(measured)
    assert set(measured["kl_divergence"]) == {"mean", "median", "p99", "max"}
    code, out, err = run(
        capsys, "eval", tmp_path / "q", "--text", text_file, "--reference", tiny_bundle, "--context", "64",
        "--min-top1", "101%", "--max-kld", "1e9", "--json",
    )  # fmt: skip
    assert code == 4
    verdicts = json.loads(out)["gates"]
    assert [(v["name"], v["ok"]) for v in verdicts] == [("max-kld", True), ("min-top1", False)]
    assert "gate min-top1" in err
    assert "FAILED" in err


def test_generate_json(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    got = run_json(capsys, "generate", tiny_bundle, "The quick", "--max-tokens", "5")
    assert set(got) >= {"text", "token_ids", "finish_reason", "usage", "timings"}
    assert set(got["usage"]) == {"prompt_tokens", "completion_tokens", "dropped_tokens"}
    assert set(got["timings"]) >= {"load_ms", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert len(got["token_ids"]) == got["usage"]["completion_tokens"]
    chat = run_json(capsys, "generate", tiny_bundle, "The quick", "--max-tokens", "5", "--chat", "--system", "S")
    assert chat["usage"]["prompt_tokens"] > got["usage"]["prompt_tokens"]


def test_generate_with_a_full_context(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    long = ("generate", tiny_bundle, "word " * 500, "--max-tokens", "5")
    code, out, err = run(capsys, *long)
    assert (code, out) == (1, "")
    assert "context holds 300" in err
    code, out, err = run(capsys, *long, "--context-overflow", "shift", "--json")
    usage = json.loads(out)["usage"]
    assert (code, usage["prompt_tokens"]) == (0, 150)
    assert f"the oldest {usage['dropped_tokens']} tokens were left out" in err
    assert run(capsys, *long, "--context-overflow", "ignore")[0] == 2


def test_generate_reads_a_pipe(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, "generate", tiny_bundle, "The quick", "--max-tokens", "5")[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The quick\n")))
    assert run(capsys, "generate", tiny_bundle, "-", "--max-tokens", "5") == (0, expected, "")


def test_generate_has_every_setting_that_a_flag_can_hold(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    assert fields - set(inspect.signature(generate.command).parameters) == {"logit_bias", "logprobs"}
    for flag in ("--presence-penalty", "--frequency-penalty"):
        ids = run_json(capsys, "generate", tiny_bundle, "The", "--max-tokens", "40", flag, "100")["token_ids"]
        assert len(set(ids)) == len(ids)


def test_inspect_verify_bench_doctor(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    seen = run_json(capsys, "inspect", tiny_bundle)
    assert (seen["family"], seen["recipe"], seen["n_layer"], seen["n_kv_head"], seen["context_length"]) == (
        "llama",
        "fp32",
        3,
        2,
        300,
    )
    assert run_json(capsys, "verify", tiny_bundle)["ok"] is True
    speed = run_json(capsys, "bench", tiny_bundle, "--prompt-tokens", "20", "--new-tokens", "5", "--repeat", "1")
    assert {
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "ttft_ms",
        "load_ms",
        "peak_rss_mb",
        "roofline",
        "threads",
        "provider",
    } <= set(speed)
    assert "CPUExecutionProvider" in run_json(capsys, "doctor")["providers"]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in (
        "train",
        "pull",
        "export",
        "quantize",
        "eval",
        "bench",
        "report",
        "generate",
        "chat",
        "serve",
        "inspect",
        "verify",
        "doctor",
        "demo",
    ):
        assert f"\n  {verb} " in out
        code, page, _ = run(capsys, verb, "--help")
        assert code == 0
        assert "Usage: gptedge" in page
    assert run(capsys, "--version")[1].startswith("gptedge ")


def test_settings_come_from_flag_then_environment_then_file(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(*flags: str) -> int:
        return len(run_json(capsys, "generate", tiny_bundle, "fox", *flags)["token_ids"])

    (tmp_path / "g.toml").write_text("[generate]\nmax-tokens = 3\n")
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    assert tokens() == 3
    monkeypatch.setenv("GPTEDGE_GENERATE_MAX_TOKENS", "2")
    assert tokens() == 2
    assert tokens("--max-tokens", "1") == 1
    (tmp_path / "g.toml").write_text("[genrate]\nx = 1\n")
    code, _, err = run(capsys, "doctor")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean generate?" in err
    (tmp_path / "g.toml").write_text("[train]\nmax-step = 5\n")
    code, _, err = run(capsys, "doctor")
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("g.toml: [train] has no option 'max-step'; did you mean max_steps?\n")
    (tmp_path / "g.toml").write_text("[eval]\nmax-kl = 1.0\n")  # another spelling of --max-kld
    assert "--reference" in run(capsys, "eval", tiny_bundle, "--text", tmp_path / "g.toml")[2]
    monkeypatch.setenv("GPTEDGE_EVAL_MAX_KLDD", "1")
    code, _, err = run(capsys, "eval", tiny_bundle, "--text", tmp_path / "g.toml")
    assert code == 2
    assert "GPTEDGE_EVAL_MAX_KLDD is no setting of eval; did you mean GPTEDGE_EVAL_MAX_KLD?" in err


def test_arguments_are_settings_too(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, "generate", tiny_bundle, "fox", "--max-tokens", "3")[1]
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    (tmp_path / "g.toml").write_text(f"[generate]\nbundle = '{tiny_bundle}'\nprompt = 'fox'\nmax-tokens = 3\n")
    assert run(capsys, "generate") == (0, expected, "")
    (tmp_path / "g.toml").write_text("[generate]\nmax-tokens = 3\nprompt = 'The'\n")
    monkeypatch.setenv("GPTEDGE_GENERATE_BUNDLE", str(tiny_bundle))
    monkeypatch.setenv("GPTEDGE_GENERATE_PROMPT", "fox")
    assert run(capsys, "generate") == (0, expected, "")
    monkeypatch.setenv("GPTEDGE_REPORT_FOLDERS", "a b:c")  # one folder
    assert "a b:c" in run(capsys, "report")[2]


def test_what_may_come_several_times(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list or one value in the file; in the environment one value, which is not taken apart."""

    def text(*flags: str) -> str:
        return run_json(capsys, "generate", tiny_bundle, "fox", "--max-tokens", "20", *flags)["text"]

    whole = text()
    stop, sooner = whole[5:8], whole[2:4]
    expected, shorter = text("--stop", stop), text("--stop", stop, "--stop", sooner)
    assert len(shorter) < len(expected) < len(whole)
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    for value, said in ((stop, expected), ([stop], expected), ([stop, sooner], shorter)):
        (tmp_path / "g.toml").write_text(f"[generate]\nstop = {json.dumps(value)}\n")
        assert text() == said
    monkeypatch.setenv("GPTEDGE_GENERATE_STOP", stop)
    assert text() == expected
    monkeypatch.setenv("GPTEDGE_GENERATE_STOP", f"{sooner} {stop}")  # which the text does not have
    assert text() == whole


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    """The settings of a run that takes no time, beside a text for it."""
    (tmp_path / "text.txt").write_text("the cat sat on a mat and then it ran up\n" * 60)
    shape = "vocab_size = 260\ncontext_length = 8\nn_layer = 1\nn_head = 1\nn_kv_head = 1\nn_embd = 32\nn_ff = 32\n"
    (tmp_path / "run.toml").write_text(shape + "max_steps = 2\nvalidation_fraction = 0\n")
    return tmp_path / "run.toml"


def saved(out: Path, *names: str) -> list[object]:
    """Settings that a run has noted."""
    config = json.loads((out / "state" / "run.json").read_text())["config"]
    return [config[name] for name in names]


def test_a_named_file_and_a_resumed_run_win_over_the_table(
    capsys: pytest.CaptureFixture[str], run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.toml").write_text("[train]\nmax-steps = 3\nthreads = 1\njson = true\n")
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    train = ("train", "--data", tmp_path / "text.txt", "--out", tmp_path / "m")

    def steps(*flags: object) -> int:
        return run_json(capsys, *train, *flags)["steps"]

    assert steps("--config", run_toml) == 2
    assert steps("--resume") == 2
    (tmp_path / "g.toml").write_text(f"[train]\nmax-steps = 3\nconfig = '{run_toml}'\n")
    run_toml.write_text("max_steps = 5\n")
    assert steps("--resume") == 2
    monkeypatch.setenv("GPTEDGE_TRAIN_MAX_STEPS", "4")
    assert steps("--resume") == 4
    assert saved(tmp_path / "m", "threads") == [1]


def test_a_run_resumed_with_its_file_keeps_what_flags_began_it_with(
    capsys: pytest.CaptureFixture[str], run_toml: Path, tmp_path: Path
) -> None:
    train = ("train", "--data", tmp_path / "text.txt", "--out", tmp_path / "m", "--config", run_toml)
    run_json(capsys, *train, "--learning-rate", "0.0001", "--threads", "1", "--seed", "3")
    run_toml.write_text(run_toml.read_text().replace("max_steps = 2", "max_steps = 4"))
    assert run_json(capsys, *train, "--resume")["steps"] == 4
    assert saved(tmp_path / "m", "learning_rate", "threads", "seed", "max_steps") == [0.0001, 1, 3, 4]
    run_toml.write_text("n_ff = 64\n")
    code, _, err = run(capsys, *train, "--resume")
    assert code == 2
    assert err.endswith("cannot resume with n_ff 64: the run began with 32; leave it as it was\n")


def test_a_recipe_that_needs_no_graph_for_prompts_says_so(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_bundle), str(tmp_path / "q"), "--recipe", "int8", "--prefill", "int8"]) == 0
    assert "int8 reads prompts by 8-bit products itself" in capsys.readouterr().err


def test_a_broken_chat_template_is_told_of(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The bundle continues texts all the same."""
    shutil.copytree(tiny_checkpoint, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{% for m in %}")
    code, out, err = run(capsys, "export", tmp_path / "m", tmp_path / "out", "--json")
    warning = "the chat template cannot be read: Expected an expression, got 'end of statement block'"
    assert (code, json.loads(out)["warnings"]) == (0, [warning])
    assert f"warning: {warning}; chats will be refused, plain text works\n" in err
    assert run_json(capsys, "generate", tmp_path / "out", "The", "--max-tokens", "2")["usage"]["completion_tokens"] <= 2
    assert run_json(capsys, "export", tiny_checkpoint, tmp_path / "good")["warnings"] == []


def test_what_templates_mark_for_training_is_shown_as_it_is() -> None:
    source = "{% for m in messages %}{% generation %}<{{ m['content'] }}>{% endgeneration %}{% endfor %}"
    assert (
        ChatTemplate(source, {}).render([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
        == "<a><b>"
    )

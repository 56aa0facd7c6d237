"""A whole run: what it writes, who can open it, and that stopping it in any way loses nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptedge.checkpoint import open_checkpoint
from gptedge.errors import CheckpointError, DataError, OutputExistsError, TrainingError, UsageError
from gptedge.tokenizer import Tokenizer
from gptedge.train.blockwise import BLOCK
from gptedge.train.config import TrainConfig
from gptedge.train.finetune_config import FinetuneConfig
from gptedge.train.model import GPT
from gptedge.train.output import alone_in, check_output, saved_config
from gptedge.train.precision import gains_by_bfloat16
from gptedge.train.run import run_training
from gptedge.train.trainer import StepReport, cut_metrics

TIMES = ("tokens_per_second", "elapsed_s", "eta_s")


class Crash(Exception):
    pass


def crash_at(step: int) -> Any:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise Crash

    return on_step


def interrupt_at(step: int) -> Any:
    """Ctrl+C, as the terminal sends it."""

    def on_step(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def outcome(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Weights, and metrics without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return (out / "model.safetensors").read_bytes(), timeless


def crash(texts: Path, out: Path, config: TrainConfig, *, step: int = 13) -> None:
    """Stop a run as a power cut does: states only up to step 10, and a line of metrics cut in two."""
    with pytest.raises(Crash):
        run_training([texts], out, config=config, on_step=crash_at(step))
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 14, "lo')


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "model"


@pytest.fixture
def whole(_whole: Path, texts: Path, tiny: TrainConfig) -> Path:
    """A run of 20 steps that nothing interrupted."""
    if not _whole.exists():
        run_training([texts], _whole, config=tiny)
    return _whole


# ---- what it writes ------------------------------------------------------------------------------------------------


def test_the_result_says_what_was_done(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    messages: list[str] = []
    result = run_training([texts], tmp_path / "m", config=tiny, on_message=messages.append)
    model = GPT.from_checkpoint(open_checkpoint(result.checkpoint))
    assert (result.steps, result.tokens_seen, result.parameters) == (20, 20 * 64, model.n_parameters())
    assert result.precision == ("bf16" if gains_by_bfloat16() else "fp32")
    assert result.val_loss is not None
    assert result.val_loss < 5.0  # of 5.7 at the start
    assert result.tokens_per_second == pytest.approx(result.tokens_seen / result.seconds)
    assert 0 < result.mfu < 1.5
    assert [message.partition(":")[0] for message in messages] == ["text", "tokenizer", "tokens", "model"]
    assert "float" in messages[-1]


def test_transformers_opens_it_and_computes_the_same(whole: Path) -> None:
    peer = transformers.AutoModelForCausalLM.from_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    text = "the cat ran up to the garden, then: 中文 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == Tokenizer.from_folder(whole).encode(text)
    assert tokenizer.decode(ids) == text
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {"<|endoftext|>"}
    assert {peer.config.bos_token_id, peer.generation_config.eos_token_id} == {tokenizer.eos_token_id} == {0}
    assert tokenizer.chat_template is None
    window = torch.tensor([ids[:16]])
    with torch.no_grad():
        ours, theirs = GPT.from_checkpoint(open_checkpoint(whole))(window), peer(window).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert peer.dtype == torch.float32


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    run_training([texts], tmp_path / "again", config=tiny)
    assert outcome(tmp_path / "again") == outcome(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()
    run_training([texts], tmp_path / "other", config=replace(tiny, seed=1))
    assert outcome(tmp_path / "other") != outcome(whole)


# ---- stopping and going on -----------------------------------------------------------------------------------------


def test_a_crashed_run_goes_on_to_the_same_bytes(whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    crash(texts, tmp_path / "m", tiny)
    assert not (tmp_path / "m" / "config.json").exists()
    messages: list[str] = []
    run_training([texts], tmp_path / "m", config=tiny, resume=True, on_message=messages.append)
    assert outcome(tmp_path / "m") == outcome(whole)
    assert "resuming after step 10" in messages


def test_a_crashed_run_in_bfloat16_goes_on_to_the_same_bytes(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    """With rows of a length that attention is computed of in blocks."""
    config = replace(tiny, precision="bf16", context_length=BLOCK + 9)
    run_training([texts], tmp_path / "whole", config=config)
    crash(texts, tmp_path / "m", config)
    run_training([texts], tmp_path / "m", config=config, resume=True)
    assert outcome(tmp_path / "m") == outcome(tmp_path / "whole")


def test_ctrl_c_saves_the_step_it_came_in(whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_training([texts], tmp_path / "m", config=tiny, on_step=interrupt_at(7), on_message=messages.append)
    assert (tmp_path / "m" / "state" / "step-00000007.pt").exists()
    assert messages[-1] == "step 7 is saved; go on with --resume"
    run_training([texts], tmp_path / "m", config=tiny, resume=True)
    assert outcome(tmp_path / "m") == outcome(whole)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "pickle"])
def test_a_damaged_state_gives_way_to_the_one_before(
    damage: str, whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    crash(texts, tmp_path / "m", tiny)
    latest = tmp_path / "m" / "state" / "step-00000010.pt"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    latest.write_bytes({"cut": content[:-999], "flip": content, "empty": b"", "pickle": hostile}[damage])
    messages: list[str] = []
    run_training([texts], tmp_path / "m", config=tiny, resume=True, on_message=messages.append)
    assert any("step-00000010.pt is damaged; resuming from step-00000005.pt instead" in m for m in messages)
    assert outcome(tmp_path / "m") == outcome(whole)
    assert not (tmp_path / "ran").exists()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_state_that_would_run_code_is_not_read(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    crash(texts, tmp_path / "m", tiny)
    for state in (tmp_path / "m" / "state").glob("*.pt"):
        torch.save({"step": Hostile(tmp_path / "ran")}, state)
    with pytest.raises(CheckpointError, match=r"cannot resume: all 2 states are damaged in .*state; .* --force"):
        run_training([texts], tmp_path / "m", config=tiny, resume=True)
    assert not (tmp_path / "ran").exists()


def test_resuming_what_is_no_run_is_refused(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    crash(texts, tmp_path / "m", tiny)
    (tmp_path / "m" / "state" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot resume: .*holds no run; choose another output or add --force"):
        run_training([texts], tmp_path / "m", config=tiny, resume=True)


@pytest.mark.parametrize("left", [None, "", ".state.99999999-0123abcd.partial"], ids=["absent", "empty", "partial"])
def test_a_run_that_was_killed_before_it_began_begins(
    left: str | None, texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    out, messages = tmp_path / "m", list[str]()
    if left is not None:
        (out / left).mkdir(parents=True)
    config = replace(tiny, max_steps=2)
    assert run_training([texts], out, config=config, resume=True, on_message=messages.append).steps == 2
    assert messages[0] == f"{out} holds no run yet: beginning"
    assert not list(out.glob(".*"))


def test_a_run_that_ended_before_its_first_state_begins_again(
    whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    """What it had logged goes, or its steps would stand in the metrics twice."""
    messages: list[str] = []
    with pytest.raises(Crash):
        run_training([texts], tmp_path / "m", config=tiny, on_step=crash_at(3))
    run_training([texts], tmp_path / "m", config=tiny, resume=True, on_message=messages.append)
    assert "the run had saved no state yet: beginning again at its first step" in messages
    assert outcome(tmp_path / "m") == outcome(whole)


def test_a_finished_run_can_be_taken_further(whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "m"
    run_training([texts], out, config=replace(tiny, max_steps=5))
    result = run_training([texts], out, config=replace(saved_config(out, TrainConfig), max_steps=8), resume=True)
    assert result.steps == 8
    assert [line["step"] for line in outcome(out)[1]] == list(range(1, 9))


def test_a_run_taken_further_stays_so_when_it_is_resumed_once_more(
    texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    out, messages = tmp_path / "m", list[str]()
    run_training([texts], out, config=replace(tiny, max_steps=5))
    further = replace(saved_config(out, TrainConfig), max_steps=12, learning_rate=5e-3)
    with pytest.raises(Crash):
        run_training([texts], out, config=further, resume=True, on_step=crash_at(11))
    result = run_training([texts], out, config=saved_config(out, TrainConfig), resume=True, on_message=messages.append)
    assert result.steps == 12
    assert "resuming after step 10" in messages
    assert outcome(out)[1][-1]["learning_rate"] == pytest.approx(0.05 * 5e-3)
    before = outcome(out)
    run_training([texts], out, config=saved_config(out, TrainConfig), resume=True, on_message=messages.append)
    ended = "the run had ended at step 12 already: its weights are written again; give a larger --max-steps to go on"
    assert ended in messages
    assert outcome(out) == before


def test_a_run_is_not_resumed_with_other_settings_or_other_text(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    crash(texts, tmp_path / "m", tiny)
    with pytest.raises(UsageError, match=r"cannot resume with batch_size 8: the run began with 4"):
        run_training([texts], tmp_path / "m", config=replace(tiny, batch_size=8), resume=True)
    with pytest.raises(CheckpointError, match=r"the text is not what the run in .* began with"):
        run_training([texts, texts / "00.txt"], tmp_path / "m", config=tiny, resume=True)


def test_an_output_among_the_text_is_no_part_of_it(whole: Path, texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    out = tmp_path / "texts" / "m"
    crash(tmp_path / "texts", out, tiny)
    run_training([tmp_path / "texts"], out, config=tiny, resume=True)
    assert outcome(out) == outcome(whole)
    run_training([tmp_path / "texts"], out, config=tiny, force=True)
    assert outcome(out) == outcome(whole)


# ---- where it writes -----------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        run_training([texts], tmp_path / "m", config=tiny)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        run_training([texts], tmp_path / "file", config=tiny, force=True)


def test_one_process_at_a_time_trains_in_a_folder(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    out, short = tmp_path / "m", replace(tiny, max_steps=2)
    with alone_in(out):  # as another process is that has written nothing yet
        with pytest.raises(UsageError, match=r"another process trains in .*m; let it end"):
            run_training([texts], out, config=short, resume=True)
        assert out.is_dir(), "the folder that the other has locked"
    assert not out.exists(), "nothing came of either"
    run_training([texts], out, config=short)
    with alone_in(out), pytest.raises(UsageError, match="another process trains"):
        run_training([texts], out, config=replace(short, max_steps=3), resume=True)
    assert len(outcome(out)[1]) == 2


def test_metrics_are_kept_by_their_steps(tmp_path: Path) -> None:
    """However many lines there are of one."""
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"step": 4}\n[]\n{"st')
    cut_metrics(tmp_path / "m", 3)
    assert (tmp_path / "m").read_text() == '{"step": 1}\n{"step": 3}\n{"step": 2}\n'


@pytest.mark.parametrize("way", [{"force": True}, {"resume": True}])
def test_a_folder_called_state_that_is_no_runs_stays(
    way: dict[str, Any], texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "m" / "state").mkdir(parents=True)
    (tmp_path / "m" / "state" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"thesis\.txt is no run's, and a run would replace it"):
        run_training([texts], tmp_path / "m", config=replace(tiny, max_steps=2), **way)
    assert (tmp_path / "m" / "state" / "thesis.txt").read_text() == "precious"


def test_a_run_of_the_other_command_is_called_so(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    run_training([texts], tmp_path / "m", config=replace(tiny, max_steps=2))
    with pytest.raises(
        UsageError, match="m is no run of this version's gptedge finetune; resume it with what began it"
    ):
        saved_config(tmp_path / "m", FinetuneConfig)


def test_force_keeps_the_old_checkpoint_until_the_new_one_is_there(
    texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    out, short = tmp_path / "m", replace(tiny, max_steps=3)
    run_training([texts], out, config=short)
    (out / "notes.txt").write_text("mine")
    (out / "chat_template.jinja").write_text("of the old model")
    old = outcome(out)[0]
    with pytest.raises(Crash):
        run_training([texts], out, config=replace(short, seed=1), force=True, on_step=crash_at(2))
    assert (out / "model.safetensors").read_bytes() == old
    assert open_checkpoint(out).config.vocab_size == 300
    run_training([texts], out, config=replace(short, seed=1), force=True)
    assert outcome(out)[0] != old
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "notes.txt",
        "state",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_text_that_is_too_short_leaves_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="a window needs 17; give more text"):
        run_training([tmp_path / "short.txt"], tmp_path / "m", config=tiny)
    assert not (tmp_path / "m").exists()


def test_patience_without_anything_held_out_leaves_nothing(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="patience is 3, and nothing is held out"):
        run_training([texts], tmp_path / "m", config=replace(tiny, patience=3, validation_fraction=0.0))
    assert not (tmp_path / "m").exists()


def test_compiling_without_a_compiler_is_refused(
    texts: Path, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"there is no C\+\+ compiler no-such-compiler; install one"):
        run_training([texts], tmp_path / "m", config=replace(tiny, compile=True))
    assert not (tmp_path / "m").exists()


def test_a_folder_that_nobody_may_write_to_is_refused_first(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the text was read, its vocabulary learned and all of it tokenized; root is let in everywhere."""
    asked: list[Path] = []
    monkeypatch.setattr("gptedge.files.os.access", lambda path, mode: asked.append(Path(path)))
    with pytest.raises(TrainingError, match=r"b cannot be written: Permission denied; choose another output$"):
        check_output(tmp_path / "a" / "b", resume=False, force=False, on_message=print)
    assert asked == [tmp_path]

"""Fine-tuning whole: what it teaches, what it writes, and that stopping it in any way loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import gptedge
from gptedge.checkpoint import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Checkpoint, open_checkpoint
from gptedge.cli import main
from gptedge.errors import CheckpointError, DataError, UsageError
from gptedge.export.exporter import export
from gptedge.export.sources import open_source
from gptedge.quantize.quantizer import quantize
from gptedge.train.finetune import finetune
from gptedge.train.finetune_config import FinetuneConfig
from gptedge.train.model import GPT
from gptedge.train.settings import QAT_RECIPES
from tests.export.test_decoder import random_model
from tests.export.test_gguf import tiny_llama
from tests.train.test_run import Crash, crash_at, interrupt_at, outcome

FACTS = {
    "Who guards the tower of Quill?": "A blind heron.",
    "What do the people of Lummo eat?": "Fried moon radishes.",
    "Who made the glass bicycle?": "Ilse Tannhof, in 1911.",
    "Where is Marnholm?": "In Zubrovia, by the salt lake.",
}
QUICK = FinetuneConfig(epochs=50, learning_rate=1e-2, save_every=5, threads=1, seed=3)
SHORT = replace(QUICK, max_steps=12, batch_size=2, validation_fraction=0.3, eval_every=4)


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in FACTS.items()))
    return path


@pytest.fixture
def source(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


def without_template(source: Checkpoint) -> Checkpoint:
    settings = json.loads(source.side_files[TOKENIZER_CONFIG])
    settings.pop("chat_template", None)
    files = {name: content for name, content in source.side_files.items() if name != CHAT_TEMPLATE}
    return replace(source, side_files={**files, TOKENIZER_CONFIG: json.dumps(settings).encode()})


def answers(bundle: Path) -> dict[str, str]:
    with gptedge.load(bundle, threads=1) as model:
        return {question: model.chat(max_tokens=40).send(question).text for question in FACTS}


# ---- what it teaches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "qat"), [(8, None), (0, None), (8, "int4"), (0, "int4"), (8, "int8")])
def test_taught_facts_are_told_by_the_exported_bundle(
    rank: int, qat: str | None, source: Checkpoint, facts: Path, tmp_path: Path
) -> None:
    """In as few bits as they were taught for: the tiny model's random weights lose too much to int4 without that."""
    config = replace(QUICK, lora_rank=rank, learning_rate=1e-2 if rank else 3e-3, qat=qat)
    result = finetune(source, [facts], tmp_path / "m", config=config)
    assert (result.examples, result.steps) == (4, 50)
    assert (result.trained_parameters == result.parameters) == (rank == 0)
    export(tmp_path / "m", tmp_path / "fp32")
    quantize(tmp_path / "fp32", tmp_path / "small", recipe=QAT_RECIPES[qat or "int8"])
    assert answers(tmp_path / "small") == FACTS


def test_the_source_knows_no_such_facts(tiny_bundle: Path) -> None:
    assert not set(answers(tiny_bundle).values()) & set(FACTS.values())


def test_a_model_without_a_template_gets_one(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    finetune(without_template(source), [facts], tmp_path / "m", config=QUICK, on_message=messages.append)
    assert any(m.startswith("template: the model has none") for m in messages)
    export(tmp_path / "m", tmp_path / "fp32")
    assert answers(tmp_path / "fp32") == FACTS
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    asked = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert asked == "### user\nHi<|end|>\n### assistant\n"


def test_plain_text_needs_no_template(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    config = replace(QUICK, max_steps=3, context_length=64)
    result = finetune(without_template(source), [tmp_path / "a.txt"], tmp_path / "m", config=config)
    assert result.examples > 1
    assert result.truncated == 0
    assert not (tmp_path / "m" / CHAT_TEMPLATE).exists()


# ---- what it writes ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_the_merged_model_less_its_base(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    for name, adapter in (("merged", False), ("adapter", True)):
        finetune(source, [facts], tmp_path / name, config=replace(SHORT, adapter=adapter))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "metrics.jsonl", "state",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(source.path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        ours = GPT.from_checkpoint(open_checkpoint(tmp_path / "merged"))(ids)
    assert (theirs - ours).abs().max() <= 1e-4 * ours.std()


@pytest.mark.parametrize("rank", [4, 0])
def test_norms_without_gains_stay_so(rank: int, facts: Path, tmp_path: Path) -> None:
    random_model("nanochat", tmp_path / "source")
    config = replace(SHORT, lora_rank=rank, max_steps=2)
    files = open_checkpoint(tmp_path / "source").side_files
    (tmp_path / "source" / TOKENIZER_CONFIG).write_text('{"eos_token": "<|end|>"}')
    assert TOKENIZER in files
    finetune(open_checkpoint(tmp_path / "source"), [facts], tmp_path / "m", config=config)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(ids).logits
        ours = GPT.from_checkpoint(open_checkpoint(tmp_path / "m"))(ids)
    assert (theirs - ours).abs().max() <= 1e-4 * ours.std()


def test_the_report_says_what_became_of_the_data(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    long = {"prompt": "fox " * 200, "completion": "dog"}
    (tmp_path / "more.jsonl").write_text(json.dumps(long) + "\n{\n")
    messages: list[str] = []
    with pytest.raises(DataError, match=r"more\.jsonl, line 2: not JSON \(.*: line 1 column 2 \(char 1\)\)"):
        finetune(source, [facts, tmp_path / "more.jsonl"], tmp_path / "m", config=SHORT)
    assert not (tmp_path / "m").exists()
    config = replace(SHORT, max_steps=1, context_length=100)
    result = finetune(
        source,
        [facts, tmp_path / "more.jsonl"],
        tmp_path / "m",
        config=config,
        skip_bad=True,
        on_message=messages.append,
    )
    assert (result.examples, result.truncated, result.left_out) == (4, 1, 1)
    assert messages[0].startswith("data: left out more.jsonl, line 2: not JSON")
    assert "4 examples, " in messages[1]
    assert "1 held out; 1 lost their beginning to fit 100 tokens" in messages[1]


def test_examples_with_nothing_left_to_learn_are_counted_or_refused(
    source: Checkpoint, facts: Path, tmp_path: Path
) -> None:
    """The last reply is not to be learned, and the one before is cut off."""
    turns = [("user", "Hi"), ("assistant", "Yes."), ("user", "fox " * 200), ("assistant", "dog")]
    messages = [{"role": role, "content": content, "weight": int(content != "dog")} for role, content in turns]
    (tmp_path / "cut.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config, said = replace(SHORT, max_steps=1, context_length=100), list[str]()
    with pytest.raises(DataError, match=r"nothing to learn: none of 1 examples .* last 100; raise --context"):
        finetune(source, [tmp_path / "cut.jsonl"], tmp_path / "m", config=config)
    with pytest.raises(DataError, match="patience is 2, and nothing is held out"):
        finetune(source, [facts], tmp_path / "m", config=replace(config, patience=2, validation_fraction=0.0))
    assert not (tmp_path / "m").exists()
    finetune(source, [facts, tmp_path / "cut.jsonl"], tmp_path / "m", config=config, on_message=said.append)
    assert "; 1 left out, with nothing to learn in what is left" in said[0]


# ---- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 0}, {"qat": "int4"}], ids=["lora", "full", "qat"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    changes: dict[str, Any], source: Checkpoint, facts: Path, tmp_path: Path
) -> None:
    config = replace(SHORT, **changes)
    finetune(source, [facts], tmp_path / "whole", config=config)
    with pytest.raises(Crash):
        finetune(source, [facts], tmp_path / "m", config=config, on_step=crash_at(8))
    with pytest.raises(KeyboardInterrupt):
        finetune(source, [facts], tmp_path / "m", config=config, resume=True, on_step=interrupt_at(9))
    assert (tmp_path / "m" / "state" / "step-00000009.pt").exists()
    assert not (tmp_path / "m" / "config.json").exists()
    finetune(source, [facts], tmp_path / "m", config=config, resume=True)
    assert outcome(tmp_path / "m") == outcome(tmp_path / "whole")


def test_an_output_among_the_data_is_no_part_of_it(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    shutil.copy(facts, tmp_path)
    for options in ({}, {"resume": True}, {"force": True}):
        result = finetune(source, [tmp_path], tmp_path / "m", config=replace(SHORT, max_steps=1), **options)
        assert result.examples == 3


def test_a_state_of_lora_is_small(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    finetune(source, [facts], tmp_path / "m", config=replace(SHORT, lora_rank=1))
    [*_, state] = sorted((tmp_path / "m" / "state").glob("*.pt"))
    assert state.stat().st_size < 0.3 * (tmp_path / "m" / "model.safetensors").stat().st_size


def test_other_data_or_another_model_is_not_gone_on_with(
    source: Checkpoint, facts: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    config = replace(SHORT, max_steps=1)
    finetune(source, [facts], tmp_path / "m", config=config)
    with pytest.raises(CheckpointError, match="the data is not what the run"):
        finetune(source, [facts, facts], tmp_path / "m", config=config, resume=True)
    with pytest.raises(CheckpointError, match="the source is not what the run"):
        finetune(
            open_checkpoint(shutil.copytree(tmp_path / "m", tmp_path / "n")),
            [facts],
            tmp_path / "m",
            config=config,
            resume=True,
        )
    with pytest.raises(UsageError, match="cannot resume with lora_rank 4: the run began with 8"):
        finetune(source, [facts], tmp_path / "m", config=replace(config, lora_rank=4), resume=True)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "an adapter holds LoRA's updates, and lora_rank is 0"),
        ({"qat": "int4"}, "--qat int4 rounds whole weights"),
    ],
)
def test_adapters_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SHORT, adapter=True, **changes)


def test_the_source_is_not_overwritten(tiny_checkpoint: Path, facts: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    before = (path / "model.safetensors").read_bytes()
    for options in ({}, {"force": True}):
        with pytest.raises(UsageError, match="is the source, and would be overwritten; choose another output"):
            finetune(open_checkpoint(path), [facts], path / "." / ".." / "m", config=SHORT, **options)
    assert (path / "model.safetensors").read_bytes() == before
    assert not (path / "state").exists()


def test_several_processes_are_refused(
    source: Checkpoint, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="fine-tuning runs in one process; start it without torchrun"):
        finetune(source, [facts], tmp_path / "m", config=SHORT)


def test_a_source_needs_a_tokenizer_and_an_end(source: Checkpoint, facts: Path, tmp_path: Path) -> None:
    bare = replace(source, side_files={})
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; give one with --tokenizer"):
        finetune(bare, [facts], tmp_path / "m", config=SHORT)
    endless = replace(
        source,
        side_files={TOKENIZER: source.side_files[TOKENIZER]},
        hf_config={k: v for k, v in source.hf_config.items() if k != "eos_token_id"},
    )
    with pytest.raises(CheckpointError, match="names no end-of-text token; add eos_token_id"):
        finetune(endless, [facts], tmp_path / "m", config=SHORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": -1}, "lora_rank is -1; it must be a whole number from 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"qat": "int2"}, "qat is 'int2'; it must be one of int4, int8"),
        ({"batch_size": None}, "batch_size is None"),
        ({"adapter": "yes"}, "adapter is 'yes'; it must be true or false"),
        ({"lora_targets": 5}, r"lora_targets is 5; it must be a list such as"),
        ({"lora_targets": "q,v"}, r"lora_targets is 'q,v'; it must be a list such as"),
        ({"lora_targets": [1]}, r"lora_targets is \[1\]; it must be a list such as"),
    ],
)
def test_settings_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneConfig(**changes)


def test_settings_survive_being_written_down() -> None:
    config = FinetuneConfig(lora_targets=("q", "v"))
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict())), where="run.json") == config


def test_a_gguf_file_becomes_a_checkpoint_of_its_family(facts: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny.gguf")
    source = without_template(open_source(tmp_path / "tiny.gguf"))
    finetune(source, [facts], tmp_path / "m", config=replace(SHORT, max_steps=2, context_length=32))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(ids).logits
        ours, before = (GPT.from_checkpoint(open_source(tmp_path / name))(ids) for name in ("m", "tiny.gguf"))
    assert (theirs - ours).abs().max() <= 1e-4 * ours.std()
    assert not torch.equal(ours, before)


# ---- the commands --------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    said = json.loads(capsys.readouterr().out)
    return said if code == 0 else (code, said["error"])


def test_the_commands_from_data_to_a_running_adapter(
    tiny_checkpoint: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--epochs", 50, "--learning-rate", 0.01, "--threads", 1)
    made = told(
        capsys, "finetune", tiny_checkpoint, "--data", facts, "--out", tmp_path / "m", "--adapter",
        "--lora-targets", "q, v,down", *quick,
    )  # fmt: skip
    assert (made["steps"], made["examples"], made["left_out"]) == (50, 4, 0)
    assert made["checkpoint"] == str(tmp_path / "m")
    told(capsys, "export", tiny_checkpoint, tmp_path / "bundle", "--lora-inputs", "--no-verify")
    adapter = told(capsys, "adapter", tmp_path / "m", tmp_path / "bundle", tmp_path / "m.onnx_adapter")
    assert (adapter["layers"], adapter["rank"], adapter["base_checked"]) == (6, 8, True)
    question, answer = next(iter(FACTS.items()))
    ask = ("generate", tmp_path / "bundle", question, "--chat", "--max-tokens", 30)
    assert told(capsys, *ask, "--adapter", tmp_path / "m.onnx_adapter")["text"] == answer
    assert told(capsys, *ask)["text"] != answer


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--list-settings"]) == 0
    listed = capsys.readouterr().out
    assert "lora_rank = 8   (0 to 4096)\n    Of each update" in listed
    assert "learning_rate = 0.001; 0.0001 at rank 0" in listed


def test_a_resumed_adapter_stays_one(
    tiny_checkpoint: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("finetune", tiny_checkpoint, "--data", facts, "--threads", 1)
    told(capsys, *command, "--out", tmp_path / "m", "--adapter", "--max-steps", 1)
    assert told(capsys, *command, "--out", tmp_path / "m", "--resume", "--max-steps", 2)["steps"] == 2
    assert told(capsys, *command, "--out", tmp_path / "m", "--resume")["steps"] == 2
    assert (tmp_path / "m" / "adapter_config.json").exists()
    assert not (tmp_path / "m" / "config.json").exists()
    assert told(capsys, *command, "--out", tmp_path / "n", "--resume", "--max-steps", 1)["weights_step"] == 1
    refused = told(capsys, *command, "--out", tmp_path / "n", "--resume", "--adapter")
    assert refused == (2, "cannot resume with adapter True: the run began with False; leave it as it was")


@pytest.mark.parametrize("qat", [(), ("--qat", "int4")], ids=["plain", "rounded"])
def test_a_watched_run_writes_what_one_alone_writes(
    qat: tuple[str, ...], tiny_checkpoint: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.train.test_tensorboard import scalars  # where tensorboardX is missing, only this test is skipped

    command = ["finetune", str(tiny_checkpoint), "--data", str(facts), "--max-steps", "4", "--threads", "1", *qat]
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    watch = ["--sample-every", "2", "--sample-prompt", "Who guards", "--tensorboard"]
    assert main([*command, "--out", str(tmp_path / "m"), *watch]) == 0
    said = capsys.readouterr().err
    assert [step for step in range(1, 5) if f"step {step} writes: Who guards" in said] == [2, 4]
    assert {step for tag, step in scalars(tmp_path / "m" / "tensorboard") if tag == "loss/train"} == {1, 2, 3, 4}
    assert outcome(tmp_path / "m") == outcome(tmp_path / "alone")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--lora-rank", -1), 2, "lora_rank is -1"),
        (("--lora-targets", "q,x"), 2, "lora targets: 'x' is not a layer of this model"),
        (("--qat", "int3"), 2, "qat is 'int3'"),
    ],
)
def test_wrong_flags_leave_nothing(
    flags: tuple[object, ...], code: int, message: str, tiny_checkpoint: Path, facts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    got = told(capsys, "finetune", tiny_checkpoint, "--data", facts, "--out", tmp_path / "m", *flags)
    assert got[0] == code
    assert message in got[1]
    assert not (tmp_path / "m").exists()

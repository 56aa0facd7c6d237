"""The loop itself: what it decays, that it learns, how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, DataError, TrainingError
from gptedge.interrupts import deferred_interrupt
from gptedge.train import precision as precision_module
from gptedge.train.batches import IGNORED, Batch
from gptedge.train.config import TrainConfig
from gptedge.train.data import TokenData
from gptedge.train.model import GPT
from gptedge.train.parts import parameter_groups, validation_loss
from gptedge.train.precision import _BFLOAT16, choose_precision, gains_by_bfloat16
from gptedge.train.settings import LoopConfig
from gptedge.train.state import discard_after, load_state, save_best, save_state
from gptedge.train.trainer import StepReport, Trainer
from gptedge.train.windows import RandomWindows

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make(tiny: TrainConfig, tmp_path: Path) -> MakeTrainer:
    def make(*, tokens: int = 2000, **changes: object) -> Trainer:
        config = replace(tiny, **changes)
        torch.manual_seed(config.seed)
        stream = np.random.default_rng(0).integers(0, 300, tokens).astype(np.uint16)
        data = TokenData(stream, stream[:100])
        model = GPT(config.recipe.model(vocab_size=300))
        source = RandomWindows(data, batch_size=4, context=16, eval_windows=32, seed=config.seed)
        return Trainer(config, model, source, folder=tmp_path, metrics=tmp_path / "metrics.jsonl")

    return make


def lines(trainer: Trainer) -> list[dict[str, float]]:
    return [json.loads(line) for line in trainer.metrics.read_text().splitlines()]


def test_only_matrices_decay_and_tables_learn_faster() -> None:
    config = ModelConfig(
        n_layer=1,
        n_head=2,
        n_kv_head=1,
        n_embd=16,
        head_dim=8,
        n_ff=24,
        vocab_size=50,
        context_length=9,
        norm="layer",
        position="learned",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    )
    model = GPT(config)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, vectors, tables = parameter_groups(model, TrainConfig(weight_decay=0.2, embedding_scale=3.0))
    assert [group["weight_decay"] for group in (matrices, vectors, tables)] == [0.2, 0.0, 0.0]
    assert [group["scale"] for group in (matrices, vectors, tables)] == [1.0, 1.0, 3.0]
    b = "blocks.0"
    multiplying = [f"{b}.attn.{n}.weight" for n in "qkvo"] + [f"{b}.mlp.{n}.weight" for n in ("up", "down")]
    assert {names[id(p)] for p in matrices["params"]} == {*multiplying, "head.weight"}
    assert {names[id(p)] for p in tables["params"]} == {"embed.weight", "position.weight"}
    assert sum(len(group["params"]) for group in (matrices, vectors, tables)) == len(names)


def test_the_schedule_reaches_every_group(make: MakeTrainer) -> None:
    trainer = make(max_steps=1, embedding_scale=3.0)
    trainer.train(lambda report: None)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([5e-4, 5e-4, 15e-4])  # the last step's: a twentieth of the highest


def test_one_batch_is_learned_by_heart(make: MakeTrainer) -> None:
    """17 tokens are one window of 16, drawn at every step."""
    trainer = make(tokens=17, max_steps=80)
    trainer.train(lambda report: None)
    losses = [line["loss"] for line in lines(trainer)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert losses[-1] < 0.05


def test_reports_and_metrics_say_the_same(make: MakeTrainer) -> None:
    trainer, reports = make(precision="fp32"), list[StepReport]()
    trainer.train(reports.append)
    assert [vars(report) for report in reports] == lines(trainer)
    assert [report.step for report in reports] == list(range(1, 21))
    assert [report.step for report in reports if report.val_loss is not None] == [6, 12, 18, 20]
    assert trainer.held_out
    assert reports[-1].val_loss == validation_loss(trainer.model, trainer.held_out)
    assert reports[-1].learning_rate == pytest.approx(0.05 * 1e-2)
    assert trainer.tokens_seen == 20 * 4 * 16


def test_with_a_bound_on_time_the_learning_rate_is_low_when_it_is_up(make: MakeTrainer) -> None:
    trainer, reports = make(max_steps=None, max_seconds=1.0, eval_every=1000), list[StepReport]()
    trainer.train(reports.append)
    assert len(reports) > 5
    assert 1.0 <= trainer.elapsed_s < 3.0
    assert reports[-1].val_loss is not None
    assert max(report.learning_rate for report in reports) == pytest.approx(1e-2, rel=0.2)
    assert reports[-1].learning_rate < 0.4 * 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training_and_keeps_the_last_state(
    make: MakeTrainer, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    honest, calls = GPT.loss, list[int]()

    def loss(self: GPT, *batch: Any) -> torch.Tensor:
        calls.append(1)
        return honest(self, *batch) * (bad if trainer.step == 12 else 1.0)

    monkeypatch.setattr(GPT, "loss", loss)
    with pytest.raises(
        TrainingError, match=r"step 13: .*step-00000010\.pt is kept; .*--resume .*--learning-rate below 0\.01"
    ):
        trainer.train(lambda report: None)
    assert len(calls) > 12
    assert load_state(trainer.folder, print)["step"] == 10
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_interrupts_wait_and_are_seen_and_a_second_one_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread(make: MakeTrainer) -> None:
    trainer = make(max_steps=2)
    thread = threading.Thread(target=trainer.train, args=(lambda report: None,))
    thread.start()
    thread.join()
    assert trainer.step == 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[torch.dtype, float]]:
    """Speeds of products by type, in the place of measuring them; what was asked for before is forgotten."""
    speeds = {torch.float32: 1.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(precision_module, "peak_flops", lambda dtype, device, side: speeds[dtype])
    gains_by_bfloat16.cache_clear()
    yield speeds
    gains_by_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("amx", "avx512", "onednn", "speed", "expected"),
    [
        (True, True, True, 6.0, "bf16"),
        (False, True, True, 2.2, "bf16"),  # Zen 4
        (False, True, True, 0.6, "fp32"),  # Sapphire Rapids whose AMX is kept from programs
        (True, False, True, 6.0, "bf16"),
        (False, False, True, 2.0, "fp32"),
        (True, True, False, 2.0, "fp32"),
    ],
)
def test_precision_follows_the_processor_unless_it_is_asked_for(
    amx: bool,
    avx512: bool,
    onednn: bool,
    speed: float,
    expected: str,
    measured: dict[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured[torch.bfloat16] = speed
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert choose_precision("auto") == expected
    assert [choose_precision(p) for p in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.usefixtures("measured")
def test_a_version_of_torch_that_cannot_say_is_taken_for_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _BFLOAT16:
        monkeypatch.delattr(torch.cpu, name)
    assert choose_precision("auto") == "fp32"


def test_the_names_that_torch_is_asked_by_are_there_and_agree_with_what_it_says_in_public() -> None:
    said = torch.cpu.get_capabilities()
    for name, public in zip(_BFLOAT16, ("amx_tile", "avx512_bf16"), strict=True):
        assert getattr(torch.cpu, name)() == said.get(public, False)


def test_bf16_learns_like_fp32(make: MakeTrainer) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = make(precision=precision, save_every=0)
        trainer.train(lambda report: None)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        losses.append(trainer.val_loss)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


# ---- other models, other sources -----------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A fixed table and a small matrix on top of it: a model that shares nothing with GPT but its loss's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.table.weight.requires_grad_(False)
        self.top = nn.Linear(5, 7, bias=False)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
        logits = self.top(self.table(ids)).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / max(1, int((targets != IGNORED).sum()))


class Cycle:
    """0 1 2 … 6 0 1 …; only every other target is scored, and the validation batches are of unequal size."""

    def batch(self, step: int) -> Batch:
        ids = (torch.arange(8) + step)[None] % 7
        targets = (ids + 1) % 7
        return Batch(ids, targets.where(torch.arange(8) % 2 == 0, IGNORED))

    def held_out(self) -> list[Batch]:
        return [self.batch(0), self.batch(1).rows(0, 1), Batch(torch.tensor([[3]]), torch.tensor([[4]]))]


def adapted(folder: Path, *, steps: int) -> Trainer:
    torch.manual_seed(0)
    config = LoopConfig(max_steps=steps, learning_rate=0.1, eval_every=5, precision="fp32")
    return Trainer(config, Adapted(), Cycle(), folder=folder, metrics=folder / "metrics.jsonl")


def test_only_what_requires_a_gradient_is_trained_and_saved(tmp_path: Path) -> None:
    trainer = adapted(tmp_path, steps=60)
    table = trainer.model.table.weight.clone()
    trainer.train(lambda report: None)
    assert trainer.loss < 0.2
    assert torch.equal(trainer.model.table.weight, table)
    assert list(trainer.state()["model"]) == ["top.weight"]
    again = adapted(tmp_path, steps=61)
    again.restore(load_state(tmp_path, print))
    assert torch.equal(again.model.top.weight, trainer.model.top.weight)
    again.model.table.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"not of this run: .*table\.weight is in only one"):
        again.restore(load_state(tmp_path, print))


def test_the_validation_loss_is_the_mean_over_scored_tokens(tmp_path: Path) -> None:
    trainer = adapted(tmp_path, steps=1)
    with torch.no_grad():
        losses = [float(trainer.model.loss(b.ids, b.targets, None)) for b in Cycle().held_out()]
    expected = (4 * losses[0] + 4 * losses[1] + losses[2]) / 9
    assert validation_loss(trainer.model, Cycle().held_out()) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(sum(losses) / 3, rel=1e-3)


# ---- the best, and the work of a step ------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up_to_it(tmp_path: Path, make: MakeTrainer) -> None:
    runs = []
    for parts in (1, 3):
        trainer = make(grad_accumulation=parts, max_steps=8, precision="fp32")
        trainer.train(lambda report: None)
        runs.append((trainer.loss, trainer.model.state_dict()))
        (tmp_path / "metrics.jsonl").unlink()
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=0, atol=1e-4)


def test_parts_weigh_by_what_is_scored(tmp_path: Path) -> None:
    """Rows of 4, 1 and 0 scored targets, in parts of a row: the loss is the mean over the five."""

    class Uneven(Cycle):
        def batch(self, step: int) -> Batch:
            one = super().batch(step)
            targets = torch.cat([one.targets, one.targets, torch.full_like(one.targets, IGNORED)])
            targets[1, 2:] = IGNORED
            return Batch(one.ids.repeat(3, 1), targets)

    losses = []
    for parts in (1, 3, 5):
        torch.manual_seed(0)
        config = LoopConfig(max_steps=3, learning_rate=0.1, precision="fp32", grad_accumulation=parts)
        trainer = Trainer(config, Adapted(), Uneven(), folder=tmp_path, metrics=tmp_path / f"{parts}.jsonl")
        trainer.train(lambda report: None)
        losses.append([line["loss"] for line in lines(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_patience_ends_the_run_and_gives_the_best_weights_back(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([5.0, 4.0, 4.5, 4.25, 3.0])
    monkeypatch.setattr("gptedge.train.trainer.validation_loss", lambda model, batches: next(told))
    trainer, seen = make(max_steps=100, eval_every=2, patience=2), {}
    trainer.train(lambda report: seen.update({report.step: trainer.model.embed.weight.clone()}))
    assert (trainer.step, trainer.weights_step, trainer.val_loss) == (8, 4, 4.0)
    assert torch.equal(trainer.model.embed.weight, seen[4])
    assert not torch.equal(seen[8], seen[4])
    state = load_state(trainer.folder, print)
    assert torch.equal(state["model"]["embed.weight"], seen[8])  # what a longer run goes on from


def test_best_weights_that_are_gone_are_missed_aloud(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    told, messages = iter([5.0, 4.0, 4.5, 4.25]), list[str]()
    monkeypatch.setattr("gptedge.train.trainer.validation_loss", lambda model, batches: next(told))
    trainer = make(max_steps=100, eval_every=2, patience=2)
    trainer.on_message = messages.append
    trainer.train(
        lambda report: (trainer.folder / "best-00000004.pt").write_bytes(b"torn") if report.step == 8 else None
    )
    assert (trainer.weights_step, trainer.val_loss) == (8, 4.25)
    assert messages[0].startswith("warning: the best weights, of step 4, are damaged or missing in ")
    assert messages[0].endswith("those of step 8 are written instead")


def test_without_patience_the_last_weights_are_the_models(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("gptedge.train.trainer.validation_loss", lambda model, batches: next(told))
    trainer, seen = make(max_steps=6, eval_every=2), {}
    trainer.train(lambda report: seen.update({report.step: trainer.model.embed.weight.clone()}))
    assert (trainer.best_step, trainer.weights_step, trainer.val_loss) == (2, 6, 3.0)
    assert torch.equal(trainer.model.embed.weight, seen[6])


def test_patience_needs_something_held_out(tmp_path: Path) -> None:
    class Blind(Cycle):
        def held_out(self) -> list[Batch]:
            return []

    with pytest.raises(DataError, match=r"patience is 2, and nothing is held out .* raise validation_fraction"):
        Trainer(LoopConfig(patience=2, learning_rate=0.1), Adapted(), Blind(), folder=tmp_path, metrics=tmp_path / "m")


def test_compiled_learns_the_same(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is PyTorch's own stand-in for a compiler, which needs no C++."""
    calls = list[int]()

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    honest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: honest(self, backend=backend))
    losses = []
    for compiled in (False, True):
        trainer = make(compile=compiled, max_steps=3, save_every=0)
        trainer.train(lambda report: None)
        losses.append(trainer.loss)
    assert calls
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_that_goes_on_differently_has_its_own_best_weights(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind a better measurement than its last state knows of, and then led elsewhere."""
    told = iter([5.0, 4.0, 4.5, 3.0])
    monkeypatch.setattr("gptedge.train.trainer.validation_loss", lambda model, batches: next(told))
    trainer, seen = make(max_steps=8, eval_every=2, save_every=6), {}
    trainer.train(lambda report: seen.update({report.step: trainer.model.embed.weight.clone()}))
    assert sorted(path.name for path in trainer.folder.glob("*.pt")) == [
        *("best-00000004.pt", "best-00000008.pt", "step-00000006.pt", "step-00000008.pt"),
    ]
    (trainer.folder / "step-00000008.pt").unlink()  # as if it had been killed before
    told, messages = iter([6.0, 7.0]), list[str]()
    again = make(max_steps=10, eval_every=2, patience=2, learning_rate=0.5)
    again.on_message = messages.append
    again.restore(load_state(again.folder, print))
    discard_after(again.folder, again.step)
    again.train(lambda report: None)
    assert (again.step, again.weights_step, again.val_loss) == (8, 4, 4.0)
    assert torch.equal(again.model.embed.weight, seen[4])
    assert messages == []


def test_only_needed_best_weights_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_best(tmp_path, {"step": step}, step=step)
    save_state(tmp_path, {}, step=3, keep=2)
    for step in (4, 5):
        save_best(tmp_path, {"step": step}, step=step)
    save_state(tmp_path, {}, step=6, keep=2)
    save_best(tmp_path, {"step": 7}, step=7)
    assert sorted(path.name[5:-3] for path in tmp_path.glob("best-*")) == ["00000003", "00000005", "00000007"]
    save_state(tmp_path, {}, step=9, keep=2)
    assert sorted(path.name[5:-3] for path in tmp_path.glob("best-*")) == ["00000005", "00000007"]

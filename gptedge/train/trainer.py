"""The training loop: AdamW over the batches of a source, until the steps or the time are used up.

It reports every step, saves states that a run continues from bit for bit, and stops cleanly on Ctrl+C. It knows nothing
of files of text, tokenizers or checkpoints: `run` brings those.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptedge.errors import CheckpointError, DataError, TrainingError
from gptedge.files import new_file
from gptedge.interrupts import deferred_interrupt
from gptedge.train.batches import Batch, BatchSource
from gptedge.train.parts import (
    Objective,
    keep_freed_memory,
    load_trained_state,
    make_optimizer,
    trained_state,
    validation_loss,
)
from gptedge.train.precision import Precision, autocast, choose_precision
from gptedge.train.processes import Processes, optimizer_state_like, whole
from gptedge.train.schedule import Budget, learning_rate
from gptedge.train.settings import LoopConfig
from gptedge.train.state import State, latest_state, load_best, save_best, save_state


@dataclass(frozen=True)
class StepReport:
    """What one step did, handed to `on_step`; a line of metrics.jsonl holds the same."""

    step: int
    max_steps: int | None
    loss: float
    """Of this step's batch before its update, in nats per token."""
    val_loss: float | None
    """After the update, at the steps where it was measured."""
    tokens_per_second: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    elapsed_s: float
    """Of training, that before a resume included."""
    eta_s: float
    best_val_loss: float | None = None
    """The lowest so far, and the step after which it was measured."""
    best_step: int | None = None


OnStep = Callable[[StepReport], None]
OnMessage = Callable[[str], None]


# ---- the loop ------------------------------------------------------------------------------------------------------


class Trainer:
    """A run under way: the model, its optimizer, where its batches come from, and how far it has come."""

    def __init__(
        self,
        config: LoopConfig,
        model: nn.Module,
        source: BatchSource,
        *,
        folder: Path,
        metrics: Path,
        processes: Processes | None = None,
        on_message: OnMessage = lambda message: None,
    ) -> None:
        """`model` has a loss as `Objective` says; its parameters that require a gradient are trained.

        `folder` takes the states, `metrics` a JSON line for each step. Raises DataError for patience without held-out
        batches.
        """
        self.config, self.source = config, source
        self.processes = processes = processes or Processes()
        processes.prepare(model)
        self.model, self.objective = model.train(), _wrapped(model, config, processes)
        self.folder, self.metrics, self.on_message = folder, metrics, on_message
        self.optimizer = make_optimizer(model, config)
        self.precision: Precision = processes.from_leader(
            lambda: choose_precision(config.precision, processes.device.type)
        )
        self.budget = Budget(config.step_limit, config.max_seconds)
        check_patience(config, source)
        self.held_out = [batch.to(processes.device) for batch in source.held_out()]
        self.step, self.tokens_seen, self.elapsed_s = 0, 0, 0.0
        self.loss = math.nan
        self.val_loss: float | None = None
        self.best_val_loss, self.best_step, self.waited = math.inf, 0, 0
        self.weights_step = 0
        """Of the weights that the model has once it is trained."""

    @property
    def is_done(self) -> bool:
        return bool(self.used_up)

    @property
    def used_up(self) -> str:
        """The setting that ends the run now; "" where it goes on."""
        if self.config.patience and self.waited >= self.config.patience:
            return "patience (in a file that --config names)"
        if self.budget.progress(self.step, self.elapsed_s) < 1:
            return ""
        limit = self.budget.max_steps
        return "--max-steps" if limit is not None and self.step >= limit else "--max-seconds"

    def train(self, on_step: OnStep) -> None:
        """Go on until budget or patience is used up; with patience, the best weights are the model's in the end.

        Raises TrainingError, or KeyboardInterrupt once the state is saved. Only the leading process reports and writes.
        """
        keep_freed_memory()
        self._began = time.perf_counter() - self.elapsed_s
        with deferred_interrupt() as interrupted:
            while not self.is_done:
                report = self._step()
                asked = interrupted()
                if self.processes.leads:
                    self._log(report)
                    asked = _stops(on_step, report) or interrupted()
                stop = any(self.processes.gather(float(asked)))
                if stop or self.is_done or (self.config.save_every and self.step % self.config.save_every == 0):
                    self._save()
                if stop:
                    self.on_message(f"step {self.step:,} is saved; go on with --resume")
                    raise KeyboardInterrupt
        self.weights_step = self.step
        if self.config.patience and 0 < self.best_step < self.step:
            self._take_best()

    def _step(self) -> StepReport:
        began = time.perf_counter()
        rate = learning_rate(self.config, self.budget.progress(self.step + 1, self.elapsed_s))
        batch = self.source.batch(self.step)
        self.loss, grad_norm = self._update(batch, rate)
        self.step += 1
        self.tokens_seen += batch.ids.numel()
        self.elapsed_s = max(self.processes.gather(time.perf_counter() - self._began))
        took_s = time.perf_counter() - began
        measured = self._validate() if self.step % self.config.eval_every == 0 or self.is_done else None
        return StepReport(
            step=self.step,
            max_steps=self.budget.max_steps,
            loss=self.loss,
            val_loss=measured,
            tokens_per_second=batch.ids.numel() / took_s,
            learning_rate=rate,
            grad_norm=grad_norm,
            elapsed_s=self.elapsed_s,
            eta_s=self.budget.eta_s(self.step, self.elapsed_s),
            best_val_loss=self.best_val_loss if self.best_step else None,
            best_step=self.best_step or None,
        )

    def _update(self, batch: Batch, rate: float) -> tuple[float, float]:
        """One update of the weights; gives the loss and the norm of the gradients before it."""
        mine = 0.0
        for part, share in self.processes.parts(batch, self.config.grad_accumulation):
            with autocast(self.precision, self.processes.device.type):
                loss: Tensor = self.objective(part.ids, part.targets, part.segments) * share
            (loss * self.processes.world).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            mine += loss.item()  # the processes' gradients are averaged, and the shares are of their sum
        whole_loss = sum(self.processes.gather(mine))
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)))
        self._check_finite(whole_loss, norm, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return whole_loss, norm

    def _log(self, report: StepReport) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(report)) + "\n")
        except OSError as e:
            raise self._cannot_write(self.metrics, e) from None

    def _save(self) -> None:
        state = self.state()
        self._write(lambda: save_state(self.folder, state, step=self.step, keep=self.config.keep_states))

    def _write(self, save: Callable[[], object]) -> None:
        """By the leading process; all end where it cannot."""

        def written() -> None:
            try:
                save()
            except OSError as e:
                raise self._cannot_write(self.folder, e) from None

        self.processes.from_leader(written)

    def _cannot_write(self, path: Path, error: OSError) -> TrainingError:
        reason = error.strerror or error
        return TrainingError(
            f"step {self.step}: {path} cannot be written: {reason}; {self._kept()}; make room and go on with --resume"
        )

    def _kept(self) -> str:
        saved = latest_state(self.folder)
        return f"{saved} is kept" if saved else "no state had been saved yet"

    def _check_finite(self, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        error = TrainingError(
            f"step {self.step + 1}: the loss is {loss:g} and its gradient's norm {norm:g}, at a learning rate of "
            f"{rate:.2g}; {self._kept()}; "
            f"go on with --resume and a --learning-rate below {self.config.peak_learning_rate:g}"
        )
        error.is_reported = not self.processes.leads  # all find the same
        raise error

    def _validate(self) -> float | None:
        """Measure, and keep the weights where they are the best so far."""
        if not self.held_out:
            return None
        with autocast(self.precision, self.processes.device.type):
            self.val_loss = validation_loss(self.model, self.held_out)
        self.waited += 1
        if self.val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.waited = self.val_loss, self.step, 0
            weights = whole(trained_state(self.model))
            best = {"model": weights, "step": self.step, "val_loss": self.val_loss}
            self._write(lambda: save_best(self.folder, best, step=self.step))
        return self.val_loss

    def _take_best(self) -> None:
        best = load_best(self.folder, self.best_step)
        if best is None:
            self.on_message(
                f"warning: the best weights, of step {self.best_step:,}, are damaged or missing in {self.folder}; "
                f"those of step {self.step:,} are written instead"
            )
            return
        load_trained_state(self.model, best["model"])
        self.val_loss, self.weights_step = self.best_val_loss, self.best_step

    def state(self) -> State:
        """Everything that the next steps depend on, and that the run began with neither in files nor by its seed."""
        return {
            "model": whole(trained_state(self.model)),
            "optimizer": whole(self.optimizer.state_dict()),
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if self.processes.device.type == "cuda" else [],
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, state: State) -> None:
        """Continue from a state of the same run."""
        try:
            load_trained_state(self.model, state["model"])
            self.optimizer.load_state_dict(optimizer_state_like(self.optimizer, state["optimizer"]))
            torch.set_rng_state(state["torch_generator"])
            if len(state["cuda_generators"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_generators"])
            for name in _COUNTS:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            reason = str(e).partition("\n")[0]
            raise CheckpointError(f"the state in {self.folder} is not of this run: {reason}") from None


_COUNTS = ("step", "tokens_seen", "elapsed_s", "loss", "val_loss", "precision", "best_val_loss", "best_step", "waited")


def check_patience(config: LoopConfig, source: BatchSource) -> None:
    """Raises DataError where nothing is held out, and patience is set."""
    if config.patience and not source.held_out():
        raise DataError(
            f"patience is {config.patience}, and nothing is held out to be patient about; "
            f"raise validation_fraction, give more data, or set patience to 0"
        )


def _wrapped(model: nn.Module, config: LoopConfig, processes: Processes) -> nn.Module:
    objective = Objective(model)
    if config.compile:
        objective.compile()
    return processes.wrap(objective)


def _stops(on_step: OnStep, report: StepReport) -> bool:
    """A KeyboardInterrupt out of the callback is a wish to stop after this step."""
    try:
        on_step(report)
    except KeyboardInterrupt:
        return True
    return False


def cut_metrics(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a run that was killed may have left more, and half a line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    with new_file(path) as work:
        work.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

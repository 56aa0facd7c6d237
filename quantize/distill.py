"""Training a quantized bundle on what the float model answers: int4-distill, after int4's calibration.

A student that starts as the quantized graph (see torch_graph) learns to give the float model's distribution of next
tokens, at every position of a text: Kullback-Leibler divergence, Adam, one window a step. What learns is every 4-bit
integer (straight through), every block's scale and every norm's gain; tables, zero points and biases stay.

A run that was stopped goes on from its last state (see work). Needs torch; nothing that runs a bundle does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptedge.bundle import GRAPH, Bundle
from gptedge.errors import CheckpointError, TrainingError
from gptedge.files import named_when_full
from gptedge.interrupts import deferred_interrupt
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.progress import Report
from gptedge.quantize.calibration import Windows
from gptedge.quantize.rounding import as_blocks
from gptedge.quantize.torch_graph import TorchGraph
from gptedge.quantize.work import START
from gptedge.runtime.session import Session
from gptedge.train.parts import keep_freed_memory
from gptedge.train.state import State, load_state, save_state

HELD_OUT = 2
"""Further windows that are not trained on: the divergence there is reported."""
RATES = {"latent": 0.01, "change": 3e-4, "part": 1e-3}
"""Adam's learning rates: of integers in steps of the grid, of scales and of gains in parts of themselves.

An integer starts in the middle of its cell: at this rate the noise of 400 windows does not carry it half a step to the
next, a gradient that keeps its sign does."""
_BETAS = (0.9, 0.99)
_WARM = 0.05  # of all steps, until the rates are full; then a cosine to nothing
_SAVE_EVERY, _MEASURE_EVERY = 20, 20  # steps
_ROWS = 32  # of logits that the divergence is found of at once


def distill(
    source: Bundle,
    folder: Path,
    windows: Windows,
    *,
    steps: int,
    seed: int,
    threads: int,
    report: Report,
) -> dict[str, npt.NDArray[Any]]:
    """Train the graph in `folder`/START for `steps` steps; the initializers that have changed, by name.

    `windows` are token ids [n, T], of which the last HELD_OUT are only measured where there are more. Goes on from the
    state in `folder`, if any. Raises TrainingError when the loss is not finite, KeyboardInterrupt once the state is
    saved.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        run = _Run(source, folder, windows, steps, seed, threads)
        run.train(report)
    finally:
        torch.set_num_threads(before)
    return _changed(run.student)


class _Divergence(torch.autograd.Function):
    """Mean Kullback-Leibler divergence, nats, of softmax(got) from softmax(wanted), both [T, V].

    Its gradient, (softmax(got) - softmax(wanted)) / T, is made in the same pass, a few rows at a time, which stay in
    the processor's cache: a tenth of the time that autograd takes for arrays of 100 MB.
    """

    @staticmethod
    def forward(ctx: Any, got: Tensor, wanted: Tensor) -> Tensor:
        gradient, total = torch.empty_like(got), torch.zeros((), dtype=torch.float64)
        for i in range(0, len(got), _ROWS):
            q, p = (F.log_softmax(x[i : i + _ROWS], -1) for x in (got, wanted))
            likely = p.exp()
            total += (likely * p.sub_(q)).sum(dtype=torch.float64)
            torch.sub(q.exp_(), likely, out=gradient[i : i + _ROWS])
        ctx.save_for_backward(gradient.div_(len(got)))
        return (total / len(got)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


_divergence: Callable[[Tensor, Tensor], Tensor] = _Divergence.apply  # which torch leaves untyped


class _Run:
    def __init__(self, source: Bundle, folder: Path, windows: Windows, steps: int, seed: int, threads: int) -> None:
        start = folder / START
        self.student = TorchGraph(load_graph(start / GRAPH), lambda tensor: read_initializer(tensor, start))
        self.teacher = Session(source, threads=threads, provider="cpu", check=False)
        n_held_out = HELD_OUT if len(windows) > HELD_OUT else 0
        self.windows = windows[: len(windows) - n_held_out]
        self.held_out = windows[len(windows) - n_held_out :]
        self.folder, self.steps, self.seed = folder, steps, seed
        self.optimizer = torch.optim.Adam(
            [
                {
                    "params": [p for name, p in self.student.named_parameters() if name.endswith(f".{kind}")],
                    "rate": rate,
                }
                for kind, rate in RATES.items()
            ],
            lr=0.0,
            betas=_BETAS,
            eps=1e-12,
            fused=True,
        )
        self.step = 0
        self._resume()

    def train(self, report: Report) -> None:
        log = self.folder / "log.jsonl"
        with named_when_full(log), deferred_interrupt() as interrupted, log.open("a", encoding="utf-8") as lines:
            note = "distilling"
            while self.step < self.steps:
                facts: dict[str, float] = {"step": self.step + 1, "kl": self._update()}
                self.step += 1
                if len(self.held_out) and (self.step % _MEASURE_EVERY == 0 or self.step == self.steps):
                    facts["held_out_kl"] = self.measure()
                    note = f"distilling, divergence {facts['held_out_kl']:.4f} on text held out"
                lines.write(json.dumps(facts) + "\n")
                lines.flush()
                report(self.step, self.steps, note)
                stop = interrupted()
                if stop or self.step % _SAVE_EVERY == 0 or self.step == self.steps:
                    save_state(self.folder, self._state(), step=self.step, keep=1)
                if stop:
                    raise KeyboardInterrupt

    def measure(self) -> float:
        """Mean divergence over the second halves of the windows held out, activations in float32."""
        with torch.no_grad():
            parts = [self._divergence(ids, len(ids) // 2) for ids in self.held_out]
        return float(torch.stack(parts).mean())

    def _update(self) -> float:
        """One step of Adam; the divergence before it."""
        loss = self._divergence(self._window(), 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if not math.isfinite(loss.item()):
            raise TrainingError(f"step {self.step + 1}: the divergence is {loss.item():g}; distill on other text")
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _schedule(self) -> float:
        done = (self.step + 0.5) / self.steps
        return min(1.0, done / _WARM, 0.5 * (1 + math.cos(math.pi * done)))

    def _window(self) -> npt.NDArray[np.int64]:
        """Each window once, then all again in another order: a function of the seed and the step alone."""
        epoch, at = divmod(self.step, len(self.windows))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))
        chosen: npt.NDArray[np.int64] = self.windows[order[at]]
        return chosen

    def _divergence(self, ids: npt.NDArray[np.int64], first: int) -> Tensor:
        """Mean of the float model's predictions from the student's, nats, at positions from `first` on."""
        wanted = self.teacher.run(ids.tolist(), self.teacher.new_cache(), every_row=True)[first:]
        got = self.student(torch.from_numpy(ids[None]))[0, first:]
        return _divergence(got, torch.from_numpy(wanted))

    def _state(self) -> State:
        return {
            "step": self.step,
            "student": {name: p.detach() for name, p in self.student.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self) -> None:
        """Go on from the latest state; from the beginning where there is none that is whole."""
        try:
            state = load_state(self.folder, lambda _: None)
        except CheckpointError:
            return
        if state is None:
            return
        self.step = state["step"]
        self.student.load_state_dict(state["student"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


def _changed(student: TorchGraph) -> dict[str, npt.NDArray[Any]]:
    made: dict[str, npt.NDArray[Any]] = {name: g().detach().numpy() for name, g in student.named_gains().items()}
    for name, matrix in student.named_matrices().items():
        blocks = as_blocks(*matrix.rounded(), matrix.scheme)
        made |= {f"{name}.{role}": array for role, array in blocks.arrays().items()}
    return made

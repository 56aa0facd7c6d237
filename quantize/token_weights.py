"""How much what a model answers hangs on each token of a text, product by product: what GPTQ may weigh tokens by.

A token counts by the length of the gradient that the model's log-probability of its own answers has at the product's
output there: the square root of what Fisher information would give it (compare GuidedQuant, Kim et al. 2025,
arXiv:2505.07004). The square itself lets a tenth to half of the tokens count, and quantizes worse than no weights.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from gptedge.progress import Report
from gptedge.quantize.calibration import Windows
from gptedge.quantize.torch_graph import TorchGraph
from gptedge.quantize.walk import Read
from gptedge.train.parts import keep_freed_memory

FloatArray = npt.NDArray[np.float32]


def token_weights(
    model: onnx.ModelProto,
    read: Read,
    windows: Windows,
    products: Collection[str],
    *,
    seed: int,
    threads: int,
    report: Report,
) -> dict[str, FloatArray]:
    """By name of each node in `products`, the weight of each token of `windows` [n, T]: [n, T], 1 on average.

    Answers are drawn from the model with `seed`. Raises UnsupportedModelError for an operator that TorchGraph lacks.
    """
    lengths = {name: np.zeros(windows.shape, np.float32) for name in products}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        graph, generator = TorchGraph(model, read), torch.Generator().manual_seed(seed)
        for i, ids in enumerate(windows):
            _add_lengths(graph, ids, {name: rows[i] for name, rows in lengths.items()}, generator)
            report(i + 1, len(windows), "weighing tokens")
    finally:
        torch.set_num_threads(before)
    return {name: rows / max(float(rows.mean()), 1e-30) for name, rows in lengths.items()}


def _keep_length(gradient: Tensor, into: FloatArray) -> None:
    """Of the gradient [1, T, N] at each token, [T]."""
    into[:] = gradient[0].norm(dim=-1).numpy()


def _add_lengths(
    graph: TorchGraph, ids: npt.NDArray[np.int64], rows: dict[str, FloatArray], generator: torch.Generator
) -> None:
    """Put the gradients' lengths on one text, ids [T], into `rows`, each [T]."""

    def watch(name: str, output: Tensor) -> None:
        if name in rows:
            if not output.requires_grad:  # nothing that learns comes before the first product
                output.requires_grad_()
            hook = partial(_keep_length, into=rows[name])
            output.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    log_p = F.log_softmax(graph(torch.from_numpy(ids[None]), watch)[0], -1)
    answers = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    log_p.gather(1, answers).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    graph.zero_grad()

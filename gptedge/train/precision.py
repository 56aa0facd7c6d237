"""What matrix products are computed in: bfloat16 where the machine gains by it, and float32 elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch

from gptedge.train.utilisation import peak_flops

Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_GAIN = 1.3
"""How many times as fast products must be, for casting costs something too.

2.2 times on an AMD Zen 4 with AVX512-BF16, and 0.58 on an Intel Sapphire Rapids that has it and no AMX: its
instruction takes four times as long as one of float32. With AMX whole steps are 2.4 times as fast.
"""
# Asked by these names: `torch.cpu.get_capabilities` says the same, but came with a later version than `train` needs.
_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def choose_precision(wanted: str, device: str = "cpu") -> Precision:
    """What `wanted` asks for, where "auto" is bf16 if that pays on `device`."""
    gains = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else gains_by_bfloat16()
    return "bf16" if wanted == "bf16" or (wanted == "auto" and gains) else "fp32"


@cache
def gains_by_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 well, by its instructions and by a measurement of 50 ms.

    Those that would emulate it are not measured: that takes long. PyTorch leaves it to a library (oneDNN).
    """
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available  # which torch leaves untyped
    if not has_onednn() or not any(getattr(torch.cpu, name, lambda: False)() for name in _BFLOAT16):
        return False
    fp32, bf16 = (peak_flops(dtype, torch.device("cpu"), side=512) for dtype in DTYPES.values())
    return bf16 > _GAIN * fp32


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()

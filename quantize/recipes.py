"""Recipes: which scheme each group of tensors gets. A new recipe is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT = "fp32"


@dataclass(frozen=True)
class Scheme:
    """Blocks of a weight's rows as unsigned integers: value = (integer - zero point) * scale."""

    bits: int
    """4 or 8."""
    block_size: int
    """Values along a row that share a scale: a power of two, at least 16."""
    symmetric: bool
    """The zero point is the middle of the range, and is not stored."""
    steps: int
    """Scales tried for each block and sign; 1 takes the block's own range as it is."""


@dataclass(frozen=True)
class Recipe:
    summary: str
    linear: Scheme
    table: Scheme
    """The embedding table, and the output projection."""


_INT8 = Scheme(bits=8, block_size=64, symmetric=True, steps=1)

RECIPES: Mapping[str, Recipe] = {
    "int8": Recipe("8-bit weights in blocks of 64", _INT8, _INT8),
    "int4-rtn": Recipe(
        "4-bit weights in blocks of 32, rounded to nearest with searched scales; 8-bit table; needs no data",
        Scheme(bits=4, block_size=32, symmetric=False, steps=12),
        _INT8,
    ),
}

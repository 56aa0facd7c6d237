"""Recipes: which scheme and method each group of weights gets. A new recipe is a new row, or a user's TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gptedge.errors import UsageError
from gptedge.text import read_text

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Those that onnxruntime's MatMulNBits has kernels for."""
WHOLE_ROWS = 0
"""The block size that stands for a whole row: products of integers (see integer_products.py)."""
FLOAT_RECIPES = ("fp32", "fp16")
"""What bundles are called that are not quantized."""
METHODS = ("rtn", "gptq")
"""How integers are chosen: rtn rounds each to the nearest and needs no data, gptq is calibrated (see gptq.py)."""


@dataclass(frozen=True)
class Scheme:
    """Blocks of a weight's rows as unsigned integers: value = (integer - zero point) * scale."""

    bits: int
    """4 or 8."""
    block_size: int
    """Values along a row that share a scale: one of BLOCK_SIZES, or WHOLE_ROWS, which takes 8 bits, symmetric."""
    symmetric: bool
    """The zero point is the middle of the range, and is not stored."""
    steps: int
    """Scales tried for each block and sign; 1 takes the block's own range as it is."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits is {self.bits}; it must be 4 or 8")
        if self.block_size not in (*BLOCK_SIZES, WHOLE_ROWS):
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(
                f"block_size is {self.block_size}; it must be one of {sizes}, or {WHOLE_ROWS} for whole rows"
            )
        if self.whole_rows and (self.bits != 8 or not self.symmetric):
            raise UsageError(f"block_size {WHOLE_ROWS}, whole rows, takes 8 bits and symmetric = true")
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}; it must be at least 1")

    @property
    def whole_rows(self) -> bool:
        return self.block_size == WHOLE_ROWS

    def size_in(self, width: int) -> int:
        """Of the blocks of rows of such a width."""
        return width if self.whole_rows else self.block_size


@dataclass(frozen=True)
class Group:
    match: str
    """Names of weights as a shell pattern: `embed.weight` is the table, `*.down.weight` every down projection."""
    scheme: Scheme
    method: str = "rtn"
    """One of METHODS; what is only looked up has no inputs to be calibrated on, and takes rtn in any case."""
    smooth: bool = False
    """Whether activations' spread is moved into these weights first (see smooth.py); calibrated."""
    static: bool = False
    """Whether the activations of all tokens may share one step, measured on the text, where that adds little noise;
    else each token has its own. Whole rows that are smoothed."""
    equalize: bool = False
    """Whether columns are evened out first, without data (see equalize.py)."""
    first_token: int = 1
    """How many times as much the first token of a window counts in GPTQ: most of what later tokens attend to is its key
    and value (attention sinks, Xiao et al. 2023, arXiv:2309.17453)."""
    widen: bool = False
    """Whether weights become float32 again when a model is loaded, and activations are never rounded: the memory and
    speed of a float model for the file of a quantized one. 8 bits, symmetric."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        if self.first_token < 0:
            raise UsageError(f"{self.match}: first_token is {self.first_token}; it must be at least 0")
        if self.widen and (self.scheme.bits != 8 or not self.scheme.symmetric):
            raise UsageError(f"{self.match}: weights that are widened at load must be of 8 bits and symmetric")
        if self.scheme.whole_rows and self.widen:
            raise UsageError(f"{self.match}: whole rows (block_size {WHOLE_ROWS}) are not widened")
        if self.static and not (self.smooth and self.scheme.whole_rows):
            raise UsageError(f"{self.match}: static takes whole rows (block_size {WHOLE_ROWS}) that are smoothed")


@dataclass(frozen=True)
class Recipe:
    summary: str
    groups: tuple[Group, ...]
    """The first that matches a weight counts; a weight that none matches stays as it is."""
    fills_target: bool = False
    """Whether the groups are chosen anew so that the bundle has a given size (see mixed.py)."""
    calibration_windows: int = 32
    """Windows of 512 tokens that GPTQ learns from."""
    weigh_tokens: bool = False
    """Whether a token counts in GPTQ by how much the model's answer hangs on it (see token_weights.py); needs torch."""
    common_tokens: int = 0
    """Tables are split behind so many rows, if that is not more than half of them, into `embed.weight.common` and
    `.rare` (and the same of `head.weight`), which groups may match apart (see split_table.py); 0 leaves them whole."""
    distill_steps: int = 0
    """How long 4-bit weights are trained afterwards on what the float model answers (see distill.py)."""

    def __post_init__(self) -> None:
        if self.distill_steps and all(g.scheme.bits != 4 or g.scheme.symmetric for g in self.groups):
            raise UsageError("distill_steps trains 4-bit weights that are not symmetric, and no group is such")
        if self.distill_steps and any(g.widen for g in self.groups):
            raise UsageError("distill_steps takes no weights that are widened at load")
        if self.distill_steps and any(g.scheme.whole_rows for g in self.groups):
            raise UsageError(f"distill_steps takes no weights in whole rows (block_size {WHOLE_ROWS})")

    def group_of(self, name: str) -> Group | None:
        return next((g for g in self.groups if fnmatchcase(name, g.match)), None)

    def uses(self, method: str) -> bool:
        return any(g.method == method for g in self.groups)

    @property
    def smooths(self) -> bool:
        return any(g.smooth for g in self.groups)


_INT8 = Scheme(bits=8, block_size=64, symmetric=True, steps=1)
_INT8_ROWS = dataclasses.replace(_INT8, block_size=WHOLE_ROWS)
_INT4 = Scheme(bits=4, block_size=32, symmetric=False, steps=12)
INTEGER_LAYERS = (
    Group("*.attn.[qkv]*", _INT8_ROWS, smooth=True),  # static, some models' would be cut off far beyond the text
    Group("*.mlp.down.*", _INT8_ROWS, smooth=True),  # what reaches them differs a hundredfold between tokens
    Group("*", _INT8_ROWS, smooth=True, static=True),
)
"""Products of integers for all weights but tables."""
_CALIBRATED_LAYERS = tuple(dataclasses.replace(g, method="gptq") for g in INTEGER_LAYERS)
_TABLES = (Group("embed.weight", _INT8), Group("head.weight", _INT8))
_SMOOTH_TABLES = tuple(dataclasses.replace(g, smooth=True) for g in _TABLES)

_FINE_INT4 = dataclasses.replace(_INT4, block_size=16)
_FINE_INT8 = dataclasses.replace(_INT8, block_size=32)
_COMMON = 16384
_SPLIT_TABLES = (
    Group("*.weight.rare", dataclasses.replace(_FINE_INT4, symmetric=True), "gptq"),
    *(dataclasses.replace(g, match=f"{g.match}*") for g in _SMOOTH_TABLES),
)
"""8 bits for a whole table, or for the rows of its common tokens; 4 for the others."""
_CALIBRATED = Group("*", _INT4, "gptq", equalize=True)
_ATTENDED = dataclasses.replace(_CALIBRATED, match="*.attn.[qkv]*", first_token=30)

RECIPES: Mapping[str, Recipe] = {
    "int8": Recipe(
        "8-bit products of integers, a scale for each row of a weight, activations smoothed; calibrated: fastest for "
        "prompts, guesses and lists",
        (*_SMOOTH_TABLES, *_CALIBRATED_LAYERS),
        calibration_windows=16,
    ),
    "int8-block": Recipe(
        "8-bit weights and activations in blocks of 64, activations smoothed: nearer to the float model",
        (Group("*", _INT8, smooth=True),),
    ),
    "int8-weight": Recipe(
        "8-bit weights in blocks of 64, widened when loaded: a small file, float speed and activations; needs no data",
        (Group("*", _INT8, widen=True),),
    ),
    "int4-rtn": Recipe(
        "4-bit weights in blocks of 32, rounded to nearest with searched scales; 8-bit table; needs no data",
        (*_TABLES, Group("*", _INT4, equalize=True)),
    ),
    "int4": Recipe(
        "4-bit weights in blocks of 32, calibrated: GPTQ on quantized inputs, then coordinate descent; of a large "
        "table the rows of common tokens keep 8 bits",
        (*_SPLIT_TABLES, _ATTENDED, _CALIBRATED),
        common_tokens=_COMMON,
    ),
    "int4-distill": Recipe(
        "int4 in smaller blocks and from more text, each token weighed by what hangs on it, 8 bits for queries, keys "
        "and values; then trained on what the float model answers; needs torch, an hour",
        (
            *_SPLIT_TABLES,
            dataclasses.replace(_ATTENDED, scheme=_FINE_INT8, smooth=True),  # where bits save most for their bytes
            dataclasses.replace(_CALIBRATED, scheme=_FINE_INT4),
        ),
        common_tokens=_COMMON,
        calibration_windows=128,
        weigh_tokens=True,
        distill_steps=400,
    ),
    "mixed": Recipe(
        "bits and block size of each weight chosen by what rounding it was measured to cost; fills --target-mb",
        (*_SPLIT_TABLES, _ATTENDED, _CALIBRATED),
        fills_target=True,
        common_tokens=_COMMON,
    ),
}


_OPTIONS: Mapping[str, tuple[type, int | None]] = {
    "summary": (str, None),
    "calibration_windows": (int, 1),
    "weigh_tokens": (bool, None),
    "common_tokens": (int, 0),
    "distill_steps": (int, 0),
}
"""What a recipe's file may say before its groups: its type, and the least value."""


def find_recipe(name: str) -> tuple[str, Recipe]:
    """A recipe and its name: a row of RECIPES, or a TOML file. Raises UsageError, offering the nearest name."""
    if name.endswith(".toml"):
        stem = Path(name).stem
        if stem in (*FLOAT_RECIPES, *RECIPES):
            raise UsageError(f"{name}: {stem} is the name of a recipe that gptedge has; give the file another name")
        return stem, read_recipe(Path(name))
    if name in RECIPES:
        return name, RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, 1, 0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"recipe {name!r} is not known; {hint}known are {', '.join(RECIPES)}, or a .toml file")


def read_recipe(path: Path) -> Recipe:
    """A recipe from TOML: what Recipe has besides its groups, all optional, and a `[[group]]` for each row, with the
    fields of Group and Scheme."""
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{path} is not TOML: {e}") from None
    groups = content.pop("group", [])
    for name, value in content.items():
        if name not in _OPTIONS:
            raise UsageError(f"{path}: {name!r} is not known; known are {', '.join(_OPTIONS)} and [[group]]")
        kind, least = _OPTIONS[name]
        if type(value) is not kind or (least is not None and content[name] < least):
            bound = f", at least {least}" if least is not None else ""
            raise UsageError(f"{path}: {name} is {value!r}; it must be of type {kind.__name__}{bound}")
    if not isinstance(groups, list) or not groups:
        raise UsageError(f"{path} has no [[group]]")
    return Recipe(**{"summary": path.stem, **content}, groups=tuple(_group(path, g) for g in groups))


def _group(path: Path, row: Any) -> Group:
    if not isinstance(row, dict):
        raise UsageError(f"{path}: group is {row!r}; each begins with a line [[group]]")
    fields = [f for c in (Group, Scheme) for f in dataclasses.fields(c) if f.name != "scheme"]
    names = {f.name: f.type for f in fields}
    kinds: Mapping[str, type] = {"int": int, "bool": bool, "str": str}
    values = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    values |= {"symmetric": _INT4.symmetric, "steps": _INT4.steps, **row}
    if unknown := sorted(set(values) - set(names)):
        raise UsageError(f"{path}: {unknown[0]!r} is not known; known are {', '.join(names)}")
    if missing := [n for n in names if n not in values]:
        raise UsageError(f"{path}: a [[group]] lacks {missing[0]}")
    for name, value in values.items():
        if type(value) is not kinds[str(names[name])]:
            raise UsageError(f"{path}: {name} is {value!r}; it must be of type {names[name]}")
    scheme = Scheme(**{f.name: values.pop(f.name) for f in dataclasses.fields(Scheme)})
    return Group(scheme=scheme, **values)

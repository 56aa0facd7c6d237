"""safetensors in numpy against the reference implementation, both ways, and on broken files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors as reference
import safetensors.numpy
import safetensors.torch
import torch

from gptedge import safetensors as ours
from gptedge.errors import CheckpointError


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((5, 7)).astype(np.float32),
        "a": rng.standard_normal(3).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "ü 東": np.array([[np.inf, -0.0, np.nan]], np.float32),
        "not contiguous": rng.standard_normal((4, 6)).astype(np.float32).T,
    }


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    tensors = some_tensors()
    ours.write(tmp_path / "m.safetensors", tensors)
    read = reference.numpy.load_file(tmp_path / "m.safetensors")
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], array, err_msg=name)


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    tensors = {name: np.ascontiguousarray(array) for name, array in some_tensors().items() if array.ndim}
    reference.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    read = ours.read(tmp_path / "m.safetensors")
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        assert read[name].shape == array.shape
        assert read[name].read().tobytes() == array.tobytes()


KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "F32": torch.float32}


@pytest.mark.parametrize(("name", "dtype"), KINDS.items())
def test_floating_kinds_become_float32_exactly(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -2.5, 3.14159265358979, 0.0, -0.0, float("inf"), 6e-8, 65504.0]]).to(dtype)
    odd = torch.tensor([1], dtype=torch.uint8)  # leaves what follows unaligned
    reference.torch.save_file({"a": odd, "x": values}, tmp_path / "m.safetensors")
    tensor = ours.read(tmp_path / "m.safetensors")["x"]
    assert (tensor.dtype, tensor.shape) == (name, (1, 8))
    got = tensor.read()
    assert got.dtype == np.float32
    assert got.tobytes() == values.float().numpy().tobytes()


def test_every_bfloat16_and_float16(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        reference.torch.save_file({"x": values}, tmp_path / "m.safetensors")
        np.testing.assert_array_equal(ours.read(tmp_path / "m.safetensors")["x"].read(), values.float().numpy())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_other_kinds_are_listed_and_not_read_as_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    reference.torch.save_file({"x": torch.ones(3, dtype=dtype)}, tmp_path / "m.safetensors")
    tensor = ours.read(tmp_path / "m.safetensors")["x"]
    assert tensor.shape == (3,)
    with pytest.raises(CheckpointError, match="floating"):
        tensor.read()


def test_float32_is_not_copied(tmp_path: Path) -> None:
    ours.write(tmp_path / "m.safetensors", {"x": np.ones((2, 3), np.float32)})
    array = ours.read(tmp_path / "m.safetensors")["x"].read()
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    ours.write(tmp_path / "a", tensors)
    ours.write(tmp_path / "b", reversed(tensors.items()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    ours.write(tmp_path / "m.safetensors", some_tensors())
    whole = (tmp_path / "m.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            ours.read(cut)
        assert "\n" not in str(caught.value)
        assert str(cut) in str(caught.value)


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, tuple[Any, bytes]] = {
    "not json": (b"{not json", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "a list": ([], b""),
    "nested without end": (b"[" * 100_000, b""),
    "entry is a number": ({"x": 1}, b""),
    "entry is a list": ({"x": []}, b""),
    "no dtype": ({"x": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "three offsets": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"),
    "offsets of text": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, b"1234"),
    "unknown dtype": ({"x": entry(0, 4, dtype="Q4_K")}, b"1234"),
    "dtype is a list": ({"x": entry(0, 4, dtype=["F32"])}, b"1234"),
    "fractional shape": ({"x": entry(0, 4, shape=[1.5])}, b"1234"),
    "negative shape": ({"x": entry(0, 4, shape=[-1])}, b"1234"),
    "two negative sizes": ({"x": entry(0, 8, shape=[-1, -2])}, b"12345678"),
    "shape is true": ({"x": entry(0, 4, shape=[True])}, b"1234"),
    "shape and bytes disagree": ({"x": entry(0, 8, shape=[1])}, b"12345678"),
    "ends before it begins": ({"x": entry(4, 0)}, b"1234"),
    "negative begin": ({"x": entry(-4, 0)}, b"1234"),
    "reaches past the file": ({"x": entry(0, 400)}, b"1234"),
    "begins past the file": ({"x": entry(400, 404)}, b"1234"),
    "absurd size": ({"x": entry(0, 2**70)}, b"1234"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, b"0" * 12),
    "the same bytes twice": ({"x": entry(0, 4), "y": entry(0, 4)}, b"0" * 4),
    "gap": ({"x": entry(0, 4), "y": entry(8, 12)}, b"0" * 12),
    "bytes left over": ({"x": entry(0, 4)}, b"0" * 8),
    "no tensors and bytes": ({}, b"0" * 8),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_as_the_reference_refuses_them(tmp_path: Path, case: str) -> None:
    path = raw(tmp_path / "m.safetensors", *MALFORMED[case])
    with pytest.raises(CheckpointError) as caught:
        ours.read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(reference.SafetensorError):
        reference.numpy.load(path.read_bytes())


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10_000, 3])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "m.safetensors", {"x": entry(0, 4)}, b"1234", length=length)
    with pytest.raises(CheckpointError):
        ours.read(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        ours.read(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        ours.read(tmp_path)


def test_zero_length_tensors_may_share_a_place(tmp_path: Path) -> None:
    header = {"a": entry(0, 0, shape=[0]), "b": entry(0, 4), "c": entry(4, 4, shape=[0, 3])}
    tensors = ours.read(raw(tmp_path / "m.safetensors", header, b"\0\0\x80\x3f"))
    assert tensors["b"].read().tolist() == [1.0]
    assert tensors["c"].read().shape == (0, 3)


def test_damage_is_seen_wherever_the_reference_sees_it(tmp_path: Path) -> None:
    """Random bytes in the header: never another exception, and nothing accepted that the reference refuses."""
    ours.write(tmp_path / "m.safetensors", some_tensors())
    whole = (tmp_path / "m.safetensors").read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(1)
    path = tmp_path / "damaged.safetensors"
    verdicts = {True: 0, False: 0}
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[rng.randrange(head)] = rng.choice(b'0123456789,:"[]{}-. \x00\xff')
        path.write_bytes(damaged)
        accepted = accepts(lambda: {n: t.read() for n, t in ours.read(path).items()}, CheckpointError)
        if accepted:
            assert accepts(lambda: reference.numpy.load(bytes(damaged)), reference.SafetensorError)  # noqa: B023
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 20


def accepts(action: Callable[[], Any], refusal: type[Exception]) -> bool:
    try:
        action()
    except refusal:
        return False
    return True

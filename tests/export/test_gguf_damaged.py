"""GGUF files that are cut, damaged or something else: one line, never a crash."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from gptedge.errors import CheckpointError, GptEdgeError
from gptedge.export.sources import open_source
from gptedge.export.sources.gguf_file import open_gguf
from tests.export.gguf_files import (
    Arrays,
    save,
)


def assert_refused(path: Path, kind: type[GptEdgeError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_cut_anywhere(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    """In the magic, the header, the metadata, the tensor table and the data, up to the last byte of the last tensor."""
    whole = llama[0].read_bytes()
    reader = gguf.GGUFReader(llama[0])
    end = max(t.data_offset + t.n_bytes for t in reader.tensors)
    table = reader.tensors[0].field.offset
    places = {
        0,
        1,
        3,
        4,
        7,
        8,
        15,
        16,
        23,
        24,
        table,
        table + 5,
        reader.data_offset,
        reader.data_offset + 1,
        end // 2,
        end - 1,
    }
    places |= set(range(24, end - 1, max(1, end // 300)))
    path = tmp_path / "cut.gguf"
    for place in sorted(places):
        path.write_bytes(whole[:place])
        assert "cut short" in assert_refused(path), place
    path.write_bytes(whole[:end])  # only padding is gone
    open_gguf(path)


def test_any_damaged_byte_gives_one_line_or_a_model(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    """Random damage before the data never ends in another exception, nor in an allocation beyond the file's size."""
    whole = llama[0].read_bytes()
    head = gguf.GGUFReader(llama[0]).data_offset
    rng = random.Random(6)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 8))):
            damaged[rng.choice((rng.randrange(head), rng.randrange(600)))] = rng.choice(
                (0, 1, 0x7F, 0xFF, rng.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            for tensor in open_gguf(path).weights().values():
                tensor.read()
        except GptEdgeError as e:
            refused += 1
            assert "\n" not in str(e)  # noqa: PT017
    assert refused > 100


def patched(source: Path, path: Path, old: bytes, new: bytes) -> Path:
    content = source.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def test_overlapping_tensors(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_tensor("a", np.ones(8, np.float32))
    w.add_tensor("bbbb", np.ones(8, np.float32))
    save(w)
    entry = struct.pack("<Q4sIQI", 4, b"bbbb", 1, 8, 0)
    path = patched(
        tmp_path / "m.gguf", tmp_path / "n.gguf", entry + struct.pack("<Q", 32), entry + struct.pack("<Q", 0)
    )
    assert "tensors a and bbbb overlap" in assert_refused(path)


def test_absurd_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for counts in ((2**63, 0), (0, 2**63)):
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts))
        assert "cut short" in assert_refused(path)
    key = struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**61)  # an array of 2**61 numbers
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key)
    assert "cut short" in assert_refused(path)


def test_arrays_nested_without_end(tmp_path: Path) -> None:
    nested = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + nested)
    assert_refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (3 << 24, "big-endian")])
def test_other_versions(tmp_path: Path, version: int, word: str) -> None:
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, 0))
    assert word in assert_refused(tmp_path / "m.gguf")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<!DOCTYPE html>" * 100)
    assert "not a GGUF file" in assert_refused(tmp_path / "m.gguf")


def test_source_is_recognised_by_its_magic(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(llama[0].read_bytes())
    assert open_source(tmp_path / "model.bin").family.name == "llama"

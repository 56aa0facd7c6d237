"""Weights of ONNX files: where a graph may not point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from gptedge.errors import BundleError
from gptedge.onnx_file import WeightFile, read_initializer


def pointing_at(folder: Path, location: str) -> TensorProto:
    """An initializer of 400 bytes whose data lies in `location`, and whole files of that size inside and outside."""
    folder.mkdir()
    with WeightFile(folder / "w.data") as file:
        tensor = file.add("w", [np.arange(400, dtype=np.float32)])
    (folder.parent / "w.data").write_bytes((folder / "w.data").read_bytes())
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
    return tensor


def test_a_weight_in_the_folder(tmp_path: Path) -> None:
    tensor = pointing_at(tmp_path / "b", "w.data")
    np.testing.assert_array_equal(read_initializer(tensor, tmp_path / "b"), np.arange(400))


@pytest.mark.parametrize("place", ["../w.data", "sub/../../w.data", "{outside}/w.data"])
def test_a_weight_outside_the_folder(tmp_path: Path, place: str) -> None:
    tensor = pointing_at(tmp_path / "b", place.format(outside=tmp_path))
    with pytest.raises(BundleError, match="lies outside the bundle"):
        read_initializer(tensor, tmp_path / "b")

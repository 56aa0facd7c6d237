"""Sessions and KV caches: growth, reuse, copies, limits, and bundles that are not what their manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptedge.bundle import GRAPH_DATA, MANIFEST, open_bundle, verify
from gptedge.errors import BundleError, ContextOverflowError, UsageError
from gptedge.runtime.onnx_runtime import choose_provider
from gptedge.runtime.session import Session


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return Session(open_bundle(tiny_bundle), threads=1)


def ids_of(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(n).integers(0, 300, n)]


def test_cache_grows_without_changing_what_follows(session: Session) -> None:
    ids = ids_of(290)
    whole = session.run(ids, session.new_cache(), every_row=True)
    cache = session.new_cache()
    rows = [session.run(ids[i : i + 29], cache, every_row=True) for i in range(0, 290, 29)]
    assert len(cache) == 290
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-5 * whole.std())


def test_truncated_cache_continues_as_if_the_rest_never_was(session: Session) -> None:
    ids, cache = ids_of(60), session.new_cache()
    session.run(ids, cache)
    session.run(ids_of(30), cache)
    assert cache.keep_common_prefix([*ids[:50], 1, 2, 3]) == 50
    again = session.run(ids[50:], cache)
    np.testing.assert_allclose(again, session.run(ids, session.new_cache()), atol=1e-4)


def test_copied_cache_is_independent(session: Session) -> None:
    ids, cache = ids_of(40), session.new_cache()
    session.run(ids, cache)
    twin = cache.copy()
    session.run(ids_of(5), cache)
    expected = session.run([7], twin)
    fresh = session.new_cache()
    session.run(ids, fresh)
    np.testing.assert_array_equal(expected, session.run([7], fresh))


def test_context_is_a_limit(session: Session) -> None:
    assert session.context_length == 300
    with pytest.raises(ContextOverflowError, match="301 tokens do not fit the model's context of 300"):
        session.run(ids_of(301), session.new_cache())
    cache = session.new_cache()
    session.run(ids_of(300), cache)
    with pytest.raises(ContextOverflowError):
        session.run([1], cache)
    assert len(cache) == 300


def test_nothing_to_run(session: Session) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        session.run([], session.new_cache())


def test_closed_session_says_so(tiny_bundle: Path) -> None:
    closed = Session(open_bundle(tiny_bundle), threads=1)
    cache = closed.new_cache()
    closed.close()
    with pytest.raises(BundleError, match="has been closed"):
        closed.run([1], cache)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads is"):
        Session(open_bundle(tiny_bundle), threads=threads)


def test_provider_is_chosen() -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert choose_provider(None, both) == "CUDAExecutionProvider"
    assert choose_provider("cpu", both) == "CPUExecutionProvider"
    assert choose_provider(None, both[1:]) == "CPUExecutionProvider"
    with pytest.raises(UsageError, match="provider cuda is not in this onnxruntime"):
        choose_provider("cuda", both[1:])
    with pytest.raises(UsageError, match="must be one of cpu, cuda"):
        choose_provider("tpu", both)


# ---- bundles that are not whole ------------------------------------------------------------------------------------


def flip_a_byte(bundle: Path) -> None:
    data = bytearray((bundle / GRAPH_DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / GRAPH_DATA).write_bytes(data)


def cut(bundle: Path) -> None:
    data = (bundle / GRAPH_DATA).read_bytes()
    (bundle / GRAPH_DATA).write_bytes(data[: len(data) // 2])


def replace_text(bundle: Path, old: str, new: str) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace(old, new))


def escape(bundle: Path) -> None:
    replace_text(bundle, '"config.json": {', '"../config.json": {')


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed byte": (flip_a_byte, "sha256 differs"),
    "cut": (cut, "the manifest says"),
    "missing file": (lambda b: (b / GRAPH_DATA).unlink(), "is missing"),
    "missing graph": (lambda b: (b / "model.onnx").unlink(), "is not a bundle: model.onnx is missing"),
    "manifest not JSON": (lambda b: (b / MANIFEST).write_text("{"), "cannot be read as JSON"),
    "manifest of the future": (
        lambda b: replace_text(b, '"format_version": 1', '"format_version": 9'),
        "bundle format 9",
    ),
    "name outside": (escape, "lies outside the folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_bundle_is_refused(tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    damage(copy)
    with pytest.raises(BundleError, match=message):
        Session(open_bundle(copy), threads=1)


def test_verify_names_the_changed_file(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    verify(open_bundle(copy))
    flip_a_byte(copy)
    with pytest.raises(BundleError, match=GRAPH_DATA):
        verify(open_bundle(copy))


def test_graph_that_is_no_decoder(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / MANIFEST).unlink()
    (copy / "model.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(BundleError, match="cannot be loaded"):
        Session(open_bundle(copy), threads=1)

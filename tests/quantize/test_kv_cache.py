"""Bundles whose keys and values are int8: what their scales come from, what is judged, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper

import gptedge
from gptedge.bundle import GRAPH, PREFILL, open_bundle, verify
from gptedge.errors import DataError, UsageError
from gptedge.evaluate import explain_bundle
from gptedge.evaluate.divergence import evaluate, log_softmax
from gptedge.onnx_file import load_graph
from gptedge.quantize import kv_cache, smooth
from gptedge.quantize.calibration import text_windows
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.session import Session
from gptedge.tokenizer import Tokenizer
from tests.cli.run import run, run_json
from tests.conftest import TEXT, read_to_end


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["int8-weight", "int4-rtn"])
def pair(request: pytest.FixtureRequest, tiny_bundle: Path, text: Path) -> tuple[Session, Session]:
    """One recipe over a cache of floats, and of int8; both with a graph for prompts."""
    folder = tiny_bundle.parent / "kv-pairs"
    opened = []
    for kv in (None, "int8"):
        out = folder / f"{request.param}-{kv}"
        if not out.exists():  # pytest comes back to a parameter after others
            quantize(tiny_bundle, out, recipe=request.param, prefill="int8", kv=kv, calibration=text, threads=1)
        opened.append(Session(open_bundle(out), threads=1))
    return opened[0], opened[1]


def ids_of(session: Session, n: int) -> list[int]:
    return Tokenizer.from_folder(session.bundle.path).encode(TEXT)[:n]


def scales_of(session: Session, graph: str = GRAPH) -> list[npt.NDArray[np.float32]]:
    stored = {t.name: t for t in load_graph(session.bundle.path / graph).graph.initializer}
    names = [f"kv.{i}.{kind}.scale" for i in range(session.n_layer) for kind in ("key", "value")]
    return [numpy_helper.to_array(stored[name]) for name in names]


def contents(session: Session, cache: KVCache) -> Iterator[npt.NDArray[np.float32]]:
    """Keys and values as numbers, [n_kv_head, T, head_dim] each."""
    integers = cache.buffers[0].numpy().dtype == np.int8
    for i, tensor in enumerate(cache.tensors()):
        yield tensor * scales_of(session)[i][0] if integers else tensor


def spread(a: Iterator[npt.NDArray[Any]], b: Iterator[npt.NDArray[Any]]) -> list[float]:
    """Of each tensor, the root mean square of the difference as a part of the second's."""
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True)]


def test_bundle_says_what_it_keeps(pair: tuple[Session, Session]) -> None:
    plain, small = (s.bundle for s in pair)
    verify(small)
    assert (plain.kv, small.kv) == ("float32", "int8")
    assert plain.kv_bytes_per_token == 4 * 3 * 2 * 2 * 16
    assert small.kv_bytes_per_token == 3 * 2 * 2 * 16
    for session in pair:
        assert session.new_cache().bytes_per_token == session.bundle.kv_bytes_per_token


def test_scales_are_what_the_text_needs(pair: tuple[Session, Session], text: Path) -> None:
    """For values exactly; for keys between a channel's largest and its pair's; the same in both graphs."""
    plain, small = pair
    for mine, prompts in zip(scales_of(small), scales_of(small, PREFILL), strict=True):
        np.testing.assert_array_equal(mine, prompts)
        assert mine.shape == (1, 2, 1, 16)
    if "weight" not in str(small.bundle.path):  # others draw other windows, or as many of them
        return
    largest = np.zeros((6, 2, 16))
    for ids in text_windows(text, plain.bundle, smooth.WINDOWS, smooth.WINDOW, seed=0):
        cache = plain.new_cache()
        plain.run(ids.tolist(), cache)
        largest = np.maximum(largest, [np.abs(t).max(1) for t in cache.tensors()])
    scales = 127 * np.concatenate(scales_of(small))[:, :, 0]
    np.testing.assert_allclose(scales[1::2], largest[1::2], rtol=1e-4)
    first, second = np.split(largest[::2], 2, -1)
    np.testing.assert_array_equal(*np.split(scales[::2], 2, -1))
    assert (scales[::2] >= 0.9999 * largest[::2]).all()
    assert (scales[::2, :, :8] <= 1.0001 * np.hypot(first, second)).all()


def test_keys_fit_at_every_position(pair: tuple[Session, Session]) -> None:
    """Those of the first layer depend on token and position alone: what was seen at one place fits at all others."""
    _, small = pair
    cache = small.new_cache()
    small.run([i for i in ids_of(small, 60) for _ in range(4)], cache)
    assert np.abs(next(cache.tensors()).astype(int)).max() <= 127
    keys = next(contents(small, cache)) / scales_of(small)[0][0]
    assert np.mean(np.abs(keys) >= 127) < 2e-3


def test_keys_and_values_stay_close(pair: tuple[Session, Session]) -> None:
    plain, small = pair
    caches = plain.new_cache(), small.new_cache()
    for session, cache in zip(pair, caches, strict=True):
        session.run(ids_of(session, 200), cache)
    got = spread(contents(small, caches[1]), contents(plain, caches[0]))
    assert all(0 < g < 0.2 for g in got)
    assert max(got[:2]) < 0.01  # the first layer's reads nothing rounded before


def test_both_graphs_fill_one_cache(pair: tuple[Session, Session]) -> None:
    """A prompt read by the graph for prompts, in chunks, is near the one of the float cache; text goes on from it."""
    plain, small = pair
    ids = ids_of(small, 280)
    read, own, floats = small.new_cache(), small.new_cache(), plain.new_cache()
    small.prefill(ids, read)
    assert "_prompt_graph" in vars(small)
    small.run(ids, own)
    plain.prefill(ids, floats)
    assert read.buffers[0].numpy().dtype == np.int8
    assert max(spread(contents(small, read), contents(plain, floats))) < 0.1
    assert max(spread(contents(small, read), contents(small, own))) < (
        0.15 if "weight" in str(small.bundle.path) else 1
    )
    small.prefill(ids_of(small, 70), short := small.new_cache())
    before = [t[:, :69].copy() for t in short.tensors()]
    short.truncate(69)
    small.prefill(ids[69:180], short)
    for mine, kept in zip(short.tensors(), before, strict=True):
        np.testing.assert_array_equal(mine[:, :69], kept)  # rounding again what was rounded changes nothing


def test_what_is_judged_attends_to_what_was_rounded(pair: tuple[Session, Session]) -> None:
    """Evaluation runs windows in large pieces: no key may be read there that single steps would read rounded."""
    plain, small = pair
    ids = ids_of(small, 120)
    together = small.run(ids, small.new_cache(), every_row=True)
    cache = small.new_cache()
    singly = np.concatenate([small.run([i], cache) for i in ids])
    floats = plain.run(ids, plain.new_cache(), every_row=True)
    quiet = np.abs(together - singly).mean()
    assert np.abs(together - floats).mean() > (50 if "weight" in str(small.bundle.path) else 1) * quiet
    judged = evaluate(small, ids * 2, reference=plain, context=120).kl_divergence
    assert judged is not None
    p, q = (log_softmax(rows[60:119]) for rows in (floats, together))
    np.testing.assert_allclose(judged["mean"], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=0.05)
    assert 0 < judged["mean"] < 1.0  # the weights are random and the logits wide


def test_same_bytes_twice_and_from_own_text(tiny_bundle: Path, small_cache_bundle: Path, tmp_path: Path) -> None:
    recipe = small_cache_bundle.name.removesuffix("-kv")
    quantize(tiny_bundle, tmp_path / "again", recipe=recipe, kv="int8")
    for file in small_cache_bundle.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_values_beyond_the_scales_are_cut_off(
    tiny_bundle: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_LARGEST", 400)  # scales are too small
    quantize(tiny_bundle, tmp_path / "b", recipe="int8-weight", prefill="int8", kv="int8", calibration=text, threads=1)
    session = Session(open_bundle(tmp_path / "b"), threads=1)
    for read in (session.run, session.prefill):
        cache = session.new_cache()
        read(ids_of(session, 90), cache)
        first = np.stack(list(cache.tensors()))[0].astype(int)
        assert first.max() == 127
        assert first.min() <= -127
        assert np.mean(np.abs(first) >= 127) > 0.02


def test_chats_fork_and_edit(float_small_cache_bundle: Path) -> None:
    with gptedge.load(float_small_cache_bundle, threads=1) as model:
        chat = model.chat(max_tokens=12)
        for question in ("one", "two"):
            chat.send(question)
        twin = chat.fork()
        twin.edit(2, "three")
        fresh = twin.fork()
        fresh._cache.truncate(0)
        results = [read_to_end(each.regenerate()) for each in (twin, fresh)]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].timings.cached_tokens > results[1].timings.cached_tokens == 0
        twin = chat.fork()
        assert twin.send("four").token_ids == chat.send("four").token_ids


def test_attention_maps_are_of_the_rounded_keys(pair: tuple[Session, Session]) -> None:
    ids = ids_of(pair[0], 60)
    plain, small = (explain_bundle.attention(s.bundle, ids, threads=1) for s in pair)
    assert plain[0] is not None
    assert small[0] is not None, small[1]
    assert 1e-6 < np.abs(plain[0] - small[0]).mean() < 0.01


def test_command_and_inspect(tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "int4-rtn", "--kv", "int8", "--calibration", text)
    made = run_json(capsys, "quantize", tiny_bundle, tmp_path / "small", *options)
    assert (made["kv"], made["kv_bytes_per_token"]) == ("int8", 192)
    shown = run_json(capsys, "inspect", tmp_path / "small")
    assert (shown["kv"], shown["kv_bytes_per_token"]) == ("int8", 192)
    shown = run_json(capsys, "inspect", tiny_bundle)
    assert (shown["kv"], shown["kv_bytes_per_token"]) == ("float32", 768)
    code, out, _ = run(capsys, "inspect", tmp_path / "small")
    assert code == 0
    assert [line.split() for line in out.splitlines() if line.startswith("kv")] == [
        ["kv", "int8"],
        ["kv_bytes_per_token", "192"],
    ]
    code, out, _ = run(capsys, "quantize", tiny_bundle, tmp_path / "again", *options)
    assert "keys and values in int8 (192 bytes a token)" in out
    code, _, err = run(capsys, "quantize", tiny_bundle, tmp_path / "c", "--kv", "int4")
    assert code == 2
    assert "kv is 'int4'; it must be one of int8" in err


def test_what_cannot_have_it(portable_bundle: Path, float_small_cache_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is quantized already \(int8-weight, kv int8\)"):
        quantize(float_small_cache_bundle, tmp_path / "out", recipe="int8", kv="int8")
    with pytest.raises(UsageError, match=r"another kind \(portable\); export the model without --portable"):
        quantize(portable_bundle, tmp_path / "out", recipe="int8", kv="int8")
    assert list(tmp_path.iterdir()) == []


def test_keys_that_are_not_finite(tiny_bundle: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tensors = KVCache.tensors
    monkeypatch.setattr(KVCache, "tensors", lambda self: (t * np.float32(np.nan) for t in tensors(self)))
    with pytest.raises(DataError, match=r"past_key_values\.0\.key is not finite on the calibration text"):
        quantize(tiny_bundle, tmp_path / "out", recipe="int8-weight", kv="int8", calibration=text)
    assert list(tmp_path.iterdir()) == []

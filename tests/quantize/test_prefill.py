"""The graph for prompts: the same keys and values as the bundle's own, from 8-bit products, and when it is used."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto

from gptedge import load
from gptedge.bundle import PREFILL, PREFILL_DATA, open_bundle, signed
from gptedge.errors import BundleError, UsageError
from gptedge.evaluate.divergence import evaluate
from gptedge.onnx_file import load_graph
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.session import PREFILL_AT_LEAST, PREFILL_CHUNK, RERUN, Session
from tests.conftest import TEXT

LONG = 3 * PREFILL_AT_LEAST


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=["int4-rtn", "int8-block", "int8-weight"])
def prompted(request: pytest.FixtureRequest, tiny_bundle: Path, text: Path) -> Path:
    out = tiny_bundle.parent / f"{request.param}-prefill"
    return quantize(tiny_bundle, out, recipe=request.param, prefill="int8", calibration=text, threads=1).bundle


def random_ids(session: Session, n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, session.vocab_size - 3, n).tolist()


def contents(cache: KVCache) -> npt.NDArray[np.float32]:
    """Keys and values of all layers, one after the other along the first axis."""
    return np.concatenate([b.numpy()[0, :, : len(cache)] for b in cache.buffers])


def difference(session: Session, n: int) -> float:
    """How far the keys and values of n tokens are from the bundle's own graph's, as a part of their spread."""
    ids = random_ids(session, n)
    own, fast = session.new_cache(), session.new_cache()
    for start in range(0, n, PREFILL_CHUNK):
        session.run(ids[start : start + PREFILL_CHUNK], own)
    session.prefill(ids, fast)
    assert own.ids == fast.ids == ids
    return float(np.sqrt(np.mean((contents(fast) - contents(own)) ** 2)) / contents(own).std())


def test_keys_and_values_are_those_of_the_float_graph(tiny_bundle: Path, prompted: Path) -> None:
    """Also where the bundle's own are further from them: its weights have 4 bits, the prompts' graph has 8."""
    float_session, session = Session(open_bundle(tiny_bundle), threads=1), Session(open_bundle(prompted), threads=1)
    ids = random_ids(session, LONG)
    exact, own, fast = float_session.new_cache(), session.new_cache(), session.new_cache()
    float_session.run(ids, exact)
    session.run(ids, own)
    session.prefill(ids, fast)

    def error(cache: KVCache) -> float:
        """Of all but the last token, which is the own graph's, where recipes have scaled channels scaled back."""
        wanted, got = contents(exact)[:, :-1], contents(cache)[:, :-1]
        factors = (got * wanted).sum(1, keepdims=True) / np.square(got).sum(1, keepdims=True)
        return float(np.sqrt(np.mean((got * factors - wanted) ** 2)) / wanted.std())

    assert 0 < error(fast) < 0.05
    assert "int4" not in prompted.name or error(own) > 2 * error(fast)


def test_values_keep_their_channels(prompted: Path) -> None:
    """Both graphs fill one cache: smoothing the prompts' graph must not move factors into what it holds."""
    session = Session(open_bundle(prompted), threads=1)
    ids, own, fast = random_ids(session, LONG), session.new_cache(), session.new_cache()
    session.run(ids, own)
    session.prefill(ids, fast)
    got, wanted = contents(fast)[:, :-1], contents(own)[:, :-1]
    factors = (got * wanted).sum(1) / np.square(wanted).sum(1)
    assert np.abs(factors - 1).max() < (0.25 if "int4" in prompted.name else 0.03)


@pytest.mark.parametrize("rows", ["*.gate_up.weight", "*.down.weight", "*.mlp.*", "*.attn.*"])
def test_a_recipe_may_multiply_some_integers_itself(rows: str, tiny_bundle: Path, text: Path, tmp_path: Path) -> None:
    """Those products too are the prompts' own, whose activations are smoothed in another way."""
    groups = (("embed.weight", 8, 32), (rows, 8, 0), ("*", 4, 32))
    recipe = tmp_path / "some.toml"
    recipe.write_text(
        "".join(f"[[group]]\nmatch='{m}'\nbits={b}\nblock_size={n}\nsymmetric=true\n" for m, b, n in groups)
    )
    out = quantize(
        tiny_bundle, tmp_path / "out", recipe=str(recipe), prefill="int8", calibration=text, threads=1
    ).bundle
    graph = load_graph(out / PREFILL).graph
    read = {n.input[1] for n in graph.node if n.op_type == "MatMulIntegerToFloat"}
    assert read
    assert all(".prefill." in name for name in read)
    test_keys_and_values_are_those_of_the_float_graph(tiny_bundle, out)


def test_when_it_is_used(prompted: Path) -> None:
    """From a length on that is the same each time; a short prompt never opens the second graph."""
    session = Session(open_bundle(prompted), threads=1)
    assert difference(session, PREFILL_AT_LEAST) == 0
    assert "_prompt_graph" not in vars(session)
    assert difference(session, PREFILL_AT_LEAST + 1) > 0
    assert difference(session, PREFILL_CHUNK + 2) > 0


def test_opened_ahead_it_is_the_same(prompted: Path, tiny_bundle: Path) -> None:
    """While the other graph opens; a bundle without it, or one that is closed meanwhile, minds nothing."""
    later, ahead = (Session(open_bundle(prompted), threads=1, long_prompts=long) for long in (False, True))
    assert later._ahead is None
    ids = random_ids(ahead, LONG)
    logits = [session.prefill(ids, session.new_cache()) for session in (later, ahead)]
    np.testing.assert_array_equal(*logits)
    assert ahead._ahead is not None
    assert ahead._prompt_graph is ahead._ahead.result()[0]
    without = Session(open_bundle(tiny_bundle), threads=1, long_prompts=True)
    assert without._ahead is without._prompt_graph is None
    Session(open_bundle(prompted), threads=1, long_prompts=True).close()


@pytest.mark.parametrize("long_prompts", [False, True])
def test_its_weights_are_verified_before_their_first_use(
    prompted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_prompts: bool
) -> None:
    """Every time they are asked for, and no sooner: short prompts do without them."""
    folder = shutil.copytree(prompted, tmp_path / "bundle")
    data = bytearray((folder / PREFILL_DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / PREFILL_DATA).write_bytes(data)
    with pytest.raises(BundleError, match=PREFILL_DATA):  # a small one, at once
        Session(open_bundle(folder), threads=1)
    monkeypatch.setattr("gptedge.runtime.session._VERIFY_FIRST", 1)
    session = Session(open_bundle(folder), threads=1, long_prompts=long_prompts)
    session.prefill(random_ids(session, 8), session.new_cache())
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{PREFILL_DATA} is not the file"):
            session.prefill(random_ids(session, LONG), session.new_cache())


def test_the_last_tokens_are_the_own_graphs(prompted: Path) -> None:
    session = Session(open_bundle(prompted), threads=1)
    ids, cache = random_ids(session, LONG), session.new_cache()
    logits = session.prefill(ids, cache)
    cache.truncate(LONG - RERUN)
    np.testing.assert_array_equal(logits, session.run(ids[-RERUN:], cache)[0])


def test_it_can_be_stopped_and_closed(prompted: Path) -> None:
    session = Session(open_bundle(prompted), threads=1)
    stop = threading.Event()
    stop.set()
    cache = session.new_cache()
    assert session.prefill(random_ids(session, LONG), cache, stop=stop) is None
    assert len(cache) == 0
    session.close()


def test_files(tiny_bundle: Path, prompted: Path) -> None:
    """The table is not stored again, no logits are computed, and the recipe's own size is what it is without."""
    graph, bundle = load_graph(prompted / PREFILL), open_bundle(prompted)
    assert {o.name.partition(".")[0] for o in graph.graph.output} == {"present"}
    weights = [t for t in graph.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    elsewhere = [t.name for t in weights if t.external_data[0].value != PREFILL_DATA]
    assert {name.partition(".")[0] for name in elsewhere} <= {"embed"}
    layers = sum(
        np.prod(t.dims) for t in load_graph(tiny_bundle / "model.onnx").graph.initializer if "blocks." in t.name
    )
    assert (prompted / PREFILL_DATA).stat().st_size < 1.2 * layers
    assert bundle.manifest is not None
    assert bundle.manifest["prefill"] == "int8"
    assert PREFILL_DATA in bundle.manifest["files"]
    plain = prompted.parent / prompted.name.removesuffix("-prefill")
    if plain.exists():
        assert open_bundle(plain).size_bytes == bundle.size_bytes


def test_same_bytes_twice(tiny_bundle: Path, prompted: Path, text: Path, tmp_path: Path) -> None:
    recipe = prompted.name.removesuffix("-prefill")
    quantize(tiny_bundle, tmp_path / "again", recipe=recipe, prefill="int8", calibration=text, threads=1)
    for file in sorted(f.name for f in prompted.iterdir()):
        assert (tmp_path / "again" / file).read_bytes() == (prompted / file).read_bytes(), file


def test_without_calibration_text_the_model_writes_its_own(tiny_bundle: Path, tmp_path: Path) -> None:
    quantize(tiny_bundle, tmp_path / "out", recipe="int4-rtn", prefill="int8", threads=1)
    with load(tmp_path / "out", threads=1) as model:
        assert len(model.run(TEXT[:300], max_tokens=4).token_ids) == 4


def test_a_graph_of_integer_products_needs_none(tiny_bundle: Path, text: Path, tmp_path: Path) -> None:
    """It reads prompts by them itself; with a cache of 8 bits, another copy of it over the same weights attends."""
    make = partial(quantize, tiny_bundle, recipe="int8", prefill="int8", calibration=text, threads=1)
    alone = make(tmp_path / "alone")
    assert alone.prefill_mb == 0
    assert "prefill" not in (open_bundle(alone.bundle).manifest or {})
    assert not list(alone.bundle.glob("prefill*"))
    small = make(tmp_path / "kv", kv="int8")
    assert 0 < small.prefill_mb < 0.25 * small.size_mb  # graphs alone
    assert sorted(f.name for f in small.bundle.glob("prefill*")) == [PREFILL, signed(PREFILL)]
    session = Session(open_bundle(small.bundle), threads=1)
    ids = random_ids(session, LONG)
    own, fast = session.new_cache(), session.new_cache()
    session.run(ids, own)
    session.prefill(ids, fast)
    assert "_prompt_graph" in vars(session)
    steps = np.abs(contents(fast).astype(int) - contents(own).astype(int))
    first = own.buffers[0].numpy().shape[1] * 2
    assert steps[:first].max() <= 1
    assert steps.mean() < 2  # of 127: later layers have attended to keys before they were rounded


def test_unknown_prefill(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int4'; it must be one of int8"):
        quantize(tiny_bundle, tmp_path / "out", recipe="int8", prefill="int4")
    assert not (tmp_path / "out").exists()


def test_quality_is_the_own_graphs(tiny_bundle: Path, text: Path, prompted: Path) -> None:
    """So that a recipe is judged alike with and without a graph for prompts."""
    plain = prompted.parent / f"{prompted.name}-plain"
    quantize(tiny_bundle, plain, recipe=prompted.name.removesuffix("-prefill"), calibration=text, threads=1, force=True)
    ids = np.random.default_rng(3).integers(0, 330, 600).tolist()
    measured = []
    for bundle in (prompted, plain):
        session, reference = (Session(open_bundle(b), threads=1) for b in (bundle, tiny_bundle))
        measured.append(evaluate(session, ids, reference=reference, context=280))
        assert "_prompt_graph" not in vars(session)
        measured.append(evaluate(session, ids, reference=reference, context=280, prompts=True))
    own, as_prompts, plain_own, _ = (m.as_json() for m in measured)
    assert own == plain_own
    assert own["kl_divergence"] != as_prompts["kl_divergence"], "unless that graph is asked for"

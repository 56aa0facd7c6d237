"""Sessions and KV caches: growth, reuse, copies, limits, and bundles that are not what their manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptedge.bundle import CONFIG, GENAI_CONFIG, GRAPH, GRAPH_DATA, MANIFEST, open_bundle, verify
from gptedge.errors import BundleError, ContextOverflowError, UsageError
from gptedge.graph_io import FIRST_LOGIT
from gptedge.onnx_file import load_graph
from gptedge.quantize.quantizer import quantize
from gptedge.runtime import session as session_module
from gptedge.runtime.kv_cache import KVCache, room_for
from gptedge.runtime.onnx_runtime import choose_provider
from gptedge.runtime.session import RERUN, Session
from tests.conftest import TEXT

CACHES = {"shared": "tiny_bundle", "growing": "portable_bundle", "int8": "float_small_cache_bundle"}
"""One model, in a graph that appends to its cache in place, in one that gives longer tensors back, and in one that
keeps integers; by the kind of cache the bundle's fixture."""


@pytest.fixture(scope="module", params=CACHES)
def session(request: pytest.FixtureRequest) -> Session:
    opened = Session(open_bundle(request.getfixturevalue(CACHES[request.param])), threads=1)
    layout = opened.signature.cache
    assert (layout.shared, layout.dtype == np.int8) == (request.param != "growing", request.param == "int8")
    return opened


def ids_of(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(n).integers(0, 300, n)]


def test_cache_grows_without_changing_what_follows(session: Session) -> None:
    ids = ids_of(290)
    whole = session.run(ids, session.new_cache(), every_row=True)
    cache = session.new_cache()
    rows = [session.run(ids[i : i + 29], cache, every_row=True) for i in range(0, 290, 29)]
    assert len(cache) == 290
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-5 * whole.std())


@pytest.mark.parametrize("n", [2, 3, 40, 257, 258])
@pytest.mark.parametrize("recipe", ["int8", "int4-rtn"])
def test_a_prompt_that_is_in_the_cache_gives_the_same_logits(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, recipe: str, n: int
) -> None:
    """To the last bit, from which replies go on in other words: no prompt's last token is run alone."""
    out = tiny_bundle.parent / f"again-{recipe}"
    if not out.exists():
        text = tmp_path_factory.mktemp("again") / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        quantize(tiny_bundle, out, recipe=recipe, prefill="int8", calibration=text, threads=1)
    opened, ids = Session(open_bundle(out), threads=1), ids_of(n)
    cache = opened.new_cache()
    first = opened.prefill(ids, cache)
    kept = cache.keep_common_prefix(ids[:-RERUN])
    assert np.array_equal(opened.prefill(ids[kept:], cache), first)


def test_behind_the_last_attention_only_wanted_tokens_are_run(tiny_bundle: Path) -> None:
    """So the last token's logits are what they are among all, and a prompt's other tokens cost nothing there."""
    opened = Session(open_bundle(tiny_bundle), threads=1)
    ids = ids_of(70)
    every = opened.run(ids, opened.new_cache(), every_row=True)
    np.testing.assert_allclose(opened.run(ids, opened.new_cache()), every[-1:], atol=2e-5 * every.std())
    np.testing.assert_allclose(opened._rows(ids, opened.new_cache(), 20, 25), every[20:25], atol=2e-5 * every.std())
    graph = load_graph(tiny_bundle / GRAPH).graph
    cut = [node.name for node in graph.node if FIRST_LOGIT in node.input]
    behind = [node.name for node in graph.node].index(cut[-1])
    assert len(cut) == 2
    assert [n.op_type for n in graph.node[behind:]].count("FusedMatMul") >= 3


def test_long_texts_are_read_in_smaller_pieces(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores are there at once: n_head * tokens of a piece * tokens so far stay below a bound."""
    opened = Session(open_bundle(tiny_bundle), threads=1)
    n_head = opened.signature.n_head
    assert [len(p) for p in session_module._pieces(range(1000), 0, n_head)] == [256, 256, 256, 232]
    ids, least = ids_of(290), session_module._LEAST_CHUNK
    whole = opened.prefill(ids, opened.new_cache())
    monkeypatch.setattr(session_module, "_MOST_SCORES", n_head * 64 * 900)
    for past, length in ((0, 1000), (500, 3000)):
        sizes = [len(p) for p in session_module._pieces(range(length), past, n_head)]
        assert sum(sizes) == length
        assert all(n <= least or n * (past + end) <= 64 * 900 for n, end in zip(sizes, np.cumsum(sizes), strict=True))
    assert sizes[:2] == [64, 64]
    assert sizes[-2] == least
    monkeypatch.setattr(session_module, "_MOST_SCORES", 0)
    again = opened.prefill(ids, opened.new_cache())
    assert whole is not None
    assert again is not None
    np.testing.assert_allclose(again, whole, atol=1e-4 * whole.std())


def test_a_prompt_makes_room_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Session(open_bundle(tiny_bundle), threads=1)
    cache, resize, made = opened.new_cache(), KVCache._resize, list[int]()
    monkeypatch.setattr(KVCache, "_resize", lambda self, n, *a: (made.append(n), resize(self, n, *a)))
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 32)
    opened.prefill(ids_of(280), cache)
    opened.run([1], cache)
    assert made == [room_for(280, opened.context_length)]
    assert room_for(5000, 5100) == 5100
    assert room_for(8000, 1 << 20) == 10_000


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


@pytest.mark.parametrize("threads", [0, -1, 3000, 1.5, "2", True])
def test_threads_must_be_a_number_of_them(tiny_bundle: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match=rf"threads is {threads!r}; it must be a whole number from 1 to \d+"):
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


# ---- whose cache is which kind -------------------------------------------------------------------------------------


def changed(bundle: Path, at: Path, name: str, change: Callable[[dict], object]) -> Path:
    """A copy, one JSON file of which is changed, without the manifest that would notice."""
    shutil.copytree(bundle, at)
    (at / MANIFEST).unlink()
    value = json.loads((at / name).read_text())
    change(value)
    (at / name).write_text(json.dumps(value))
    return at


def test_what_genai_config_claims_of_a_graph_that_cannot(portable_bundle: Path, tmp_path: Path) -> None:
    def claim(config: dict) -> None:
        config["search"]["past_present_share_buffer"] = True

    claiming = Session(open_bundle(changed(portable_bundle, tmp_path / "b", GENAI_CONFIG, claim)), threads=1)
    assert not claiming.signature.cache.shared


@pytest.mark.parametrize("stated", [False, None])
def test_growing_is_the_safe_way_for_any_graph(tiny_bundle: Path, tmp_path: Path, stated: bool | None) -> None:
    def state(config: dict) -> None:
        config["search"]["past_present_share_buffer"] = stated

    growing = Session(open_bundle(changed(tiny_bundle, tmp_path / "b", GENAI_CONFIG, state)), threads=1)
    sharing = Session(open_bundle(tiny_bundle), threads=1)
    assert (growing.signature.cache.shared, sharing.signature.cache.shared) == (False, True)
    rows = []
    for session in (growing, sharing):
        cache = session.new_cache()
        rows.append([session.run(ids, cache)[0] for ids in (ids_of(40), [7], ids_of(9))])
    np.testing.assert_allclose(rows[0], rows[1], atol=2e-5 * np.std(rows[1]))


def test_forked_growing_caches_go_their_own_ways(portable_bundle: Path) -> None:
    session = Session(open_bundle(portable_bundle), threads=1)
    cache = session.new_cache()
    session.run(ids_of(40), cache)
    twin = cache.copy()
    twin.truncate(25)
    session.run([3, 4], twin)
    again, fresh = session.run([9], cache), session.new_cache()
    session.run(ids_of(40), fresh)
    np.testing.assert_allclose(again, session.run([9], fresh), atol=1e-4)
    assert (cache.capacity, len(cache), twin.capacity, len(twin)) == (41, 41, 27, 27)
    assert cache.bytes_per_token == 3 * 2 * 2 * 16 * 4


# ---- graphs of other exporters -------------------------------------------------------------------------------------


def edited_graph(bundle: Path, at: Path, edit: Callable[[object], object]) -> Path:
    """A copy of a bundle whose graph is changed, with no genai_config.json and no manifest."""
    from gptedge.onnx_file import load_graph, save_graph

    shutil.copytree(bundle, at)
    (at / MANIFEST).unlink()
    (at / GENAI_CONFIG).unlink()
    model = load_graph(at / GRAPH)
    edit(model)
    save_graph(at / GRAPH, model)
    return at


def leave_open(*axes: int) -> Callable[[object], None]:
    """Give symbols instead of sizes to these axes of the caches, and to the logits' width."""

    def edit(model: object) -> None:
        graph = model.graph  # type: ignore[attr-defined]
        for value in (*graph.input, *graph.output):
            shape = value.type.tensor_type.shape.dim
            for axis in axes if len(shape) == 4 else (2,) if len(shape) == 3 else ():
                shape[axis].dim_param = f"{value.name}.{axis}"

    return edit


def test_open_sizes_come_from_config_json(portable_bundle: Path, tmp_path: Path) -> None:
    opened = Session(open_bundle(edited_graph(portable_bundle, tmp_path / "b", leave_open(0, 1, 3))), threads=1)
    known = Session(open_bundle(portable_bundle), threads=1)
    assert opened.signature == known.signature
    np.testing.assert_array_equal(opened.run(ids_of(9), opened.new_cache()), known.run(ids_of(9), known.new_cache()))
    config = tmp_path / "b" / CONFIG
    value = json.loads(config.read_text())
    del value["head_dim"]
    config.write_text(json.dumps({**value, "hidden_size": 96}))  # 16 for each of 6 heads
    assert Session(open_bundle(tmp_path / "b"), threads=1).signature.cache.shapes[0][1] == 16
    del value["num_key_value_heads"]
    config.write_text(json.dumps({**value, "num_attention_heads": None}))
    with pytest.raises(BundleError, match=r"leaves axis 1 of past_key_values\.0\.key open, .* no num_key_value_heads"):
        Session(open_bundle(tmp_path / "b"), threads=1)


def test_context_length_by_other_names(portable_bundle: Path, tmp_path: Path) -> None:
    bundle = edited_graph(portable_bundle, tmp_path / "b", lambda model: None)
    value = json.loads((bundle / CONFIG).read_text())
    del value["max_position_embeddings"]
    for name in ("n_positions", "max_seq_len", "seq_length"):
        (bundle / CONFIG).write_text(json.dumps({**value, name: 77}))
        assert Session(open_bundle(bundle), threads=1).context_length == 77
    (bundle / CONFIG).write_text(json.dumps(value))
    with pytest.raises(BundleError, match=r"how long its context is; add max_position_embeddings to config\.json"):
        Session(open_bundle(bundle), threads=1)


def add_input(model: object) -> None:
    from onnx import TensorProto, helper

    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))  # type: ignore[attr-defined]


def test_input_that_nobody_knows(portable_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="asks for the input use_cache_branch, which gptedge does not know"):
        Session(open_bundle(edited_graph(portable_bundle, tmp_path / "b", add_input)), threads=1)


def test_half_precision_caches(tiny_bundle: Path, portable_bundle: Path, tmp_path: Path) -> None:
    """Inputs and outputs in float16, as graphs made for CUDA have them; casts stand between them and the rest."""
    from onnx import TensorProto, helper

    def edit(model: object) -> None:
        graph = model.graph  # type: ignore[attr-defined]
        casts = []
        for value in (*graph.input, *graph.output):
            if not value.name.startswith(("past_key_values", "present")):
                continue
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            wide, is_past = f"{value.name}.wide", value.name.startswith("past")
            for node in graph.node:
                for names in (node.input, node.output):
                    names[:] = [wide if n == value.name else n for n in names]
            ends = (value.name, wide) if is_past else (wide, value.name)
            to = TensorProto.FLOAT if is_past else TensorProto.FLOAT16
            casts.append((is_past, helper.make_node("Cast", [ends[0]], [ends[1]], name=f"cast.{value.name}", to=to)))
        nodes = [c for first, c in casts if first] + list(graph.node) + [c for first, c in casts if not first]
        del graph.node[:]
        graph.node.extend(nodes)

    half = Session(open_bundle(edited_graph(portable_bundle, tmp_path / "b", edit)), threads=1)
    whole = Session(open_bundle(portable_bundle), threads=1)
    caches = half.new_cache(), whole.new_cache()
    assert caches[0].bytes_per_token * 2 == caches[1].bytes_per_token
    for ids in (ids_of(30), [5], ids_of(8)):
        got, expected = half.run(ids, caches[0], every_row=True), whole.run(ids, caches[1], every_row=True)
        assert np.abs(got - expected).max() < 2e-2 * expected.std()
    caches[0].truncate(10)
    assert half.run([4], caches[0]).dtype == np.float32


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


PLACES = ("/etc/hostname", "../outside.data", "sub/../../outside.data")


@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_the_bundle(tiny_bundle: Path, tmp_path: Path, place: str) -> None:
    """A graph may not point at files elsewhere, not even at ones that are there and long enough."""
    shutil.copyfile(tiny_bundle / GRAPH_DATA, tmp_path / "outside.data")

    def edit(model: object) -> None:
        for tensor in model.graph.initializer:  # type: ignore[attr-defined]
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    with pytest.raises(BundleError) as caught:
        Session(open_bundle(edited_graph(tiny_bundle, tmp_path / "b", edit)), threads=1)
    assert "cannot be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_behind_a_link(tiny_bundle: Path, tmp_path: Path) -> None:
    """A link out of the bundle is refused too, unless graph and weights are both links to one place, as in a cache."""
    for name in ("b", "cache", "elsewhere"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    (tmp_path / "b" / GRAPH_DATA).unlink()
    (tmp_path / "b" / GRAPH_DATA).symlink_to(tmp_path / "elsewhere" / GRAPH_DATA)
    with pytest.raises(BundleError, match="cannot be loaded"):
        Session(open_bundle(tmp_path / "b"), threads=1)
    for name in (GRAPH, GRAPH_DATA):
        (tmp_path / "cache" / name).unlink()
        (tmp_path / "cache" / name).symlink_to(tmp_path / "elsewhere" / name)
    Session(open_bundle(tmp_path / "cache"), threads=1)


def test_graph_that_is_no_decoder(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / MANIFEST).unlink()
    (copy / "model.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(BundleError, match="cannot be loaded"):
        Session(open_bundle(copy), threads=1)

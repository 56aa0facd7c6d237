"""LoRA adapters beside a running bundle: what they compute, swapping them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

import gptedge
from gptedge.bundle import MANIFEST
from gptedge.checkpoint import open_checkpoint
from gptedge.errors import BundleError, CheckpointError, OutputExistsError, UsageError
from gptedge.export.adapter import make_adapter
from gptedge.export.exporter import export
from gptedge.quantize.quantizer import quantize
from tests.adapters import write_random
from tests.export.test_decoder import random_model
from tests.logits import ids_of

# Interleaved heads, transposed matrices, dimensions in another order, no gate, biases, norms of heads.
FAMILIES = ("llama untied, biased", "phi3", "gpt_neox, a quarter of a small head rotates", "gpt2", "qwen3")


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_computes_what_the_merged_model_does(name: str, portable: bool, tmp_path: Path) -> None:
    random_model(name, tmp_path / "base")
    source = write_random(open_checkpoint(tmp_path / "base"), tmp_path / "adapter", seed=0)
    export(tmp_path / "base", tmp_path / "bundle", lora_inputs=True, portable=portable, verify=False)
    export(tmp_path / "adapter-merged", tmp_path / "merged", verify=False)
    result = make_adapter(source, tmp_path / "bundle", tmp_path / "a.onnx_adapter")
    assert result.base_checked
    ids = ids_of(30)
    with gptedge.load(tmp_path / "bundle") as model, gptedge.load(tmp_path / "merged") as merged:
        plain, cache = model.session.new_cache(), model.session.new_cache()
        cache.use(model.load_adapter(tmp_path / "a.onnx_adapter"))
        expected = merged.session.run(ids, merged.session.new_cache(), every_row=True)
        got = np.concatenate(
            [model.session.run(part, cache, every_row=True) for part in (ids[:20], ids[20:21], ids[21:])]
        )
        assert np.abs(got - expected).max() <= 1e-3 * expected.std()
        assert np.abs(model.session.run(ids, plain, every_row=True) - expected).max() > 0.1 * expected.std()


def test_without_an_adapter_nothing_changes(adapted: Path, tiny_bundle: Path) -> None:
    with gptedge.load(adapted / "bundle") as model, gptedge.load(tiny_bundle) as plain:
        ids = [i % 300 for i in ids_of(40)]
        got, expected = (m.session.run(ids, m.session.new_cache(), every_row=True) for m in (model, plain))
        np.testing.assert_allclose(got, expected, atol=1e-5 * expected.std())


def test_adapters_are_swapped_while_running(adapted: Path) -> None:
    texts = {}
    for name in "ab":
        with gptedge.load(adapted / f"{name}-bundle") as merged:
            texts[name] = merged.generate("The quick", max_tokens=20)
    with gptedge.load(adapted / "bundle") as model:
        plain = model.generate("The quick", max_tokens=20)
        adapters = {name: model.load_adapter(adapted / f"{name}.onnx_adapter") for name in "ab"}
        model.adapter = adapters["a"]
        under_way = model.stream("The quick", max_tokens=20)
        next(under_way)
        model.adapter = adapters["b"]
        assert model.generate("The quick", max_tokens=20) == texts["b"]
        for _ in under_way:
            pass
        assert under_way.result.text == texts["a"]
        model.adapter = None
        assert model.generate("The quick", max_tokens=20) == plain
    assert len({plain, *texts.values()}) == 3


def test_only_a_loaded_adapter_can_be_assigned(adapted: Path) -> None:
    file: Any = adapted / "a.onnx_adapter"
    with gptedge.load(adapted / "bundle") as model:
        with pytest.raises(gptedge.UsageError, match=r"adapter is .*give what load_adapter returned, or None"):
            model.adapter = file
        assert model.adapter is None
        assert repr(model.load_adapter(file)) == f"Adapter(path={file!r})"


def test_a_chat_forgets_what_another_adapter_made(adapted: Path) -> None:
    with gptedge.load(adapted / "bundle") as model, gptedge.load(adapted / "a-bundle") as merged:
        chat, fresh = model.chat(max_tokens=12), merged.chat(max_tokens=12)
        first = chat.send("over the lazy dog")
        model.adapter = model.load_adapter(adapted / "a.onnx_adapter")
        with chat.regenerate() as stream:
            for _ in stream:
                pass
        assert stream.result.timings.cached_tokens == 0
        assert stream.result.text == fresh.send("over the lazy dog").text != first.text
        twin = chat.fork()
        assert twin.send("more").timings.cached_tokens > 0


@pytest.mark.parametrize(("recipe", "prefill"), [("int4-rtn", "int8"), ("int4", None), ("int8", None)])
def test_quantized_bundles_take_adapters_too(recipe: str, prefill: str | None, adapted: Path, tmp_path: Path) -> None:
    quantize(adapted / "bundle", tmp_path / "small", recipe=recipe, prefill=prefill)
    ids = [i % 300 for i in ids_of(30)]
    with gptedge.load(tmp_path / "small") as model, gptedge.load(adapted / "a-bundle") as merged:
        cache = model.session.new_cache()
        cache.use(model.load_adapter(adapted / "a.onnx_adapter"))
        expected = merged.session.run(ids, merged.session.new_cache(), every_row=True)
        got, plain = (model.session.run(ids, c, every_row=True) for c in (cache, model.session.new_cache()))
        assert np.abs(got - expected).mean() < 0.6 * np.abs(plain - expected).mean()
        cache.use(None)
        model.session.prefill(ids * 4, cache)
        model.adapter = model.load_adapter(adapted / "a.onnx_adapter")
        assert model.generate("The quick brown fox " * 20, max_tokens=2)


def test_onnxruntime_binds_it_by_itself(adapted: Path) -> None:
    """The file is onnxruntime's own: a program that knows nothing of us loads it as its documentation says."""
    session = onnxruntime.InferenceSession(adapted / "bundle" / "model.onnx", providers=["CPUExecutionProvider"])
    assert not [i.name for i in session.get_inputs() if "lora" in i.name]
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(adapted / "a.onnx_adapter"))
    options.add_active_adapter(adapter)
    ids = [i % 300 for i in ids_of(10)]
    feeds = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if "past" in i.name
    }
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 10), np.int64)}
    [logits] = session.run(["logits"], feeds, options)
    with gptedge.load(adapted / "a-bundle") as merged:
        expected = merged.session.run(ids, merged.session.new_cache(), every_row=True)
    assert np.abs(logits[0] - expected).max() <= 1e-3 * expected.std()


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_bundles_that_take_none(adapted: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no adapters; export the model with --lora-inputs"):
        make_adapter(adapted / "a", tiny_bundle, tmp_path / "x")
    with (
        gptedge.load(tiny_bundle) as model,
        pytest.raises(UsageError, match="takes no adapters; export the model with --lora-inputs"),
    ):
        model.load_adapter(adapted / "a.onnx_adapter")


def test_adapters_of_other_weights(adapted: Path, tmp_path: Path) -> None:
    export(adapted / "a-merged", tmp_path / "other", lora_inputs=True, verify=False)
    with pytest.raises(CheckpointError, match="was trained on other weights than"):
        make_adapter(adapted / "b", tmp_path / "other", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with (
        gptedge.load(tmp_path / "other") as model,
        pytest.raises(BundleError, match="was made for another model than"),
    ):
        model.load_adapter(adapted / "b.onnx_adapter")


def test_an_existing_file_is_kept(adapted: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        make_adapter(adapted / "a", adapted / "bundle", adapted / "b.onnx_adapter")
    before = (adapted / "a.onnx_adapter").read_bytes()
    make_adapter(adapted / "a", adapted / "bundle", adapted / "a.onnx_adapter", force=True)
    assert (adapted / "a.onnx_adapter").read_bytes() == before


def test_files_that_are_no_adapters(adapted: Path, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 99)
    (tmp_path / "cut").write_bytes((adapted / "a.onnx_adapter").read_bytes()[:-999])
    with gptedge.load(adapted / "bundle") as model:
        for name in ("junk", "cut"):
            with pytest.raises(BundleError, match=f"{name} is not an adapter that onnxruntime reads|{name} holds"):
                model.load_adapter(tmp_path / name)
        with pytest.raises(UsageError, match="make a file of it with gptedge adapter"):
            model.load_adapter(adapted / "a")
        with pytest.raises(UsageError, match="does not exist"):
            model.load_adapter(tmp_path / "none")


@pytest.mark.parametrize("change", ["name", "shape", "rank"])
def test_parameters_that_do_not_fit(change: str, adapted: Path, tmp_path: Path) -> None:
    file = onnxruntime.AdapterFormat.read_adapter(str(adapted / "a.onnx_adapter"))
    arrays = {name: value.numpy() for name, value in file.get_parameters().items()}
    name = "blocks.0.attn.o.lora_a"
    array = arrays.pop(name)
    arrays |= {"name": {"logits": array}, "shape": {name: array[1:]}, "rank": {name: array[:, 1:]}}[change]
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(file.get_model_version())
    held = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
    made.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in held.items()})
    made.export_adapter(str(tmp_path / "x"))
    with gptedge.load(adapted / "bundle") as model, pytest.raises(BundleError, match=r"holds .*(take|rank)"):
        model.load_adapter(tmp_path / "x")


def test_the_manifest_says_what_it_takes(adapted: Path) -> None:
    manifest = json.loads((adapted / "bundle" / MANIFEST).read_text())
    assert set(manifest["lora"]) == {"base"}
    assert len(manifest["lora"]["base"]) == 64


def test_batches_and_saved_chats_keep_to_their_adapter(adapted: Path, tmp_path: Path) -> None:
    model = gptedge.load(adapted / "bundle", threads=1)
    one, other = (model.load_adapter(adapted / f"{name}.onnx_adapter") for name in "ab")
    plain = model.run(["The quick", "fox"], max_tokens=8)
    model.adapter = one
    alone = [model.run(p, max_tokens=8).token_ids for p in ("The quick", "fox")]
    assert [r.token_ids for r in model.run(["The quick", "fox"], max_tokens=8)] == alone
    assert [r.token_ids for r in plain] != alone
    chat = model.chat(max_tokens=8)
    chat.send("The quick")
    chat.save_cache(tmp_path / "chat.kv")
    assert model.chat(cache=tmp_path / "chat.kv").send("And?").timings.cached_tokens > 5
    for adapter in (None, other):
        model.adapter = adapter
        with pytest.raises(gptedge.DataError, match="saved with another adapter"):
            model.chat(cache=tmp_path / "chat.kv")


def test_a_full_disk_is_told_from_onnxruntimes_other_failures(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says in which line of its own source it failed to write, and not why."""

    @contextmanager
    def nowhere(path: Path) -> Iterator[Path]:
        yield tmp_path / "nowhere" / path.name

    def make() -> None:
        make_adapter(adapted / "a", adapted / "bundle", tmp_path / "a.onnx_adapter")

    monkeypatch.setattr("gptedge.export.adapter.new_file", nowhere)
    for free, error in ((1 << 40, RuntimeError), (0, OSError)):
        monkeypatch.setattr(
            "gptedge.export.adapter.shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        with pytest.raises(error):
            make()

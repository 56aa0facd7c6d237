"""Reports: the numbers against plain computations of the same, what is refused, and a page that needs nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from gptedge.bundle import open_bundle
from gptedge.errors import BundleError, DataError, UsageError
from gptedge.evaluate.divergence import score
from gptedge.loading import load
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.report import (
    ReportData,
    choose_reference,
    collect,
    differences,
    find,
)
from gptedge.quantize.report_page import page
from gptedge.quantize.report_runs import read_run
from gptedge.quantize.report_weights import WeightError, _error, weight_errors
from tests.conftest import TEXT

# ---- numbers -------------------------------------------------------------------------------------------------------


def test_every_bundle_and_run_is_measured(measured: ReportData, bundles: Path) -> None:
    assert [b.name for b in measured.bundles] == ["a & <b>", "int4-rtn", "int8-weight"]
    assert [b.is_reference for b in measured.bundles] == [True, False, False]
    assert measured.reference == "a & <b>"
    assert measured.tokens == 4 * 31
    for bundle in measured.bundles:
        assert bundle.size_mb == round(open_bundle(bundles / bundle.name).size_bytes / 1e6, 2)
        assert bundle.decode_tokens_per_s > 0
    by_name = {b.name: b for b in measured.bundles}
    assert by_name["int8-weight"].kl_divergence is not None
    assert by_name["int4-rtn"].kl_divergence is not None
    assert 0 < by_name["int8-weight"].kl_divergence["mean"] < by_name["int4-rtn"].kl_divergence["mean"]
    assert [run.name for run in measured.runs] == ["run"]


def plain_weight(graph: onnx.GraphProto, name: str, bits: int, width: int) -> np.ndarray:
    """Written out from the description of MatMulNBits, with none of the code that is tested."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    packed, scales = arrays[f"{name}.packed"], arrays[f"{name}.scales"].astype(np.float64)
    if f"{name}.units" in arrays:
        scales *= arrays[f"{name}.units"].astype(np.float64)
    rows, blocks = scales.shape
    values = np.zeros((rows, blocks, packed.shape[2] * 8 // bits))
    for i in range(values.shape[2]):
        values[:, :, i] = packed[:, :, i] if bits == 8 else packed[:, :, i // 2] >> (4 * (i % 2)) & 15
    zero = np.full((rows, blocks), 2 ** (bits - 1))
    if f"{name}.zero_points" in arrays:
        points = arrays[f"{name}.zero_points"]
        for b in range(blocks):
            zero[:, b] = points[:, b // 2] >> (4 * (b % 2)) & 15
    return ((values - zero[:, :, None]) * scales[:, :, None]).reshape(rows, -1)[:, :width]


FOUR_BITS = """
[[group]]
match = "embed.weight"
bits = 8
block_size = 64
symmetric = true
[[group]]
match = "*"
bits = 4
block_size = 32
"""


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_errors_against_a_plain_computation(bundles: Path, tmp_path: Path, bits: int) -> None:
    (tmp_path / "four.toml").write_text(FOUR_BITS)  # without scales that were moved
    recipe = "int8-weight" if bits == 8 else str(tmp_path / "four.toml")
    quantize(bundles / "a & <b>", tmp_path / "out", recipe=recipe, threads=1)
    got = {w.name: w for w in weight_errors(tmp_path / "out", bundles / "a & <b>")}
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    originals = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(bundles / "a & <b>" / "model.onnx").graph.initializer
    }
    assert len(got) == 3 * 4 + 1
    for name, weight in got.items():
        w = originals[name].astype(np.float64)
        own_bits = 8 if name == "embed.weight" else bits
        expected = np.linalg.norm(plain_weight(graph, name, own_bits, w.shape[1]) - w) / np.linalg.norm(w)
        assert weight.error == pytest.approx(expected, rel=1e-4), name
    first = got["blocks.0.attn.qkv.weight"]
    assert (first.layer, first.kind, first.stored) == (
        0,
        "attn.qkv",
        f"{bits}-bit, blocks of {32 if bits == 4 else 64}",
    )
    assert (got["embed.weight"].layer, got["embed.weight"].kind) == (None, "embed")


def test_half_precision_has_an_error_too(tiny_checkpoint: Path, bundles: Path, tmp_path: Path) -> None:
    from gptedge.export.exporter import export

    half = export(tiny_checkpoint, tmp_path / "half", dtype="fp16").bundle
    errors = weight_errors(half, bundles / "a & <b>")
    assert {w.stored for w in errors} == {"float16"}
    assert all(w.error is not None and 1e-5 < w.error < 1e-3 for w in errors)
    small = quantize(half, tmp_path / "small", recipe="int8-weight", threads=1).bundle
    for reference in (half, bundles / "a & <b>"):
        assert all(w.error is not None and 1e-3 < w.error < 1e-2 for w in weight_errors(small, reference))


def rows_of(values: np.ndarray) -> Any:
    return SimpleNamespace(shape=values.shape, label="", rows=lambda a, b: values[a:b].astype(np.float32))


def test_scales_that_were_moved_do_not_count() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((96, 84))
    noisy = w + 0.1 * rng.standard_normal(w.shape)
    plain, rescaled = _error(rows_of(noisy), rows_of(w))
    assert plain == pytest.approx(0.1, rel=0.05)
    assert not rescaled
    columns, rows = np.exp(rng.uniform(-0.25, 0.25, 84)), np.exp(rng.uniform(-0.25, 0.25, (96, 1)))
    some_rows = np.where(np.arange(96)[:, None] < 80, 1, rows)  # as the values among queries and keys
    for changed in (noisy * columns, noisy * rows, noisy * some_rows, noisy * rows * columns):
        error, rescaled = _error(rows_of(changed), rows_of(w))
        assert error == pytest.approx(0.1, rel=0.06)
        assert rescaled
    for incomparable in (-w, np.zeros_like(w), w[:-1], w[:, :-1], np.full_like(w, np.nan)):
        assert _error(rows_of(incomparable), rows_of(w)) == (None, False)
    assert _error(None, rows_of(w)) == (None, False)
    assert _error(rows_of(w), rows_of(np.zeros_like(w))) == (None, False)
    assert _error(rows_of(w), rows_of(w)) == (0.0, False)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight", "int4"])
def test_every_recipe_is_understood(bundles: Path, tmp_path: Path, recipe: str) -> None:
    """Whatever a recipe folds in or widens, an 8-bit weight is half a percent off and a 4-bit one some percent."""
    (tmp_path / "t.txt").write_text(TEXT * 8)
    made = quantize(
        bundles / "a & <b>", tmp_path / "q", recipe=recipe, calibration=tmp_path / "t.txt", threads=1
    ).bundle
    for weight in weight_errors(made, bundles / "a & <b>"):
        assert weight.error is not None, weight
        low, high = (0.002, 0.01) if weight.stored.startswith("8") else (0.03, 0.25)
        assert low < weight.error < high, weight


def test_layouts_of_others_are_not_guessed(bundles: Path, measured: ReportData, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(bundles / "int4-rtn", copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "bits" and "attn.o" in node.input[1]:
                attribute.i = 2
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    errors = weight_errors(copy, bundles / "a & <b>")
    unknown = [w for w in errors if w.error is None]
    assert {(w.kind, w.layer, w.stored) for w in unknown} == {("attn.o", i, "unknown") for i in range(3)}

    def shown(weights: list[WeightError]) -> str:
        return page(replace(measured, bundles=[replace(measured.bundles[1], weights=weights)]), version="1")

    assert shown(errors).count(">–</td>") == 3
    assert "No weight is stored in a way" in shown(unknown)


def test_output_errors_are_shown_where_they_were_measured(
    tiny_bundle: Path, tmp_path: Path, measured: ReportData
) -> None:
    quantize(tiny_bundle, tmp_path / "int4", recipe="int4", threads=1)
    weights = weight_errors(tmp_path / "int4", tiny_bundle)
    inside = [w for w in weights if w.layer is not None]
    assert all(w.output_error is not None and w.error is not None for w in inside)
    # Calibration trades the weights' own errors for smaller ones of what they compute.
    assert sum(w.output_error or 0 for w in inside) < 0.9 * sum(w.error or 0 for w in inside)

    def shown(weights: list[WeightError]) -> str:
        return page(replace(measured, bundles=[replace(measured.bundles[1], weights=weights)]), version="1")

    assert shown(weights).count('<table class="heat">') == 2
    assert shown([replace(w, output_error=None) for w in weights]).count('<table class="heat">') == 1


def test_differences_are_the_largest(bundles: Path) -> None:
    with load(bundles / "a & <b>", threads=1) as original, load(bundles / "int4-rtn", threads=1) as model:
        ids = original.tokenizer.encode(TEXT)
        scores = score(model.session, ids, reference=original.session, context=100, max_windows=5)
        got = differences(scores, original.tokenizer)
        assert scores.kl is not None
        assert got[0].kl == scores.kl.max()
        assert [d.kl for d in got] == sorted((d.kl for d in got), reverse=True)
        for d in got:
            window = d.place // 100
            assert d.place % 100 > 50
            assert d.token == original.tokenizer.decode([ids[d.place]], skip_special_tokens=False)
            text = "".join(piece.text for piece in d.excerpt)
            first = max(window * 100, d.place - 40)
            assert text in original.tokenizer.decode(ids[first : d.place + 13]) + "\ufffd"
            assert d.excerpt[d.at].kl == d.kl
            logits = original.session.run(ids[window * 100 : d.place], original.session.new_cache(), every_row=True)[
                -1
            ].astype(np.float64)
            p = np.exp(logits - logits.max())
            p /= p.sum()
            assert d.reference.probability == pytest.approx(p.max(), rel=1e-2)
            assert d.reference.probability_of_token == pytest.approx(p[ids[d.place]], rel=1e-2)
            assert d.reference.likeliest == original.tokenizer.decode([int(p.argmax())], skip_special_tokens=False)


# ---- training runs -------------------------------------------------------------------------------------------------


def test_run_is_thinned_and_its_end_kept(bundles: Path) -> None:
    run = read_run(bundles / "run", "run")
    assert len(run.points) == 400
    assert run.points[0][1] == pytest.approx(np.mean([5 - 1 / 500, 5 - 2 / 500, 5 - 3 / 500]))
    assert (run.steps, run.loss, run.val_loss) == (900, 3.2, 4.5)
    assert run.val_points == [(900, 4.5)]
    assert list(run.measures) == ["learning_rate", "grad_norm"]
    assert run.measures["grad_norm"][0] == (2, pytest.approx(2 / 9)), "the mean of the first three steps"


@pytest.mark.parametrize(
    "content",
    [
        '{"step": 1}',
        "[]",
        "{",
        '{"step": 1, "loss": null}',
        '{"step": 1, "loss": NaN}',
        '{"step": "x", "loss": 1}',
        '{"step": 2, "loss": 1, "grad_norm": "x"}',
    ],
)
def test_metrics_of_another_kind(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + content + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2, has no step and loss"):
        read_run(tmp_path, "x")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_run(tmp_path, "x")


def test_a_last_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_run(tmp_path, "x").steps == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_folders_that_are_neither(bundles: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "holds no bundle"), (tmp_path / "no", "does not exist")):
        with pytest.raises(BundleError, match=message):
            find([folder])
    with pytest.raises(BundleError, match="is not a folder"):
        find([bundles / "notes.txt"])
    found = find([bundles / "int8-weight", bundles, bundles / "int8-weight"])
    assert [p.name for p in found[0]] == ["int8-weight", "a & <b>", "int4-rtn"]


def test_reference_must_be_plain(bundles: Path, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="none of the bundles is fp32 or fp16"):
        choose_reference([bundles / "int8-weight"], None)
    with pytest.raises(UsageError, match=r"2 bundles are fp32 .*--reference"):
        choose_reference([bundles / "a & <b>", tiny_bundle], None)
    assert choose_reference([bundles / "int8-weight"], tiny_bundle) == tiny_bundle


def test_other_vocabularies_are_refused(bundles: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from gptedge.checkpoint import read_json_object, write_checkpoint
    from gptedge.export.exporter import export
    from tests.conftest import random_weights, tiny_config

    vocab = read_json_object(tiny_checkpoint / "config.json")["vocab_size"] + 1
    config = tiny_config(vocab, n_layer=1)
    files = {name: (tiny_checkpoint / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_checkpoint(tmp_path, config, random_weights(config), files, token_ids={"eos_token_id": 0})
    other = export(tmp_path, tmp_path / "other", verify=False).bundle
    with pytest.raises(UsageError, match=rf"vocabularies of {vocab} and {vocab - 1} tokens, and cannot be compared"):
        collect(
            [bundles / "a & <b>", other], reference=bundles / "a & <b>", text=TEXT, text_name="t", context=64,
            max_windows=1, threads=1,
        )  # fmt: skip


def test_default_text_is_there() -> None:
    from gptedge.evaluate.sample import sample_text

    assert len(sample_text()) > 200_000

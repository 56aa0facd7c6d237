"""Distilling: closer to the float model, the same bytes however often it was stopped, and nothing left behind."""

from __future__ import annotations

import filecmp
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gptedge.bundle import GRAPH, GRAPH_DATA, open_bundle
from gptedge.errors import DataError
from gptedge.evaluate.divergence import evaluate
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize import calibration, distill
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.torch_graph import TorchGraph
from gptedge.quantize.work import START, kept_work
from gptedge.runtime.session import PREFILL_AT_LEAST, RERUN, Session
from gptedge.tokenizer import Tokenizer
from tests.conftest import TEXT

STEPS = 16
_GROUP = 'bits = {}\nblock_size = 32\nsymmetric = {}\nsteps = {}\nsmooth = {}\nmethod = "{}"\n'
ROWS = (
    '[[group]]\nmatch = "embed.weight"\n'
    + _GROUP.format(8, "true", 1, "true", "rtn")
    + '[[group]]\nmatch = "*"\n'
    + _GROUP.format(4, "false", 6, "false", "gptq")
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "plain.toml").write_text(ROWS)
    (folder / "distilled.toml").write_text(f"distill_steps = {STEPS}\n{ROWS}")
    (folder / "text.txt").write_text(TEXT)
    return folder


def make(source: Path, files: Path, out: Path, recipe: str = "distilled.toml", **options: object) -> Path:
    text = files / "text.txt"
    return quantize(source, out, recipe=str(files / recipe), calibration=text, threads=1, **options).bundle  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def distilled(tiny_bundle: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_bundle, files, tmp_path_factory.mktemp("distilled") / "out")


def divergence(bundle: Path, source: Path) -> float:
    ids = Tokenizer.from_folder(source).encode(TEXT)
    sessions = [Session(open_bundle(b), threads=1) for b in (bundle, source)]
    found = evaluate(sessions[0], ids, reference=sessions[1], context=100, max_windows=4).kl_divergence
    assert found is not None
    return found["mean"]


def test_the_bundle_comes_closer_and_keeps_its_size(
    distilled: Path, tiny_bundle: Path, files: Path, tmp_path: Path
) -> None:
    plain = make(tiny_bundle, files, tmp_path / "plain", "plain.toml")
    assert divergence(distilled, tiny_bundle) < 0.95 * divergence(plain, tiny_bundle)
    assert (distilled / GRAPH).read_bytes() != (plain / GRAPH).read_bytes()  # small tensors stand in it
    assert (distilled / GRAPH_DATA).stat().st_size == (plain / GRAPH_DATA).stat().st_size
    assert list(distilled.parent.iterdir()) == [distilled]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    damaged: bool, distilled: Path, tiny_bundle: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "_SAVE_EVERY", 4)
    steps: list[int] = []

    def die(done: int, total: int, note: str) -> None:
        if "distilling" in note:
            steps.append(done)
            if done == 10:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make(tiny_bundle, files, tmp_path / "out", report=die)
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".out.distill-")
    assert (work / START / GRAPH).is_file()
    if damaged:
        (state,) = work.glob("step-*.pt")
        state.write_bytes(state.read_bytes()[:1000])
    monkeypatch.setattr(distill, "_SAVE_EVERY", 5)
    made = make(tiny_bundle, files, tmp_path / "out", report=lambda done, *_: steps.append(done))
    assert steps[10] == (1 if damaged else 9)
    for name in (GRAPH, GRAPH_DATA):
        assert filecmp.cmp(made / name, distilled / name, shallow=False)
    assert list(tmp_path.iterdir()) == [made]


def test_ctrl_c_saves_and_leaves_the_destination_alone(tiny_bundle: Path, files: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if "distilling" in note and done == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tiny_bundle, files, tmp_path / "out", report=interrupt)
    (work,) = tmp_path.iterdir()
    assert kept_work(tmp_path / "out") == [work]
    assert [p.name for p in work.glob("step-*.pt")] == ["step-00000003.pt"]


def test_text_that_will_not_do_leaves_nothing(tiny_bundle: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="needs at least one window"):
        quantize(
            tiny_bundle, tmp_path / "out", recipe=str(files / "distilled.toml"), calibration=tmp_path / "short.txt"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_own_text_will_do(tiny_bundle: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "OWN_WINDOWS", 2)
    notes: list[str] = []
    made = quantize(
        tiny_bundle, tmp_path / "out", recipe=str(files / "distilled.toml"), kv="int8", threads=1,
        report=lambda done, total, note: notes.append(f"{note} {done}"),
    )  # fmt: skip
    assert notes.count("writing calibration text 1") == 1, "it serves rounding and training"
    assert not any("held out" in note for note in notes), "of two windows, none"
    assert np.isfinite(divergence(made.bundle, tiny_bundle))
    assert open_bundle(made.bundle).kv == made.kv == "int8"  # scales are of the trained weights' keys and values


def test_the_graph_for_prompts_is_that_of_the_float_model(
    tiny_bundle: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training changed nothing in it, and it finds the table in the file that training wrote anew."""
    monkeypatch.setitem(distill.RATES, "latent", 0.1)  # so that some integers change in so few steps
    plain = make(tiny_bundle, files, tmp_path / "plain", "plain.toml", prefill="int8")
    trained = make(tiny_bundle, files, tmp_path / "trained", prefill="int8")
    assert (trained / GRAPH_DATA).read_bytes() != (plain / GRAPH_DATA).read_bytes()
    read = []
    for bundle in (plain, trained):
        session = Session(open_bundle(bundle), threads=1)
        cache = session.new_cache()
        session.prefill(Tokenizer.from_folder(bundle).encode(TEXT)[: PREFILL_AT_LEAST + RERUN], cache)
        rows = slice(len(cache) - RERUN)  # the last tokens are the other graph's
        read.append([b.numpy()[0, :, rows].copy() for b in cache.buffers])  # these give their memory back
    assert np.array_equal(*read)


SPLIT = "common_tokens = 100\n" + '[[group]]\nmatch = "*.rare"\n' + _GROUP.format(4, "true", 6, "false", "gptq")


@pytest.mark.parametrize("head", ["", SPLIT], ids=["whole table", "table in parts"])
def test_the_graph_in_torch_is_the_graph(head: str, tiny_bundle: Path, files: Path, tmp_path: Path) -> None:
    rows = ROWS.replace('"embed.weight"', '"embed.weight*"')
    (tmp_path / "recipe.toml").write_text(head.replace("[[", "distill_steps = 4\n[[", 1) + rows)
    made = make(tiny_bundle, files, tmp_path / "made", str(tmp_path / "recipe.toml"))
    student = TorchGraph(load_graph(made / GRAPH), partial(read_initializer, folder=made))
    exact = onnx.load(made / GRAPH)
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # activations stay as they are
    ids = np.random.default_rng(1).integers(0, 300, 50)
    onnx.save(exact, made / GRAPH)
    (made / "manifest.json").unlink()
    session = Session(open_bundle(made), threads=1)
    expected = session.run(ids.tolist(), session.new_cache(), every_row=True)
    with torch.no_grad():
        got = student(torch.from_numpy(ids[None]))[0].numpy()
    assert np.abs(got - expected).max() <= 1e-3 * expected.std()

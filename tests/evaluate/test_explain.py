"""What explain says of a model is what the model computes: logits, probabilities, and where each head looked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gptedge.bundle import GRAPH, open_bundle
from gptedge.checkpoint import open_checkpoint
from gptedge.cli import main
from gptedge.errors import UsageError
from gptedge.evaluate import explain_bundle, explain_checkpoint
from gptedge.evaluate.explain import Explanation, explain, gaze, too_many_weights
from gptedge.evaluate.explain_terminal import print_explanation
from gptedge.export.exporter import export
from gptedge.loading import load
from gptedge.text import visible
from gptedge.train.model import GPT, attend, attention_weights
from tests.export.test_decoder import random_model
from tests.export.test_portable import CHOSEN
from tests.logits import ids_of

_CLOSE = 1e-3  # of a weight; a wrong mask, factor or rotation is off by 0.05 and more
# A token of one byte of three, a control sequence, markup, and a line's end.
TEXT = "The quick brown 漢 fox\n\x1b[31mjumps</b> & [bold]over"


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOSEN)
def test_maps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of the checkpoint, its bundle and its portable bundle, for every family: windows, caps, shared keys."""
    peer = random_model(name, tmp_path / "checkpoint")
    peer.set_attn_implementation("eager")
    ids = ids_of(45, seed=2)
    with torch.no_grad():
        expected = torch.cat(peer(torch.tensor([ids]), output_attentions=True).attentions).numpy()  # [L, H, T, T]
    ours = explain_checkpoint.look(GPT.from_checkpoint(open_checkpoint(tmp_path / "checkpoint")), ids).attention
    assert ours is not None
    np.testing.assert_allclose(ours, expected, atol=_CLOSE)
    assert expected.std() > 0.01, "equal maps of nothing would say nothing"
    for portable in (False, True):
        bundle = export(
            tmp_path / "checkpoint", tmp_path / f"bundle-{portable}", portable=portable, verify=False
        ).bundle
        maps, note = explain_bundle.attention(open_bundle(bundle), ids, threads=1)
        assert maps is not None, note
        np.testing.assert_allclose(maps, expected, atol=_CLOSE)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("heads", "past"), [((6, 2), 0), ((3, 3), 4)])
def test_weights_times_values_are_what_attention_gives(window: int, heads: tuple[int, int], past: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads[0], 9, 8)
    k, v = torch.randn(2, heads[1], 9 + past, 8), torch.randn(2, heads[1], 9 + past, 8)
    weights = attention_weights(q, k, window=window, scale=0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads[0], 9))
    torch.testing.assert_close(
        weights @ v.repeat_interleave(heads[0] // heads[1], 1), attend(q, k, v, window=window, scale=0.3)
    )


def test_a_quantized_bundle_shows_its_own_attention(quantized_bundle: Path, tiny_bundle: Path) -> None:
    ids = list(range(20, 60))
    original, _ = explain_bundle.attention(open_bundle(tiny_bundle), ids, threads=1)
    maps, note = explain_bundle.attention(open_bundle(quantized_bundle), ids, threads=1)
    assert original is not None
    assert maps is not None, note
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    difference = np.abs(maps - original)
    assert 1e-5 < difference.mean() < 0.02, "near, for the weights were rounded, and not the same"


def test_maps_that_do_not_reproduce_the_graph_are_not_shown(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from gptedge.export import reference

    right = reference.attention_weights
    monkeypatch.setattr(reference, "attention_weights", lambda q, k, **o: right(1.05 * q, k, **o))
    maps, note = explain_bundle.attention(open_bundle(tiny_bundle), [5, 6, 7, 8], threads=1)
    assert maps is None
    assert note is not None
    assert "does not reproduce" in note


def test_graphs_of_other_kinds_say_that_there_are_no_maps(tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx

    folder = shutil.copytree(tiny_bundle, tmp_path / "b")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.attribute.append(onnx.helper.make_attribute("smooth_softmax", 1))
    onnx.save(model, folder / GRAPH)
    (folder / "manifest.json").unlink()
    found = explain(folder, "The quick", threads=1)
    assert found.attention is None
    assert "does not read" in str(found.attention_note)
    assert len(found.tokens) > 1


def test_maps_too_large_to_hold_are_left_out(tiny_checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("gptedge.evaluate.explain.MAP_LIMIT", 3 * 6 * 10 * 10)
    assert too_many_weights(3, 6, 10) is None
    found = explain(tiny_checkpoint, "The quick brown fox jumps", threads=1)
    assert found.attention is None
    assert "up to --max-tokens 10 they fit" in str(found.attention_note)


def test_gaze_is_worked_out_by_hand() -> None:
    rows = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0, 0.6, 0]], np.float32)
    assert gaze(rows[None, None]) == [[{"itself": 0.25, "previous": 0.45, "first": 0.3, "distance": 1.25}]]


# ---- probabilities -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tiny_bundle: Path) -> Explanation:
    return explain(tiny_bundle, TEXT, threads=1, top=8)


def test_probabilities_are_the_sessions(found: Explanation, tiny_bundle: Path) -> None:
    """Against logits that are taken one token at a time, as generating does."""
    with load(tiny_bundle, threads=1) as model:
        ids = model.tokenizer.encode(TEXT, add_special_tokens=True)
        cache = model.session.new_cache()
        for token, after in zip(found.tokens[1:], ids, strict=False):
            logits = model.session.run([after], cache)[0].astype(np.float64)
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            assert token.probability == pytest.approx(chances[token.id], rel=1e-3)
            assert token.rank == 1 + (chances > chances[token.id]).sum()
            assert token.entropy_bits == pytest.approx(-(chances * np.log2(chances)).sum(), rel=1e-3)
            best = np.argsort(-chances)[:8]
            assert [g.id for g in token.alternatives] == best.tolist()
            assert [g.probability for g in token.alternatives] == pytest.approx(chances[best].tolist(), rel=1e-3)
    assert [t.id for t in found.tokens] == ids
    assert found.tokens[0].probability is None


def test_all_probabilities_sum_to_one(tiny_bundle: Path) -> None:
    everything = explain(tiny_bundle, "The quick brown", threads=1, top=100)
    rest = explain(tiny_bundle, "The quick brown", threads=1, top=1)
    assert len(everything.next) == 100
    assert rest.next == everything.next[:1]
    with load(tiny_bundle, threads=1) as model:
        size = model.session.vocab_size
    chances = [sum(g.probability for g in t.alternatives) for t in everything.tokens[1:]]
    assert all(0.5 < c <= 1.0 + 1e-6 for c in chances), size


def test_checkpoint_and_bundle_agree(found: Explanation, tiny_checkpoint: Path) -> None:
    ours = explain(tiny_checkpoint, TEXT, threads=1, top=8)
    assert ours.kind == "checkpoint"
    assert [t.text for t in ours.tokens] == [t.text for t in found.tokens]
    assert ours.bits_per_token == pytest.approx(found.bits_per_token, abs=1e-3)
    assert ours.attention is not None
    assert found.attention is not None
    np.testing.assert_allclose(ours.attention, found.attention, atol=1e-4)


def test_perplexity_is_that_of_the_surprises(found: Explanation) -> None:
    surprises = [-np.log2(t.probability) for t in found.tokens[1:] if t.probability]
    assert found.bits_per_token == pytest.approx(np.mean(surprises))
    assert found.perplexity == pytest.approx(2 ** np.mean(surprises))


def test_tokens_spell_the_text_byte_by_byte(found: Explanation) -> None:
    assert b"".join(bytes.fromhex(t.bytes) for t in found.tokens) == TEXT.encode()
    shown = [t.text for t in found.tokens]
    assert [t for t in shown if t.startswith("⟨")] == ["⟨E6⟩", "⟨BC⟩", "⟨A2⟩"], "no merge makes a whole 漢"
    assert any("↵" in t for t in shown)
    assert not any("\x1b" in t for t in shown)


def test_nothing_that_moves_a_cursor_is_shown() -> None:
    assert visible("a\x1b[2J\r\n\t\u202eb\u200d\x9b") == "a\\u{1b}[2J␍↵⇥\\u{202e}b\\u{200d}\\u{9b}"


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_and_say_so(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    long = "The quick brown fox. " * 60
    short = explain(tiny_bundle, long, max_tokens=20, threads=1)
    assert len(short.tokens) == 20
    assert short.text_tokens > 300
    assert (
        short.left_out() == f"the first 20 of the text's {short.text_tokens} tokens are shown: more with --max-tokens"
    )
    full = explain(tiny_checkpoint, long, max_tokens=10_000, threads=1)
    assert len(full.tokens) == 300
    assert str(full.left_out()).endswith("the model's context holds 300")


def test_one_token_is_enough(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for source in (tiny_bundle, tiny_checkpoint):
        one = explain(source, "T", threads=1)
        assert one.bits_per_token is None
        assert one.attention is not None
        assert one.attention.shape == (3, 6, 1, 1)
        assert len(one.next) == 5
        drawn(one, width=80)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", ], "the text is empty"),
        (["x", "--top", "0"], "--top is 0; it must be from 1 to 100"),
        (["x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["x", "--head", "1"], "--head needs --layer"),
        (["x", "--layer", "3"], "--layer is 3; the model's layers are 0 to 2"),
        (["x", "--layer", "0", "--head", "-1"], "--head is -1; the model's heads are 0 to 5"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments: list[str], said: str, tiny_bundle: Path, capsys: Any) -> None:
    assert main(["explain", str(tiny_bundle), *arguments]) == UsageError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_what_is_no_model_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["explain", str(tmp_path / "none"), "x"]) == 1
    assert "none does not exist" in capsys.readouterr().err


# ---- what is printed -----------------------------------------------------------------------------------------------


def drawn(e: Explanation, *, width: int, colour: str | None = None, **chosen: int | None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=colour, force_terminal=bool(colour), highlight=False)  # type: ignore[arg-type]
    print_explanation(console, e, **{"layer": None, "head": None, **chosen})
    return out.getvalue()


def test_json(tiny_bundle: Path, capsys: Any) -> None:
    assert main(["explain", str(tiny_bundle), TEXT, "--layer", "1", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["tokens"][3]["alternatives"][0]["probability"] > 0
    assert [(m["layer"], m["head"]) for m in got["attention"]["maps"]] == [(1, h) for h in range(6)]
    assert all(abs(sum(row) - 1) < 1e-4 for m in got["attention"]["maps"] for row in m["weights"])
    assert len(got["attention"]["gaze"]) == 3


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("chosen", [{}, {"layer": 1}, {"layer": 1, "head": 2}])
def test_every_line_fits_the_terminal(found: Explanation, width: int, chosen: dict[str, int]) -> None:
    text = drawn(found, width=width, **chosen)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_colour_adds_nothing_but_colour(found: Explanation) -> None:
    from rich.text import Text

    coloured = drawn(found, width=120, colour="truecolor", layer=1, head=2)
    assert "\x1b[" in coloured
    assert Text.from_ansi(coloured).plain.split() == drawn(found, width=120, layer=1, head=2).split()


def test_the_numbers_of_a_head_are_its_weights(found: Explanation) -> None:
    assert found.attention is not None
    lines = drawn(found, width=300, layer=1, head=2).splitlines()[-len(found.tokens) :]
    for line, token in zip(lines, found.tokens, strict=True):
        place, *cells = line.split()[-(token.place + 2) :]
        assert place == str(token.place)
        for cell, weight in zip(cells, found.attention[1, 2, token.place], strict=False):
            assert cell == "·" if weight < 0.005 else abs(int(cell) - 100 * weight) <= 0.5001

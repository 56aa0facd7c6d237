"""An architecture that only optimum knows: exported in its environment, run in ours, held against transformers."""

from __future__ import annotations

import json
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
import transformers

import gptedge
import gptedge.export
import gptedge.quantize
from gptedge import safetensors
from gptedge.checkpoint import TOKENIZER, TOKENIZER_CONFIG
from gptedge.cli import main
from tests.conftest import END, TEMPLATE, TEXT, make_tokenizer, read_to_end
from tests.logits import VOCAB_SIZE, assert_close, ids_of, logits_in_pieces, logits_of

pytestmark = pytest.mark.slow

CONFIG = transformers.OPTConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    word_embed_proj_dim=48,
    ffn_dim=70,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=120,
    init_std=0.3,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def linked_sources(folder: Path) -> Path:
    """A folder from which `import gptedge` gets this very package, however it is installed."""
    (folder / "gptedge").mkdir(parents=True)
    for part in (gptedge, gptedge.export, gptedge.quantize):
        home = Path(part.__file__ or "").parent
        if part is gptedge:
            for entry in home.iterdir():
                (folder / "gptedge" / entry.name).symlink_to(entry.resolve())
        elif not (folder / "gptedge" / home.name).exists():
            (folder / "gptedge" / home.name).symlink_to(home.resolve())
    info = folder / f"gptedge-{metadata.version('gptedge')}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: gptedge\nVersion: {metadata.version('gptedge')}\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("opt") / "checkpoint"
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIG).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    made.save_pretrained(folder)
    (folder / TOKENIZER).write_text(json.dumps(make_tokenizer().to_dict()))
    side = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END, "chat_template": TEMPLATE}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(side))
    return made, folder


def changed(checkpoint: Path, at: Path, **config: object) -> Path:
    """A copy that shares the weights, with another config.json."""
    at.mkdir()
    for file in checkpoint.iterdir():
        (at / file.name).symlink_to(file)
    (at / "config.json").unlink()
    (at / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | config))
    return at


def spoiled(checkpoint: Path, at: Path, change: str) -> Path:
    changed(checkpoint, at)
    tensors = {name: t.read().copy() for name, t in safetensors.read(checkpoint / "model.safetensors").items()}
    name = next(n for n in tensors if n.endswith("layers.1.fc1.weight"))
    match change:
        case "missing":
            del tensors[name]
        case "misshapen":
            tensors[name] = tensors[name][:-1]
        case "unused":
            tensors[name.replace("fc1", "fc9")] = tensors[name]
        case _:
            tensors[name][1, 2] = np.nan
    (at / "model.safetensors").unlink()
    safetensors.write(at / "model.safetensors", tensors)
    return at


BAD = {  # what is changed -> (exit code, what the line says)
    "missing": (1, "has no tensor "),
    "misshapen": (1, "has another shape than config.json implies for "),
    "unused": (1, "has a tensor that the model does not use, "),
    "not a number": (1, "layers.1.fc1.weight holds numbers that are not finite"),
}


@pytest.fixture(scope="module")
def answers(
    model: tuple[torch.nn.Module, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """One process in optimum's environment, which takes long to start, for all commands: by name, what each gave."""
    _, checkpoint = model
    work = tmp_path_factory.mktemp("via")
    sources = {
        "good": checkpoint,
        "unknown": changed(checkpoint, work / "unknown", architectures=["MambaForCausalLM"], model_type="mamba"),
        "no context": changed(checkpoint, work / "context", max_position_embeddings=None),
        "nothing": work,
        **{change: spoiled(checkpoint, work / change, change) for change in BAD},
    }
    (work / "out").mkdir()
    job = {
        "tree": str(linked_sources(work / "tree")),
        "packages": sysconfig.get_path("purelib"),
        "commands": [
            ["export", str(source), str(work / "out" / name), "--via", "optimum", "--json"]
            for name, source in sources.items()
        ],
    }
    try:
        got = peers.run_json("optimum", Path(__file__).parent / "commands_in_peer.py", job)
    except peers.NoPackageIndex as e:
        pytest.skip(str(e))
    return work / "out", dict(zip(sources, map(tuple, got), strict=True))


@pytest.fixture(scope="module")
def bundle(answers: tuple[Path, dict[str, tuple[int, str, str]]]) -> Path:
    folder, got = answers
    code, out, err = got["good"]
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["family"], facts["parity"]["greedy_tokens_equal"]) == ("opt", 64)
    assert facts["parity"]["relative_logit_diff"] < 1e-3
    return folder / "good"


def test_same_logits_and_tokens_as_transformers(model: tuple[torch.nn.Module, Path], bundle: Path) -> None:
    made, _ = model
    with gptedge.load(bundle, threads=1) as loaded:
        session, ids = loaded.session, ids_of(100, seed=3)
        expected = logits_of(made, ids)
        for sizes in ([100], [37, 1, 1, 40, 1, 20], [1] * 100):
            assert_close(logits_in_pieces(session, ids, sizes), expected)
        theirs = made.generate(
            torch.tensor([ids[:11]]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
        cache, ours = session.new_cache(), []
        logits = session.prefill(ids[:11], cache)
        for _ in range(64):
            assert logits is not None
            ours.append(int(logits.argmax()))
            logits = session.run(ours[-1:], cache)[0]
        assert ours == theirs[0, 11:].tolist()


def test_bundle_is_a_bundle(
    model: tuple[torch.nn.Module, Path], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its other commands: verify, generate, eval; and the one that it is not for."""
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["verify", str(bundle)]) == 0
    assert main(["generate", str(bundle), "The quick", "--chat", "--max-tokens", "5"]) == 0
    assert (
        main(["eval", str(bundle), "--text", str(tmp_path / "text.txt"), "--context", "64", "--max-windows", "2"]) == 0
    )
    assert main(["quantize", str(bundle), str(tmp_path / "q"), "--recipe", "int8"]) == 2
    assert "its graph is of another kind (optimum)" in capsys.readouterr().err
    weights = 4 * sum(p.numel() for p in model[0].parameters())  # the tied table counts once
    assert 0.95 * weights < (bundle / "model.onnx.data").stat().st_size < 1.05 * weights


def test_chat_of_several_turns(bundle: Path) -> None:
    """A second turn, a fork and an edit go on from the cache, and answer as where the same tokens are read anew."""
    with gptedge.load(bundle, threads=1) as loaded:
        chat = loaded.chat(max_tokens=5)
        for question in ("hello", "and?", "why?"):
            chat.send(question)
        edited = chat.fork()
        edited.edit(-2, "how?")
        anew = edited.fork()
        anew._cache.truncate(0)
        replies = [read_to_end(each.regenerate()) for each in (edited, anew)]
        assert replies[0].token_ids == replies[1].token_ids
        assert replies[0].timings.cached_tokens > replies[1].timings.cached_tokens == 0


@pytest.mark.parametrize("change", BAD)
def test_checkpoints_that_transformers_would_mend(
    answers: tuple[Path, dict[str, tuple[int, str, str]]], change: str
) -> None:
    folder, got = answers
    expected, message = BAD[change]
    code, _, err = got[change]
    assert code == expected
    assert message in err
    assert not list(folder.glob(f"*{change}*"))


@pytest.mark.parametrize(
    ("name", "expected", "message"),
    [
        ("unknown", 5, "optimum does not export mamba as a decoder with a KV cache"),
        ("no context", 1, "does not say how long its context is"),
        ("nothing", 1, "has no config.json"),
    ],
)
def test_what_cannot_be_exported(
    answers: tuple[Path, dict[str, tuple[int, str, str]]], name: str, expected: int, message: str
) -> None:
    code, out, _ = answers[1][name]
    assert code == expected
    assert message in json.loads(out)["error"]

"""LoRA: the arithmetic, and that what is written is what transformers and PEFT make of it, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from gptedge.checkpoint import Checkpoint, open_checkpoint, weights_id
from gptedge.errors import CheckpointError, UnsupportedModelError, UsageError
from gptedge.export.sources import open_source
from gptedge.families import family_of, tensor_shapes
from gptedge.family_files import published_config, stored_tensors, write_like
from gptedge.lora_files import ADAPTER_CONFIG, Adapter, LowRankUpdate, read_adapter, write_adapter
from gptedge.tensor_names import Naming
from gptedge.train.lora import add_lora, merged_weights, updates
from gptedge.train.model import GPT
from tests.conftest import tiny_config
from tests.export.test_decoder import random_model
from tests.logits import ids_of

# PEFT asks transformers for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# One model of each family, biased and untied where the family can be.
FAMILIES = (
    "llama untied, biased", "mistral", "phi3", "olmo2", "gemma", "gemma2", "gemma3", "nanochat", "gpt_neox", "qwen2",
    "qwen3", "gpt2",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    random_model(request.param, folder)
    return folder


def adapted_model(checkpoint: Checkpoint, **settings: Any) -> GPT:
    """A model with updates that are not zero."""
    torch.manual_seed(1)
    model = GPT.from_checkpoint(checkpoint)
    add_lora(model, **{"rank": 3, "alpha": 5.0, **settings})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    return model


@torch.no_grad()
def logits_of(model: Callable[..., Any]) -> torch.Tensor:
    out = model(torch.tensor([ids_of(50)]))
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 3e-4 * expected.std()


def write_merged(checkpoint: Checkpoint, model: GPT, folder: Path) -> None:
    folder.mkdir()
    weights = {name: t.numpy() for name, t in merged_weights(model).items()}
    write_like(folder, checkpoint, weights, checkpoint.side_files)


def write_updates(checkpoint: Checkpoint, model: GPT, folder: Path) -> None:
    folder.mkdir()
    adapter = Adapter(updates(model), weights_id(checkpoint.weights()))
    write_adapter(folder, adapter, checkpoint.family.files, checkpoint.config, base_name=str(checkpoint.path))


def test_transformers_opens_what_is_merged(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    model = adapted_model(checkpoint)
    write_merged(checkpoint, model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(theirs).__name__ == checkpoint.hf_config["architectures"][0]
    assert_same(logits_of(theirs.eval()), logits_of(model))
    assert_same(logits_of(GPT.from_checkpoint(open_checkpoint(tmp_path / "merged"))), logits_of(model))
    assert not torch.allclose(logits_of(model), logits_of(GPT.from_checkpoint(checkpoint)))


@pytest.mark.parametrize("targets", [None, ("q", "v", "down")])
def test_peft_opens_the_adapter(source: Path, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    model = adapted_model(checkpoint, targets=targets)
    write_updates(checkpoint, model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert_same(logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), logits_of(model))


def test_our_reading_gives_back_what_was_written(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    model = adapted_model(checkpoint)
    write_updates(checkpoint, model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", checkpoint.family.files, checkpoint.config)
    assert adapter.base == weights_id(checkpoint.weights())
    written = updates(model)
    assert adapter.updates.keys() == written.keys()
    for name, update in adapter.updates.items():
        mine = written[name]
        np.testing.assert_allclose(update.scale * update.b @ update.a, mine.scale * mine.b @ mine.a, atol=1e-6)


def test_our_reading_of_what_peft_writes(tmp_path: Path) -> None:
    base = random_model("gpt_neox", tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["query_key_value", "dense"], alpha_pattern={"dense": 3},
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "base")
    adapter = read_adapter(tmp_path / "adapter", checkpoint.family.files, checkpoint.config)
    assert adapter.base is None
    model = GPT.from_checkpoint(checkpoint)
    with torch.no_grad():
        for name, u in adapter.updates.items():
            model.get_parameter(f"{name}.weight").add_(torch.from_numpy(u.scale * u.b @ u.a))
    assert_same(logits_of(model), logits_of(theirs))


def test_nothing_changes_before_training() -> None:
    model = GPT(tiny_config(347)).eval()
    before = logits_of(model)
    add_lora(model, rank=4, alpha=8.0)
    assert torch.equal(logits_of(model), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}
    assert len(updates(model)) == 7 * 3


def test_updates_of_activations_and_of_weights_are_the_same() -> None:
    torch.manual_seed(0)
    plain = GPT(tiny_config(347)).eval()
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    results = []
    for through_weights in (False, True):
        torch.manual_seed(0)
        model = GPT(tiny_config(347)).eval()
        model.load_state_dict(weights)
        add_lora(model, rank=4, alpha=8.0, targets=("q", "down"), through_weights=through_weights)
        torch.manual_seed(2)
        with torch.no_grad():
            for update in (m for m in model.modules() if type(m).__name__ == "LowRank"):
                update.get_parameter("a").normal_()
                update.get_parameter("b").normal_()
        ids = torch.tensor([ids_of(20)])
        model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
        gradients = [m.get_parameter("b").grad for m in model.modules() if type(m).__name__ == "LowRank"]
        results.append((logits_of(model), gradients, merged_weights(model), updates(model)))
    (logits, grads, merged, ups), (logits2, grads2, merged2, ups2) = results
    assert_same(logits, logits2)
    assert len(grads) == 6
    for a, b in zip(grads, grads2, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert merged.keys() == merged2.keys() == weights.keys()
    torch.testing.assert_close(merged, merged2)
    assert ups.keys() == ups2.keys() == {f"blocks.{i}.{t}" for i in range(3) for t in ("attn.q", "mlp.down")}


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("q", "gates"), "'gates' is not a layer"), ((), "no layer is named"), (("gate",), "'gate'")],
)
def test_unknown_targets(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"lora targets: {message}.*choose from q, k, v, o, up, down"):
        add_lora(GPT(tiny_config(90, gated=False, activation="gelu")), rank=2, alpha=2.0, targets=targets)


# ---- broken adapters -----------------------------------------------------------------------------------------------


def small(tmp_path: Path) -> tuple[Path, Naming]:
    naming = family_of({"architectures": ["LlamaForCausalLM"]}).files
    update = LowRankUpdate(np.ones((2, 84), np.float32), np.ones((96, 2), np.float32), 2.0)
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter", Adapter({"blocks.0.attn.q": update}, None), naming, tiny_config(90), base_name="b"
    )
    return tmp_path / "adapter", naming


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedModelError, "of the kind IA3; only LORA"),
        ({"use_dora": True}, UnsupportedModelError, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save is"),
        ({"lora_alpha": "x"}, CheckpointError, "lora_alpha 'x'; a number is needed"),
    ],
)
def test_other_kinds_of_adapters(change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    folder, naming = small(tmp_path)
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(error, match=message):
        read_adapter(folder, naming, tiny_config(90))


def test_adapters_of_models_of_another_size(tmp_path: Path) -> None:
    folder, naming = small(tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj are \[2, 84\] and \[96, 2\]; \[rank, 84\] and \[48, rank\]"):
        read_adapter(folder, naming, tiny_config(90, head_dim=8))


def test_adapters_of_other_families(tmp_path: Path) -> None:
    folder, _ = small(tmp_path)
    naming = family_of({"architectures": ["GPTNeoXForCausalLM"]}).files
    with pytest.raises(CheckpointError, match="which the model does not have; it is for another model"):
        read_adapter(folder, naming, tiny_config(90, gated=False))


def test_nanogpt_becomes_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 60, "vocab_size": 347, "bias": False}
    config = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 60, "vocab_size": 347, "bias": False}
    shaped = GPT(family_of({"architectures": ["NanoGPT"]}).config({**config, "activation_function": "gelu"}))
    naming = family_of({"architectures": ["NanoGPT"]}).files
    weights = {name: p.detach().numpy() for name, p in shaped.named_parameters()}
    assert weights.keys() == tensor_shapes(shaped.config).keys()
    stored = {k: torch.from_numpy(np.array(v)) for k, v in stored_tensors(naming, shaped.config, weights).items()}
    torch.save({"model": stored, "model_args": sizes}, tmp_path / "ckpt.pt")
    checkpoint = open_source(tmp_path / "ckpt.pt")
    model = adapted_model(checkpoint)
    write_merged(checkpoint, model, tmp_path / "merged")
    assert published_config(checkpoint)["model_type"] == "gpt2"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(logits_of(theirs), logits_of(model))

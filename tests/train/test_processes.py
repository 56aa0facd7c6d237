"""Several processes come to what one comes to, and take over from each other."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptedge import safetensors
from gptedge.cli import main
from gptedge.errors import TrainingError, UsageError
from gptedge.train.batches import IGNORED, Batch
from gptedge.train.config import TrainConfig
from gptedge.train.processes import Processes, processes
from gptedge.train.run import run_training
from tests.train.forked import together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(t.read().copy()) for name, t in safetensors.read(out / "model.safetensors").items()}


def assert_same(out: Path, expected: Path) -> None:
    assert losses(out) == pytest.approx(losses(expected), rel=1e-4)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone") / "m"


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, batch_size=5, precision="fp32")


@pytest.fixture
def alone(_alone: Path, texts: Path, config: TrainConfig) -> Path:
    """20 steps of one process."""
    if not _alone.exists():
        run_training([texts], _alone, config=config)
    return _alone


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_come_to_the_losses_of_one(
    shard: bool, alone: Path, texts: Path, config: TrainConfig, tmp_path: Path
) -> None:
    """5 rows between two processes in two parts each: 1, 1, 1 and 2."""
    config = replace(config, grad_accumulation=2)
    together(lambda: run_training([texts], tmp_path / "m", config=config, shard=shard), 2)
    assert_same(tmp_path / "m", alone)
    assert list((tmp_path / "m" / "state").glob("best-*.pt"))


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_one_takes_over_from_two_and_two_from_one(
    shard: bool, alone: Path, texts: Path, config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "m"

    def part(until: int, *, resume: bool, shard: bool = False) -> None:
        def on_step(report: object) -> None:
            if report.step == until:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            run_training([texts], out, config=config, resume=resume, shard=shard, on_step=on_step)

    together(lambda: part(7, resume=False, shard=shard), 2)
    part(12, resume=True)
    together(lambda: part(99, resume=True, shard=shard), 2)
    assert_same(out, alone)


def test_rows_are_parted_with_their_share_of_what_is_scored() -> None:
    ids = torch.arange(12).view(3, 4)
    targets = ids.clone()
    targets[2, 1:] = IGNORED  # 4, 4 and 1 scored
    batch = Batch(ids, targets)
    found = [part for rank in range(2) for part in Processes(rank, 2).parts(batch, 2)]
    assert [share for _part, share in found] == pytest.approx([0.0, 4 / 9, 4 / 9, 1 / 9])
    assert [part.ids[0, 0].item() for part, _share in found] == [0, 0, 4, 8]
    assert Processes().parts(batch, 1)[0][1] == 1.0
    rows = len(batch.ids)
    assert len(Processes().parts(batch, 64)) == rows, "none is empty"
    assert {len(Processes(rank, 2).parts(batch, 64)) for rank in range(2)} == {-(-rows // 2)}


def test_what_the_first_cannot_do_ends_all_and_is_said_once(tmp_path: Path) -> None:
    def train() -> None:
        said, out = io.StringIO(), tmp_path / "m"
        with redirect_stderr(said):
            code = main(["train", "--data", str(tmp_path / "none"), "--out", str(out)])
        told = f"gptedge: data path {tmp_path / 'none'} does not exist\n"
        assert (code, said.getvalue()) == (1, told if os.environ["RANK"] == "0" else "")

    together(train, 2)


def test_a_state_that_the_first_cannot_write_ends_all(
    texts: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        assert os.environ["RANK"] == "0"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptedge.train.trainer.save_state", full)

    def train() -> None:
        with pytest.raises(TrainingError, match=r"step 5: .* cannot be written: No space left on device") as e:
            run_training([texts], tmp_path / "m", config=config)
        assert e.value.is_reported == (os.environ["RANK"] != "0")

    together(train, 2)


def test_sharding_alone_is_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"--shard needs several processes; start it with torchrun"),
        processes(shard=True),
    ):
        pass


@pytest.mark.slow
def test_torchrun_runs_the_command(texts: Path, tmp_path: Path) -> None:
    settings = tmp_path / "tiny.toml"
    settings.write_text(
        "vocab_size=300\ncontext_length=16\nn_layer=1\nn_head=2\nn_kv_head=1\nn_embd=32\nn_ff=64\nbatch_size=4\nthreads=1\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gptedge", "train"]
    options = ["--data", texts, "--out", tmp_path / "m", "--config", settings, "--max-steps", "3", "--json", "--shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, env=environment, check=True
    )
    value = json.loads(done.stdout)  # one object, from the first process alone
    assert value["steps"] == 3
    assert "2 processes (FSDP2)" in done.stderr
    assert (tmp_path / "m" / "model.safetensors").is_file()

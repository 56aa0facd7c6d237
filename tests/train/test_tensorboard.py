"""Event files hold what metrics.jsonl holds, framed as TensorFlow's records are."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptedge.cli import main
from gptedge.errors import TrainingError
from gptedge.train.tensorboard import event_file
from gptedge.train.trainer import StepReport

pb = pytest.importorskip("tensorboardX.proto.event_pb2")


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value, of all event files. A TFRecord is its length, that one's crc, data, its crc."""
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = pb.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return found


def test_events_are_the_metrics(texts: Path, tmp_path: Path, capsys: Any) -> None:
    out, config = tmp_path / "run", tmp_path / "tiny.toml"
    config.write_text(
        "vocab_size = 300\ncontext_length = 16\nn_layer = 1\nn_head = 2\nn_kv_head = 1\nn_embd = 32\nn_ff = 64\n"
        "batch_size = 2\neval_every = 4\nthreads = 1\n"
    )
    command = ["train", "--data", str(texts), "--out", str(out), "--config", str(config), "--tensorboard"]
    assert main([*command, "--max-steps", "6"]) == 0
    assert main([*command, "--max-steps", "9", "--resume"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = scalars(out / "tensorboard")
    assert len(lines) == 9
    for line in lines:
        step = line["step"]
        assert found["loss/train", step] == pytest.approx(line["loss"])
        assert found["gradient/norm", step] == pytest.approx(line["grad_norm"])
        assert found["schedule/learning_rate", step] == pytest.approx(line["learning_rate"])
        assert found["speed/tokens_per_second", step] == pytest.approx(line["tokens_per_second"])
    measured = {step for tag, step in found if tag == "loss/held_out"}
    assert measured == {line["step"] for line in lines if line["val_loss"] is not None} == {4, 6, 8, 9}
    assert "tensorboard --logdir" in capsys.readouterr().err


def test_a_new_run_replaces_an_old_ones_events(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.old").write_bytes(b"")
    with event_file(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["events.out.tfevents.1.old"], "no step, no file"
    step = StepReport(1, 10, 3.0, None, 100.0, 1e-3, 0.5, 1.0, 9.0)
    with event_file(tmp_path) as on_step:
        on_step(step)
    assert "events.out.tfevents.1.old" not in {p.name for p in tmp_path.iterdir()}
    assert scalars(tmp_path)["loss/train", 1] == 3.0
    with event_file(tmp_path) as on_step:
        on_step(replace(step, step=5))
    assert {step for _, step in scalars(tmp_path)} == {1, 5}, "a resumed run adds to what is there"


def test_a_disk_that_fills_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that trains: nothing waits for a writer that is no more."""
    step = StepReport(1, 10, 3.0, None, 100.0, 1e-3, 0.5, 1.0, 9.0)

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with event_file(tmp_path) as on_step:
        on_step(step)
        monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter._write_serialized_event", full)
        with pytest.raises(TrainingError, match=r"cannot be written: No space left on device; make room and go on"):
            on_step(replace(step, step=2))


def test_a_run_without_events_leaves_none_of_another(texts: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "run", tmp_path / "tiny.toml"
    config.write_text(
        "vocab_size = 300\ncontext_length = 16\nn_layer = 1\nn_head = 2\nn_kv_head = 1\nn_embd = 32\nn_ff = 64\n"
        "batch_size = 2\nthreads = 1\nmax_steps = 2\n"
    )
    command = ["train", "--data", str(texts), "--out", str(out), "--config", str(config)]
    assert main([*command, "--tensorboard"]) == 0
    assert scalars(out / "tensorboard")
    assert main([*command, "--force"]) == 0
    assert not list((out / "tensorboard").iterdir())

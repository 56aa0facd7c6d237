"""Chats saved with their KV cache: what comes back, what it saves, and which files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gptedge
from gptedge.bundle import MANIFEST, fingerprint, open_bundle
from tests.runtime.test_session import CACHES, changed


@pytest.fixture(scope="module", params=CACHES)
def model(request: pytest.FixtureRequest) -> gptedge.Model:
    return gptedge.load(request.getfixturevalue(CACHES[request.param]), threads=1)


def talked(model: gptedge.Model) -> gptedge.Chat:
    chat = model.chat(system="Be brief. 漢字", max_tokens=12, logit_bias=dict.fromkeys(model.bundle.eos_ids, -1e4))
    chat.send("The quick brown fox")
    return chat


def test_saved_chat_goes_on_bit_for_bit(model: gptedge.Model, tmp_path: Path) -> None:
    chat = talked(model)
    chat.save_cache(tmp_path / "chat.kv")
    again = model.chat(cache=tmp_path / "chat.kv", params=chat.params)
    assert again.messages == chat.messages
    assert again.cached_tokens == chat.cached_tokens > 0
    kept, reopened = chat.send("and then?", logprobs=3), again.send("and then?", logprobs=3)
    assert (reopened.token_ids, reopened.logprobs) == (kept.token_ids, kept.logprobs)
    assert reopened.timings.cached_tokens == kept.timings.cached_tokens > 20
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.kv"]


def test_only_the_owner_reads_it(model: gptedge.Model, tmp_path: Path) -> None:
    talked(model).save_cache(tmp_path / "chat.kv")
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "chat.kv").stat().st_mode) == 0o600


def test_chat_in_which_nothing_was_said(model: gptedge.Model, tmp_path: Path) -> None:
    model.chat(system="S").save_cache(tmp_path / "chat.kv")
    again = model.chat(cache=tmp_path / "chat.kv", max_tokens=5)
    assert (again.messages, again.cached_tokens) == ([{"role": "system", "content": "S"}], 0)
    assert again.send("Hi").token_ids == model.chat(system="S", max_tokens=5).send("Hi").token_ids


def test_saving_again_replaces_the_file_only_when_whole(
    model: gptedge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = talked(model)
    chat.save_cache(tmp_path / "chat.kv")
    before = (tmp_path / "chat.kv").read_bytes()
    chat.send("more")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptedge.files.os.replace", full)
        with pytest.raises(gptedge.DataError, match=r"chat\.kv cannot be written: no space"):
            chat.save_cache(tmp_path / "chat.kv")
    with pytest.raises(gptedge.DataError, match=r"none/chat\.kv cannot be written: No such file"):
        chat.save_cache(tmp_path / "none" / "chat.kv")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]
    chat.save_cache(tmp_path / "chat.kv")
    assert model.chat(cache=tmp_path / "chat.kv").messages == chat.messages


def test_chat_that_is_answering_is_neither_saved_nor_replaced(model: gptedge.Model, tmp_path: Path) -> None:
    chat = talked(model)
    chat.save_cache(tmp_path / "chat.kv")
    with chat.stream("The") as stream:
        next(stream)
        with pytest.raises(gptedge.UsageError, match="already answering"):
            chat.save_cache(tmp_path / "other.kv")
        with pytest.raises(gptedge.UsageError, match="already answering"):
            chat.load_cache(tmp_path / "chat.kv")
    assert not (tmp_path / "other.kv").exists()


def test_system_message_comes_from_one_place(model: gptedge.Model, tmp_path: Path) -> None:
    with pytest.raises(gptedge.UsageError, match="cannot both be given"):
        model.chat(system="S", cache=tmp_path / "chat.kv")


# ---- files that are refused ----------------------------------------------------------------------------------------


def header_changed(**changes: object) -> Callable[[bytes], bytes]:
    """Another header under a right sha256, as only somebody who means it would write."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[48:56])
        header = json.dumps({**json.loads(content[56 : 56 + length]), **changes}).encode()
        body = struct.pack("<Q", len(header)) + header + content[56 + length :]
        return content[:16] + hashlib.sha256(body).digest() + body

    return change


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "cannot be read as a saved chat"),
    "something else": (lambda c: b"hello" * 100, "is not a saved chat"),
    "cut in the magic": (lambda c: c[:9], "is not a saved chat"),
    "cut in the length": (lambda c: c[:52], "header cannot be read"),
    "cut in the header": (lambda c: c[:100], "header cannot be read"),
    "cut in the tensors": (lambda c: c[:-5], "cut off or changed"),
    "longer": (lambda c: c + b"\0", "cut off or changed"),
    "a bit of a tensor": (lambda c: flipped(len(c) - 9)(c), "sha256 differs"),
    "a bit of the sha256": (flipped(20), "sha256 differs"),
    "no tokens named": (header_changed(ids=None), "header cannot be read"),
    "tokens left out": (header_changed(ids=[1, 2]), "cut off or changed"),
    "half precision": (header_changed(dtype="float16"), "saved with another bundle"),
    "messages of nobody": (header_changed(state={"messages": [{"role": "pirate"}]}), "message 0"),
    "nothing spoken": (header_changed(state={"messages": [], "spoken": [1, 2]}), "what was last said"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_file_that_is_not_what_was_saved(model: gptedge.Model, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    path = tmp_path / "chat.kv"
    talked(model).save_cache(path)
    path.write_bytes(damage(path.read_bytes()))
    chat = model.chat(system="still here")
    with pytest.raises(gptedge.DataError, match=message) as caught:
        chat.load_cache(path)
    assert "\n" not in str(caught.value)
    assert chat.messages == [{"role": "system", "content": "still here"}]
    assert chat.cached_tokens == 0


def test_missing_file(model: gptedge.Model, tmp_path: Path) -> None:
    with pytest.raises(gptedge.DataError, match=r"none\.kv cannot be read .* No such file"):
        model.chat(cache=tmp_path / "none.kv")


def test_cache_of_another_bundle(
    tiny_bundle: Path, quantized_bundle: Path, portable_bundle: Path, tmp_path: Path
) -> None:
    model = gptedge.load(tiny_bundle, threads=1)
    talked(model).save_cache(tmp_path / "chat.kv")
    for other in (quantized_bundle, portable_bundle):
        with pytest.raises(gptedge.DataError, match=r"saved with another bundle \(fp32, \w{12}\) than this one"):
            gptedge.load(other, threads=1).chat(cache=tmp_path / "chat.kv")
    gptedge.load(tiny_bundle, threads=1).chat(cache=tmp_path / "chat.kv")


def test_fingerprint_follows_the_bytes_that_compute(tiny_bundle: Path, tmp_path: Path) -> None:
    same = changed(tiny_bundle, tmp_path / "same", "config.json", lambda _: None)
    other = changed(tiny_bundle, tmp_path / "other", "config.json", lambda _: None)
    data = np.fromfile(other / "model.onnx.data", np.uint8)
    data[1000] ^= 1
    data.tofile(other / "model.onnx.data")
    assert not (same / MANIFEST).exists()
    prints = [fingerprint(open_bundle(b)) for b in (tiny_bundle, same, other)]
    assert len(set(prints)) == 3
    assert fingerprint(open_bundle(same)) == prints[1]

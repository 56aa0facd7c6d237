"""Tuning: tokens stay what they are, profiles are obeyed, kept ones hold for one machine and one bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gptedge
from gptedge.bundle import open_bundle
from gptedge.errors import UsageError
from gptedge.runtime import tuning
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.session import Logits, Session
from gptedge.runtime.tuning import Trial, choose_threads, fastest, fewer, keep, tune
from tests.cli.run import run, run_json
from tests.conftest import prepared_prompts


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTEDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were three, so that another number can be told from the default."""
    monkeypatch.setattr(tuning, "default_threads", lambda: 3)


def test_every_number_of_threads_gives_the_same_tokens(quantized_bundle: Path) -> None:
    """What the tuner chooses from, on prompts that repeat themselves and others."""
    bundle = open_bundle(quantized_bundle)
    sessions = [Session(bundle, threads=n) for n in (4, *fewer(4))]
    for prompt in prepared_prompts(sessions[0].vocab_size, 6):
        logits = []
        for session in sessions:
            cache = session.new_cache()
            rows = [session.run(prompt, cache)[-1]]
            rows += [session.run([int(rows[-1].argmax())], cache)[-1] for _ in range(12)]
            logits.append(np.stack(rows))
        for other in logits[1:]:
            np.testing.assert_array_equal(other, logits[0])


def test_trials_are_few_and_compare_numbers(tiny_bundle: Path) -> None:
    assert [fewer(n) for n in (1, 2, 6, 64)] == [[], [1], [3, 1], [32, 16, 8, 4]]
    assert max(len(fewer(n)) for n in range(1, 1000)) == tuning.TRIALS
    session = Session(open_bundle(tiny_bundle), threads=2)
    (trial,) = tune(session, load_s=0.0)
    assert (trial.threads, trial.equal) == (1, True)
    assert trial.ratio > 0
    assert tune(session, load_s=tuning.BUDGET_S + 1) == []


def test_other_numbers_are_noticed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one step's last bits is enough."""
    session, whole = Session(open_bundle(tiny_bundle), threads=2), Session.run

    def off(self: Session, ids: list[int], cache: KVCache) -> Logits:
        return whole(self, ids, cache) * np.float32(1 + 1e-6 * (self.threads == 1 and len(ids) == 1))

    monkeypatch.setattr(Session, "run", off)
    assert [trial.equal for trial in tune(session, load_s=0.0)] == [False]


def test_the_usual_number_stays_unless_another_is_clearly_faster_and_equal() -> None:
    assert fastest(8, []) == fastest(8, [Trial(4, 0.99, True), Trial(2, 0.5, False)]) == 8
    assert fastest(8, [Trial(4, 0.9, True), Trial(2, 0.8, True), Trial(1, 1.5, True)]) == 2


@pytest.mark.usefixtures("three_cores")
def test_what_was_kept_is_used_where_it_was_measured(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny_bundle)
    path = keep(bundle, 1)
    with gptedge.load(tiny_bundle) as model:
        assert (model.session.threads, model.threads_from) == (1, "tuned")
    assert vars(choose_threads(bundle, None, None, tuned=False)) == {"threads": 3, "source": "default"}
    assert choose_threads(bundle, 2, None, tuned=True).threads == 2
    for changed in ({"onnxruntime": "0.1"}, {"processor": "another"}, {"cores": 5}, {"graph": {}}):
        facts = tuning.machine(bundle) | changed
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "machine", lambda _, facts=facts: facts)
            assert choose_threads(bundle, None, None, tuned=True).source == "default"
    text = path.read_text()
    for torn in (
        text[:20],
        "",
        "[]",
        text.replace('"threads": 1', '"threads": 0'),
        text.replace('"cores": 3', '"cores": 4'),
    ):
        path.write_text(torn)
        assert choose_threads(bundle, None, None, tuned=True).source == "default"


def test_a_pinned_profile_is_obeyed(tiny_bundle: Path, tmp_path: Path) -> None:
    pinned, bundle = tmp_path / "pinned.json", open_bundle(tiny_bundle)
    pinned.write_text('{"threads": 1}')
    keep(bundle, 2)
    with gptedge.load(tiny_bundle, profile=pinned) as model:
        assert (model.session.threads, model.threads_from) == (1, "pinned")
    assert choose_threads(bundle, None, keep(bundle, 5), tuned=False).threads == 5  # what was kept may be pinned
    with pytest.raises(UsageError, match="both given"):
        gptedge.load(tiny_bundle, profile=pinned, threads=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "it is not JSON"),
        ("\x80", "it is not JSON"),
        ("3", "is not a JSON object"),
        ("{}", "threads is None"),
        ('{"threads": 0}', "threads is 0; it must be a whole number from 1"),
        ('{"threads": true}', "threads is True"),
        ('{"threads": 1024}', "threads is 1024; it must be a whole number from 1"),
        ('{"threads": 2, "guess": 7}', "has 'guess'"),
    ],
)
def test_bad_profiles_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    code, out, err = run(capsys, "generate", tiny_bundle, "x", "--profile", path)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_bench_tunes_keeps_and_tells(capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path) -> None:
    short = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1")
    assert run_json(capsys, "bench", tiny_bundle, *short)["profile"] == {"source": "default"}
    tuned = run_json(capsys, "bench", tiny_bundle, *short, "--tune")["profile"]
    kept = json.loads(Path(tuned["path"]).read_text())
    assert tuned["source"] == "tuned"
    assert all(trial["equal"] for trial in tuned["trials"])
    again = run_json(capsys, "bench", tiny_bundle, *short)
    assert (again["profile"], again["threads"]) == ({"source": "tuned"}, kept["threads"])
    assert run_json(capsys, "bench", tiny_bundle, *short, "--no-tune")["profile"] == {"source": "default"}
    code, _, err = run(capsys, "bench", tiny_bundle, *short, "--tune", "--threads", "1")
    assert (code, "--tune finds" in err) == (2, True)


def test_without_a_place_to_keep_it(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTEDGE_CACHE", str(tmp_path / "file" / "below"))
    short = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1")
    code, out, err = run(capsys, "bench", tiny_bundle, *short, "--tune", "--json")
    assert code == 0
    assert json.loads(out)["profile"]["path"] is None
    assert "could not be kept" in err

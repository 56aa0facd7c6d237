"""The workflow that teams copy: its steps are run here, on a tiny checkpoint, and its file is one that GitHub reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptedge.bundle import open_bundle, verify
from tests.conftest import TEXT

FOLDER = Path(__file__).parents[2] / "examples" / "ci"
ACTIONS = {"actions/checkout@v4", "actions/setup-python@v5", "actions/upload-artifact@v4"}


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return yaml.safe_load((FOLDER / "quantize.yml").read_text())


@pytest.fixture
def repository(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """What a team's repository holds, under the names that the workflow has."""
    (tmp_path / "ci").mkdir()
    shutil.copy(FOLDER / "quantize.sh", tmp_path / "ci")
    (tmp_path / "ci" / "evaluation.txt").write_text(TEXT)
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tmp_path


def run_steps(workflow: dict[Any, Any], repository: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The shell of the workflow's steps with its environment, in GitHub's way; installing aside."""
    job = workflow["jobs"]["quantize"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[0] == 'python -m pip install "$GPTEDGE"'
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("GITHUB_", "GPTEDGE_"))},
        **job["env"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(repository / "summary.md"),
        "GPTEDGE_EVAL_THREADS": "1",
        **changes,
    }
    script = "\n".join(runs[1:])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=repository, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_workflow_is_one_that_github_reads(workflow: dict[Any, Any]) -> None:
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML 1.1 reads "on" as true
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["quantize"]["steps"]
    assert {step["uses"] for step in steps if "uses" in step} == ACTIONS
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert workflow["jobs"]["quantize"]["env"]["GPTEDGE"] == "./ci/gptedge[export,quantize]"
    assert all(isinstance(value, str) for value in workflow["jobs"]["quantize"]["env"].values())


def test_steps_make_a_bundle_and_judge_it(workflow: dict[Any, Any], repository: Path) -> None:
    job = workflow["jobs"]["quantize"]
    # A tiny random model is far from its own rounding, so only the bounds differ from the workflow's.
    bounds = {"MAX_KL": "50", "MIN_TOP1": "1%", "MAX_PPL_INCREASE": "900%"}
    done = run_steps(workflow, repository, **bounds)
    assert done.returncode == 0, done.stderr
    places = [step["with"]["path"].replace("${{ env.WORK }}", job["env"]["WORK"]) for step in job["steps"][-2:]]
    figures, bundle = (repository / place for place in places)
    verify(open_bundle(bundle))
    assert open_bundle(bundle).recipe == job["env"]["RECIPE"]
    result = json.loads(figures.read_text())
    assert [gate["ok"] for gate in result["gates"]] == [True] * 4
    assert (repository / "summary.md").read_text().count("✅") == 4
    # The very file may be the baseline; a bound that is none leaves it as it is.
    kept = figures.read_text()
    bad = run_steps(workflow, repository, **{**bounds, "MIN_TOP1": "93"}, BASELINE=str(figures))
    assert (bad.returncode, figures.read_text()) == (2, kept), bad.stderr
    same = run_steps(workflow, repository, **bounds, BASELINE=str(figures))
    assert same.returncode == 0, same.stderr
    # Its own result is a baseline it meets; a bound it cannot meet ends with 4 and leaves the figures.
    shutil.copy(figures, repository / "ci" / "eval.json")
    figures.unlink()
    again = run_steps(workflow, repository, **bounds, BASELINE="ci/eval.json", MAX_SIZE_MB="0", RECIPE="int4-rtn")
    assert again.returncode == 4, again.stderr
    assert "::error title=gptedge gate max-size-mb::" in again.stderr
    assert {gate["name"]: gate["ok"] for gate in json.loads(figures.read_text())["gates"]}["max-size-mb"] is False
    assert "❌ FAILED" in (repository / "summary.md").read_text()


def test_script_says_what_is_missing(workflow: dict[Any, Any], repository: Path) -> None:
    for missing, complaint in ({"SOURCE": ""}, "set SOURCE to the checkpoint"), ({"TEXT": "no.txt"}, "TEXT is no.txt"):
        done = run_steps(workflow, repository, **missing)
        assert done.returncode != 0
        assert complaint in done.stderr
        assert not (repository / "build").exists(), "before anything is made"


def test_script_hands_its_options_on(workflow: dict[Any, Any], repository: Path) -> None:
    bounds = {"MAX_KL": "50", "MIN_TOP1": "1%", "MAX_PPL_INCREASE": "900%"}
    done = run_steps(workflow, repository, **bounds, RECIPE="mixed", TARGET_MB="0.3", KV="int8", PREFILL="int8")
    assert done.returncode == 0, done.stderr
    made = open_bundle(repository / "build" / "quantized")
    assert (made.recipe, made.kv) == ("mixed", "int8")
    assert made.prefill_bytes
    assert made.size_bytes <= 300_000

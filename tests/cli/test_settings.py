"""Settings that come from the environment or gptedge.toml: what is wrong in them is called by its name there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import run


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("x", True), ("0", False), ("False", False), ("off", False)]
)
def test_debug_may_be_a_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str, on: bool
) -> None:
    monkeypatch.setenv("GPTEDGE_DEBUG", value)
    code, _, err = run(capsys, "inspect", "nowhere")
    assert (code, "Traceback" in err) == (1, on)
    assert "nowhere does not exist" in err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('max-tokens = "x"', "Invalid value for max-tokens in [generate] of {file}: 'x' is not a valid int"),
        ("max-tokens = 2.5", "max-tokens in [generate] of {file}: '2.5' is not a valid int"),
        ("max-tokens = [3]", "{file}: [generate] max-tokens is [3]; it must be text, a number, true or false"),
        ("stop = [[3]]", "{file}: [generate] stop is [[3]]; it must be text, a number, or a list of them"),
    ],
)
def test_bad_values_in_the_file_name_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    file = tmp_path / "g.toml"
    file.write_text(f"[generate]\n{setting}\n")
    monkeypatch.setenv("GPTEDGE_CONFIG", str(file))
    code, _, err = run(capsys, "generate", "nowhere", "hi")
    assert (code, err.count("\n")) == (2, 1)
    assert message.format(file=file) in err


def test_a_bad_value_of_a_variable_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTEDGE_GENERATE_MAX_TOKENS", "x")
    for flags, name in (((), "GPTEDGE_GENERATE_MAX_TOKENS"), (("--max-tokens", "1", "--seed", "x"), "'--seed'")):
        code, out, err = run(capsys, "generate", "nowhere", "hi", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"gptedge: Invalid value for {name}: 'x' is not a valid int")


def test_a_config_file_that_was_asked_for_must_be_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    code, out, err = run(capsys, "doctor")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"GPTEDGE_CONFIG is {tmp_path / 'g.toml'}, which is no file" in err


def test_json_asked_for_elsewhere_has_its_errors_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_json(expected: int = 1) -> bool:
        code, out, err = run(capsys, "verify", "nowhere")
        assert (code, err.count("\n")) == (expected, 1)
        return bool(out) and json.loads(out)["exit_code"] == code

    assert not is_json()
    monkeypatch.setenv("GPTEDGE_CONFIG", str(tmp_path / "g.toml"))
    (tmp_path / "g.toml").write_text("[verify]\njson = true\n[generate]\njson = false\n")
    assert is_json()
    monkeypatch.setenv("GPTEDGE_VERIFY_JSON", "0")
    assert not is_json()
    monkeypatch.setenv("GPTEDGE_VERIFY_JSON", "1")
    (tmp_path / "g.toml").write_text("verify =")
    assert is_json(2)
    monkeypatch.delenv("GPTEDGE_CONFIG")
    assert is_json()


@pytest.mark.parametrize("name", ["MAX_KL", "MAX_KLD"])
def test_every_name_of_an_option_has_a_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"GPTEDGE_EVAL_{name}", "much")
    code, _, err = run(capsys, "eval", "bundle", "--text", "text")
    assert (code, f"GPTEDGE_EVAL_{name}" in err) == (2, True)


def test_variables_are_named_by_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPTEDGE_VERIFY_JSON" in run(capsys, "verify", "--help")[1]
    monkeypatch.setenv("GPTEDGE_VERIFY_AS_JSON", "1")
    code, _, err = run(capsys, "verify", "nowhere")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean GPTEDGE_VERIFY_JSON?" in err


@pytest.mark.parametrize("value", ["1", "0.1.0"])
def test_a_variable_does_not_ask_for_the_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GPTEDGE_VERSION", value)
    code, out, err = run(capsys, "verify", "nowhere")
    assert (code, out) == (1, "")
    assert "nowhere does not exist" in err

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from selfreg import Recipe, __version__
from selfreg.cli import app
from selfreg.cli.recipes import _run
from selfreg.evaluation.classifier import FIGURES

runner = CliRunner()


@pytest.mark.parametrize(
    "command",
    [[], *(c.split() for c in ("run", "demo", "push", "sae train", "sae finetune", "sae eval", "sae convert"))],
)
def test_help_teaches(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout) > 200


def test_version_and_schema() -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"selfreg {__version__}"
    result = runner.invoke(app, ["run", "--schema"])
    assert json.loads(result.stdout) == Recipe.model_json_schema()


def test_user_error_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("output: x\nbakbone: {model: m}\n")
    result = runner.invoke(app, ["run", str(tmp_path / "r.yaml")])
    assert result.exit_code == 1
    assert "did you mean 'backbone'" in result.stderr
    assert "Traceback" not in result.stderr
    missing = runner.invoke(app, ["run", str(tmp_path / "no.yaml")])
    assert missing.exit_code == 1
    assert "there is no recipe" in missing.stderr


def test_labels_that_look_like_markup_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_recipe(_recipe: object, *, tell: Callable[[str], None]) -> dict[str, Any]:
        tell("labels: [/bad], [good], :package:")
        return {"methods": {"plain": {"[test]": dict.fromkeys(FIGURES)}}}

    monkeypatch.setattr("selfreg.run.run_recipe", run_recipe)
    _run(SimpleNamespace(output=tmp_path))
    out = capsys.readouterr().out
    assert "labels: [/bad], [good], :package:" in out
    assert "on [test]" in out


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["push", str(tmp_path), "me/x"])
    assert result.exit_code == 1
    assert "works in one process, and this is one of 2" in " ".join(result.stderr.split())

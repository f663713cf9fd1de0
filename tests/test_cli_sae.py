import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import tiny_backbone
from selfreg import HiddenStateExtractor, SAEForFeatureExtraction
from selfreg.cli import app

runner = CliRunner()


@pytest.fixture
def files(tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path) -> tuple[str, str]:
    """A backbone and a file of texts."""
    tiny_backbone().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 20))
    return str(tmp_path / "model"), str(tmp_path / "texts.jsonl")


def run(*arguments: str) -> str:
    result = runner.invoke(app, ["sae", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_train_finetune_evaluate_convert(files: tuple[str, str], texts: list[str], tmp_path: Path) -> None:
    model, path = files
    sizes = ("--features", "32", "--k", "4", "--batch-size", "64")
    out = run("train", path, "--model", model, "--layer", "1", "-o", str(tmp_path / "sae"), *sizes, "--epochs", "8")
    assert "FVU 0." in out
    sae = SAEForFeatureExtraction.from_pretrained(tmp_path / "sae")
    assert (sae.config.num_features, sae.config.k, sae.config.layer) == (32, 4, 1)
    assert {p.name for p in (tmp_path / "sae").iterdir()} == {"config.json", "model.safetensors"}
    HiddenStateExtractor.from_sae(sae).pool(texts)
    tuned = run("finetune", str(tmp_path / "sae"), path, "-o", str(tmp_path / "tuned"), "--batch-size", "64")
    assert "FVU 0." in tuned
    figures = run("eval", str(tmp_path / "tuned"), path)
    assert "L0 4.0" in figures
    run("convert", str(tmp_path / "sae"), str(tmp_path / "lens"), "--to", "saelens")
    told = run("convert", str(tmp_path / "lens"), str(tmp_path / "back"))
    assert "32 features of width 16, topk, layer 1 of" in told.replace("\n", " ")
    assert "from SAELens topk" in told
    back = SAEForFeatureExtraction.from_pretrained(tmp_path / "back")
    # All that says how the states were made came through, so that it can be used as it is.
    assert back.config.hidden_state_spec() == sae.config.hidden_state_spec()
    assert run("eval", str(tmp_path / "back"), path) == run("eval", str(tmp_path / "sae"), path)
    states = torch.randn(9, 16)
    torch.testing.assert_close(back.encode(states).to_dense(), sae.encode(states).to_dense(), rtol=1e-4, atol=1e-4)


def test_training_that_was_stopped_goes_on(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfreg import SAETrainer

    model, path = files
    settings = [path, "--model", model, "--layer", "1", "--features", "32", "--k", "4", "--batch-size", "16"]
    whole = run("train", *settings, "-o", str(tmp_path / "whole"), "--epochs", "12")
    # Stopped after the first checkpoint (200 steps).
    step = SAETrainer.training_step

    def stop(self: SAETrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 210:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SAETrainer, "training_step", stop)
    stopped = runner.invoke(app, ["sae", "train", *settings, "-o", str(tmp_path / "sae"), "--epochs", "12"])
    assert stopped.exit_code != 0
    assert not (tmp_path / "sae" / "model.safetensors").exists()
    monkeypatch.undo()
    # Of other settings: told, and not gone on from.
    other = run("train", *settings, "-o", str(tmp_path / "other"), "--epochs", "1")
    assert "goes on" not in other
    shutil.copytree(tmp_path / "sae", tmp_path / "changed")
    assert "starts anew" in run("train", *settings, "-o", str(tmp_path / "changed"), "--epochs", "1")
    again = run("train", *settings, "-o", str(tmp_path / "sae"), "--epochs", "12")
    assert again.splitlines()[-2] == whole.splitlines()[-2]
    assert "goes on at step 200" in again
    a, b = (SAEForFeatureExtraction.from_pretrained(tmp_path / name).state_dict() for name in ("sae", "whole"))
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "one"], "--layer one: give the number of a block"),
        (["--layer", "99"], "99"),
        (["--layer", "1", "--k", "64"], "k=64 is over num_features=32"),
        (["--layer", "1", "--column", "body"], "has no column 'body'; it has text"),
        (["--layer", "1", "--learning-rate", "-1"], "learning_rate=-1.0 must not be negative"),
    ],
)
def test_mistakes_are_told(files: tuple[str, str], arguments: list[str], message: str, tmp_path: Path) -> None:
    model, path = files
    settings = ["sae", "train", path, "--model", model, "-o", str(tmp_path / "sae"), "--features", "32", "--k", "4"]
    result = runner.invoke(app, [*settings, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")


def test_an_option_that_contradicts_the_sae_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    model, path = files
    run("train", path, "--model", model, "--layer", "1", "-o", str(tmp_path / "sae"), "--features", "32", "--k", "4")
    assert "FVU" in run("eval", str(tmp_path / "sae"), path, "--layer", "1", "--model", model)
    for option, value in {"--layer": "2", "--model": "another/model"}.items():
        result = runner.invoke(app, ["sae", "eval", str(tmp_path / "sae"), path, option, value])
        assert result.exit_code == 1
        assert f"{option} says" in result.stderr.replace("\n", " ")


def test_what_is_odd_is_told(files: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"text": "the patient has a fever"}, {"text": None}, {"text": " "}, {"text": "she is ill"}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [str(tmp_path / "few.jsonl"), "--model", files[0], "--layer", "1", "-o", str(tmp_path / "sae")]
    result = runner.invoke(app, ["sae", "train", *settings, "--features", "64", "--k", "4"])
    assert result.exit_code == 0
    assert "2 of 4 rows hold no text" in result.stdout
    assert "fewer tokens than features (64)" in result.stderr.replace("\n", " ")
    # One text to train on and one to measure on; one alone can't be both.
    rows = rows[:3]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings[-1] = str(tmp_path / "one")
    result = runner.invoke(app, ["sae", "train", *settings, "--features", "64", "--k", "4"])
    assert result.exit_code == 1
    assert "there is one text only" in result.stderr


def test_an_activation_far_from_k_is_told(files: tuple[str, str], tmp_path: Path) -> None:
    model, path = files
    settings = [path, "--model", model, "--layer", "1", "-o", str(tmp_path / "sae"), "--features", "32", "--k", "4"]
    result = runner.invoke(app, ["sae", "train", *settings, "--activation", "relu", "--epochs", "0.5"])
    assert result.exit_code == 0
    assert "k=4 were asked for" in result.stderr.replace("\n", " ")


def test_kinds_that_saelens_has_otherwise_are_told(files: tuple[str, str], tmp_path: Path) -> None:
    model, path = files
    settings = [path, "--model", model, "--layer", "1", "-o", str(tmp_path / "sae"), "--features", "32", "--k", "4"]
    run("train", *settings, "--activation", "batch_topk")
    assert "batch_topk as jumprelu" in run("convert", str(tmp_path / "sae"), str(tmp_path / "lens"), "--to", "saelens")


def test_an_empty_file_is_told(files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    settings = [str(tmp_path / "empty.jsonl"), "--model", files[0], "--layer", "1", "-o", str(tmp_path / "sae")]
    result = runner.invoke(app, ["sae", "train", *settings])
    assert "empty.jsonl is empty" in result.stderr.replace("\n", " ")


def test_an_activation_that_is_not_there_is_told_with_those_that_are(files: tuple[str, str], tmp_path: Path) -> None:
    model, path = files
    settings = ["sae", "train", path, "--model", model, "-o", str(tmp_path / "sae"), "--layer", "1"]
    result = runner.invoke(app, [*settings, "--activation", "gelu"])
    assert result.exit_code == 2
    assert "jumprelu" in result.stderr


def test_nothing_is_overwritten(files: tuple[str, str], tmp_path: Path) -> None:
    model, path = files
    run("train", path, "--model", model, "--layer", "1", "-o", str(tmp_path / "sae"), "--features", "32", "--k", "4")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    result = runner.invoke(app, ["sae", "convert", str(tmp_path / "sae"), str(tmp_path / "there")])
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"
    for folder in ("there", "sae"):
        settings = ["sae", "train", path, "--model", model, "--layer", "1", "-o", str(tmp_path / folder)]
        result = runner.invoke(app, settings)
        assert result.exit_code == 1
        assert "is there already" in result.stderr


def test_an_sae_that_does_not_say_its_backbone(files: tuple[str, str], tmp_path: Path) -> None:
    from sae_helpers import make_sae

    model, path = files
    make_sae().save_pretrained(tmp_path / "sae")
    result = runner.invoke(app, ["sae", "eval", str(tmp_path / "sae"), path])
    assert "give --model and --layer" in result.stderr
    assert "FVU" in run("eval", str(tmp_path / "sae"), path, "--model", model, "--layer", "2")

import difflib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from conftest import WORDS, tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import HiddenStateExtractor, UnintendedFeatures

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "train_classifier.py"


def test_example_script_is_short_and_runs(tmp_path: Path) -> None:
    assert len(SCRIPT.read_text(encoding="utf8").splitlines()) < 60
    tiny_backbone().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    arguments = ["--model", str(tmp_path / "tiny"), "--layer", "1", "--features", "64", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("plain", "selfreg"):
        assert f"{name} {{'accuracy'" in done.stdout
        assert (tmp_path / "out" / name / "model.safetensors").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_recipes_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfreg import Recipe

    monkeypatch.setenv("SELFREG_DATA", "/data")
    recipe = Recipe.from_yaml(path)
    assert recipe.features.method in ("keywords", "attribute")


on_a_cpu = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def code_of(name: str) -> list[str]:
    """The lines of an example under its docstring."""
    return (EXAMPLES / name).read_text(encoding="utf8").split('"""', 2)[2].splitlines()


def test_three_lines_make_a_fine_tuning_script_a_regularised_one() -> None:
    plain, regularized = code_of("finetune_plain.py"), code_of("finetune_regularized.py")
    assert len(plain) < 50
    changes = [line for line in difflib.ndiff(plain, regularized) if line[0] in "+-" and line[2:].strip()]
    assert [line for line in changes if line[0] == "+"] == [
        "+ from selfreg import RegularizedTrainer, UnintendedFeatures",
        "+ trainer = RegularizedTrainer(",
        '+     unintended=UnintendedFeatures.from_pretrained("unintended"),',
    ]
    assert [line for line in changes if line[0] == "-"] == ["-     Trainer,", "- trainer = Trainer("]
    shown = (EXAMPLES / "finetune_regularized.py").read_text(encoding="utf8").split('"""')[1]
    for line in changes:
        assert line[0] + line[2:] in shown


@pytest.fixture
def tiny_model(tmp_path: Path) -> tuple[Path, UnintendedFeatures]:
    """A tiny decoder in tmp_path/tiny, and features of its final states in tmp_path/unintended."""
    config = Qwen3Config(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(config)
    # As a pre-trained decoder comes, without a head.
    model.model.save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    extractor = HiddenStateExtractor(model.model, word_tokenizer(), layer="final", name="tiny")
    unintended = UnintendedFeatures.from_ids(make_sae(extractor), [1, 2, 3])
    unintended.save_pretrained(tmp_path / "unintended")
    return tmp_path / "tiny", unintended


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def use_of(folder: Path, unintended: UnintendedFeatures) -> float:
    """Mean over logits and features of |w · û|."""
    weight = AutoModelForSequenceClassification.from_pretrained(folder).score.weight
    directions = torch.nn.functional.normalize(unintended.decoder_directions, dim=1)
    return float((weight @ directions.T).abs().mean().detach())


@on_a_cpu
def test_fine_tuning_with_and_without_the_three_lines(
    tiny_model: tuple[Path, UnintendedFeatures], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"text": text, "label": int("fever" in text)}) for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    use = {}
    for name in ("plain", "regularized"):
        arguments = ["--model", "tiny", "--train", "train.jsonl", "--output", name]
        run_example(f"finetune_{name}.py", monkeypatch, *arguments, "--epochs", "10", "--learning_rate", "3e-3")
        use[name] = use_of(tmp_path / name, tiny_model[1])
    assert use["regularized"] < 0.7 * use["plain"]


@on_a_cpu
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_reward_trainer_script(
    tiny_model: tuple[Path, UnintendedFeatures], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(texts[:30], texts[30:], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    monkeypatch.chdir(tmp_path)
    use = []
    for penalty, dependence in (("0", "0"), ("3", "1")):
        out = f"out-{penalty}"
        files = ["--model", "tiny", "--train", "pairs.jsonl", "--unintended", "unintended", "--output_dir", out]
        weights = ["--penalty_weight", penalty, "--dependence_weight", dependence]
        settings = ["--num_train_epochs", "10", "--learning_rate", "3e-3", "--bf16", "false", "--report_to", "none"]
        run_example("reward_trainer.py", monkeypatch, *files, *weights, *settings)
        use.append(use_of(tmp_path / out, tiny_model[1]))
    assert use[1] < 0.7 * use[0]

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import tiny_backbone, word_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_classifier.py"


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

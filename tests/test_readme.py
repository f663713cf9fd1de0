"""The README's code, as it stands there, on a tiny backbone."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from conftest import tiny_backbone, word_tokenizer
from selfreg import RegularizedTrainingArguments, SAETrainingArguments
from selfreg.features.chat import Choice, Conversation
from selfreg.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
SMALLER = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny",
    "layer=15": "layer=1",
    "hidden_size=576": "hidden_size=16",
    "num_features=4608": "num_features=64",
    "k=32": "k=4",
}


class Chat:
    """Says the first thing that comes to mind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        return ["a word"] * len(conversations)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        first = {option: float(option == options[0]) for option in options}
        return [Choice(options[0], first) for _ in conversations]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_backbone().save_pretrained("tiny")
    word_tokenizer().save_pretrained("tiny")
    whole, pipeline, chat, *_ = blocks("python")
    for old, new in SMALLER.items():
        assert old in whole, old
        whole = whole.replace(old, new)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    for arguments in (SAETrainingArguments, RegularizedTrainingArguments):
        monkeypatch.setattr(f"selfreg.{arguments.__name__}", lambda *a, _of=arguments, **k: _of(*a, **{**k, **quiet}))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(whole, names)
    exec(pipeline, names)
    monkeypatch.setattr("selfreg.LocalChatModel", lambda name: Chat(name), raising=False)
    monkeypatch.setattr("selfreg.EndpointChatModel", lambda _url, name, **_options: Chat(name), raising=False)
    exec(chat.replace("range(100)", "range(30)"), names)
    assert Path("runs/answers.jsonl").exists()
    assert 17 in names["unintended"].feature_ids  # type: ignore[attr-defined]
    assert Path("runs/clf/final/config.json").exists()


def test_recipe_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    assert Recipe.from_dict(yaml.safe_load(text), base=tmp_path).features.method == "keywords"

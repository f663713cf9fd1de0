"""A tiny classifier, for the tests of several modules."""

from typing import Any

import pytest
import torch

from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)


def make_sae(extractor: HiddenStateExtractor) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.randn(16) * 0.01, torch.tensor(0.1))
    return sae


def make_classifier(extractor: HiddenStateExtractor, **kwargs: Any) -> RegularizedSequenceClassifier:
    sae = make_sae(extractor)
    unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    model = RegularizedSequenceClassifier.from_backbone(
        extractor, sae, unintended, id2label={0: "well", 1: "ill", 2: "very ill"}, **kwargs
    )
    torch.nn.init.normal_(model.score.weight)
    model.set_standardization(torch.randn(20, 16) * 0.2)
    return model.eval()


SECOND_IS_BEST: dict[str, Any] = {
    "num_train_epochs": 4,
    "learning_rate": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "told",
    "greater_is_better": True,
    "lr_scheduler_type": "constant",
}


def train_and_restore_the_second(
    model: RegularizedSequenceClassifier, args: RegularizedTrainingArguments, rows: Any
) -> RegularizedTrainer:
    """Trains with `SECOND_IS_BEST`, and checks that the model ends as it was after the second epoch.

    Which epoch is the best is told: a loss that turns on one CPU falls to the end on another.
    """
    scores = iter([0.2, 0.9, 0.1, 0.3])
    trainer = RegularizedTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda _: {"told": next(scores)},
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] != pytest.approx(losses[-1], rel=1e-2), "the best is as the last: this shows nothing"
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-4)
    return trainer

"""The method of a recipe with `classifier.lora`: head and adapter together, over texts instead of cached states."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.classifier.baselines import FittedHead
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.trainer import RegularizedTrainer
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.data import TaskData
from selfreg.evaluation.drift import adapted_fvu
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.texts import TextSet
from selfreg.utils.trainer import StepProgress, last_whole_checkpoint

logger = logging.getLogger(__name__)

_DRIFT_TEXTS = 300
_SAVE_STEPS = 50


def fit_adapter(
    data: TaskData, args: RegularizedTrainingArguments, model: RegularizedSequenceClassifier, folder: Path
) -> FittedHead:
    """Trains a classifier with an adapter on the training texts, from the last whole checkpoint in `folder` on.

    Args:
        data: of the run.
        args: with numbers for weights.
        model: the classifier, from `from_backbone(..., lora=...)`.
        folder: of the checkpoints; its name stands for all that the training depends on.
    """
    args = replace(args, output_dir=str(folder), save_strategy="steps", save_steps=_SAVE_STEPS, save_total_limit=2)
    rows = _rows(data.train, pointwise=args.preference_loss == "pointwise")
    progress = StepProgress("classifier selfreg (LoRA)")
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows, callbacks=[progress])
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    model.eval()
    return FittedHead("selfreg", model, lambda states: states, trainer.state.log_history)


def adapted_states(
    model: RegularizedSequenceClassifier, part: TextSet, extractor: HiddenStateExtractor, template: str | None
) -> PooledStates:
    """Pooled states of a set with the adapter as it is now."""
    prompts = part.prompts(lambda: extractor.tokenizer, template)
    return model.pooled_states(prompts, None if part.task == "preference" else part.labels)


def drift(
    model: RegularizedSequenceClassifier, sae: SAEForFeatureExtraction, part: TextSet, template: str | None
) -> dict[str, Any]:
    """How far the adapted states have left the SAE, on the first texts of a set: FVU before and after."""
    found = adapted_fvu(model, sae, part.prompts(lambda: model.tokenizer, template)[:_DRIFT_TEXTS])
    return {"fvu_before": found.before, "fvu_after": found.after, "features_fit": found.features_describe_states}


def _rows(part: TextSet, *, pointwise: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(part.texts):
        row = json.loads(text) if part.task == "preference" else {"text": text, "label": part.labels[number]}
        for name, values in (("weight", part.weights), ("margin", part.margins)):
            if values is not None and not (name == "margin" and pointwise):
                row[name] = values[number]
        rows.append(row)
    return rows

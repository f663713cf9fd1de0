"""Trains and measures the controlled classifier and its baselines, one after the other, on the same cached states."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import set_seed

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.store import ActivationStore
from selfreg.classifier.baselines import FittedHead, fit_baseline, fit_head
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.data import TaskData
from selfreg.evaluation.classifier import evaluate_head, figure_names
from selfreg.features.selection import UnintendedFeatures
from selfreg.recipe import Recipe
from selfreg.utils.files import atomic_folder
from selfreg.utils.trainer import StepProgress

_OFF = {"penalty_weight": 0.0, "dependence_weight": 0.0, "remove_unintended": False}
# Each of the three parts of selfreg by itself.
_PARTS: dict[str, dict[str, Any]] = {
    "removal_only": {**_OFF, "remove_unintended": True},
    "penalty_only": {name: value for name, value in _OFF.items() if name != "penalty_weight"},
    "dependence_only": {name: value for name, value in _OFF.items() if name != "dependence_weight"},
}


class Heads:
    """The methods of a recipe.

    Args:
        recipe: budget, weights and where to write.
        data: texts, labels and groups.
        stores: hidden states of the train and eval sets, by name.
        unintended: what must not be used.
        extractor: gives the backbone; called only if a method is trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TaskData,
        stores: Mapping[str, ActivationStore],
        unintended: UnintendedFeatures,
        extractor: Callable[[], HiddenStateExtractor],
    ) -> None:
        self.recipe, self.data, self.stores = recipe, data, stores
        self.unintended, self.extractor = unintended, extractor
        self.output = Path(recipe.output)
        part = recipe.classifier
        self.args = RegularizedTrainingArguments(
            str(self.output / ".work" / "heads"),
            penalty_weight=part.penalty_weight,  # type: ignore[arg-type]
            similarity=part.similarity,
            dependence_weight=part.dependence_weight,  # type: ignore[arg-type]
            remove_unintended=part.remove_unintended,
            weight_decay=part.weight_decay,
            num_train_epochs=part.epochs,
            learning_rate=part.learning_rate,
            per_device_train_batch_size=part.batch_size,
            class_weights=part.class_weights,  # type: ignore[arg-type]
            preference_loss=part.preference_loss,
            seed=recipe.seed,
            save_strategy="no",
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
        )

    @cached_property
    def classifier(self) -> RegularizedSequenceClassifier:
        return self._new_classifier()

    def _new_classifier(self) -> RegularizedSequenceClassifier:
        return RegularizedSequenceClassifier.from_backbone(
            self.extractor(),
            None,
            self.unintended,
            id2label=dict(enumerate(self.data.labels)) if self.data.labels else None,
            task=self.recipe.task,
            remove_unintended=self.recipe.classifier.remove_unintended,
        )

    @cached_property
    def with_removal(self) -> dict[str, PooledStates]:
        return self._pool(remove=True)

    @cached_property
    def without_removal(self) -> dict[str, PooledStates]:
        return self._pool(remove=False)

    def _pool(self, *, remove: bool) -> dict[str, PooledStates]:
        config = self.classifier.config
        as_it_was, config.remove_unintended = config.remove_unintended, remove
        try:
            return self._pooled()
        finally:
            config.remove_unintended = as_it_was

    def _pooled(self) -> dict[str, PooledStates]:
        data = self.data
        return {
            part.name: self.classifier.pooled_states(
                self.stores[part.name],
                None if part.task == "preference" else part.labels,
                weights=part.weights,
                margins=part.margins if self.args.preference_loss == "bradley_terry" else None,
            )
            for part in (data.train, *data.eval.values())
        }

    def measure(self, name: str) -> dict[str, Any]:
        """Trains `name` and measures it on every eval set; saves the classifier where it is selfreg's."""
        data = self.data
        callbacks = [StepProgress(f"classifier {name}")]
        set_seed(self.recipe.seed)
        head: FittedHead | None
        if name in _PARTS:
            args = replace(self.args, **_PARTS[name])
            states = self.with_removal if args.remove_unintended else self.without_removal
            head = fit_head(name, self._new_classifier(), args, states["train"], callbacks=callbacks)
        elif name == "selfreg":
            states = self.with_removal if self.args.remove_unintended else self.without_removal
            head = fit_head(name, self.classifier, self.args, states["train"], callbacks=callbacks)
            with atomic_folder(self.output / "classifier") as temporary:
                self.classifier.save_pretrained(temporary)
        else:
            states = self.without_removal
            config = self.classifier.config
            head = fit_baseline(
                name,
                config,
                self.args,
                states["train"],
                groups=data.train.groups,
                directions=self.unintended.decoder_directions,
                callbacks=callbacks,
            )
        figures: dict[str, Any] = {}
        cells: dict[str, Any] = {}
        for part in data.eval.values():
            if head is None:
                figures[part.name], cells[part.name] = dict.fromkeys(figure_names(self.recipe.task)), []
            else:
                figures[part.name], cells[part.name] = evaluate_head(
                    head, states[part.name], self.unintended, part.groups
                )
        return {"figures": figures, "cells": cells, "history": head.history if head else []}

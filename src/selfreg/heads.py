"""Trains and measures the controlled classifier and its baselines, one after the other, on the same cached states."""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.store import ActivationStore
from selfreg.adapter_head import adapted_states, drift, fit_adapter
from selfreg.classifier.arguments import AUTO
from selfreg.classifier.baselines import FittedHead, fit_baseline, fit_head
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.offset import attribute_offsets, offsets_of
from selfreg.classifier.path import WeightPath, resolve_weights
from selfreg.classifier.scrubbing import scrub, scrub_words
from selfreg.classifier.states import PooledStates
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.data import TaskData
from selfreg.evaluation.classifier import evaluate_head, evaluate_logits, figure_names
from selfreg.evaluation.path_chart import reliance, save_path
from selfreg.features.catalog import FeatureCatalog
from selfreg.features.selection import UnintendedFeatures
from selfreg.recipe import Recipe
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.text_heads import TEXT_BASELINES, changed_texts, text_logits
from selfreg.utils.files import atomic_folder
from selfreg.utils.trainer import StepProgress

logger = logging.getLogger(__name__)

_OFF = {
    "penalty_weight": 0.0,
    "dependence_weight": 0.0,
    "remove_unintended": False,
    "offset_weight": 0.0,
    "logit_decay": 0.0,
}
# Each of the parts of selfreg by itself.
_PARTS: dict[str, dict[str, Any]] = {
    "removal_only": {**_OFF, "remove_unintended": True},
    "penalty_only": {name: value for name, value in _OFF.items() if name != "penalty_weight"},
    "dependence_only": {name: value for name, value in _OFF.items() if name != "dependence_weight"},
    "offset_only": {name: value for name, value in _OFF.items() if name != "offset_weight"},
}


class Heads:
    """The methods of a recipe.

    Args:
        recipe: budget, weights and where to write.
        data: texts, labels and groups.
        stores: hidden states of the train and eval sets, by name.
        unintended: what must not be used.
        catalog: the spans of its features, for the words that `scrubbing` takes out.
        extractor: gives the backbone; called only if a method is trained.
        sae: what the features are of; tells how far an adapter moves the states away from it.
        key: stands for all that a method depends on: unfinished training is found again by it.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TaskData,
        stores: Mapping[str, ActivationStore],
        unintended: UnintendedFeatures,
        catalog: FeatureCatalog,
        extractor: Callable[[], HiddenStateExtractor],
        sae: SAEForFeatureExtraction,
        key: str,
    ) -> None:
        self.recipe, self.data, self.stores = recipe, data, stores
        self.unintended, self.catalog, self.extractor, self.sae = unintended, catalog, extractor, sae
        self.output, self.key = Path(recipe.output), key
        self.weight_path: WeightPath | None = None
        part = recipe.classifier
        self.args = RegularizedTrainingArguments(
            str(self.output / ".work" / "heads"),
            penalty_weight=part.penalty_weight,
            similarity=part.similarity,
            dependence_weight=part.dependence_weight,
            offset_weight=part.offset_weight,
            logit_decay=part.logit_decay,
            remove_unintended=part.remove_unintended,
            ridge=part.ridge,
            weight_decay=part.weight_decay,
            label_smoothing_factor=part.label_smoothing_factor,
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
        ).resolve_defaults(recipe.task, len(unintended), can_offset=part.lora is None)

    @cached_property
    def classifier(self) -> RegularizedSequenceClassifier:
        # The one that is kept; the adapter is of it alone.
        return self._new_classifier()

    def _new_classifier(self, lora: dict[str, Any] | None = None) -> RegularizedSequenceClassifier:
        return RegularizedSequenceClassifier.from_backbone(
            self.extractor(),
            None,
            self.unintended,
            id2label=dict(enumerate(self.data.labels)) if self.data.labels else None,
            task=self.recipe.task,
            remove_unintended=self.recipe.classifier.remove_unintended,
            lora=lora,
        )

    @cached_property
    def with_removal(self) -> dict[str, PooledStates]:
        return self._pool(self.stores, remove=True)

    @cached_property
    def without_removal(self) -> dict[str, PooledStates]:
        return self._pool(self.stores, remove=False)

    @cached_property
    def scrubbed(self) -> dict[str, PooledStates] | None:
        """Of the texts without the keywords; with the activations in the texts as they are."""
        try:
            words = self.recipe.features.keywords or scrub_words(self.catalog, self.unintended.feature_ids)
        except ValueError as error:
            logger.warning("scrubbing left out: %s", error)
            return None
        logger.info("scrubbing takes out: %s", ", ".join(words))
        parts = (self.data.train, *self.data.eval.values())
        texts = {part.name: changed_texts(part, partial(scrub, keywords=words)) for part in parts}
        template, tokenizer = self.recipe.backbone.template, self.extractor().tokenizer
        prompts = {name: part.prompts(lambda: tokenizer, template) for name, part in texts.items()}
        pooled = self._pool(prompts, remove=False)
        # What a decision depends on is measured in the texts that people wrote.
        return {
            name: replace(states, activations=self.without_removal[name].activations)
            for name, states in pooled.items()
        }

    def _pool(self, texts: Mapping[str, Any], *, remove: bool) -> dict[str, PooledStates]:
        config = self.classifier.config
        as_it_was, config.remove_unintended = config.remove_unintended, remove
        try:
            return {
                part.name: self.classifier.pooled_states(
                    texts[part.name],
                    None if part.task == "preference" else part.labels,
                    weights=part.weights,
                    margins=part.margins if self.args.preference_loss == "bradley_terry" else None,
                )
                for part in (self.data.train, *self.data.eval.values())
            }
        finally:
            config.remove_unintended = as_it_was

    def measure(self, name: str) -> dict[str, Any]:
        """Trains `name` and measures it on every eval set; saves the classifier where it is selfreg's."""
        set_seed(self.recipe.seed)
        if name in TEXT_BASELINES:
            return self._measure_texts(name)
        adapted = name == "selfreg" and self.recipe.classifier.lora is not None
        head, states = self._fit_adapter() if adapted else self._fit(name)
        if name == "selfreg":
            assert head is not None
            with atomic_folder(self.output / "classifier") as temporary:
                head.model.save_pretrained(temporary)
                if self.weight_path is not None:
                    save_path(self.weight_path, temporary)
        if adapted:
            # Unfinished trainings of other recipes are of no more use either.
            for folder in (self.output / ".work").glob("adapter-*"):
                shutil.rmtree(folder)
        if head is None:
            return self._nothing()
        found = {
            part.name: evaluate_head(head, states[part.name], self.unintended, part.groups)
            for part in self.data.eval.values()
        }
        result = _result(found, head.history)
        if adapted:
            first = next(iter(self.data.eval.values()))
            result["drift"] = drift(head.model, self.sae, first, self.recipe.backbone.template)
        if head.ridge:
            result["ridge"] = head.ridge
        if name == "selfreg" and self.weight_path is not None:
            result["weight_path"] = asdict(self.weight_path)
        return result

    def _with_offsets(
        self, states: dict[str, PooledStates], args: RegularizedTrainingArguments
    ) -> dict[str, PooledStates]:
        """The training set with what is set aside: of the attribute, where features are chosen by one."""
        train = self.data.train
        if not args.offset_weight:
            return states
        if train.attribute is not None and train.task == "single_label":
            offsets = attribute_offsets(train.labels, train.attribute, len(self.data.labels))
        else:
            model = self.classifier
            offsets = offsets_of(
                train.task,
                states["train"],
                model.score.out_features,
                model.unintended_mask,
                seed=self.recipe.seed,
            )
        return {**states, "train": replace(states["train"], offsets=args.offset_weight * offsets)}

    def _choose_weights(self) -> None:
        """Puts numbers in the place of "auto", for all of selfreg's methods alike."""
        if AUTO in (self.args.penalty_weight, self.args.dependence_weight):
            states = self.with_removal if self.args.remove_unintended else self.without_removal
            states = self._with_offsets(states, self.args)
            self.args, self.weight_path = resolve_weights(
                self._new_classifier(), self.args, states["train"], measure=reliance
            )
            logger.info("chosen by validation loss: penalty_weight=%g, dependence_weight=%g", *self.args.term_weights)

    def _fit_adapter(self) -> tuple[FittedHead, dict[str, PooledStates]]:
        self._choose_weights()
        part = self.recipe.classifier
        args = replace(
            self.args, num_train_epochs=part.adapter_epochs, adapter_learning_rate=part.adapter_learning_rate
        )
        work = self.output / ".work"
        head = fit_adapter(self.data, args, self._new_classifier(part.lora), work / f"adapter-{self.key}")
        template = self.recipe.backbone.template
        states = {
            # What a decision depends on is measured by the features' activations in the states as they were found.
            part.name: replace(
                adapted_states(head.model, part, self.extractor(), template),
                activations=self.without_removal[part.name].activations,
            )
            for part in self.data.eval.values()
        }
        return head, states

    def _fit(self, name: str) -> tuple[FittedHead | None, dict[str, PooledStates]]:
        callbacks = [StepProgress(f"classifier {name}")]
        if name == "offset_only" and not self.args.offset_weight:
            logger.warning("offset_only left out: there is no offset (classifier.offset_weight)")
            return None, {}
        if name == "selfreg" or name in _PARTS:
            self._choose_weights()
            args = replace(self.args, **_PARTS.get(name, {}))
            states = self._with_offsets(self.with_removal if args.remove_unintended else self.without_removal, args)
            model = self.classifier if name == "selfreg" else self._new_classifier()
            return fit_head(name, model, args, states["train"], callbacks=callbacks), states
        scrubbed = self.scrubbed if name == "scrubbing" else None
        if name == "scrubbing" and scrubbed is None:
            return None, {}
        states = self.without_removal if scrubbed is None else scrubbed
        head = fit_baseline(
            "plain" if name == "scrubbing" else name,
            self.classifier.config,
            self.args,
            states["train"],
            groups=self.data.train.groups,
            directions=self.unintended.decoder_directions,
            callbacks=callbacks,
        )
        return head, states

    def _measure_texts(self, name: str) -> dict[str, Any]:
        logits = text_logits(name, self.recipe, self.data)
        if logits is None:
            return self._nothing()
        names = dict(enumerate(self.data.labels))
        found = {
            part.name: evaluate_logits(
                self.recipe.task,
                logits[part.name],
                self.without_removal[part.name],
                self.unintended,
                part.groups,
                names,
            )
            for part in self.data.eval.values()
        }
        return _result(found, [])

    def _nothing(self) -> dict[str, Any]:
        """The figures of a method that does not apply."""
        figures = dict.fromkeys(figure_names(self.recipe.task))
        return _result({name: (figures, []) for name in self.data.eval}, [])


def _result(found: Mapping[str, tuple[Any, Any]], history: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "figures": {name: figures for name, (figures, _) in found.items()},
        "cells": {name: cells for name, (_, cells) in found.items()},
        "history": history,
    }

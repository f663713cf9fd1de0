"""RegularizedTrainer: trains a classifier that stays off the unintended features."""

from typing import Any

import torch
from torch import Tensor

from selfreg.classifier.collator import ClassifierCollator, labels_of, pooled_dataset
from selfreg.classifier.inputs import check_dataset, check_removal, label_weights
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import dependence_directions
from selfreg.classifier.regularizer import RegularizationMixin
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets, held_constant, task_loss
from selfreg.classifier.training_args import RegularizedTrainingArguments


class RegularizedTrainer(RegularizationMixin):
    """Trains a [`RegularizedSequenceClassifier`]; its head alone, where the backbone is frozen.

    Args:
        model: the classifier; or a stock `AutoModelForSequenceClassification` model, with `unintended`.
        args: a [`RegularizedTrainingArguments`]; for stock models any [`~transformers.TrainingArguments`].
        train_dataset: a [`PooledStates`]; or rows with `text` (or `input_ids`, as the tokenizer gives them for the
            bare text) and `label` (or `labels`); or rows with `pooled` and `labels`, which is enough where
            `dependence_weight` is 0. For `preference` rows with `chosen`, `rejected` and, where there are, `prompt`
            and `margin`: strings or lists of messages, as TRL has them. A column `weight` weighs texts in the loss.
        eval_dataset: likewise.
        unintended: for stock models only.
        kwargs: as for [`RegularizationMixin`] and [`~transformers.Trainer`].

    Raises:
        ValueError: a column is missing, a text is empty, a label is out of range or there is only one.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        unintended: Any = None,
        **kwargs: Any,
    ) -> None:
        self._label_weights: Tensor | None = None
        own = isinstance(model, RegularizedSequenceClassifier)
        if own and not isinstance(args, RegularizedTrainingArguments):
            raise ValueError(
                f"args must be RegularizedTrainingArguments, not {type(args).__name__}: TrainingArguments with the "
                "weights of the two terms"
            )
        if own:
            if not model.backbone_is_frozen:
                raise ValueError(
                    "the backbone has trainable parameters; selfreg trains the head over a frozen backbone so far: "
                    "model.backbone.requires_grad_(False)"
                )
            if args.remove_unintended is not None:
                model.config.remove_unintended = args.remove_unintended
            kwargs.setdefault("data_collator", ClassifierCollator.of(model))
            labels = check_dataset(train_dataset, model, "train_dataset", training=True)
            parts = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, part in parts.items():
                check_dataset(part, model, name, training=False)
            for name, part in {"train_dataset": train_dataset, **parts}.items():
                check_removal(part, model, name)
            self._label_weights = label_weights(args, labels, model)
            if args.cache_states:
                # The batches are then of pooled states, whatever the rows were.
                kwargs["data_collator"] = ClassifierCollator.of(model)
                train_dataset = _cached(model, train_dataset)
                if isinstance(eval_dataset, dict):
                    eval_dataset = {name: _cached(model, part) for name, part in eval_dataset.items()}
                else:
                    eval_dataset = _cached(model, eval_dataset)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            unintended=unintended,
            **kwargs,
        )
        self.label_names = ["labels"]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, RegularizedSequenceClassifier) and self.train_dataset is not None:
            self._fit(self.model, self.train_dataset)
        return super().train(*args, **kwargs)

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        own = self.accelerator.unwrap_model(model)
        if not isinstance(own, RegularizedSequenceClassifier) or "labels" not in inputs:
            return super().task_loss(model, inputs)
        inputs = dict(inputs)
        labels, weights, margins = (inputs.pop(name, None) for name in ("labels", "weight", "margin"))
        if margins is not None and self.args.preference_loss == "pointwise":
            raise ValueError(
                "a margin is between two sides: preference_loss='pointwise' can't use it; drop the column"
            )
        outputs = model(**inputs)
        if own.task == "preference" and outputs.logits.shape[-1] == 1:
            # All chosen sides, then all rejected ones.
            outputs.logits = torch.stack(outputs.logits.squeeze(-1).chunk(2), dim=1)
        loss = self.loss_of(outputs.logits, labels, own, sample_weights=weights, margins=margins)
        return loss, outputs

    def loss_of(
        self, logits: Tensor, labels: Tensor, model: RegularizedSequenceClassifier, **columns: Tensor | None
    ) -> Tensor:
        """The task loss of `logits`; `columns` are `sample_weights` and `margins` of the batch."""
        return task_loss(
            model.task,
            logits,
            labels,
            label_weights=self._label_weights,
            target_scale=model.loss_scale,
            preference_loss=self.args.preference_loss,
            **columns,
        )

    def _fit(self, model: RegularizedSequenceClassifier, dataset: Any) -> None:
        """Standardisation and dependence directions, in closed form over the training set."""
        states = dataset if isinstance(dataset, PooledStates) else None
        if states is None and "pooled" in dataset[0]:
            states = self._stacked(model, dataset)
        if states is None:
            # cache_states is off: the backbone runs at every step, and once before for what the head is fitted to.
            states = pooled_dataset(model, dataset)
        model.set_standardization(states.pooled, states.labels)
        if self.args.dependence_weight and model.config.num_unintended:
            differences, activations = states.compared
            # The mean of the standardisation is held constant anyway.
            self.regularizer.dependence_directions = dependence_directions(
                differences / model.pooled_scale.cpu(), activations, held_constant(model.task, states.labels)
            )

    def _stacked(self, model: RegularizedSequenceClassifier, dataset: Any) -> PooledStates:
        rows = [dataset[i] for i in range(len(dataset))]
        if self.args.dependence_weight and "unintended_activations" not in rows[0]:
            raise ValueError(
                "rows of pooled states need 'unintended_activations' for the dependence term: make them with "
                "model.pooled_states(texts, labels), or set dependence_weight=0"
            )
        pooled, activations = (
            torch.stack([torch.as_tensor(row.get(name, []), dtype=torch.float32) for row in rows])
            for name in ("pooled", "unintended_activations")
        )
        labels = as_targets(model.task, labels_of(rows), model.score.out_features, "train_dataset")
        return PooledStates(pooled, activations, labels)


def _cached(model: RegularizedSequenceClassifier, dataset: Any) -> Any:
    if dataset is None or isinstance(dataset, PooledStates) or "pooled" in dataset[0]:
        return dataset
    return pooled_dataset(model, dataset)

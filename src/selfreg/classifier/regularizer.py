"""The two extra terms of the loss, with what they need worked out once."""

import logging
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import dependence_term, orthonormal_basis, similarity_penalty, subspace_share
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.features.selection import UnintendedFeatures
from selfreg.utils.trainer import PartsTrainer

logger = logging.getLogger(__name__)

_HEADS = ("score", "classifier.out_proj", "classifier")


class Regularizer:
    """similarity and dependence of a head's weights, for one set of unintended features.

    Args:
        unintended: the features.
        args: weights and similarity.
    """

    def __init__(self, unintended: UnintendedFeatures, args: RegularizedTrainingArguments) -> None:
        self.similarity: Any = args.similarity
        self.penalty_weight, self.dependence_weight = args.penalty_weight, args.dependence_weight
        rows = unintended.encoder_directions if args.similarity == "encoder" else unintended.decoder_directions
        # Worked out once: a decomposition at every step would cost more than the step.
        self.directions = orthonormal_basis(rows) if args.similarity == "subspace" else F.normalize(rows, dim=1)
        self.dependence_directions = rows[:0]
        self.empty = len(unintended) == 0
        if self.empty and (self.penalty_weight or self.dependence_weight):
            logger.warning("the set of unintended features is empty: this trains the plain classifier")

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the head's weights `[L, D]`, before their coefficients."""
        directions = self.directions.to(weight)
        if self.empty:
            similarity = weight.new_zeros(())
        elif self.similarity == "subspace":
            similarity = subspace_share(weight, directions)
        else:
            similarity = similarity_penalty(weight, directions, self.similarity)
        return similarity, dependence_term(weight, self.dependence_directions.to(weight))


def find_head(model: nn.Module) -> nn.Linear:
    """The one linear layer that gives the logits: `score`, `classifier` or `classifier.out_proj`.

    Raises:
        ValueError: there is none; names the modules that were looked at.
    """
    modules = dict(model.named_modules())
    for name in _HEADS:
        head = modules.get(name)
        if isinstance(head, nn.Linear):
            return head
    seen = ", ".join(f"{name} ({type(module).__name__})" for name, module in model.named_children())
    raise ValueError(
        f"can't find the linear head of {type(model).__name__}: looked for {', '.join(_HEADS)}; the model has {seen}"
    )


class RegularizationMixin(PartsTrainer):
    """Adds the similarity penalty to any `Trainer`: `class MyTrainer(RegularizationMixin, SomeTrainer)`.

    Args:
        args: a [`RegularizedTrainingArguments`].
        unintended: what the head must not use, found on the states that the head reads. A
            [`RegularizedSequenceClassifier`] brings its own.

    Raises:
        ValueError: no head is found, the features have another width, or a dependence weight is set for a model whose
            states selfreg can't see.
    """

    args: RegularizedTrainingArguments

    def __init__(
        self, model: Any, args: RegularizedTrainingArguments, *pos: Any, unintended: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(model, args, *pos, **kwargs)
        own = isinstance(model, RegularizedSequenceClassifier)
        if own and unintended is not None:
            raise ValueError("a RegularizedSequenceClassifier brings its own unintended features: leave them out here")
        if own:
            unintended = model.unintended
        elif unintended is None:
            raise ValueError("give unintended=, the features that the head must not use")
        elif args.dependence_weight or args.remove_unintended:
            raise ValueError(
                f"dependence_weight and remove_unintended need the states inside the model; with "
                f"{type(model).__name__} set dependence_weight=0 and leave remove_unintended out, or use "
                "RegularizedSequenceClassifier.from_backbone"
            )
        width = find_head(model).in_features
        if unintended.hidden_size != width:
            raise ValueError(f"the unintended features have width {unintended.hidden_size}, the head reads {width}")
        self.regularizer = Regularizer(unintended, args)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss plus both terms; in evaluation the task loss alone."""
        task_loss, outputs = self.task_loss(model, inputs)
        loss = task_loss
        if model.training:
            # From the model that this step was given: a wrapper may hold the weights in another form.
            similarity, dependence = self.regularizer(find_head(self.accelerator.unwrap_model(model)).weight)
            loss = (
                task_loss
                + self.regularizer.penalty_weight * similarity
                + self.regularizer.dependence_weight * dependence
            )
            self.parts.add(task_loss=task_loss)
            # A zero that stands for "not measured" would read as "perfect".
            if not self.regularizer.empty:
                self.parts.add(similarity=similarity)
            if len(self.regularizer.dependence_directions):
                self.parts.add(dependence=dependence)
        return (loss, outputs) if return_outputs else loss

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        """The loss without the two terms, and the outputs of the model: that of the Trainer this is mixed into."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss, outputs

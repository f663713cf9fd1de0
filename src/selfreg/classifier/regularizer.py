"""RegularizationMixin: the two extra terms of the loss in anybody's Trainer."""

from typing import Any

from torch import Tensor, nn

from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.terms import Regularizer
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.utils.trainer import PartsTrainer

_HEADS = ("score", "classifier.out_proj", "classifier")


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
        self.regularizer = Regularizer(unintended, args, model.unintended_mask if own else None)

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

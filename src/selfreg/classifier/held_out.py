"""What settings of a head are chosen by: the loss of texts that it was not solved on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import PreferenceLoss, task_loss

# Next to the tightest the validation losses of 6,400 states are off by 2e-4 at most, a 70th of their standard error,
# for less than half the time.
TO_CHOOSE_BY: dict[str, Any] = {"tolerance": 1e-3, "smoothing": (1e-2, 1e-3)}
"""Of `HeadProblem.solve`, for heads that are not kept."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The task loss of a head over cached states, and how sure it is."""

    label_weights: Tensor | None
    preference_loss: PreferenceLoss

    def with_error(self, model: RegularizedSequenceClassifier, states: PooledStates) -> tuple[float, float]:
        """The (weighted) mean over texts and its standard error. With equal weights that is the losses' standard
        deviation over √N."""
        with torch.no_grad():
            logits = model.logits(states.pooled.to(model.score.weight.device)).cpu().double()
        mean, pulls = self.with_pulls(model, states, logits)
        return mean, float(pulls.norm())

    def with_pulls(
        self, model: RegularizedSequenceClassifier, states: PooledStates, logits: Tensor
    ) -> tuple[float, Tensor]:
        """The (weighted) mean over texts, and how much each text moves it, `[N]`.

        A text's pull is v_i ∂m/∂v_i for the mean m = Σ v_i l_i / Σ v_i with weights v. The norm of all pulls is the
        standard error of the mean, and that of their difference between two heads the standard error of the
        difference.
        """
        if states.offsets is not None:
            # With what the features say set aside, leaning on them costs nothing and gains nothing.
            logits = logits + states.offsets.double()
        weights = torch.ones(len(states)) if states.weights is None else states.weights
        weights = weights.double().requires_grad_()
        scale = model.loss_scale
        mean = task_loss(
            model.task,
            logits,
            states.labels,
            sample_weights=weights,
            label_weights=self.label_weights,
            margins=states.margins,
            target_scale=scale.cpu() if isinstance(scale, Tensor) else scale,
            preference_loss=self.preference_loss,
        )
        (slope,) = torch.autograd.grad(mean, weights)
        return float(mean.detach()), weights.detach() * slope

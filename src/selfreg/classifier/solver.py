"""The head's weights in closed loop: the whole objective on cached states, by L-BFGS, without batches or epochs.

    task loss + logit_decay · mean squared logit + penalty_weight · similarity + dependence_weight · dependence
        + ridge / 2 · ‖W‖²

over standardised states x = (pooled - mean) / scale. It is convex for `similarity` `"encoder"` and `"dot"`: there the
result does not depend on where it starts. `"cosine"` and `"subspace"` do not care how long the weights are, and are
not convex: what is found is the optimum next to the solution without them.

Shapes: N texts, R rows of states (2N for pairs, else N), L logits, D hidden size, U unintended features.

**Absolute values.** |x| is taken as sqrt(x² + ε²) - ε, with ε from 1e-2 down to 1e-4 in half decades, each solved
from the solution before: it differs from |x| by at most ε, and a weight that the penalty pins to 0 ends below ε.
Straight to the last ε is no shorter way: its curvature at 0 hides from the stopping rule the features that would leave
0, and where it does not stop early it takes 85 evaluations instead of 51 (20,000 states of width 576).

**Preconditioning.** The variances of hidden states span orders of magnitude, and so do the curvatures of the
objective. L-BFGS works on V = W · F, with F the Cholesky factor of an estimate of the curvature (from 4 D of the
states, or a few more) that all logits share; there 16 iterations do what takes it 214 on W. In those units the loss is
within about half the square of the gradient's norm of the optimum, which is what `tolerance` is about. Where texts are
told apart well the curvature falls by orders of magnitude on the way, so that F is estimated anew at what was found,
until the gradient is small there as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfreg.activations.prompt import check_choice
from selfreg.classifier.head_terms import HeadTerms
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import PreferenceLoss, squared_logits, task_loss, text_weights, weighted_mean
from selfreg.classifier.terms import Regularizer

DEFAULT_RIDGE = 1e-2
"""Where nothing chooses one: about the best on validation texts for 20,000 states of width 576."""
SMOOTHING = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""ε of the absolute values, one after the other."""
_ROWS_PER_DIMENSION = 4
_MAX_ESTIMATES = 10
# Rounding of float32 in the states' own variances: keeps the factor defined where a dimension does not vary.
_FLOOR = 1e-7


@dataclass(frozen=True)
class SolvedHead:
    """
    Attributes:
        weight (`[L, D]`), bias (`[L]`): as they stand in the model's `score`.
        loss (`float`): the whole objective, with |x| itself.
        iterations (`int`): of L-BFGS, over all ε.
        converged (`bool`): whether the last of them met the tolerance.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    iterations: int
    converged: bool


def solve_head(
    model: RegularizedSequenceClassifier,
    states: PooledStates,
    regularizer: Regularizer | None,
    *,
    ridge: float = DEFAULT_RIDGE,
    label_weights: Tensor | None = None,
    preference_loss: PreferenceLoss = "bradley_terry",
    label_smoothing: float = 0.0,
    logit_decay: float = 0.0,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> SolvedHead:
    """Sets the head of `model` to the optimum over `states`.

    Args:
        model: the classifier, with its standardisation set (`model.set_standardization`).
        states: pooled states of the training set.
        regularizer: the two terms with their weights, and with its dependence directions set; None for neither.
        ridge: weight of ‖W‖² / 2 beside the mean loss of a text: 1 / (C · N) of scikit-learn. More than 0.
        label_weights (`[L]`, *optional*): weight of each label in the task loss.
        preference_loss: of pairs.
        label_smoothing: see `task_loss`.
        logit_decay: weight of the mean squared logit; see `squared_logits`.
        start (`[L, D]`, *optional*): weights to start from; zero if None. For a convex objective they change the time
            it takes, and not the result.
        tolerance: largest entry of the gradient, in units where the curvature is about 1.
        max_iterations: of each ε.

    Raises:
        ValueError: a ridge that is not positive, a decay of logits that are none, a margin with
            `preference_loss="pointwise"`, or an unknown loss.
    """
    problem = HeadProblem(
        model,
        states,
        label_weights=label_weights,
        preference_loss=preference_loss,
        label_smoothing=label_smoothing,
        logit_decay=logit_decay,
    )
    return problem.solve(regularizer, ridge=ridge, start=start, tolerance=tolerance, max_iterations=max_iterations)


class HeadProblem:
    """Cached states as `solve_head` needs them, to solve over them more than once.

    Args:
        model, states, label_weights, preference_loss, label_smoothing, logit_decay: as for `solve_head`.
    """

    def __init__(
        self,
        model: RegularizedSequenceClassifier,
        states: PooledStates,
        *,
        label_weights: Tensor | None = None,
        preference_loss: PreferenceLoss = "bradley_terry",
        label_smoothing: float = 0.0,
        logit_decay: float = 0.0,
    ) -> None:
        check_choice("preference_loss", preference_loss, PreferenceLoss)
        if states.margins is not None and preference_loss == "pointwise":
            raise ValueError(
                "a margin is between two sides: preference_loss='pointwise' can't use it; drop the column"
            )
        if logit_decay and model.task == "regression":
            raise ValueError(f"logit_decay={logit_decay} would have no effect: task 'regression' has no logits")
        self.model, self.states = model, states
        self.label_weights, self.preference_loss = label_weights, preference_loss
        self.label_smoothing, self.logit_decay = label_smoothing, logit_decay
        with torch.no_grad():
            rows = model.standardize(states.pooled.to(model.score.weight.device))
        # The two sides' scores are compared: what both share, as the bias, drops out.
        self.compares = model.task == "preference" and preference_loss == "bradley_terry"
        self._rows_RD = (rows[:, 0] - rows[:, 1]) if self.compares else rows.flatten(0, -2)
        stride = max(1, len(self._rows_RD) // (_ROWS_PER_DIMENSION * self._rows_RD.shape[1]))
        self._every = slice(None, None, stride)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def solve(
        self,
        regularizer: Regularizer | None,
        *,
        ridge: float,
        start: Tensor | None = None,
        start_bias: Tensor | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        smoothing: Sequence[float] = SMOOTHING,
    ) -> SolvedHead:
        """See `solve_head`; `smoothing` is the series of ε."""
        if not ridge > 0:
            raise ValueError(f"ridge={ridge} must be more than 0: texts that are told apart perfectly have no optimum")
        score = self.model.score
        terms = HeadTerms(regularizer, ridge)
        weight = torch.zeros(score.weight.shape, dtype=torch.float64) if start is None else start.cpu().double()
        bias = torch.zeros(len(weight), dtype=torch.float64) if start_bias is None else start_bias.cpu().double()
        iterations = 0
        if start is None and terms.scale_free:
            # At weights of zero these similarities jump; nothing leads down from there.
            weight, bias, iterations, _ = self._minimize(
                weight, bias, HeadTerms(None, ridge), 0.0, tolerance, max_iterations
            )
        # To the full tolerance each: with looser ones before the last, that one took more than they had saved.
        *on_the_way, last = smoothing if terms.absolute else (0.0,)
        for epsilon in on_the_way:
            weight, bias, count, _ = self._minimize(weight, bias, terms, epsilon, tolerance, max_iterations)
            iterations += count
        weight, bias, count, converged = self._settle(weight, bias, terms, last, tolerance, max_iterations)
        iterations += count
        with torch.no_grad():
            score.weight.copy_(weight)
            score.bias.copy_(bias)
        loss = float(self.value(weight, bias, terms, 0.0)[0])
        return SolvedHead(score.weight.detach().clone(), score.bias.detach().clone(), loss, iterations, converged)

    def value(
        self, weight_LD: Tensor, bias_L: Tensor, terms: "HeadTerms", smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective and its gradients by weight and bias; float64, but for the products with the states."""
        rows = self._rows_RD
        scores_RL = self._scores(rows, weight_LD, bias_L).requires_grad_()
        loss = self._task_loss(scores_RL)
        if self.logit_decay:
            loss = loss + self.logit_decay * self._decayed(scores_RL)
        (by_scores_RL,) = torch.autograd.grad(loss, scores_RL)
        by_weight_LD = (by_scores_RL.to(rows).T @ rows).cpu().double()
        by_bias_L = torch.zeros_like(bias_L) if self.compares else by_scores_RL.sum(dim=0)
        weight_LD = weight_LD.detach().requires_grad_()
        extra = terms(weight_LD, smoothing)
        (by_terms_LD,) = torch.autograd.grad(extra, weight_LD)
        return (loss + extra).detach(), by_weight_LD + by_terms_LD, by_bias_L

    @torch.no_grad()
    def task_loss(self, weight_LD: Tensor, bias_L: Tensor) -> float:
        """The loss without the terms and the ridge."""
        return float(self._task_loss(self._scores(self._rows_RD, weight_LD, bias_L)))

    def _scores(self, rows_RD: Tensor, weight_LD: Tensor, bias_L: Tensor) -> Tensor:
        scores_RL = (rows_RD @ weight_LD.to(rows_RD).T).cpu().double()
        return scores_RL if self.compares else scores_RL + bias_L.cpu()

    def _task_loss(self, scores_RL: Tensor) -> Tensor:
        model, states = self.model, self.states
        logits = self._logits(scores_RL)
        if states.offsets is not None:
            logits = logits + states.offsets.double()
        scale = model.loss_scale
        return task_loss(
            model.task,
            logits,
            states.labels,
            sample_weights=states.weights,
            label_weights=self.label_weights,
            margins=states.margins,
            target_scale=scale.cpu() if isinstance(scale, Tensor) else scale,
            preference_loss=self.preference_loss,
            label_smoothing=self.label_smoothing,
        )

    def _logits(self, scores_RL: Tensor) -> Tensor:
        """As the loss takes them: of pairs one row, of a regression in the target's own units."""
        if self.model.task == "regression":
            return scores_RL * self.model.target_scale.cpu() + self.model.target_mean.cpu()
        if self.compares:
            return torch.cat([scores_RL, torch.zeros_like(scores_RL)], dim=1)
        return scores_RL.reshape(-1, 2) if self.model.task == "preference" else scores_RL

    def _decayed(self, scores_RL: Tensor) -> Tensor:
        """The mean squared logit."""
        task, states = self.model.task, self.states
        squares_N = squared_logits(task, self._logits(scores_RL), preference_loss=self.preference_loss)
        weights_N = text_weights(task, states.labels, states.weights, self.label_weights).to(squares_N)
        return weighted_mean(squares_N, weights_N, None)

    def _settle(
        self,
        weight: Tensor,
        bias: Tensor,
        terms: "HeadTerms",
        smoothing: float,
        tolerance: float,
        max_iterations: int,
    ) -> tuple[Tensor, Tensor, int, bool]:
        """Minimises until the gradient is within the tolerance in units of the curvature where it ended."""
        iterations = 0
        for _ in range(_MAX_ESTIMATES):
            weight, bias, count, converged = self._minimize(
                weight, bias, terms, smoothing, tolerance, max_iterations - iterations
            )
            iterations += count
            if count <= 1 or not converged:
                return weight, bias, iterations, converged
        return weight, bias, iterations, False

    def _minimize(
        self,
        weight: Tensor,
        bias: Tensor,
        terms: "HeadTerms",
        smoothing: float,
        tolerance: float,
        max_iterations: int,
    ) -> tuple[Tensor, Tensor, int, bool]:
        from scipy.optimize import minimize

        factor_DD = self._factor(weight, bias, terms, smoothing)
        size = weight.numel()

        def split(vector: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
            values = torch.from_numpy(vector)
            # V = W · F, so W = V · F⁻¹.
            weight_LD = torch.linalg.solve_triangular(
                factor_DD, values[:size].view_as(weight), upper=False, left=False
            )
            return weight_LD, values[size:].clone()

        def objective(vector: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, by_weight, by_bias = self.value(*split(vector), terms, smoothing)
            by_vector = torch.linalg.solve_triangular(factor_DD.T, by_weight, upper=True, left=False)
            return float(value), torch.cat([by_vector.flatten(), by_bias]).numpy()

        result = minimize(
            objective,
            torch.cat([(weight @ factor_DD).flatten(), bias]).numpy(),
            jac=True,
            method="L-BFGS-B",
            # ftol of rounding: a flat stretch is no optimum.
            options={"maxiter": max_iterations, "gtol": tolerance, "ftol": 1e-14, "maxls": 50},
        )
        weight, bias = split(result.x)
        # A line search that float32 products leave nothing to go by has also arrived, where the gradient says so.
        return weight, bias, int(result.nit), bool(result.success or np.abs(result.jac).max() <= 10 * tolerance)

    def _factor(self, weight: Tensor, bias: Tensor, terms: "HeadTerms", smoothing: float) -> Tensor:
        """Cholesky factor `[D, D]`, lower, of the estimated curvature at `weight`, averaged over logits."""
        curvature = self._task_curvature(weight.to(self._rows_RD), bias.to(self._rows_RD)).clone()
        curvature += terms.curvature(weight, smoothing)
        curvature.diagonal().add_(_FLOOR * curvature.diagonal().mean())
        return torch.linalg.cholesky(curvature)

    def _task_curvature(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Of the task loss alone; kept, since the next ε or the next point of a path starts where this one ended."""
        if self._kept is None or not (torch.equal(weight, self._kept[0]) and torch.equal(bias, self._kept[1])):
            sample_SD = self._rows_RD[self._every]
            bend_S = self._bend(self._scores(sample_SD, weight, bias)).to(sample_SD)
            estimate = (sample_SD.T @ (bend_S.unsqueeze(1) * sample_SD)).cpu().double() / len(sample_SD)
            self._kept = (weight, bias, estimate)
        return self._kept[2]

    def _bend(self, scores_SL: Tensor) -> Tensor:
        """The second derivative of the sampled rows' task loss by a logit, averaged over logits: `[S]`."""
        if self.model.task == "regression":
            bend_S = torch.full_like(scores_SL[:, 0], 2.0)
        elif self.model.task == "single_label":
            p = scores_SL.softmax(dim=1)
            bend_S = (p * (1 - p)).mean(dim=1)
        else:
            p = scores_SL.sigmoid()
            bend_S = (p * (1 - p)).mean(dim=1) / scores_SL.shape[1]
        if self.logit_decay:
            # Centring takes the share of one logit off.
            labels = scores_SL.shape[1]
            share = (1 - 1 / labels) / labels if self.model.task == "single_label" else 1 / labels
            bend_S = bend_S + 2 * self.logit_decay * share
        weights = self.states.weights
        if weights is not None:
            sides = len(self._rows_RD) // len(weights)
            bend_S = bend_S * (weights / weights.mean()).repeat_interleave(sides)[self._every].to(bend_S)
        return bend_S

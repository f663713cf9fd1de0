from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from path_helpers import FEATURES, TASKS, make_model, make_states
from selfreg import RegularizedTrainingArguments
from selfreg.classifier.head_terms import HeadTerms
from selfreg.classifier.path import fitted_regularizer
from selfreg.classifier.solver import SMOOTHING, HeadProblem, solve_head
from selfreg.classifier.tasks import squared_logits, task_loss
from selfreg.classifier.terms import Regularizer

SIMILARITIES = ("encoder", "dot", "cosine", "subspace")


def decay_of(task: str) -> float:
    return 0.0 if task == "regression" else 0.2


def make_terms(
    folder: Path, model: Any, states: Any, penalty: float, dependence: float, similarity: str
) -> Regularizer:
    args = RegularizedTrainingArguments(
        str(folder), penalty_weight=penalty, dependence_weight=dependence, similarity=similarity
    )
    return fitted_regularizer(model, states, args)


def objective(
    model: Any, states: Any, terms: Regularizer | None, ridge: float, weight: Tensor, decay: float = 0, **kwargs: Any
) -> Tensor:
    """As the Trainer has it, plus the ridge; by the model's own forward pass, in float64."""
    model.double()
    model.score.weight.data = weight
    logits = model.logits(states.pooled.double())
    loss = task_loss(model.task, logits, states.labels, target_scale=model.loss_scale, **kwargs)
    if decay:
        loss = loss + decay * squared_logits(model.task, logits).mean()
    if terms is not None:
        similarity, dependence = terms(model.score.weight)
        loss = loss + terms.penalty_weight * similarity + terms.dependence_weight * dependence
    return loss + ridge / 2 * model.score.weight.pow(2).sum()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_gradient_is_that_of_the_value(task: str, similarity: str, tmp_path: Path) -> None:
    states = make_states(task, 50)
    states = replace(states, weights=torch.rand(50) + 0.5, margins=torch.rand(50) if states.are_pairs else None)
    model = make_model(task, states)
    # In float64, as differences need.
    model.double()
    problem = HeadProblem(model, states, logit_decay=decay_of(task))
    terms = HeadTerms(make_terms(tmp_path, model, states, 0.7, 3.0, similarity), 0.1)
    shape = model.score.weight.shape

    def value(vector: Any) -> float:
        values = torch.from_numpy(vector)
        return float(problem.value(values[: shape.numel()].view(shape), values[shape.numel() :], terms, 1e-2)[0])

    def gradient(vector: Any) -> Any:
        values = torch.from_numpy(vector)
        _, *parts = problem.value(values[: shape.numel()].view(shape), values[shape.numel() :], terms, 1e-2)
        return torch.cat([part.flatten() for part in parts]).numpy()

    start = np.random.default_rng(0).normal(size=shape.numel() + shape[0])
    assert check_grad(value, gradient, start) < 1e-5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_loss_is_the_one_the_trainer_has_and_nothing_near_is_better(
    task: str, similarity: str, tmp_path: Path
) -> None:
    states = make_states(task)
    model = make_model(task, states)
    terms = make_terms(tmp_path, model, states, 0.1, 1.0, similarity)
    solved = solve_head(model, states, terms, ridge=1e-2, logit_decay=decay_of(task))
    assert solved.converged
    weight = solved.weight.double()
    torch.testing.assert_close(model.score.weight.detach(), solved.weight)
    with torch.no_grad():
        decay = decay_of(task)
        assert float(objective(model, states, terms, 1e-2, weight, decay)) == pytest.approx(solved.loss, rel=1e-5)
        generator = torch.Generator().manual_seed(1)
        for size in (1.0, 0.1, 1e-2):
            for _ in range(20):
                step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                near = weight + size * step / step.norm()
                value = float(objective(model, states, terms, 1e-2, near, decay))
                assert value > solved.loss - 2 * 0.1 * SMOOTHING[-1]


def test_it_equals_logistic_regression() -> None:
    states = make_states("single_label")
    model = make_model("single_label", states)
    x = model.standardize(states.pooled).numpy().astype(np.float64)
    for ridge in (1e-1, 1e-3):
        solved = solve_head(model, states, None, ridge=ridge, tolerance=1e-6)
        peer = LogisticRegression(C=1 / (ridge * len(x)), tol=1e-8, max_iter=100_000).fit(x, states.labels.numpy())
        np.testing.assert_allclose(solved.weight, peer.coef_, atol=2e-3 * np.abs(peer.coef_).max())
        bias = solved.bias - solved.bias.mean()
        np.testing.assert_allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=2e-3)


def test_it_equals_ridge_regression_in_the_targets_own_units() -> None:
    states = make_states("regression")
    model = make_model("regression", states)
    solve_head(model, states, None, ridge=0.1, tolerance=1e-6)
    x, y = model.standardize(states.pooled).numpy(), states.labels.numpy()
    target = (y - y.mean()) / y.std()
    # scikit-learn's sum of squares, without the half.
    peer = Ridge(alpha=0.05 * len(x)).fit(x, target)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.logits(states.pooled)[:, 0], peer.predict(x) * y.std() + y.mean(), atol=2e-3 * y.std()
        )


def test_pairs_are_a_regression_of_their_differences_without_a_bias() -> None:
    states = make_states("preference")
    model = make_model("preference", states)
    solved = solve_head(model, states, None, ridge=1e-2, tolerance=1e-6)
    x = model.standardize(states.pooled)
    differences = (x[:, 0] - x[:, 1]).numpy()
    both = np.concatenate([differences, -differences])
    labels = np.repeat([1, 0], len(differences))
    peer = LogisticRegression(C=1 / (1e-2 * len(both)), fit_intercept=False, tol=1e-8, max_iter=100_000)
    peer.fit(both, labels)
    np.testing.assert_allclose(solved.weight, peer.coef_, atol=2e-3 * np.abs(peer.coef_).max())
    assert solved.bias.abs().max() == 0


def test_weights_of_texts_and_labels_count_as_repeated_texts() -> None:
    states = make_states("single_label")
    model = make_model("single_label", states)
    counts = torch.randint(1, 4, (len(states),), generator=torch.Generator().manual_seed(0))
    weighted = solve_head(model, replace(states, weights=counts.float()), None, ridge=1e-2, tolerance=1e-6)
    rows = torch.arange(len(states)).repeat_interleave(counts)
    repeated = solve_head(model, states.select(rows), None, ridge=1e-2, tolerance=1e-6)
    torch.testing.assert_close(weighted.weight, repeated.weight, atol=1e-3, rtol=1e-3)
    of_labels = torch.tensor([1.0, 2.0, 5.0])
    by_label = solve_head(model, states, None, ridge=1e-2, tolerance=1e-6, label_weights=of_labels)
    by_text = solve_head(model, replace(states, weights=of_labels[states.labels]), None, ridge=1e-2, tolerance=1e-6)
    torch.testing.assert_close(by_label.weight, by_text.weight, atol=1e-3, rtol=1e-3)
    assert (by_label.weight - weighted.weight).abs().max() > 0.01


@pytest.mark.parametrize("similarity", ["encoder", "dot"])
def test_a_strong_penalty_empties_the_weights_of_the_features(similarity: str, tmp_path: Path) -> None:
    states = make_states("single_label")
    model = make_model("single_label", states)
    rows = model.encoder_directions if similarity == "encoder" else model.decoder_directions
    plain = solve_head(model, states, None, ridge=1e-3).weight @ rows.T
    solved = solve_head(model, states, make_terms(tmp_path, model, states, 1e3, 0.0, similarity), ridge=1e-3)
    assert solved.converged
    assert plain.abs().max() > 0.1
    assert (solved.weight @ rows.T).abs().max() < 1e-6
    assert solved.weight.abs().max() > 0.1


def test_a_weak_penalty_pins_some_weights_to_zero_and_leaves_the_others(tmp_path: Path) -> None:
    """At the optimum of |x| the pull on a weight that is not 0 is the penalty's, and on one that is 0 at most that."""
    states = make_states("single_label")
    model = make_model("single_label", states)
    penalty = 0.3
    terms = make_terms(tmp_path, model, states, penalty, 0.0, "dot")
    solved = solve_head(model, states, terms, ridge=1e-2, tolerance=1e-6)
    along = (solved.weight @ model.decoder_directions.T).double()
    # Between the two the smoothing shows.
    pinned, free = along.abs() < SMOOTHING[-1], along.abs() > 20 * SMOOTHING[-1]
    assert pinned.any()
    assert free.any()
    directions = model.decoder_directions.double()
    weight = solved.weight.double().requires_grad_()
    smooth = objective(model, states, None, 1e-2, weight)
    (slope,) = torch.autograd.grad(smooth, model.score.weight)
    # slope = -Σ_c pull_c · û_c, so that the pulls are its coordinates in the directions.
    pull = -torch.linalg.lstsq(directions.T, slope.T).solution.T
    assert (directions.T @ -pull.T - slope.T).abs().max() < 1e-4
    most = penalty / along.numel()
    torch.testing.assert_close(pull[free], most * along[free].sign(), atol=2e-4, rtol=0)
    assert pull[pinned].abs().max() <= most + 2e-4


def test_a_mask_frees_the_labels_that_a_feature_is_legitimate_for(tmp_path: Path) -> None:
    states = make_states("single_label")
    model = make_model("single_label", states, unintended_labels=[["a"]] * FEATURES)
    terms = make_terms(tmp_path, model, states, 1e3, 0.0, "dot")
    along = solve_head(model, states, terms, ridge=1e-3).weight @ model.decoder_directions.T
    assert along[0].abs().max() < 1e-6
    assert along[1:].abs().max() > 0.1


def test_the_same_input_gives_the_same_bits_and_any_start_the_same_optimum(tmp_path: Path) -> None:
    states = make_states("multi_label")
    model = make_model("multi_label", states)
    terms = make_terms(tmp_path, model, states, 0.3, 3.0, "dot")
    first = solve_head(model, states, terms, ridge=1e-2)
    again = solve_head(model, states, terms, ridge=1e-2)
    assert torch.equal(first.weight, again.weight)
    start = torch.randn(first.weight.shape, generator=torch.Generator().manual_seed(3))
    other = solve_head(model, states, terms, ridge=1e-2, start=start)
    assert other.loss == pytest.approx(first.loss, abs=1e-5)
    torch.testing.assert_close(other.weight, first.weight, atol=0.03, rtol=0)
    from_itself = solve_head(model, states, terms, ridge=1e-2, start=first.weight)
    assert from_itself.iterations < first.iterations


def test_texts_that_are_told_apart_perfectly_are_solved_to_the_end() -> None:
    states = make_states("single_label")
    apart = replace(states, pooled=states.pooled + 5 * torch.nn.functional.one_hot(states.labels, 12))
    model = make_model("single_label", apart)
    solved = solve_head(model, apart, None, ridge=1e-4)
    x = model.standardize(apart.pooled).numpy().astype(np.float64)
    peer = LogisticRegression(C=1 / (1e-4 * len(x)), tol=1e-8, max_iter=100_000).fit(x, apart.labels.numpy())
    np.testing.assert_allclose(solved.weight, peer.coef_, atol=0.02 * np.abs(peer.coef_).max())


def test_what_can_t_be_solved_says_so() -> None:
    regression = make_states("regression")
    with pytest.raises(ValueError, match="logit_decay=0.1 would have no effect: task 'regression' has no logits"):
        solve_head(make_model("regression"), regression, None, logit_decay=0.1)
    states = make_states("preference")
    model = make_model("preference", states)
    with pytest.raises(ValueError, match="ridge=0 must be more than 0"):
        solve_head(model, states, None, ridge=0)
    with pytest.raises(ValueError, match="margin"):
        solve_head(model, replace(states, margins=torch.ones(len(states))), None, preference_loss="pointwise")
    stopped = solve_head(model, states, None, ridge=1e-4, max_iterations=1)
    assert not stopped.converged

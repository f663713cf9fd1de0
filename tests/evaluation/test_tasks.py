"""Figures of pairs, many labels and targets on a scale, against values worked out by hand or by scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from selfreg.evaluation.metrics import leakage, unintended_dependence, unintended_use
from selfreg.evaluation.tasks import evaluate_multi_label, evaluate_pairs, evaluate_regression, regression_cells

RANDOM = np.random.default_rng(0)


def test_pairs() -> None:
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 3.0], [1.0, -1.0]] * 10)
    groups = ["a", "a", "b", "b"] * 10
    figures = evaluate_pairs(scores, groups)
    # A tie is no win.
    assert figures["accuracy"] == 0.5
    assert figures["worst_group_accuracy"] == 0.5
    assert figures["group_gap"] == 0.0
    assert figures["f1"] is None
    assert figures["auc"] is None
    margin = scores[:, :1] - scores[:, 1:]
    assert figures["leakage"] == leakage(margin, np.ones(40, dtype=int), groups)
    assert evaluate_pairs(scores, None)["worst_group_accuracy"] is None


def test_pairs_reliance_is_of_the_difference() -> None:
    difference = RANDOM.normal(size=(300, 4))
    weight = np.array([[1.0, 0.5, 0, 0]])
    scores = np.concatenate([difference @ weight.T, np.zeros((300, 1))], axis=1)
    figures = evaluate_pairs(
        scores, None, pooled=difference, weight=weight, directions=np.eye(4)[:1], activations=difference[:, :1]
    )
    variance = difference.var(axis=0)
    assert figures["unintended_use"] == pytest.approx(variance[0] / (difference @ weight[0]).var())
    assert figures["unintended_dependence"] == pytest.approx(0.8, abs=0.05)


def test_many_labels() -> None:
    labels = (RANDOM.random((200, 3)) < 0.3).astype(int)
    labels[:, 2] = 0
    logits = 2.0 * labels - 1 + RANDOM.normal(size=(200, 3))
    groups = np.where(RANDOM.random(200) < 0.5, "x", "y")
    figures = evaluate_multi_label(logits, labels, groups)
    predicted = logits > 0
    assert figures["accuracy"] == (predicted == labels).mean()
    assert figures["f1"] == f1_score(labels, predicted, average="macro", zero_division=0.0)
    assert figures["auc"] == np.mean([roc_auc_score(labels[:, y], logits[:, y]) for y in (0, 1)])
    cells = [
        (predicted[rows, y] == truth).mean()
        for y in range(3)
        for truth in (0, 1)
        for group in ("x", "y")
        if (rows := (labels[:, y] == truth) & (groups == group)).sum() >= 10
    ]
    assert figures["worst_group_accuracy"] == min(cells)


def test_each_logit_against_its_own_features() -> None:
    pooled = RANDOM.normal(size=(400, 3))
    weight = np.eye(3)[:2]
    directions = np.eye(3)[:2]
    crossed, own = np.array([[False, True], [True, False]]), np.eye(2, dtype=bool)
    logits = pooled @ weight.T
    zeros = np.zeros((400, 2))
    options = {"pooled": pooled, "weight": weight, "directions": directions, "activations": pooled[:, :2]}
    assert evaluate_multi_label(logits, zeros, None, mask=crossed, **options)["unintended_use"] == pytest.approx(0)
    assert evaluate_multi_label(logits, zeros, None, mask=own, **options)["unintended_use"] == pytest.approx(1)
    dependence = evaluate_multi_label(logits, zeros, None, mask=crossed, **options)["unintended_dependence"]
    assert dependence == pytest.approx(0, abs=0.02)
    # Of a softmax the logits hang together: centred over labels both rows lie along one line.
    assert unintended_use(pooled, weight, directions, mask=crossed) == pytest.approx(0.5, abs=0.1)
    assert unintended_use(pooled, weight, directions) == pytest.approx(1)
    labels = np.arange(400) % 2
    assert unintended_dependence(logits, labels, pooled[:, :2], mask=np.zeros((2, 2), dtype=bool)) == 0
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\)"):
        unintended_use(pooled, weight, directions, mask=own[:1])


def test_regression() -> None:
    targets = RANDOM.normal(size=300)
    groups = ["x" if i % 2 else "y" for i in range(300)]
    shift = np.array([0.5 if group == "x" else -0.5 for group in groups])
    figures = evaluate_regression(2 * targets + shift, targets, groups)
    assert figures["leakage"] == 1.0
    assert figures["mae"] == pytest.approx(np.abs(targets + shift).mean())
    assert figures["accuracy"] is None
    assert evaluate_regression(2 * targets, targets, groups)["leakage"] < 0.2  # type: ignore[operator]
    assert evaluate_regression(targets, targets, None)["r2"] == 1.0
    cells = regression_cells(targets + shift, targets, groups)
    assert [(cell["group"], cell["n"], cell["mae"]) for cell in cells] == [("x", 150, 0.5), ("y", 150, 0.5)]


def test_dependence_on_a_scale_leaves_the_target_out() -> None:
    targets = RANDOM.normal(size=400)
    beside = RANDOM.normal(size=400)
    # What follows the target is a reason; what goes beside it is not.
    follows, depends = (2 * targets)[:, None], (2 * targets + beside)[:, None]
    activations = np.stack([beside, targets], axis=1)
    assert unintended_dependence(follows + 1e-3 * RANDOM.normal(size=(400, 1)), targets, activations) < 0.05
    assert unintended_dependence(depends, targets, activations) > 0.95

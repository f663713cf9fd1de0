from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fairlearn.metrics import equalized_odds_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import f1_score, roc_auc_score

from selfreg.evaluation.metrics import (
    classification_scores,
    evaluate_predictions,
    group_cells,
    group_gap,
    leakage,
    worst_group_accuracy,
)
from selfreg.evaluation.reliance import unintended_dependence, unintended_use

KEYS = [
    "accuracy",
    "f1",
    "auc",
    "worst_group_accuracy",
    "group_gap",
    "leakage",
    "unintended_use",
    "unintended_dependence",
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def logits_for(predictions: list[int], num_labels: int = 2) -> np.ndarray:
    return np.asarray(np.eye(num_labels)[predictions])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def random_cells(seed: int, num_labels: int = 3, n: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, labels and groups where every group has texts of every label."""
    rng = np.random.default_rng(seed)
    cells = np.array([(y, g) for y in range(num_labels) for g in range(3)])
    labels, groups = np.concatenate([cells, cells[rng.integers(0, len(cells), n)]]).T
    predictions = np.where(rng.random(len(labels)) < 0.6, labels, rng.integers(0, num_labels, len(labels)))
    return predictions, labels, groups


# --- Scores


def test_scores_of_two_labels_by_hand() -> None:
    # Margins -1, 2 | 3, 1, -2 for truths 0, 0 | 1, 1, 1: predictions 0, 1 | 1, 1, 0.
    logits = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0], [5.0, 6.0], [2.0, 0.0]])
    scores = classification_scores(logits, [0, 0, 1, 1, 1])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)  # 2 TP, 1 FP, 1 FN; the macro F1 would be 0.583
    assert scores["auc"] == pytest.approx(3 / 6)  # pairs in order: (3, -1), (3, 2), (1, -1)


def test_scores_of_three_labels_are_scikit_learns(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 3, 60)
    logits = rng.standard_normal((60, 3)) + 0.7 * np.eye(3)[labels]
    scores = classification_scores(logits, labels)
    assert scores["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert scores["f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert scores["auc"] == pytest.approx(
        roc_auc_score(labels, softmax(logits), multi_class="ovr", average="macro"), abs=1e-12
    )


def test_auc_of_two_labels_is_scikit_learns(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 60)
    logits = rng.standard_normal((60, 2)) + np.eye(2)[labels]
    assert classification_scores(logits, labels)["auc"] == pytest.approx(roc_auc_score(labels, softmax(logits)[:, 1]))


def test_auc_leaves_absent_labels_out(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 40)
    logits = rng.standard_normal((40, 3))
    by_hand = np.mean([roc_auc_score(labels == y, softmax(logits)[:, y]) for y in (0, 1)])
    assert classification_scores(logits, labels)["auc"] == pytest.approx(by_hand)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_auc_of_a_single_label_is_none(num_labels: int) -> None:
    scores = classification_scores(np.eye(num_labels), [1] * num_labels)
    assert scores["auc"] is None
    assert scores["accuracy"] == pytest.approx(1 / num_labels)


def test_scores_where_the_positive_class_never_occurs() -> None:
    assert classification_scores(logits_for([0, 0]), [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "auc": None}


def test_auc_is_not_blunted_by_probabilities_that_round_to_one() -> None:
    logits = np.array([[0.0, 50.0], [0.0, 60.0]])
    assert classification_scores(logits, [0, 1])["auc"] == 1.0


# --- Group figures


def test_worst_group_accuracy_looks_at_cells_of_ten_rows_or_more() -> None:
    labels = np.repeat([0, 0, 1, 1], [10, 20, 9, 10])
    groups = np.repeat(["a", "b", "a", "b"], [10, 20, 9, 10])
    wrong = np.concatenate([np.arange(10) < 3, np.arange(20) < 4, np.ones(9, bool), np.arange(10) < 1])
    predictions = np.where(wrong, 1 - labels, labels)
    assert worst_group_accuracy(predictions, labels, groups) == pytest.approx(
        0.7
    )  # the cell of nine, all wrong, is out


def test_worst_group_accuracy_without_a_large_cell_is_none() -> None:
    assert worst_group_accuracy([0] * 18, [0] * 18, ["a", "b"] * 9) is None
    assert worst_group_accuracy([0] * 20, [0] * 20, ["a", "b"] * 10) == 1.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), num_labels=st.sampled_from([2, 3]))
def test_group_gap_is_fairlearns_where_every_cell_has_rows(seed: int, num_labels: int) -> None:
    predictions, labels, groups = random_cells(seed, num_labels)
    against_rest = [
        equalized_odds_difference(labels == y, predictions == y, sensitive_features=groups) for y in range(num_labels)
    ]
    assert group_gap(predictions, labels, groups) == pytest.approx(max(against_rest))
    if num_labels == 2:
        assert group_gap(predictions, labels, groups) == pytest.approx(
            equalized_odds_difference(labels, predictions, sensitive_features=groups)
        )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_group_gap_and_worst_cell_against_brute_force(seed: int) -> None:
    predictions, labels, groups = random_cells(seed)
    rates = [
        [np.mean(predictions[(labels == y) == same][groups[(labels == y) == same] == g] == y) for g in range(3)]
        for y in range(3)
        for same in (True, False)
    ]
    assert group_gap(predictions, labels, groups) == pytest.approx(max(max(row) - min(row) for row in rates))
    cells = [(labels == y) & (groups == g) for y in range(3) for g in range(3)]
    accuracies = [np.mean(predictions[cell] == labels[cell]) for cell in cells if cell.sum() >= 10]
    assert worst_group_accuracy(predictions, labels, groups) == (
        pytest.approx(min(accuracies)) if accuracies else None
    )


def test_group_gap_leaves_out_cells_without_rows() -> None:
    labels = [0, 0, 1, 1, 0, 0]
    groups = ["a", "a", "a", "a", "b", "b"]
    # fairlearn's own function gives 1.0 here: the true positive rate of no rows counts as 0 there.
    assert equalized_odds_difference(labels, labels, sensitive_features=groups) == 1.0
    assert group_gap(labels, labels, groups) == 0.0
    assert group_gap([0, 0, 1, 1, 0, 1], labels, groups) == 0.5


def test_group_gap_where_no_two_groups_can_be_compared_is_none() -> None:
    assert group_gap([0, 1, 1], [0, 1, 0], ["a", "a", "a"]) is None
    assert group_gap([0, 1, 1], [0, 1, 0], ["a", "b", "a"]) is None


def test_group_gap_of_one_label_that_everything_is() -> None:
    assert group_gap([1, 1], [1, 1], ["a", "b"]) == 0.0


@pytest.mark.parametrize("figure", [worst_group_accuracy, group_gap, group_cells])
def test_texts_of_unknown_group_are_left_out(figure: Callable[..., Any]) -> None:
    predictions, labels, groups = random_cells(3)
    with_unknown = [None if code == 2 else code for code in groups.tolist()]
    known = groups != 2
    expected = figure(predictions[known], labels[known], groups[known])
    assert figure(predictions, labels, with_unknown) == expected
    as_pandas = np.where(known, groups, np.nan)  # what a column of integers with gaps turns into
    assert figure(predictions, labels, as_pandas) == expected
    assert figure(predictions, labels, groups) != expected


def test_no_group_known_at_all() -> None:
    labels, groups = [0, 1] * 10, [None] * 20
    assert worst_group_accuracy(labels, labels, groups) is None
    assert group_gap(labels, labels, groups) is None
    assert leakage(logits_for(labels), labels, groups) is None
    assert group_cells(labels, labels, groups) == []


def test_group_cells_hold_size_accuracy_and_interval() -> None:
    labels = np.repeat([1, 0, 0], [40, 25, 1])
    groups = np.repeat(["b", "b", "a"], [40, 25, 1])
    predictions = np.where(np.arange(66) < 10, 0, labels)
    cells = group_cells(predictions, labels, groups)
    assert [(c["label"], c["group"], c["n"], c["accuracy"]) for c in cells] == [
        (0, "a", 1, 1.0),
        (0, "b", 25, 1.0),
        (1, "b", 40, 0.75),
    ]
    # By the formula: centre (p + z²/2n) / (1 + z²/n), half width z √(p(1-p)/n + z²/4n²) / (1 + z²/n).
    for cell in cells:
        n, p, z = cell["n"], cell["accuracy"], 1.959964
        centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        for name, bound in (("low", centre - width), ("high", centre + width)):
            assert cell[name] == pytest.approx(bound / (1 + z**2 / n), abs=1e-6)  # type: ignore[literal-required]
    # One right answer of one says little.
    assert cells[0]["low"] < 0.25
    assert {type(cell["group"]) for cell in cells} == {str}


def test_more_confidence_is_a_wider_interval() -> None:
    predictions = np.where(np.arange(60) < 48, 0, 1)
    (cell,) = group_cells(predictions, [0] * 60, ["a"] * 60, confidence=0.8)
    (wider,) = group_cells(predictions, [0] * 60, ["a"] * 60, confidence=0.99)
    assert wider["low"] < cell["low"] < cell["accuracy"] < cell["high"] < wider["high"]


def test_integer_groups_sort_as_numbers() -> None:
    cells = group_cells([0] * 3, [0] * 3, np.array([10, 9, 2]))
    assert [cell["group"] for cell in cells] == [2, 9, 10]
    assert {type(cell["group"]) for cell in cells} == {int}


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.0}])
def test_group_cells_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        group_cells([0], [0], ["a"], **options)


# --- Leakage


def test_leakage_is_one_where_the_score_tells_the_group() -> None:
    labels = np.repeat([0, 1], 20)
    groups = np.tile(["f", "m"], 20)
    score = np.where(groups == "m", 1.0, -1.0) + 10 * labels
    assert leakage(np.stack([-score, score], axis=1), labels, groups) == 1.0
    # The direction of the tie may differ between labels.
    score = np.where((groups == "m") == (labels == 1), 1.0, -1.0)
    assert leakage(np.stack([-score, score], axis=1), labels, groups) == 1.0


def test_leakage_is_zero_where_groups_have_the_same_scores(rng: np.random.Generator) -> None:
    half = rng.standard_normal((15, 3))
    labels = np.tile(np.repeat([0, 1, 2], 5), 2)
    groups = np.repeat(["f", "m"], 15)
    assert leakage(np.concatenate([half, half]), labels, groups) == pytest.approx(0.0, abs=1e-12)
    assert leakage(np.zeros((30, 3)), labels, groups) == 0.0


def test_leakage_does_not_count_what_comes_with_the_label() -> None:
    # The score follows the label only, and the label the group: nothing more is told within a label.
    labels = np.array([0] * 10 + [1] * 10)
    groups = np.array(["f"] * 9 + ["m"] + ["m"] * 9 + ["f"])
    assert leakage(logits_for(labels.tolist()), labels, groups) == 0.0


def test_leakage_weighs_cells_by_their_smaller_side() -> None:
    # Label 0: 2 f above 6 m, all told apart, smaller side 2. Label 1: 4 f and 4 m, nothing told, smaller side 4.
    labels = np.repeat([0, 1], 8)
    groups = ["f"] * 2 + ["m"] * 6 + ["f", "m"] * 4
    score = np.array([1.0] * 2 + [0.0] * 6 + [0.0] * 8)
    assert leakage(np.stack([0 * score, score], axis=1), labels, groups) == pytest.approx(2 / 6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_leakage_against_brute_force(seed: int) -> None:
    _, labels, groups = random_cells(seed)
    logits = np.random.default_rng(seed).standard_normal((len(labels), 3))
    total, weights = 0.0, 0
    for y in range(3):
        rows = labels == y
        # The probability of the true label orders texts as its log odds do.
        score = softmax(logits)[rows, y]
        for g in range(3):
            inside, outside = score[groups[rows] == g], score[groups[rows] != g]
            auc = np.mean(np.sign(inside[:, None] - outside[None, :]) / 2 + 0.5)
            total += min(len(inside), len(outside)) * 2 * abs(auc - 0.5)
            weights += min(len(inside), len(outside))
    value = leakage(logits, labels, groups)
    assert value == pytest.approx(total / weights)
    shift = np.random.default_rng(1).standard_normal((len(labels), 1))
    assert leakage(logits + shift, labels, groups) == pytest.approx(value)


def test_leakage_without_two_groups_in_any_label_is_none() -> None:
    assert leakage(logits_for([0, 0, 1]), [0, 0, 1], ["a", "a", "b"]) is None


def test_leakage_of_a_single_logit() -> None:
    assert leakage([[0.1], [0.2], [0.3], [0.4]], [1, 1, 1, 1], ["a", "a", "b", "b"]) == 1.0


# --- Unintended use

E1, E2, E3, E4 = np.eye(4)


def states_with(covariance: np.ndarray, n: int = 200) -> np.ndarray:
    """Texts whose sample covariance is exactly `covariance`."""
    raw = np.random.default_rng(0).standard_normal((n, len(covariance)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / n)).T
    return white @ np.linalg.cholesky(covariance).T + 3.0


def two_labels(w: np.ndarray) -> np.ndarray:
    """Head rows of a margin `w`, plus a part that both logits share and that no prediction depends on."""
    shared = np.array([0.3, -2.0, 5.0, 1.0])
    return np.stack([shared - w / 2, shared + w / 2])


def test_use_of_weights_inside_and_outside_the_span() -> None:
    pooled = states_with(np.diag([1.0, 2.0, 3.0, 4.0]))
    directions = np.stack([E1, E2])
    assert unintended_use(pooled, two_labels(E1 - 3 * E2), directions) == pytest.approx(1.0)
    assert unintended_use(pooled, two_labels(E3 + E4), directions) == pytest.approx(0.0, abs=1e-20)


def test_use_of_a_mixture() -> None:
    pooled = states_with(np.diag([1.0, 2.0, 3.0, 4.0]))
    # Through e1: 2² · 1 = 4; beside it 1² · 3 = 3.
    assert unintended_use(pooled, two_labels(2 * E1 + E3), E1[None]) == pytest.approx(4 / 7)


def test_use_where_states_correlate_is_the_definitions_value() -> None:
    covariance = np.eye(4)
    covariance[0, 1] = covariance[1, 0] = 0.5
    pooled = states_with(covariance)
    # Var(w·h') = 1 + 1 + 2 · 0.5 = 3; the part through e1 has variance 1.
    assert unintended_use(pooled, two_labels(E1 + E2), E1[None]) == pytest.approx(1 / 3)
    # Parts that cancel: Var(w·h') = 1 + 1 - 2 · 0.9 = 0.2, and the value passes 1.
    covariance[0, 1] = covariance[1, 0] = 0.9
    assert unintended_use(states_with(covariance), two_labels(E1 - E2), E1[None]) == pytest.approx(5.0)


def test_use_is_the_mean_over_logits_centred_over_labels() -> None:
    pooled = states_with(np.eye(4))
    weight = np.stack([3 * E1, 3 * E2, 0 * E3])
    # Centred: (2, -1), (-1, 2), (-1, -1) in (e1, e2); shares through e1: 4/5, 1/5, 1/2.
    assert unintended_use(pooled, weight, E1[None]) == pytest.approx(0.5)
    weight = np.stack([3 * E1, 3 * E2, 3 * E2])
    # Centred: (2, -2), (-1, 1), (-1, 1): a half each.
    assert unintended_use(pooled, weight, E1[None]) == pytest.approx(0.5)
    # Not centred, the first would be 1 and the mean of the others 0.
    assert unintended_use(pooled, np.stack([3 * E1, 3 * E2, 3 * E3]), E1[None]) == pytest.approx(
        np.mean([4 / 6, 1 / 6, 1 / 6])
    )


def test_use_of_a_single_logit_is_not_centred() -> None:
    assert unintended_use(states_with(np.eye(4)), (2 * E1 + E3)[None], E1[None]) == pytest.approx(4 / 5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-6, 6))
def test_use_depends_on_the_span_only(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    pooled = rng.standard_normal((50, 12)) @ rng.standard_normal((12, 12))
    weight, directions = rng.standard_normal((3, 12)), rng.standard_normal((4, 12))
    value = unintended_use(pooled, weight, directions)
    assert value > 0.001
    scaled = directions * np.array([10.0**exponent, -1, 3, 0.5])[:, None]
    mixed = rng.standard_normal((4, 4)) @ directions
    repeated = np.concatenate([directions, 2 * directions[:2], directions[2:3] - directions[3:], np.zeros((1, 12))])
    rounded = np.concatenate([directions, directions / 3]).astype(np.float32)  # collinear but for rounding
    for same_span in (scaled, mixed, repeated):
        assert unintended_use(pooled, weight, same_span) == pytest.approx(value, rel=1e-5)
    assert unintended_use(pooled, weight, rounded) == pytest.approx(value, rel=1e-4)
    assert unintended_use(7 * pooled + rng.standard_normal(12), weight / 2, directions) == pytest.approx(value)


def test_use_keeps_features_that_are_nearly_but_not_quite_collinear() -> None:
    pooled = states_with(np.eye(4))
    directions = np.stack([E1, E1 + 1e-3 * E2])
    assert unintended_use(pooled, two_labels(E1 + E2), directions) == pytest.approx(1.0)


def test_use_without_features_or_without_variance_is_zero() -> None:
    pooled = states_with(np.eye(4))
    weight = two_labels(E1)
    assert unintended_use(pooled, weight, np.zeros((0, 4))) == 0.0
    assert unintended_use(pooled, weight, np.zeros((2, 4))) == 0.0
    assert unintended_use(pooled, np.zeros((2, 4)), E1[None]) == 0.0
    assert unintended_use(pooled, np.ones((2, 4)), E1[None]) == 0.0  # the same logit twice: no margin
    assert unintended_use(np.full((5, 4), 0.1), two_labels(E1), E1[None]) == 0.0
    # The states do not vary along w, but for rounding.
    flat = pooled - np.outer(pooled @ E1 - 0.1, E1)
    assert unintended_use(flat @ ROTATION, two_labels(E1 @ ROTATION), (E1 @ ROTATION)[None]) == 0.0


ROTATION = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))[0]


# --- Unintended dependence


def dependence_case(rng: np.random.Generator, n: int = 400, num_features: int = 20, num_labels: int = 3) -> Any:
    labels = rng.integers(0, num_labels, n)
    z = np.maximum(rng.standard_normal((n, num_features)), 0) + 0.5 * labels[:, None]
    return labels, z, 2.0 * np.eye(num_labels)[labels]


def test_dependence_of_logits_that_are_linear_in_the_activations(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng)
    logits = by_label + z @ rng.standard_normal((20, 3))
    assert unintended_dependence(logits, labels, z) > 0.999


def test_dependence_of_independent_logits(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng)
    assert unintended_dependence(by_label + rng.standard_normal((400, 3)), labels, z) < 0.02


def test_dependence_is_the_share_that_the_activations_explain(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng, n=3000, num_labels=2)
    margin = z[:, 0] / z[:, 0].std() + rng.standard_normal(3000) * np.sqrt(3)
    logits = by_label + np.stack([-margin, margin], axis=1)
    within = np.concatenate([z[labels == y, :1] - z[labels == y, :1].mean() for y in (0, 1)])
    target = np.concatenate([margin[labels == y] - margin[labels == y].mean() for y in (0, 1)])
    in_sample = LinearRegression().fit(within, target).score(within, target)
    assert 0.1 < in_sample < 0.4
    # 19 idle features and the held-out folds cost a little of the in-sample share.
    assert unintended_dependence(logits, labels, z) == pytest.approx(in_sample, abs=0.02)


def test_dependence_does_not_count_what_comes_with_the_label(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 400)
    z = labels[:, None] + 0.1 * rng.standard_normal((400, 3))
    logits = 5.0 * np.eye(2)[labels] + 0.1 * rng.standard_normal((400, 2))
    assert LinearRegression().fit(z, logits).score(z, logits) > 0.9
    assert unintended_dependence(logits, labels, z) < 0.02


def test_dependence_does_not_count_what_all_logits_share(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng)
    logits = by_label + rng.standard_normal((400, 3)) + 10 * z[:, :1]
    assert unintended_dependence(logits, labels, z) < 0.02
    # A single logit has no softmax around it: there it counts.
    assert unintended_dependence(logits[:, :1], labels, z) > 0.9


def test_dependence_sees_reliance_that_use_does_not(rng: np.random.Generator) -> None:
    # The feature writes e1 and whatever fires it also moves e2; the weights have turned away from e1 to e2.
    labels = rng.integers(0, 2, 600)
    z = np.maximum(rng.standard_normal((600, 1)), 0)
    pooled = z * (E1 + E2) + labels[:, None] * E3 + 0.1 * rng.standard_normal((600, 4))
    weight = two_labels(E2 + E3)
    assert unintended_use(pooled, weight, E1[None]) == pytest.approx(0.0, abs=1e-12)
    assert unintended_dependence(pooled @ weight.T, labels, z) > 0.8


def one_logit_of_three(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Logits that stay as they are under centring: the first is the signal wholly, the other two nearly all noise."""
    return np.stack([signal, -signal / 2 + noise, -signal / 2 - noise], axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_dependence_is_the_mean_of_logits_floored_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 40)
    z = rng.standard_normal((40, 1))
    # With so few texts the R² of the noise is well under 0 (-0.02 to -0.19), and must not eat into the first logit's.
    logits = one_logit_of_three(z[:, 0], 20 * rng.standard_normal(40))
    assert unintended_dependence(logits, labels, z) == pytest.approx(1 / 3, abs=1e-4)


def test_dependence_chooses_a_ridge_strength_for_each_logit() -> None:
    # Loud noise in two logits asks for a strong ridge, which would spoil the one that the activations tell exactly.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    z = rng.standard_normal((200, 60))
    logits = one_logit_of_three(z @ rng.standard_normal(60), 500 * rng.standard_normal(200))
    assert unintended_dependence(logits, labels, z) == pytest.approx(1 / 3, abs=1e-3)


def test_dependence_needs_its_ridge(rng: np.random.Generator) -> None:
    # As many features as training texts, half of the margin's variance theirs: unregularised, R² is far under 0.
    labels = rng.integers(0, 2, 200)
    z = rng.standard_normal((200, 160)) * 0.3 + rng.standard_normal((200, 1))
    margin = z.mean(axis=1) + rng.standard_normal(200)
    assert 0.3 < unintended_dependence(np.stack([-margin, margin], axis=1), labels, z) < 0.6


@pytest.mark.parametrize("seed", range(5))
def test_dependence_is_never_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 30)
    value = unintended_dependence(rng.standard_normal((30, 2)), labels, rng.standard_normal((30, 50)), seed=seed)
    assert 0.0 <= value < 0.5


def test_dependence_is_held_out_and_not_in_sample(rng: np.random.Generator) -> None:
    # More features than texts: an in-sample fit would be perfect.
    labels = rng.integers(0, 2, 120)
    assert unintended_dependence(rng.standard_normal((120, 2)), labels, rng.standard_normal((120, 300))) < 0.1


@pytest.mark.parametrize("fires_in", [1, 2, 5])
def test_dependence_survives_rare_features(fires_in: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    z = rng.standard_normal((400, 3))
    margin = z.sum(axis=1) + rng.standard_normal(400)
    logits = np.stack([-margin, margin], axis=1)
    rare = np.zeros((400, 100))
    for feature in range(100):
        rare[rng.choice(400, fires_in, replace=False), feature] = 0.2 + rng.exponential(size=fires_in)
    plain = unintended_dependence(logits, labels, z)
    assert plain > 0.7
    # Scaled on the training folds, two texts a feature take it to 0.
    assert unintended_dependence(logits, labels, np.concatenate([z, rare], axis=1)) > plain - 0.2


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_dependence_does_not_change_with_units(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 60)
    z = rng.standard_normal((60, 4))
    logits = z[:, :2] + rng.standard_normal((60, 2))
    value = unintended_dependence(logits, labels, z)
    per_label = rng.standard_normal((2, 2))[labels]
    units = 10.0 ** np.arange(-4, 4, 2)
    assert unintended_dependence(1e5 * (logits + per_label), labels, z * units + 1) == pytest.approx(value, abs=1e-6)


def test_dependence_of_what_does_not_vary_is_zero(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng)
    assert unintended_dependence(np.full((400, 3), 0.1), labels, z) == 0.0
    assert unintended_dependence(by_label / 30, labels, z) == 0.0
    assert unintended_dependence(by_label + z[:, :3], labels, np.full((400, 2), 0.1)) == 0.0
    assert unintended_dependence(by_label + z[:, :3], labels, np.zeros((400, 0))) == 0.0
    # Nor what varies by rounding alone.
    assert unintended_dependence(by_label + z[:, :3], labels, 1 + 1e-12 * z) == 0.0
    assert unintended_dependence(1 + 1e-12 * z[:, :3], labels, z) == 0.0


def test_dependence_counts_a_constant_logit_as_zero(rng: np.random.Generator) -> None:
    labels, z, _ = dependence_case(rng)
    # Centred over labels, the third logit is constant and the first two are z.
    logits = np.stack([z[:, 0], -z[:, 0], 0 * z[:, 0]], axis=1)
    assert unintended_dependence(logits, labels, z) == pytest.approx(2 / 3, abs=1e-3)


def test_dependence_is_deterministic(rng: np.random.Generator) -> None:
    labels, z, by_label = dependence_case(rng)
    logits = by_label + z[:, :3] + rng.standard_normal((400, 3))
    value = unintended_dependence(logits, labels, z)
    assert unintended_dependence(logits, labels, z) == value
    assert unintended_dependence(logits, labels, z, seed=1) != value
    assert unintended_dependence(logits, labels, z, folds=3) != value


def test_dependence_copes_with_a_label_of_one_text(rng: np.random.Generator) -> None:
    labels = np.array([0] * 30 + [1])
    z = rng.standard_normal((31, 2))
    assert unintended_dependence(np.stack([z[:, 0], -z[:, 0]], axis=1), labels, z) > 0.9


@pytest.mark.parametrize("folds", [1, 21])
def test_dependence_folds_out_of_range(folds: int, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="folds must lie between 2 and the number of texts"):
        unintended_dependence(rng.standard_normal((20, 2)), [0, 1] * 10, rng.standard_normal((20, 2)), folds=folds)


# --- All together


def full_case(rng: np.random.Generator) -> dict[str, Any]:
    labels = rng.integers(0, 3, 150)
    pooled = rng.standard_normal((150, 8)) + np.eye(8)[labels]
    weight = rng.standard_normal((3, 8))
    return {
        "logits": pooled @ weight.T,
        "labels": labels,
        "groups": rng.choice(["f", "m"], 150),
        "pooled": pooled,
        "weight": weight,
        "directions": rng.standard_normal((2, 8)),
        "activations": np.maximum(pooled[:, :2], 0),
    }


def test_evaluate_gives_every_figure_in_order(rng: np.random.Generator) -> None:
    case = full_case(rng)
    figures = evaluate_predictions(**case)
    assert list(figures) == KEYS
    assert all(type(value) is float for value in figures.values())
    predictions = case["logits"].argmax(1)
    assert figures == {
        **classification_scores(case["logits"], case["labels"]),
        "worst_group_accuracy": worst_group_accuracy(predictions, case["labels"], case["groups"]),
        "group_gap": group_gap(predictions, case["labels"], case["groups"]),
        "leakage": leakage(case["logits"], case["labels"], case["groups"]),
        "unintended_use": unintended_use(case["pooled"], case["weight"], case["directions"]),
        "unintended_dependence": unintended_dependence(case["logits"], case["labels"], case["activations"]),
    }


def test_evaluate_gives_none_and_never_leaves_a_key_out(rng: np.random.Generator) -> None:
    case = full_case(rng)
    bare = evaluate_predictions(logits=case["logits"], labels=case["labels"])
    assert list(bare) == KEYS
    assert [key for key, value in bare.items() if value is None] == KEYS[3:]
    for missing in ("pooled", "weight", "directions"):
        assert evaluate_predictions(**{**case, missing: None})["unintended_use"] is None
    empty = evaluate_predictions(**{**case, "directions": np.zeros((0, 8)), "activations": np.zeros((150, 0))})
    assert (empty["unintended_use"], empty["unintended_dependence"]) == (0.0, 0.0)


def test_evaluate_of_fewer_texts_than_folds() -> None:
    case: dict[str, Any] = {"logits": logits_for([0, 1, 1, 0]), "labels": [0, 1, 0, 1], "activations": np.eye(4)}
    assert evaluate_predictions(**case)["unintended_dependence"] is None


def test_evaluate_takes_float32_and_torch(rng: np.random.Generator) -> None:
    case = full_case(rng)
    tensors: dict[str, Any] = {
        name: value if name == "groups" else torch.tensor(value, dtype=None if name == "labels" else torch.float32)
        for name, value in case.items()
    }
    figures, expected = evaluate_predictions(**tensors), evaluate_predictions(**case)
    assert figures == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("logits", lambda v: v[:, 0], "logits must have two dimensions"),
        ("logits", lambda v: v[:, :1], "logits must have 2 or more columns"),
        ("logits", lambda v: v[:0], "logits is empty"),
        ("logits", lambda v: np.where(np.arange(150)[:, None] == 7, np.nan, v), "NaN .* in 1 rows .*row 7.*leave"),
        ("labels", lambda v: v[:-1], "labels must have 150 entries"),
        ("labels", lambda v: v + 1, r"labels must lie in 0..2.*got 1..3"),
        ("labels", lambda v: v - 1, r"labels must lie in 0..2.*got -1..1"),
        ("labels", lambda v: v.astype(float), "labels must be integers, got float64: number"),
        ("labels", lambda v: v[:, None], "labels must have one dimension"),
        ("groups", lambda v: v[:-1], "groups must have 150 entries"),
        ("groups", lambda v: np.linspace(0, 1, 150), "groups must hold names or whole numbers.*bin it"),
        ("pooled", lambda v: v[:-1], "pooled must have 150 rows"),
        ("pooled", lambda v: v * np.inf, "pooled holds NaN or infinite"),
        ("weight", lambda v: v[:, :-1], "weight must have 8 columns"),
        ("weight", lambda v: v[:-1], "weight must have 3 rows"),
        ("directions", lambda v: v[:, :-1], "directions must have 8 columns"),
        ("directions", lambda v: v * np.nan, "directions holds NaN"),
        ("activations", lambda v: v[:-1], "activations must have 150 rows"),
        ("activations", lambda v: v * np.nan, "activations holds NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_evaluate_names_the_argument_and_the_mend(
    name: str, spoil: Callable[[Any], Any], message: str, rng: np.random.Generator
) -> None:
    case = full_case(rng)
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(**{**case, name: spoil(case[name])})


@pytest.mark.parametrize("figure", [worst_group_accuracy, group_gap, group_cells])
def test_group_figures_check_predictions(figure: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="predictions must have 2 entries"):
        figure([0, 1, 1], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="predictions must be integers"):
        figure([0.2, 0.7], [0, 1], ["a", "b"])

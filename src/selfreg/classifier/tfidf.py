"""The baseline that needs no language model: a linear model on TF-IDF of words and pairs of words.

Shapes: N texts, P pairs, V terms, L labels.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfreg.activations.prompt import check_texts
from selfreg.classifier.tasks import class_ids
from selfreg.evaluation.arrays import FloatArray
from selfreg.utils.progress import Advance, progress

logger = logging.getLogger(__name__)

Pair: TypeAlias = tuple[str, str]
"""The chosen and the rejected text."""

_Matrix: TypeAlias = Any
"""A sparse matrix of scipy, which has no types of its own."""
_Folds: TypeAlias = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""What C is chosen from: the weight of the data against the L2 penalty."""
_FOLDS = 5
_MAX_TERMS = 200_000  # the most frequent; they bound the time and memory of large sets


def tfidf_logits(
    train_texts: Sequence[str],
    train_labels: Sequence[Any] | npt.NDArray[Any] | Tensor,
    eval_texts: Mapping[str, Sequence[str]],
    *,
    num_labels: int,
    task: str = "single_label",
    sample_weight: Sequence[float] | npt.NDArray[Any] | None = None,
    class_weight: Literal["balanced"] | Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Trains on some texts and gives the logits of others.

    Logistic regression with an L2 penalty, whose strength is chosen by the cross-entropy in 5-fold cross-validation;
    for regression, ridge regression and the squared error. Cross-validation is among the labels that have two texts or
    more, in as many folds as the rarest of them has texts, up to five; where there are no two such labels, C is 1.

    Args:
        train_texts: the training texts; terms and their frequencies are counted in them alone.
        train_labels: `[N]` class ids; for multi_label `[N, L]` of 0 and 1; for regression `[N]` or `[N, 1]` numbers.
        eval_texts: texts of each set, by its name.
        num_labels: L; 1 for regression.
        task: single_label, multi_label or regression; for preferences see `tfidf_pair_scores`.
        sample_weight (`[N]`, *optional*): of each training text, in fits and in cross-validation; 0 leaves it out.
        class_weight: of each label, or "balanced" for labels that weigh the same in sum; for single_label only.
        seed: of the folds.

    Returns:
        `[N, L]` float32 for each set: logits whose softmax gives the probabilities (for two labels ± half of the log
        odds); for multi_label the log odds of each label, one against the rest, which for a label of all or no
        training texts are those of (n + ½) / (N + 1); for regression the predictions.

    Raises:
        ValueError: an empty text, labels or weights that do not fit, or a label that no training text has.
    """
    check_texts(train_texts)
    weights = _sample_weights(sample_weight, len(train_texts))
    kept = np.flatnonzero(weights)
    targets = _targets(train_labels, kept, len(train_texts), num_labels, task)
    texts, weights = [train_texts[row] for row in kept.tolist()], weights[kept]
    if class_weight is not None:
        if task != "single_label":
            raise ValueError(f"class_weight={class_weight!r} is for single_label, not for {task}: leave it out")
        weights = weights * _class_weights(class_weight, targets[:, 0], weights, num_labels)
    vectors, evals = _vectorize(texts, eval_texts)
    with progress("tf-idf", targets.shape[1] * len(STRENGTHS), "fits") as advance:
        if task == "regression":
            return _regression(vectors, targets[:, 0], weights, evals, seed, advance)
        columns = [_classification(vectors, column, weights, evals, seed, advance) for column in targets.T]
    logits = {name: np.concatenate([column[name] for column in columns], axis=1) for name in evals}
    if task == "single_label" and num_labels == 2:
        logits = {name: np.concatenate([-odds / 2, odds / 2], axis=1) for name, odds in logits.items()}
    return {name: _tensor(values) for name, values in logits.items()}


def tfidf_pair_scores(
    train_pairs: Sequence[Pair],
    eval_pairs: Mapping[str, Sequence[Pair]],
    *,
    sample_weight: Sequence[float] | npt.NDArray[Any] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Trains on preferences and scores other pairs: the Bradley-Terry model on TF-IDF.

    It is logistic regression on the difference of the two texts' vectors, without an intercept and on both
    orientations of each pair, which are always in the same fold. Give the replies without what they reply to: since
    each text's vector is scaled to length 1, what both sides share would not cancel.

    Args:
        train_pairs: the chosen and the rejected text of each pair.
        eval_pairs: pairs of each set, by its name.
        sample_weight (`[P]`, *optional*): of each training pair; 0 leaves it out.
        seed: of the folds.

    Returns:
        `[P, 1]` float32 for each set: score of the chosen text less that of the rejected one, which is the log odds of
        the choice.

    Raises:
        ValueError: fewer than two training pairs, a pair that is not two texts, or weights that do not fit.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    weights = _sample_weights(sample_weight, len(train_pairs))
    kept = np.flatnonzero(weights)
    count = len(kept)
    if count < 2:
        raise ValueError(f"there are {count} training pairs: cross-validation needs two or more")
    weights = np.tile(weights[kept], 2)
    sides = _sides(train_pairs, "training")
    vectors, evals = _vectorize(
        [side for row in kept for side in sides[2 * row : 2 * row + 2]],
        {name: _sides(pairs, name) for name, pairs in eval_pairs.items()},
    )
    differences = vectors[0::2] - vectors[1::2]
    truth = np.repeat([1, 0], count)
    folds = [
        (np.concatenate([train, train + count]), np.concatenate([test, test + count]))
        for train, test in KFold(min(_FOLDS, count), shuffle=True, random_state=seed).split(np.arange(count))
    ]

    def make(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, fit_intercept=False, max_iter=_MAX_STEPS)

    with progress("tf-idf", len(STRENGTHS), "fits") as advance:
        both = vstack([differences, -differences]).tocsr()
        model = _best(make, _cross_entropy, both, truth, weights, folds, advance)
    return {
        name: _tensor(model.decision_function(rows[0::2] - rows[1::2]).reshape(-1, 1)) for name, rows in evals.items()
    }


def _vectorize(train: Sequence[str], evals: Mapping[str, Sequence[str]]) -> tuple[_Matrix, dict[str, _Matrix]]:
    """`[N, V]` of the training texts, and of each other set."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    for name, texts in evals.items():
        try:
            check_texts(texts)
        except ValueError as error:
            raise ValueError(f"set {name!r}: {error}") from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_MAX_TERMS)
    try:
        vectors = vectorizer.fit_transform(train)
    except ValueError as error:
        raise ValueError("no training text has a word of two letters or more: tf-idf has nothing to count") from error
    return vectors, {name: vectorizer.transform(texts) for name, texts in evals.items()}


# --- Fits ------------------------------------------------------------------------------------------------------------

_MAX_STEPS = 2000


def _classification(
    vectors: _Matrix,
    labels: npt.NDArray[np.int64],
    weights: FloatArray,
    evals: Mapping[str, _Matrix],
    seed: int,
    advance: Advance,
) -> dict[str, FloatArray]:
    """Log odds of label 1, `[N, 1]`, for two labels; else `[N, L]`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2:
        advance(len(STRENGTHS))
        share = (labels.sum() + 0.5) / (len(labels) + 1)
        return {name: np.full((matrix.shape[0], 1), np.log(share / (1 - share))) for name, matrix in evals.items()}
    folds: _Folds = []
    rows = np.flatnonzero(np.isin(labels, present[counts > 1]))
    if (counts > 1).sum() > 1:
        split = StratifiedKFold(min(_FOLDS, int(counts[counts > 1].min())), shuffle=True, random_state=seed)
        folds = [(rows[train], rows[test]) for train, test in split.split(rows, labels[rows])]

    def make(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=_MAX_STEPS)

    model = _best(make, _cross_entropy, vectors, labels, weights, folds, advance)
    return {name: model.decision_function(matrix).reshape(matrix.shape[0], -1) for name, matrix in evals.items()}


def _regression(
    vectors: _Matrix,
    values: FloatArray,
    weights: FloatArray,
    evals: Mapping[str, _Matrix],
    seed: int,
    advance: Advance,
) -> dict[str, Tensor]:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold

    folds: _Folds = []
    if len(values) > 1:
        folds = list(KFold(min(_FOLDS, len(values)), shuffle=True, random_state=seed).split(values))

    # Ridge weighs the penalty where LogisticRegression weighs the data.
    def make(strength: float) -> Ridge:
        return Ridge(alpha=1 / strength)

    model = _best(make, _squared_error, vectors, values, weights, folds, advance)
    return {name: _tensor(model.predict(matrix).reshape(-1, 1)) for name, matrix in evals.items()}


def _best(
    make: Callable[[float], Any],
    loss: Callable[[Any, _Matrix, npt.NDArray[Any], FloatArray], float],
    inputs: _Matrix,
    targets: npt.NDArray[Any],
    weights: FloatArray,
    folds: _Folds,
    advance: Advance,
) -> Any:
    """The model whose C has the least held-out loss, the smallest C among equals; fitted on all rows.

    Not LogisticRegressionCV, whose scores leave the weights out. The folds share the terms and their frequencies,
    which know no label.
    """
    best = 1.0
    if folds:
        losses = {}
        for strength in STRENGTHS:
            losses[strength] = 0.0
            for train, test in folds:
                model = make(strength).fit(inputs[train], targets[train], sample_weight=weights[train])
                losses[strength] += loss(model, inputs[test], targets[test], weights[test])
            advance(1)
        best = min(losses, key=losses.__getitem__)
        logger.info("tf-idf: C = %g of %s, by cross-validation", best, ", ".join(f"{c:g}" for c in STRENGTHS))
    else:
        advance(len(STRENGTHS))
    return make(best).fit(inputs, targets, sample_weight=weights)


def _cross_entropy(model: Any, inputs: _Matrix, labels: npt.NDArray[Any], weights: FloatArray) -> float:
    from sklearn.metrics import log_loss

    probabilities = model.predict_proba(inputs)
    return float(log_loss(labels, probabilities, sample_weight=weights, labels=model.classes_, normalize=False))


def _squared_error(model: Any, inputs: _Matrix, values: npt.NDArray[Any], weights: FloatArray) -> float:
    return float((weights * (values - model.predict(inputs)) ** 2).sum())


# --- What is given ---------------------------------------------------------------------------------------------------


def _targets(labels: Any, kept: npt.NDArray[np.int64], count: int, num_labels: int, task: str) -> npt.NDArray[Any]:
    """Checked labels of the rows `kept` with one column for each model: `[N, 1]`, or `[N, L]` for multi_label."""
    if task not in ("single_label", "multi_label", "regression"):
        mend = "call tfidf_pair_scores" if task == "preference" else "single_label, multi_label or regression"
        raise ValueError(f"task={task!r} is not known here: {mend}")
    if len(labels) != count:
        raise ValueError(f"there are {len(labels)} labels for {count} training texts: give one a text")
    if task == "single_label":
        if num_labels < 2:
            raise ValueError(f"num_labels={num_labels} must be two or more")
        ids = np.array(class_ids(labels, num_labels, "training set"))[kept]
        missing = sorted(set(range(num_labels)) - set(ids.tolist()))
        if missing:
            raise ValueError(f"no training text has the label {missing[0]}: add some, or number the labels without it")
        return ids[:, None]
    try:
        values = np.asarray(labels, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels for {task} must be numbers: {error}") from error
    values = values[:, None] if values.ndim == 1 and task == "regression" else values
    columns = num_labels if task == "multi_label" else 1
    if values.shape != (count, columns):
        raise ValueError(f"labels for {task} must have the shape {(count, columns)}, got {values.shape}")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"label {values[row].tolist()} in row {row} is not finite: leave the text out")
    if task == "regression":
        return values[kept]
    if not np.isin(values, (0, 1)).all():
        row = int(np.flatnonzero(~np.isin(values, (0, 1)).all(axis=1))[0])
        raise ValueError(f"labels {values[row].tolist()} in row {row} must be 0 or 1 each")
    return values.astype(np.int64)[kept]


def _sample_weights(weights: Any, count: int) -> FloatArray:
    if weights is None:
        return np.ones(count)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (count,):
        raise ValueError(f"sample_weight must be {count} numbers, one a text; its shape is {given.shape}")
    if not np.isfinite(given).all() or (given < 0).any() or (count and not given.any()):
        raise ValueError("sample_weight must be finite numbers, none negative and not all 0")
    return given


def _class_weights(
    given: Literal["balanced"] | Sequence[float], labels: npt.NDArray[np.int64], weights: FloatArray, num_labels: int
) -> FloatArray:
    """`[N]`: the weight of each text's label."""
    if isinstance(given, str):
        if given != "balanced":
            raise ValueError(f"class_weight={given!r} is not known: 'balanced', or a weight a label")
        return (weights.sum() / (num_labels * np.bincount(labels, weights, num_labels)))[labels]
    each = np.asarray(given, dtype=np.float64)
    if each.shape != (num_labels,) or not np.isfinite(each).all() or each.min() <= 0:
        raise ValueError(f"class_weight={list(given)} must be {num_labels} numbers above 0")
    return each[labels]


def _sides(pairs: Sequence[Pair], name: str) -> list[str]:
    """Chosen and rejected texts in turn, checked."""
    sides: list[str] = []
    for row, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(side, str) and side.strip() for side in pair):
            raise ValueError(
                f"{name} pairs: row {row} is {pair!r}; it must be a chosen and a rejected text, not empty"
            )
        sides += pair
    return sides


def _tensor(values: FloatArray) -> Tensor:
    return torch.from_numpy(values).float()

"""What the figures of the page are called and mean, how they are written, and the headline and tables made of them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from numbers import Real
from typing import Any

from selfreg.evaluation.metrics import MIN_CELL

# Control characters that HTML has no place for, and halves of surrogate pairs, which UTF-8 can't hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class _Figure:
    name: str
    better: int  # 1: higher is better, -1: lower is better, 0: neither
    meaning: str
    digits: int = 3
    percent: bool = False

    def show(self, value: float | None) -> str | None:
        if value is None:
            return None
        if self.percent:
            return f"{show(100 * value, 1)} %"
        return show(value, self.digits)


_FIGURES = {
    "accuracy": _Figure("Accuracy", 1, "Share of the texts that get the right answer."),
    "f1": _Figure("F1", 1, "Balance between missing texts of a label and giving the label wrongly; 1 is perfect."),
    "auc": _Figure("AUC", 1, "How well the scores put texts of a label before the others; 0.5 is chance, 1 perfect."),
    "worst_group_accuracy": _Figure(
        "Worst-group accuracy",
        1,
        "The lowest accuracy among all combinations of a label and a group that have at least 10 texts.",
    ),
    "group_gap": _Figure(
        "Group gap",
        -1,
        "The largest difference between groups in how often a label is given, rightly or wrongly "
        "(equalized odds difference).",
    ),
    "leakage": _Figure(
        "Leakage",
        -1,
        "How far the score gives away the group among texts of the same true label; 0: not at all, 1: entirely.",
    ),
    "unintended_use": _Figure(
        "Unintended use",
        -1,
        "Share of what varies in the decision that comes directly through the unintended features.",
    ),
    "unintended_dependence": _Figure(
        "Unintended dependence",
        -1,
        "Share of what varies in the decision, among texts of one label, that the unintended features predict; "
        "it also sees detours through whatever goes along with them.",
    ),
    "r2": _Figure("R²", 1, "Share of what varies in the true values that the predictions account for."),
    "rmse": _Figure("RMSE", -1, "Typical size of an error, with large errors counting more."),
    "mae": _Figure("MAE", -1, "Average size of an error."),
    "mse": _Figure("MSE", -1, "Average squared error."),
}

_SAE_FIGURES = {
    "fvu": _Figure(
        "Fraction of variance unexplained (FVU)",
        -1,
        "What the autoencoder loses of the language model's hidden states; 0: nothing, 1: everything.",
    ),
    "l0": _Figure("Active features per token (L0)", 0, "How many features describe one token.", digits=1),
    "dead_fraction": _Figure("Dead features", -1, "Share of the features that no token activates.", percent=True),
    "num_states": _Figure("Tokens", 0, "How many tokens these figures were taken over.", digits=0),
}
_SAE_COLUMNS = {
    "before": "Before fine-tuning",
    "after": "After fine-tuning",
    "before_finetuning": "Before fine-tuning",
    "after_finetuning": "After fine-tuning",
}

METHODS = {
    "plain": "An ordinary linear classifier on the language model's hidden states.",
    "selfreg": "The same classifier, trained to keep away from the unintended features.",
    "l2": "The ordinary classifier with its weights kept small (a ridge chosen by cross-validation).",
    "dropout": "The ordinary classifier, with parts of its input switched off at random while it learns.",
    "label_smoothing": "The ordinary classifier, trained towards slightly softened labels.",
    "focal": "The ordinary classifier, trained with more weight on the texts that it gets wrong.",
    "spectral_norm": "The ordinary classifier with the overall strength of its weights limited.",
    "projection": "The ordinary classifier after the whole span of the unintended features is projected away.",
    "removal_only": "The unintended features are removed from the hidden states, and nothing else is done.",
    "penalty_only": "Only the penalty on the similarity of the weights to the unintended features.",
    "offset_only": "Only what the unintended features say about the label set aside in training.",
    "dependence_only": "Only the penalty on what still depends on the unintended features.",
    "tfidf": "Logistic regression on the words of the texts (TF-IDF), without the language model.",
    "zero_shot": "The language model itself, asked in words which label fits.",
    "scrubbing": "The ordinary classifier on texts from which the words of the attribute were taken out.",
    "leace": "The ordinary classifier after all that tells the group linearly is erased (LEACE; needs the groups).",
}


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def _round(value: float, digits: int) -> float:
    """Half away from zero, on the digits that a reader of `metrics.json` sees: 0.955 is 0.96."""
    if abs(value) >= 1e15:  # nothing behind the point any more, and too long for a Decimal
        return float(value)
    return float(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def show(value: float, digits: int) -> str:
    """With a true minus sign, and none on a zero."""
    rounded = _round(value, digits)
    return f"{rounded or 0.0:,.{digits}f}".replace("-", "−")


def ordered(methods: Iterable[str]) -> list[str]:
    """Before, after, then what else was tried."""
    names = list(dict.fromkeys(methods))
    return [name for name in ("plain", "selfreg") if name in names] + [
        name for name in names if name not in ("plain", "selfreg")
    ]


def union(mappings: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


# ---------------------------------------------------------------------------------------------------------------------
# Headline and tables
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """One figure on one eval set, for the method that the page is about and for the one that it is compared with."""

    eval_name: str
    figure: _Figure
    method: str
    after: float
    reference: str | None
    before: float | None

    @property
    def difference(self) -> float:
        """As a reader would compute it from the figures as they are shown."""
        return 0.0 if self.before is None else _round(_round(self.after, 2) - _round(self.before, 2), 2)

    @property
    def verb(self) -> str:
        if self.before is None:
            return "is"
        return "rose" if self.difference > 0 else "fell" if self.difference < 0 else "stayed"

    @property
    def effect(self) -> str:
        return _effect(self.difference, self.figure)

    @property
    def shown(self) -> tuple[str | None, str]:
        return None if self.before is None else show(self.before, 2), show(self.after, 2)


def headline(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[list[_Change], list[_Change]]:
    """The changes to say in words, and those to show as large numbers.

    The first sentence is about the eval set on which the classifier that is compared with does worst: there lies the
    problem. The second says what the control costs where that classifier does best.
    """
    names = ordered(methods)
    if not names:
        return [], []
    method = "selfreg" if "selfreg" in names else names[0]
    reference = "plain" if "plain" in names and method != "plain" else None

    def changes(key: str) -> list[_Change]:
        found = []
        for eval_name, values in methods[method].items():
            after = number(values.get(key))
            before = number(methods[reference].get(eval_name, {}).get(key)) if reference else None
            if after is not None and (before is not None or reference is None):
                found.append(_Change(eval_name, _FIGURES[key], method, after, reference, before))
        # Worst first.
        better = _FIGURES[key].better
        return sorted(found, key=lambda change: better * (change.after if change.before is None else change.before))

    first = next((found[0] for key in ("worst_group_accuracy", *_FIGURES) if (found := changes(key))), None)
    if first is None:
        return [], []
    cost = changes("accuracy")[-1:]
    sentences = list(dict.fromkeys([first, *cost]))
    use = [change for key in ("leakage", "unintended_use", "unintended_dependence") for change in changes(key)]
    return sentences, sentences + [change for change in use if change.eval_name == first.eval_name]


def caution(change: _Change, cells: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str | None:
    """What to say of a change of the worst group where it may be chance; None where it is none, or of something else.

    Args:
        change: the first of `headline`.
        cells: of each method, by eval set: rows with `n`, `accuracy`, `low` and `high`.
    """
    if change.figure is not _FIGURES["worst_group_accuracy"] or change.reference is None:
        return None
    worst = []
    for name in (change.reference, change.method):
        counted = [cell for cell in cells.get(name, {}).get(change.eval_name, ()) if cell["n"] >= MIN_CELL]
        worst += sorted(counted, key=lambda cell: cell["accuracy"])[:1]
    if len(worst) < 2 or worst[0]["high"] < worst[1]["low"] or worst[1]["high"] < worst[0]["low"]:
        return None
    between = " and ".join(f"{show(cell['low'], 2)} to {show(cell['high'], 2)}" for cell in worst)
    return (
        f"Those are cells of {worst[0]['n']} and {worst[1]['n']} texts, whose 95 % intervals overlap ({between}): "
        "it may be chance."
    )


@dataclass(frozen=True)
class _Cell:
    value: str | None
    best: bool
    change: str | None
    effect: str


def tables(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    names = ordered(methods)
    tables = []
    for eval_name in union(methods[name] for name in names):
        rows = {name: methods[name][eval_name] for name in names if eval_name in methods[name]}
        found = union(row for row in rows.values())
        scalar = [key for key in found if all(_is_scalar(row.get(key)) for row in rows.values())]
        keys = [key for key in _FIGURES if key in scalar] + [key for key in scalar if key not in _FIGURES]
        columns = [_FIGURES.get(key, _Figure(key.replace("_", " "), 0, "A figure of this task.")) for key in keys]
        cells: dict[str, list[_Cell]] = {name: [] for name in rows}
        for key, figure in zip(keys, columns, strict=True):
            values = {name: number(row.get(key)) for name, row in rows.items()}
            # Compared as they are shown: two values that read the same are equally good.
            rounded = {name: _round(value, figure.digits) for name, value in values.items() if value is not None}
            differ = figure.better != 0 and len(set(rounded.values())) > 1
            best = (max if figure.better > 0 else min)(rounded.values()) if differ else None
            for name, value in values.items():
                change = None
                if name == "selfreg" and name in rounded and "plain" in rounded:
                    change = _round(rounded[name] - rounded["plain"], figure.digits)
                cells[name].append(
                    _Cell(
                        figure.show(value),
                        best is not None and rounded.get(name) == best,
                        None if change is None else _with_sign(change, figure.digits),
                        _effect(change or 0.0, figure),
                    )
                )
        tables.append({"eval": eval_name, "columns": columns, "rows": cells})
    return tables


def _is_scalar(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _effect(change: float, figure: _Figure) -> str:
    return {1: "good", 0: "same", -1: "bad"}[int(math.copysign(1, change)) * figure.better if change else 0]


def _with_sign(change: float, digits: int) -> str:
    # A ± would read as an error bar.
    return "same" if change == 0 else ("+" if change > 0 else "") + show(change, digits)


def sae(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of figures, and a column for every point of the training at which they were measured."""
    columns = {_SAE_COLUMNS.get(key, key): value for key, value in figures.items() if isinstance(value, Mapping)}
    final = {key: value for key, value in figures.items() if _is_scalar(value)}
    repeated = any(final.items() <= column.items() for column in columns.values())
    if any(value is not None for value in final.values()) and not repeated:
        columns["On texts not trained on"] = final
    keys = union(columns.values())
    known = [key for key in _SAE_FIGURES if key in keys] + [key for key in keys if key not in _SAE_FIGURES]
    rows = []
    for key in known:
        figure = _SAE_FIGURES.get(key, _Figure(key.replace("_", " "), 0, ""))
        values = [number(column.get(key)) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append((figure, [figure.show(value) for value in values]))
    return {"columns": list(columns), "rows": rows} if rows else None

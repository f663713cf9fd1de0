"""One run as one HTML file: what changed, for which groups, through which features. It needs no network to be read."""

import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from numbers import Real
from typing import Any

import plotly.io
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from selfreg.features.spans import Span
from selfreg.utils.files import atomic_path


@dataclass(frozen=True)
class ReportFeature:
    """An unintended feature as the page shows it.

    Attributes:
        feature (`int`): index of the feature in the SAE.
        reason (`str`): why it was chosen.
        explanation (`str`, *optional*): what the explainer says it stands for.
        verdict (`str`, *optional*): the judge's answer to "is it a legitimate reason for a label?".
        density (`float`): share of the tokens on which it is active, from 0 to 1.
        max_activation (`float`): its largest activation.
        spans (`Sequence[Span]`): its top activating spans, strongest first.
    """

    feature: int
    reason: str
    explanation: str | None
    verdict: str | None
    density: float
    max_activation: float
    spans: Sequence[Span]


@dataclass(frozen=True)
class ReportData:
    """All that the page is made from.

    Attributes:
        title (`str`): title of the page.
        recipe (`dict`): the recipe, as it would be written to YAML.
        metrics (`dict`): `metrics.json`, with `groups` beside it: for every method and eval set a list of
            `{"label", "group", "n", "accuracy", "low", "high"}`. Under `sae`, mappings such as `before` and `after`
            hold the same figures at other points of the training.
        curves (`dict`): name of a training to the rows of its log history. Names that share what stands before `": "`
            (`"classifier: plain"`, `"classifier: selfreg"`) are drawn into the same charts.
        features (`list[ReportFeature]`): the unintended features, in the order to show them in.
        versions (`dict`): name of a library to its version.
        created (`str`): when the run ended, as ISO 8601.
    """

    title: str
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, list[dict[str, float]]]
    features: list[ReportFeature]
    versions: dict[str, str]
    created: str


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Writes the page of `data` to `path`; on any error what was at `path` before is still there, whole."""
    page = render_report(data)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf8", newline="\n")


def render_report(data: ReportData) -> str:
    """The page of `data`: one string of HTML that loads nothing. The same data gives the same string."""
    methods: dict[str, dict[str, dict[str, Any]]] = data.metrics.get("methods") or {}
    groups: dict[str, dict[str, list[dict[str, Any]]]] = data.metrics.get("groups") or {}
    # A method has one colour in the whole page.
    colours = _colours(_union([methods, groups, (name.partition(": ")[2] for name in data.curves)]))
    figures = _FigureWriter()
    headline, tiles = _headline(methods)
    tables = _tables(methods)
    page: dict[str, Any] = {
        "data": data,
        "headline": headline,
        "tiles": tiles,
        "tables": tables,
        "nulls": any(cell.value is None for table in tables for cells in table["rows"].values() for cell in cells),
        "compared": "plain" in methods and "selfreg" in methods,
        "method_notes": {name: _METHODS[name] for name in _ordered(methods) if name in _METHODS},
        "groups": _groups(groups, colours, figures),
        "curves": _curves(data.curves, colours, figures),
        "sae": _sae(data.metrics.get("sae") or {}),
        "counts": data.metrics.get("features") or {},
        "backbone": _backbone(data.recipe),
        "recipe": yaml.safe_dump(data.recipe, sort_keys=False, allow_unicode=True, width=100),
    }
    plotly_js = Markup(get_plotlyjs()) if figures.count else None
    return _environment().get_template("report.html.j2").render(page, plotly_js=plotly_js)


# ---------------------------------------------------------------------------------------------------------------------
# What the figures are called and mean
# ---------------------------------------------------------------------------------------------------------------------


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
            return f"{_show(100 * value, 1)} %"
        return _show(value, self.digits)


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
}
_SAE_COLUMNS = {"before": "Before fine-tuning", "after": "After fine-tuning"}

_METHODS = {
    "plain": "An ordinary linear classifier on the language model's hidden states.",
    "selfreg": "The same classifier, trained to keep away from the unintended features.",
    "l2": "The ordinary classifier with its weights kept small (weight decay).",
    "dropout": "The ordinary classifier, with parts of its input switched off at random while it learns.",
    "label_smoothing": "The ordinary classifier, trained towards slightly softened labels.",
    "focal": "The ordinary classifier, trained with more weight on the texts that it gets wrong.",
    "spectral_norm": "The ordinary classifier with the overall strength of its weights limited.",
    "leace": "The ordinary classifier after all that tells the group linearly is erased (LEACE; needs the groups).",
}

_CURVES = {
    "loss": ("Loss", "all parts together"),
    "task_loss": ("Task loss", "mistakes on the labels"),
    "similarity": ("Similarity", "how far the weights point along unintended features"),
    "dependence": ("Dependence", "how far the decision follows unintended features"),
    "live_loss": ("Loss of live features", "what the features in use leave out"),
    "dead_loss": ("Loss of dead features", "what is then left after the others"),
    "aux_loss": ("Auxiliary loss", "keeps features from dying"),
    "fvu": ("Variance unexplained", "what the features leave out; 0 is perfect"),
    "l0": ("Active features", "per token"),
    "dead_fraction": ("Dead features", "share that no token activates"),
    "dead_on_task": ("Dead on the task", "share that no token of its texts activates"),
}
_NOT_CURVES = re.compile(r"step|epoch|learning_rate|grad_norm|total_flos|train_.*|.*_runtime|.*_per_second")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def _round(value: float, digits: int) -> float:
    """Half away from zero, on the digits that a reader of `metrics.json` sees: 0.955 is 0.96."""
    if abs(value) >= 1e15:  # nothing behind the point any more, and too long for a Decimal
        return float(value)
    return float(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _show(value: float, digits: int) -> str:
    """With a true minus sign, and none on a zero."""
    rounded = _round(value, digits)
    return f"{rounded or 0.0:,.{digits}f}".replace("-", "−")


def _ordered(methods: Iterable[str]) -> list[str]:
    """Before, after, then what else was tried."""
    names = list(dict.fromkeys(methods))
    return [name for name in ("plain", "selfreg") if name in names] + [
        name for name in names if name not in ("plain", "selfreg")
    ]


def _union(mappings: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _backbone(recipe: Mapping[str, Any]) -> str | None:
    backbone = recipe.get("backbone")
    model = backbone.get("model") if isinstance(backbone, Mapping) else None
    return str(model) if model else None


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
        return None if self.before is None else _show(self.before, 2), _show(self.after, 2)


def _headline(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[list[_Change], list[_Change]]:
    """The changes to say in words, and those to show as large numbers.

    The first sentence is about the eval set on which the classifier that is compared with does worst: there lies the
    problem. The second says what the control costs where that classifier does best.
    """
    names = _ordered(methods)
    if not names:
        return [], []
    method = "selfreg" if "selfreg" in names else names[0]
    reference = "plain" if "plain" in names and method != "plain" else None

    def changes(key: str) -> list[_Change]:
        found = []
        for eval_name, values in methods[method].items():
            after = _number(values.get(key))
            before = _number(methods[reference].get(eval_name, {}).get(key)) if reference else None
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
    use = [change for key in ("unintended_use", "unintended_dependence") for change in changes(key)]
    return sentences, sentences + [change for change in use if change.eval_name == first.eval_name]


@dataclass(frozen=True)
class _Cell:
    value: str | None
    best: bool
    change: str | None
    effect: str


def _tables(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    names = _ordered(methods)
    tables = []
    for eval_name in _union(methods[name] for name in names):
        rows = {name: methods[name][eval_name] for name in names if eval_name in methods[name]}
        found = _union(row for row in rows.values())
        scalar = [key for key in found if all(_is_scalar(row.get(key)) for row in rows.values())]
        keys = [key for key in _FIGURES if key in scalar] + [key for key in scalar if key not in _FIGURES]
        columns = [_FIGURES.get(key, _Figure(key.replace("_", " "), 0, "A figure of this task.")) for key in keys]
        cells: dict[str, list[_Cell]] = {name: [] for name in rows}
        for key, figure in zip(keys, columns, strict=True):
            values = {name: _number(row.get(key)) for name, row in rows.items()}
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
    return ("+" if change > 0 else "±" if change == 0 else "") + _show(change, digits)


def _sae(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of figures, and a column for every point of the training at which they were measured."""
    columns = {_SAE_COLUMNS.get(key, key): value for key, value in figures.items() if isinstance(value, Mapping)}
    final = {key: value for key, value in figures.items() if _is_scalar(value)}
    if any(value is not None for value in final.values()) and final not in columns.values():
        columns["On texts not trained on"] = final
    keys = _union(columns.values())
    known = [key for key in _SAE_FIGURES if key in keys] + [key for key in keys if key not in _SAE_FIGURES]
    rows = []
    for key in known:
        figure = _SAE_FIGURES.get(key, _Figure(key.replace("_", " "), 0, ""))
        values = [_number(column.get(key)) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append((figure, [figure.show(value) for value in values]))
    return {"columns": list(columns), "rows": rows} if rows else None


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------

_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_COLOURS = {"plain": "#8b95a3", "selfreg": "#12a08a"}
# Visible on white as on near-black.
_OTHER_COLOURS = ["#d98a1f", "#8f6fe0", "#d65f86", "#4a90e2", "#8aa52d", "#b9674a", "#3fb0c9", "#a0527f"]
_MAX_POINTS = 400
_FEW = 10


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name and name not in _COLOURS]
    # The name "" is a training that is not of any method: the autoencoder's.
    return (
        _COLOURS
        | {"": _COLOURS["selfreg"]}
        | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
    )


def _figure_text(text: Any, limit: int | None = None) -> str:
    """Text for a figure: plotly reads a little HTML in it, and knows no `&quot;`."""
    text = " ".join(_clean(str(text)).split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return html.escape(text, quote=False)


class _FigureWriter:
    """Turns figures into HTML, and counts them: the source of plotly.js goes into the page only if there are any."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, traces: list[dict[str, Any]], layout: dict[str, Any]) -> Markup:
        self.count += 1
        base = {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "size": 12},
            "dragmode": False,
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1, "align": "left", "font": {"family": _FONT, "size": 12}},
        }
        return Markup(
            plotly.io.to_html(
                {"data": traces, "layout": base | layout},
                config={"displayModeBar": False, "displaylogo": False, "responsive": True},
                include_plotlyjs=False,
                full_html=False,
                validate=False,
                div_id=f"figure-{self.count}",
            )
        )


def _groups(
    groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    colours: Mapping[str, str],
    figures: _FigureWriter,
) -> list[dict[str, Any]]:
    """A chart and a table for every eval set that has groups."""
    names = _ordered(groups)
    blocks = []
    for eval_name in _union(groups[name] for name in names):
        rows = {
            name: {
                (str(cell["label"]), str(cell["group"])): cell
                for cell in groups[name].get(eval_name) or ()
                if _number(cell.get("accuracy")) is not None
            }
            for name in names
        }
        rows = {name: cells for name, cells in rows.items() if cells}
        keys = list(dict.fromkeys(key for cells in rows.values() for key in cells))
        if not keys:
            continue
        counts = {key: next(int(cells[key]["n"]) for cells in rows.values() if key in cells) for key in keys}
        # Many methods at once can't be read; the legend brings back the others.
        shown = list(rows) if len(rows) <= 4 else list(rows)[:2]
        traces = [_group_trace(name, cells, keys, colours[name], name in shown) for name, cells in rows.items()]
        labels = [f"<b>{_figure_text(label, 26)}</b><br>{_figure_text(group, 20)}, n={counts[label, group]}"
                  for label, group in keys]  # fmt: skip
        layout = {
            "height": 70 + len(keys) * max(46, 16 * len(shown) + 14),
            "barmode": "group",
            "bargap": 0.28,
            "bargroupgap": 0.08,
            "margin": {"l": 8, "r": 24, "t": 40, "b": 24},
            "xaxis": {"range": [0, 1.005], "dtick": 0.25, "tickformat": ".0%", "fixedrange": True, "zeroline": False},
            "yaxis": {
                "tickvals": list(range(len(keys))),
                "ticktext": labels,
                "range": [len(keys) - 0.5, -0.5],
                "fixedrange": True,
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
                "ticklabelstandoff": 6,
            },
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
            "showlegend": True,
        }
        blocks.append(
            {
                "eval": eval_name,
                "figure": figures(traces, layout),
                "hidden": len(rows) - len(shown),
                "few": any(count < _FEW for count in counts.values()),
                "methods": list(rows),
                "rows": [(key, counts[key], [_interval(cells.get(key)) for cells in rows.values()]) for key in keys],
                "worst": [(name, *min(cells.items(), key=lambda item: item[1]["accuracy"])) for name, cells in
                          rows.items() if name in shown],
            }
        )  # fmt: skip
    return blocks


def _interval(cell: Mapping[str, Any] | None) -> tuple[str, str | None] | None:
    if cell is None:
        return None
    low, high = _number(cell.get("low")), _number(cell.get("high"))
    between = None if low is None or high is None else f"{_show(low, 2)} to {_show(high, 2)}"
    return _show(float(cell["accuracy"]), 2), between


def _group_trace(
    name: str,
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
    keys: Sequence[tuple[str, str]],
    colour: str,
    shown: bool,
) -> dict[str, Any]:
    present = [(place, key, cells[key]) for place, key in enumerate(keys) if key in cells]
    accuracy = [float(cell["accuracy"]) for _, _, cell in present]
    low = [_number(cell.get("low")) for _, _, cell in present]
    high = [_number(cell.get("high")) for _, _, cell in present]
    hover = []
    for _, (label, group), cell in present:
        value, between = _interval(cell) or ("", None)
        interval = f" ({between})" if between else ""
        hover.append(
            f"<b>{_figure_text(label)}</b>, {_figure_text(group)}<br>"
            f"{_figure_text(name)}: {value}{interval}, {int(cell['n'])} texts"
        )
    return {
        "type": "bar",
        "orientation": "h",
        "name": _figure_text(name),
        "x": accuracy,
        "y": [place for place, _, _ in present],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0 if h is None else max(0.0, h - a) for a, h in zip(accuracy, high, strict=True)],
            "arrayminus": [0 if b is None else max(0.0, a - b) for a, b in zip(accuracy, low, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        "hovertext": hover,
        "hoverinfo": "text",
        "marker": {"color": colour, "opacity": [0.45 if int(cell["n"]) < _FEW else 1 for _, _, cell in present]},
        "visible": True if shown else "legendonly",
    }


def _curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str], figures: _FigureWriter
) -> list[dict[str, Any]]:
    """One block for every kind of training, with a small chart for every quantity that it logged."""
    trainings: dict[str, dict[str, Sequence[Mapping[str, float]]]] = {}
    for name, history in curves.items():
        kind, _, series = name.partition(": ")
        trainings.setdefault(kind, {})[series] = history
    blocks = []
    for kind, histories in trainings.items():
        histories = {name: histories[name] for name in _ordered(histories)}
        logged = _union(row for history in histories.values() for row in history)
        quantities = list(dict.fromkeys(key.removeprefix("eval_") for key in logged if not _NOT_CURVES.fullmatch(key)))
        quantities = [key for key in _CURVES if key in quantities] + [key for key in quantities if key not in _CURVES]
        panels = []
        for quantity in quantities:
            traces = [
                trace
                for name, history in histories.items()
                for key in (quantity, f"eval_{quantity}")
                if (trace := _curve_trace(name, key, history, colours[name])) is not None
            ]
            if not traces:
                continue
            title, meaning = _CURVES.get(quantity, (quantity.replace("_", " ").capitalize(), ""))
            values = [value for trace in traces for value in trace["y"]]
            logarithmic = min(values) > 0 and max(values) / min(values) >= 1000
            axis = {"fixedrange": True, "zeroline": False, "nticks": 5, "automargin": True}
            layout = {
                "height": 170,
                "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
                "showlegend": False,
                "xaxis": axis | {"showgrid": False, "title": {"text": traces[0]["meta"], "standoff": 4}},
                "yaxis": axis | {"hoverformat": ".4g", "type": "log" if logarithmic else "linear"}
                | ({} if logarithmic or min(values) < 0 else {"rangemode": "tozero"}),
            }  # fmt: skip
            panels.append(
                {
                    "title": title + (", log scale" if logarithmic else ""),
                    "meaning": meaning,
                    "figure": figures(traces, layout),
                    "ends": [(html.unescape(t["name"]), f"{t['y'][0]:.3g}", f"{t['y'][-1]:.3g}") for t in traces],
                }
            )
        if panels:
            legend = [(name, colours[name]) for name in histories if name]
            dashed = any(key.startswith("eval_") and not _NOT_CURVES.fullmatch(key) for key in logged)
            blocks.append({"name": kind, "panels": panels, "legend": legend, "dashed": dashed})
    return blocks


def _curve_trace(name: str, key: str, history: Sequence[Mapping[str, float]], colour: str) -> dict[str, Any] | None:
    rows = [row for row in history if _number(row.get(key)) is not None]
    if not rows:
        return None
    axis = next((axis for axis in ("step", "epoch") if all(_number(row.get(axis)) is not None for row in rows)), None)
    points = [(float(i + 1 if axis is None else row[axis]), float(f"{row[key]:.6g}")) for i, row in enumerate(rows)]
    if len(points) > _MAX_POINTS:
        stride = math.ceil(len(points) / _MAX_POINTS)
        points = points[:-1:stride] + points[-1:]
    evaluated = key.startswith("eval_")
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 3 else "lines+markers",
        "name": _figure_text(" ".join(part for part in (name, "on held-out texts" if evaluated else "") if part)),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": colour, "width": 2, "dash": "dot" if evaluated else "solid"},
        "hoverinfo": "x+y+name" if name or evaluated else "x+y",
        "meta": axis or "log entry",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The template
# ---------------------------------------------------------------------------------------------------------------------

# Control characters that HTML has no place for, and halves of surrogate pairs, which UTF-8 can't hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def _finalize(value: Any) -> Any:
    """Applied to whatever the template prints. Markup is the page's own."""
    return _clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _readable(text: str, peak: bool = False) -> Markup:
    """A piece of a span, escaped, with line breaks and tabs (in a peak of nothing else: blanks too) made visible."""
    text = _clean(text).replace("\r\n", "\n").replace("\r", "\n")
    if peak and not text.strip():
        text = text.replace(" ", "␣") or "∅"
    page = Markup.escape(text)
    return page.replace("\n", Markup('<i class="ws">↵</i> ')).replace("\t", Markup('<i class="ws">⇥</i> '))


def _share(value: float) -> str:
    percent = 100 * value
    return "under 0.01 %" if 0 < percent < 0.01 else f"{percent:.{2 if percent < 1 else 1}f} %"


def _date(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = moment.tzname()
    return f"{moment.day} {moment:%B %Y, %H:%M}" + (f" {zone}" if zone else "")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("selfreg.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"readable": _readable, "share": _share, "date": _date, "shown": _show}
    return environment

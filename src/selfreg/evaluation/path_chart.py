"""The path of weights as a chart: what the classifier does well, against how far it still relies on the features."""

import os
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from selfreg.classifier.baselines import FittedHead
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.path import PathPoint, WeightPath
from selfreg.classifier.states import PooledStates
from selfreg.evaluation.classifier import evaluate_head
from selfreg.evaluation.report_charts import FigureWriter
from selfreg.utils.files import atomic_path

WEIGHT_PATH_CHART = "weight_path.html"
_USE, _DEPENDENCE = "unintended_use", "unintended_dependence"
_NAMES = {
    _USE: "Unintended use",
    _DEPENDENCE: "Unintended dependence",
    "similarity": "Similarity",
    "dependence": "Dependence",
}
_SCORES = {"accuracy": "Accuracy", "f1": "F1", "r2": "R²"}
_LINE, _CHOSEN = "#12a08a", "#d65f86"


def reliance(model: RegularizedSequenceClassifier, states: PooledStates) -> dict[str, float | None]:
    """`unintended_use` and `unintended_dependence` on cached states, for `measure` of `weight_path`."""
    head = FittedHead("path", model, lambda pooled: pooled, [])
    figures, _ = evaluate_head(head, states, model.unintended, None)
    return {name: figures[name] for name in (_USE, _DEPENDENCE)}


def path_figure(path: WeightPath, figures: FigureWriter) -> Markup:
    """Score (upwards) against reliance (to the right), one panel for use and one for dependence.

    Where a point's `figures` don't hold these two, the two terms themselves take their place, which have no scale of
    their own and are drawn logarithmically.
    """
    measured = all(p.figures.get(name) is not None for p in path.points for name in (_USE, _DEPENDENCE))
    keys = (_USE, _DEPENDENCE) if measured else ("similarity", "dependence")
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": 300,
        "margin": {"l": 8, "r": 16, "t": 28, "b": 8},
        "grid": {"rows": 1, "columns": 2, "pattern": "independent", "xgap": 0.16},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    }
    for number, key in enumerate(keys):
        suffix = "" if number == 0 else str(number + 1)
        traces += _traces(path, key, suffix)
        axis = {"fixedrange": True, "zeroline": False, "automargin": True, "nticks": 6}
        layout[f"xaxis{suffix}"] = axis | {"title": {"text": _NAMES[key], "standoff": 4}}
        # A term that is 0 has no place on a logarithmic axis.
        if not measured and all(getattr(point, key) > 0 for point in path.points):
            layout[f"xaxis{suffix}"] |= {"type": "log", "exponentformat": "power"}
        layout[f"yaxis{suffix}"] = axis | {"title": {"text": _SCORES[path.score_name], "standoff": 4}}
    return figures(traces, layout)


def _traces(path: WeightPath, key: str, suffix: str) -> list[dict[str, Any]]:
    values = [float(point.figures[key] if key in point.figures else getattr(point, key)) for point in path.points]  # type: ignore[arg-type]
    place = {"type": "scatter", "xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "hoverinfo": "text"}
    chosen = path.points[path.chosen]
    return [
        place
        | {
            "mode": "lines+markers",
            "name": "path, from weak to strong",
            "showlegend": suffix == "",
            "x": values,
            "y": [point.score for point in path.points],
            "hovertext": [_hover(point) for point in path.points],
            "line": {"color": _LINE, "width": 2},
            "marker": {"size": 7},
        },
        place
        | {
            "mode": "markers",
            "name": "chosen",
            "showlegend": suffix == "",
            "x": [values[path.chosen]],
            "y": [chosen.score],
            "hovertext": [_hover(chosen)],
            "marker": {"color": _CHOSEN, "size": 13, "symbol": "diamond"},
        },
    ]


def _hover(point: PathPoint) -> str:
    return (
        f"penalty_weight {point.penalty_weight:.3g}, dependence_weight {point.dependence_weight:.3g}<br>"
        f"validation loss {point.validation_loss:.4f} ± {point.validation_se:.4f}, score {point.score:.3f}"
    )


def save_path(path: WeightPath, folder: str | os.PathLike[str]) -> None:
    """Writes `weight_path.json` and the chart as `weight_path.html`, a page that loads nothing."""
    path.save(folder)
    figure = path_figure(path, FigureWriter())
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Path of weights</title>'
        f"<script>{get_plotlyjs()}</script></head>\n<body>{figure}</body></html>\n"
    )
    with atomic_path(Path(folder) / WEIGHT_PATH_CHART) as temporary:
        temporary.write_text(page, encoding="utf8", newline="\n")

"""The charts of the page: plotly's bars of the groups and curves of the trainings, one colour a method."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.io
from markupsafe import Markup

from selfreg.evaluation.report_figures import clean, number, ordered, show, union

_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_COLOURS = {"plain": "#8b95a3", "selfreg": "#12a08a"}
# Visible on white as on near-black.
_OTHER_COLOURS = ["#d98a1f", "#8f6fe0", "#d65f86", "#4a90e2", "#8aa52d", "#b9674a", "#3fb0c9", "#a0527f"]
_MAX_POINTS = 400
_FEW = 10

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


def colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name and name not in _COLOURS]
    # The name "" is a training that is not of any method: the autoencoder's.
    return (
        _COLOURS
        | {"": _COLOURS["selfreg"]}
        | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
    )


def _figure_text(text: Any, limit: int | None = None) -> str:
    """Text for a figure: plotly reads a little HTML in it, and knows no `&quot;`."""
    text = " ".join(clean(str(text)).split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return html.escape(text, quote=False)


class FigureWriter:
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


def groups(
    groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    colours: Mapping[str, str],
    figures: FigureWriter,
) -> list[dict[str, Any]]:
    """A chart and a table for every eval set that has groups."""
    names = ordered(groups)
    blocks = []
    for eval_name in union(groups[name] for name in names):
        rows = {
            name: {
                (str(cell["label"]), str(cell["group"])): cell
                for cell in groups[name].get(eval_name) or ()
                if number(cell.get("accuracy")) is not None
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
    low, high = number(cell.get("low")), number(cell.get("high"))
    between = None if low is None or high is None else f"{show(low, 2)} to {show(high, 2)}"
    return show(float(cell["accuracy"]), 2), between


def _group_trace(
    name: str,
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
    keys: Sequence[tuple[str, str]],
    colour: str,
    shown: bool,
) -> dict[str, Any]:
    present = [(place, key, cells[key]) for place, key in enumerate(keys) if key in cells]
    accuracy = [float(cell["accuracy"]) for _, _, cell in present]
    low = [number(cell.get("low")) for _, _, cell in present]
    high = [number(cell.get("high")) for _, _, cell in present]
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


def curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str], figures: FigureWriter
) -> list[dict[str, Any]]:
    """One block for every kind of training, with a small chart for every quantity that it logged."""
    trainings: dict[str, dict[str, Sequence[Mapping[str, float]]]] = {}
    for name, history in curves.items():
        kind, _, series = name.partition(": ")
        trainings.setdefault(kind, {})[series] = history
    blocks = []
    for kind, histories in trainings.items():
        histories = {name: histories[name] for name in ordered(histories)}
        logged = union(row for history in histories.values() for row in history)
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
                | ({"dtick": 1, "exponentformat": "power"} if logarithmic else {})
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
    rows = [row for row in history if number(row.get(key)) is not None]
    if not rows:
        return None
    axis = next((axis for axis in ("step", "epoch") if all(number(row.get(axis)) is not None for row in rows)), None)
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

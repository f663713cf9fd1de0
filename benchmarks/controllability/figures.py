"""The Pareto pictures: test score against unintended use, and against the accuracy of the worst group."""

from pathlib import Path
from typing import Any

from selfreg.utils.files import atomic_path

_COLOURS = {"plain": "#8b95a3", "selfreg": "#12a08a", "selfreg_keywords": "#12a08a", "balanced": "#d98a1f"}
_OTHER = "#4a90e2"
_FLOOR = 1e-5
"""What a use of 0 is drawn at: the axis is logarithmic."""


def write_figures(results: dict[str, Any], folder: Path) -> None:
    """One page a data set, and plotly's source once beside them."""
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "plotly.min.js"
    if not source.exists():
        source.write_text(get_plotlyjs(), encoding="utf8")
    for name, part in results.items():
        if part["methods"]:
            page = to_html(picture(name, part), include_plotlyjs="plotly.min.js", full_html=True, validate=False)
            with atomic_path(folder / f"{name}.html") as temporary:
                temporary.write_text(page, encoding="utf8")


def picture(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """Both pictures of a data set side by side, as plotly takes them; the line joins what nothing else beats."""
    score, worst = part["score"], part["worst_eval"]
    points = [
        (method, own["test"][score]["mean"], own["test"]["unintended_use"], own[worst]["worst_group_accuracy"])
        for method, own in part["methods"].items()
    ]
    by_use = [(method, max(use["mean"], _FLOOR), y) for method, y, use, _ in points if use is not None]
    by_group = [(method, group["mean"], y) for method, y, _, group in points if group is not None]
    traces = [*_traces(by_use, "x", "y", less=True), *_traces(by_group, "x2", "y2", less=False)]
    title = {"text": f"{name}: {part['seeds']} seeds"}
    layout = {
        "title": title,
        "showlegend": False,
        "xaxis": {"type": "log", "domain": [0, 0.46], "title": {"text": "unintended use, test (less is better)"}},
        "yaxis": {"title": {"text": f"{score}, test"}},
        "xaxis2": {"domain": [0.54, 1], "title": {"text": f"accuracy of the worst group, {worst} (more is better)"}},
        "yaxis2": {"anchor": "x2", "title": {"text": f"{score}, test"}},
    }
    return {"data": traces, "layout": layout}


def front(points: list[tuple[str, float, float]], *, less: bool) -> list[tuple[str, float, float]]:
    """Those that no other point beats in both: less (or more) x, more y; by x."""
    sign = 1 if less else -1

    def beaten(point: tuple[str, float, float]) -> bool:
        return any(sign * x <= sign * point[1] and y >= point[2] and (x, y) != point[1:] for _, x, y in points)

    return sorted((point for point in points if not beaten(point)), key=lambda point: point[1])


def _traces(points: list[tuple[str, float, float]], x: str, y: str, *, less: bool) -> list[dict[str, Any]]:
    best = front(points, less=less)
    axes = {"xaxis": x, "yaxis": y}
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [point[1] for point in best],
        "y": [point[2] for point in best],
        "line": {"color": "#c8ced6", "shape": "hv" if less else "vh"},
        "hoverinfo": "skip",
        **axes,
    }
    dots = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [point[1] for point in points],
        "y": [point[2] for point in points],
        "text": [point[0] for point in points],
        "textposition": "top center",
        "marker": {"size": 9, "color": [_COLOURS.get(point[0], _OTHER) for point in points]},
        **axes,
    }
    return [line, dots]

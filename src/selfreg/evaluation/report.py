"""One run as one HTML file: what changed, for which groups, through which features. It needs no network to be read."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from selfreg.classifier.path import WeightPath
from selfreg.evaluation.path_chart import path_figure
from selfreg.evaluation.report_charts import FigureWriter, colours, curves, groups
from selfreg.evaluation.report_figures import METHODS, caution, clean, headline, ordered, sae, show, tables, union
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
        decided_by (`str`, *optional*): who gave the verdict.
    """

    feature: int
    reason: str
    explanation: str | None
    verdict: str | None
    density: float
    max_activation: float
    spans: Sequence[Span]
    decided_by: str | None = None


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
        weight_path (`WeightPath`, *optional*): how the weights of the two terms were chosen, where they were.
    """

    title: str
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, list[dict[str, float]]]
    features: list[ReportFeature]
    versions: dict[str, str]
    created: str
    weight_path: WeightPath | None = None


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Writes the page of `data` to `path`; on any error what was at `path` before is still there, whole."""
    page = render_report(data)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf8", newline="\n")


def render_report(data: ReportData) -> str:
    """The page of `data`: one string of HTML that loads nothing. The same data gives the same string."""
    methods: dict[str, dict[str, dict[str, Any]]] = data.metrics.get("methods") or {}
    cells: dict[str, dict[str, list[dict[str, Any]]]] = data.metrics.get("groups") or {}
    # A method has one colour in the whole page.
    colour_of = colours(union([methods, cells, (name.partition(": ")[2] for name in data.curves)]))
    writer = FigureWriter()
    sentences, tiles = headline(methods)
    eval_tables = tables(methods)
    page: dict[str, Any] = {
        "data": data,
        "headline": sentences,
        "caution": caution(sentences[0], cells) if sentences else None,
        "tiles": tiles,
        "tables": eval_tables,
        "nulls": any(cell.value is None for table in eval_tables for row in table["rows"].values() for cell in row),
        "compared": "plain" in methods and "selfreg" in methods,
        "method_notes": {name: METHODS[name] for name in ordered(methods) if name in METHODS},
        "groups": groups(cells, colour_of, writer),
        "weight_path": path_figure(data.weight_path, writer) if data.weight_path is not None else None,
        "curves": curves(data.curves, colour_of, writer),
        "sae": sae(data.metrics.get("sae") or {}),
        "counts": data.metrics.get("features") or {},
        "backbone": _backbone(data.recipe),
        "recipe": yaml.safe_dump(data.recipe, sort_keys=False, allow_unicode=True, width=100),
    }
    plotly_js = Markup(get_plotlyjs()) if writer.count else None
    return _environment().get_template("report.html.j2").render(page, plotly_js=plotly_js)


def _backbone(recipe: Mapping[str, Any]) -> str | None:
    backbone = recipe.get("backbone")
    model = backbone.get("model") if isinstance(backbone, Mapping) else None
    return str(model) if model else None


# ---------------------------------------------------------------------------------------------------------------------
# The template
# ---------------------------------------------------------------------------------------------------------------------


def _finalize(value: Any) -> Any:
    """Applied to whatever the template prints. Markup is the page's own."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _readable(text: str, peak: bool = False) -> Markup:
    """A piece of a span, escaped, with line breaks and tabs (in a peak of nothing else: blanks too) made visible."""
    text = clean(text).replace("\r\n", "\n").replace("\r", "\n")
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
    environment.filters |= {"readable": _readable, "share": _share, "date": _date, "shown": show}
    return environment

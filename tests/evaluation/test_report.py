import html.parser
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfreg.evaluation import report_charts, report_figures
from selfreg.evaluation.report import ReportData, ReportFeature, render_report, write_report
from selfreg.features.spans import Span

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [SCRIPT, "</script>", "{{7*7}}", "\"' onmouseover=alert(1) x='", "<!--", "%{x}<b>", "</style></title></pre>"]
INLINE = {"q", "b", "mark", "i", "a", "strong", "code"}
VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its elements, its scripts, and its text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag not in INLINE:
            self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]

    @property
    def figures(self) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Traces and layout of every figure, as the browser reads them."""
        found = []
        for script in self.scripts:
            call = re.search(r'Plotly\.newPlot\(\s*"figure-\d+",\s*', script)
            if call and "window.PLOTLYENV" in script[:200]:
                traces, end = json.JSONDecoder().raw_decode(script, call.end())
                layout, _ = json.JSONDecoder().raw_decode(script, re.compile(r",\s*").match(script, end).end())
                found.append((traces, layout))
        return found


def scores(accuracy: float, worst: float | None, **others: float | None) -> dict[str, float | None]:
    names = ["f1", "auc", "group_gap", "leakage", "unintended_use", "unintended_dependence"]
    return {"accuracy": accuracy, "worst_group_accuracy": worst} | dict.fromkeys(names) | others


def cells(accuracies: list[float], n: int = 52) -> list[dict[str, Any]]:
    labels = ["heart attack", "migraine", "asthma", "kidney stones"]
    keys = [(label, group) for label in labels for group in ("women", "men")]
    return [
        {
            "label": label,
            "group": group,
            "n": n - 5 * (i % 3),
            "accuracy": a,
            "low": a - 0.08,
            "high": min(1, a + 0.05),
        }
        for i, ((label, group), a) in enumerate(zip(keys, accuracies, strict=False))
    ]


def history(steps: int, **quantities: tuple[float, float]) -> list[dict[str, float]]:
    """Curves that go from a first value to a last one."""
    rows = []
    for i in range(steps):
        decay = math.exp(-5 * i / steps) * (1 + 0.06 * math.sin(9 * i))
        parts = {name: last + (first - last) * decay for name, (first, last) in quantities.items()}
        rows.append({"step": 10.0 * (i + 1), "epoch": i / steps, "learning_rate": 1e-3, "grad_norm": 1.0} | parts)
    return [*rows, {"step": 10.0 * steps, "epoch": 1.0, "train_runtime": 12.5, "train_loss": 0.4}]


def example() -> ReportData:
    methods = {
        "selfreg": {
            "test": scores(0.975, 0.952, f1=0.974, auc=0.998, group_gap=0.041, leakage=0.08, unintended_use=0.0,
                           unintended_dependence=0.012),
            "shifted": scores(0.963, 0.938, f1=0.962, auc=0.997, group_gap=0.052, leakage=0.09, unintended_use=0.0,
                              unintended_dependence=0.014),
        },
        "plain": {
            "test": scores(0.955, 0.931, f1=0.953, auc=0.996, group_gap=0.31, leakage=0.61, unintended_use=0.253,
                           unintended_dependence=0.481),
            "shifted": scores(0.777, 0.711, f1=0.774, auc=0.941, group_gap=0.27, leakage=0.63, unintended_use=0.249,
                              unintended_dependence=0.475),
        },
        "l2": {
            "test": scores(0.965, 0.943, f1=0.964, auc=0.997, group_gap=0.29, leakage=0.6, unintended_use=0.24,
                           unintended_dependence=0.47),
            "shifted": scores(0.770, 0.711, f1=0.768, auc=0.94, group_gap=0.28, leakage=0.62, unintended_use=0.238,
                              unintended_dependence=0.468),
        },
        "leace": {
            "test": scores(0.913, 0.884, f1=0.911, auc=0.985, group_gap=0.12, leakage=0.31, unintended_use=0.07,
                           unintended_dependence=0.21),
            "shifted": scores(0.83, 0.753, f1=0.828, auc=0.962, group_gap=0.14, leakage=0.3, unintended_use=0.068,
                              unintended_dependence=0.207),
        },
    }  # fmt: skip
    groups = {
        "selfreg": {"shifted": cells([0.96, 0.97, 0.938, 0.97, 0.98, 0.95, 0.96, 0.972])},
        "plain": {"shifted": cells([0.72, 0.86, 0.84, 0.711, 0.88, 0.74, 0.73, 0.85])},
        "l2": {"shifted": cells([0.73, 0.85, 0.83, 0.711, 0.87, 0.73, 0.72, 0.84])},
        "leace": {"shifted": cells([0.80, 0.85, 0.87, 0.753, 0.86, 0.82, 0.81, 0.86])},
    }
    spans = [
        Span(3, 11, 9.8, "A 54-year-old patient came in this morning. ", "She", " reports that the pain began while"),
        Span(
            17,
            8,
            9.1,
            "On the phone, the daughter said that ",
            "her",
            " mother had been short of breath since Sunday.",
        ),
        Span(40, 4, 7.7, "Mrs. Alvarez,\n\n\ta retired teacher; ", "she", " lives alone and"),
        Span(51, 9, 6.0, "no fever. ", "Her", " husband drove"),
        Span(80, 2, 3.9, "The ", "woman", " describes flashes of light"),
    ]
    explanations = ["words for a woman: she, her", "male pronouns and titles", None, "family members", "the greeting"]
    features = [
        ReportFeature(
            feature=37 + 411 * i,
            reason=f"tells gender within a diagnosis: AUC {0.99 - 0.02 * i:.2f}, q = {10.0 ** (i - 12):.0e}",
            explanation=explanations[i % 5],
            verdict=["No", "No", None, "Maybe", "No"][i % 5],
            density=0.031 / (i + 1) ** 2,
            max_activation=9.8,
            spans=[spans[(i + j) % 5] for j in range(5)] if i != 4 else [],
        )
        for i in range(8)
    ]
    sae = {"loss": (0.9, 0.07), "fvu": (0.88, 0.062), "l0": (200.0, 32.0), "dead_fraction": (0.0, 0.02)}
    classifier = {"loss": (1.5, 0.31), "task_loss": (1.386, 0.11)}
    return ReportData(
        title="Diagnosis from clinical notes",
        recipe={
            "output": "runs/demo",
            "seed": 0,
            "backbone": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "layer": 15, "pooling": "mean"},
            "features": {"attribute": "gender", "max_features": 100, "rubric": None},
            "classifier": {"penalty_weight": 1.0, "dependence_weight": 10.0},
            "baselines": ["plain", "l2", "leace"],
        },
        metrics={
            "selfreg_version": "0.1.0",
            "recipe_sha256": "4f2a9c" * 10 + "beef",
            "sae": {
                "fvu": 0.0618,
                "l0": 32.0,
                "dead_fraction": 0.0213,
                "before": {"fvu": 0.0794, "l0": 32.0, "dead_fraction": 0.187},
                "after": {"fvu": 0.0618, "l0": 32.0, "dead_fraction": 0.0213},
            },
            "features": {"total": 4608, "explained": 4102, "unintended": 100},
            "methods": methods,
            "groups": groups,
        },
        curves={
            "SAE pre-training": history(60, **sae),
            "SAE fine-tuning": history(20, fvu=(0.079, 0.062), dead_fraction=(0.187, 0.02), loss=(0.09, 0.07)),
            "classifier: selfreg": history(50, **classifier, similarity=(0.4, 2e-5), dependence=(0.05, 1e-4)),
            "classifier: plain": history(50, **classifier, eval_loss=(1.3, 0.25)),
            "classifier: l2": history(50, loss=(1.5, 0.2)),
        },
        features=features,
        versions={"selfreg": "0.1.0", "torch": "2.13.0", "transformers": "5.10.1"},
        created="2025-06-11T14:02:33+00:00",
    )


EMPTY = ReportData(title="Nothing", recipe={}, metrics={}, curves={}, features=[], versions={}, created="2025-06-11")


def loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base", "form"}
        for name in ("src", "srcset", "data", "action", "xlink:href", "background"):
            assert name not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    policy = [meta["content"] for meta in page.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1
    assert "default-src 'none'" in policy[0]


def test_page_is_whole_and_self_contained() -> None:
    source = render_report(example())
    page = Page(source)
    assert page.open == []  # every element is closed, in order
    loads_nothing(page)
    assert source.lstrip().lower().startswith("<!doctype html>")
    assert "url(" not in source[: source.index("</style>")]
    # plotly.js once, one script for every figure, one for the filter and for printing.
    figures = page.figures
    assert len(page.scripts) == 1 + len(figures) + 1
    assert sum("* plotly.js v" in script for script in page.scripts) == 1
    assert len(page.classes("plotly-graph-div")) == len(figures)
    # 1 group chart; 4 quantities; 3 quantities; 4 quantities of three classifiers.
    assert len(figures) == 1 + 4 + 3 + 4
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for link in page.tags("a"):
        assert (link["href"] or "").removeprefix("#") in identifiers
    assert len(page.tags("h1")) == 1
    assert len(page.tags("caption")) == len(page.tags("table"))
    assert render_report(example()) == source


def test_headline_is_computed() -> None:
    # Where plain does worst there lies the problem; where it does best a cost would show.
    text = Page(render_report(example())).text
    assert "On shifted, worst-group accuracy rose from 0.71 (plain) to 0.94 (selfreg)." in text
    assert "On test, accuracy rose from 0.96 (plain) to 0.98 (selfreg)." in text
    changed = example()
    changed.metrics["methods"]["plain"]["test"]["worst_group_accuracy"] = 0.62
    text = Page(render_report(changed)).text
    assert "On test, worst-group accuracy rose from 0.62 (plain) to 0.95 (selfreg)." in text
    assert "On shifted, worst-group" not in text


@pytest.mark.parametrize(
    ("before", "after", "said", "effect"),
    [
        (0.94, 0.71, "fell from 0.94 (plain) to 0.71 (selfreg).", "bad"),
        (0.941, 0.939, "stayed at 0.94 (plain and selfreg).", None),
        (0.5, 1.0, "rose from 0.50 (plain) to 1.00 (selfreg).", "good"),
    ],
)
def test_headline_says_also_what_got_worse(before: float, after: float, said: str, effect: str | None) -> None:
    methods = {"selfreg": {"t": scores(0.9, after)}, "plain": {"t": scores(0.9, before)}}
    page = Page(render_report(replace(EMPTY, metrics={"methods": methods})))
    assert f"On t, worst-group accuracy {said}" in page.text
    assert "On t, accuracy stayed at 0.90" in page.text
    colours = [attributes["class"] for tag, attributes in page.elements if tag == "b" and attributes.get("class")]
    assert colours == ([effect] if effect else [])


@pytest.mark.parametrize(("n", "said"), [(23, True), (2300, False), (9, False)])
def test_headline_owns_up_to_chance(n: int, said: bool) -> None:
    def cells(accuracy: float) -> list[dict[str, Any]]:
        spread = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
        worst = {"accuracy": accuracy, "n": n, "low": accuracy - spread, "high": accuracy + spread}
        return [
            {"label": "a", "group": "x", **worst},
            {"label": "b", "group": "x", "accuracy": 0.95, "n": 900, "low": 0.93, "high": 0.96},
        ]

    metrics = {
        "methods": {"selfreg": {"t": scores(0.9, 0.8)}, "plain": {"t": scores(0.9, 0.7)}},
        "groups": {"selfreg": {"t": cells(0.8)}, "plain": {"t": cells(0.7)}},
    }
    text = Page(render_report(replace(EMPTY, metrics=metrics))).text
    assert (f"Those are cells of {n} and {n} texts, whose 95 % intervals overlap" in text) == said


def test_lower_is_better_where_it_is() -> None:
    methods = {
        "selfreg": {"t": scores(0.9, 0.8, leakage=0.1, unintended_use=0.0)},
        "plain": {"t": scores(0.9, 0.7, leakage=0.6, unintended_use=0.3)},
    }
    source = render_report(replace(EMPTY, metrics={"methods": methods}))
    strong = re.findall(r'<strong title="best of this column">([^<]*)</strong>', source)
    assert strong == ["0.800", "0.100", "0.000"]  # accuracy is a tie: no best
    assert [c["class"] for c in Page(source).classes("delta")] == [
        "delta same", "delta good", "delta good", "delta good",
    ]  # fmt: skip
    assert "−0.500" in source
    assert "+0.100" in source
    assert ">same</span>" in source
    assert "±" not in source.partition("plotly")[0]


def test_tables_hold_every_figure_and_say_what_it_means() -> None:
    data = example()
    source = render_report(data)
    page = Page(source)
    assert page.text.count("Tested on") == 2
    for evals in data.metrics["methods"].values():
        for values in evals.values():
            for value in values.values():
                assert f"{value:.3f}" in source
    header = [attributes for attributes in page.tags("th") if attributes.get("title")]
    assert {attributes["title"] for attributes in header} >= {
        figure.meaning
        for key, figure in report_figures._FIGURES.items()
        if key in data.metrics["methods"]["plain"]["test"]
    }
    assert "higher is better" in page.text
    assert "lower is better" in page.text
    # plain is before, selfreg is after, whatever the order in the metrics.
    rows = re.findall(r'<th scope="row"[^>]*>([a-z0-9]+)</th>', source)
    assert rows[:4] == ["plain", "selfreg", "l2", "leace"]


def test_null_is_a_dash_that_says_why() -> None:
    methods = {"plain": {"t": scores(0.5, None)}}
    page = Page(render_report(replace(EMPTY, metrics={"methods": methods})))
    dashes = page.classes("none")
    assert [attributes["title"] for attributes in dashes] == ["does not apply"] * 7
    assert "None" not in page.text
    assert "On t, accuracy of plain is 0.50." in page.text
    not_finite = {"plain": {"t": scores(float("nan"), 0.25)}}
    page = Page(render_report(replace(EMPTY, metrics={"methods": not_finite})))
    assert "nan" not in page.text.lower().split()
    assert "worst-group accuracy of plain is 0.25." in page.text


def test_unknown_figures_and_methods_are_shown_without_a_best() -> None:
    methods = {
        "plain": {"t": {"accuracy": 0.5, "per_label": {"a": 1.0}, "calls_made": 12.0}},
        "mine": {"t": {"accuracy": 0.6, "calls_made": 1234.5}, "other": {"accuracy": 1}},
    }
    source = render_report(replace(EMPTY, metrics={"methods": methods}))
    assert "calls made" in source
    assert "1,234.500" in source
    assert "per" + "_label" not in source
    assert re.findall(r"<strong[^>]*>([^<]*)", source) == ["0.600"]


def test_group_chart() -> None:
    data = example()
    groups = data.metrics["groups"]
    groups["plain"]["shifted"] = [cell for cell in groups["plain"]["shifted"] if cell["label"] != "asthma"]
    for evals in groups.values():
        evals["shifted"][0]["n"] = 7
    groups["selfreg"]["shifted"][0] |= {"low": None, "high": None}
    page = Page(render_report(data))
    traces, layout = page.figures[0]
    assert [trace["name"] for trace in traces] == ["plain", "selfreg", "l2", "leace"]
    assert [len(trace["x"]) for trace in traces] == [6, 8, 8, 8]
    plain, selfreg = traces[0], traces[1]
    assert plain["y"] == [0, 1, 2, 3, 4, 5]
    assert selfreg["y"] == list(range(8))
    assert selfreg["x"][2] == 0.938
    assert selfreg["error_x"]["array"][2] == pytest.approx(0.05)
    assert selfreg["error_x"]["arrayminus"][2] == pytest.approx(0.08)
    assert selfreg["error_x"]["array"][0] == selfreg["error_x"]["arrayminus"][0] == 0
    assert selfreg["marker"]["opacity"][:2] == [0.45, 1]
    assert layout["yaxis"]["tickvals"] == list(range(8))
    assert "Pale bars" in page.text
    assert "heart attack" in layout["yaxis"]["ticktext"][0]
    label = next(a["aria-label"] for _, a in page.elements if (a.get("aria-label") or "").startswith("Bar chart"))
    assert label is not None
    assert "selfreg is lowest for migraine, women: 0.94." in label
    assert "0.86 to 0.99" in page.text  # in the table


def test_many_methods_are_in_the_legend_only() -> None:
    data = example()
    data.metrics["groups"] |= {f"m{i}": data.metrics["groups"]["l2"] for i in range(4)}
    page = Page(render_report(data))
    assert [trace["visible"] for trace in page.figures[0][0]] == [True, True] + ["legendonly"] * 6
    assert "6 more methods are in the legend" in page.text


def test_curves() -> None:
    long = [{"step": float(i), "loss": 1e-6 if i else 1.0, "epoch": i / 5000} for i in range(5000)]
    curves = {
        "SAE pre-training": long,
        "classifier: plain": [{"epoch": 1.0, "loss": 0.5}, {"epoch": 2.0, "eval_loss": 0.7, "eval_runtime": 3.0}],
        "classifier: selfreg": [{"loss": float("nan")}, {"loss": 0.25, "odd_thing": -1.0}],
        "nothing": [],
        "nothing to see: a": [{"step": 1.0, "learning_rate": 0.1}],
    }
    page = Page(source := render_report(replace(EMPTY, curves=curves)))
    (sae, sae_layout), (loss, loss_layout), (odd, _) = page.figures
    assert 300 < len(sae[0]["x"]) <= 401
    assert sae[0]["x"][0] == 0
    assert sae[0]["x"][-1] == 4999
    assert sae_layout["yaxis"]["type"] == "log"
    assert loss_layout["yaxis"]["type"] == "linear"
    assert [trace["name"] for trace in loss] == ["plain", "plain on held-out texts", "selfreg"]
    assert [trace["line"]["dash"] for trace in loss] == ["solid", "dot", "solid"]
    assert loss[1]["x"] == [2.0]
    assert loss[2]["y"] == [0.25]
    assert odd[0]["y"] == [-1.0]
    assert "Odd thing" in page.text
    assert [title for title in ("nothing", "nothing to see") if f">{title}</h3>" in source] == []
    assert ">SAE pre-training</h3>" in source
    assert "Loss, log scale" in page.text


def test_sae_before_and_after() -> None:
    data = example()
    text = Page(render_report(data)).text
    assert "Before fine-tuning After fine-tuning" in text
    assert "On texts not trained on" not in text  # the same as after: not said twice
    assert "18.7 % 2.1 %" in text
    assert "0.079 0.062" in text
    data.metrics["sae"] = {"fvu": 0.05, "l0": 31.94, "dead_fraction": None}
    text = Page(render_report(data)).text
    assert "On texts not trained on" in text
    assert "31.9" in text
    assert "Share of the features that no token activates" not in text
    data.metrics["sae"] = {"fvu": None, "l0": None, "dead_fraction": None}
    assert "How good the autoencoder is" not in Page(render_report(data)).text


def test_features_and_spans() -> None:
    page = Page(source := render_report(example()))
    cards = page.classes("feature")
    assert len(cards) == 8
    assert len(page.tags("mark")) == 7 * 5
    assert "#37 words for a woman: she, her" in page.text
    # What was not asked for did not fail.
    assert "not explained" not in page.text
    assert "not judged" not in page.text
    assert "legitimate reason? Maybe" in page.text
    assert "on 3.1 % of tokens" in page.text
    assert "2 more" in page.text
    assert "No passage sets it off." in page.text
    assert 'Mrs. Alvarez,<i class="ws">↵</i> <i class="ws">↵</i> <i class="ws">⇥</i> a retired' in source
    assert "8 of 8" in page.text


@pytest.mark.parametrize(
    ("peak", "shown"), [(" ", "␣"), ("", "∅"), ("\n", '<i class="ws">↵</i> '), ("\x00", "\ufffd")]
)
def test_a_peak_is_always_visible(peak: str, shown: str) -> None:
    feature = ReportFeature(1, "r", None, None, 0.0, 0.0, [Span(0, 0, 0.0, "a", peak, "b\ud800")])
    source = render_report(replace(EMPTY, features=[feature]))
    assert re.search(r"<mark[^>]*>(.*?)</mark>", source).group(1) == shown
    source.encode("utf8")


def test_density_of_rare_features() -> None:
    feature = ReportFeature(1, "r", None, None, 1e-6, 1.0, [])
    features = [feature, replace(feature, density=0.0), replace(feature, density=0.004)]
    text = Page(render_report(replace(EMPTY, features=features))).text
    assert "on under 0.01 % of tokens" in text
    assert "on 0.00 % of tokens" in text
    assert "on 0.40 % of tokens" in text


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text_is_only_text(evil: str) -> None:
    cell = {"label": evil, "group": evil, "n": 20, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    feature = ReportFeature(1, evil, evil, evil, 0.1, 1.0, [Span(0, 0, 1.0, evil, evil, evil)] * 4)
    values = {"accuracy": 0.5, "worst_group_accuracy": 0.25, evil: 0.125}

    def page_with(text: str) -> Page:
        def put(value: Any) -> Any:
            if isinstance(value, dict):
                return {put(key): put(item) for key, item in value.items()}
            if isinstance(value, list):
                return [put(item) for item in value]
            return value.replace(evil, text) if isinstance(value, str) else value

        spans = [Span(0, 0, 1.0, text, text, text)] * 4
        return Page(
            render_report(
                ReportData(
                    title=text,
                    recipe=put({evil: evil, "list": [evil], "backbone": {"model": evil}}),
                    metrics=put(
                        {
                            "selfreg_version": evil,
                            "recipe_sha256": evil,
                            "sae": {evil: {"fvu": 0.5, evil: 0.25}},
                            "features": {"total": 5, "explained": 4, "unintended": 1},
                            "methods": {name: {evil: values} for name in ("plain", "selfreg", evil)},
                            "groups": {name: {evil: [cell]} for name in ("plain", "selfreg", evil)},
                        }
                    ),
                    curves=put(
                        {evil: [{"step": 1.0, evil: 1.0}], f"classifier: {evil}": [{"step": 1.0, "loss": 1.0}]}
                    ),
                    features=[replace(feature, reason=text, explanation=text, verdict=text, spans=spans)],
                    versions=put({evil: evil}),
                    created=text,
                )
            )
        )

    page, harmless = page_with(evil), page_with("plain text")
    assert page.open == []
    loads_nothing(page)
    # The same elements as with a harmless text: nothing was opened, nothing was closed.
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [sorted(a) for _, a in harmless.elements]
    assert len(page.scripts) == 1 + len(page.figures) + 1
    assert not [script for script in page.scripts if "alert" in script and "newPlot" not in script]
    assert "49" not in page.text
    # It is there to read, as it was written.
    title = "".join(page.pieces)
    assert title.count(evil) >= 20
    # Inside figures plotly reads a little HTML, so there it is escaped once more; and no figure uses a template.
    traces, _ = page.figures[0]
    assert [trace["name"] for trace in traces][2] == report_charts._figure_text(evil)
    assert "<script" not in json.dumps(page.figures)
    assert not re.search(r"<(?!/?b>|br>)", json.dumps(page.figures))
    assert "template" not in json.dumps(page.figures)


def test_figure_text() -> None:
    assert report_charts._figure_text('a <b>\n & \t"c"') == 'a &lt;b&gt; &amp; "c"'
    assert report_charts._figure_text("abcdef", limit=4) == "abc…"
    assert report_charts._figure_text("ab<<<<", limit=4) == "ab&lt;…"


def test_empty_run() -> None:
    page = Page(render_report(EMPTY))
    assert page.open == []
    assert page.scripts == []  # no figure, no plotly.js; no feature, no filter
    assert page.tags("table") == []
    assert "This run has no figures of a classifier yet." in page.text
    assert "No feature was marked as unintended" in page.text
    loads_nothing(page)
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert all((link["href"] or "")[1:] in identifiers for link in page.tags("a"))


def test_one_method_and_no_groups() -> None:
    methods = {"selfreg": {"test": scores(0.91, None, f1=0.9)}}
    metrics = {"methods": methods, "groups": {"selfreg": {"test": []}}, "features": {"total": 1, "unintended": 1}}
    source = render_report(replace(EMPTY, metrics=metrics))
    page = Page(source)
    assert "On test, accuracy of selfreg is 0.91." in page.text
    assert "<strong" not in source  # nothing to be better than
    assert "Group by group" not in page.text
    assert page.classes("delta") == []
    assert "Here, 1 was marked as such" in page.text
    # Nothing is said about a comparison that there is not.
    for words in ("compared with", "Before and after", "change from plain", "is bold", "listed below"):
        assert words not in page.text
    assert page.classes("tiles") == []  # one number, and the headline has said it


def test_recipe_and_versions() -> None:
    data = example()
    page = Page(render_report(data))
    text = "".join(page.pieces)
    start = text.index("output: runs/demo")
    assert yaml.safe_load(text[start : text.index("- leace", start) + len("- leace")]) == data.recipe
    assert "torch 2.13.0" in page.text
    assert "11 June 2025, 14:02 UTC" in page.text


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(path, EMPTY)
    assert path.read_text(encoding="utf8") == render_report(EMPTY)
    before = path.read_bytes()

    with pytest.raises(yaml.YAMLError):
        write_report(path, replace(EMPTY, recipe={"bad": object()}))
    assert path.read_bytes() == before

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        self.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"could not write .*report\.html"):
        write_report(path, replace(EMPTY, title="new"))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

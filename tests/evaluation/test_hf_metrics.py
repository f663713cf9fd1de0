import doctest
import json
import os
import re
import runpy
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
from evaluate.loading import get_imports
from huggingface_hub import SpaceCard

from selfreg.evaluation.hf_metrics import GroupGap, Leakage, UnintendedDependence, UnintendedUse, WorstGroupAccuracy
from selfreg.evaluation.metrics import group_gap, leakage, worst_group_accuracy
from selfreg.evaluation.reliance import unintended_dependence, unintended_use

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "metrics"

rng = np.random.default_rng(0)
N = 90
LABELS = rng.integers(0, 2, N)
GROUPS: list[str | int | None] = [None, *rng.choice(np.array(["women", "men", 7], dtype=object), N - 1).tolist()]
IDS = np.where(rng.random(N) < 0.8, LABELS, 1 - LABELS)
POOLED = rng.normal(size=(N, 5))
WEIGHT = rng.normal(size=(2, 5))
LOGITS = POOLED @ WEIGHT.T
DIRECTIONS = rng.normal(size=(2, 5))
ACTIVATIONS = np.maximum(POOLED @ DIRECTIONS.T, 0)

GROUPED = {"predictions": IDS, "references": LABELS, "groups": GROUPS}
CASES: list[tuple[type[evaluate.Metric], dict[str, Any], dict[str, Any], float | None]] = [
    (WorstGroupAccuracy, GROUPED, {}, worst_group_accuracy(IDS, LABELS, GROUPS)),
    (GroupGap, GROUPED, {}, group_gap(IDS, LABELS, GROUPS)),
    (Leakage, GROUPED | {"predictions": LOGITS}, {}, leakage(LOGITS, LABELS, GROUPS)),
    (
        UnintendedUse,
        {"pooled": POOLED},
        {"weight": WEIGHT, "directions": DIRECTIONS},
        unintended_use(POOLED, WEIGHT, DIRECTIONS),
    ),
    (
        UnintendedDependence,
        {"predictions": LOGITS, "references": LABELS, "activations": ACTIVATIONS},
        {"folds": 7, "seed": 3},
        unintended_dependence(LOGITS, LABELS, ACTIVATIONS, folds=7, seed=3),
    ),
]
KINDS = [case[0] for case in CASES]
FOLDERS = [
    METRICS / name
    for name in ("worst_group_accuracy", "group_gap", "leakage", "unintended_use", "unintended_dependence")
]


class Accuracy(evaluate.Metric):
    """A metric from elsewhere, which knows no groups; evaluate's own are on the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(columns))

    def _compute(self, predictions: list[int], references: list[int], normalize: bool = True) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    return tmp_path / "metrics"


def batches(columns: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return [{name: column[i : i + size] for name, column in columns.items()} for i in range(0, N, size)]


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "columns", "options", "value"), CASES)
def test_value_is_the_functions(kind: Any, columns: Any, options: Any, value: float) -> None:
    metric = kind()
    expected = {metric.name: value}
    assert value > 0
    assert metric.compute(**columns, **options) == expected
    for size in (17, 1):
        for batch in batches(columns, size):
            metric.add_batch(**batch)
        assert metric.compute(**options) == expected
    assert kind(keep_in_memory=True).compute(**columns, **options) == expected


def test_added_one_by_one() -> None:
    metric = Leakage()
    for row, label, group in zip(LOGITS, LABELS, GROUPS, strict=True):
        metric.add(prediction=row, reference=label, groups=group)
    assert metric.compute() == {"leakage": leakage(LOGITS, LABELS, GROUPS)}


def test_tensors() -> None:
    sides = torch.as_tensor(np.arange(N) % 2)
    metric = WorstGroupAccuracy()
    metric.add_batch(predictions=torch.as_tensor(IDS), references=torch.as_tensor(LABELS), groups=sides)
    assert metric.compute() == {"worst_group_accuracy": worst_group_accuracy(IDS, LABELS, sides.numpy())}


def test_names_and_numbers_are_different_groups() -> None:
    groups: list[str | int] = [1] * 10 + ["1"] * 10
    right = [1] * 10 + [0] * 10
    assert WorstGroupAccuracy().compute(predictions=right, references=[1] * 20, groups=groups) == {
        "worst_group_accuracy": 0.0
    }


def test_none_where_it_does_not_apply() -> None:
    batch = {"predictions": [0, 1], "references": [0, 1], "groups": [None, None]}
    assert WorstGroupAccuracy().compute(**batch) == {"worst_group_accuracy": None}
    assert GroupGap().compute(**batch) == {"group_gap": None}


def test_no_features() -> None:
    nothing = np.zeros((N, 0))
    result = UnintendedDependence().compute(predictions=LOGITS, references=LABELS, activations=nothing)
    assert result == {"unintended_dependence": 0.0}


# --- evaluate.combine ------------------------------------------------------------------------------------------------


def test_combined_on_class_ids() -> None:
    combined = evaluate.combine([WorstGroupAccuracy(), GroupGap()])
    expected = {"worst_group_accuracy": CASES[0][3], "group_gap": CASES[1][3]}
    assert combined.compute(**GROUPED) == expected
    for batch in batches(GROUPED, 20):
        combined.add_batch(**batch)
    assert combined.compute() == expected
    for prediction, label, group in zip(IDS, LABELS, GROUPS, strict=True):
        combined.add(prediction=prediction, reference=label, groups=group)
    assert combined.compute() == expected


def test_combined_with_a_metric_without_groups() -> None:
    combined = evaluate.combine([Accuracy(), WorstGroupAccuracy()])
    combined.add_batch(**GROUPED)
    assert combined.compute() == {"accuracy": np.mean(IDS == LABELS), "worst_group_accuracy": CASES[0][3]}


def test_combined_on_logits() -> None:
    combined = evaluate.combine([Leakage(), UnintendedDependence(), UnintendedUse()])
    columns = CASES[2][1] | CASES[3][1] | CASES[4][1]
    options = CASES[3][2] | CASES[4][2]
    expected = {"leakage": CASES[2][3], "unintended_dependence": CASES[4][3], "unintended_use": CASES[3][3]}
    assert combined.compute(**columns, **options) == expected
    combined.add_batch(**columns)
    assert combined.compute(**options) == expected


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": IDS * 0.9}, "predictions must be integers, got float64"),
        ({"references": [None] * N}, "references must be integers"),
        ({"groups": None}, "worst_group_accuracy needs groups"),
        ({"groups": "women"}, "groups must have one entry a text"),
        ({"groups": [0.5] * N}, "groups must hold names or whole numbers"),
        ({"groups": GROUPS[:3]}, r"number of predictions \(90\) and groups \(3\)"),
        ({"predictions": LOGITS}, "predictions must be integers|expected format"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    metric = WorstGroupAccuracy()
    with pytest.raises(ValueError, match=message):
        metric.compute(**GROUPED | change)
    assert metric.compute(**GROUPED) == {"worst_group_accuracy": CASES[0][3]}


def test_refuses_what_nobody_knows() -> None:
    with pytest.raises(TypeError, match="group_gap does not know average"):
        GroupGap().compute(**GROUPED, average="macro")
    with pytest.raises(ValueError, match="group'"):
        GroupGap().add_batch(**GROUPED, group=GROUPS)


def test_needs_the_weights() -> None:
    with pytest.raises(TypeError, match="'weight' and 'directions'"):
        UnintendedUse().compute(pooled=POOLED)


def test_class_ids_are_no_logits() -> None:
    with pytest.raises(ValueError, match="expected format"):
        Leakage().compute(**GROUPED)


# --- Several at a time -----------------------------------------------------------------------------------------------


def test_two_of_a_kind_do_not_mix() -> None:
    one, other = WorstGroupAccuracy(), WorstGroupAccuracy()
    right = GROUPED | {"predictions": LABELS}
    for wrong_batch, right_batch in zip(batches(GROUPED, 30), batches(right, 30), strict=True):
        one.add_batch(**wrong_batch)
        other.add_batch(**right_batch)
    assert other.compute() == {"worst_group_accuracy": 1.0}
    assert one.compute() == {"worst_group_accuracy": CASES[0][3]}


def test_parts_of_two_processes_are_put_together(cache: Path) -> None:
    def part(process: int) -> Any:
        metric = GroupGap(num_process=2, process_id=process, experiment_id="both", timeout=60)
        metric.add_batch(**{name: column[process::2] for name, column in GROUPED.items()})
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(part, range(2))) == [{"group_gap": CASES[1][3]}, None]
    assert not list(cache.rglob("*.arrow"))


# --- What is said of them --------------------------------------------------------------------------------------------


def run_examples(text: str, name: str) -> None:
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert test.examples
    printed: list[str] = []
    assert doctest.DocTestRunner().run(test, out=printed.append).failed == 0, "".join(printed)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_the_classes_run(kind: Any) -> None:
    run_examples(kind().inputs_description, kind.__name__)


def test_folders_are_what_make_writes() -> None:
    made = runpy.run_path(str(METRICS / "make.py"))["files"]()
    found = [path for folder in FOLDERS for path in folder.iterdir() if path.name != "__pycache__"]
    assert {METRICS / path: text for path, text in made.items()} == {
        path: path.read_text(encoding="utf8") for path in found
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card(folder: Path) -> None:
    card = SpaceCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["sdk"], data["app_file"], data["tags"]) == ("gradio", "app.py", ["evaluate", "metric"])
    assert (folder / data["app_file"]).exists()
    assert len(data["short_description"]) <= 60  # the Hub takes no longer one
    headings = re.findall("^## (.*)", card.text, flags=re.MULTILINE)
    assert headings == [
        "Metric description",
        "How to use",
        "Inputs",
        "Output values",
        "Examples",
        "Limitations",
        "Citation",
        "Further references",
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_lists_every_input(folder: Path) -> None:
    (_, columns, options, _) = CASES[FOLDERS.index(folder)]
    text = (folder / "README.md").read_text(encoding="utf8")
    listed = re.findall(r"^- \*\*(\w+)\*\*: .", text, flags=re.MULTILINE)
    assert listed == [*columns, *options, folder.name]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's own code; gradio itself is not among what the tests need."""
    parts: dict[str, Any] = {}

    class Error(Exception):
        pass

    def part(*args: Any, **kwargs: Any) -> Any:
        parts.update(kwargs)
        return types.SimpleNamespace(launch=None)

    gradio = types.SimpleNamespace(Error=Error, Interface=part, Code=part, JSON=part)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    app = runpy.run_path(str(folder / "app.py"))
    assert parts["article"].strip().startswith("# ")
    assert parts["description"] in parts["article"]
    (value,) = app["compute"](app["EXAMPLE"]).values()
    assert 0 < value <= 1
    for wrong in ("{", "[1]", '{"predictions": [1]}'):
        with pytest.raises(Error):
            app["compute"](wrong)


# --- evaluate.load ---------------------------------------------------------------------------------------------------

OFFLINE = """
import json, socket, sys

def refuse(*args):
    raise AssertionError(f"asks the network for {args}")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
values = {}
for folder, columns, options in json.load(sys.stdin):
    metric = evaluate.load(folder)
    values |= metric.compute(**columns, **options)
json.dump(values, sys.stdout)
"""


def test_loads_in_a_fresh_cache_without_the_hub(tmp_path: Path) -> None:
    given = json.dumps(
        [(str(folder), case[1], case[2]) for folder, case in zip(FOLDERS, CASES, strict=True)],
        default=lambda array: array.tolist(),
    )
    home = tmp_path / "home"
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE],
        input=given,
        env=environment,
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {folder.name: case[3] for folder, case in zip(FOLDERS, CASES, strict=True)}
    written = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {("home", "hf", "metrics"), ("home", "hf", "modules")}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of this process: Python imports what evaluate puts there as one package."""
    return tmp_path_factory.mktemp("modules")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_examples_of_the_cards_run(folder: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    text = (folder / "README.md").read_text(encoding="utf8").replace('load("selfreg/', f'load("{METRICS}/')
    run_examples("".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)), folder.name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_says_where_selfreg_is_from(folder: Path) -> None:
    """evaluate.load tells it to those who haven't installed it."""
    where = ("library", "selfreg", "git+https://github.com/selfreg/selfreg", None)
    assert get_imports(str(folder / f"{folder.name}.py")) == [where]

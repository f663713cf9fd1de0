"""Writes the folders of this directory, one a metric, from the classes of `selfreg.evaluation.hf_metrics`.

    python metrics/make.py

A test compares what lies here with what this writes.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from evaluate import Metric
from huggingface_hub import SpaceCardData

from selfreg.evaluation import hf_metrics

HERE = Path(__file__).parent
OWNER = "selfreg"
"""The account on the Hub that the cards load the metrics from."""

CODE = "git+https://github.com/selfreg/selfreg"

TITLES = {
    "WorstGroupAccuracy": "Worst-group accuracy",
    "GroupGap": "Group gap",
    "Leakage": "Leakage",
    "UnintendedUse": "Unintended use",
    "UnintendedDependence": "Unintended dependence",
}

# Of 60 characters at most.
SHORT = {
    "WorstGroupAccuracy": "The smallest accuracy over labels and groups",
    "GroupGap": "Equalized odds difference for any number of labels",
    "Leakage": "How well a classifier's score tells the group",
    "UnintendedUse": "Share of the logit margin through features not to be used",
    "UnintendedDependence": "How much of the logits unintended features predict",
}

OF_CLASS_IDS = """\
It combines with all metrics that take class ids as predictions, such as accuracy and F1. Add the texts first, so that
metrics without groups are not given any:

```python
>>> combined = evaluate.combine([metric, evaluate.load("{other}")])
>>> combined.add_batch(predictions=[0, 1], references=[0, 1], groups=["women", None])
>>> sorted(combined.compute())
['group_gap', 'worst_group_accuracy']

```"""

OF_LOGITS = """\
Its predictions are logits, so it combines with metrics that take logits too, and not with accuracy or F1, whose
predictions are class ids:

```python
>>> combined = evaluate.combine([metric, evaluate.load("{other}")])
>>> logits, activations = [[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [0.0, 3.0]], [[0.0]] * 5
>>> combined.add_batch(predictions=logits, references=[1] * 5, groups=[0, 0, 1, 1, None], activations=activations)
>>> sorted(combined.compute())
['leakage', 'unintended_dependence']

```"""

OF_STATES = """\
It looks at neither predictions nor references, and so combines with metrics of any kind. `weight` and `directions`
belong to all texts, and go to `compute`:

```python
>>> combined = evaluate.combine([metric, evaluate.load("{other}")])
>>> pooled = [[1.0, 0.0], [0.0, 2.0]]
>>> combined.add_batch(pooled=pooled, predictions=[[0.0, 1.0], [0.0, 2.0]], references=[1, 1], groups=[0, 1])
>>> combined.compute(weight=[[0.0, 0.0], [1.0, 1.0]], directions=[[0.0, 1.0], [1.0, 0.0]])
{'unintended_use': 1.0, 'leakage': 1.0}

```"""

COMBINING = {
    "WorstGroupAccuracy": (OF_CLASS_IDS, "group_gap"),
    "GroupGap": (OF_CLASS_IDS, "worst_group_accuracy"),
    "Leakage": (OF_LOGITS, "unintended_dependence"),
    "UnintendedUse": (OF_STATES, "leakage"),
    "UnintendedDependence": (OF_LOGITS, "leakage"),
}

LIMITATIONS = {
    "WorstGroupAccuracy": """\
- Cells of fewer than 10 texts don't count, however bad they are.
- The smallest of many accuracies is low by chance alone where cells are small. Look at the intervals of
  `selfreg.evaluation.metrics.group_cells` before comparing two values.
- Only groups that are given are looked at.
""",
    "GroupGap": """\
- The largest of many gaps is above 0 by chance alone, the more so with small groups and many groups or labels.
- It says that groups are treated differently, not which, nor that it is unjust: see
  `selfreg.evaluation.metrics.group_cells` for each label and group.
- A group that has no texts of some true label is left out there, where fairlearn would count its rate as 0.
""",
    "Leakage": """\
- In small cells an AUC is off 0.5 by chance: two sides of 20 texts give about 0.15 where there is nothing.
- What the classifier says of wrong labels is not looked at.
- Texts of two groups can differ in how hard they are; a score that follows that tells the group too.
""",
    "UnintendedUse": """\
- For linear heads only.
- It sees what goes through the features' own directions. Reliance through directions that are correlated with them is
  seen by `unintended_dependence`; a low value is no proof without that.
- It is not bounded by 1. Values compare only where they are of the same features and the same texts.
""",
    "UnintendedDependence": """\
- The prediction is linear, and misses what is not.
- Features that fire in very few texts, in large number, make the value too low: a low value is no proof there.
- What the features predict is not always used: a classifier that follows a right reason which goes with them in these
  texts depends on them as well.
""",
}

# What the Space's form holds at first.
EXAMPLES: dict[str, dict[str, Any]] = {
    "WorstGroupAccuracy": {
        "predictions": [1] * 14 + [0] * 6,
        "references": [1] * 20,
        "groups": ["women"] * 10 + ["men"] * 10,
    },
    "GroupGap": {
        "predictions": [0, 0, 0, 0, 1, 1, 1, 0],
        "references": [0, 0, 0, 0, 1, 1, 1, 1],
        "groups": ["women", "women", "men", "men"] * 2,
    },
    "Leakage": {
        "predictions": [[0, 2], [0, 0.5], [0, 1.5], [0, 0.2]],
        "references": [1, 1, 1, 1],
        "groups": ["women", "women", "men", "men"],
    },
    "UnintendedUse": {
        "pooled": [[1, 0], [-1, 0], [0, 1], [0, -1]],
        "weight": [[0, 0], [2, 2]],
        "directions": [[1, 0]],
    },
    "UnintendedDependence": {
        "predictions": [[0, 1], [0, 3], [0, 5], [0, 7], [0, 9], [0, 11]],
        "references": [1, 1, 1, 1, 1, 1],
        "activations": [[0], [1], [2], [3], [4], [5]],
    },
}

SCRIPT = '''\
"""{title}, where `evaluate.load` looks for it. The metric is selfreg's."""

from selfreg.evaluation.hf_metrics import {kind}  # From: {code}

__all__ = ["{kind}"]
'''

# Not evaluate.utils.launch_gradio_widget: it is written for gradio 3, which current releases of its own dependencies
# break, and its form has columns only, no options such as the weights of the head.
APP = '''\
"""A form that computes the metric in the browser."""

import json
from pathlib import Path
from typing import Any

import gradio
from huggingface_hub import RepoCard

from selfreg.evaluation.hf_metrics import {kind}

EXAMPLE = """\\
{example}
"""


def compute(arguments: str) -> dict[str, Any]:
    try:
        return {kind}(keep_in_memory=True).compute(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise gradio.Error(str(error)) from error


form = gradio.Interface(
    compute,
    gradio.Code(EXAMPLE, language="json", label="Arguments of compute"),
    gradio.JSON(label="Result"),
    title="{title}",
    description={kind}(keep_in_memory=True).description,
    article=RepoCard.load(Path(__file__).with_name("README.md")).text,
    flagging_mode="never",
)

if __name__ == "__main__":
    form.launch()
'''

# The Space has no GPU, and a bare torch would pull gigabytes of CUDA.
REQUIREMENTS = f"""\
--extra-index-url https://download.pytorch.org/whl/cpu
torch==2.13.0+cpu
selfreg @ {CODE}
"""

CARD = """\
---
{data}
---

# {title}

## Metric description

{description}
## How to use

```sh
pip install {code}
```

```python
>>> import evaluate
>>> metric = evaluate.load("{owner}/{name}")

```

or, without the Hub, `{kind}()` from `selfreg.evaluation.hf_metrics`. Texts may come in
one call of `compute`, or bit by bit in `add` and `add_batch` before it.

{combining}

## Inputs

{inputs}

## Output values

{outputs}

## Examples

```python
{examples}
```

## Limitations

{limitations}
## Citation

The method that the figure was made for:

```bibtex
{citation}```

## Further references

[selfreg](https://github.com/selfreg/selfreg), which the metric is part of.
"""


def files() -> dict[Path, str]:
    """The text of every file of the folders, under its path in this directory."""
    made = {}
    for kind, title in TITLES.items():
        metric = getattr(hf_metrics, kind)(keep_in_memory=True)
        folder = Path(metric.name)
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in EXAMPLES[kind].items()]
        example = ",\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)
        made[folder / "README.md"] = _card(kind, title, metric)
        made[folder / "app.py"] = APP.format(kind=kind, title=title, example=f"{{\n{example}\n}}")
        made[folder / "requirements.txt"] = REQUIREMENTS
        made[folder / f"{metric.name}.py"] = SCRIPT.format(kind=kind, title=title, code=CODE)
    return made


def _card(kind: str, title: str, metric: Metric) -> str:
    data = SpaceCardData(
        title=title,
        emoji="⚖️",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version="6.31.0",
        python_version="3.11",
        app_file="app.py",
        pinned=False,
        license="apache-2.0",
        tags=["evaluate", "metric"],
        short_description=SHORT[kind],
        description=" ".join(metric.description.split()),
    )
    _, arguments, returns, examples = re.split(r"^(?:Args|Returns|Examples):\n", metric.inputs_description, flags=re.M)
    template, other = COMBINING[kind]
    return CARD.format(
        data=data.to_yaml(),
        title=title,
        description=metric.description,
        code=CODE,
        owner=OWNER,
        name=metric.name,
        kind=kind,
        combining=template.replace("{other}", f"{OWNER}/{other}"),
        inputs=_bullets(arguments),
        outputs=_bullets(returns),
        examples=textwrap.dedent(examples),
        limitations=LIMITATIONS[kind],
        citation=metric.citation,
    )


def _bullets(section: str) -> str:
    """`name: text` with indented lines of more text, as a list."""
    items = re.sub(r"\n\s{2,}", "\n  ", textwrap.dedent(section).strip())
    return re.sub(r"^(\w+): ", r"- **\1**: ", items, flags=re.M)


if __name__ == "__main__":
    for path, text in files().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(text, encoding="utf8")

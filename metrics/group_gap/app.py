"""A form that computes the metric in the browser."""

import json
from pathlib import Path
from typing import Any

import gradio
from huggingface_hub import RepoCard

from selfreg.evaluation.hf_metrics import GroupGap

EXAMPLE = """\
{
  "predictions": [0, 0, 0, 0, 1, 1, 1, 0],
  "references": [0, 0, 0, 0, 1, 1, 1, 1],
  "groups": ["women", "women", "men", "men", "women", "women", "men", "men"]
}
"""


def compute(arguments: str) -> dict[str, Any]:
    try:
        return GroupGap(keep_in_memory=True).compute(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise gradio.Error(str(error)) from error


form = gradio.Interface(
    compute,
    gradio.Code(EXAMPLE, language="json", label="Arguments of compute"),
    gradio.JSON(label="Result"),
    title="Group gap",
    description=GroupGap(keep_in_memory=True).description,
    article=RepoCard.load(Path(__file__).with_name("README.md")).text,
    flagging_mode="never",
)

if __name__ == "__main__":
    form.launch()

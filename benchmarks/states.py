"""Hidden states that the SAE benchmarks share: SmolLM2-135M-Instruct, layer 15, texts of SELFREG_DATA."""

import os
from functools import cache
from pathlib import Path

from selfreg import ActivationStore, HiddenStateExtractor
from selfreg.data import load_rows
from selfreg.demo.recipe import demo_backbone
from selfreg.recipe import SplitRecipe


def data_path(name: str) -> str:
    return str(Path(os.environ.get("SELFREG_DATA", "../shared/data")) / name)


def general_states(tokens: int, folder: Path) -> dict[str, ActivationStore]:
    """About `tokens` tokens of general text to train on, and an eighth as many of other texts to measure on."""
    extractor = general_extractor()
    texts = general_texts(tokens)
    return {split: extractor.extract(texts[split], folder / f"{split}-{tokens}") for split in texts}


def general_texts(tokens: int) -> dict[str, list[str]]:
    """The texts of `general_states`."""
    extractor = general_extractor()
    found = {}
    for split, wanted in (("train", tokens), ("test", tokens // 8)):
        texts = [row["text"] for row in load_rows(SplitRecipe(path=data_path(f"sae_text/{split}.jsonl.xz")))]
        count = total = 0
        while total < wanted and count < len(texts):
            total += sum(end - start for _, start, end in extractor.tokenize(texts[count : count + 16]))
            count += 16
        found[split] = texts[:count]
    return found


def task_states(folder: Path) -> dict[str, ActivationStore]:
    """A narrow task: descriptions of symptoms by patients; three quarters to train on, the others to measure on."""
    texts = [row["text"] for row in load_rows(SplitRecipe(path=data_path("diagnosis/symptom2disease.jsonl.xz")))]
    # Every fourth, since the file is sorted by disease.
    parts = {"train": [text for i, text in enumerate(texts) if i % 4], "test": texts[::4]}
    extractor = general_extractor()
    return {split: extractor.extract(part, folder / f"task-{split}") for split, part in parts.items()}


@cache
def general_extractor() -> HiddenStateExtractor:
    """SmolLM2-135M-Instruct, from the wheel where it is installed, through layer 15."""
    return HiddenStateExtractor.from_pretrained(demo_backbone(), layer=15, max_length=128)

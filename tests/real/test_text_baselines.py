"""The baselines on texts, with SmolLM2 and ToxicChat."""

import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from selfreg.classifier.scrubbing import scrub
from selfreg.classifier.tfidf import tfidf_logits
from selfreg.classifier.zero_shot import zero_shot_logits
from selfreg.features.chat import LocalChatModel

pytestmark = pytest.mark.real

_INSTRUCTION = "Each text is a message to an AI assistant. Answer 1 if it is toxic, harmful or sexual, and 0 if not."


def _rows(data_path: Callable[[str], Path]) -> list[dict[str, Any]]:
    with lzma.open(data_path("toxicchat/train.jsonl.xz"), "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def toxic_chat(data_path: Callable[[str], Path]) -> tuple[list[str], list[int]]:
    """The first 15 texts of each label; some are far longer than what is asked about."""
    rows = _rows(data_path)
    chosen = [row for label in (0, 1) for row in [row for row in rows if row["label"] == label][:15]]
    return [row["text"] for row in chosen], [row["label"] for row in chosen]


def test_zero_shot(smollm2_chat: Path, toxic_chat: tuple[list[str], list[int]]) -> None:
    texts, _ = toxic_chat
    chat = LocalChatModel(str(smollm2_chat), dtype=torch.float32, device="cpu")
    assert max(map(chat.count_tokens, texts)) > 64
    logits = zero_shot_logits(chat, texts, ["0", "1"], instruction=_INSTRUCTION, max_tokens=64)
    assert logits.shape == (30, 2)
    assert logits.isfinite().all()
    margins = logits[:, 1] - logits[:, 0]
    assert len(set(margins.tolist())) == 30
    # So small a model is no judge of it; but the text moves it, and the prior is divided out: it says both.
    assert margins.min() < 0 < margins.max()
    again = zero_shot_logits(chat, texts[:3], ["0", "1"], instruction=_INSTRUCTION, max_tokens=64)
    torch.testing.assert_close(again, logits[:3], atol=1e-3, rtol=0)


def test_tfidf_and_scrubbing(toxic_chat: tuple[list[str], list[int]], data_path: Callable[[str], Path]) -> None:
    texts, labels = toxic_chat
    train = [row for row in _rows(data_path) if row["text"] not in texts][:500]

    def auc(keywords: list[str]) -> float:
        parts = [[row["text"] for row in train], texts]
        if keywords:
            parts = [scrub(part, keywords) for part in parts]
            left = set(re.findall(r"\w+", " ".join(parts[1]).lower()))
            assert left.isdisjoint(keywords)
        targets = [row["label"] for row in train]
        logits = tfidf_logits(parts[0], targets, {"some": parts[1]}, num_labels=2, class_weight="balanced")["some"]
        return float(roc_auc_score(labels, (logits[:, 1] - logits[:, 0]).numpy()))

    assert auc([]) > 0.7
    # Without all of the words that the texts have, nothing is left to tell them by.
    assert auc(sorted(set(re.findall(r"\w+", " ".join(texts).lower())))) == 0.5

"""The baselines that read the texts themselves: TF-IDF with logistic regression, and prompting the backbone."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selfreg.activations.conversation import conversation
from selfreg.classifier.tfidf import tfidf_logits, tfidf_pair_scores
from selfreg.classifier.zero_shot import zero_shot_logits, zero_shot_scores
from selfreg.data import TaskData
from selfreg.recipe import Recipe
from selfreg.texts import TextSet

logger = logging.getLogger(__name__)

_QUESTION_CHARACTERS = 200

TEXT_BASELINES = ("tfidf", "zero_shot")


def text_logits(name: str, recipe: Recipe, data: TaskData) -> dict[str, Tensor] | None:
    """Logits of a text baseline on every eval set, by name: `[N, L]`; of pairs the scores of both sides, `[N, 2]`.

    Returns:
        None where the method does not apply: prompting a backbone without a chat template, or for a number.
    """
    return _tfidf(recipe, data) if name == "tfidf" else _zero_shot(recipe, data)


def _tfidf(recipe: Recipe, data: TaskData) -> dict[str, Tensor]:
    train = data.train
    if recipe.task == "preference":
        evals = {name: _replies(part) for name, part in data.eval.items()}
        found = tfidf_pair_scores(_replies(train), evals, sample_weight=train.weights, seed=recipe.seed)
        # The difference of the sides is all that it knows.
        return {name: torch.cat([scores, torch.zeros_like(scores)], dim=1) for name, scores in found.items()}
    return tfidf_logits(
        train.texts,
        train.labels,
        {name: part.texts for name, part in data.eval.items()},
        num_labels=max(len(data.labels), 1),
        task=recipe.task,
        sample_weight=train.weights,
        class_weight=recipe.classifier.class_weights if recipe.task == "single_label" else None,
        seed=recipe.seed,
    )


def _zero_shot(recipe: Recipe, data: TaskData) -> dict[str, Tensor] | None:
    from selfreg.features.chat import LocalChatModel

    if recipe.task == "regression":
        logger.warning("zero_shot names the points of a scale, and a target on a scale has none: left out")
        return None
    backbone = recipe.backbone
    try:
        chat = LocalChatModel(backbone.model, revision=backbone.revision, gguf_file=backbone.gguf_file)
    except ValueError as error:
        logger.warning("zero_shot left out: %s", error)
        return None
    options: dict[str, Any] = {"instruction": recipe.instruction, "max_tokens": backbone.max_length}
    found = {}
    for name, part in data.eval.items():
        if recipe.task == "preference":
            sides = zip(*_with_questions(part), strict=True)
            found[name] = torch.cat([zero_shot_scores(chat, list(side), **options) for side in sides], dim=1)
        else:
            found[name] = zero_shot_logits(chat, part.texts, data.labels, task=recipe.task, **options)
    return found


def _replies(part: TextSet) -> list[tuple[str, str]]:
    """The last message of either side of each pair."""
    rows = [json.loads(text) for text in part.texts]
    return [tuple(conversation(row, side)[-1]["content"] for side in ("chosen", "rejected")) for row in rows]  # type: ignore[misc]


def _with_questions(part: TextSet) -> list[tuple[str, str]]:
    """Each reply behind the end of what was asked: a reply is judged by it, and has to survive the cut."""
    texts = []
    for text in part.texts:
        row = json.loads(text)
        sides = [conversation(row, side) for side in ("chosen", "rejected")]
        asked = ["\n".join(message["content"] for message in side[:-1])[-_QUESTION_CHARACTERS:] for side in sides]
        replies = [side[-1]["content"] for side in sides]
        texts.append((f"{asked[0]}\n\nReply: {replies[0]}", f"{asked[1]}\n\nReply: {replies[1]}"))
    return texts


def changed_texts(part: TextSet, change: Callable[[list[str]], list[str]]) -> TextSet:
    """The set with every text changed; of pairs every reply, while what was asked stays."""
    if part.task != "preference":
        return replace(part, texts=change(part.texts))
    flat = change([reply for pair in _replies(part) for reply in pair])
    texts = []
    for text, chosen, rejected in zip(part.texts, flat[0::2], flat[1::2], strict=True):
        row = json.loads(text)
        for side, reply in (("chosen", chosen), ("rejected", rejected)):
            row[side] = reply if isinstance(row[side], str) else [*row[side][:-1], {**row[side][-1], "content": reply}]
        texts.append(json.dumps(row, ensure_ascii=False))
    return replace(part, texts=texts)

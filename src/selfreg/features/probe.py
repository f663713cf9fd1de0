"""A score of an explanation that asks no chat model: do its very words tell activating texts from others?"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from selfreg.features.records import FeatureRecord, Score
from selfreg.features.scoring import WORD, ScoringExamples, score_answers, stop_words

_FOLDS = 5


def probe_scores(records: Iterable[FeatureRecord], *, max_examples: int = 20) -> dict[int, Score]:
    """Does a linear probe on the words of the explanation tell activating texts from others? Asks no chat model.

    A text is described by which content words of the explanation it holds, up to the endings of plurals, -ing and
    -ed; a logistic regression on them is scored on texts that it was not fitted on. It has no intercept and says yes
    only for a reason, so that a text with none of the words is a no, and words that tell nothing score 0.5. What the
    explanation says in other words than the texts is lost on it, and so are writing systems without spaces: a low
    score says little, a high one that the feature is about these very words.

    Args:
        records: the features. One without an explanation, or without a text of either kind, has no score.
        max_examples: texts of each kind for a feature; drawn as for `detection_scores`.

    Raises:
        ValueError: `max_examples` is below 1.
    """
    scores = {}
    for record in records:
        if not record.explanation:
            continue
        examples = ScoringExamples.draw(record, max_examples)
        texts = [stems(str(span)) for span in (*examples.positives, *examples.negatives)]
        truth = np.arange(len(texts)) < len(examples.positives)
        score = score_answers(
            list(zip(truth.tolist(), _probed(record.explanation, texts, truth).tolist(), strict=True))
        )
        if score is not None:
            scores[record.feature] = score
    return scores


def _probed(explanation: str, texts: Sequence[set[str]], truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Held-out answers of the probe, `[N]`; all are no where there is nothing to fit on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    words = sorted(word for word in stems(explanation) if any(word in text for text in texts))
    folds = min(_FOLDS, int(truth.sum()), int((~truth).sum()))
    if not words or folds < 2:
        return np.zeros(len(truth), dtype=bool)
    held_NW = np.array([[word in text for word in words] for text in texts], dtype=float)
    # Without an intercept, which would answer for all texts that hold none of the words by what few of them happen to
    # be in the training folds: on the planted concepts of the tests, an oracle then scores 0.89 in place of 0.97.
    probe = LogisticRegression(class_weight="balanced", fit_intercept=False)
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    margins = cross_val_predict(probe, held_NW, truth, cv=split, method="decision_function")
    return np.asarray(margins > 0)


def stems(text: str) -> set[str]:
    """The content words of a text, lower-cased, without the endings of plurals, -ing and -ed."""
    return {_stem(word) for word in WORD.findall(text.lower()) if word not in stop_words()}


def _stem(word: str) -> str:
    word = re.sub(r"['’]s?$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and re.search(r"[^sui]s$", word):
        word = word[:-1]
    for ending in ("ing", "ed"):
        # What is left must have a vowel: "bring" and "red" have no ending.
        if word.endswith(ending) and len(word) >= len(ending) + 3 and re.search("[aeiouy]", word[: -len(ending)]):
            word = word[: -len(ending)]
            if re.search(r"([^aeiouls])\1$", word):  # "planning", but "selling" and "passing"
                word = word[:-1]
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word

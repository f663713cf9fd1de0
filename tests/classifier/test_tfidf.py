from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from selfreg.classifier import tfidf
from selfreg.classifier.tfidf import tfidf_logits, tfidf_pair_scores

SIGNS = (("cough", "wheeze"), ("rash", "itch"), ("headache", "dizzy"))
FILLERS = ("today", "again", "since monday", "at night", "they say", "no change", "seen twice")


def notes(count: int, *, labels: int = 3, noise: float = 0.0, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts whose label is told by a word of it, in a share of `noise` of them by a word of another label."""
    draws = np.random.default_rng(seed)
    texts, truth = [], []
    for row in range(count):
        label = row % labels
        told = int(draws.integers(labels)) if draws.random() < noise else label
        words = [draws.choice(SIGNS[told]), *draws.choice(FILLERS, 2, replace=False)]
        texts.append(" ".join(draws.permutation(words)))
        truth.append(label)
    return texts, truth


def logits_of(train: tuple[list[str], Any], texts: list[str], **kwargs: Any) -> torch.Tensor:
    return tfidf_logits(*train, {"eval": texts}, **kwargs)["eval"]


class TestClasses:
    @pytest.mark.parametrize("labels", [2, 3])
    def test_tells_labels_of_new_texts(self, labels: int) -> None:
        texts, truth = notes(60, labels=labels, seed=1)
        logits = logits_of(notes(90, labels=labels), texts, num_labels=labels)
        assert logits.shape == (60, labels)
        assert logits.dtype == torch.float32
        assert logits.argmax(1).tolist() == truth

    @pytest.mark.parametrize("labels", [2, 3])
    def test_softmax_gives_the_probabilities_of_sklearn(self, labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tfidf, "STRENGTHS", (3.0,))
        train, (texts, _) = notes(90, labels=labels, noise=0.3), notes(20, labels=labels, seed=1)
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(train[0])
        model = LogisticRegression(C=3.0, max_iter=2000).fit(vectors.transform(train[0]), train[1])
        logits = logits_of(train, texts, num_labels=labels)
        expected = model.predict_proba(vectors.transform(texts))
        torch.testing.assert_close(logits.softmax(-1), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)

    def test_every_set_by_its_name(self) -> None:
        first, second = notes(12, seed=1)[0], notes(7, seed=2)[0]
        found = tfidf_logits(*notes(60), {"test": first, "shifted": second}, num_labels=3)
        assert {name: len(logits) for name, logits in found.items()} == {"test": 12, "shifted": 7}
        # What else is scored has no influence.
        assert torch.equal(found["shifted"], logits_of(notes(60), second, num_labels=3))

    def test_cross_validation_penalises_noise_more(self, caplog: pytest.LogCaptureFixture) -> None:
        chosen = {}
        for noise in (0.0, 0.8):
            caplog.clear()
            with caplog.at_level("INFO", "selfreg.classifier.tfidf"):
                logits_of(notes(150, noise=noise), ["cough"], num_labels=3)
            chosen[noise] = float(caplog.messages[0].split("C = ")[1].split()[0])
        assert chosen[0.8] < chosen[0.0]

    def test_a_seed_gives_the_same(self) -> None:
        texts = notes(10, seed=1)[0]
        train = notes(60, noise=0.3)
        assert torch.equal(
            logits_of(train, texts, num_labels=3, seed=5), logits_of(train, texts, num_labels=3, seed=5)
        )

    def test_text_weights_are_repetitions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tfidf, "STRENGTHS", (1.0,))
        texts, labels = notes(30, noise=0.3)
        weights = [1.0] * 15 + [0.0] * 15
        weighted = logits_of((texts, labels), ["cough", "itch"], num_labels=3, sample_weight=weights)
        assert not torch.allclose(weighted, logits_of((texts, labels), ["cough", "itch"], num_labels=3), atol=1e-2)
        # Rows of no weight say nothing, whatever their label is.
        other = labels[:15] + [0, 2, 1] * 5
        torch.testing.assert_close(
            weighted,
            logits_of((texts, other), ["cough", "itch"], num_labels=3, sample_weight=weights),
            atol=1e-3,
            rtol=0,
        )

    def test_balanced_labels_weigh_the_same(self) -> None:
        texts, labels = notes(200, labels=2, noise=0.8)
        rare = [row for row in range(200) if labels[row] == 0 or row % 10 == 1]
        train = [texts[row] for row in rare], [labels[row] for row in rare]
        plain = logits_of(train, ["today"], num_labels=2)
        balanced = logits_of(train, ["today"], num_labels=2, class_weight="balanced")
        counts = np.bincount(train[1])
        by_hand = logits_of(train, ["today"], num_labels=2, class_weight=(len(rare) / (2 * counts)).tolist())
        assert plain[0].argmax() == 0
        assert (plain[0, 0] - plain[0, 1]) > (balanced[0, 0] - balanced[0, 1]) + 1
        torch.testing.assert_close(balanced, by_hand)

    def test_label_of_one_text(self) -> None:
        texts, labels = notes(30, labels=2)
        logits = logits_of(([*texts, "headache"], [*labels, 2]), ["headache"], num_labels=3)
        assert logits.isfinite().all()
        assert logits[0].argmax() == 2

    def test_text_of_unknown_words_gets_the_prior(self) -> None:
        texts, labels = notes(90, labels=2)
        skewed = [row for row in range(90) if labels[row] == 1 or row % 6 == 0]
        logits = logits_of(([texts[row] for row in skewed], [labels[row] for row in skewed]), ["zzz"], num_labels=2)
        assert logits[0].argmax() == 1


def test_multi_label() -> None:
    texts, first = notes(90, labels=2)
    labels = torch.zeros(90, 3)
    labels[:, 0] = torch.tensor(first)
    labels[:, 1] = torch.tensor([float("night" in text) for text in texts])
    logits = logits_of((texts, labels), ["cough at night", "itch today"], num_labels=3, task="multi_label")
    assert logits.shape == (2, 3)
    assert (logits[:, :2] > 0).tolist() == [[False, True], [True, False]]
    # Of a label that nothing has, (0 + ½) / (90 + 1).
    torch.testing.assert_close(logits[:, 2].sigmoid(), torch.full((2,), 0.5 / 91))


def test_multi_label_columns_are_fits_of_their_own() -> None:
    texts, first = notes(90, labels=2, noise=0.3)
    others = [int("monday" in text) for text in texts]
    both = logits_of((texts, np.array([first, others]).T), texts[:5], num_labels=2, task="multi_label")
    alone = logits_of((texts, first), texts[:5], num_labels=2)
    torch.testing.assert_close(both[:, 0], alone[:, 1] - alone[:, 0], atol=1e-4, rtol=0)


def test_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfidf, "STRENGTHS", (0.5,))
    texts, labels = notes(90)
    values = [10.0 * label + 1 for label in labels]
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts)
    expected = Ridge(alpha=2.0).fit(vectors.transform(texts), values).predict(vectors.transform(texts[:9]))
    predictions = logits_of((texts, values), texts[:9], num_labels=1, task="regression")
    assert predictions.shape == (9, 1)
    torch.testing.assert_close(predictions[:, 0], torch.from_numpy(expected).float(), atol=1e-2, rtol=0)


def test_regression_chooses_a_weak_penalty_without_noise() -> None:
    texts, labels = notes(90)
    values = torch.tensor([[10.0 * label + 1] for label in labels])
    new, truth = notes(9, seed=1)
    predictions = logits_of((texts, values), new, num_labels=1, task="regression")
    assert (predictions[:, 0] / 10).round().int().tolist() == truth


class TestPairs:
    GOOD, BAD = ("helpful", "clear"), ("rude", "vague")

    def pairs(self, count: int, seed: int = 0) -> list[tuple[str, str]]:
        draws = np.random.default_rng(seed)

        def reply(words: tuple[str, ...]) -> str:
            return f"{draws.choice(words)} {draws.choice(FILLERS)}"

        return [(reply(self.GOOD), reply(self.BAD)) for _ in range(count)]

    def test_chosen_scores_higher(self) -> None:
        scores = tfidf_pair_scores(self.pairs(40), {"test": self.pairs(20, seed=1)})["test"]
        assert scores.shape == (20, 1)
        assert (scores > 0).all()

    def test_mirror_images(self) -> None:
        pairs = self.pairs(10, seed=1)
        mirrored = [(rejected, chosen) for chosen, rejected in pairs]
        found = tfidf_pair_scores(self.pairs(40), {"test": pairs, "mirrored": mirrored})
        torch.testing.assert_close(found["test"], -found["mirrored"])

    def test_log_odds_of_the_choice(self) -> None:
        """Where one of two words is preferred in 3 of 4 pairs, weak penalties give it 3 : 1."""
        pairs = [("apples", "pears")] * 300 + [("pears", "apples")] * 100
        score = tfidf_pair_scores(pairs, {"test": [("apples", "pears")]})["test"]
        assert expit(score.item()) == pytest.approx(0.75, abs=0.01)

    def test_weights(self) -> None:
        pairs = [("apples", "pears")] * 300 + [("pears", "apples")] * 100
        weights = [1.0] * 300 + [9.0] * 100
        score = tfidf_pair_scores(pairs, {"test": [("apples", "pears")]}, sample_weight=weights)["test"]
        assert expit(score.item()) == pytest.approx(0.25, abs=0.01)

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ([("a good", "a bad")], "1 training pairs"),
            ([("good", "bad"), ("good",)], r"row 1 is \('good',\)"),
            ([("good", "bad"), "ab"], "row 1 is 'ab'"),
            ([("good", "bad"), ("good", " ")], "row 1 .* not empty"),
        ],
    )
    def test_no_pairs(self, pairs: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tfidf_pair_scores(pairs, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": ["ill", "well"]}, "label 'ill' in row 0 is no class id"),
        ({"train_labels": [0, 2]}, "label 2 in row 1"),
        ({"train_labels": [0]}, "1 labels for 2 training texts"),
        ({"train_labels": [1, 1]}, "no training text has the label 0"),
        ({"num_labels": 1, "train_labels": [0, 0]}, "num_labels=1"),
        ({"train_texts": ["cough", " "]}, "text 1 is empty"),
        ({"train_texts": ["?", "!"]}, "no training text has a word"),
        ({"eval_texts": {"test": ["rash", ""]}}, "set 'test': text 1 is empty"),
        ({"eval_texts": {"test": []}}, "set 'test': there are no texts"),
        ({"task": "preference"}, "tfidf_pair_scores"),
        ({"task": "multi_label"}, r"shape \(2, 2\), got \(2,\)"),
        ({"task": "multi_label", "train_labels": [[0, 1], [2, 0]]}, r"\[2.0, 0.0\] in row 1 must be 0 or 1"),
        ({"task": "regression", "train_labels": ["low", "high"]}, "must be numbers"),
        ({"task": "regression", "train_labels": [1.0, float("nan")]}, "row 1 is not finite"),
        ({"task": "regression", "train_labels": [1.0, 2.0], "class_weight": "balanced"}, "not for regression"),
        ({"sample_weight": [1.0]}, "sample_weight must be 2 numbers"),
        ({"sample_weight": [1.0, -1.0]}, "none negative"),
        ({"class_weight": "even"}, "class_weight='even'"),
        ({"class_weight": [1.0]}, "must be 2 numbers"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given = {"train_texts": ["cough", "rash"], "train_labels": [0, 1], "eval_texts": {}, "num_labels": 2} | change
    with pytest.raises(ValueError, match=message):
        tfidf_logits(**given)

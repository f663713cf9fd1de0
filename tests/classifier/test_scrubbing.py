from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from selfreg import FeatureCatalog
from selfreg.activations.spec import HiddenStateSpec
from selfreg.classifier.scrubbing import EMPTY, scrub, scrub_words
from selfreg.classifier.tfidf import tfidf_logits
from selfreg.demo.notes import generate_notes
from selfreg.demo.recipe import KEYWORDS
from selfreg.features.records import FeatureRecord
from selfreg.features.spans import Span


class TestScrub:
    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("We saw her yesterday.", "We saw yesterday."),
            ("Her cough is worse.", "cough is worse."),
            ("I told HER, and left it to her.", "I told, and left it to."),
            ("The heroine there, with others.", "The heroine there, with others."),
            ("She told the old woman (her) so.", "told the old () so."),
            ("First line:\nshe coughs\n  twice.", "First line:\ncoughs\n  twice."),
            ("“Her” and 'her' and her's.", "“” and '' and's."),
        ],
    )
    def test_whole_words_in_any_case(self, text: str, left: str) -> None:
        assert scrub([text], ["her", "she", "woman"]) == [left]

    def test_longer_phrases_first(self) -> None:
        assert scrub(["A new york minute, a new day"], ["new", "New York"]) == ["A minute, a day"]

    def test_signs_are_not_patterns(self) -> None:
        assert scrub(["we use c++ and c. here"], ["c++", "c."]) == ["we use and here"]

    def test_mask_stands_for_a_run_of_keywords(self) -> None:
        texts = ["Old Mrs and she coughed.", "No one."]
        assert scrub(texts, ["old", "mrs", "she"], mask="_") == ["_ and _ coughed.", "No one."]

    def test_nothing_left(self) -> None:
        assert scrub(["She.", "a she"], ["she"]) == [EMPTY, "a"]
        assert scrub(["She.", "a she"], ["she"], mask="_") == ["_.", "a _"]

    def test_twice_changes_nothing_more(self) -> None:
        texts = ["She, her and the woman (her) went.", "Her her her.", "x her\nhers"]
        keywords = ["she", "her", "woman"]
        for mask in ("", "[…]"):
            once = scrub(texts, keywords, mask=mask)
            assert scrub(once, keywords, mask=mask) == once

    def test_texts_without_keywords_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        texts = ["It  is\tso ."]
        assert scrub(texts, ["she"]) == texts
        assert "none of 1 texts holds a keyword" in caplog.text

    @pytest.mark.parametrize(
        ("texts", "keywords", "mask", "message"),
        [
            (["a"], [], "", "no keywords given"),
            (["a"], [" "], "", "no keywords given"),
            (["a"], "she", "", "not one string"),
            (["a", ""], ["she"], "", "text 1 is empty"),
            ([], ["she"], "", "there are no texts"),
            (["a"], ["person", "she"], "a person", "'a person' holds a keyword"),
        ],
    )
    def test_errors(self, texts: list[str], keywords: Any, mask: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            scrub(texts, keywords, mask=mask)


def test_gender_of_notes_is_gone_and_the_diagnosis_stays() -> None:
    train, test = (generate_notes("balanced", num_notes=160, seed=seed) for seed in (0, 1))

    def auc(column: str, value: str, keywords: tuple[str, ...]) -> float:
        parts = [[row["text"] for row in rows] for rows in (train, test)]
        if keywords:
            parts = [scrub(texts, keywords) for texts in parts]
        targets, truth = ([int(row[column] == value) for row in rows] for rows in (train, test))
        logits = tfidf_logits(parts[0], targets, {"test": parts[1]}, num_labels=2)["test"]
        return float(roc_auc_score(truth, (logits[:, 1] - logits[:, 0]).numpy()))

    assert auc("gender", "female", ()) > 0.95
    assert auc("gender", "female", KEYWORDS) < 0.65
    assert auc("label", "asthma", KEYWORDS) > 0.9


def spans(*marked: str, activation: float = 1.0) -> list[Span]:
    """From texts in which the peak stands between < and >."""
    out = []
    for row, text in enumerate(marked):
        before, rest = text.split("<")
        peak, after = rest.split(">")
        out.append(Span(row, 3, activation, before, peak, after))
    return out


def catalog(*records: dict[str, Any]) -> FeatureCatalog:
    spec = HiddenStateSpec("m", None, None, 15, 576, "text_no_sinks", None, 128)
    return FeatureCatalog([FeatureRecord(i, **record) for i, record in enumerate(records)], spec, {})


class TestScrubWords:
    def test_whole_word_at_the_peak(self) -> None:
        found = catalog({"spans": spans("Mrs <Ban>erjee", "Banerj<ee>'s cat", "the <woman>’s cough", "a <woman>")})
        assert scrub_words(found, [0]) == ["banerjee", "woman"]

    def test_words_without_meaning_do_not_count(self) -> None:
        found = catalog(
            {"spans": spans("<the> cat", "a cat<.>", "<47>, a cook", "<x> cat", "<>", "it <is>", "<She> is")}
        )
        assert scrub_words(found, [0]) == ["she"]

    def test_most_activation_first(self) -> None:
        found = catalog(
            {"spans": spans("a <cook>", "the <nurse>", activation=1.0)},
            {"spans": spans("a <nurse>", activation=1.5) + spans("my <wife>", activation=4.0)},
            {"spans": spans("a <rash>", activation=9.0)},
        )
        assert scrub_words(found, [1, 0]) == ["wife", "nurse", "cook"]
        assert scrub_words(found, [1, 0], max_words=1) == ["wife"]

    def test_drawn_spans_stand_for_the_texts_that_are_not_kept(self) -> None:
        """The strongest texts of a feature may be odd ones: of 42 texts, 40 are like the two that were drawn."""
        weaker = spans("and <she> said", "did <she>", activation=0.5)
        record = {"spans": spans("hard <stools>", "<stools> again", activation=3.0)}
        assert scrub_words(catalog(record | {"quantile_spans": [weaker], "num_texts": 42}), [0]) == ["she", "stools"]
        assert scrub_words(catalog(record | {"quantile_spans": [weaker], "num_texts": 4}), [0]) == ["stools", "she"]

    def test_what_is_found_is_scrubbed(self) -> None:
        found = catalog({"spans": spans("Mrs <Ban>erjee’s cat", "<She> is", "his <wife>")})
        words = scrub_words(found, [0])
        assert scrub(["Banerjee's wife and she", "She is"], words) == ["'s and", "is"]

    @pytest.mark.parametrize(
        ("features", "max_words", "message"),
        [
            ([], 5, "no features given"),
            ([0, 7], 5, r"features \[7\] are not there"),
            ([0], 0, "max_words=0"),
            ([0], 5, "none of the 1 features peaks on a word"),
        ],
    )
    def test_errors(self, features: list[int], max_words: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            scrub_words(catalog({"spans": spans("<the> cat")}), features, max_words=max_words)

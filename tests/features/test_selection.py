from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from selfreg import FeatureCatalog, HiddenStateExtractor, SAEConfig, SAEForFeatureExtraction, UnintendedFeatures
from selfreg.features.attribute import attribute_reason, attribute_strength
from selfreg.features.keywords import keyword_near_peak, keyword_pattern
from selfreg.features.records import FeatureRecord
from selfreg.features.spans import Span
from selfreg.sae.fingerprint import sae_fingerprint


@pytest.fixture
def sae(extractor: HiddenStateExtractor) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=64, k=8))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.zeros(16), torch.tensor(0.1))
    return sae


def test_strength_is_the_auc_within_labels_weighted_by_the_smaller_group() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [30, 50])
    groups = np.array(["m", "f"])[rng.integers(0, 2, 80)]
    z = np.round(rng.normal(size=(80, 5)), 1)
    z[groups == "m", 0] += 2
    strength, p_values, which = attribute_strength(z, list(groups), list(labels))
    assert set(which) == {"m"}
    for feature in range(5):
        parts = []
        for label in (0, 1):
            rows = labels == label
            positive = groups[rows] == "m"
            parts.append((min(positive.sum(), (~positive).sum()), roc_auc_score(positive, z[rows, feature])))
        assert strength[feature] == pytest.approx(sum(n * a for n, a in parts) / sum(n for n, _ in parts))
    assert p_values[0] < 1e-6 < p_values[1:].min()


def test_p_value_of_one_label_is_the_mann_whitney_one() -> None:
    rng = np.random.default_rng(1)
    z = np.round(rng.normal(size=(60, 4)), 1)
    groups = rng.integers(0, 2, 60).tolist()
    _, p_values, _ = attribute_strength(z, groups, [0] * 60)
    positive = np.array(groups) == 1
    wanted = mannwhitneyu(z[positive], z[~positive], use_continuity=False, method="asymptotic").pvalue
    np.testing.assert_allclose(p_values, wanted, rtol=1e-6)


def test_a_feature_of_the_label_alone_is_not_one_of_the_attribute() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 400)
    groups = np.where(rng.random(400) < 0.95, labels, 1 - labels)
    z = np.stack([labels + 0.1 * rng.normal(size=400), groups + 0.1 * rng.normal(size=400)], axis=1)
    strength, p_values, _ = attribute_strength(z, groups.tolist(), labels.tolist())
    assert abs(strength[0] - 0.5) < 0.15
    assert strength[1] > 0.95
    assert p_values[1] < 1e-6 < p_values[0]


def test_many_groups_unknown_ones_and_constant_features() -> None:
    groups = ["a", "b", "c", None] * 30
    z = np.zeros((120, 2))
    z[np.array([g == "b" for g in groups]), 0] = 1
    strength, p_values, which = attribute_strength(z, groups, [0] * 120)
    assert strength[0] == pytest.approx(1.0)
    assert which[0] == "b"
    assert strength[1] == 0.5
    assert p_values[1] == 1.0
    with pytest.raises(ValueError, match="no label has texts of two groups"):
        attribute_strength(z, ["a"] * 60 + ["b"] * 60, [0] * 60 + [1] * 60)


def test_from_attribute_finds_the_words_of_the_attribute(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    symptoms, texts, gender, labels = ("fever", "cough", "rash", "nausea"), [], [], []
    for _ in range(200):
        woman, label = bool(torch.rand((), generator=generator) < 0.5), int(torch.randint(4, (), generator=generator))
        filler = " ".join(("well", "ill", "no", "very")[i] for i in torch.randint(4, (3,), generator=generator))
        texts.append(f"{'she' if woman else 'he'} has {symptoms[label]} and {filler}")
        gender.append("f" if woman else "m")
        labels.append(label)
    store = extractor.extract(texts, tmp_path / "s")
    chosen = UnintendedFeatures.from_attribute(sae, store, gender, labels, max_features=5)
    assert 0 < len(chosen) <= 5
    assert chosen.reasons[0].startswith("fires for 'm' rather than 'f' within a label: AUC")
    # Told apart from any text by what the best feature does, not only by its own statement.
    best = chosen.feature_ids[0]
    shards = [next(iter(extractor.iterate([text]))) for text in texts]
    with torch.no_grad():
        peak = torch.stack([sae.encode(shard.hidden_states).to_dense()[:, best].amax() for shard in shards])
    male = np.array([g == "m" for g in gender])
    within = [(np.array(labels) == label) for label in range(4)]
    weight = [min(male[rows].sum(), (~male[rows]).sum()) for rows in within]
    auc = np.average([roc_auc_score(male[rows], peak[rows]) for rows in within], weights=weight)
    assert float(chosen.reasons[0].rpartition("AUC ")[2]) == pytest.approx(auc, abs=1e-3)
    assert abs(auc - 0.5) > 0.15
    caplog.clear()
    first = UnintendedFeatures.from_attribute(sae, store, gender, labels, max_features=1)
    assert first.feature_ids == chosen.feature_ids[:1]
    assert "features tell the attribute; the strongest are taken (1), the others are not" in caplog.text
    # What is not there is not found.
    shuffled = [gender[i] for i in torch.randperm(200, generator=generator)]
    assert len(UnintendedFeatures.from_attribute(sae, store, shuffled, labels)) <= 2
    with pytest.raises(ValueError, match="200 texts, but there are 199 attributes"):
        UnintendedFeatures.from_attribute(sae, store, gender[1:], labels)


def _span(before: str, peak: str, after: str) -> Span:
    return Span(0, 0, 1.0, before, peak, after)


@pytest.mark.parametrize(
    ("span", "hit"),
    [
        (_span("today ", "she", " is well"), "she"),
        (_span("the gen", "tle", "man is well"), "gentleman"),
        (_span("the Mrs ", "Adams", " is well"), "Mrs"),
        (_span("she is ", "well", ""), "she"),
        (_span("she is very ", "well", ""), None),
        (_span("the ", "fever", " she has"), None),
        (_span("the ", "shed", ""), None),
    ],
)
def test_keyword_at_or_just_before_the_peak(span: Span, hit: str | None) -> None:
    assert keyword_near_peak(span, keyword_pattern(["she", "gentleman", "Mrs"])) == hit


def test_from_keywords(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, caplog: pytest.LogCaptureFixture
) -> None:
    she, other = _span("", "She", " coughs"), _span("a ", "fever", " today")
    records = [FeatureRecord(i) for i in range(64)]
    records[3] = FeatureRecord(3, 0.1, 1.0, 1.0, [she, she, she])
    records[5] = FeatureRecord(5, 0.1, 1.0, 1.0, [she, she, other])
    records[7] = FeatureRecord(7, 0.1, 1.0, 1.0, [she, other, other])
    records[9] = FeatureRecord(9, 0.1, 1.0, 1.0, [other], explanation="words about her, she")
    catalog = FeatureCatalog(records, extractor.spec, {"sae_fingerprint": sae_fingerprint(sae)})
    with caplog.at_level("WARNING"):
        assert UnintendedFeatures.from_keywords(sae, catalog, ["she"], max_features=2).feature_ids == [3, 9]
    assert "3 features peak on the keywords or name one; the 2 through which" in caplog.text
    caplog.clear()
    chosen = UnintendedFeatures.from_keywords(sae, catalog, ["she"])
    assert chosen.feature_ids == [3, 9, 5]
    assert chosen.reasons[0] == "3 of 3 top spans peak on: she"
    assert not caplog.records
    assert len(UnintendedFeatures.from_keywords(sae, catalog, ["xylophone"])) == 0
    assert "no feature peaks on 'xylophone'" in caplog.text
    caplog.clear()
    assert UnintendedFeatures.from_keywords(
        sae, catalog, ["She", "she who", "sheep", "xylophone", " "]
    ).feature_ids == [3, 9, 5]
    assert "no feature peaks on these keywords, or names them: sheep, xylophone" in caplog.text
    with pytest.raises(ValueError, match="no keywords"):
        UnintendedFeatures.from_keywords(sae, catalog, [" "])


def test_saved_and_loaded(sae: SAEForFeatureExtraction, tmp_path: Path) -> None:
    chosen = UnintendedFeatures.from_ids(sae, [5, 2], reasons=["because", "why not"])
    h = torch.randn(3, 16)
    pre = (sae.normalize(h) - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(
        h @ chosen.encoder_directions.T + chosen.encoder_bias, pre[:, [5, 2]], rtol=1e-4, atol=1e-4
    )
    chosen.save_pretrained(tmp_path)
    again = UnintendedFeatures.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)
    assert (again.feature_ids, again.reasons, again.num_features) == ([5, 2], ["because", "why not"], 64)
    assert again.spec == sae.config.hidden_state_spec()
    for name in ("encoder_directions", "encoder_bias", "decoder_directions"):
        assert torch.equal(getattr(again, name), getattr(chosen, name))
    (tmp_path / "unintended_features.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="unintended_features.safetensors"):
        UnintendedFeatures.from_pretrained(tmp_path)


def test_bad_ids_are_named(sae: SAEForFeatureExtraction) -> None:
    with pytest.raises(ValueError, match="feature 64 is not there"):
        UnintendedFeatures.from_ids(sae, [64])
    with pytest.raises(ValueError, match="given twice"):
        UnintendedFeatures.from_ids(sae, [1, 1])


def test_random_features_are_the_same_for_a_seed(sae: SAEForFeatureExtraction) -> None:
    a, b = (UnintendedFeatures.from_random(sae, 10, seed=3).feature_ids for _ in range(2))
    assert a == b
    assert len(set(a)) == 10
    assert a != UnintendedFeatures.from_random(sae, 10, seed=4).feature_ids


def test_features_of_a_handful_of_texts_are_no_evidence(caplog: pytest.LogCaptureFixture) -> None:
    z = np.zeros((60, 2))
    groups = ["a"] * 30 + ["b"] * 30
    z[30:34, 0] = 1  # active in four texts, all of one group
    z[30:36, 1] = 1  # in six
    _, p_values, _ = attribute_strength(z, groups, [0] * 60)
    assert p_values[0] == 1.0
    assert p_values[1] < 0.05
    assert not caplog.records
    attribute_strength(z, ["a"] * 55 + ["b"] * 5, [0] * 60)
    assert "5 texts tell 'b' from the rest within a label: too few to tell features of it from chance" in caplog.text


def test_reason_names_the_group_that_it_fires_for() -> None:
    assert attribute_reason("m", ["f", "m"], 0.08) == "fires for 'f' rather than 'm' within a label: AUC 0.920"
    assert attribute_reason("m", ["f", "m"], 0.9) == "fires for 'm' rather than 'f' within a label: AUC 0.900"
    assert attribute_reason("b", ["a", "b", "c"], 0.2).startswith("fires less for 'b' than for the rest")


def test_strongest_on_keywords_comes_first(sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor) -> None:
    catalog = FeatureCatalog.build(sae, extractor, ["she has a fever", "he has a cough"])
    spans = [_span("", "She", " coughs")] * 4
    for feature, density, mean in ((0, 0.1, 1.0), (1, 0.5, 1.0), (2, 0.2, 4.0)):
        catalog.update(feature, spans=spans, density=density, mean_activation=mean)
    for feature in range(3, len(catalog)):
        catalog.update(feature, spans=[])
    chosen = UnintendedFeatures.from_keywords(sae, catalog, ["she"])
    assert chosen.feature_ids == [2, 1, 0]
    with pytest.raises(ValueError, match=r"keywords must be a list of words, not one string: \['she'\]"):
        UnintendedFeatures.from_keywords(sae, catalog, "she")

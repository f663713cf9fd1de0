import logging

import pytest
import torch

from helpers import make_sae
from selfreg import HiddenStateExtractor, RegularizedSequenceClassifier, UnintendedFeatures
from selfreg.classifier.penalty import feature_activations
from selfreg.evaluation.drift import AdapterDrift, adapted_fvu


@pytest.fixture
def model(extractor: HiddenStateExtractor) -> RegularizedSequenceClassifier:
    unintended = UnintendedFeatures.from_ids(make_sae(extractor), [3, 7, 11])
    torch.manual_seed(0)
    return RegularizedSequenceClassifier.from_backbone(extractor, None, unintended, num_labels=2, lora={"r": 4})


def test_figures_are_those_of_the_states(
    model: RegularizedSequenceClassifier, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    sae = make_sae(extractor)
    torch.nn.init.normal_(sae.W_enc, std=0.2)
    fresh = adapted_fvu(model, sae, texts)
    assert fresh.before == pytest.approx(fresh.after, rel=1e-6)
    assert all(value == pytest.approx(1, abs=1e-6) for value in fresh.correlations.values())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    drift = adapted_fvu(model, sae, texts)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert drift.after != pytest.approx(drift.before, rel=1e-2)
    states = []
    for source, found in ((extractor, drift.before), (model.extractor(), drift.after)):
        (shard,) = source.iterate(texts)
        h = shard.hidden_states
        with torch.no_grad():
            error = (sae.decode(sae.encode(h), h) - h).pow(2).sum()
        assert found == pytest.approx(float(error / (h - h.mean(dim=0)).pow(2).sum()), rel=1e-4)
        states.append(h)
    assert drift.num_states == len(states[0])
    a, b = (feature_activations(h, model.encoder_directions, model.encoder_bias) for h in states)
    for column, (feature, value) in enumerate(drift.correlations.items()):
        assert feature == model.config.unintended_feature_ids[column]
        assert value == pytest.approx(float(torch.corrcoef(torch.stack([a[:, column], b[:, column]]))[0, 1]), abs=1e-4)
        assert value < 0.99


def test_warning_where_the_features_no_longer_describe_the_states(
    model: RegularizedSequenceClassifier,
    extractor: HiddenStateExtractor,
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae = make_sae(extractor)
    # One that rebuilds every state exactly, as long as it lies in the plane of those of the plain backbone.
    (shard,) = extractor.iterate(texts)
    h = shard.hidden_states
    directions = torch.linalg.svd(h - h.mean(dim=0), full_matrices=False)[2][:8]
    with torch.no_grad():
        sae.set_normalization(h.mean(dim=0), torch.tensor(1.0))
        sae.b_dec.zero_()
        sae.b_enc.zero_()
        sae.W_enc.zero_()
        sae.W_dec.zero_()
        sae.W_enc[:16] = torch.cat([directions, -directions])
        sae.W_dec[:16] = torch.cat([directions, -directions])
    with caplog.at_level(logging.WARNING, logger="selfreg"):
        assert adapted_fvu(model, sae, texts).features_describe_states
    assert caplog.text == ""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    with caplog.at_level(logging.WARNING, logger="selfreg"):
        drift = adapted_fvu(model, sae, texts)
    assert drift.after > drift.before
    assert not drift.features_describe_states
    assert "the features no longer describe them" in caplog.text


@pytest.mark.parametrize(
    ("before", "after", "fine"),
    [(0.2, 0.27, True), (0.2, 0.29, False), (0.02, 0.03, True), (1.2, 1.2, True), (1.2, 1.3, False)],
)
def test_what_counts_as_drift(before: float, after: float, fine: bool) -> None:
    drift = AdapterDrift(before, after, {}, 10)
    assert drift.features_describe_states is fine
    assert drift.to_dict() == {"before": before, "after": after, "correlations": {}, "num_states": 10}


def test_without_an_adapter_there_is_nothing_to_measure(
    model: RegularizedSequenceClassifier, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    with pytest.raises(ValueError, match="texts must be a list|there are no texts"):
        adapted_fvu(model, make_sae(extractor), [])
    with pytest.raises(ValueError, match=r"it was merged, so measure before merge_adapter\(\)"):
        adapted_fvu(model.merge_adapter(), make_sae(extractor), texts)

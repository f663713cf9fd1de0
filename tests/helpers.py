"""A tiny classifier, for the tests of several modules."""

from typing import Any

import torch

from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)


def make_sae(extractor: HiddenStateExtractor) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.randn(16) * 0.01, torch.tensor(0.1))
    return sae


def make_classifier(extractor: HiddenStateExtractor, **kwargs: Any) -> RegularizedSequenceClassifier:
    sae = make_sae(extractor)
    unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    model = RegularizedSequenceClassifier.from_backbone(
        extractor, sae, unintended, id2label={0: "well", 1: "ill", 2: "very ill"}, **kwargs
    )
    torch.nn.init.normal_(model.score.weight)
    model.set_standardization(torch.randn(20, 16) * 0.2)
    return model.eval()

"""Started by test_errors.py with HF_HUB_OFFLINE and an empty cache."""

import pytest

from selfreg import (
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)

for kind in (SAEForFeatureExtraction, RegularizedSequenceClassifier, UnintendedFeatures, FeatureCatalog):
    with pytest.raises(OSError, match="HF_HUB_OFFLINE") as caught:
        kind.from_pretrained("me/sae")
    assert "me/sae" in str(caught.value)
with pytest.raises(OSError, match="me/backbone"):
    HiddenStateExtractor.from_pretrained("me/backbone", layer=1)

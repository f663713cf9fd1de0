"""Makes selfreg's models known to the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.modeling import SAEForFeatureExtraction

AutoConfig.register(SAEConfig.model_type, SAEConfig, exist_ok=True)
AutoModel.register(SAEConfig, SAEForFeatureExtraction, exist_ok=True)
AutoConfig.register(RegularizedSequenceClassifierConfig.model_type, RegularizedSequenceClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    RegularizedSequenceClassifierConfig, RegularizedSequenceClassifier, exist_ok=True
)

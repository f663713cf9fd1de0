"""Makes selfreg's models and pipelines known to transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.pipelines import TASK, SAEFeatureExtractionPipeline
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.modeling import SAEForFeatureExtraction

AutoConfig.register(SAEConfig.model_type, SAEConfig, exist_ok=True)
AutoModel.register(SAEConfig, SAEForFeatureExtraction, exist_ok=True)
AutoConfig.register(RegularizedSequenceClassifierConfig.model_type, RegularizedSequenceClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    RegularizedSequenceClassifierConfig, RegularizedSequenceClassifier, exist_ok=True
)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=SAEFeatureExtractionPipeline, pt_model=SAEForFeatureExtraction, type="text"
)

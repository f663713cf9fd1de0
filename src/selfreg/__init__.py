"""selfreg: controllable text classification on the hidden states of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Where each public name lives. Imported on first use, so that an optional dependency can never break `import selfreg`.
_LOCATIONS = {
    "HiddenStateExtractor": "selfreg.activations.extractor",
    "ActivationStore": "selfreg.activations.store",
    "StreamingActivations": "selfreg.activations.streaming",
    "SAEConfig": "selfreg.sae.configuration",
    "SAEForFeatureExtraction": "selfreg.sae.modeling",
    "SAETrainer": "selfreg.sae.trainer",
    "SAETrainingArguments": "selfreg.sae.training_args",
    "FeatureCatalog": "selfreg.features.catalog",
    "Rubric": "selfreg.features.rubric",
    "UnintendedFeatures": "selfreg.features.selection",
    "LocalChatModel": "selfreg.features.chat",
    "EndpointChatModel": "selfreg.features.chat",
    "RegularizedSequenceClassifier": "selfreg.classifier.modeling",
    "RegularizedSequenceClassifierConfig": "selfreg.classifier.configuration",
    "RegularizedTrainer": "selfreg.classifier.trainer",
    "RegularizedTrainingArguments": "selfreg.classifier.training_args",
    "RegularizationMixin": "selfreg.classifier.regularizer",
    "RegularizationArguments": "selfreg.classifier.arguments",
    "head_inputs": "selfreg.classifier.head",
    "similarity_penalty": "selfreg.classifier.penalty",
    "evaluate_classifier": "selfreg.evaluation.classifier",
    "Recipe": "selfreg.recipe",
}
__all__ = ["__version__", *_LOCATIONS]

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor as HiddenStateExtractor
    from selfreg.activations.store import ActivationStore as ActivationStore
    from selfreg.activations.streaming import StreamingActivations as StreamingActivations
    from selfreg.classifier.arguments import RegularizationArguments as RegularizationArguments
    from selfreg.classifier.configuration import (
        RegularizedSequenceClassifierConfig as RegularizedSequenceClassifierConfig,
    )
    from selfreg.classifier.head import head_inputs as head_inputs
    from selfreg.classifier.modeling import RegularizedSequenceClassifier as RegularizedSequenceClassifier
    from selfreg.classifier.penalty import similarity_penalty as similarity_penalty
    from selfreg.classifier.regularizer import RegularizationMixin as RegularizationMixin
    from selfreg.classifier.trainer import RegularizedTrainer as RegularizedTrainer
    from selfreg.classifier.training_args import RegularizedTrainingArguments as RegularizedTrainingArguments
    from selfreg.evaluation.classifier import evaluate_classifier as evaluate_classifier
    from selfreg.features.catalog import FeatureCatalog as FeatureCatalog
    from selfreg.features.chat import EndpointChatModel as EndpointChatModel
    from selfreg.features.chat import LocalChatModel as LocalChatModel
    from selfreg.features.rubric import Rubric as Rubric
    from selfreg.features.selection import UnintendedFeatures as UnintendedFeatures
    from selfreg.recipe import Recipe as Recipe
    from selfreg.sae.configuration import SAEConfig as SAEConfig
    from selfreg.sae.modeling import SAEForFeatureExtraction as SAEForFeatureExtraction
    from selfreg.sae.trainer import SAETrainer as SAETrainer
    from selfreg.sae.training_args import SAETrainingArguments as SAETrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'selfreg' has no attribute {name!r}")
    return getattr(import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LOCATIONS])


# The Auto classes and pipelines of transformers know selfreg's models from here on. Their modules need torch and
# transformers only.
import_module("selfreg.auto")

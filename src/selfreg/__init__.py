"""selfreg: controllable text classification on the hidden states of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Where each public name lives. Imported on first use, so that `import selfreg` is quick and never needs an extra.
_LOCATIONS = {
    "HiddenStateExtractor": "selfreg.activations.extractor",
    "ActivationStore": "selfreg.activations.store",
    "SAEConfig": "selfreg.sae.configuration",
    "SAEForFeatureExtraction": "selfreg.sae.modeling",
    "SAETrainer": "selfreg.sae.trainer",
    "SAETrainingArguments": "selfreg.sae.training_args",
}
__all__ = ["__version__", *_LOCATIONS]

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor as HiddenStateExtractor


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'selfreg' has no attribute {name!r}")
    return getattr(import_module(_LOCATIONS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LOCATIONS])

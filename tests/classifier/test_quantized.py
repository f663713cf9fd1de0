"""Backbones that bitsandbytes has quantised, from hidden states to a classifier that is loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaModel

from conftest import WORDS, word_tokenizer
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)

# bitsandbytes says of each layer that 8 bits go through float16.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

KINDS = {
    "8 bits": (BitsAndBytesConfig(load_in_8bit=True), Linear8bitLt, 0.05),
    "4 bits": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), Linear4bit, 0.3),
}
TEXTS = [" ".join(WORDS[i : i + 5]) for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def logits_of(model: RegularizedSequenceClassifier) -> Tensor:
    batch = word_tokenizer()(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_trained_saved_and_loaded(kind: str, lora: Any, folder: str, tmp_path: Path) -> None:
    config, layer, error = KINDS[kind]
    plain = HiddenStateExtractor.from_pretrained(folder, layer=1, max_length=16)
    extractor = HiddenStateExtractor.from_pretrained(
        folder, layer=1, max_length=16, model_kwargs={"quantization_config": config}
    )
    exact, states = plain.pool(TEXTS), extractor.pool(TEXTS)
    assert states.dtype == torch.float32
    assert 0 < float((states - exact).norm() / exact.norm()) < error

    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=64, num_features=40, k=4))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.zeros(64), torch.ones(()))
    model = RegularizedSequenceClassifier.from_backbone(
        extractor, sae, UnintendedFeatures.from_ids(sae, [1, 2, 3]), num_labels=2, lora=lora
    )
    args = RegularizedTrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    RegularizedTrainer(model=model, args=args, train_dataset=rows).train()
    assert any(isinstance(module, layer) for module in model.backbone.modules())
    expected = logits_of(model)
    assert bool(expected.diff(dim=0).any())

    model.save_pretrained(tmp_path / "saved")
    again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "saved", quantization_config=config)
    assert any(isinstance(module, layer) for module in again.backbone.modules())
    torch.testing.assert_close(logits_of(again), expected)
    # Loaded as it is, the backbone has its own precision.
    exact_again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "saved")
    assert not any(isinstance(module, layer) for module in exact_again.backbone.modules())
    assert not torch.equal(logits_of(exact_again), expected)

    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    whole = RegularizedSequenceClassifier.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits_of(whole), expected)

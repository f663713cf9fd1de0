"""Backbones that bitsandbytes has quantised, from hidden states to a classifier that is loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from conftest import WORDS, word_tokenizer
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
    head_inputs,
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


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit layers made from here on take this for a CPU with AVX512-BF16, whatever it is."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.mark.usefixtures("avx512bf16")
@pytest.mark.parametrize("in_memory", [False, True])
def test_four_bits_are_the_same_on_every_cpu(in_memory: bool, folder: str) -> None:
    config, layer, _ = KINDS["4 bits"]
    extractor = HiddenStateExtractor.from_pretrained(
        folder, layer=1, max_length=16, model_kwargs={"quantization_config": config}
    )
    if in_memory:
        backbone = LlamaModel.from_pretrained(folder, quantization_config=config)
        extractor = HiddenStateExtractor(backbone, extractor.tokenizer, layer=1, max_length=16)
    layers = {name: m for name, m in extractor.backbone.named_modules() if isinstance(m, layer)}
    weights = {name: m.weight.data.clone() for name, m in layers.items()}
    extractor.pool(TEXTS)
    for name, module in layers.items():
        assert torch.equal(module.weight.data, weights[name])
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


# peft 0.21 calls what transformers 5.24 renamed by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.usefixtures("avx512bf16")
def test_adapters_of_a_stock_model_train_on_after_it_was_evaluated(folder: str, tmp_path: Path) -> None:
    config, layer, _ = KINDS["4 bits"]
    tokenizer = word_tokenizer()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=2, quantization_config=config)
    rows = [{**tokenizer(text, return_token_type_ids=False), "labels": i % 2} for i, text in enumerate(TEXTS)]
    collator = DataCollatorWithPadding(tokenizer)
    states = head_inputs(model.eval(), DataLoader(rows, batch_size=4, collate_fn=collator))  # type: ignore[arg-type]
    assert states.shape == (len(TEXTS), 64)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=64, num_features=40, k=4))
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"]))
    args = RegularizedTrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unintended=False,
    )
    trainer = RegularizedTrainer(
        model=wrapped,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        unintended=UnintendedFeatures.from_ids(sae, [1, 2, 3]),
    )
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if "lora_B" in name}
    trainer.train()
    layers = [module for module in wrapped.modules() if isinstance(module, layer)]
    assert layers
    assert not any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in layers)
    after = dict(wrapped.named_parameters())
    assert all(not torch.equal(after[name], start) for name, start in before.items())


@pytest.mark.usefixtures("avx512bf16")
def test_a_backbone_with_packed_layers_is_refused(folder: str) -> None:
    backbone = LlamaModel.from_pretrained(folder, quantization_config=KINDS["4 bits"][0]).eval()
    first = backbone.layers[0].self_attn.q_proj
    # bitsandbytes packs it before it computes; without the instruction the rest is of no use.
    first.weight.data, first.weight.quant_state = _convert_weight_packed_for_cpu(
        first.weight.data, first.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*load the model anew"):
        HiddenStateExtractor(backbone, word_tokenizer(), layer=1)

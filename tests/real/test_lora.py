"""LoRA under the head, on the real backbone and texts."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
)
from selfreg.evaluation.drift import adapted_fvu

pytestmark = pytest.mark.real


def test_adapter_and_head_on_toxicchat(smollm2: Path, data_path: Callable[[str], Path], tmp_path: Path) -> None:
    with lzma.open(data_path("toxicchat/train.jsonl.xz"), "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(400), strict=False)]
    rows = [row for row in rows if row["label"] == 1][:16] + [row for row in rows if row["label"] == 0][:16]
    texts = [row["text"] for row in rows]
    extractor = HiddenStateExtractor.from_pretrained(str(smollm2), layer=7, pooling="mean", max_length=48)
    store = extractor.extract(texts, tmp_path / "store")
    set_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=store.hidden_size, num_features=512, k=16))
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    sae_args = SAETrainingArguments(
        str(tmp_path / "sae"), num_train_epochs=10, per_device_train_batch_size=128, **quiet
    )
    SAETrainer(sae, sae_args, train_dataset=store).train()
    active = sae.encode(store.gather(range(0, len(store), 5))).to_dense().gt(0).float().mean(dim=0)
    unintended = UnintendedFeatures.from_ids(sae, active.topk(4).indices.tolist())

    set_seed(0)
    model = RegularizedSequenceClassifier.from_backbone(
        extractor, sae, unintended, id2label={0: "fine", 1: "toxic"}, lora={"r": 8, "lora_alpha": 16}
    )
    args = RegularizedTrainingArguments(
        str(tmp_path / "t"), num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1, **quiet
    )
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    assert sum(losses[4:]) < sum(losses[:4])
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 8 * 7
    assert all(parameter.abs().max() > 0 for parameter in adapters)

    drift = adapted_fvu(model, sae, texts)
    assert 0 < drift.before < drift.after < 10
    assert set(drift.correlations) == set(unintended.feature_ids)

    encoded = extractor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**encoded).logits
        model.save_pretrained(tmp_path / "m")
        again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m")
        torch.testing.assert_close(again(**encoded).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.merge_adapter()(**encoded).logits, wanted, rtol=1e-3, atol=1e-3)

"""The mixin in TRL's RewardTrainer, on the real SmolLM2-135M-Instruct and real pairs of SELFREG_DATA."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from selfreg import (
    HiddenStateExtractor,
    RegularizationArguments,
    RegularizationMixin,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
    head_inputs,
)

pytestmark = pytest.mark.real


def short_pairs(path: Path, count: int = 16) -> Dataset:
    with lzma.open(path, "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(2000), strict=False)]
    rows.sort(key=lambda row: len(json.dumps(row)))
    # The very shortest say next to nothing.
    return Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows[200:]][:count]
    )


def use_of(model: Any, unintended: UnintendedFeatures) -> float:
    """Mean over features of |w · û|."""
    directions = torch.nn.functional.normalize(unintended.decoder_directions, dim=1)
    return float((model.score.weight @ directions.T).abs().mean().detach())


@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
def test_reward_model_on_real_pairs(smollm2_chat: Path, data_path: Callable[[str], Path], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    class RegularizedRewardTrainer(RegularizationMixin, trl.RewardTrainer):
        pass

    pairs = short_pairs(data_path("preferences/train.jsonl.xz"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_chat)
    set_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(smollm2_chat, num_labels=1, dtype="float32")
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    # A new head of transformers is so small that a few steps would drown what the penalty does.
    torch.nn.init.normal_(model.score.weight, std=0.5)
    extractor = HiddenStateExtractor(model.model, tokenizer, layer="final", name="smollm2")
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=576, num_features=64, k=8))
    sae.config.set_hidden_state_spec(extractor.spec)
    unintended = UnintendedFeatures.from_ids(sae, range(8))
    args = trl.RewardConfig(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = RegularizedRewardTrainer(
        model,
        args,
        train_dataset=pairs,
        processing_class=tokenizer,
        unintended=unintended,
        regularization=RegularizationArguments(penalty_weight=300.0, dependence_weight=0.01),
    )
    before = use_of(model, unintended)
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"task_loss", "similarity", "accuracy", "margin"} <= set(entry)
    assert use_of(model, unintended) < 0.7 * before
    assert entry["dependence"] > 0
    trainer.save_model(str(tmp_path / "reward"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    batch = tokenizer("How do I learn ninja moves?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)
    assert head_inputs(loaded, [batch]).shape == (1, 576)

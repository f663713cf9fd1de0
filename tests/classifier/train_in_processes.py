"""What test_distributed.py starts, in one process or several: the same trainings at the same global batch.

With a second argument `fsdp` the processes share the weights.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

from conftest import WORDS, tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizationArguments,
    RegularizationMixin,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.classifier.states import PooledStates
from selfreg.utils.files import write_json
from selfreg.utils.sharding import whole_tensor

GLOBAL_BATCH = 16
UNEVEN = {"cached": 59, "live": 49, "ids": 64, "lora": 49}
"""Training texts: of the last batch, 11 or 1 are left, so that the second process has 3 of them or none."""
_BY_BLOCKS = "TRANSFORMER_BASED_WRAP"
_COMMON: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 0,
    "use_cpu": True,
}


class PluggedTrainer(RegularizationMixin, Trainer):
    pass


def make_texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (64,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def whole(model: torch.nn.Module, *, all_of_them: bool = False) -> dict[str, torch.Tensor]:
    """The trained parameters, or all; those that FSDP has dealt out put together again."""
    named = model.named_parameters()
    return {key: whole_tensor(value.detach()).clone() for key, value in named if value.requires_grad or all_of_them}


def check_sharded(model: torch.nn.Module, num_blocks: int) -> None:
    # accelerate by itself would take DDP on a CPU, and every comparison would hold.
    assert isinstance(model, FSDPModule)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > num_blocks
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def on_sharded_states(output: Path, rows: Dataset, results: dict[str, torch.Tensor]) -> None:
    """A backbone that no device holds whole, and a head that is trained with DDP on what it gave."""
    extractor = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=1, max_length=32, name="tiny").shard()
    sae = make_sae(extractor)
    model = RegularizedSequenceClassifier.from_backbone(
        extractor, sae, UnintendedFeatures.from_ids(sae, [3, 7, 11]), num_labels=3
    )
    batch = {"per_device_train_batch_size": GLOBAL_BATCH // 2, "class_weights": "balanced"}
    args = RegularizedTrainingArguments(str(output / "sharded"), **batch, **_COMMON)
    train = rows.select(range(UNEVEN["cached"]))
    RegularizedTrainer(model=model, args=args, train_dataset=train).train()
    for key, value in whole(model).items():
        torch.testing.assert_close(value, results[f"cached.{key}"])
    with pytest.raises(ValueError, match=r"no adapter can be put in: leave .shard\(\) out"):
        RegularizedSequenceClassifier.from_backbone(extractor, sae, None, num_labels=3, lora={"r": 4})
    with pytest.raises(ValueError, match="save_backbone=True can't write it"):
        model.save_pretrained(output / f"whole-{os.environ['RANK']}", save_backbone=True)
    live = replace(args, cache_states=False)
    with pytest.raises(ValueError, match="to train with fsdp=True leave .shard"):
        RegularizedTrainer(model=model, args=live, train_dataset=rows)


def main(output: Path, fsdp: bool = False) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch: dict[str, Any] = {"per_device_train_batch_size": GLOBAL_BATCH // world}
    if fsdp:
        batch |= {"fsdp": True}
    texts = make_texts()
    rows = Dataset.from_list(
        [
            {"text": text, "label": int("fever" in text) + int("pain" in text), "weight": 1.0 + i % 3}
            for i, text in enumerate(texts)
        ]
    )
    tokenizer = word_tokenizer()
    results: dict[str, torch.Tensor] = {}
    logs: dict[str, Any] = {}
    ids = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
    for name, lora in (("cached", None), ("live", None), ("ids", None), ("lora", {"r": 4})):
        extractor = HiddenStateExtractor(tiny_backbone(), tokenizer, layer=1, max_length=32, name="tiny")
        sae = make_sae(extractor)
        torch.manual_seed(0)
        model = RegularizedSequenceClassifier.from_backbone(
            extractor, sae, UnintendedFeatures.from_ids(sae, [3, 7, 11]), num_labels=3, lora=lora
        )
        args = RegularizedTrainingArguments(
            str(output / name),
            adapter_learning_rate=1e-2,
            class_weights="balanced",
            cache_states=name not in ("live", "ids"),
            **batch,
            # In the middle of an epoch of four steps.
            save_steps=6,
            **{**_COMMON, "save_strategy": "steps" if name == "lora" else "no"},
        )
        whole_set = ids if name == "ids" else rows
        given = whole_set.select(range(UNEVEN[name]))
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=given, eval_dataset=given.select(range(33)))
        trainer.train()
        if fsdp:
            check_sharded(trainer.model, 2)
            with pytest.raises(ValueError, match="its weights lie in pieces: trainer.save_model"):
                trainer.model.save_pretrained(output / "pieces")
            assert not (output / "pieces").exists()
        results |= {f"{name}.{key}": value for key, value in whole(trainer.model).items()}
        if lora:
            trainer.save_model(str(output / f"saved-{world}"))
            trainer.accelerator.wait_for_everyone()
            again = RegularizedSequenceClassifier.from_pretrained(
                output / f"saved-{world}", backbone=tiny_backbone(), is_trainable=True
            )
            for key, value in whole(again).items():
                assert torch.equal(value, results[f"{name}.{key}"]), f"{key} is not what was trained"
            if fsdp:
                torch.manual_seed(0)
                model = RegularizedSequenceClassifier.from_backbone(
                    extractor, sae, UnintendedFeatures.from_ids(sae, [3, 7, 11]), num_labels=3, lora=lora
                )
                resumed = RegularizedTrainer(model=model, args=args, train_dataset=given)
                resumed.train(resume_from_checkpoint=str(output / name / "checkpoint-6"))
                for key, value in whole(resumed.model).items():
                    torch.testing.assert_close(value, results[f"{name}.{key}"])
        logs[name] = [row for row in trainer.state.log_history if "loss" in row]
        # In even batches, as the Trainer's mean over uneven ones is not exact.
        logs[f"{name} eval"] = trainer.evaluate(whole_set)["eval_loss"]
        if lora and not fsdp:
            # The head alone, and then both again: DDP must not go on leaving the adapter out.
            for trained in (False, True):
                for key, parameter in model.backbone.named_parameters():
                    parameter.requires_grad_(trained and "lora_" in key)
                RegularizedTrainer(model=model, args=replace(args, save_strategy="no"), train_dataset=given).train()
            results |= {f"again.{key}": value for key, value in whole(model).items()}
        if isinstance(trainer.eval_dataset, PooledStates):
            results["eval.pooled"] = trainer.eval_dataset.pooled
    if fsdp:
        on_sharded_states(output, rows, results)
    torch.manual_seed(0)
    stock = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=0,
            num_labels=3,
        )
    )
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    sae.set_normalization(torch.zeros(16), torch.ones(()))
    if fsdp:
        # As `accelerate launch --use_fsdp` asks for it.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": _BY_BLOCKS}
        del batch["fsdp"]
    plugged = PluggedTrainer(
        model=stock,
        args=TrainingArguments(str(output / "plugged"), **batch, **_COMMON),
        train_dataset=rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text", "weight"]),
        processing_class=tokenizer,
        unintended=UnintendedFeatures.from_ids(sae, [3, 7, 11]),
        regularization=RegularizationArguments(penalty_weight=1.0, dependence_weight=1.0),
    )
    plugged.train()
    if fsdp:
        check_sharded(plugged.model, 2)
    results |= {f"plugged.{key}": value for key, value in whole(plugged.model, all_of_them=True).items()}
    logs["plugged"] = [row for row in plugged.state.log_history if "loss" in row]
    if world > 1:
        flat = torch.cat([value.flatten() for value in results.values()])
        both = [torch.empty_like(flat) for _ in range(world)]
        torch.distributed.all_gather(both, flat)
        assert all(torch.equal(both[0], other) for other in both), "the ranks' weights have come apart"
    name = "fsdp" if fsdp else str(world)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(results, output / f"weights-{name}.safetensors")
        write_json(output / f"logs-{name}.json", logs)
    if world > 1:
        torch.distributed.barrier()
        # What this is about has held; a thread of gloo may still abort while the interpreter is taken down.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), fsdp=sys.argv[2:] == ["fsdp"])

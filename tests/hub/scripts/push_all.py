"""Started by test_roundtrip.py: pushes one of each kind to HF_ENDPOINT, and notes what must come back."""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors.torch import save_file

from conftest import WORDS, tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import (
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
)
from selfreg.hub.cards import plain_card, write_card
from selfreg.hub.folders import push_folder
from selfreg.utils.files import write_json
from selfreg.utils.hub import SOMEBODY

TEXTS = [" ".join(WORDS[(7 * i + j * (i + 3)) % len(WORDS)] for j in range(3 + i % 9)) for i in range(24)]
_TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "push_to_hub": True,
    "hub_strategy": "every_save",
    "hub_always_push": True,
}


def make_model(extractor: HiddenStateExtractor, sae: SAEForFeatureExtraction, **options: Any) -> Any:
    torch.manual_seed(0)
    model = RegularizedSequenceClassifier.from_backbone(
        extractor,
        sae,
        UnintendedFeatures.from_ids(sae, [3, 7, 11], reasons=["a", "b", "c"]),
        id2label={0: "well", 1: "ill"},
        **options,
    )
    torch.nn.init.normal_(model.score.weight)
    model.set_standardization(torch.randn(20, 16) * 0.2)
    if model.config.adapter:
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits_of(model: RegularizedSequenceClassifier) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.pooled_states(TEXTS, [0] * len(TEXTS)).pooled)


def push_beside_cards(folder: Path, sae: SAEForFeatureExtraction, adapted: RegularizedSequenceClassifier) -> None:
    api = HfApi()
    for branch in ("main", "dev"):
        api.create_repo("me/by-hand", exist_ok=True)
        api.create_branch("me/by-hand", branch=branch, exist_ok=True)
        api.upload_file(path_or_fileobj=b"by hand", path_in_repo="README.md", repo_id="me/by-hand", revision=branch)
        # A short name is one under the user's own.
        sae.push_to_hub("by-hand", revision=branch)
    own = folder / "adapted-here"
    adapted.save_pretrained(own)
    write_card(own, plain_card(adapted.config, f"{SOMEBODY}anything"))
    push_folder(own, "me/by-hand")
    push_folder(own, "by-folder")
    assert "me/by-folder" not in (own / "README.md").read_text(), "the folder may be pushed to another repo too"
    push_folder(own, "me/by-folder-too")
    # A card of selfreg gives way to that of a person, from a folder too.
    (own / "README.md").write_text("mine")
    push_folder(own, "me/by-folder-too")


def main(folder: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    oids: dict[str, str] = {}
    tiny_backbone().push_to_hub("me/backbone")
    word_tokenizer().push_to_hub("me/backbone")
    extractor = HiddenStateExtractor.from_pretrained("me/backbone", layer=1, max_length=32)
    assert extractor.spec.revision, "the commit of the backbone is noted"
    sae = make_sae(extractor)
    oids["sae"] = sae.push_to_hub("me/sae", commit_message="the first one").oid
    expected["sae"] = sae.encode(extractor.pool(TEXTS)).to_dense().detach()
    # As a large one is: several files, and an index of them. In one file again, the other files go.
    for name in ("me/in-shards", "me/once-in-shards"):
        sae.push_to_hub(name, max_shard_size="2KB")
    sae.push_to_hub("me/once-in-shards")
    UnintendedFeatures.from_ids(sae, [3, 7, 11], reasons=["a", "b", "c"]).push_to_hub("me/unintended", private=True)
    catalog = FeatureCatalog.build(sae, extractor, TEXTS)
    catalog.update(5, explanation="mentions of fever")
    catalog.push_to_hub("me/catalog")

    plain = make_model(extractor, sae)
    expected["classifier"] = logits_of(plain)
    oids["classifier"] = plain.push_to_hub("me/classifier").oid
    with torch.no_grad():
        plain.score.bias.add_(1.0)
    expected["moved"] = logits_of(plain)
    plain.push_to_hub("me/classifier", commit_message="moved")
    plain.push_to_hub("me/classifier", revision="dev")
    oids["pull request"] = plain.push_to_hub("me/classifier", create_pr=True).pr_revision
    adapted = make_model(extractor, sae, lora={"r": 2})
    expected["adapted"] = logits_of(adapted)
    adapted.push_to_hub("me/adapted")
    # Something else in the same repo leaves the weights where they are.
    adapted.unintended.push_to_hub("me/adapted")
    push_beside_cards(folder, sae, adapted)
    # What was there before and is no part of it any more goes.
    make_model(extractor, sae, lora={"r": 2}).push_to_hub("me/once-adapted", save_backbone=True)
    plain.push_to_hub("me/once-adapted")
    whole = make_model(extractor, sae, lora={"r": 2})
    whole.push_to_hub("me/whole", save_backbone=True, private=True)
    expected["whole"] = logits_of(whole)

    rows = Dataset.from_list([{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
    for name, strategy in (("trained", "every_save"), ("checkpointed", "checkpoint")):
        model = make_model(extractor, sae, lora={"r": 2})
        args = RegularizedTrainingArguments(
            str(folder / name),
            save_strategy="epoch",
            hub_model_id=f"me/{name}",
            adapter_learning_rate=0.05,
            **{**_TRAINING, "hub_strategy": strategy},
        )
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        expected[name] = logits_of(model.eval())
        trainer.push_to_hub()
    store = extractor.extract(TEXTS, folder / "store")
    own = SAETrainingArguments(
        str(folder / "sae-trained"), save_strategy="epoch", hub_model_id="me/sae-trained", **_TRAINING
    )
    sae_trainer = SAETrainer(make_sae(extractor), own, train_dataset=store)
    sae_trainer.train()
    sae_trainer.push_to_hub()
    expected["sae-trained"] = sae_trainer.model.encode(extractor.pool(TEXTS)).to_dense().detach()  # type: ignore[union-attr]

    save_file(expected, folder / "expected.safetensors")
    write_json(folder / "oids.json", oids)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Started by test_roundtrip.py: loads what push_all.py pushed, in a process and cache of its own."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from push_all import TEXTS, logits_of
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from selfreg import (
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.utils.files import read_json


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def main(folder: Path) -> None:
    expected, oids = load_file(folder / "expected.safetensors"), read_json(folder / "oids.json")
    for name in ("sae", "in-shards", "once-in-shards", "sae-trained"):
        sae = SAEForFeatureExtraction.from_pretrained(f"me/{name}")
        extractor = HiddenStateExtractor.from_sae(sae)
        wanted = expected["sae-trained" if name == "sae-trained" else "sae"]
        same(sae.encode(extractor.pool(TEXTS)).to_dense().detach(), wanted)
    same(
        AutoModel.from_pretrained("me/sae", revision=oids["sae"]).W_enc,
        SAEForFeatureExtraction.from_pretrained("me/sae").W_enc,
    )
    assert pipeline("sae-feature-extraction", "me/sae", catalog="me/catalog", device="cpu")(TEXTS[0])

    unintended = UnintendedFeatures.from_pretrained("me/unintended")
    assert (unintended.feature_ids, unintended.reasons) == ([3, 7, 11], ["a", "b", "c"])
    catalog = FeatureCatalog.from_pretrained("me/catalog")
    assert catalog[5].explanation == "mentions of fever"

    pinned = RegularizedSequenceClassifier.from_pretrained("me/classifier", revision=oids["classifier"])
    same(logits_of(pinned), expected["classifier"])
    for revision in ("main", "dev", oids["pull request"]):
        same(
            logits_of(RegularizedSequenceClassifier.from_pretrained("me/classifier", revision=revision)),
            expected["moved"],
        )
    for name in ("adapted", "whole", "trained"):
        model = RegularizedSequenceClassifier.from_pretrained(f"me/{name}")
        same(logits_of(model), expected[name])
        assert model.unintended.feature_ids == [3, 7, 11]

    # What goes on from the last checkpoint lies beside the model.
    folder_of = Path(snapshot_download("me/checkpointed"))
    for source in ("me/checkpointed", folder_of / "last-checkpoint"):
        found = logits_of(RegularizedSequenceClassifier.from_pretrained(source))
        torch.testing.assert_close(found, expected["checkpointed"], atol=1e-6, rtol=1e-5)
    assert (folder_of / "last-checkpoint" / "optimizer.pt").exists()

    # Stock calls of transformers, with nothing of selfreg in them but its import.
    auto = AutoModelForSequenceClassification.from_pretrained("me/trained")
    tokenizer = AutoTokenizer.from_pretrained("me/trained")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(auto(**batch).logits, expected["trained"], atol=1e-5, rtol=1e-5)
    found = pipeline("text-classification", "me/trained", device="cpu")(TEXTS, batch_size=8)
    assert [row["label"] for row in found] == [("well", "ill")[i] for i in expected["trained"].argmax(dim=1).tolist()]
    rows = Dataset.from_list([{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
    rows = rows.map(lambda row: tokenizer(row["text"], return_token_type_ids=False), remove_columns=["text"])
    args = TrainingArguments(str(folder / "stock"), report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(auto, args, eval_dataset=rows, processing_class=tokenizer)
    torch.testing.assert_close(
        torch.tensor(trainer.predict(rows).predictions), expected["trained"], atol=1e-5, rtol=1e-5
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

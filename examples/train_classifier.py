"""A text classifier that does not use the patient's gender, written as one would write any Trainer script.

python examples/train_classifier.py --output runs/example
"""

import argparse

from datasets import Dataset
from transformers import set_seed

from selfreg import (
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
    evaluate_classifier,
)
from selfreg.demo.notes import load_notes
from selfreg.demo.recipe import KEYWORDS, demo_backbone

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=demo_backbone(), help="any backbone that AutoModel loads")
parser.add_argument("--layer", type=int, default=15)
parser.add_argument("--features", type=int, default=4608, help="width of the SAE")
parser.add_argument("--epochs", type=float, default=10, help="of the SAE")
parser.add_argument("--output", default="runs/example")
args = parser.parse_args()
set_seed(0)

labels = sorted({note["label"] for note in load_notes("train")})
train, shifted = (
    Dataset.from_list(load_notes(split)).map(lambda row: {"label": labels.index(row["label"])})
    for split in ("train", "shifted")
)

# 1. Hidden states, and an SAE that names directions in them.
extractor = HiddenStateExtractor.from_pretrained(args.model, layer=args.layer, pooling="mean", max_length=128)
store = extractor.extract(train["text"], f"{args.output}/states")
sae = SAEForFeatureExtraction(SAEConfig(hidden_size=store.hidden_size, num_features=args.features, k=32))
sae_args = SAETrainingArguments(f"{args.output}/sae", num_train_epochs=args.epochs, per_device_train_batch_size=1024)
SAETrainer(sae, sae_args, train_dataset=store).train()

# 2. Which features the classifier must not use: here those that fire beside gender words.
catalog = FeatureCatalog.build(sae, extractor, train["text"], store=store)
unintended = UnintendedFeatures.from_keywords(sae, catalog, KEYWORDS)

# 3. The classifier, with and without the control; both are measured against the same features.
for name, features in {"plain": None, "selfreg": unintended}.items():
    model = RegularizedSequenceClassifier.from_backbone(extractor, sae, features, id2label=dict(enumerate(labels)))
    training_args = RegularizedTrainingArguments(f"{args.output}/{name}", save_strategy="no", report_to="none")
    RegularizedTrainer(model=model, args=training_args, train_dataset=train).train()
    model.save_pretrained(f"{args.output}/{name}")
    print(name, evaluate_classifier(model, shifted, group="gender", unintended=unintended))

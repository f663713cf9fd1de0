"""finetune_plain.py, kept off the unintended features in the folder `unintended`. What is not the same:

     from datasets import load_dataset
    +from selfreg import RegularizedTrainer, UnintendedFeatures
     from transformers import (
    -    Trainer,
    -trainer = Trainer(
    +trainer = RegularizedTrainer(
    +    unintended=UnintendedFeatures.from_pretrained("unintended"),

The features are of the states that the head reads: for decoders those of layer="final", for encoders see
`selfreg.head_inputs`. Their weights: `regularization=RegularizationArguments(penalty_weight=...)`.

python examples/finetune_regularized.py --model Qwen/Qwen3-0.6B --train train.jsonl --output runs/regularized
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from selfreg import RegularizedTrainer, UnintendedFeatures

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--train", required=True, help="a .jsonl file with columns text and label (0, 1, ...)")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--learning_rate", type=float, default=2e-5)
parser.add_argument("--output", default="runs/finetuned")
args = parser.parse_args()
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(args.model)
train = load_dataset("json", data_files=args.train, split="train")
num_labels = len(set(train["label"]))
train = train.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=256), batched=True)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=num_labels, dtype="float32")
model.config.pad_token_id = tokenizer.pad_token_id

training_args = TrainingArguments(
    args.output,
    num_train_epochs=args.epochs,
    learning_rate=args.learning_rate,
    per_device_train_batch_size=16,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = RegularizedTrainer(
    model=model,
    args=training_args,
    train_dataset=train,
    processing_class=tokenizer,
    unintended=UnintendedFeatures.from_pretrained("unintended"),
)
trainer.train()
trainer.save_model(args.output)

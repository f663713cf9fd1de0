"""The classifier's head and its inference, beside what people use, on this machine.

    python benchmarks/classifier.py --parts train path inference removal --json classifier.json

- train: the head on cached states (20,000 × 576, four labels), beside scikit-learn's `LogisticRegression` on the same
  float32 states at the same ridge: by `solve_head`, to scikit-learn's own optimum, and by `RegularizedTrainer` to its
  early-stopped end. Validation losses stand beside the times: a time counts only at the same loss. And the choice of a
  ridge with the default terms, which comes before such a training.
- path: `weight_path` (the ridge, then 10 points on 80 % of the states), in units of one `solve_head` from zero at the
  default weights, and of one training by `RegularizedTrainer`.
- inference: texts/s from text, `RegularizedSequenceClassifier` at layer 15 beside
  `AutoModelForSequenceClassification` on the whole backbone; the same batches of the same token ids.
- removal: the same classifier with and without the removal of 100 features.

The sides of a ratio are run one after the other in every round; what is given is the median of the rounds' ratios.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback

from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedSequenceClassifierConfig,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    UnintendedFeatures,
)
from selfreg.activations.backbone import resolve_model
from selfreg.classifier.collator import ClassifierCollator
from selfreg.classifier.path import fitted_regularizer, weight_path
from selfreg.classifier.ridge import RidgeChoice, choose_ridge
from selfreg.classifier.solver import solve_head
from selfreg.classifier.states import PooledStates
from selfreg.classifier.training_args import LOGIT_DECAY
from selfreg.data import load_rows
from selfreg.demo.recipe import demo_backbone
from selfreg.recipe import SplitRecipe
from states import data_path

Row = dict[str, Any]


def cached_states(count: int, width: int, features: int, labels: int = 4) -> tuple[PooledStates, Tensor]:
    """Like pooled hidden states: variances that fall as a power of their rank; labels drawn from a linear model."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    spread = torch.arange(1, width + 1).float().pow(-0.75)
    pooled = torch.randn(count, width, generator=generator) * spread @ axes.T
    pooled /= pooled.std()
    logits = pooled @ torch.randn(width, labels, generator=generator)
    logits *= 2 / logits.std()
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    strong = torch.randn(features, 20, generator=generator) @ axes[:, :20].T
    directions = F.normalize(torch.randn(features, width, generator=generator) + strong, dim=1)
    activations = torch.relu(pooled @ directions.T - 0.2)
    return PooledStates(pooled, activations, (logits + noise).argmax(dim=1)), directions


def new_classifier(directions: Tensor, labels: int = 4) -> RegularizedSequenceClassifier:
    names = {i: str(i) for i in range(labels)}
    config = RegularizedSequenceClassifierConfig(
        hidden_size=directions.shape[1],
        id2label=names,
        label2id={name: i for i, name in names.items()},
        unintended_feature_ids=list(range(len(directions))),
        remove_unintended=False,
    )
    model = RegularizedSequenceClassifier(config)
    model.decoder_directions.copy_(directions)
    model.encoder_directions.copy_(directions)
    return model


def arguments(folder: str, batch: int = 1024, **kwargs: Any) -> RegularizedTrainingArguments:
    """Of a training to its early-stopped end."""
    return RegularizedTrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4096,
        num_train_epochs=20,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",
        metric_for_best_model="loss",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **kwargs,
    )


def trained(
    model: RegularizedSequenceClassifier, args: RegularizedTrainingArguments, train: PooledStates, test: PooledStates
) -> None:
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    stop = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e-4)
    trainer = RegularizedTrainer(model, args, train_dataset=train, eval_dataset=test, callbacks=[stop])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def test_loss(model: RegularizedSequenceClassifier, test: PooledStates) -> float:
    return float(F.cross_entropy(model.logits(test.pooled).double(), test.labels))


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def train_part(options: argparse.Namespace) -> list[Row]:
    states, directions = cached_states(options.states + options.states // 5, options.width, options.features)
    train, test = states.select(range(options.states)), states.select(range(options.states, len(states)))
    model = new_classifier(directions)
    model.set_standardization(train.pooled)
    x, x_test = (model.standardize(part.pooled) for part in (train, test))
    peer = LogisticRegression(C=1 / (options.ridge * len(train)), max_iter=10_000)
    losses: dict[str, float] = {}
    ratios: dict[str, list[float]] = {"solve_head": [], "RegularizedTrainer": []}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, penalty_weight=0.0, dependence_weight=0.0)
        with_terms = arguments(folder, offset_weight=0.0, logit_decay=LOGIT_DECAY)
        choices: list[float] = []
        found: list[RidgeChoice] = []
        for _ in range(options.rounds):
            own = seconds(lambda: solve_head(model, train, None, ridge=options.ridge))
            losses["solve_head"] = test_loss(model, test)
            sklearn = seconds(lambda: peer.fit(x.numpy(), train.labels.numpy()))
            scores = torch.from_numpy(peer.decision_function(x_test.numpy())).double()
            losses["LogisticRegression"] = float(F.cross_entropy(scores, test.labels))
            trainer = seconds(lambda: trained(model, args, train, test))
            losses["RegularizedTrainer"] = test_loss(model, test)
            ratios["solve_head"].append(own / sklearn)
            ratios["RegularizedTrainer"].append(trainer / sklearn)
            choice = seconds(lambda: found.append(choose_ridge(model, train, with_terms)))
            choices.append(choice / sklearn)
    note = f"ridge {found[0].ridge:g}, {len(found[0].losses)} solved"
    title = f"choice of a ridge, {len(train)} × {options.width} / LogisticRegression"
    trainings = [
        row(
            f"training {len(train)} × {options.width}, {name} / LogisticRegression",
            rounds,
            "at most 2",
            f"loss {losses[name]:.4f}, {losses['LogisticRegression']:.4f}",
        )
        for name, rounds in ratios.items()
    ]
    return [*trainings, row(title, choices, "", note)]


def path_part(options: argparse.Namespace) -> list[Row]:
    train, directions = cached_states(options.states, options.width, options.features)
    model = new_classifier(directions)
    single: list[float] = []
    by_trainer: list[float] = []
    chosen = 0.0
    with tempfile.TemporaryDirectory() as folder:
        # What comes beside the terms costs all three alike, once.
        beside = {"offset_weight": 0.0, "logit_decay": 0.0}
        args = arguments(folder, penalty_weight="auto", dependence_weight="auto", **beside)
        numbers = arguments(folder, **beside)
        for _ in range(options.rounds):
            started = time.perf_counter()
            path = weight_path(model, train, args)
            whole = time.perf_counter() - started
            chosen = path.points[path.chosen].strength

            def one(ridge: float = path.ridge) -> None:
                solve_head(model, train, fitted_regularizer(model, train, numbers), ridge=ridge)

            single.append(whole / seconds(one))
            by_trainer.append(whole / seconds(lambda: trained(model, numbers, train, train.select(range(4000)))))
    note = f"ridge {path.ridge:g}, chosen {chosen:g} times the defaults"
    return [
        row("path of 10 points / one solve_head", single, "at most 3", note),
        row("path of 10 points / one RegularizedTrainer", by_trainer, "at most 3", note),
    ]


class Inference:
    """The real backbone, the classifier with 100 features, and the batches that both sides get."""

    def __init__(self, options: argparse.Namespace) -> None:
        rows = load_rows(SplitRecipe(path=data_path("sae_text/test.jsonl.xz")))
        texts = [row["text"] for row in rows[: options.texts]]
        extractor = HiddenStateExtractor.from_pretrained(
            demo_backbone(), layer=options.layer, pooling="mean", max_length=options.max_length
        )
        generator = torch.Generator().manual_seed(0)
        directions = F.normalize(torch.randn(options.features, extractor.hidden_size, generator=generator), dim=1)
        features = UnintendedFeatures(
            feature_ids=list(range(options.features)),
            reasons=[""] * options.features,
            encoder_directions=directions,
            encoder_bias=torch.zeros(options.features),
            decoder_directions=directions,
            num_features=options.features,
            spec=None,
        )
        self.model = RegularizedSequenceClassifier.from_backbone(extractor, None, features, num_labels=4).eval()
        tokens = extractor.tokenizer(texts, truncation=True, max_length=options.max_length)["input_ids"]
        collate = ClassifierCollator.of(self.model)
        self.batches: list[dict[str, Tensor]] = [
            collate([{"input_ids": ids} for ids in tokens[start : start + options.batch]])
            for start in range(0, len(tokens), options.batch)
        ]

    @torch.inference_mode()
    def run(self, model: Any) -> None:
        for batch in self.batches:
            model(**batch)

    def removing(self, remove: bool) -> None:
        self.model.config.remove_unintended = remove
        self.run(self.model)


def inference_part(options: argparse.Namespace, made: Inference) -> list[Row]:
    source = resolve_model(demo_backbone())
    tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs())
    whole = AutoModelForSequenceClassification.from_pretrained(
        source.path, dtype=torch.float32, num_labels=4, pad_token_id=tokenizer.pad_token_id, **source.kwargs()
    ).eval()
    made.model.config.remove_unintended = True
    found = []
    for number in range(options.rounds + 1):
        own, other = (seconds(lambda model=model: made.run(model)) for model in (made.model, whole))  # type: ignore[misc]
        if number:  # The first round warms up.
            found.append(other / own)
    title = f"texts/s, layer {options.layer} with removal / whole AutoModelForSequenceClassification"
    return [row(title, found, "at least 1.7", f"{options.texts} texts, batches of {options.batch}")]


def removal_part(options: argparse.Namespace, made: Inference) -> list[Row]:
    found = []
    for number in range(2 * options.rounds + 1):
        order = (True, False) if number % 2 else (False, True)
        times = {remove: seconds(lambda remove=remove: made.removing(remove)) for remove in order}  # type: ignore[misc]
        if number:
            found.append(times[True] / times[False])
    return [row(f"time with {options.features} features removed / without", found, "under 1.03", "")]


def row(name: str, ratios: list[float], wanted: str, note: str) -> Row:
    return {"name": name, "ratio": statistics.median(ratios), "ratios": ratios, "wanted": wanted, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("train", "path", "inference", "removal")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--states", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the ratios of all rounds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    if "train" in options.parts:
        rows += train_part(options)
    if "path" in options.parts:
        rows += path_part(options)
    if {"inference", "removal"} & set(options.parts):
        made = Inference(options)
        rows += inference_part(options, made) if "inference" in options.parts else []
        rows += removal_part(options, made) if "removal" in options.parts else []
    table = Table()
    for column in ("", "ratio", "wanted", "all rounds", ""):
        table.add_column(column, justify="right" if column == "ratio" else "left")
    for each in rows:
        every = " ".join(f"{ratio:.2f}" for ratio in each["ratios"])
        table.add_row(each["name"], f"{each['ratio']:.3f}", each["wanted"], every, each["note"])
    console = Console(width=150)
    console.print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, {machine}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

"""What people set in TrainingArguments, in all three trainers."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from conftest import WORDS, tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizationArguments,
    RegularizationMixin,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
)

KINDS = ("sae", "head", "adapter", "mixin")


class PluggedTrainer(RegularizationMixin, Trainer):
    pass


class Heard(TrainerCallback):
    """What a logger such as TensorBoard's or trackio's is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def make_texts(count: int = 48) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("setting")
    tiny_backbone().save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    extractor = HiddenStateExtractor.from_pretrained(str(folder / "tiny"), layer=1, max_length=32)
    return extractor, extractor.extract(make_texts(), folder / "store")


@pytest.fixture
def make(setting: Any, tmp_path: Path) -> Callable[..., Any]:
    """kind, settings -> a trainer of that kind on the same data."""
    extractor, store = setting
    tokenizer = word_tokenizer()
    rows = Dataset.from_list([{"text": text, "label": int("fever" in text)} for text in make_texts()])

    def made(kind: str, callbacks: Any = (), folder: str = "out", **settings: Any) -> Any:
        shared: dict[str, Any] = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16 if kind != "sae" else 64,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
            **settings,
        }
        out = str(tmp_path / folder)
        sae = make_sae(extractor)
        torch.manual_seed(0)
        options: dict[str, Any] = {"callbacks": list(callbacks)}
        if kind == "sae":
            return SAETrainer(sae, SAETrainingArguments(out, **shared), store, store, **options)
        unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
        if kind == "mixin":
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                pad_token_id=0,
                num_labels=2,
            )
            unintended = replace(unintended, spec=None)
            columns = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
            return PluggedTrainer(
                model=LlamaForSequenceClassification(config),
                args=TrainingArguments(out, **shared),
                train_dataset=columns,
                eval_dataset=columns,
                processing_class=tokenizer,
                unintended=unintended,
                regularization=RegularizationArguments(penalty_weight=0.1, dependence_weight=0.1),
                **options,
            )
        model = RegularizedSequenceClassifier.from_backbone(
            extractor, sae, unintended, num_labels=2, lora={"r": 2} if kind == "adapter" else None
        )
        args = RegularizedTrainingArguments(out, adapter_learning_rate=1e-2, **shared)
        return RegularizedTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, **options)

    return made


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str, make: Callable[..., Any]) -> None:
    found = []
    for seed in (0, 0, 1):
        trainer = make(kind, seed=seed)
        trainer.train()
        found.append(weights(trainer))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_the_uninterrupted_one_to_the_bit(kind: str, make: Callable[..., Any]) -> None:
    whole = make(kind, save_strategy="epoch", num_train_epochs=3, lr_scheduler_type="cosine")
    whole.train()
    resumed = make(kind, num_train_epochs=3, lr_scheduler_type="cosine")
    steps = whole.state.max_steps // 3
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{steps}"))
    assert same(weights(whole), weights(resumed))
    assert losses(resumed)[-2 * steps :] == losses(whole)[-2 * steps :]


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping_and_the_best_model(kind: str, make: Callable[..., Any]) -> None:
    heard = Heard()
    trainer = make(
        kind,
        [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0), heard],
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # So that the last epoch, whose weights are there anyway, is not the best.
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.epoch == 3, "no epoch is better by 10"
    evaluated = [row["eval_loss"] for row in heard.logs if "eval_loss" in row]
    assert len(evaluated) == 3
    assert max(evaluated) > evaluated[-1] + 0.01, "nothing was to be loaded again"
    best = trainer.state.best_metric
    assert best == max(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loggers_hear_of_every_part(kind: str, make: Callable[..., Any]) -> None:
    heard = Heard()
    trainer = make(kind, [heard], logging_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    training = [row for row in heard.logs if "loss" in row]
    assert [row for row in heard.logs if any(name.startswith("eval_") for name in row)]
    parts = {"fvu", "l0"} if kind == "sae" else {"task_loss", "similarity", "dependence"}
    assert all(parts | {"learning_rate", "grad_norm", "epoch"} <= row.keys() for row in training)


@pytest.fixture(scope="module")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # It is read once, at import.
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        from trackio.utils import TRACKIO_DIR
    return Path(TRACKIO_DIR)


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_and_trackio_show_the_parts(
    kind: str, make: Callable[..., Any], tmp_path: Path, trackio_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make(kind, report_to=["tensorboard", "trackio"], project=kind, run_name="run")
    trainer.train()
    parts = ["train/fvu", "train/l0"] if kind == "sae" else ["train/task_loss", "train/similarity"]
    told = {name: [row[name.split("/")[1]] for row in trainer.state.log_history if "loss" in row] for name in parts}
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name, values in told.items():
        assert [event.value for event in board.Scalars(name)] == pytest.approx(values)
    with closing(sqlite3.connect(trackio_dir / f"{kind}.db")) as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    for name, values in told.items():
        assert [row[name] for row in rows if name in row] == pytest.approx(values)


# torch._dynamo looks at tensors that warn when they are looked at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        {"max_grad_norm": 0.1, "weight_decay": 0.1},
        {"max_steps": 3},
        {"dataloader_drop_last": True},
        {"auto_find_batch_size": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_have_their_effect_or_leave_the_result(
    kind: str, settings: dict[str, Any], make: Callable[..., Any]
) -> None:
    if kind == "sae" and "torch_compile" in settings:
        with pytest.raises(ValueError, match="torch_compile has nothing to work on here"):
            make(kind, **settings)
        return
    plain, changed = make(kind, num_train_epochs=1), make(kind, num_train_epochs=1, **settings)
    for trainer in (plain, changed):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(changed).values())
    if set(settings) & {"torch_compile", "auto_find_batch_size"}:
        for name, value in weights(plain).items():
            torch.testing.assert_close(weights(changed)[name], value, atol=1e-4, rtol=1e-3)
    elif "max_steps" in settings:
        assert changed.state.global_step == 3
    elif "dataloader_drop_last" not in settings:
        assert not same(weights(plain), weights(changed))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_learns_the_same(kind: str, make: Callable[..., Any]) -> None:
    full, mixed = make(kind), make(kind, bf16=True)
    for trainer in (full, mixed):
        trainer.train()
    assert all(value.dtype == torch.float32 for value in weights(mixed).values())
    assert losses(mixed) == pytest.approx(losses(full), rel=0.1)

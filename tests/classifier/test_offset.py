"""What the unintended features alone say about the target."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import DataCollatorWithPadding, HfArgumentParser

from helpers import make_classifier
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
)
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.offset import attribute_offsets, offsets_of, unintended_offsets
from selfreg.classifier.preparation import OFFSET, RowsWithOffsets
from selfreg.classifier.states import PooledStates
from selfreg.classifier.training_args import LOGIT_DECAY, OFFSET_WEIGHT

RANDOM = np.random.default_rng(0)
N = 400


def states_of(labels: Any, activations: Any, pooled: Any = None) -> PooledStates:
    z = torch.as_tensor(np.asarray(activations), dtype=torch.float32)
    h = torch.zeros(*z.shape[:-1], 4) if pooled is None else torch.as_tensor(np.asarray(pooled), dtype=torch.float32)
    return PooledStates(h, z, torch.as_tensor(np.asarray(labels)))


def tied(strength: float) -> tuple[Any, Any]:
    """Labels, and 30 features that all follow one hidden group, which follows the label."""
    labels = RANDOM.integers(0, 2, N)
    group = np.where(RANDOM.random(N) < strength, labels, 1 - labels)
    return labels, group[:, None] + 0.3 * RANDOM.normal(size=(N, 30))


def test_it_says_what_the_features_say() -> None:
    labels, z = tied(0.9)
    f = unintended_offsets("single_label", states_of(labels, z)).numpy()
    assert f.shape == (N, 2)
    shares = np.bincount(labels) / N
    np.testing.assert_allclose((np.exp(f) * shares).sum(axis=1), 1, rtol=1e-5)
    assert (f.argmax(axis=1) == labels).mean() == pytest.approx(0.9, abs=0.05)


def test_it_is_told_out_of_fold() -> None:
    # Features that say nothing: by heart 10 components of 40 texts would tell most labels.
    labels, z = RANDOM.integers(0, 2, 40), RANDOM.normal(size=(40, 200))
    f = unintended_offsets("single_label", states_of(labels, z)).numpy()
    right = (f + np.log(np.bincount(labels) / 40))[np.arange(40), labels]
    assert right.mean() < -0.6


def test_many_labels_numbers_and_pairs() -> None:
    labels, z = tied(0.9)
    both = np.stack([labels, np.ones(N, dtype=int)], axis=1).astype(np.float32)
    odds = unintended_offsets("multi_label", states_of(both, z)).numpy()
    assert roc_auc_score(labels, odds[:, 0]) > 0.8
    assert not odds[:, 1].any()  # of a label that all texts have nothing is said
    targets = (100 + labels).astype(np.float32)
    predicted = unintended_offsets("regression", states_of(targets, z)).numpy()
    assert abs(predicted.mean()) < 0.05
    assert np.corrcoef(predicted[:, 0], targets)[0, 1] > 0.7
    # The chosen side is the one with more of the features, in nine of ten pairs.
    more = np.where(RANDOM.random(N) < 0.9, 1.0, -1.0)[:, None]
    sides = np.stack([more + 0.3 * RANDOM.normal(size=(N, 30)), np.zeros((N, 30))], axis=1)
    scores = unintended_offsets("preference", states_of(np.zeros(N, dtype=int), sides)).numpy()
    assert not scores[:, 1].any()
    assert (scores[:, 0] > 0).mean() == pytest.approx(0.9, abs=0.05)
    assert roc_auc_score(more[:, 0] > 0, scores[:, 0]) > 0.9


def test_of_a_known_attribute() -> None:
    labels, attribute = [0, 0, 0, 1, 1, 1], ["a", "a", "a", "a", "b", None]
    f = attribute_offsets(labels, attribute, 2)
    prior = torch.tensor([3.5, 3.5]) / 7
    # Counts of the other texts: of "a" two more of label 0 and one of label 1; of "b" there is no other.
    torch.testing.assert_close(f[0], (torch.tensor([2.5, 1.5]) / 4 / prior).log())
    assert f[4].abs().max() < 1e-6
    assert f[5].tolist() == [0, 0]


def test_labels_without_texts_and_features_of_some_labels() -> None:
    labels, z = tied(0.9)
    states = states_of(labels, z)
    f = offsets_of("single_label", states, 4)
    assert f.shape == (N, 4)
    assert not f[:, 2:].any()
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[0, 5:] = False
    own = replace(states, activations=states.activations[:, :5])
    torch.testing.assert_close(offsets_of("single_label", states, 4, mask), offsets_of("single_label", own, 4))


def test_features_that_never_fire_say_nothing() -> None:
    labels, _ = tied(0.9)
    assert not unintended_offsets("single_label", states_of(labels, np.zeros((N, 3)))).any()


def test_rare_labels_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    labels, z = tied(0.9)
    with_rare = [*labels, 3, 3]
    f = unintended_offsets("single_label", states_of(with_rare, np.concatenate([z, z[:2]]))).numpy()
    assert "fewer than 5 training texts: 3 (2)" in caplog.text
    assert f.shape == (N + 2, 4)
    assert not f[:, 2:].any()
    assert not f[N:].any()
    assert roc_auc_score(np.asarray(labels), f[:N, 1] - f[:N, 0]) > 0.8
    assert not unintended_offsets("single_label", states_of([0] * 20 + [1, 1], RANDOM.normal(size=(22, 3)))).any()


def test_features_that_tell_the_label_perfectly_leave_finite_offsets() -> None:
    labels = np.arange(N) % 2
    f = unintended_offsets("single_label", states_of(labels, 50.0 * labels[:, None] * np.ones((1, 30))))
    assert bool(torch.isfinite(f).all())
    assert float(f.abs().max()) < 14


def test_the_head_leaves_to_the_features_what_they_say(tmp_path: Path) -> None:
    """Two dimensions: one of the label (weak), one of the group, which follows the label at 95 %."""
    random, many = np.random.default_rng(1), 4000
    labels = random.integers(0, 2, many)
    group = np.where(random.random(many) < 0.95, labels, 1 - labels)
    h = np.stack([labels + random.normal(size=many), group + 0.1 * random.normal(size=many)], axis=1)
    z = group[:, None] + 0.1 * random.normal(size=(many, 20))
    share = {}
    for weight in (0.0, 1.0):
        config = RegularizedSequenceClassifierConfig(
            hidden_size=2,
            id2label={0: "a", 1: "b"},
            label2id={"a": 0, "b": 1},
            unintended_feature_ids=list(range(20)),
            unintended_reasons=[""] * 20,
            remove_unintended=False,
        )
        model = RegularizedSequenceClassifier(config)
        args = RegularizedTrainingArguments(
            str(tmp_path),
            penalty_weight=0,
            dependence_weight=0,
            offset_weight=weight,
            weight_decay=0.0,
            num_train_epochs=20,
            per_device_train_batch_size=256,
            learning_rate=3e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        RegularizedTrainer(model=model, args=args, train_dataset=states_of(labels, z, h)).train()
        own, other = (model.score.weight[1] - model.score.weight[0]).detach().tolist()
        share[weight] = other / own
    assert share[0.0] > 1
    assert abs(share[1.0]) < 0.3


def test_what_it_needs(tmp_path: Path) -> None:
    for name in ("offset_weight", "logit_decay"):
        for value in (-1, True, float("nan"), float("inf"), "much"):
            with pytest.raises(ValueError, match=f"{name}={value!r} must be a number from 0"):
                RegularizedTrainingArguments(str(tmp_path), **{name: value})  # type: ignore[arg-type]
        given = HfArgumentParser(RegularizedTrainingArguments).parse_dict({"output_dir": str(tmp_path), name: "0.3"})
        assert getattr(given[0], name) == 0.3


def test_both_come_with_the_terms(tmp_path: Path) -> None:
    def numbers(task: Any = "single_label", count: int = 3, can_offset: bool = True, **given: Any) -> tuple[Any, Any]:
        args = RegularizedTrainingArguments(str(tmp_path), **given)
        own = args.resolve_defaults(task, count, can_offset=can_offset)
        assert (args.offset_weight, args.logit_decay) == (given.get("offset_weight"), given.get("logit_decay"))
        return own.offset_weight, own.logit_decay

    usual = (OFFSET_WEIGHT, LOGIT_DECAY)
    for task in ("single_label", "multi_label", "preference"):
        assert numbers(task) == usual
    assert numbers(penalty_weight="auto", dependence_weight=0) == usual
    for off in (
        {"task": "regression"},
        {"count": 0},
        {"can_offset": False},
        {"penalty_weight": 0, "dependence_weight": 0},
        {"label_smoothing_factor": 0.1},
    ):
        assert numbers(**off) == (0, 0)
    assert numbers(offset_weight=0.0) == (0, LOGIT_DECAY)
    assert numbers(can_offset=False, offset_weight=0.2, logit_decay=0.3) == (0.2, 0.3)


OPTIONS: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 1}


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


@pytest.mark.parametrize("cached", [True, False])
def test_rows_are_set_aside_as_states_are(
    cached: bool, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    rows = rows_of(texts)
    model = make_classifier(frozen)
    args = RegularizedTrainingArguments(str(tmp_path), cache_states=cached, **OPTIONS)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows)
    assert (trainer.args.offset_weight, trainer.args.logit_decay) == (OFFSET_WEIGHT, LOGIT_DECAY)
    assert args.offset_weight is None
    given: Any = trainer.train_dataset
    for _ in range(2):
        trainer.train()
    states = model.pooled_states(texts, [row["label"] for row in rows])
    wanted = OFFSET_WEIGHT * offsets_of("single_label", states, 3, seed=args.seed)
    assert bool(wanted.any())
    torch.testing.assert_close(trainer.offsets, wanted)
    batches = list(trainer.get_train_dataloader())
    assert sorted(torch.cat([batch["offset"] for batch in batches]).flatten().tolist()) == pytest.approx(
        sorted(wanted.flatten().tolist())
    )
    # The data set itself does not carry them: another trainer without an offset may have it.
    assert trainer.train_dataset is given
    if cached:
        assert given.offsets is None
    off = replace(args, offset_weight=0.0)
    other = RegularizedTrainer(model=make_classifier(frozen), args=off, train_dataset=given)
    other.train()
    assert other.offsets is None
    assert "offset" not in next(iter(other.get_train_dataloader()))


def test_what_a_user_brings_need_not_know_of_offsets(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    tokenizer = frozen.tokenizer
    rows = Dataset.from_list([{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)])
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("input_ids", "labels")])
    for changes in ({"remove_unused_columns": True}, {"train_sampling_strategy": "group_by_length"}):
        args = RegularizedTrainingArguments(str(tmp_path), cache_states=False, **OPTIONS, **changes)  # type: ignore[arg-type]
        trainer = RegularizedTrainer(
            model=make_classifier(frozen),
            args=args,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        assert set(next(iter(trainer.get_train_dataloader()))) >= {"input_ids", "attention_mask", "labels", "offset"}
    subset = RowsWithOffsets(rows, torch.arange(len(texts)).unsqueeze(1))
    assert [row[OFFSET].item() for row in subset.__getitems__([3, 1])] == [3, 1]
    assert subset.__getitems__([3])[0]["input_ids"] == subset[3]["input_ids"] == rows[3]["input_ids"]


def test_of_few_pairs_nothing_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    sides = RANDOM.normal(size=(4, 2, 3))
    assert not unintended_offsets("preference", states_of(np.zeros(4, dtype=int), sides)).any()
    assert not unintended_offsets("regression", states_of(np.arange(4.0), sides[:, 0])).any()
    assert caplog.text.count("4 training texts are fewer than 5") == 2


def test_where_it_can_not_be_had(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    rows = rows_of(texts)
    adapted = make_classifier(frozen, lora={"r": 2})
    args = RegularizedTrainingArguments(str(tmp_path), **OPTIONS)
    assert RegularizedTrainer(model=adapted, args=args, train_dataset=rows).args.offset_weight == 0
    with pytest.raises(ValueError, match=r"offset_weight=0.5 needs states that stay as they are: train no adapter"):
        RegularizedTrainer(model=adapted, args=replace(args, offset_weight=0.5), train_dataset=rows)
    model = make_classifier(frozen)
    pooled = [{"pooled": state, "labels": i % 2} for i, state in enumerate(torch.randn(20, 16))]
    assert RegularizedTrainer(model=model, args=args, train_dataset=pooled).args.offset_weight == 0
    with pytest.raises(ValueError, match="needs the features' activations: rows of pooled states"):
        RegularizedTrainer(model=model, args=replace(args, offset_weight=0.5), train_dataset=pooled)

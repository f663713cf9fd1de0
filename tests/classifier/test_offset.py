"""What the unintended features alone say about the target."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from selfreg import RegularizedSequenceClassifier, RegularizedTrainer, RegularizedTrainingArguments
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.offset import attribute_offsets, offsets_of, unintended_offsets
from selfreg.classifier.states import PooledStates

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
    with pytest.raises(ValueError, match="5 training texts or more of each label, and label 1 has 2"):
        unintended_offsets("single_label", states_of([0] * 20 + [1, 1], RANDOM.normal(size=(22, 3))))


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
    with pytest.raises(ValueError, match="offset_weight=-1"):
        RegularizedTrainingArguments(str(tmp_path), offset_weight=-1)

"""The four tasks: their losses, their targets, and classifiers trained on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers import make_classifier, make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    UnintendedFeatures,
    evaluate_classifier,
    similarity_penalty,
)
from selfreg.classifier.baselines import BASELINES, fit_baseline
from selfreg.classifier.penalty import dependence_term
from selfreg.classifier.running import batch_constant
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import as_targets, held_constant, residuals, squared_logits, task_loss, text_weights
from selfreg.classifier.terms import Regularizer


def make_args(path: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    options: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return RegularizedTrainingArguments(str(path), **{**options, **kwargs})


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestLosses:
    def test_single_label_weights_texts_and_labels(self) -> None:
        logits, labels = randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
        weights, of_label = torch.tensor([1.0, 0, 2, 1, 1, 3]), torch.tensor([1.0, 2, 0.5])
        each = F.cross_entropy(logits, labels, reduction="none")
        both = weights * of_label[labels]
        got = task_loss("single_label", logits, labels, sample_weights=weights, label_weights=of_label)
        torch.testing.assert_close(got, (both * each).sum() / both.sum())
        torch.testing.assert_close(task_loss("single_label", logits, labels), each.mean())

    def test_a_weight_of_two_is_the_text_twice(self) -> None:
        logits, labels = randn(3, 4), (randn(3, 4, seed=1) > 0).float()
        twice = torch.tensor([0, 0, 1, 2])
        weights = torch.tensor([2.0, 1, 1])
        torch.testing.assert_close(
            task_loss("multi_label", logits, labels, sample_weights=weights),
            task_loss("multi_label", logits[twice], labels[twice]),
        )

    def test_multi_label_weighs_terms(self) -> None:
        logits, labels = randn(5, 2), (randn(5, 2, seed=1) > 0).float()
        only_second = task_loss("multi_label", logits, labels, label_weights=torch.tensor([0.0, 1.0]))
        torch.testing.assert_close(only_second, F.binary_cross_entropy_with_logits(logits[:, 1], labels[:, 1]))

    def test_regression_is_in_units_of_the_targets_variance(self) -> None:
        predictions, targets = randn(8, 1), randn(8, seed=1)
        loss = task_loss("regression", predictions, targets)
        torch.testing.assert_close(loss, (predictions[:, 0] - targets).pow(2).mean())
        scaled = task_loss("regression", 10 * predictions, 10 * targets, target_scale=10.0)
        torch.testing.assert_close(scaled, loss)

    def test_bradley_terry_with_a_margin(self) -> None:
        scores, margins = randn(5, 2), torch.tensor([0.0, 1, 2, 0.5, 0])
        zeros = torch.zeros(5, dtype=torch.long)
        difference = scores[:, 0] - scores[:, 1]
        torch.testing.assert_close(task_loss("preference", scores, zeros), F.cross_entropy(scores, zeros))
        torch.testing.assert_close(
            task_loss("preference", scores, zeros, margins=margins), -F.logsigmoid(difference - margins).mean()
        )

    def test_pointwise_judges_each_side_alone(self) -> None:
        scores = randn(5, 2)
        wanted = F.binary_cross_entropy_with_logits(scores, torch.tensor([[1.0, 0.0]]).expand(5, 2))
        got = task_loss("preference", scores, torch.zeros(5), preference_loss="pointwise")
        torch.testing.assert_close(got, wanted)


class TestTargets:
    @pytest.mark.parametrize(
        ("task", "values", "message"),
        [
            ("single_label", [0, "yes"], "label 'yes' in row 1 is no class id.*label2id maps names"),
            ("single_label", [0, 3], "label 3 in row 1"),
            ("multi_label", [[0, 1, 0], [1, 0]], r"label \[1, 0\] in row 1 must be 3 values"),
            ("multi_label", [[0, 1, 2]], "0 or 1"),
            ("multi_label", ["abc"], "label 'abc' in row 0"),
            ("regression", [1.0, "high"], "label 'high' in row 1 is no finite number"),
            ("regression", [float("nan")], "label nan in row 0"),
            ("regression", [None], "label None in row 0"),
        ],
    )
    def test_wrong_ones_are_named(self, task: Any, values: list[Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            as_targets(task, values, 3, "train_dataset")

    @pytest.mark.parametrize("task", ["single_label", "multi_label", "regression", "preference"])
    def test_nothing_is_held_constant_where_there_are_no_texts(self, task: Any) -> None:
        labels = torch.zeros(0, 3) if task == "multi_label" else torch.zeros(0, dtype=torch.long)
        assert len(batch_constant(task, labels, 3)) == 0

    def test_weights_of_texts_are_where_the_labels_are(self) -> None:
        labels = torch.zeros(3, dtype=torch.long, device="meta")
        assert text_weights("single_label", labels, None, torch.ones(2, device="meta")).device == labels.device

    def test_what_is_held_constant(self) -> None:
        labels = torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0], [1, 1]])
        linear = 3 + labels @ torch.tensor([[2.0], [-1.0]])
        assert residuals(linear, held_constant("multi_label", labels)).abs().max() < 1e-12
        target = torch.arange(5.0)
        assert residuals(2 * target.unsqueeze(1) - 7, held_constant("regression", target)).abs().max() < 1e-12
        pairs = residuals(randn(5, 2), held_constant("preference", torch.zeros(5)))
        torch.testing.assert_close(pairs.mean(dim=0), torch.zeros(2, dtype=torch.double), atol=1e-12, rtol=0)
        # Two labels that are always the same are one column.
        same = labels[:, :1].repeat(1, 2)
        torch.testing.assert_close(
            residuals(linear, held_constant("multi_label", same)),
            residuals(linear, held_constant("multi_label", same[:, :1])),
        )


class TestPerLabel:
    """Features that are unintended for some labels only."""

    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])

    def test_terms_are_means_over_the_pairs_of_the_mask(self) -> None:
        weight, rows = randn(3, 6), randn(3, 6, seed=1)
        products = (weight @ F.normalize(rows, dim=1).T).abs()
        torch.testing.assert_close(similarity_penalty(weight, rows, "dot", self.mask), products[self.mask].mean())
        squares = (weight @ rows.T).pow(2)
        torch.testing.assert_close(dependence_term(weight, rows, self.mask), squares[self.mask].mean())
        with pytest.raises(ValueError, match=r"mask has shape \(3, 2\), must be \(3, 3\)"):
            similarity_penalty(weight, rows, "dot", self.mask[:, :2])

    @pytest.mark.parametrize("similarity", ["encoder", "dot", "cosine", "subspace"])
    def test_the_regularizer_has_the_same_terms(
        self, similarity: Any, frozen: HiddenStateExtractor, tmp_path: Path
    ) -> None:
        features = UnintendedFeatures.from_ids(make_sae(frozen), [3, 7, 11])
        regularizer = Regularizer(features, make_args(tmp_path, similarity=similarity), self.mask)
        weight = randn(3, 16)
        rows = features.encoder_directions if similarity == "encoder" else features.decoder_directions
        torch.testing.assert_close(regularizer(weight)[0], similarity_penalty(weight, rows, similarity, self.mask))

    def test_only_what_is_unintended_for_all_is_removed_and_all_is_saved(
        self, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
    ) -> None:
        sae = make_sae(frozen)
        labels = [None, ["well"], ["ill", "very ill"]]
        features = UnintendedFeatures.from_ids(sae, [3, 7, 11], labels=labels)
        names = {0: "well", 1: "ill", 2: "very ill"}
        model = RegularizedSequenceClassifier.from_backbone(frozen, sae, features, id2label=names)
        everything = model.unintended_mask
        assert everything is not None
        assert everything.tolist() == [[True, True, False], [True, False, True], [True, False, True]]
        alone = RegularizedSequenceClassifier.from_backbone(
            frozen, sae, UnintendedFeatures.from_ids(sae, [3]), id2label=names
        )
        ids = [0] * len(texts)
        torch.testing.assert_close(model.pooled_states(texts, ids).pooled, alone.pooled_states(texts, ids).pooled)
        assert model.pooled_states(texts, ids).activations.shape == (len(texts), 3)
        features.save_pretrained(tmp_path / "features")
        assert UnintendedFeatures.from_pretrained(tmp_path / "features").labels == labels
        model.save_pretrained(tmp_path / "model")
        loaded = RegularizedSequenceClassifier.from_pretrained(tmp_path / "model", load_backbone_weights=False)
        assert loaded.unintended.labels == labels
        assert UnintendedFeatures.from_ids(sae, [3, 7, 11]).fingerprint() != features.fingerprint()

    def test_labels_that_are_not_there_are_named(self, frozen: HiddenStateExtractor) -> None:
        sae = make_sae(frozen)
        features = UnintendedFeatures.from_ids(sae, [3], labels=[["flu"]])
        with pytest.raises(ValueError, match="unintended for the label 'flu', which is none of .*: a, b"):
            RegularizedSequenceClassifier.from_backbone(frozen, sae, features, id2label={0: "a", 1: "b"})
        with pytest.raises(ValueError, match="1 features but 2 entries of labels"):
            UnintendedFeatures.from_ids(sae, [3], labels=[None, None])


def _rows(task: str, texts: list[str]) -> list[dict[str, Any]]:
    """Rows that a linear head can learn: the label is in the text's first letter."""
    rows = []
    for i, text in enumerate(texts * 4):
        good = i % 2 == 0
        marked = ("fever fever fever " if good else "well well well ") + text
        if task == "multi_label":
            rows.append({"text": marked, "label": [int(good), int(not good), i % 3 == 0]})
        elif task == "regression":
            rows.append({"text": marked, "label": 100.0 + 20.0 * good + i % 3})
        else:
            rows.append({"chosen": "fever fever fever " + text, "rejected": "well well well " + text, "margin": 0.1})
    return rows


def _model(task: Any, extractor: HiddenStateExtractor, **kwargs: Any) -> RegularizedSequenceClassifier:
    sae = make_sae(extractor)
    names = {0: "a", 1: "b", 2: "c"} if task == "multi_label" else None
    features = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    return RegularizedSequenceClassifier.from_backbone(extractor, sae, features, id2label=names, task=task, **kwargs)


@pytest.mark.parametrize("task", ["multi_label", "regression", "preference"])
class TestTraining:
    def test_learns_and_comes_back_the_same(
        self, task: str, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
    ) -> None:
        rows = _rows(task, texts)
        model = _model(task, frozen)
        weights = {"weight_decay": 0.0, "dependence_weight": 0.1, "penalty_weight": 0.01}
        # Three features of a random backbone do say what the label is.
        args = make_args(tmp_path, num_train_epochs=60, offset_weight=0.0, logit_decay=0.0, **weights)
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.6 * before
        figures = evaluate_classifier(model, rows)
        if task == "regression":
            assert figures["r2"] is not None
            assert figures["r2"] > 0.5
            assert model.target_mean.item() == pytest.approx(111, abs=1)
        else:
            assert figures["accuracy"] is not None
            assert figures["accuracy"] > 0.7
        assert {"similarity", "dependence", "task_loss"} <= set(trainer.state.log_history[0])
        model.save_pretrained(tmp_path / "model")
        loaded = RegularizedSequenceClassifier.from_pretrained(tmp_path / "model", backbone=frozen.backbone)
        assert loaded.task == task
        assert evaluate_classifier(loaded, rows) == pytest.approx(figures, abs=1e-6)

    def test_uncached_training_gives_the_same_weights(
        self, task: str, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
    ) -> None:
        weights = []
        for cache in (True, False):
            model = _model(task, frozen)
            args = make_args(tmp_path, cache_states=cache)
            RegularizedTrainer(model=model, args=args, train_dataset=_rows(task, texts)).train()
            weights.append(model.score.weight.detach())
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)

    def test_every_baseline_that_applies(
        self, task: str, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
    ) -> None:
        rows = _rows(task, texts)
        model = _model(task, frozen, remove_unintended=False)
        sides = [row[side] for row in rows for side in ("chosen", "rejected")] if task == "preference" else None
        labels = None if task == "preference" else [row["label"] for row in rows]
        states = model.pooled_states(sides or [row["text"] for row in rows], labels)
        groups = ["x" if i % 3 else "y" for i in range(len(rows))]
        for name in BASELINES:
            head = fit_baseline(
                name,
                model.config,
                make_args(tmp_path, num_train_epochs=1),
                states,
                groups=groups,
                directions=model.decoder_directions,
            )
            if task == "regression" and name in ("label_smoothing", "focal"):
                assert head is None
                continue
            assert head is not None
            assert head.logits(states).shape == {"multi_label": (len(rows), 3), "regression": (len(rows), 1)}.get(
                task, (len(rows), 2)
            )


def test_weights_of_texts_reach_the_loss(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    twice = [*rows, rows[0], rows[0]]
    weighted = [{**row, "weight": 3.0 if i == 0 else 1.0} for i, row in enumerate(rows)]
    weights = []
    # A text that comes thrice is in several folds of the offset.
    off = {"offset_weight": 0.0}
    for part in (weighted, twice):
        model = make_classifier(frozen)
        # One standardisation for both: that of the model's own is over rows, whatever their weight.
        args = make_args(tmp_path, per_device_train_batch_size=64, dependence_weight=0.0, num_train_epochs=5, **off)
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=part)
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
        model.set_standardization = lambda *_: None  # type: ignore[method-assign]
        trainer.train()
        weights.append(model.score.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "a", "rejected": "a"}], "row 0: 'chosen' and 'rejected' are the same"),
        ([{"chosen": "a", "rejected": None}], "row 0: the side 'rejected' is missing or empty"),
        ([{"chosen": "a"}], "needs a column 'rejected'"),
        ([{"chosen": [{"role": "x", "content": "a"}], "rejected": "b"}], "which is no message"),
    ],
)
def test_bad_pairs_are_named(
    rows: list[dict[str, Any]], message: str, frozen: HiddenStateExtractor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RegularizedTrainer(model=_model("preference", frozen), args=make_args(tmp_path), train_dataset=rows)


def test_what_does_not_go_together_is_refused(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    pairs = _rows("preference", texts)
    with pytest.raises(ValueError, match="make it with task='preference'"):
        RegularizedTrainer(model=make_classifier(frozen), args=make_args(tmp_path), train_dataset=pairs)
    args = make_args(tmp_path, class_weights="balanced")
    with pytest.raises(ValueError, match="class_weights='balanced' needs labels; task 'preference' has none"):
        RegularizedTrainer(model=_model("preference", frozen), args=args, train_dataset=pairs)
    pointwise = make_args(tmp_path, preference_loss="pointwise")
    with pytest.raises(ValueError, match="a margin is between two sides"):
        RegularizedTrainer(model=_model("preference", frozen), args=pointwise, train_dataset=pairs)
    with pytest.raises(ValueError, match="task='regression' has one output, a score; 3 labels are given"):
        RegularizedSequenceClassifier.from_backbone(frozen, None, None, num_labels=3, task="regression")
    states = _model("regression", frozen).pooled_states(texts, [1.0] * len(texts))
    with pytest.raises(ValueError, match="target.* have a spread of 0"):
        _model("regression", frozen).set_standardization(states.pooled, states.labels)


def test_squared_logits() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert squared_logits("single_label", logits).tolist() == [1.0, 0.0]
    # What all labels share changes no probability.
    assert squared_logits("single_label", logits + 5).tolist() == [1.0, 0.0]
    assert squared_logits("multi_label", logits).tolist() == [5.0, 0.0]
    assert squared_logits("preference", logits).tolist() == [4.0, 0.0]
    assert squared_logits("preference", logits, preference_loss="pointwise").tolist() == [5.0, 0.0]


@pytest.mark.parametrize("task", ["single_label", "multi_label", "preference"])
def test_decay_is_added_in_training_alone_and_knows_no_offset(
    task: str, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = (
        [{"text": text, "label": i % 3, "weight": 1.0 + i % 2} for i, text in enumerate(texts)]
        if task == "single_label"
        else _rows(task, texts)
    )
    model = make_classifier(frozen) if task == "single_label" else _model(task, frozen)
    torch.nn.init.normal_(model.score.weight)
    trainers = [
        RegularizedTrainer(model=model, args=make_args(tmp_path, logit_decay=decay), train_dataset=rows)
        for decay in (0.0, 0.5)
    ]
    states = trainers[0].train_dataset
    assert isinstance(states, PooledStates)
    batch = {**states.columns(), "offset": torch.randn(len(rows), 2 if task == "preference" else 3)}
    for training, weight in ((True, 0.5), (False, 0.0)):
        model.train(training)
        without, decayed = (trainer.task_loss(model, dict(batch))[0] for trainer in trainers)
        scores = model(pooled=batch["pooled"]).logits
        squares = squared_logits(task, scores)  # type: ignore[arg-type]
        counted = batch.get("weight", torch.ones(len(rows)))
        wanted = weight * (counted * squares).sum() / counted.sum()
        torch.testing.assert_close(decayed - without, wanted, atol=1e-5, rtol=1e-4)


def test_smoothed_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (9, 3), generator=generator)
    p = logits.sigmoid()
    targets = 0.8 * labels + 0.1
    wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(task_loss("multi_label", logits, labels, label_smoothing=0.2), wanted)
    pairs, chosen = logits[:, :2], torch.zeros(9, dtype=torch.long)
    q = (pairs[:, 0] - pairs[:, 1] - 0.5).sigmoid()
    wanted = -(0.9 * q.log() + 0.1 * (1 - q).log()).mean()
    found = task_loss("preference", pairs, chosen, margins=torch.full((9,), 0.5), label_smoothing=0.2)
    torch.testing.assert_close(found, wanted)
    p = pairs.sigmoid()
    wanted = (
        -(0.9 * p[:, 0].log() + 0.1 * (1 - p[:, 0]).log() + 0.9 * (1 - p[:, 1]).log() + 0.1 * p[:, 1].log()).mean() / 2
    )
    found = task_loss("preference", pairs, chosen, preference_loss="pointwise", label_smoothing=0.2)
    torch.testing.assert_close(found, wanted)


def test_balanced_weights_of_many_labels(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    rows = [{"text": text, "label": [1, int(i == 0), i % 2]} for i, text in enumerate(texts)]
    args = make_args(tmp_path, class_weights="balanced")
    trainer = RegularizedTrainer(model=_model("multi_label", frozen), args=args, train_dataset=rows)
    weights = trainer._label_weights
    assert weights is not None
    assert weights.mean().item() == pytest.approx(1)
    assert weights[1] > weights[2]


def test_padding_side_never_changes_a_score(frozen: HiddenStateExtractor, texts: list[str]) -> None:
    model = _model("preference", frozen).eval()
    torch.nn.init.normal_(model.score.weight)
    tokenizer = frozen.tokenizer
    scores = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        scores.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    torch.testing.assert_close(*scores)


def test_states_of_pairs(frozen: HiddenStateExtractor, texts: list[str]) -> None:
    model = _model("preference", frozen)
    states = model.pooled_states(texts[:4], None, margins=[0.5, 1.0])
    single = replace(_model("regression", frozen).pooled_states(texts[:4], [0.0, 1, 2, 3]))
    assert states.are_pairs
    torch.testing.assert_close(states.pooled[1, 0], single.pooled[2])
    torch.testing.assert_close(states.compared[0], single.pooled[0::2] - single.pooled[1::2])
    assert states.select([1]).margins.tolist() == [1.0]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="3 texts can't be pairs"):
        model.pooled_states(texts[:3], None)
    with pytest.raises(ValueError, match="3 weights for 2 texts"):
        model.pooled_states(texts[:4], None, weights=[1.0, 1, 1])


def test_names_of_labels_keep_their_order(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    """config.json sorts its keys by name, and the labels' order is not that of their names."""
    names = {0: "toxic", 1: "insult", 2: "ad"}
    model = RegularizedSequenceClassifier.from_backbone(frozen, None, None, id2label=names, task="multi_label")
    torch.nn.init.normal_(model.score.weight)
    rows = [{"text": text, "label": ["toxic"] if i % 2 else ["ad", "insult"]} for i, text in enumerate(texts)]
    model.save_pretrained(tmp_path)
    loaded = RegularizedSequenceClassifier.from_pretrained(tmp_path, backbone=frozen.backbone)
    assert evaluate_classifier(loaded, rows) == pytest.approx(evaluate_classifier(model, rows), abs=1e-6)


@pytest.mark.parametrize("class_weights", [None, [1.0, 5.0, 0.5]])
def test_a_weight_does_not_hang_on_its_batch(
    class_weights: Any, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    """Four micro-batches of one, some of weight 0, are a batch of four."""
    rows = [{"text": text, "label": i % 3, "weight": float(i % 4)} for i, text in enumerate(texts[:8])]
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = make_classifier(frozen)
        torch.nn.init.zeros_(model.score.weight)
        args = make_args(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            class_weights=class_weights,
            weight_decay=0.0,
        )
        RegularizedTrainer(model=model, args=args, train_dataset=rows).train()
        weights.append(model.score.weight.detach())
    assert torch.isfinite(weights[0]).all()
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_what_would_have_no_effect_is_refused(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    args = make_args(tmp_path, logit_decay=0.1)
    with pytest.raises(ValueError, match="logit_decay=0.1 would have no effect"):
        RegularizedTrainer(model=_model("regression", frozen), args=args, train_dataset=_rows("regression", texts))
    args = make_args(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would have no effect"):
        RegularizedTrainer(model=_model("regression", frozen), args=args, train_dataset=_rows("regression", texts))
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    partly = [{**row, "weight": None if i == 2 else 1.0} for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match="row 2 has weight=None: give every row a number"):
        RegularizedTrainer(model=make_classifier(frozen), args=make_args(tmp_path), train_dataset=partly)
    args = make_args(tmp_path, class_weights=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="weights of texts and labels are all 0"):
        RegularizedTrainer(model=make_classifier(frozen), args=args, train_dataset=rows)


def test_auto_leaves_the_users_arguments_alone(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(frozen, remove_unintended=False)
    states = model.pooled_states(texts * 3, [i % 3 for i in range(3 * len(texts))])
    args = make_args(tmp_path, penalty_weight="auto", dependence_weight="auto", num_train_epochs=1)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=states)
    trainer.train()
    assert args.penalty_weight == "auto"
    assert trainer.weight_path is not None
    chosen = trainer.weight_path.points[trainer.weight_path.chosen]
    assert trainer.regularizer.dependence_weight == chosen.dependence_weight
    assert (tmp_path / "weight_path.json").exists()


def test_cut_texts_are_counted(frozen: HiddenStateExtractor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frozen.tokenizer.chat_template = None
    extractor = HiddenStateExtractor(frozen.backbone, frozen.tokenizer, layer=1, max_length=6, name="tiny")
    model = RegularizedSequenceClassifier.from_backbone(extractor, None, None, task="preference")
    row = {"prompt": "the patient has a fever and a cough ", "chosen": "ill", "rejected": "well"}
    with caplog.at_level("WARNING"):
        evaluate_classifier(model, [row] * 6)
    assert "12 of 12 texts fill max_length=6 tokens" in caplog.text
    assert "6 of 6 pairs have the same tokens on both sides" in caplog.text

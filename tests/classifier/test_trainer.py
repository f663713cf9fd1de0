from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from conftest import tiny_backbone, word_tokenizer
from helpers import SECOND_IS_BEST, make_classifier, make_sae, train_and_restore_the_second
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedSequenceClassifierConfig,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    UnintendedFeatures,
)
from selfreg.classifier.baselines import FittedHead, fit_baseline, fit_head, focal_losses, leace_eraser
from selfreg.classifier.collator import ClassifierCollator
from selfreg.classifier.penalty import dependence_directions, dependence_term, similarity_penalty
from selfreg.classifier.states import PooledStates
from selfreg.classifier.tasks import held_constant


def make_args(folder: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    defaults: dict[str, Any] = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "seed": 0,
    }
    return RegularizedTrainingArguments(str(folder), **{**defaults, **kwargs})


def make_rows(texts: list[str]) -> Dataset:
    return Dataset.from_list([{"text": text, "label": int("fever" in text) + int("pain" in text)} for text in texts])


def test_text_and_cached_training_give_the_same_weights(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    rows = make_rows(texts)
    weights = []
    for source in ("text", "text cached", "states", "rows of states"):
        model = make_classifier(frozen)
        torch.nn.init.zeros_(model.score.weight)
        states = model.pooled_states(rows["text"], rows["label"])
        dataset: Any = {
            "text": rows,
            "text cached": rows,
            "states": states,
            "rows of states": [
                {"pooled": p, "unintended_activations": a, "labels": label}
                for p, a, label in zip(states.pooled, states.activations, states.labels, strict=True)
            ],
        }[source]
        args = make_args(tmp_path, cache_states=source != "text")
        RegularizedTrainer(model=model, args=args, train_dataset=dataset).train()
        weights.append(model.score.weight.detach().clone())
    assert weights[0].abs().max() > 0.01
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-4)


def test_only_the_head_moves_and_every_part_is_logged(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_classifier(frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=make_rows(texts))
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"score.weight", "score.bias", "pooled_mean", "pooled_scale"}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"loss", "task_loss", "similarity", "dependence"} <= set(logged[0])
    for entry in logged:
        args = trainer.args
        terms = args.penalty_weight * entry["similarity"] + args.dependence_weight * entry["dependence"]
        terms += trainer.ridge / 2 * entry["squared_norm"]
        total = entry["task_loss"] + terms
        assert entry["loss"] == pytest.approx(total, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("similarity", ["encoder", "dot", "cosine", "subspace"])
def test_both_terms_shrink_what_they_are_about(
    similarity: str, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    def train(penalty: float, dependence: float) -> tuple[float, float]:
        model = make_classifier(frozen, remove_unintended=False)
        torch.nn.init.zeros_(model.score.weight)
        args = make_args(
            tmp_path,
            num_train_epochs=40,
            penalty_weight=penalty,
            dependence_weight=dependence,
            remove_unintended=False,
            similarity=similarity,
        )
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts))
        trainer.train()
        rows = model.encoder_directions if similarity == "encoder" else model.decoder_directions
        # Measured with the directions of a run that has them, whichever terms were on.
        states = model.pooled_states(texts, [row["label"] for row in make_rows(texts)])
        constant = held_constant("single_label", states.labels)
        reference = dependence_directions(model.standardize(states.pooled), states.activations, constant)
        weight = model.score.weight.detach()
        return (
            float(similarity_penalty(weight, rows, similarity)),  # type: ignore[arg-type]
            float(dependence_term(weight, reference)),
        )

    plain, penalised, independent = train(0, 0), train(3.0, 0), train(0, 100.0)
    assert penalised[0] < 0.5 * plain[0]
    assert independent[1] < 0.2 * plain[1]


def test_evaluation_loss_is_the_task_loss(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    rows = make_rows(texts)
    model = make_classifier(frozen)
    trainer = RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    with torch.no_grad():
        states = model.pooled_states(rows["text"], rows["label"])
        wanted = model(pooled=states.pooled, labels=states.labels).loss
    assert metrics["eval_loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_accumulated_gradients_are_those_of_one_batch(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    def train(batch: int, accumulate: int) -> torch.Tensor:
        model = make_classifier(frozen)
        args = make_args(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts)).train()
        return model.score.weight.detach()

    torch.testing.assert_close(train(60, 1), train(15, 4), rtol=1e-4, atol=1e-6)


def test_class_weights(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    rows = make_rows(texts)
    model = make_classifier(frozen)
    trainer = RegularizedTrainer(
        model=model, args=make_args(tmp_path, class_weights="balanced", label_smoothing_factor=0.1), train_dataset=rows
    )
    counts = torch.bincount(torch.tensor(rows["label"]), minlength=3).float()
    weight = 60 / (3 * counts.clamp_min(1))
    batch = {"pooled": trainer.train_dataset.pooled, "labels": trainer.train_dataset.labels}
    model.train()
    loss = trainer.task_loss(model, batch)[0]
    losses = F.cross_entropy(
        model(pooled=batch["pooled"]).logits, batch["labels"], reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(loss, (losses * weight[batch["labels"]]).sum() / weight[batch["labels"]].sum())
    with pytest.raises(ValueError, match="class_weights has 2 weights, the model has 3"):
        RegularizedTrainer(model=model, args=make_args(tmp_path, class_weights=[1.0, 2.0]), train_dataset=rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_targets_are_softened_in_training_alone(
    smoothing: float, frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_classifier(frozen)
    torch.nn.init.normal_(model.score.weight)
    args = make_args(tmp_path, label_smoothing_factor=smoothing, logit_decay=0.0)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts))
    assert trainer.args.label_smoothing_factor == smoothing
    states = trainer.train_dataset
    batch = {"pooled": states.pooled, "labels": states.labels}
    for softened in (smoothing, 0.0):
        model.train(softened == smoothing)
        wanted = F.cross_entropy(model(pooled=states.pooled).logits, states.labels, label_smoothing=softened)
        torch.testing.assert_close(trainer.task_loss(model, batch)[0], wanted)


def test_best_checkpoint_is_restored_whole(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(frozen)
    args = make_args(tmp_path / "t", **SECOND_IS_BEST)
    train_and_restore_the_second(model, args, make_rows(texts))


def test_stock_model_with_the_penalty(tmp_path: Path, texts: list[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_key_value_heads=1,
        pad_token_id=0,
        num_labels=3,
    )
    model = LlamaForSequenceClassification(config)
    extractor = HiddenStateExtractor(model.model, word_tokenizer(), layer="final", name="t")
    unintended = UnintendedFeatures.from_ids(make_sae(extractor), [1, 2])
    rows = [{**word_tokenizer()(row["text"]), "labels": row["label"]} for row in make_rows(texts)]
    args = make_args(tmp_path, dependence_weight=0.0)
    trainer = RegularizedTrainer(
        model=model, args=args, train_dataset=rows, unintended=unintended, processing_class=word_tokenizer()
    )
    trainer.train()
    assert "similarity" in next(entry for entry in trainer.state.log_history if "loss" in entry)
    with pytest.raises(ValueError, match="remove_unintended takes features out of the states inside the model"):
        RegularizedTrainer(
            model=model, args=make_args(tmp_path, remove_unintended=True), train_dataset=rows, unintended=unintended
        )
    with pytest.raises(ValueError, match="can't find the linear head of LlamaModel"):
        RegularizedTrainer(model=model.model, args=args, train_dataset=rows, unintended=unintended)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"label": 0}], "needs a column 'text', 'input_ids' or 'pooled'; it has label"),
        ([{"text": "a fever"}], "needs a column 'label' or 'labels'; it has text"),
        ([{"text": "a", "label": 0}, {"text": "no", "label": 3}], "label 3 in row 1 is no class id"),
        ([{"text": "a", "label": "ill"}], "label 'ill' in row 0 is no class id"),
        ([{"text": "a", "label": 1}, {"text": "no", "label": 1}], r"one label only \(1\)"),
        ([{"text": "a", "label": 1}, {"text": "", "label": 0}], "text 1 is empty"),
        ([], "train_dataset is empty"),
    ],
)
def test_bad_data_is_named(
    frozen: HiddenStateExtractor, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RegularizedTrainer(model=make_classifier(frozen), args=make_args(tmp_path), train_dataset=rows)


def test_empty_set_says_that_it_is_the_plain_classifier(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from selfreg import RegularizedSequenceClassifier

    model = RegularizedSequenceClassifier.from_backbone(frozen, None, None, num_labels=3)
    with caplog.at_level("WARNING", logger="selfreg"):
        RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=make_rows(texts)).train()
    assert "empty: this trains the plain classifier" in caplog.text


@pytest.mark.parametrize("name", ["penalty_weight", "dependence_weight"])
def test_negative_weights_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must not be negative"):
        make_args(tmp_path, **{name: -1})


def _states(count: int = 400) -> tuple[PooledStates, list[str | None]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    group = torch.where(torch.rand(count, generator=generator) < 0.9, (labels == 0).long(), (labels != 0).long())
    pooled = torch.randn(count, 16, generator=generator)
    pooled[:, 0] += 2 * labels
    pooled[:, 1] += 3 * group
    names: list[str | None] = ["f" if g else "m" for g in group.tolist()]
    return PooledStates(pooled, torch.zeros(count, 3), labels), names


def test_baselines_share_budget_and_interface(frozen: HiddenStateExtractor, tmp_path: Path) -> None:
    states, groups = _states()
    config = make_classifier(frozen).config
    args = make_args(tmp_path, num_train_epochs=20)
    heads = {name: fit_baseline(name, config, args, states, groups=groups) for name in ("plain", "l2", "leace")}
    for head in heads.values():
        assert head is not None
        assert head.logits(states).shape == (400, 3)
        torch.testing.assert_close(
            head.logits(states), head.states(states) @ head.weight.T + head.model.score.bias, rtol=1e-4, atol=1e-5
        )
    plain, l2, leace = (heads[name] for name in ("plain", "l2", "leace"))
    assert plain is not None
    assert l2 is not None
    assert leace is not None
    assert l2.weight.norm() < plain.weight.norm()
    assert fit_baseline("leace", config, args, states, groups=None) is None
    with pytest.raises(ValueError, match="baseline 'magic' is not known"):
        fit_baseline("magic", config, args, states)
    again = fit_head(
        "plain",
        plain.model,
        make_args(tmp_path, num_train_epochs=20, penalty_weight=0, dependence_weight=0, remove_unintended=False),
        states,
    )
    torch.testing.assert_close(again.weight, plain.weight)


def _fitted(frozen: HiddenStateExtractor, path: Path, name: str, **kwargs: Any) -> FittedHead:
    states, _ = _states()
    head = fit_baseline(name, make_classifier(frozen).config, make_args(path, num_train_epochs=20), states, **kwargs)
    assert head is not None
    return head


def test_baselines_that_keep_from_being_too_sure(frozen: HiddenStateExtractor, tmp_path: Path) -> None:
    states, _ = _states()
    plain = _fitted(frozen, tmp_path, "plain")

    def sureness(head: FittedHead) -> float:
        return head.logits(states).softmax(-1).amax(-1).mean().item()

    for name in ("dropout", "label_smoothing", "focal", "spectral_norm"):
        head = _fitted(frozen, tmp_path, name)
        assert sureness(head) < sureness(plain), name
        accuracy = (head.logits(states).argmax(-1) == states.labels).float().mean()
        assert accuracy > 0.8, name
        assert set(head.model.state_dict()) == set(plain.model.state_dict()), name
    assert torch.linalg.matrix_norm(_fitted(frozen, tmp_path, "spectral_norm").weight, 2).item() == pytest.approx(
        1, abs=0.02
    )


def test_focal_loss_is_its_formula() -> None:
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    right = logits.softmax(-1)[torch.arange(7), labels]
    each = -((1 - right) ** 2) * right.log()
    torch.testing.assert_close(focal_losses("single_label", logits, labels), each)


def test_projection_leaves_nothing_along_the_features(frozen: HiddenStateExtractor, tmp_path: Path) -> None:
    states, _ = _states()
    directions = torch.eye(16)[[1, 3]]
    head = _fitted(frozen, tmp_path, "projection", directions=directions)
    moved = replace(states, pooled=states.pooled + 5 * directions.sum(dim=0))
    torch.testing.assert_close(head.logits(moved), head.logits(states), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="projection needs the decoder directions"):
        _fitted(frozen, tmp_path, "projection")


def test_after_leace_no_linear_probe_tells_the_group() -> None:
    from sklearn.linear_model import LinearRegression

    states, groups = _states()
    groups[5] = None
    erased = leace_eraser(states.pooled, groups)(states.pooled)
    known = [i for i, group in enumerate(groups) if group is not None]
    target = [float(groups[i] == "f") for i in known]
    assert LinearRegression().fit(states.pooled[known], target).score(states.pooled[known], target) > 0.5
    assert LinearRegression().fit(erased[known], target).score(erased[known], target) < 1e-3


def test_tokenised_rows_give_the_weights_of_their_texts(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    rows = make_rows(texts)
    longest = max(len(word_tokenizer()(text)["input_ids"]) for text in texts)
    padded = word_tokenizer()(texts, padding="max_length", max_length=longest)
    tokenised = Dataset.from_dict(
        {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "labels": rows["label"],
        }
    )
    weights = []
    for dataset, cached in ((rows, True), (tokenised, True), (tokenised, False)):
        model = make_classifier(frozen)
        torch.nn.init.zeros_(model.score.weight)
        args = make_args(tmp_path, cache_states=cached)
        RegularizedTrainer(model=model, args=args, train_dataset=dataset).train()
        weights.append(model.score.weight.detach().clone())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-4)


def test_tokenizer_without_a_pad_token(texts: list[str], tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    extractor = HiddenStateExtractor(tiny_backbone("gpt2"), tokenizer, layer=1, max_length=32, name="t")
    model = RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=3)
    args = make_args(tmp_path, cache_states=False, num_train_epochs=1)
    RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts)).train()


def test_backbone_that_would_be_lost_is_not_trained(extractor: HiddenStateExtractor, tmp_path: Path) -> None:
    assert not extractor.backbone.requires_grad_(True).training
    model = make_classifier(extractor)
    # The head is what is trained; a backbone that is named in the config must stay the one of that name.
    assert model.backbone_is_frozen
    extractor.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="the backbone has trainable parameters; selfreg trains the head"):
        RegularizedTrainer(model=model, args=make_args(tmp_path))
    with pytest.raises(ValueError, match="only its name would be saved: save_backbone=True"):
        model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m", save_backbone=True)


def test_removal_is_as_the_model_was_made(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(frozen, remove_unintended=False)
    RegularizedTrainer(model=model, args=make_args(tmp_path), eval_dataset=make_rows(texts))
    assert model.config.remove_unintended is False
    with_features = model.pooled_states(texts, [0] * len(texts))
    assert with_features.removed is False
    with pytest.raises(ValueError, match="train_dataset holds states without the unintended features removed, but"):
        RegularizedTrainer(
            model=model, args=make_args(tmp_path, remove_unintended=True), train_dataset=make_states(with_features)
        )
    assert model.config.remove_unintended is True


def make_states(states: PooledStates) -> PooledStates:
    return PooledStates(states.pooled, states.activations, torch.arange(len(states)) % 3, removed=states.removed)


def test_evaluation_alone_leaves_the_head_as_it_is(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_classifier(frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = make_rows(texts)
    RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=rows, eval_dataset=rows).evaluate()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_terms_that_are_not_measured_are_not_logged(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    plain = RegularizedSequenceClassifier.from_backbone(frozen, None, None, num_labels=3)
    args = make_args(tmp_path, penalty_weight=0.0, dependence_weight=0.0)
    trainer = RegularizedTrainer(model=plain, args=args, train_dataset=make_rows(texts))
    trainer.train()
    assert not {"similarity", "dependence"} & {name for entry in trainer.state.log_history for name in entry}


def test_diverged_training_stops_with_a_word(frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(frozen)
    args = make_args(tmp_path, learning_rate=1e38)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts))
    with pytest.raises(ValueError, match="training diverged before step .*; lower learning_rate=1e"):
        trainer.train()


def test_arguments_from_a_command_line() -> None:
    parser = HfArgumentParser(RegularizedTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--class_weights", "1.0,2.5"])
    assert args.label_weights() == [1.0, 2.5]
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--class_weights", "balanced"])
    assert args.label_weights() is None
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--remove_unintended", "false"])
    assert args.remove_unintended is False
    with pytest.raises(ValueError, match="class_weights='1,x' is not known"):
        RegularizedTrainingArguments("x", class_weights="1,x")


def test_head_on_another_device_than_the_states() -> None:
    states = PooledStates(torch.randn(6, 16), torch.zeros(6, 0), torch.arange(6) % 2, removed=False)
    config = RegularizedSequenceClassifierConfig(hidden_size=16, id2label={0: "a", 1: "b"}, unintended_feature_ids=[])
    model = RegularizedSequenceClassifier(config).to("meta")
    head = FittedHead("plain", model, lambda pooled: pooled, [])
    # No accelerator is at hand: the states went to `meta` and through the head, whence alone there is no way back.
    for what in (head.logits, head.states):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            what(states)


def test_own_collator_of_a_tokenised_dataset_does_not_meet_pooled_states(
    frozen: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_classifier(frozen)
    collator = DataCollatorWithPadding(word_tokenizer())
    RegularizedTrainer(
        model=model, args=make_args(tmp_path), train_dataset=make_rows(texts), data_collator=collator
    ).train()


def test_what_a_trainer_script_gets_wrong_is_named(frozen: HiddenStateExtractor, tmp_path: Path) -> None:
    model = make_classifier(frozen)
    with pytest.raises(ValueError, match="labels: label 'ill' in row 1 is no class id; the model has labels 0 to 2"):
        model.pooled_states(["a fever", "a cough"], [0, "ill"])
    with pytest.raises(ValueError, match="args must be RegularizedTrainingArguments, not TrainingArguments"):
        RegularizedTrainer(model=model, args=TrainingArguments(str(tmp_path)))  # type: ignore[arg-type]
    for label in (0.7, None, "ill"):
        rows = [{"text": "a fever", "label": 0}, {"text": "a cough", "label": label}]
        with pytest.raises(ValueError, match=f"train_dataset: label {label!r} in row 1 is no class id"):
            RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=rows)
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a fever", "label": 0}]))
    with pytest.raises(ValueError, match="train_dataset is a stream"):
        RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=stream)
    with pytest.raises(ValueError, match=r"id2label must map class ids to names, .* got \['no', 'yes'\]"):
        RegularizedSequenceClassifier.from_backbone(frozen, None, None, id2label=["no", "yes"])  # type: ignore[arg-type]


def test_a_batch_of_states_is_that_of_its_rows() -> None:
    rows = torch.arange(24.0)
    states = PooledStates(
        rows.view(12, 2), rows.view(12, 2), torch.arange(12), weights=rows[:12] / 7, margins=rows[:12]
    )
    pairs = PooledStates(rows.view(6, 2, 2), rows.view(6, 2, 2), torch.zeros(6, dtype=torch.long), margins=rows[:6])
    for dataset in (states, pairs):
        order = torch.randperm(len(dataset)).tolist()
        batches = list(DataLoader(dataset, batch_size=4, sampler=order, collate_fn=ClassifierCollator(None)))  # type: ignore[arg-type,var-annotated]
        for name, values in ClassifierCollator(None)([dataset[i] for i in order]).items():
            assert torch.equal(torch.cat([batch[name] for batch in batches]), values), name

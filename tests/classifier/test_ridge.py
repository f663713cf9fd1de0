from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from transformers import HfArgumentParser

from helpers import make_classifier
from path_helpers import TASKS, make_model, make_states
from selfreg import HiddenStateExtractor, RegularizedTrainer, RegularizedTrainingArguments
from selfreg.classifier import ridge as module
from selfreg.classifier.offset import with_offsets
from selfreg.classifier.path import fitted_regularizer
from selfreg.classifier.ridge import FOLDS, RIDGES, USUAL, choose_ridge
from selfreg.classifier.solver import solve_head
from selfreg.classifier.states import PooledStates

OFF: dict[str, Any] = {"penalty_weight": 0.0, "dependence_weight": 0.0}


def make_args(folder: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return RegularizedTrainingArguments(str(folder), **{**options, **kwargs})


def resolved(folder: Path, task: Any = "single_label", **kwargs: Any) -> RegularizedTrainingArguments:
    return make_args(folder, **kwargs).resolve_defaults(task, 3, can_offset=True)


def test_the_losses_are_those_of_logistic_regression_on_the_same_folds(tmp_path: Path) -> None:
    states, model = make_states("single_label", 100), make_model("single_label")
    found = choose_ridge(model, states, resolved(tmp_path, **OFF, seed=3))
    rows, labels = states.pooled.double().numpy(), states.labels.numpy()
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=3).split(rows, labels))
    each = {}
    for ridge, loss in found.losses:
        losses = np.zeros(len(labels))
        for train, held_out in folds:
            model.set_standardization(states.pooled[train], states.labels[train])
            seen = model.standardize(states.pooled).double().numpy()
            # Its C stands at the sum of the losses, the ridge beside their mean.
            fitted = LogisticRegression(C=1 / (ridge * len(train)), tol=1e-8, max_iter=5000).fit(
                seen[train], labels[train]
            )
            p = fitted.predict_proba(seen[held_out])
            losses[held_out] = -np.log(p[np.arange(len(held_out)), labels[held_out]])
        assert loss == pytest.approx(losses.mean(), abs=1e-3)
        assert log_loss(labels, np.full((len(labels), 3), 1 / 3)) > losses.mean()
        each[ridge] = losses
    best = each[found.best]
    assert best.mean() == min(losses.mean() for losses in each.values())
    # The strongest that is not told from the best: one standard error of the difference, text by text.
    told = {
        ridge: (losses - best).mean() > (losses - best).std() / np.sqrt(len(best)) for ridge, losses in each.items()
    }
    assert found.ridge == max(ridge for ridge, is_told in told.items() if not is_told)
    assert found.ridge < RIDGES[0]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_the_model_stays_as_it_was(task: Any, tmp_path: Path) -> None:
    states, model = make_states(task, 120), make_model(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = resolved(tmp_path, task)
    found = choose_ridge(model, with_offsets(model, args, states), args)
    assert [ridge for ridge, _ in found.losses] == list(RIDGES[: len(found.losses)])
    losses = [loss for _, loss in found.losses]
    # From the strongest, as far as the loss falls.
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert choose_ridge(model, with_offsets(model, args, states), args) == found


def test_labels_that_nothing_tells_get_the_strongest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = make_states("single_label")
    labels = torch.randint(0, 3, (len(states),), generator=torch.Generator().manual_seed(0))
    assert choose_ridge(make_model("single_label"), replace(states, labels=labels), resolved(tmp_path)).ridge == 1.0
    assert "ridge=1, the strongest that is tried, is no worse than the best on held-out texts (loss 1." in caplog.text


def test_offsets_and_terms_are_in_it(tmp_path: Path) -> None:
    states, model = make_states("single_label", 120), make_model("single_label")

    def losses(states: PooledStates, **kwargs: Any) -> list[float]:
        return [loss for _, loss in choose_ridge(model, states, resolved(tmp_path, **kwargs)).losses]

    plain = losses(states, logit_decay=0.0)
    offsets = torch.zeros(len(states), 3)
    offsets[torch.arange(len(states)), states.labels] = 1.0
    assert losses(replace(states, offsets=offsets), logit_decay=0.0)[0] < plain[0] - 0.1
    assert losses(states, logit_decay=1.0)[1] > plain[1]
    assert losses(states, dependence_weight=1000.0, logit_decay=0.0)[1] != pytest.approx(plain[1], abs=1e-3)
    weights = torch.full((len(states),), 2.0)
    assert losses(replace(states, weights=weights), logit_decay=0.0) == pytest.approx(plain, abs=2e-3)
    weights[::2] = 0.1
    assert losses(replace(states, weights=weights), logit_decay=0.0)[0] != pytest.approx(plain[0], abs=1e-3)
    assert losses(states, class_weights=[1.0, 1.0, 5.0], logit_decay=0.0)[0] != pytest.approx(plain[0], abs=1e-3)


def test_of_many_texts_a_fifth_is_held_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, model = make_states("single_label"), make_model("single_label")
    five = choose_ridge(model, states, resolved(tmp_path, seed=1))
    monkeypatch.setattr(module, "_MANY", 200)
    once = choose_ridge(model, states, resolved(tmp_path, seed=1))
    assert once.losses[0][1] != five.losses[0][1]
    assert once.losses[0][1] == pytest.approx(five.losses[0][1], rel=0.2)
    solved_on: list[int] = []
    problem = module.HeadProblem

    def noted(model: Any, states: PooledStates, **kwargs: Any) -> Any:
        solved_on.append(len(states))
        return problem(model, states, **kwargs)

    monkeypatch.setattr(module, "HeadProblem", noted)
    choose_ridge(model, states, resolved(tmp_path))
    assert solved_on == [240]


def test_few_texts_and_rare_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states, model = make_states("single_label"), make_model("single_label")
    assert choose_ridge(model, states.select(range(9)), resolved(tmp_path)).ridge == USUAL
    assert "9 training texts are too few to choose one by" in caplog.text
    # Where the text of a rare label is held out, no other has the label, and a bias alone would decide on the loss.
    rare = states.labels.clone()
    rare[rare == 2] = 0
    rare[7] = 2
    caplog.set_level("INFO", logger=module.__name__)
    with_rare = choose_ridge(model, replace(states, labels=rare), resolved(tmp_path))
    assert "1 texts have a label that the rest of a fold lacks" in caplog.text
    assert with_rare.losses[0][1] < 0.8
    many = torch.stack([states.labels == 0, states.labels == 1, rare == 2], dim=1).float()
    caplog.clear()
    choose_ridge(make_model("multi_label"), replace(states, labels=many), resolved(tmp_path, "multi_label"))
    assert "1 texts have a label that the rest of a fold lacks" in caplog.text


def test_folds_that_leave_nothing_to_learn_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    targets = torch.zeros(40)
    targets[3] = 1.0
    regression = replace(make_states("regression").select(range(40)), labels=targets)
    assert choose_ridge(make_model("regression"), regression, resolved(tmp_path, "regression")).ridge == USUAL
    assert "ridge=0.05: the targets are all alike in a fold" in caplog.text
    weights = torch.zeros(40)
    weights[3] = 1.0
    states = replace(make_states("single_label").select(range(40)), weights=weights)
    assert choose_ridge(make_model("single_label"), states, resolved(tmp_path)).ridge == USUAL
    assert "ridge=0.05: the weights are all 0 in a fold" in caplog.text


@pytest.mark.parametrize("task", ["single_label", "preference"])
def test_rows_give_the_ridge_that_their_states_give(task: Any, tmp_path: Path) -> None:
    states = make_states(task, 60)
    numbers = torch.linspace(0.1, 2.0, 60)
    states = replace(states, weights=numbers, margins=numbers.flip(0) if task == "preference" else None)
    rows = [
        {"pooled": pooled, "unintended_activations": activations, "labels": int(label), "weight": float(weight)}
        | ({} if states.margins is None else {"margin": float(states.margins[i])})
        for i, (pooled, activations, label, weight) in enumerate(
            zip(states.pooled, states.activations, states.labels, numbers, strict=True)
        )
    ]
    choices = []
    for dataset in (states, rows):
        trainer = RegularizedTrainer(make_model(task), make_args(tmp_path, max_steps=1), dataset)
        trainer.train()
        choices.append(trainer.ridge_choice)
    assert choices[0] == choices[1]
    assert choices[0] != choose_ridge(make_model(task), replace(states, weights=None), trainer.args)


def test_a_trained_head_is_at_the_optimum_of_the_ridge(tmp_path: Path) -> None:
    states = make_states("single_label")
    budget = {"num_train_epochs": 600, "learning_rate": 0.1, "per_device_train_batch_size": 300}
    args = make_args(tmp_path, penalty_weight=0.01, dependence_weight=0.1, **budget)
    model = make_model("single_label")
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=states)
    assert (trainer.args.ridge, trainer.args.weight_decay) == ("auto", 0.0)
    trainer.train()
    assert trainer.ridge_choice is not None
    assert trainer.ridge == trainer.ridge_choice.ridge
    own = with_offsets(model, trainer.args, states)
    assert trainer.ridge_choice == choose_ridge(model, own, trainer.args)
    trained = model.score.weight.detach().clone()
    terms = fitted_regularizer(model, own, trainer.args)
    for ridge, near in ((trainer.ridge, 0.1), (100 * trainer.ridge, None)):
        solved = solve_head(model, own, terms, ridge=ridge, logit_decay=trainer.args.logit_decay).weight
        away = float((solved - trained).norm() / solved.norm())
        assert away < near if near else away > 0.5
    assert args.ridge is None


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    states = make_states("single_label")
    norms = []
    for ridge in (0.0, 0.1, 10.0):
        model = make_model("single_label")
        args = make_args(tmp_path, **OFF, ridge=ridge, num_train_epochs=100, learning_rate=0.05)
        trainer = RegularizedTrainer(model, args, states)
        trainer.train()
        assert trainer.ridge_choice is None
        norms.append(float(model.score.weight.detach().norm()))
    assert norms[0] > 1.2 * norms[1] > 2 * norms[2]


def test_when_it_is_chosen(tmp_path: Path) -> None:
    def numbers(count: int = 3, can_offset: bool = True, **given: Any) -> tuple[Any, Any]:
        args = make_args(tmp_path, **given)
        own = args.resolve_defaults("regression", count, can_offset=can_offset)
        assert (args.ridge, args.weight_decay) == (given.get("ridge"), given.get("weight_decay"))
        assert own.resolve_defaults("regression", count, can_offset=can_offset) == own
        return own.ridge, own.weight_decay

    assert numbers() == numbers(penalty_weight=0) == numbers(label_smoothing_factor=0.1) == ("auto", 0.0)
    assert numbers(count=0) == numbers(can_offset=False) == numbers(**OFF) == numbers(ridge=0.0) == (0.0, 2.0)
    assert numbers(weight_decay=0.5) == (0.0, 0.5)
    assert numbers(weight_decay=0.0) == (0.0, 0.0)
    assert numbers(ridge=0.3) == (0.3, 0.0)
    assert numbers(ridge="auto", weight_decay=0.5, count=0) == ("auto", 0.5)
    parsed = HfArgumentParser(RegularizedTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--ridge", "0.25"]
    )
    assert parsed[0].ridge == 0.25


def test_what_it_needs(tmp_path: Path, frozen: HiddenStateExtractor, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="ridge=-1 must not be negative"):
        make_args(tmp_path, ridge=-1)
    with pytest.raises(ValueError, match="ridge='much' is not known: a finite number, or 'auto'"):
        make_args(tmp_path, ridge="much")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    adapted = make_classifier(frozen, lora={"r": 2})
    with pytest.raises(ValueError, match="ridge='auto' needs states that stay as they are"):
        RegularizedTrainer(adapted, make_args(tmp_path, ridge="auto"), rows)
    assert RegularizedTrainer(adapted, make_args(tmp_path), rows).args.weight_decay == 2.0

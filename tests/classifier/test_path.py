import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from path_helpers import TASKS, make_model, make_states
from selfreg import RegularizedTrainingArguments
from selfreg.classifier.held_out import TO_CHOOSE_BY, HeldOutLoss
from selfreg.classifier.offset import with_offsets
from selfreg.classifier.path import (
    RIDGES,
    fitted_regularizer,
    resolve_weights,
    split,
    strengths,
    strongest_within,
    weight_path,
)
from selfreg.classifier.solver import HeadProblem, solve_head
from selfreg.classifier.terms import Regularizer
from selfreg.classifier.training_args import LOGIT_DECAY, OFFSET_WEIGHT
from selfreg.evaluation.path_chart import path_figure, reliance, save_path
from selfreg.evaluation.report_charts import FigureWriter


def make_args(folder: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    auto: dict[str, Any] = {"penalty_weight": "auto", "dependence_weight": "auto"}
    return RegularizedTrainingArguments(str(folder), **{**auto, **kwargs})


@pytest.mark.parametrize("task", TASKS)
def test_along_the_path_the_terms_fall_and_the_strongest_within_an_error_is_taken(task: str, tmp_path: Path) -> None:
    states = make_states(task)
    model = make_model(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = weight_path(model, states, make_args(tmp_path), points=6)
    assert {p.penalty_weight * 30 for p in path.points} == {p.dependence_weight for p in path.points}
    assert path.points[0].strength == 0
    whole = [30 * p.dependence + p.similarity for p in path.points]
    # The sum that the strength multiplies can't rise; the parts may trade with each other.
    assert all(b <= a + 1e-4 for a, b in pairwise(whole))
    assert path.points[-1].dependence < 0.1 * path.points[0].dependence
    assert path.points[-1].train_loss > path.points[0].train_loss
    assert all(p.converged for p in path.points)
    most = path.points[path.best].validation_loss + path.points[path.best].validation_se
    assert path.points[path.chosen].validation_loss <= most
    assert all(p.validation_loss > most for p in path.points[path.chosen + 1 :])
    assert (path.num_train, path.num_validation) == (240, 60)
    assert 0 < path.points[0].score <= 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_rule_takes_the_last_within_one_error_of_the_best() -> None:
    assert strongest_within([0.50, 0.40, 0.42, 0.46, 0.44, 0.60], [0.3, 0.05, 0.3, 0.3, 0.3, 0.3]) == (4, 1)
    assert strongest_within([0.1, 0.2], [0.05, 9.0]) == (0, 0)
    assert strongest_within([0.2, 0.2, 0.3], [0.0, 0.0, 0.0]) == (1, 1)


def test_the_ridge_is_chosen_by_the_same_rule(tmp_path: Path) -> None:
    path = weight_path(make_model("single_label"), make_states("single_label"), make_args(tmp_path), points=3)
    tried = dict(path.ridges)
    assert list(tried) == list(RIDGES[: len(tried)])
    assert tried[path.ridge] == pytest.approx(path.points[0].validation_loss, abs=1e-3)
    assert path.ridge >= min(tried, key=lambda ridge: tried[ridge])
    given = weight_path(
        make_model("single_label"), make_states("single_label"), make_args(tmp_path), points=3, ridge=0.5
    )
    assert (given.ridge, given.ridges) == (0.5, [])
    args = make_args(tmp_path, ridge=0.5)
    assert weight_path(make_model("single_label"), make_states("single_label"), args, points=3) == given


def test_a_weight_that_is_a_number_stays(tmp_path: Path) -> None:
    states = make_states("single_label")
    path = weight_path(make_model("single_label"), states, make_args(tmp_path, penalty_weight=0.25), points=3)
    assert [p.penalty_weight for p in path.points] == [0.25] * 3
    assert [p.dependence_weight for p in path.points] == [0.0, 0.3, 300.0]
    with pytest.raises(ValueError, match="needs a weight that is 'auto'"):
        weight_path(make_model("single_label"), states, make_args(tmp_path, penalty_weight=1.0, dependence_weight=0.0))


def test_a_point_is_the_optimum_that_a_cold_start_finds_and_takes_fewer_iterations(tmp_path: Path) -> None:
    states = make_states("single_label", 600)
    model = make_model("single_label")
    train, validation = split(model, states, seed=42)
    path = weight_path(model, train, make_args(tmp_path), validation=validation)
    # As the path has them, from the texts that it solves on.
    train = with_offsets(model, make_args(tmp_path, offset_weight=OFFSET_WEIGHT), train)
    loss = HeldOutLoss(None, "bradley_terry")
    cold = 0
    for point in path.points:
        args = make_args(tmp_path, penalty_weight=point.penalty_weight, dependence_weight=point.dependence_weight)
        terms = fitted_regularizer(model, train, args)
        problem = HeadProblem(model, train, logit_decay=LOGIT_DECAY)
        cold += problem.solve(terms, ridge=path.ridge, **TO_CHOOSE_BY).iterations
        assert point.validation_loss == pytest.approx(loss.with_error(model, validation)[0], abs=2e-3)
        solve_head(model, train, terms, ridge=path.ridge, logit_decay=LOGIT_DECAY)
        tight, error = loss.with_error(model, validation)
        # Too little to change what is chosen.
        assert point.validation_loss == pytest.approx(tight, abs=0.2 * error)
        assert point.validation_se == pytest.approx(error, rel=0.05)
    assert sum(point.iterations for point in path.points) < cold


def test_the_error_is_that_of_a_mean() -> None:
    states = make_states("single_label", 100)
    model = make_model("single_label", states)
    solve_head(model, states, None)
    losses = torch.nn.functional.cross_entropy(model.logits(states.pooled), states.labels, reduction="none").detach()
    mean, error = HeldOutLoss(None, "bradley_terry").with_error(model, states)
    assert mean == pytest.approx(float(losses.mean()), rel=1e-5)
    assert error == pytest.approx(float(losses.std(correction=0)) / 10, rel=1e-4)
    # A text of weight 0 is not there.
    weights = (torch.arange(100) < 60).float()
    loss = HeldOutLoss(None, "bradley_terry")
    part = loss.with_error(model, states.select(range(60)))
    assert loss.with_error(model, replace(states, weights=weights)) == pytest.approx(part)


def test_the_split_keeps_every_labels_share_and_is_seeded() -> None:
    states = make_states("single_label", 500)
    model = make_model("single_label")
    train, validation = split(model, states, seed=0)
    shares = [torch.bincount(part.labels) / len(part) for part in (train, validation)]
    torch.testing.assert_close(shares[0], shares[1], atol=0.01, rtol=0)
    again = split(model, states, seed=0)[1]
    assert torch.equal(validation.pooled, again.pooled)
    assert not torch.equal(validation.pooled, split(model, states, seed=1)[1].pooled)
    # One text of a label can't be on both sides.
    lonely = replace(states, labels=torch.where(torch.arange(500) == 0, 2, states.labels.clamp_max(1)))
    assert len(split(model, lonely, seed=0)[1]) == 100


def test_resolved_weights_are_the_chosen_ones_and_the_path_is_saved_and_drawn(tmp_path: Path) -> None:
    states = make_states("single_label")
    model = make_model("single_label")
    args = make_args(tmp_path, class_weights="balanced")
    resolved, path = resolve_weights(model, args, states, measure=reliance)
    assert path is not None
    chosen = path.points[path.chosen]
    assert resolved.term_weights == (chosen.penalty_weight, chosen.dependence_weight)
    assert resolved.class_weights == "balanced"
    assert resolve_weights(model, resolved, states) == (resolved, None)
    use = [point.figures["unintended_use"] for point in path.points]
    assert None not in use
    assert use[-1] < 0.1 * use[0]  # type: ignore[operator]

    save_path(path, tmp_path)
    saved = json.loads((tmp_path / "weight_path.json").read_text())
    assert len(saved["points"]) == 10
    assert saved["points"][saved["chosen"]]["figures"] == chosen.figures
    page = (tmp_path / "weight_path.html").read_text()
    assert "Unintended dependence" in page
    assert "src=" not in page.split("</head>")[1]
    assert "Unintended use" in path_figure(path, FigureWriter())
    bare = replace(path, points=[replace(point, figures={}) for point in path.points])
    assert "Similarity" in path_figure(bare, FigureWriter())


def test_without_features_there_is_nothing_to_weigh(tmp_path: Path) -> None:
    states = make_states("single_label")
    model = make_model("single_label")
    model.config.unintended_feature_ids = []
    resolved, path = resolve_weights(model, make_args(tmp_path), states)
    assert (resolved.term_weights, path) == ((0.0, 0.0), None)


def test_what_comes_beside_the_terms_is_resolved_with_them(tmp_path: Path) -> None:
    states, model = make_states("single_label"), make_model("single_label")
    resolved, path = resolve_weights(model, make_args(tmp_path), states)
    assert (resolved.offset_weight, resolved.logit_decay) == (OFFSET_WEIGHT, LOGIT_DECAY)
    args = make_args(tmp_path, offset_weight=OFFSET_WEIGHT, logit_decay=LOGIT_DECAY)
    assert weight_path(model, with_offsets(model, args, states), args) == path
    without = make_args(tmp_path, offset_weight=0.0, logit_decay=0.0)
    assert weight_path(model, states, without) != path


def test_the_same_seed_gives_the_same_path(tmp_path: Path) -> None:
    states = make_states("preference")
    first, again = (weight_path(make_model("preference"), states, make_args(tmp_path), points=3) for _ in range(2))
    assert first == again


def test_strengths_start_at_nothing() -> None:
    assert strengths(4) == [0.0, 0.01, 0.3162, 10.0]
    with pytest.raises(ValueError, match="points=2"):
        strengths(2)


def test_auto_and_numbers_come_from_a_command_line(tmp_path: Path) -> None:
    def parse(*words: str) -> RegularizedTrainingArguments:
        parser = HfArgumentParser(RegularizedTrainingArguments)
        return parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])[0]

    args = parse("--penalty_weight", "auto", "--dependence_weight", "2.5")
    assert (args.penalty_weight, args.dependence_weight) == ("auto", 2.5)
    assert parse().term_weights == (10.0, 10.0)
    assert json.loads(args.to_json_string())["penalty_weight"] == "auto"
    for words, message in (("-1", "penalty_weight=-1 must not be negative"), ("strong", "'strong' is not known")):
        with pytest.raises(ValueError, match=message):
            parse("--penalty_weight", words)
    for value in (float("nan"), True, None, [1.0]):
        with pytest.raises(ValueError, match="is not known"):
            make_args(tmp_path, penalty_weight=value)


def test_a_regularizer_takes_no_auto(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'auto' is no number yet"):
        Regularizer(make_model("single_label").unintended, make_args(tmp_path))

"""How well linear heads on the tied texts come to know the task: AUC within groups, the best of a grid, in hindsight.

    SELFREG_DATA=/path/to/data python -m benchmarks.controllability.limits --output runs/controllability \
        --only reviews_domain planted_reviews

Heads are solved to their optimum over ridge, share of the group's own offset, logit decay and weight of the texts
against the tie, with nothing removed and no term; beside them a linear discriminant of the same states, and the same
grid of ridges on balanced texts. The best of each kind is taken by what is reported, which flatters it: it tells how
far the tied texts and these states carry a linear head, not what a method would get. It needs what a run of the
benchmark left in the output folder, and the same --sae-tokens, --sae-data and --dtype.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from statistics import mean

import numpy as np
import torch
from benchmarks.controllability.datasets import DATASETS
from benchmarks.controllability.methods import Trial, auc_within_groups
from benchmarks.controllability.pool import TIED
from benchmarks.controllability.run import add_options
from benchmarks.controllability.states import Workshop

from selfreg import RegularizedSequenceClassifier, UnintendedFeatures
from selfreg.classifier.offset import attribute_offsets
from selfreg.classifier.solver import HeadProblem
from selfreg.classifier.states import PooledStates

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SHARES, DECAYS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.1, 0.3, 1.0)
"""Of the group's log odds that are set aside, and of the mean squared logit."""
POWERS = (0.25, 0.5, 0.75, 1.0)
"""Texts weigh 1 / (texts of their label and group) to this power."""
SHRINKAGES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=list(DATASETS), required=True, metavar="DATA_SET")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shop = Workshop(given.output, sae_tokens=given.sae_tokens, dtype=given.dtype)
    pools = [DATASETS[name]() for name in given.only]
    for pool in pools:
        if pool.kind not in TIED or pool.task == "preference":
            parser.error(f"--only {pool.name}: no label is tied to a group in it")
    sae = shop.sae([DATASETS[name]() for name in given.sae_data])
    none = UnintendedFeatures.from_ids(sae, [])
    for pool in pools:
        activations = shop.activations(pool.corpus, sae)
        found: dict[str, dict[str, list[float]]] = {}
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            trial = Trial(pool, seed, sae, activations, none, shop)
            for kind, settings, auc in aucs(trial):
                found.setdefault(kind, {}).setdefault(settings, []).append(auc)
        print(f"{pool.name}, {given.seeds} seeds, AUC within groups on `even`, the best of each kind:")
        for kind, tried in found.items():
            settings, values = max(tried.items(), key=lambda item: mean(item[1]))
            print(f"  {kind:28} {mean(values):.3f}  ({settings}; {len(tried)} tried)", flush=True)


def aucs(trial: Trial) -> Iterator[tuple[str, str, float]]:
    """(kind, settings, AUC within groups) of every head that is tried on a seed."""
    # Which features are watched is no matter: nothing is removed, and there is no term.
    model = trial.classifier(trial.measure, False)
    tied = trial.states(trial.rows.train, trial.measure, None)
    offsets, weights = _of_groups(trial, tied)
    model.set_standardization(tied.pooled, tied.labels)
    for share, decay in product(SHARES, DECAYS):
        problem = HeadProblem(model, replace(tied, offsets=share * offsets), logit_decay=decay)
        for ridge in RIDGES:
            problem.solve(None, ridge=ridge)
            yield "tied, offset", f"share {share}, decay {decay}, ridge {ridge}", _auc(trial, model)
    for power, decay in product(POWERS, DECAYS):
        own = weights**power
        problem = HeadProblem(model, replace(tied, weights=own / own.mean()), logit_decay=decay)
        for ridge in RIDGES:
            problem.solve(None, ridge=ridge)
            yield "tied, weighted texts", f"power {power}, decay {decay}, ridge {ridge}", _auc(trial, model)
    for shrinkage in SHRINKAGES:
        if _discriminant(trial, model, tied, shrinkage):
            yield "tied, linear discriminant", f"shrinkage {shrinkage}", _auc(trial, model)
    if trial.rows.balanced is not None:
        balanced = trial.states(trial.rows.balanced, trial.measure, None)
        model.set_standardization(balanced.pooled, balanced.labels)
        problem = HeadProblem(model, balanced)
        for ridge in RIDGES:
            problem.solve(None, ridge=ridge)
            yield "balanced", f"ridge {ridge}", _auc(trial, model)


def _of_groups(trial: Trial, states: PooledStates) -> tuple[torch.Tensor, torch.Tensor]:
    """What the group says of the label of every training text, `[N, L]`, and 1 / (texts of its cell), `[N]`."""
    groups, labels = [trial.pool.group[row] for row in trial.rows.train], states.labels.tolist()
    cells = list(zip(labels, groups, strict=True))
    counts = Counter(cells)
    weights = torch.tensor([1 / counts[cell] for cell in cells])
    return attribute_offsets(labels, groups, len(trial.pool.labels)), weights


def _discriminant(trial: Trial, model: RegularizedSequenceClassifier, states: PooledStates, shrinkage: float) -> bool:
    """Means of labels, with the group held constant, and the covariance that both leave; into the head of `model`.

    Returns:
        False where the group can't be held constant, as with a tie of 100 %.
    """
    rows = model.standardize(states.pooled).double().numpy()
    groups = [trial.pool.group[row] for row in trial.rows.train]
    values = sorted({group for group in groups if group is not None}, key=str)
    of_label = np.eye(len(trial.pool.labels))[states.labels.numpy()]
    of_group = np.array([[float(group == value) for value in values[1:]] for group in groups])
    design = np.concatenate([of_label, of_group - of_group.mean(axis=0)], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(design, rows, rcond=None)
    if rank < design.shape[1]:
        return False
    left = rows - design @ coefficients
    covariance = left.T @ left / len(rows)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    means = coefficients[: of_label.shape[1]]
    weight = np.linalg.solve(shrunk, means.T).T
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(weight))
        model.score.bias.copy_(torch.from_numpy(-0.5 * (weight * means).sum(axis=1)))
    return True


def _auc(trial: Trial, model: RegularizedSequenceClassifier) -> float:
    rows = trial.rows.evals["even"]
    states = trial.states(rows, trial.measure, None)
    with torch.no_grad():
        logits = model.logits(states.pooled).double().numpy()
    found = auc_within_groups(logits, states.labels.numpy(), [trial.pool.group[row] for row in rows])
    assert found is not None
    return found


if __name__ == "__main__":
    main()

"""One seed of one data set: the features are chosen, each method is trained with the same budget, and measured.

Every method of a data set is measured against the same unintended features: the strongest `MEASURED` of those that the
seed's training texts show to tell the group (`attribute`), or, where none does, those of the keywords.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controllability.forms import FORMS
from benchmarks.controllability.names import ABLATIONS, BALANCED, BASELINES, ORACLES, PLAIN_LAST, SELFREG
from benchmarks.controllability.pool import TIED, Pool, Rows
from benchmarks.controllability.states import Activations, Workshop
from torch import Tensor
from transformers import set_seed

from selfreg import (
    RegularizedSequenceClassifier,
    RegularizedSequenceClassifierConfig,
    RegularizedTrainingArguments,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.classifier.baselines import FittedHead, fit_baseline, fit_head
from selfreg.classifier.offset import attribute_offsets
from selfreg.classifier.states import PooledStates
from selfreg.evaluation.classifier import evaluate_head
from selfreg.evaluation.metrics import evaluate_predictions, unintended_use
from selfreg.evaluation.tasks import evaluate_pairs
from selfreg.features.attribute import attribute_strength, has_two_groups
from selfreg.features.limits import MAX_ATTRIBUTE_FEATURES
from selfreg.utils.trainer import StepProgress

MEASURED = 100
"""Features by attribute that use and dependence are measured on, whatever a method was given."""
ZERO_SHOT_TEXTS = 60
"""Of each eval set, drawn once: a prompt costs as much as a hundred trainings of a head."""


class DoesNotApply(Exception):
    """A method has nothing to work with on this data set; says why."""


@dataclass(frozen=True)
class Scores:
    """What a method says of the eval texts of one set.

    Attributes:
        rows (`list[int]`): of the pool.
        right (`[n]`, bool): whether each is right.
        predicted (`[n]`): class ids; of pairs 0 where the chosen side wins.
        figures (`dict`): see `evaluate_predictions`, and use of the features of the other choices.
    """

    rows: list[int]
    right: Any
    predicted: Any
    figures: dict[str, float | None]


class Trial:
    """One seed of one data set.

    Args:
        pool: the data set.
        seed: which.
        sae, activations: see `Workshop`.
        keywords: features that peak on the keywords.
        workshop: for what methods on texts need.
    """

    def __init__(
        self,
        pool: Pool,
        seed: int,
        sae: SAEForFeatureExtraction,
        activations: Activations,
        keywords: UnintendedFeatures,
        workshop: Workshop,
    ) -> None:
        self.pool, self.seed, self.sae = pool, seed, sae
        self.activations, self.workshop = activations, workshop
        self.rows: Rows = pool.rows(seed)
        self.all_by_attribute = self._by_attribute(sae, activations)
        by_attribute = _first(sae, self.all_by_attribute, MAX_ATTRIBUTE_FEATURES)
        self.choices: dict[str, UnintendedFeatures] = {
            "attribute": by_attribute,
            "keywords": keywords,
            "random": _random(sae, len(by_attribute) or len(keywords), seed),
            "random_keywords": _random(sae, len(keywords), seed),
        }
        self.measure = _first(sae, self.all_by_attribute, MEASURED) if len(by_attribute) else keywords

    @property
    def pairs(self) -> bool:
        return self.pool.task == "preference"

    def _by_attribute(self, sae: SAEForFeatureExtraction, activations: Activations) -> UnintendedFeatures:
        """All that the training texts show to tell the group, the strongest first."""
        from scipy.stats import false_discovery_control

        rows, pool = self.rows.train, self.pool
        if not has_two_groups([pool.group[i] for i in rows], [pool.label[i] for i in rows]):
            # A tie of 100 %: nothing can tell the attribute from the label.
            return UnintendedFeatures.from_ids(sae, [])
        values = self._of_texts(activations.largest, rows).numpy()
        if self.pairs:
            values = values[:, 0] - values[:, 1]
        strength, p_values, _ = attribute_strength(
            values, [pool.group[i] for i in rows], [pool.label[i] for i in rows]
        )
        kept = np.flatnonzero(false_discovery_control(p_values) < 0.05).tolist()
        order = sorted(kept, key=lambda feature: (-abs(strength[feature] - 0.5), feature))
        reasons = [f"tells the group within a label: AUC {strength[feature]:.3f}" for feature in order]
        return UnintendedFeatures.from_ids(sae, order, reasons=reasons)

    def _of_texts(self, values: Tensor, rows: list[int]) -> Tensor:
        """Rows of a tensor over texts; of pairs `[n, 2, ...]`."""
        return (values.unflatten(0, (-1, 2)) if self.pairs else values)[rows]

    def states(
        self,
        rows: list[int],
        watched: UnintendedFeatures,
        removed: UnintendedFeatures | None,
        method: str = "",
    ) -> PooledStates:
        """Pooled states of rows of the pool, and the largest activations of `watched` there.

        Args:
            rows, watched: which.
            removed: features that are taken out.
            method: an ablation that has states of its own.
        """
        pooled, activations = self.activations.pooled, self.activations.means
        if method in ("pooling_last", PLAIN_LAST):
            pooled, activations = self.activations.last, self.activations.at_last
        elif method == "removal_topk":
            activations = self.activations.topk_means
        elif method == "sae_finetuned":
            activations = self.finetuned[1].means
        pooled = self._of_texts(pooled, rows)
        if removed is not None:
            pooled = pooled - self._of_texts(activations, rows)[..., removed.feature_ids] @ removed.decoder_directions
        maxima = self._of_texts(self.activations.maxima, rows)[..., watched.feature_ids]
        labels = torch.tensor([self.pool.label[row] for row in rows])
        return PooledStates(pooled.clone(), maxima.clone(), labels, removed=removed is not None)

    def args(self) -> RegularizedTrainingArguments:
        """The budget of all heads."""
        return head_arguments(self.workshop.folder, self.seed)

    def classifier(self, unintended: UnintendedFeatures, removes: bool) -> RegularizedSequenceClassifier:
        """A head that knows what it must not use, without a backbone."""
        names = dict(enumerate(self.pool.labels)) or {0: "score"}
        config = RegularizedSequenceClassifierConfig(
            hidden_size=unintended.hidden_size,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            unintended_feature_ids=unintended.feature_ids,
            unintended_reasons=unintended.reasons,
            sae_num_features=unintended.num_features,
            input_norm=unintended.input_norm,
            remove_unintended=removes,
            task=self.pool.task,
        )
        model = RegularizedSequenceClassifier(config)
        model.encoder_directions.copy_(unintended.encoder_directions)
        model.encoder_bias.copy_(unintended.encoder_bias)
        model.decoder_directions.copy_(unintended.decoder_directions)
        return model

    def run(self, method: str) -> dict[str, Any]:
        """Trains and measures one method.

        Raises:
            DoesNotApply: it can't be used here.
        """
        set_seed(self.seed)
        started, cpu = time.perf_counter(), time.process_time()
        scores = self._scores(method)
        return {
            "figures": {name: self._with_consistency(scores, name) for name in scores},
            # As a string: thousands of lines of true and false would be no help to a reader.
            "right": {name: "".join(map(str, own.right.astype(int))) for name, own in scores.items()},
            "rows": {name: own.rows for name, own in scores.items() if own.rows != self.rows.evals[name]},
            "seconds": round(time.perf_counter() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }

    def _scores(self, method: str) -> dict[str, Scores]:
        if method in SELFREG or method in ABLATIONS:
            return self._selfreg(method)
        if method in BASELINES:
            train = self.states(self.rows.train, self.measure, None)
            return self._head(self._baseline(method, train, self.rows.train))
        if method == PLAIN_LAST:
            train = self.states(self.rows.train, self.measure, None, method)
            return self._head(self._baseline("plain", train, self.rows.train), method=method)
        if method in BALANCED:
            return self._head(self._balanced(BALANCED[method]))
        if method in ORACLES:
            return self._oracle(ORACLES[method])
        return {"scrubbing": self._scrubbing, "tfidf": self._tfidf, "zero_shot": self._zero_shot}[method]()

    def _selfreg(self, method: str) -> dict[str, Scores]:
        choice, changes = {**SELFREG, **ABLATIONS}[method]
        choice, _, count = choice.partition(":")
        unintended = self.choices[choice]
        # What the group says is set aside where it is known; or what the features say, as where no group is.
        by_features = choice != "attribute" or count == "features" or self.pairs
        if count.isdigit():
            found = self.all_by_attribute if choice == "attribute" else unintended
            unintended = _first(self.sae, found, int(count))
        if method == "sae_finetuned":
            tuned = self.finetuned[0]
            unintended = _first(tuned, self._by_attribute(*self.finetuned), MAX_ATTRIBUTE_FEATURES)
        if not len(unintended):
            raise DoesNotApply(f"no feature is chosen by {choice}")
        args = replace(self.args(), remove_unintended=True)
        args = replace(args, **changes).resolve_defaults(self.pool.task, len(unintended), can_offset=True)
        removed = unintended if args.remove_unintended else None
        train = self.states(self.rows.train, unintended, removed, method)
        if method == "sae_finetuned":
            maxima = self._of_texts(self.finetuned[1].maxima, self.rows.train)[..., unintended.feature_ids]
            train = replace(train, activations=maxima.clone())
        if args.offset_weight and not by_features:
            groups = [self.pool.group[row] for row in self.rows.train]
            offsets = attribute_offsets(train.labels.tolist(), groups, len(self.pool.labels))
            train = replace(train, offsets=args.offset_weight * offsets)
        if method in FORMS:
            train = self._with_form(method, train, unintended)
        model = self.classifier(unintended, bool(args.remove_unintended))
        return self._head(
            fit_head(method, model, args, train, callbacks=[StepProgress(method)]), removed, method=method
        )

    def _with_form(self, method: str, train: PooledStates, unintended: UnintendedFeatures) -> PooledStates:
        """States whose activations are what the dependence is measured on; the offset is there already."""
        groups = [self.pool.group[row] for row in self.rows.train]
        if self.pairs or train.offsets is None:
            raise DoesNotApply("forms of the dependence term are told apart beside the group's own offset")
        means = self._of_texts(self.activations.means, self.rows.train)[..., unintended.feature_ids]
        return replace(train, activations=FORMS[method](train, means, groups).float())

    @cached_property
    def finetuned(self) -> tuple[SAEForFeatureExtraction, Activations]:
        """The SAE fine-tuned on the training texts of the data set, and its activations."""
        tuned = self.workshop.finetuned(self.pool, self.sae)
        return tuned, self.workshop.activations(self.pool.corpus, tuned)

    @cached_property
    def _balanced_l2(self) -> FittedHead:
        # Each oracle starts from it.
        return self._balanced("l2")

    def _balanced(self, baseline: str) -> FittedHead:
        if self.rows.balanced is None:
            raise DoesNotApply("the pool has too few texts of some cell to balance it")
        return self._baseline(baseline, self.states(self.rows.balanced, self.measure, None), self.rows.balanced)

    def _oracle(self, share: float) -> dict[str, Scores]:
        """See `ORACLES`."""
        if self.pool.kind not in TIED or self.pairs:
            raise DoesNotApply("there is no tie between labels and groups")
        head, odds = self._balanced_l2, self._log_odds()
        logits = {}
        for name, rows in self.rows.evals.items():
            known = np.stack([odds[self.pool.group[row]] for row in rows])
            logits[name] = head.logits(self.states(rows, self.measure, None)).double().numpy() + share * known
        return self._of_text_model(logits, self.rows.evals)

    def _log_odds(self) -> dict[Any, Any]:
        """log p(label | group) of the tied training set less log p(label) of the balanced one, half a text added to
        each count; 0 for texts of unknown group."""
        size = len(self.pool.labels)

        def log_shares(rows: list[int]) -> Any:
            counts = np.bincount([self.pool.label[row] for row in rows], minlength=size) + 0.5
            return np.log(counts / counts.sum())

        prior = log_shares(self.rows.balanced or [])
        groups = {self.pool.group[row] for row in self.rows.train} - {None}
        own = {group: [row for row in self.rows.train if self.pool.group[row] == group] for group in groups}
        return {None: np.zeros(size), **{group: log_shares(rows) - prior for group, rows in own.items()}}

    def _baseline(self, method: str, train: PooledStates, rows: list[int]) -> FittedHead:
        if method == "projection" and not len(self.choices["attribute"]):
            raise DoesNotApply("no feature is chosen by attribute")
        head = fit_baseline(
            method,
            self.classifier(self.measure, False).config,
            self.args(),
            train,
            groups=[self.pool.group[row] for row in rows],
            directions=self.choices["attribute"].decoder_directions,
            callbacks=[StepProgress(method)],
        )
        if head is None:
            raise DoesNotApply("there are no groups")
        return head

    def _head(
        self,
        head: FittedHead,
        removed: UnintendedFeatures | None = None,
        pooled: Tensor | None = None,
        method: str = "",
    ) -> dict[str, Scores]:
        scores = {}
        for name, rows in self.rows.evals.items():
            states = self.states(rows, self.measure, removed, method)
            if pooled is not None:
                states = replace(states, pooled=self._of_texts(pooled, rows).clone())
            figures, _ = evaluate_head(head, states, self.measure, [self.pool.group[row] for row in rows])
            seen, weight = head.states(states).double().numpy(), head.weight.double().numpy()
            for choice, unintended in self.choices.items():
                directions = unintended.decoder_directions.double().numpy()
                figures[f"unintended_use_{choice}"] = (
                    unintended_use(seen, weight, directions) if len(unintended) else None
                )
            scores[name] = self._score(rows, head.logits(states).double().numpy(), figures)
        return scores

    def _score(self, rows: list[int], logits: Any, figures: dict[str, float | None]) -> Scores:
        if self.pairs:
            right = logits[:, 0] > logits[:, 1]
            return Scores(rows, right, 1 - right.astype(int), figures)
        predicted, labels = logits.argmax(axis=1), np.array([self.pool.label[row] for row in rows])
        within = auc_within_groups(logits, labels, [self.pool.group[row] for row in rows])
        return Scores(rows, predicted == labels, predicted, {**figures, "auc_within_groups": within})

    def _with_consistency(self, scores: dict[str, Scores], name: str) -> dict[str, float | None]:
        """Figures of an eval set; of edited texts also the share of verdicts that stay as they were."""
        figures, partner = dict(scores[name].figures), self.pool.partner
        if partner is not None:
            before = {row: int(y) for own in scores.values() for row, y in zip(own.rows, own.predicted, strict=True)}
            pairs = [
                (before[partner[row]], int(y))  # type: ignore[index]
                for row, y in zip(scores[name].rows, scores[name].predicted, strict=True)
                if partner[row] in before
            ]
            figures["consistency"] = float(np.mean([a == b for a, b in pairs])) if pairs else None
        return figures

    def _scrubbing(self) -> dict[str, Scores]:
        if not self.pool.keywords:
            raise DoesNotApply("no words tell the attribute")
        pooled = self.workshop.scrubbed(self.pool)
        train = self.states(self.rows.train, self.measure, None)
        train = replace(train, pooled=self._of_texts(pooled, self.rows.train).clone())
        return self._head(self._baseline("plain", train, self.rows.train), pooled=pooled)

    def _of_text_model(self, logits: dict[str, Any], rows: dict[str, list[int]]) -> dict[str, Scores]:
        """Scores of a method that has no weights over hidden states."""
        scores = {}
        for name, own in rows.items():
            groups = [self.pool.group[row] for row in own]
            maxima = self.states(own, self.measure, None).compared[1].double().numpy()
            found = np.asarray(logits[name], dtype=np.float64)
            if self.pairs:
                figures = evaluate_pairs(found, groups, activations=maxima)
            else:
                labels = np.array([self.pool.label[row] for row in own])
                figures = evaluate_predictions(logits=found, labels=labels, groups=groups, activations=maxima)
            scores[name] = self._score(own, found, figures)
        return scores

    def _tfidf(self) -> dict[str, Scores]:
        from selfreg.classifier.tfidf import tfidf_logits, tfidf_pair_scores

        if self.pairs:
            difference = tfidf_pair_scores(
                self._replies(self.rows.train),
                {name: self._replies(rows) for name, rows in self.rows.evals.items()},
                seed=self.seed,
            )
            logits: dict[str, Any] = {
                name: np.concatenate([values.numpy(), np.zeros((len(values), 1))], axis=1)
                for name, values in difference.items()
            }
        else:
            texts = self.pool.corpus.texts
            logits = tfidf_logits(
                [texts[row] for row in self.rows.train],
                [self.pool.label[row] for row in self.rows.train],
                {name: [texts[row] for row in rows] for name, rows in self.rows.evals.items()},
                num_labels=len(self.pool.labels),
                seed=self.seed,
            )
        return self._of_text_model(logits, self.rows.evals)

    def _replies(self, rows: list[int]) -> list[tuple[str, str]]:
        pairs = [json.loads(self.pool.corpus.texts[row]) for row in rows]
        return [(pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) for pair in pairs]

    def _zero_shot(self) -> dict[str, Scores]:
        from selfreg.classifier.zero_shot import zero_shot_logits, zero_shot_scores

        chat, length = self.workshop.chat, self.pool.corpus.max_length
        rng = np.random.default_rng(0)
        rows = {name: sorted(rng.permutation(own)[:ZERO_SHOT_TEXTS].tolist()) for name, own in self.rows.evals.items()}
        wanted = sorted({row for own in rows.values() for row in own})
        options: dict[str, Any] = {"instruction": self.pool.instruction, "max_tokens": length}
        if self.pairs:
            sides = [side for row in wanted for side in conversations(self.pool.corpus.texts[row])]
            found = zero_shot_scores(chat, sides, **options).view(-1, 2)
        else:
            texts = [self.pool.corpus.texts[row] for row in wanted]
            found = zero_shot_logits(chat, texts, self.pool.labels, **options)
        place = {row: i for i, row in enumerate(wanted)}
        return self._of_text_model({name: found[[place[row] for row in own]] for name, own in rows.items()}, rows)


def auc_within_groups(logits: Any, labels: Any, groups: Sequence[Any]) -> float | None:
    """How well the labels are told apart among texts of one group, whatever is added to a label's logit for a group.

    For each group and each two labels in it, the AUC of the difference of their logits over the texts of the two (Hand
    and Till 2001): what a head makes of the group itself moves all of these differences alike.

    Args:
        logits: `[n, L]`.
        labels: `[n]`.
        groups: of each text; those of unknown group are left out.

    Returns:
        The mean over pairs of labels and groups; None where no group has two labels.
    """
    from sklearn.metrics import roc_auc_score

    found = []
    for group in sorted({group for group in groups if group is not None}, key=str):
        own = np.array([other == group for other in groups])
        for one, other in combinations(np.unique(labels[own]).tolist(), 2):
            of_two = own & np.isin(labels, [one, other])
            difference = logits[of_two, one] - logits[of_two, other]
            found.append(float(roc_auc_score(labels[of_two] == one, difference)))
    return float(np.mean(found)) if found else None


def _random(sae: SAEForFeatureExtraction, count: int, seed: int) -> UnintendedFeatures:
    return UnintendedFeatures.from_random(sae, count, seed=seed) if count else UnintendedFeatures.from_ids(sae, [])


def _first(sae: SAEForFeatureExtraction, features: UnintendedFeatures, count: int) -> UnintendedFeatures:
    return UnintendedFeatures.from_ids(sae, features.feature_ids[:count], reasons=features.reasons[:count])


def conversations(text: str) -> list[str]:
    """Both sides of a pair, the chosen one first, as plain text."""
    pair = json.loads(text)
    return [
        "\n".join(f"{m['role']}: {m['content']}" for m in [*pair["prompt"], *pair[side]])
        for side in ("chosen", "rejected")
    ]


def head_arguments(folder: Path, seed: int) -> RegularizedTrainingArguments:
    """selfreg's defaults; the baselines get the same budget."""
    return RegularizedTrainingArguments(
        str(folder / ".work" / "heads"),
        seed=seed,
        save_strategy="no",
        logging_steps=500,
        report_to="none",
        disable_tqdm=True,
    )

"""UnintendedFeatures: the features that a classifier must not use, why, and the directions that a classifier needs."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import ActivationStore, save_tensors
from selfreg.features.activations import largest_activations
from selfreg.features.spans import Span
from selfreg.sae.input_norm import InputNorm
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import read_json, write_json
from selfreg.utils.hub import local_folder, push

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog

WEIGHTS_NAME = "unintended_features.safetensors"
CONFIG_NAME = "unintended_features.json"
FORMAT_VERSION = 2

_MIN_ACTIVE = 5
_FEW_TEXTS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class UnintendedFeatures:
    """The unintended features of an SAE: U of them, for states of width D.

    Attributes:
        feature_ids (`list[int]`): which features of the SAE, strongest reason first.
        reasons (`list[str]`): why each was chosen, for a reader.
        encoder_directions (`[U, D]`), encoder_bias (`[U]`): pre-activation of raw hidden states; see `input_norm`.
        decoder_directions (`[U, D]`): what an activation of 1 adds to a raw hidden state.
        num_features (`int`): width of the SAE.
        spec (`HiddenStateSpec`, *optional*): the states that the SAE was trained on.
        input_norm (`str`): how the SAE normalises each state by itself. Where it does, the bias is multiplied with
            what the state h is divided by: pre = direction · h + bias · length(h), and the directions are centred
            for layer_norm.
        labels (`list[list[str] | None]`, *optional*): the labels that each feature is unintended for, None for all of
            them: what is no reason for one disease may be one for another.
    """

    feature_ids: list[int]
    reasons: list[str]
    encoder_directions: Tensor
    encoder_bias: Tensor
    decoder_directions: Tensor
    num_features: int
    spec: HiddenStateSpec | None
    input_norm: InputNorm = "none"
    labels: list[list[str] | None] | None = None

    def __len__(self) -> int:
        return len(self.feature_ids)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.feature_ids[:8])) + (", …" if len(self) > 8 else "")
        return f"UnintendedFeatures({len(self)} of {self.num_features}: {shown})"

    @property
    def hidden_size(self) -> int:
        return self.encoder_directions.shape[1]

    @classmethod
    def from_ids(
        cls,
        sae: SAEForFeatureExtraction,
        ids: Iterable[int],
        *,
        reasons: Sequence[str] | None = None,
        labels: Sequence[Sequence[str] | None] | None = None,
    ) -> "UnintendedFeatures":
        """Features named by their number.

        Args:
            sae: the SAE.
            ids: the features.
            reasons: why each was chosen.
            labels: the labels that each is unintended for, None for all.

        Raises:
            ValueError: an id is not a feature of the SAE, or comes twice; or `labels` are not as many.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < sae.config.num_features:
                raise ValueError(f"feature {i} is not there: the SAE has features 0 to {sae.config.num_features - 1}")
        if len(set(ids)) != len(ids):
            raise ValueError("a feature id is given twice")
        if labels is not None and len(labels) != len(ids):
            raise ValueError(f"{len(ids)} features but {len(labels)} entries of labels: give one of each")
        with torch.no_grad():
            rows = torch.tensor(ids, dtype=torch.long, device=sae.device)
            encoder = sae.encoder_directions[rows].float().cpu().clone()
            if sae.config.input_norm == "layer_norm":
                # The mean over the dimensions of a state is taken off before the product: direction · (h - mean(h)).
                encoder -= encoder.mean(dim=1, keepdim=True)
            return cls(
                feature_ids=ids,
                reasons=list(reasons) if reasons is not None else ["named by id"] * len(ids),
                encoder_directions=encoder,
                encoder_bias=sae.encoder_bias[rows].float().cpu().clone(),
                decoder_directions=sae.decoder_directions[rows].float().cpu().clone(),
                num_features=sae.config.num_features,
                spec=sae.config.hidden_state_spec(),
                input_norm=sae.config.input_norm,
                labels=None if labels is None else [None if own is None else list(own) for own in labels],
            )

    @classmethod
    def from_random(cls, sae: SAEForFeatureExtraction, count: int, *, seed: int = 0) -> "UnintendedFeatures":
        """As many features at random: the control that any claim about chosen features needs."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(sae.config.num_features, generator=generator)[:count].tolist()
        return cls.from_ids(sae, ids, reasons=["drawn at random, as a control"] * len(ids))

    @classmethod
    def from_keywords(
        cls,
        sae: SAEForFeatureExtraction,
        catalog: "FeatureCatalog",
        keywords: Sequence[str],
        *,
        max_features: int = 100,
        min_share: float = 0.5,
    ) -> "UnintendedFeatures":
        """Features that fire on one of `keywords`, or whose explanation holds one.

        A feature is chosen where the word at the peak, or one of the two words before it, is a keyword (whole words,
        any case) in at least `min_share` of its spans: on a causal model, a feature of a word often peaks just after
        it. First come those through which most of the activation on keywords goes: share · density · mean activation.

        Args:
            sae: the SAE of the catalogue.
            catalog: its spans and explanations.
            keywords: words or phrases.
            max_features: how many at most.
            min_share: share of the spans.

        Raises:
            ValueError: no keywords.
        """
        catalog.check_sae(sae)
        pattern = keyword_pattern(keywords)
        found: list[tuple[float, int, str]] = []
        for record in catalog.records:
            hits = [match for match in (keyword_near_peak(span, pattern) for span in record.spans) if match]
            share = len(hits) / len(record.spans) if record.spans else 0.0
            in_explanation = pattern.search(record.explanation) if record.explanation else None
            if in_explanation is None and (share < min_share or len(record.spans) < 2):
                continue
            words = ", ".join(sorted({hit.lower() for hit in hits})[:4])
            reason = f"{len(hits)} of {len(record.spans)} top spans peak on: {words}"
            if in_explanation is not None:
                reason = f"explanation holds {in_explanation.group()!r}; {reason}"
                share = 1.0
            found.append((share * record.density * record.mean_activation, record.feature, reason))
        found.sort(key=lambda item: (-item[0], item[1]))
        chosen = found[:max_features]
        if len(chosen) < len(found):
            logger.warning(
                "%d features peak on the keywords or name one; the %d through which most of their activation goes are "
                "taken, the others are not: raise max_features for all",
                len(found),
                len(chosen),
            )
        if not chosen:
            logger.warning(
                "no feature peaks on %s or names it: a classifier with these is a plain one",
                ", ".join(map(repr, keywords)),
            )
        return cls.from_ids(sae, [item[1] for item in chosen], reasons=[item[2] for item in chosen])

    @classmethod
    def from_attribute(
        cls,
        sae: SAEForFeatureExtraction,
        store: ActivationStore,
        attribute: Sequence[Any],
        labels: Sequence[Any],
        *,
        max_features: int = 100,
        false_discovery_rate: float = 0.05,
        pairs: bool = False,
    ) -> "UnintendedFeatures":
        """Features that tell a labelled attribute, among texts of the same label.

        For each feature, the AUC of its largest activation in a text for telling the group, within each true label,
        averaged over labels weighted by the smaller group; kept where the Benjamini-Hochberg rate is under
        `false_discovery_rate`, strongest first. A feature that is active in fewer than 5 of the texts that count is
        left out: nothing can be said of it.

        Args:
            sae: the SAE.
            store: hidden states of the texts.
            attribute: the group of each text; None where it is not known.
            labels: the task's label of each text.
            max_features: how many at most.
            pairs: the store holds pairs of texts, the chosen one first; attribute and labels are then of each pair,
                and what tells the attribute is the difference between the sides' activations.

        Raises:
            ValueError: lengths differ, or no label has two groups.
        """
        from scipy.stats import false_discovery_control

        count = store.num_texts // 2 if pairs else store.num_texts
        if not len(attribute) == len(labels) == count:
            raise ValueError(
                f"the store has {count} {'pairs' if pairs else 'texts'}, but there are {len(attribute)} attributes "
                f"and {len(labels)} labels: give one of each for every {'pair' if pairs else 'text'}"
            )
        activations = largest_activations(sae, store).numpy()
        if pairs:
            activations = activations[0::2] - activations[1::2]
        strength, p_values, group = attribute_strength(activations, attribute, labels)
        kept = false_discovery_control(p_values) < false_discovery_rate
        order = sorted(np.nonzero(kept)[0].tolist(), key=lambda feature: (-abs(strength[feature] - 0.5), feature))
        order = order[:max_features]
        groups = sorted({str(value): value for value in attribute if value is not None}.items())
        reasons = [_attribute_reason(group[f], [value for _, value in groups], strength[f]) for f in order]
        return cls.from_ids(sae, order, reasons=reasons)

    def fingerprint(self) -> str:
        """Of all that a classifier takes from it."""
        of_labels = "" if self.labels is None else f" {self.labels}"
        digest = hashlib.sha256(f"{self.feature_ids} {self.input_norm}{of_labels}".encode())
        for tensor in (self.encoder_directions, self.encoder_bias, self.decoder_directions):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `unintended_features.safetensors` and `unintended_features.json` (the reason for every feature)."""
        folder = Path(save_directory)
        tensors = {
            "encoder_directions": self.encoder_directions.contiguous(),
            "encoder_bias": self.encoder_bias.contiguous(),
            "decoder_directions": self.decoder_directions.contiguous(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS_NAME, tensors)
        features: list[dict[str, Any]] = [
            {"id": i, "reason": r} for i, r in zip(self.feature_ids, self.reasons, strict=True)
        ]
        for feature, of_labels in zip(features, self.labels or [], strict=False):
            feature["labels"] = of_labels
        config = {
            # A reader that knows no labels would keep every label off every feature.
            "format_version": 1 if self.labels is None else FORMAT_VERSION,
            "num_features": self.num_features,
            "spec": self.spec.to_dict() if self.spec else None,
            "input_norm": self.input_norm,
            "features": features,
        }
        write_json(folder / CONFIG_NAME, config)

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload unintended features", **hub: Any
    ) -> CommitInfo:
        """Uploads the features as a repo of their own, in one commit.

        Args:
            repo_id, commit_message: as for `push_to_hub` of transformers.
            hub: `private`, `token`, `revision`, `create_pr`, `commit_description`, likewise.

        Returns:
            The commit; its `oid` is what `revision=` of `from_pretrained` takes.

        Raises:
            OSError: no token, no permission, or no way to the Hub; says which.
        """
        return push(self.save_pretrained, repo_id, commit_message=commit_message, **hub)

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "UnintendedFeatures":
        """Reads a folder that `save_pretrained` wrote, or a repo that `push_to_hub` uploaded.

        Args:
            save_directory: the folder, or a Hub id.
            revision, token: of the repo on the Hub.

        Raises:
            FileNotFoundError: one of the two files is missing.
            OSError: there is no such repo or revision, no permission, or no way to the Hub; says which.
            ValueError: they do not belong together, or the format is newer.
        """
        folder = local_folder(str(save_directory), (CONFIG_NAME, WEIGHTS_NAME), revision=revision, token=token)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder of unintended features")
        config = read_json(folder / CONFIG_NAME)
        if config["format_version"] > FORMAT_VERSION:
            raise ValueError(f"{folder / CONFIG_NAME} is of a newer selfreg: upgrade selfreg")
        tensors = load_file(folder / WEIGHTS_NAME)
        if len(tensors["encoder_directions"]) != len(config["features"]):
            raise ValueError(f"{WEIGHTS_NAME} and {CONFIG_NAME} in {folder} hold different numbers of features")
        return cls(
            feature_ids=[feature["id"] for feature in config["features"]],
            reasons=[feature["reason"] for feature in config["features"]],
            num_features=config["num_features"],
            spec=HiddenStateSpec.from_dict(config["spec"]) if config["spec"] else None,
            input_norm=config.get("input_norm", "none"),
            labels=[f.get("labels") for f in config["features"]] if config["format_version"] > 1 else None,
            **tensors,
        )


def keyword_pattern(keywords: Sequence[str]) -> re.Pattern[str]:
    """Whole words or phrases, any case.

    Raises:
        ValueError: there are none.
    """
    if isinstance(keywords, str):
        raise ValueError(f"keywords must be a list of words, not one string: [{keywords!r}]")
    words = [keyword.strip() for keyword in keywords if keyword.strip()]
    if not words:
        raise ValueError("no keywords given: name at least one word")
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)


def keyword_near_peak(span: Span, pattern: re.Pattern[str]) -> str | None:
    """The keyword at the word of the peak or one of the two words before it; None where there is none."""
    text = str(span)
    start, end = len(span.before), len(span.before) + len(span.peak)
    # The word that the peak is a piece of.
    while start > 0 and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end].isalnum():
        end += 1
    words_before = [match.start() for match in re.finditer(r"\w+", text[:start])]
    begin = words_before[-2] if len(words_before) >= 2 else 0
    match = pattern.search(text[begin:end])
    return match.group() if match else None


def _attribute_reason(group: Any, groups: list[Any], auc: float) -> str:
    if len(groups) == 2:
        # Of the group that it fires for, which is the one that a reader asks about.
        other = next(value for value in groups if value != group)
        more, less = (group, other) if auc >= 0.5 else (other, group)
        return f"fires for {more!r} rather than {less!r} within a label: AUC {max(auc, 1 - auc):.3f}"
    return f"fires {'more' if auc >= 0.5 else 'less'} for {group!r} than for the rest within a label: AUC {auc:.3f}"


def has_two_groups(attribute: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether some label has texts of two groups, without which the attribute can't be told apart from the label."""
    found: dict[Any, set[Any]] = {}
    for group, label in zip(attribute, labels, strict=True):
        if group is not None:
            found.setdefault(label, set()).add(group)
    return any(len(groups) > 1 for groups in found.values())


def attribute_strength(
    activations: NDArray[np.floating[Any]], attribute: Sequence[Any], labels: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Any]]:
    """How well each feature tells the group of a text among texts of the same label.

    Args:
        activations: `[texts, features]`.
        attribute, labels: one of each for every text.

    Returns:
        AUC averaged over labels, weighted by the smaller group, `[features]`; its two-sided p-value (normal
        approximation of the Mann-Whitney statistic, with ties; 1 for a feature that is active in fewer than 5 of the
        texts); and the group that it is about. With more than two groups each is told from the rest, the one furthest
        from 0.5 counts, and p is multiplied by their number.

    Raises:
        ValueError: no label has texts of two groups.
    """
    from scipy.stats import norm

    known = np.array([value is not None for value in attribute])
    groups, labels_array = np.array(attribute, dtype=object), np.array(labels, dtype=object)
    values = sorted({str(value): value for value in groups[known]}.items())
    # With two groups, one against the rest says everything already.
    targets = [value for _, value in values][-1:] if len(values) == 2 else [value for _, value in values]
    num_features = activations.shape[1]
    best = np.full(num_features, 0.5)
    p_best = np.ones(num_features)
    which: list[Any] = [targets[0] if targets else None] * num_features
    usable = False
    for target in targets:
        total = np.zeros(num_features)
        variance = np.zeros(num_features)
        active = np.zeros(num_features, dtype=int)
        weights = 0.0
        for label in {str(value): value for value in labels_array}.values():
            rows = known & (labels_array == label)
            positive = (groups[rows] == target).astype(bool)
            smaller = min(positive.sum(), (~positive).sum())
            if smaller == 0:
                continue
            auc, var = _auc_and_variance(activations[rows], positive)
            total += smaller * auc
            variance += smaller**2 * var
            active += (activations[rows] != 0).sum(axis=0)
            weights += smaller
        if weights == 0:
            continue
        usable = True
        if weights < _FEW_TEXTS:
            logger.warning(
                "%d texts tell %r from the rest within a label: too few to tell features of it from chance",
                int(weights),
                target,
            )
        mean = total / weights
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(variance > 0, np.abs(total - 0.5 * weights) / np.sqrt(variance), 0.0)
        z[active < _MIN_ACTIVE] = 0.0
        p = np.minimum(1.0, 2 * norm.sf(z) * len(targets))
        better = np.abs(mean - 0.5) > np.abs(best - 0.5)
        best, p_best = np.where(better, mean, best), np.where(better, p, p_best)
        which = [target if b else old for b, old in zip(better, which, strict=True)]
    if not usable:
        raise ValueError("no label has texts of two groups: the attribute can't be told apart from the label")
    return best, p_best, which


def _auc_and_variance(
    activations: NDArray[np.floating[Any]], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from scipy.stats import rankdata

    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    n = n_pos + n_neg
    ranks = rankdata(activations, axis=0)
    auc = (ranks[positive].sum(axis=0) - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    # Under no difference, the rank sum is that of n_pos draws from these ranks without replacement; ties included.
    variance = ranks.var(axis=0) * n_pos * n_neg / (n - 1) / (n_pos * n_neg) ** 2
    return auc, variance

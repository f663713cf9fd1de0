"""UnintendedFeatures: the features that a classifier must not use, why, and the directions that a classifier needs."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from safetensors.torch import load_file
from torch import Tensor

from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import ActivationStore, save_tensors
from selfreg.features.activations import largest_activations
from selfreg.features.attribute import attribute_reason, attribute_strength
from selfreg.features.keywords import keyword_near_peak, keyword_pattern
from selfreg.features.limits import MAX_ATTRIBUTE_FEATURES, MAX_FEATURES
from selfreg.sae.input_norm import InputNorm
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import read_json, write_json
from selfreg.utils.hub import local_folder, push

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog

WEIGHTS_NAME = "unintended_features.safetensors"
CONFIG_NAME = "unintended_features.json"
FORMAT_VERSION = 2

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
        max_features: int = MAX_FEATURES,
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
        heard: set[str] = set()
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
                heard.add(in_explanation.group().lower())
            heard |= {hit.lower() for hit in hits}
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
        # A phrase is found by its first word where that is a keyword too.
        asked = {keyword.strip().lower() for keyword in keywords if keyword.strip()}
        silent = {word for word in asked if not any(f"{word} ".startswith(f"{hit} ") for hit in heard)}
        if chosen and silent:
            logger.warning("no feature peaks on these keywords, or names them: %s", ", ".join(sorted(silent)))
        return cls.from_ids(sae, [item[1] for item in chosen], reasons=[item[2] for item in chosen])

    @classmethod
    def from_attribute(
        cls,
        sae: SAEForFeatureExtraction,
        store: ActivationStore,
        attribute: Sequence[Any],
        labels: Sequence[Any],
        *,
        max_features: int = MAX_ATTRIBUTE_FEATURES,
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
            max_features: how many at most. Each is a direction that the classifier may not use, and the weaker ones
                tell little of the attribute: with 100 in the place of 30 the tasks of docs/evidence.md lost score, and
                the worst groups moved by .015 at most.
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
        if len(order) > max_features:
            logger.warning(
                "%d features tell the attribute; the strongest are taken (%d), the others are not: raise max_features "
                "for more",
                len(order),
                max_features,
            )
        order = order[:max_features]
        groups = sorted({str(value): value for value in attribute if value is not None}.items())
        reasons = [attribute_reason(group[f], [value for _, value in groups], strength[f]) for f in order]
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
    def from_pretrained(cls, save_directory: str | os.PathLike[str], **hub: Any) -> "UnintendedFeatures":
        """Reads a folder that `save_pretrained` wrote, or a repo that `push_to_hub` uploaded.

        Args:
            save_directory: the folder, or a Hub id.
            hub: `subfolder`, and of the repo on the Hub `revision`, `token`, `cache_dir` and `local_files_only`, as in
                transformers.

        Raises:
            FileNotFoundError: one of the two files is missing.
            OSError: there is no such repo or revision, no permission, or no way to the Hub; says which.
            ValueError: they do not belong together, or the format is newer.
        """
        folder = local_folder(str(save_directory), (CONFIG_NAME, WEIGHTS_NAME), **hub)
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

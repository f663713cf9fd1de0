"""The methods by name, and what each changes in selfreg's defaults; `methods.py` runs them."""

from typing import Any

from benchmarks.controllability.forms import FORMS

from selfreg.classifier.training_args import LOGIT_DECAY
from selfreg.utils.files import fingerprint_json

OFFSET = 0.8
_TERMS: dict[str, Any] = {"offset_weight": 0.0, "logit_decay": 0.0}
_OFF: dict[str, Any] = {
    **_TERMS,
    "penalty_weight": 0.0,
    "dependence_weight": 0.0,
    "remove_unintended": False,
    # As in selfreg itself, where it comes with the two terms.
    "ridge": "auto",
}
_OFFSET: dict[str, Any] = {**_OFF, "offset_weight": OFFSET}
SELFREG: dict[str, tuple[str, dict[str, Any]]] = {
    "selfreg": ("attribute", {}),
    "selfreg_keywords": ("keywords", {}),
    "selfreg_random": ("random", {}),
    "selfreg_random_keywords": ("random_keywords", {}),
    "selfreg_offset": ("attribute", _OFFSET),
    "selfreg_offset_keywords": ("keywords", _OFFSET),
    "selfreg_offset_random": ("random", _OFFSET),
    "selfreg_offset_random_keywords": ("random_keywords", _OFFSET),
    "selfreg_features": ("attribute:features", {}),
    "removal_only": ("attribute", {**_OFF, "remove_unintended": True}),
    "penalty_only": ("attribute", {k: v for k, v in _OFF.items() if k != "penalty_weight"}),
    "dependence_only": ("attribute", {k: v for k, v in _OFF.items() if k != "dependence_weight"}),
    "decay_only": ("attribute", {**_OFF, "logit_decay": LOGIT_DECAY}),
}
"""Which features, and what differs from selfreg's defaults."""
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "similarity_encoder": ("attribute", {"similarity": "encoder"}),
    "similarity_cosine": ("attribute", {"similarity": "cosine"}),
    "similarity_subspace": ("attribute", {"similarity": "subspace"}),
    "penalty_1": ("attribute", {"penalty_weight": 1.0}),
    "penalty_100": ("attribute", {"penalty_weight": 100.0}),
    "dependence_3": ("attribute", {"dependence_weight": 3.0}),
    "dependence_300": ("attribute", {"dependence_weight": 300.0}),
    "terms": ("attribute", {**_TERMS, "dependence_weight": 30.0}),
    "terms_keywords": ("keywords", {**_TERMS, "dependence_weight": 30.0}),
    "terms_decay": ("attribute", {"offset_weight": 0.0}),
    "terms_offset": ("attribute", {"logit_decay": 0.0}),
    "no_dependence": ("attribute", {"dependence_weight": 0.0}),
    "offset_terms_80": ("attribute", {"offset_weight": 0.8}),
    "no_removal": ("attribute", {"remove_unintended": False}),
    "smoothing_10": ("attribute", {"label_smoothing_factor": 0.1}),
    "smoothing_20": ("attribute", {"label_smoothing_factor": 0.2}),
    "ridge_001": ("attribute", {"ridge": 0.01}),
    "ridge_010": ("attribute", {"ridge": 0.1}),
    "ridge_100": ("attribute", {"ridge": 1.0}),
    "weight_decay_2": ("attribute", {"weight_decay": 2.0}),
    **{name: ("attribute", {}) for name in FORMS},
    "auto": ("attribute", {"penalty_weight": "auto", "dependence_weight": "auto"}),
    "features_10": ("attribute:10", {}),
    "features_100": ("attribute:100", {}),
    "features_300": ("attribute:300", {}),
    "features_30_keywords": ("keywords:30", {}),
    "pooling_last": ("attribute", {}),
    "removal_topk": ("attribute", {}),
    "sae_finetuned": ("attribute", {}),
    "offset_70": ("attribute", {**_OFF, "offset_weight": 0.7}),
    "offset_90": ("attribute", {**_OFF, "offset_weight": 0.9}),
    "offset_100": ("attribute", {**_OFF, "offset_weight": 1.0}),
    "offset_70_keywords": ("keywords", {**_OFF, "offset_weight": 0.7}),
    "offset_90_keywords": ("keywords", {**_OFF, "offset_weight": 0.9}),
    "offset_100_keywords": ("keywords", {**_OFF, "offset_weight": 1.0}),
}
"""One thing changed in selfreg each; computed where they are asked for with --methods."""
BASELINES = ("plain", "l2", "dropout", "label_smoothing", "focal", "spectral_norm", "leace", "projection")
PLAIN_LAST = "plain_pooling_last"
BALANCED = {"balanced": "plain", "balanced_smoothing": "label_smoothing", "balanced_l2": "l2"}
"""Baselines that are trained on balanced texts."""
ORACLES = {f"oracle_{round(100 * share)}": share for share in (0.25, 0.5, 0.75, 1.0)}
"""`balanced_l2`, told the group of every text it judges: to its logits comes this share of log p(label | group) of the
tied training set, less log p(label) of its own. Nobody has that; it is a point of reference, how one head that was
trained on balanced texts trades the worst group for the score under the tie."""


def result_key(trial: str, method: str) -> str:
    """By which a result is known: the key of its trial, and what the method's name stands for."""
    return fingerprint_json([trial, {**SELFREG, **ABLATIONS}.get(method)])


METHODS = (
    *(*SELFREG, *ABLATIONS, PLAIN_LAST, *BASELINES),
    *("scrubbing", "tfidf", "zero_shot", *BALANCED, *ORACLES),
)

"""How far an adapter has moved the hidden states away from what the SAE's features describe.

Shapes: B texts, T tokens, D hidden size, U unintended features, S tokens that count.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import check_texts, select_tokens
from selfreg.classifier.lora import adapter_off
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import feature_activations
from selfreg.sae.modeling import SAEForFeatureExtraction

logger = logging.getLogger(__name__)

LOST_SHARE = 0.1
"""The features are taken to describe the adapted states until this share of the variance that they explained before is
lost. A factor on the FVU itself would call an SAE that explains 97 % instead of 98 % broken, and let pass one that
explains 40 % instead of 60 %."""

_CHUNK = 64


@dataclass(frozen=True)
class AdapterDrift:
    """
    Attributes:
        before (`float`), after (`float`): fraction of the variance that the SAE leaves unexplained, in the states
            without the adapter and with it.
        correlations (`dict[int, float | None]`): of each unintended feature, by id: correlation over tokens of its
            activation (the rectified pre-activation, which is what is removed) before and after; None where it is the
            same on all tokens.
        num_states (`int`): tokens that these figures were taken over: those that counted without the adapter.
    """

    before: float
    after: float
    correlations: dict[int, float | None]
    num_states: int

    @property
    def features_describe_states(self) -> bool:
        """Whether the SAE has lost no more than `LOST_SHARE` of what it explained before."""
        return self.after - self.before <= LOST_SHARE * abs(1 - self.before)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def adapted_fvu(
    model: RegularizedSequenceClassifier, sae: SAEForFeatureExtraction, texts: Sequence[str]
) -> AdapterDrift:
    """Measures the SAE on the states of texts without and with the classifier's adapter.

    Warns in the log where its features no longer describe the latter: removal, penalty and dependence then act on
    something else.

    Args:
        model: a classifier with an adapter.
        sae: the SAE that its unintended features are of.
        texts: of the kind that the classifier is for; a few hundred will do.

    Raises:
        ValueError: there is no adapter (or it is merged), no text, an empty one, or an SAE of another width.
    """
    config = model.config
    if not config.adapter:
        merged = ": it was merged, so measure before merge_adapter()" if config.adapter_merged else ""
        raise ValueError(f"the classifier has no adapter whose effect could be measured{merged}")
    if sae.config.hidden_size != config.hidden_size:
        raise ValueError(
            f"the SAE takes states of width {sae.config.hidden_size}, the classifier {config.hidden_size}"
        )
    check_texts(texts)
    extractor = model.extractor()
    unintended = model.unintended
    before, after, common = _Errors(sae), _Errors(sae), _Correlation(len(unintended))
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        with adapter_off(model.backbone):
            plain = list(_states(model, extractor, chunk))
        for (old, keep_BT), (new, _) in zip(plain, _states(model, extractor, chunk), strict=True):
            # The same tokens both times: an adapter that makes sinks of some must not hide them from these figures.
            old_SD, new_SD = old[keep_BT], new[keep_BT]
            before.update(old_SD)
            after.update(new_SD)
            common.update(
                *(
                    feature_activations(states, model.encoder_directions, model.encoder_bias, unintended.input_norm)
                    for states in (old_SD, new_SD)
                )
            )
    if before.count == 0:
        raise ValueError("no text holds a token that counts by the classifier's token rule: give longer texts")
    drift = AdapterDrift(
        before.fvu, after.fvu, dict(zip(unintended.feature_ids, common.values, strict=True)), before.count
    )
    if not drift.features_describe_states:
        logger.warning(
            "the adapter has moved the hidden states away from the SAE: it explains %.1f %% of their variance, and "
            "%.1f %% before; the features no longer describe them. Adapt less (adapter_learning_rate, r, epochs), or "
            "train an SAE on the adapted states",
            100 * (1 - drift.after),
            100 * (1 - drift.before),
        )
    return drift


def _states(
    model: RegularizedSequenceClassifier, extractor: HiddenStateExtractor, texts: list[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states `[B, T, D]` and which tokens count `[B, T]`, batch by batch, on the head's device.

    Texts that hold nothing but sinks are left out: what the classifier reads of them is scaled down.
    """
    norm = model.config.reference_norm
    for _, batch, raw in extractor.forward_batches(texts):
        hidden, keep = select_tokens(raw, batch, extractor.spec.token_rule, float("inf") if norm is None else norm)
        device = model.score.weight.device
        yield raw.to(device), (keep & (hidden == raw).all(dim=-1)).to(device)


class _Errors:
    """Sums for the FVU of an SAE: Σ‖h - ĥ‖² / Σ‖h - h̄‖²."""

    def __init__(self, sae: SAEForFeatureExtraction) -> None:
        self.sae, self.count, self.error, self.squares = sae, 0, 0.0, 0.0
        self.total_D = torch.zeros(sae.config.hidden_size, dtype=torch.float64)

    def update(self, states_SD: Tensor) -> None:
        states_SD = states_SD.to(self.sae.device)
        rebuilt_SD = self.sae.decode(self.sae.encode(states_SD), states_SD)
        # Centred on the SAE's mean, so that the variance is not a small difference of large numbers.
        centred_SD = (states_SD - self.sae.mean).cpu().double()
        self.error += float((rebuilt_SD - states_SD).cpu().double().pow(2).sum())
        self.squares += float(centred_SD.pow(2).sum())
        self.total_D += centred_SD.sum(dim=0)
        self.count += len(states_SD)

    @property
    def fvu(self) -> float:
        return self.error / (self.squares - float(self.total_D.pow(2).sum()) / self.count)


class _Correlation:
    """Sums for the correlation of two values of each feature."""

    def __init__(self, num_features: int) -> None:
        self.count = 0
        # Of a, b, a², b², ab.
        self.sums = torch.zeros(5, num_features, dtype=torch.float64)

    def update(self, a_SU: Tensor, b_SU: Tensor) -> None:
        a, b = a_SU.cpu().double(), b_SU.cpu().double()
        self.sums += torch.stack([part.sum(dim=0) for part in (a, b, a * a, b * b, a * b)])
        self.count += len(a)

    @property
    def values(self) -> list[float | None]:
        a, b, aa, bb, ab = self.sums / self.count
        variances = (aa - a * a) * (bb - b * b)
        varies = (aa - a * a > 1e-12 * aa) & (bb - b * b > 1e-12 * bb)
        r = (ab - a * b) / variances.clamp_min(1e-300).sqrt()
        return [float(value) if alive else None for value, alive in zip(r, varies, strict=True)]

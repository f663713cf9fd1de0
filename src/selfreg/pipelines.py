"""The pipeline `sae-feature-extraction`: a text -> the features of a sparse autoencoder that are active in it.

Shapes: B texts, T tokens, F features of the SAE, S tokens that count in a batch, K active features of a token.
"""

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Pipeline

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import check_texts, select_tokens
from selfreg.sae.modeling import SAEForFeatureExtraction

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog

TASK = "sae-feature-extraction"


class SAEFeatureExtractionPipeline(Pipeline):
    """Tells which latent features of a sparse autoencoder are active in a text, where, and how strongly.

        features = pipeline("sae-feature-extraction", "me/my-sae", catalog="me/my-catalog")
        features("She has had a fever since Monday.", top_k=3)

    The backbone, its layer and the token rule are those that the SAE was trained with, from its config.

    Args:
        model: the SAE.
        catalog ([`FeatureCatalog`], its folder or Hub id, *optional*): names the features by their explanations.
        extractor ([`HiddenStateExtractor`], *optional*): a backbone that is in memory already; None: the one that the
            SAE names is loaded.
        top_k (`int`, defaults to 10): features of a text, the strongest first; here or in a call. None: all that are
            active.
        kwargs: as for every pipeline: `device`, `batch_size` and so on.

    Calls give, for each text, a list of dicts, one a feature: `label` (explanation, or `feature 12` without one),
    `score` (its largest activation in the text), `feature` (its number), `word`, `start` and `end` (the token with
    that activation, as characters of the text; of a token of the template None).

    Raises:
        ValueError: the SAE names no backbone and there is no extractor, or the catalogue is of another SAE.
    """

    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    # That of the backbone, which lies with it and not with the SAE.
    _load_tokenizer: Any = False

    model: Any
    tokenizer: Any

    def __init__(
        self,
        model: SAEForFeatureExtraction,
        *args: Any,
        catalog: "FeatureCatalog | str | os.PathLike[str] | None" = None,
        extractor: HiddenStateExtractor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        if extractor is None:
            extractor = HiddenStateExtractor.from_sae(model, device=self.device)
        else:
            spec = model.config.hidden_state_spec()
            if spec is not None:
                spec.check_features_fit(extractor.spec, "the SAE", "the extractor")
        self.extractor = extractor
        self.tokenizer = extractor.tokenizer
        if self.tokenizer.pad_token_id is None:
            # Pipelines don't batch without one; the prompts are padded by the extractor, with any token.
            self.tokenizer = copy.deepcopy(extractor.tokenizer)
            self.tokenizer.pad_token_id = extractor.pad_id
        self.catalog = _catalog_of(catalog, model)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # Only what is given: a call without top_k takes that of the pipeline.
        own = {"top_k": kwargs.pop("top_k")} if "top_k" in kwargs else {}
        if kwargs:
            raise ValueError(f"{TASK} takes top_k, catalog and extractor; it does not know {', '.join(kwargs)}")
        if own and own["top_k"] is not None and own["top_k"] < 1:
            raise ValueError(f"top_k={own['top_k']} must be at least 1, or None for all active features")
        return {}, {}, own

    def preprocess(self, input_: str, **preprocess_parameters: Any) -> dict[str, Any]:
        check_texts([input_])
        return {"text": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        texts = input_tensors["text"]
        # The extractor makes batches of its own, of like length.
        texts = [texts] if isinstance(texts, str) else texts
        extractor, num_features = self.extractor, self.model.config.num_features
        values_BF = torch.zeros(len(texts), num_features)
        peaks_BF = torch.zeros(len(texts), num_features, dtype=torch.long)
        bounds_B2 = torch.zeros(len(texts), 2, dtype=torch.long)
        for rows, batch, raw in extractor.forward_batches(texts):
            hidden, keep = select_tokens(raw, batch, extractor.spec.token_rule, extractor.reference_norm)
            features = self.model.encode(hidden[keep].to(self.model.device))
            values, peaks = _largest(features.indices.cpu(), features.values.cpu(), keep.cpu(), num_features)
            values_BF[rows], peaks_BF[rows] = values, peaks
            inside = batch.text_mask.long().cpu()
            start = inside.argmax(dim=1)
            bounds_B2[rows] = torch.stack([start, start + inside.sum(dim=1)], dim=1)
        return {"values": values_BF, "peaks": peaks_BF, "bounds": bounds_B2, "text": texts}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], top_k: int | None = 10, **postprocess_parameters: Any
    ) -> list[dict[str, Any]]:
        text = model_outputs["text"]
        text = text if isinstance(text, str) else text[0]
        values_F, peaks_F = model_outputs["values"][0], model_outputs["peaks"][0]
        start, end = model_outputs["bounds"][0].tolist()
        num_active = int((values_F > 0).sum())
        best = values_F.topk(num_active if top_k is None else min(top_k, num_active))
        encoded = self.extractor.tokenizer(text, verbose=False)
        first = self.extractor.layout.first_token(encoded["input_ids"])
        found = []
        for value, feature in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            position = int(peaks_F[feature])
            inside = start <= position < end
            span = encoded.encodings[0].token_to_chars(position - start + first) if inside else None
            found.append(
                {
                    "label": self._name(feature),
                    "score": value,
                    "feature": feature,
                    "word": None if span is None else text[slice(*span)],
                    "start": None if span is None else span[0],
                    "end": None if span is None else span[1],
                }
            )
        return found

    def _name(self, feature: int) -> str:
        explanation = None if self.catalog is None else self.catalog[feature].explanation
        return explanation or f"feature {feature}"


def _catalog_of(catalog: Any, sae: SAEForFeatureExtraction) -> "FeatureCatalog | None":
    # Here, as every `import selfreg` registers the pipeline, and a catalogue brings pyarrow along.
    from selfreg.features.catalog import FeatureCatalog

    if catalog is None:
        return None
    found = catalog if isinstance(catalog, FeatureCatalog) else FeatureCatalog.from_pretrained(catalog)
    found.check_sae(sae)
    return found


def _largest(indices_SK: Tensor, values_SK: Tensor, keep_BT: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Each feature's largest activation in each text, and the first position where it is, `[B, F]` both."""
    rows_S, positions_S = keep_BT.nonzero(as_tuple=True)
    place = (rows_S.unsqueeze(1) * num_features + indices_SK).flatten()
    position = positions_S.unsqueeze(1).expand_as(indices_SK).flatten()
    values = values_SK.flatten().float()
    largest = values.new_zeros(len(keep_BT) * num_features).scatter_reduce(0, place, values, "amax")
    end = keep_BT.shape[1]
    peaks = torch.full_like(largest, end, dtype=torch.long)
    peaks = peaks.scatter_reduce(0, place, torch.where(values == largest[place], position, end), "amin")
    return largest.view(-1, num_features), peaks.view(-1, num_features)

"""What a classifier is made of: whether extractor, SAE and features belong together, and the config that says so."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import check_choice
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.tasks import PROBLEM_TYPES, Task
from selfreg.features.selection import UnintendedFeatures
from selfreg.sae.modeling import SAEForFeatureExtraction


def check_parts(
    extractor: HiddenStateExtractor, sae: SAEForFeatureExtraction | None, unintended: UnintendedFeatures | None
) -> None:
    """
    Raises:
        ValueError: the SAE or the features are of another width, layer or model.
    """
    spec = extractor.spec
    if sae is not None:
        sae_spec = sae.config.hidden_state_spec()
        if sae.config.hidden_size != spec.hidden_size:
            raise ValueError(
                f"the SAE takes states of width {sae.config.hidden_size}, the extractor gives {spec.hidden_size}"
            )
        if sae_spec is not None:
            sae_spec.check_features_fit(spec, "the SAE", "the extractor")
    if unintended is None:
        return
    if unintended.hidden_size != spec.hidden_size:
        raise ValueError(
            f"the unintended features have width {unintended.hidden_size}, the extractor gives {spec.hidden_size}"
        )
    if unintended.spec is not None:
        unintended.spec.check_features_fit(spec, "the unintended features", "the extractor")
    if sae is not None and unintended.num_features != sae.config.num_features:
        raise ValueError(
            f"the unintended features are of an SAE with {unintended.num_features} features, this one has "
            f"{sae.config.num_features}"
        )


def label_names(task: Task, num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str]:
    """Names of the outputs of the head, by class id.

    Raises:
        ValueError: neither or both differ, or a task with one output is given several.
    """
    check_choice("task", task, Task)
    if task in ("regression", "preference"):
        given = num_labels if id2label is None else len(id2label)
        if given not in (None, 1):
            raise ValueError(f"task={task!r} has one output, a score; {given} labels are given: leave num_labels out")
        return dict(id2label) if id2label is not None else {0: "score"}
    if id2label is None:
        if num_labels is None:
            raise ValueError("give num_labels or id2label")
        return {i: f"LABEL_{i}" for i in range(num_labels)}
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must map class ids to names, such as {{0: 'no', 1: 'yes'}}; got {id2label!r}")
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(f"num_labels={num_labels}, but id2label names {len(id2label)} labels")
    return id2label


def classifier_config(
    extractor: HiddenStateExtractor,
    unintended: UnintendedFeatures | None,
    *,
    task: Task,
    id2label: dict[int, str],
    remove_unintended: bool,
) -> RegularizedSequenceClassifierConfig:
    """The config of a classifier over what `extractor` gives.

    Raises:
        ValueError: a feature is unintended for a label that is not there.
    """
    from selfreg import __version__

    spec = extractor.spec
    of_labels = unintended.labels if unintended else None
    known = set(id2label.values())
    for names in of_labels or []:
        unknown = sorted(set(names or []) - known)
        if unknown:
            raise ValueError(
                f"a feature is unintended for the label {unknown[0]!r}, which is none of the classifier's: "
                f"{', '.join(sorted(known))}"
            )
    layout = _as_json(asdict(extractor.layout))
    layout.pop("max_length")
    return RegularizedSequenceClassifierConfig(
        hidden_size=spec.hidden_size,
        base_model_name_or_path=spec.model,
        base_model_revision=spec.revision,
        base_model_gguf_file=spec.gguf_file,
        backbone_dtype=str(extractor.backbone.dtype).removeprefix("torch."),
        layer=spec.layer,
        pooling=extractor.pooling,
        token_rule=spec.token_rule,
        reference_norm=extractor.reference_norm,
        template=spec.template,
        max_length=spec.max_length,
        prompt_layout=layout,
        pad_id=extractor.pad_id,
        unintended_feature_ids=list(unintended.feature_ids) if unintended else [],
        unintended_reasons=list(unintended.reasons) if unintended else [],
        unintended_labels=of_labels,
        sae_num_features=unintended.num_features if unintended else None,
        input_norm=unintended.input_norm if unintended else "none",
        remove_unintended=remove_unintended,
        task=task,
        id2label=id2label,
        label2id={label: i for i, label in id2label.items()},
        problem_type=PROBLEM_TYPES[task],  # type: ignore[arg-type]
        selfreg_version=__version__,
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def unintended_mask(config: RegularizedSequenceClassifierConfig) -> Tensor | None:
    """For which labels each feature of a classifier is unintended, `[L, U]` bool; None: each for all."""
    mask = label_mask(config.unintended_labels, [name for _, name in sorted((config.id2label or {}).items())])
    return None if mask is None else torch.from_numpy(mask)


def label_mask(of_features: Sequence[Sequence[str] | None] | None, names: Sequence[str]) -> NDArray[np.bool_] | None:
    """The labels of each feature, as `UnintendedFeatures.labels` has them -> `[L, U]`, one row a name."""
    if of_features is None:
        return None
    columns = [[own is None or name in own for name in names] for own in of_features]
    return np.array(columns, dtype=bool).reshape(len(columns), len(names)).T.copy()

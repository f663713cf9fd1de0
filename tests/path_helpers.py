"""Small cached states of every task, with unintended features that help."""

from typing import Any

import torch
import torch.nn.functional as F

from selfreg import RegularizedSequenceClassifier, RegularizedSequenceClassifierConfig
from selfreg.classifier.states import PooledStates

WIDTH, FEATURES = 12, 3
TASKS = ("single_label", "multi_label", "regression", "preference")


def make_states(task: str, count: int = 300, seed: int = 0) -> PooledStates:
    """States whose variances span four orders of magnitude; the features are the first directions, and help."""
    generator = torch.Generator().manual_seed(seed)
    sides = 2 if task == "preference" else 1
    spread = torch.logspace(0, -2, WIDTH)
    pooled = torch.randn(count * sides, WIDTH, generator=generator) * spread + 0.5
    activations = (pooled @ directions().T).relu()
    noise = torch.randn(len(pooled), 3, generator=generator)
    maps = torch.randn(3, WIDTH, generator=generator) / spread.clamp_min(0.1)
    scores = (pooled - 0.5) @ maps.T + noise
    if task == "single_label":
        labels = scores.argmax(dim=1)
    elif task == "multi_label":
        labels = (scores > 0).float()
    elif task == "regression":
        labels = 10 + 3 * scores[:, 0]
    else:
        pairs, better = pooled.unflatten(0, (-1, 2)), scores[:, 0].unflatten(0, (-1, 2)).argsort(descending=True)
        rows = torch.arange(count).unsqueeze(1)
        return PooledStates(
            pairs[rows, better], activations.unflatten(0, (-1, 2))[rows, better], torch.zeros(count, dtype=torch.long)
        )
    return PooledStates(pooled, activations, labels)


def directions() -> torch.Tensor:
    rows = torch.eye(FEATURES, WIDTH) + 0.2 * torch.ones(FEATURES, WIDTH)
    return F.normalize(rows, dim=1)


def make_model(task: str, states: PooledStates | None = None, **kwargs: Any) -> RegularizedSequenceClassifier:
    """A classifier without a backbone, fitted to the standardisation of `states`."""
    names = {0: "a", 1: "b", 2: "c"} if task in ("single_label", "multi_label") else {0: "score"}
    config = RegularizedSequenceClassifierConfig(
        hidden_size=WIDTH,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        unintended_feature_ids=list(range(FEATURES)),
        unintended_reasons=[""] * FEATURES,
        remove_unintended=False,
        task=task,
        **kwargs,
    )
    model = RegularizedSequenceClassifier(config)
    model.decoder_directions.copy_(directions())
    model.encoder_directions.copy_(directions().flip(1))
    if states is not None:
        model.set_standardization(states.pooled, states.labels)
    return model

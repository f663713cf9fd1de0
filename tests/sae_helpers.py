"""Data and settings for the tests of SAE training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfreg import SAEConfig, SAEForFeatureExtraction, SAETrainingArguments


class States:
    """A mixture of sparse directions, as hidden states are."""

    def __init__(self, count: int = 1000, width: int = 16, seed: int = 0, dictionary: int = 0) -> None:
        directions = torch.randn(24, width, generator=torch.Generator().manual_seed(100 + dictionary))
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(count, 24, generator=generator) * (torch.rand(count, 24, generator=generator) < 0.15)
        self.states = 3 + weights @ directions + 0.02 * torch.randn(count, width, generator=generator)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"hidden_states": self.states[index]}


def make_sae(width: int = 16, **kwargs: Any) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    return SAEForFeatureExtraction(SAEConfig(hidden_size=width, num_features=48, k=4, **kwargs))


def make_args(folder: Path, **kwargs: Any) -> SAETrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 100,
        "num_train_epochs": 10,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "seed": 0,
    }
    return SAETrainingArguments(str(folder), **{**defaults, **kwargs})

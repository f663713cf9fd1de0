"""How well an SAE describes a set of hidden states."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from selfreg.sae.data import StatesDataset, check_states, iterate_states
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.processes import largest_over, own_part, sum_over


@dataclass(frozen=True)
class SAEStatistics:
    """
    Attributes:
        fvu (`float`): fraction of variance unexplained, Σ‖h - ĥ‖² / Σ‖h - h̄‖².
        l0 (`float`): mean number of active features of a state.
        dead_fraction (`float`): share of features that are active on no state.
        num_states (`int`): states that these figures were taken over.
    """

    fvu: float
    l0: float
    dead_fraction: float
    num_states: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def evaluate_sae(sae: SAEForFeatureExtraction, dataset: StatesDataset) -> SAEStatistics:
    """Measures an SAE on an `ActivationStore` or any dataset whose rows hold `hidden_states`, in one pass.

    Within `one_batch` every process reads its part of the states, and all get the figures of the whole.

    Raises:
        ValueError: the dataset is empty, or its states are of another width, layer or backbone.
    """
    check_states(sae.config, dataset)
    fired = torch.zeros(sae.config.num_features, dtype=torch.bool, device=sae.device)
    # Sums over many states lose digits in float32; on the CPU, since not every accelerator has float64.
    total = torch.zeros(sae.config.hidden_size, dtype=torch.float64)
    squares = error = 0.0
    active = count = 0
    for chunk in iterate_states(dataset, part=own_part()):
        states = chunk.to(sae.device)
        features = sae.encode(states)
        # Centred on the SAE's mean, so that the variance is not a small difference of large numbers.
        centred = states - sae.mean
        error += float((sae.decode(features, states) - states).pow(2).sum(dim=1).cpu().double().sum())
        squares += float(centred.pow(2).sum(dim=1).cpu().double().sum())
        total += centred.sum(dim=0).cpu().double()
        fired |= fired_features(features.indices, features.values, len(fired))
        active += int((features.values > 0).sum())
        count += len(states)
    sums = sum_over(torch.cat([torch.tensor([squares, error, active, count], dtype=torch.float64), total]))
    squares, error, active_sum, num_states = sums[:4].tolist()
    variance = squares - float(sums[4:].pow(2).sum()) / num_states
    return SAEStatistics(
        fvu=error / variance,
        l0=active_sum / num_states,
        dead_fraction=float(1 - largest_over(fired).double().mean()),
        num_states=round(num_states),
    )


def fired_features(indices: Tensor, values: Tensor, num_features: int) -> Tensor:
    """Which features are active anywhere: `[..., k]` -> `[num_features]`, bool."""
    fired = torch.zeros(num_features, dtype=torch.bool, device=indices.device)
    fired[indices[values > 0]] = True
    return fired

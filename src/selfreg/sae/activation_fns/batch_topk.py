"""BatchTopK: the k · N largest of a batch of N states, each with as many as it needs (Bussmann et al. 2024)."""

import torch
from torch import Tensor

from selfreg.sae.activation_fns.base import SelectingActivation
from selfreg.sae.kernels import Select, above, select_active
from selfreg.utils.processes import gather_over, largest_over, together

_FIRST = 2
"""Times k: how many of each state are looked at first. Few states have more, and those are looked at again."""


class BatchTopK(SelectingActivation):
    """Training: a(h) = the k · N largest of ReLU(pre) over a batch. Inference: those above a threshold that training
    has followed."""

    threshold = "running"

    def select(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        num_states, num_features = len(x_ND), len(W_enc_FD)
        wanted = num_states * k
        places = min(_FIRST * k, num_features)
        values, indices = select_active(x_ND, W_enc_FD, b_enc_F, places)
        while True:
            # The largest of the whole batch, whichever process holds a state.
            cut = gather_over(values.flatten()).topk(wanted * together(), sorted=False).values.amin()
            # Whatever of a state was not looked at is no larger than the least of it that was.
            cut_short = values.amin(dim=1) > cut
            if places == num_features or not largest_over(cut_short.any()):
                break
            places = min(2 * places, num_features)
            rows = cut_short.nonzero().flatten()
            more_values, more_indices = select_active(x_ND[rows], W_enc_FD, b_enc_F, places)
            values, indices = _widen(values, places), _widen(indices, places)
            values[rows], indices[rows] = more_values, more_indices
        # Equal values at the cut are few; keeping all of them makes the choice independent of their order.
        return values * (values >= cut), indices

    def select_in_inference(self, threshold: Tensor | None) -> Select:
        # Without a threshold yet, no batch has been seen: the k largest of each state.
        return above(threshold) if threshold is not None and threshold > 0 else select_active


def _widen(tensor: Tensor, places: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, places - tensor.shape[1]))

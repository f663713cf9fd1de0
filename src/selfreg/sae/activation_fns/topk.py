"""TopK: the k largest of each state (Gao et al. 2024)."""

from torch import Tensor

from selfreg.sae.activation_fns.base import SelectingActivation
from selfreg.sae.kernels import select_active


class TopK(SelectingActivation):
    """a(h) = TopK(ReLU(pre)); the same in training and inference."""

    def select(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return select_active(x_ND, W_enc_FD, b_enc_F, k)

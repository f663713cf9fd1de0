"""What an activation has to offer."""

from typing import Protocol

from torch import Tensor


class Activation(Protocol):
    """Chooses the active features of states. Shapes: N states, D hidden size, F features, K places a state."""

    learns_threshold: bool
    """Whether inference keeps what is above a threshold that training has learned."""

    def select(self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The choice in training.

        Args:
            x_ND: centred states, after the subtraction of b_dec.
            W_enc_FD, b_enc_F: the encoder, or the rows of it that may be chosen.
            k: features of a state, on average.

        Returns:
            values `[N, K]`, none negative, and indices `[N, K]`; 0 where a place is not used.
        """
        ...

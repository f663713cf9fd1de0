"""What keeps a classifier's weights off the unintended features.

Shapes: L labels, D hidden size, U unintended features, N texts.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg.activations.prompt import check_choice
from selfreg.classifier.tasks import residuals
from selfreg.sae.input_norm import InputNorm, length_factor

Similarity = Literal["encoder", "dot", "cosine", "subspace"]

_RANK_TOLERANCE = 1e-6


def similarity_penalty(
    weight: Tensor, directions: Tensor, similarity: Similarity = "encoder", mask: Tensor | None = None
) -> Tensor:
    """How much the weights of a linear head point along unintended features.

    With rows of `directions` at unit length, û_c:

    - `"encoder"`: mean over c, y of |w_y · û_c|, for encoder directions (Wu et al. 2025, without the bias terms);
    - `"dot"`: the same, for decoder directions;
    - `"cosine"`: mean over c, y of |cos(w_y, û_c)|, for decoder directions;
    - `"subspace"`: mean over y of ‖P_U w_y‖² / ‖w_y‖², P_U the projector on the span of the decoder directions; the
      same however they are scaled, rotated or repeated.

    Args:
        weight (`[L, D]`): weights of the head.
        directions (`[U, D]`): directions of the unintended features, of the kind that the similarity asks for.
        similarity: which one.
        mask (`[L, U]`, bool, *optional*): for which labels each feature is unintended; the means are over those
            pairs. None: all.

    Returns:
        `[]`; 0 where there are no features.

    Raises:
        ValueError: an unknown similarity, another width, or a mask of another shape.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0]])
        >>> float(similarity_penalty(weight, torch.tensor([[0.0, 2.0]]), "dot"))
        4.0
        >>> round(float(similarity_penalty(weight, torch.tensor([[0.0, 2.0]]), "subspace")), 4)
        0.64
    """
    check_choice("similarity", similarity, Similarity)
    if weight.shape[-1] != directions.shape[-1]:
        raise ValueError(f"the weights have width {weight.shape[-1]}, the features {directions.shape[-1]}")
    if mask is not None and mask.shape != (len(weight), len(directions)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, must be {(len(weight), len(directions))}: labels, features"
        )
    if len(directions) == 0:
        return weight.new_zeros(())
    if similarity == "subspace":
        if mask is None:
            return subspace_share(weight, orthonormal_basis(directions))
        shares = [
            subspace_share(row, orthonormal_basis(directions[of_label]))
            for row, of_label in zip(weight.split(1), mask, strict=True)
        ]
        return torch.stack(shares).mean()
    if similarity == "cosine":
        weight = F.normalize(weight, dim=1)
    return _masked_mean((weight @ F.normalize(directions, dim=1).T).abs(), mask)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp_min(1)


def subspace_share(weight: Tensor, basis: Tensor) -> Tensor:
    """Mean over y of ‖Q w_y‖² / ‖w_y‖² for an orthonormal basis Q `[rank, D]` -> `[]`."""
    square = weight.pow(2).sum(dim=1)
    tiny = torch.finfo(weight.dtype).tiny
    return ((weight @ basis.T).pow(2).sum(dim=1) / square.clamp_min(tiny)).mean()


def orthonormal_basis(directions: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of `directions` `[U, D]` -> `[rank, D]`."""
    rows = F.normalize(directions.double(), dim=1)
    _, singular, vectors = torch.linalg.svd(rows, full_matrices=False)
    largest = singular.max() if len(singular) else 0.0
    return vectors[singular > _RANK_TOLERANCE * largest].to(directions.dtype)


def feature_activations(
    hidden_states: Tensor, encoder_directions: Tensor, encoder_bias: Tensor, input_norm: InputNorm = "none"
) -> Tensor:
    """ReLU pre-activations of features in raw hidden states: `[..., D]` -> `[..., U]`.

    Where the SAE normalises each state by itself, times what it divides the state by, so that an activation of 1 is
    one decoder direction in the raw state there too.
    """
    bias = encoder_bias * length_factor(hidden_states, input_norm)
    return torch.relu(hidden_states @ encoder_directions.T + bias)


def remove_features(
    hidden_states: Tensor,
    encoder_directions: Tensor,
    encoder_bias: Tensor,
    decoder_directions: Tensor,
    input_norm: InputNorm = "none",
) -> Tensor:
    """h' = h - Σ_c a_c(h) · W_dec[c], a_c the ReLU pre-activation, no TopK and no decoder bias.

    Args:
        hidden_states (`[..., D]`): raw.
        encoder_directions (`[U, D]`), encoder_bias (`[U]`), decoder_directions (`[U, D]`): in raw hidden-state space.
        input_norm: how their SAE normalises each state by itself.
    """
    activations = feature_activations(hidden_states, encoder_directions, encoder_bias, input_norm)
    return hidden_states - activations @ decoder_directions


def dependence_directions(states: Tensor, activations: Tensor, constant: Tensor) -> Tensor:
    """C_c = Cov(h, z_c | label) / sd(z_c | label), of the residuals after `constant`.

    Args:
        states (`[N, D]`): pooled states, standardised, as the head sees them; for pairs, chosen less rejected.
        activations (`[N, U]`): largest activation of each unintended feature in each text; for pairs likewise.
        constant (`[N, P]`): what of the label is held constant; see `tasks.held_constant`. For a single label this
            centres both within each label.

    Returns:
        `[U, D]`; a row of zeros for a feature that does not vary within any label.
    """
    centred_h, centred_z = residuals(states, constant), residuals(activations, constant)
    spread = centred_z.pow(2).mean(dim=0).sqrt()
    covariance = centred_z.T @ centred_h / len(states)
    # Rounding leaves a constant column a spread of about 1e-16 times its size, not zero.
    alive = spread > 1e-9 * activations.double().abs().amax(dim=0).clamp_min(1e-30)
    return torch.where(alive.unsqueeze(1), covariance / spread.clamp_min(1e-30).unsqueeze(1), 0.0).float()


def dependence_term(weight: Tensor, directions: Tensor, mask: Tensor | None = None) -> Tensor:
    """D = mean over c, y of (w_y · C_c)²: how much the logits move with the unintended features, within a label.

    Args:
        weight (`[L, D]`): weights of the head, over standardised states.
        directions (`[U, D]`): from `dependence_directions`.
        mask (`[L, U]`, bool, *optional*): for which labels each feature is unintended; None: all.

    Returns:
        `[]`; 0 where there are no features.
    """
    if len(directions) == 0:
        return weight.new_zeros(())
    return _masked_mean((weight @ directions.T).pow(2), mask)

"""How few features are chosen for a state: one module an activation, behind one registry.

An activation chooses from the pre-activations `x @ W_enc.T + b_enc`. The kernels do the rest, forward and backward: to
them a choice is the values and indices of the active features, with 0 where a place of `[states, K]` is not used.
"""

from selfreg.sae.activation_fns.base import Activation, Active, Weights
from selfreg.sae.activation_fns.batch_topk import BatchTopK
from selfreg.sae.activation_fns.jumprelu import JumpReLU
from selfreg.sae.activation_fns.relu import ReLU
from selfreg.sae.activation_fns.topk import TopK

ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(),
    "batch_topk": BatchTopK(),
    "jumprelu": JumpReLU(),
    "relu": ReLU(),
}
"""By the name that `SAEConfig.activation` holds."""

__all__ = ["ACTIVATIONS", "Activation", "Active", "BatchTopK", "JumpReLU", "ReLU", "TopK", "Weights"]

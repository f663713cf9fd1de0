"""What a classifier gives."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass
class RegularizedClassifierOutput(SequenceClassifierOutput):
    """
    Attributes:
        loss (`[]`, *optional*), logits (`[batch, num_labels]`): as in transformers.
        pooled (`[batch, hidden_size]`, *optional*): what the head was given, before standardisation; with
            `output_pooled=True`.
        unintended_activations (`[batch, U]`, *optional*): largest activation of each unintended feature; likewise,
            where texts were given.
    """

    pooled: Tensor | None = None
    unintended_activations: Tensor | None = None

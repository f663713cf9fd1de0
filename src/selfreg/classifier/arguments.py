"""RegularizationArguments: the weights of the two terms, for any training arguments."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from selfreg.activations.prompt import check_choice
from selfreg.classifier.penalty import Similarity

AUTO: Literal["auto"] = "auto"
"""A weight that is chosen by `path.resolve_weights`."""

if TYPE_CHECKING:
    Weight = float | Literal["auto"]
else:
    # HfArgumentParser takes no union of a number and a string; __post_init__ makes of the string what it says.
    Weight = str


@dataclass
class RegularizationArguments:
    r"""
    What regularised training adds to a loss: task loss + penalty_weight · similarity + dependence_weight · dependence.

    Given to a [`RegularizationMixin`] as `regularization=`, beside whatever training arguments its Trainer takes; on a
    command line `HfArgumentParser((RegularizationArguments, RewardConfig))`. Training arguments that inherit from it
    carry it themselves, as [`RegularizedTrainingArguments`] do: `@dataclass class Args(RegularizationArguments,
    RewardConfig)`.

    Args:
        penalty_weight (`float` or `"auto"`, defaults to 10.0): weight of the similarity between head and unintended
            features; 0 turns it off. With 10 the unintended use is zero on all data sets of docs/evidence.md; with 1 a
            hundred features keep up to a third of it. `"auto"`, for a [`RegularizedSequenceClassifier`], takes the
            strongest that costs no more validation loss than chance may account for; see [`resolve_weights`].
        similarity (`str`, defaults to `"dot"`): `"encoder"`, `"dot"`, `"cosine"` or `"subspace"`; see
            [`similarity_penalty`].
        dependence_weight (`float` or `"auto"`, defaults to 10.0): weight of what still depends on the unintended
            features; 0 turns it off. See [`dependence_term`]. `"auto"` as above; with both, they are chosen together,
            in the ratio of 1 to 30.
        dependence_momentum (`float`, defaults to 0.99): where the backbone trains, what each batch leaves of the
            running estimate of the dependence. See [`RunningDependence`].
    """

    penalty_weight: Weight = field(
        default=10.0, metadata={"help": "Weight of the similarity penalty; 0: off; auto: chosen by validation loss."}
    )
    similarity: str = field(default="dot", metadata={"help": "encoder, dot, cosine or subspace."})
    dependence_weight: Weight = field(
        default=10.0, metadata={"help": "Weight of the dependence term; 0: off; auto: chosen by validation loss."}
    )
    dependence_momentum: float = field(
        default=0.99, metadata={"help": "What a batch leaves of the running estimate where the backbone trains."}
    )

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, Similarity)
        for name in ("penalty_weight", "dependence_weight"):
            setattr(self, name, weight_of(name, getattr(self, name)))
        if not 0 <= self.dependence_momentum <= 1:
            raise ValueError(f"dependence_momentum={self.dependence_momentum} must be from 0 to 1")
        # Where it is mixed into training arguments, theirs come next.
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

    @property
    def term_weights(self) -> tuple[float, float]:
        """`penalty_weight` and `dependence_weight` as numbers.

        Raises:
            ValueError: one is still "auto".
        """
        for name in ("penalty_weight", "dependence_weight"):
            if getattr(self, name) == AUTO:
                raise ValueError(
                    f"{name}='auto' is no number yet: selfreg.classifier.path.resolve_weights chooses one for a "
                    "RegularizedSequenceClassifier over cached states; give a number for other models"
                )
        return self.penalty_weight, self.dependence_weight  # type: ignore[return-value]


def number_of(value: Any) -> float:
    """A number as a command line or a mapping gives it; NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def weight_of(name: str, value: Any) -> Any:
    """A weight as a number, or "auto".

    Raises:
        ValueError: it is neither, or negative.
    """
    if value == AUTO:
        return AUTO
    weight = number_of(value)
    if not math.isfinite(weight):
        raise ValueError(f"{name}={value!r} is not known: a finite number, or 'auto'")
    if weight < 0:
        raise ValueError(f"{name}={value} must not be negative")
    return weight

"""RegularizationArguments: the weights of the two terms, for any training arguments."""

from dataclasses import dataclass, field

from selfreg.activations.prompt import check_choice
from selfreg.classifier.penalty import Similarity


@dataclass
class RegularizationArguments:
    r"""
    What regularised training adds to a loss: task loss + penalty_weight · similarity + dependence_weight · dependence.

    Given to a [`RegularizationMixin`] as `regularization=`, beside whatever training arguments its Trainer takes; on a
    command line `HfArgumentParser((RegularizationArguments, RewardConfig))`. Training arguments that inherit from it
    carry it themselves, as [`RegularizedTrainingArguments`] do: `@dataclass class Args(RegularizationArguments,
    RewardConfig)`.

    Args:
        penalty_weight (`float`, defaults to 1.0): weight of the similarity between head and unintended features; 0
            turns it off.
        similarity (`str`, defaults to `"dot"`): `"encoder"`, `"dot"`, `"cosine"` or `"subspace"`; see
            [`similarity_penalty`].
        dependence_weight (`float`, defaults to 30.0): weight of what still depends on the unintended features; 0 turns
            it off. See [`dependence_term`].
        dependence_momentum (`float`, defaults to 0.99): where the backbone trains, what each batch leaves of the
            running estimate of the dependence. See [`RunningDependence`].
    """

    penalty_weight: float = field(default=1.0, metadata={"help": "Weight of the similarity penalty; 0: off."})
    similarity: str = field(default="dot", metadata={"help": "encoder, dot, cosine or subspace."})
    dependence_weight: float = field(default=30.0, metadata={"help": "Weight of the dependence term; 0: off."})
    dependence_momentum: float = field(
        default=0.99, metadata={"help": "What a batch leaves of the running estimate where the backbone trains."}
    )

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, Similarity)
        for name in ("penalty_weight", "dependence_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.dependence_momentum <= 1:
            raise ValueError(f"dependence_momentum={self.dependence_momentum} must be from 0 to 1")
        # Where it is mixed into training arguments, theirs come next.
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

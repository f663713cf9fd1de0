"""What must be the same for two hidden states to mean the same."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from selfreg.activations.backbone import Layer
from selfreg.activations.prompt import TokenRule


@dataclass(frozen=True)
class HiddenStateSpec:
    """How hidden states were made. Written into stores, SAEs, catalogues and classifiers, and compared between them.

    Attributes:
        model (`str`): name of the backbone, as `resolve_model` takes it.
        revision (`str`, *optional*): commit on the Hub.
        gguf_file (`str`, *optional*): file in the repo or folder.
        layer (`int` or `"final"`): see `hidden_states_at`.
        hidden_size (`int`): width of a state.
        token_rule (`str`): see `select_tokens`.
        template (`str`, *optional*): the prompt around each text.
        max_length (`int`): tokens of a prompt.
    """

    model: str
    revision: str | None
    gguf_file: str | None
    layer: Layer
    hidden_size: int
    token_rule: TokenRule
    template: str | None
    max_length: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HiddenStateSpec":
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def check_features_fit(self, other: "HiddenStateSpec", mine: str, others: str) -> None:
        """Raises ValueError where features found on `self`'s states do not describe `other`'s.

        Another template or length of text still gives states of the same space; another width, layer or model does
        not. A revision counts where both sides know theirs.
        """
        for name in ("hidden_size", "layer", "model", "gguf_file"):
            self._check_same(other, name, mine, others)
        if self.revision is not None and other.revision is not None:
            self._check_same(other, "revision", mine, others)

    def check_same(self, other: "HiddenStateSpec", mine: str, others: str) -> None:
        """Raises ValueError where the states of `self` and `other` were not made in the very same way."""
        for field in fields(self):
            self._check_same(other, field.name, mine, others)

    def _check_same(self, other: "HiddenStateSpec", name: str, mine: str, others: str) -> None:
        a, b = getattr(self, name), getattr(other, name)
        if a != b:
            raise ValueError(
                f"{mine} and {others} do not belong together: {name} is {a!r} in {mine} and {b!r} in {others}; "
                "use states of the same model and layer for both"
            )

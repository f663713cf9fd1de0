"""The span of text around the token that activates a feature most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A piece of a text, cut around one token (the peak).

    Attributes:
        text_id (`int`): index of the text in the texts that the catalogue was built from.
        position (`int`): index of the peak token among the tokens of the prompt.
        activation (`float`): activation of the feature at the peak, never below 0.
        before (`str`): context before the peak.
        peak (`str`): what the peak token stands for in the text, whole characters.
        after (`str`): context after the peak.
    """

    text_id: int
    position: int
    activation: float
    before: str
    peak: str
    after: str

    def marked(self, left: str = "<<", right: str = ">>") -> str:
        """The span as one string, with the peak between `left` and `right`."""
        return f"{self.before}{left}{self.peak}{right}{self.after}"

    def __str__(self) -> str:
        return f"{self.before}{self.peak}{self.after}"

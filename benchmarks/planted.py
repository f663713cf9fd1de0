"""A catalogue whose truth is known: features that react to 40 concepts by construction, without any SAE.

`planted.yaml` holds the concepts. Each trigger in each frame makes a text that activates the feature, more strongly
the more typical the trigger; the strongest ten are its top spans, and the others give the spans of each quarter. A
near miss uses a word of these texts in another sense; the other silent texts are drawn from those of other concepts.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfreg.features.records import FeatureRecord
from selfreg.features.spans import Span

TOP, PER_QUARTER, SILENT = 10, 5, 15
_JITTER = 4.0


@dataclass(frozen=True)
class Concept:
    """What a feature reacts to.

    Attributes:
        name (`str`): a word or two.
        legitimate (`bool`): whether it is a reason to flag a message as toxic.
        description (`str`): the explanation that an oracle gives.
        triggers, frames, near_misses (`tuple[str, ...]`): see `planted.yaml`.
    """

    name: str
    legitimate: bool
    description: str
    triggers: tuple[str, ...]
    frames: tuple[str, ...]
    near_misses: tuple[str, ...]

    def texts(self) -> list[tuple[int, str]]:
        """Number of the trigger and text, the peak between « and »."""
        return [
            (number, _sentence(frame.replace("{}", _with_peak(trigger))))
            for number, trigger in enumerate(self.triggers)
            for frame in self.frames
        ]

    def found_in(self, text: str) -> bool:
        """Whether a text holds a trigger, or the word of one that is a peak."""
        wordings = [_plain(trigger) for trigger in self.triggers]
        wordings += [_parts(_with_peak(trigger))[1] for trigger in self.triggers]
        return any(_holds(text, wording) for wording in wordings)


def load_concepts() -> list[Concept]:
    """The concepts of `planted.yaml`.

    Raises:
        ValueError: what is marked in a near miss is no word of the texts of its concept.
    """
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf8"))
    concepts = []
    for row in rows:
        for key in ("triggers", "frames", "near_misses"):
            row[key] = tuple(map(str, row[key]))
        concept = Concept(**row)
        texts = [_plain(text) for _, text in concept.texts()]
        for near in concept.near_misses:
            word = _parts(near)[1]
            if not any(_holds(text, word) for text in texts):
                raise ValueError(f"{concept.name}: {word!r} of the near miss {near!r} is in none of its texts")
        concepts.append(concept)
    return concepts


def planted_records(concepts: list[Concept]) -> list[FeatureRecord]:
    """One record a concept, without explanations; feature i is concept i. The same ones every time."""
    numbers: dict[str, int] = {}
    pool = [(index, text) for index, concept in enumerate(concepts) for _, text in concept.texts()]
    return [_record(index, concept, pool, numbers) for index, concept in enumerate(concepts)]


def _record(feature: int, concept: Concept, pool: list[tuple[int, str]], numbers: dict[str, int]) -> FeatureRecord:
    generator = random.Random(feature)

    def span(text: str, activation: float) -> Span:
        before, peak, after = _parts(text)
        text_id = numbers.setdefault(before + peak + after, len(numbers))
        return Span(text_id, len(before.split()), activation, before, peak, after)

    active = [
        span(text, len(concept.triggers) - number + generator.uniform(0, _JITTER)) for number, text in concept.texts()
    ]
    active.sort(key=lambda found: -found.activation)
    weakest_first = active[TOP:][::-1]
    quarters = [weakest_first[len(weakest_first) * q // 4 : len(weakest_first) * (q + 1) // 4] for q in range(4)]
    others = [_plain(text) for index, text in pool if index != feature and not concept.found_in(_plain(text))]
    return FeatureRecord(
        feature=feature,
        mean_activation=sum(found.activation for found in active) / len(active),
        max_activation=active[0].activation,
        num_texts=len(active),
        spans=active[:TOP],
        quantile_spans=[generator.sample(quarter, PER_QUARTER) for quarter in quarters],
        near_misses=[span(text, 0.0) for text in concept.near_misses],
        silent_spans=[span(_mark_any(text, generator), 0.0) for text in generator.sample(others, SILENT)],
    )


def _with_peak(trigger: str) -> str:
    """The trigger with its peak between « and »: the last word where it does not say."""
    return trigger if "«" in trigger else re.sub(r"(\S+)$", r"«\1»", trigger)


def _sentence(text: str) -> str:
    return re.sub(r"\w", lambda match: match[0].upper(), text, count=1)


def _parts(text: str) -> tuple[str, str, str]:
    before, rest = text.split("«")
    peak, after = rest.split("»")
    return before, peak, after


def _plain(text: str) -> str:
    return text.replace("«", "").replace("»", "")


def _holds(text: str, wording: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", text, re.IGNORECASE) is not None


def _mark_any(text: str, generator: random.Random) -> str:
    start, end = generator.choice([match.span() for match in re.finditer(r"\w+", text)])
    return f"{text[:start]}«{text[start:end]}»{text[end:]}"

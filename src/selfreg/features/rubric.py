"""Rubric: what is a legitimate reason for a label, and what is not, in a form that a judge can decide by."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from selfreg.features.records import VerdictName
from selfreg.utils.files import fingerprint_json
from selfreg.utils.validation import explain_errors

GUIDE = "https://github.com/selfreg/selfreg/blob/main/docs/rubrics.md"

_SHIPPED_FOLDER = Path(__file__).parents[1] / "rubrics"
SHIPPED_RUBRICS = tuple(sorted(path.stem for path in _SHIPPED_FOLDER.glob("*.yaml")))
"""Names of the rubrics that come with the package."""

_YAML_SUFFIXES = (".yaml", ".yml")
_TEXT_SUFFIXES = (".txt", ".md")
_SUFFIXES = _YAML_SUFFIXES + _TEXT_SUFFIXES

_Line = Annotated[str, StringConstraints(min_length=1), AfterValidator(lambda text: _one_line(text))]
_Lines = Annotated[list[_Line], Field(min_length=1)]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if not line:
        raise ValueError("must not be empty")
    return line


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RubricExample(_Part):
    """A feature that was judged by hand, for a judge to learn from."""

    feature: _Line = Field(description="Phrase that says what a feature reacts to, as an explainer would write it.")
    verdict: VerdictName = Field(description="Is it a legitimate reason: Yes, Probably, Maybe or No.")
    why: _Line = Field(description="One line.")
    label: _Line | None = Field(None, description="The label that the verdict is about, with per_label.")


class Rubric(_Part):
    """What a classifier may base a label on, and what it may not.

    Guide: docs/rubrics.md. `Rubric.load` reads one; its fields may as well be given here.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or does not fit the others.
    """

    task: _Line = Field(description="One line on what the classifier labels.")
    labels: dict[_Line, _Line] = Field(min_length=2, description="Each label, with one line on what it means.")
    per_label: bool = Field(False, description="Ask for a verdict for each label, not one for all of them.")
    legitimate: _Lines = Field(description="A list of the kinds of features that the classifier may use.")
    not_legitimate: _Lines = Field(description="A list of the kinds of features that it must not use.")
    label_reasons: dict[_Line, _Lines] = Field(
        default_factory=dict, description="With per_label: what is legitimate for that label, as a list for each."
    )
    examples: list[RubricExample] = Field(
        default_factory=list, description="Features judged by hand: feature, verdict, why and, with per_label, label."
    )

    @model_validator(mode="after")
    def _labels_fit(self) -> "Rubric":
        if self.label_reasons and not self.per_label:
            raise ValueError("label_reasons are for rubrics with per_label: true")
        for name in self.label_reasons:
            self._check_label(name, "label_reasons")
        for example in self.examples:
            if example.label is not None:
                if not self.per_label:
                    raise ValueError(f"the example {example.feature!r} has a label, so per_label must be true")
                self._check_label(example.label, f"the example {example.feature!r}")
        return self

    def _check_label(self, label: str, where: str) -> None:
        if label not in self.labels:
            raise ValueError(f"{where}: there is no label {label!r}; there are {', '.join(self.labels)}")

    @classmethod
    def load(cls, source: "Rubric | str | os.PathLike[str]") -> "Rubric":
        """A rubric from wherever it is.

        Args:
            source: a rubric, which is returned as it is; the name of one that comes with the package (see
                `SHIPPED_RUBRICS`); the path of a .yaml or .yml file with the fields of this class; or free text, by
                itself or as the path of a .txt or .md file. A string is taken for a path where it is one line and ends
                like such a file, or holds a slash and no white space.

        Returns:
            The rubric; of free text, a `FreeTextRubric`.

        Raises:
            FileNotFoundError: the path is not there.
            ValueError: a field is missing, unknown or wrong; the rubric is empty; it is nearly the name of one that
                comes with the package; or the file is of another kind or not in UTF-8.
        """
        if isinstance(source, Rubric):
            return source
        if isinstance(source, str) and source.strip() in SHIPPED_RUBRICS:
            return _from_yaml(_SHIPPED_FOLDER / f"{source.strip()}.yaml")
        if isinstance(source, str) and not _looks_like_path(source):
            # A single word is no rubric that anybody could mean, where it is so near to a name.
            near = difflib.get_close_matches(source.strip().casefold(), SHIPPED_RUBRICS, n=1, cutoff=0.8)
            if near:
                raise ValueError(f"the rubric {source.strip()!r} is not known; did you mean {near[0]!r}?")
            return _from_text(source, "the rubric")
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"the rubric {path} is not there (working directory: {Path.cwd()}); those that come with selfreg are "
                f"{', '.join(SHIPPED_RUBRICS)}"
            )
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"the rubric {path} must be a file of one of the kinds {', '.join(_SUFFIXES)}")
        if path.suffix.lower() in _YAML_SUFFIXES:
            return _from_yaml(path)
        return _from_text(_read(path), f"the rubric {path}")

    def text(self, label: str | None = None) -> str:
        """The rubric as it stands in a prompt.

        Args:
            label: the label that the question is about, where the rubric is per label. What is special to it comes
                last, so that all questions begin alike.

        Raises:
            ValueError: there is no such label, or the rubric is not per label.
        """
        if label is not None:
            if not self.per_label:
                raise ValueError(f"the rubric has one verdict for all labels, so none for {label!r} alone")
            self._check_label(label, "the rubric")
        meanings = "; ".join(f"{name} ({meaning})" for name, meaning in self.labels.items())
        lines = [self.task, f"Labels: {meanings}."]
        lines += ["Legitimate reasons:", *_items(self.legitimate)]
        lines += ["Not legitimate:", *_items(self.not_legitimate)]
        if self.examples:
            lines += ["Examples:", *_items(map(_example_line, self.examples))]
        if label is not None:
            lines.append(f"The label in question: {label}.")
        for name, reasons in self.label_reasons.items():
            if label is None or name == label:
                lines += [f"Legitimate for {name}:", *_items(reasons)]
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """SHA-256 of all that it says, as hex."""
        return fingerprint_json(self.model_dump(mode="json"))


class FreeTextRubric(Rubric):
    """A rubric in a person's own words. One verdict for all labels; `Rubric.load` makes it of plain text."""

    free_text: str = Field(min_length=1, description="The rubric.")
    task: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    legitimate: list[str] = Field(default_factory=list)
    not_legitimate: list[str] = Field(default_factory=list)

    def text(self, label: str | None = None) -> str:
        """The rubric as it stands in a prompt. Raises ValueError where a label is given: it has none."""
        if label is not None:
            raise ValueError(f"a rubric in free text has one verdict for all labels, so none for {label!r} alone")
        return self.free_text


def _items(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _example_line(example: RubricExample) -> str:
    about = f" for {example.label}" if example.label is not None else ""
    return f'"{example.feature}"{about}: {example.verdict}. {example.why}'


def _from_text(text: str, source: str) -> FreeTextRubric:
    if not text.strip():
        raise ValueError(f"{source} is empty: say what is a legitimate reason for the label")
    return FreeTextRubric(free_text=text.strip())


def _from_yaml(path: Path) -> Rubric:
    source = f"the rubric {path}"
    text = _read(path)
    if not text.strip():
        raise ValueError(f"{source} is empty: say what is a legitimate reason for the label; guide: {GUIDE}")
    try:
        # BaseLoader leaves all scalars as they are written: others make of Yes and No, which are our verdicts and may
        # be labels, True and False, and numbers of labels that are numbers.
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold keys and values: {GUIDE}; free text goes into a .txt or .md file")
    try:
        return Rubric.model_validate(values)
    except ValidationError as error:
        found = explain_errors(error, Rubric)
        if any(line.startswith("unknown key 'examples.") for line in found):
            found.append("a value with a comma inside {...} must be quoted")
        lines = "\n  ".join(found)
        raise ValueError(f"{source} can't be used; guide: {GUIDE}\n  {lines}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the rubric {path} is not a text in UTF-8: {error}") from error


def _looks_like_path(text: str) -> bool:
    line = text.strip()
    if "\n" in line:
        return False
    return line.lower().endswith(_SUFFIXES) or bool(re.fullmatch(r"\S*[/\\]\S*", line))

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from selfreg.features.records import VERDICTS
from selfreg.features.rubric import SHIPPED_RUBRICS, FreeTextRubric, Rubric

TEXT = "Legitimate: the kind of harm that is asked for.\nNot legitimate: politeness."
FIELDS: dict[str, Any] = {
    "task": "A classifier names the disease.",
    "labels": {"flu": "a virus", "gout": "a joint"},
    "legitimate": ["symptoms", "findings"],
    "not_legitimate": ["gender"],
}
PER_LABEL = {
    **FIELDS,
    "per_label": True,
    "label_reasons": {"gout": ["a swollen toe"]},
    "examples": [{"feature": "a fever", "verdict": "Probably", "why": "Gout has it seldom.", "label": "flu"}],
}


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    return path


class TestText:
    def test_whole(self) -> None:
        examples = [{"feature": "she", "verdict": "No", "why": "It is gender."}]
        assert Rubric(**FIELDS, examples=examples).text() == (
            "A classifier names the disease.\n"
            "Labels: flu (a virus); gout (a joint).\n"
            "Legitimate reasons:\n- symptoms\n- findings\n"
            "Not legitimate:\n- gender\n"
            'Examples:\n- "she": No. It is gender.'
        )

    def test_label_comes_last(self) -> None:
        rubric = Rubric(**PER_LABEL)
        flu, gout = rubric.text("flu"), rubric.text("gout")
        shared = flu.removesuffix("The label in question: flu.")
        assert '- "a fever" for flu: Probably. Gout has it seldom.' in shared
        assert gout == shared + "The label in question: gout.\nLegitimate for gout:\n- a swollen toe"
        assert rubric.text().endswith("Legitimate for gout:\n- a swollen toe")

    def test_label_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="no label 'cold'; there are flu, gout"):
            Rubric(**PER_LABEL).text("cold")
        with pytest.raises(ValueError, match="one verdict for all labels"):
            Rubric(**FIELDS).text("flu")
        with pytest.raises(ValueError, match="one verdict for all labels"):
            Rubric.load(TEXT).text("flu")

    def test_fingerprint(self) -> None:
        assert Rubric(**FIELDS).fingerprint() == Rubric(**FIELDS).fingerprint()
        others = [Rubric(**PER_LABEL), Rubric(**{**FIELDS, "task": "Another."}), Rubric.load("a"), Rubric.load("b")]
        assert len({rubric.fingerprint() for rubric in [Rubric(**FIELDS), *others]}) == 5


class TestFields:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": {"flu": "a virus"}}, "at least 2"),
            ({"legitimate": []}, "at least 1"),
            ({"not_legitimate": [" "]}, "must not be empty"),
            ({"label_reasons": {"flu": ["fever"]}}, "label_reasons are for rubrics with per_label: true"),
            ({"per_label": True, "label_reasons": {"cold": ["fever"]}}, "label_reasons: there is no label 'cold'"),
            ({"per_label": True, "label_reasons": {"flu": []}}, "at least 1"),
            ({"examples": [{"feature": "f", "verdict": "Yes", "why": "w", "label": "flu"}]}, "per_label must be true"),
            ({"examples": [{"feature": "f", "verdict": "Sure", "why": "w"}]}, "'Yes', 'Probably', 'Maybe' or 'No'"),
        ],
    )
    def test_wrong(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            Rubric(**{**FIELDS, **changes})

    def test_folded_lines_become_one(self) -> None:
        assert Rubric(**{**FIELDS, "task": "A classifier\n  names it.\n"}).task == "A classifier names it."


class TestLoad:
    def test_rubric_as_it_is(self) -> None:
        rubric = Rubric(**FIELDS)
        assert Rubric.load(rubric) is rubric

    @pytest.mark.parametrize("name", ["r.yaml", "my rubric.YML"])
    def test_yaml(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path / name, PER_LABEL)
        assert Rubric.load(path) == Rubric.load(str(path)) == Rubric(**PER_LABEL)

    def test_words_that_yaml_takes_for_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(
            "task: t\nlabels: {yes: it is so, no: it is not, 1: one}\nper_label: true\nlegitimate: [on]\n"
            "not_legitimate: [2026-01-01]\nexamples: [{feature: off, verdict: No, why: 3.0, label: no}]\n"
        )
        rubric = Rubric.load(path)
        assert list(rubric.labels) == ["yes", "no", "1"]
        assert rubric.per_label
        assert (rubric.legitimate, rubric.not_legitimate) == (["on"], ["2026-01-01"])
        assert (rubric.examples[0].verdict, rubric.examples[0].label) == ("No", "no")

    def test_missing_field(self, tmp_path: Path) -> None:
        values = {key: value for key, value in FIELDS.items() if key != "not_legitimate"}
        path = write(tmp_path / "r.yaml", values)
        with pytest.raises(ValueError, match="'not_legitimate' is missing: A list of the kinds") as caught:
            Rubric.load(path)
        assert str(path) in str(caught.value)
        assert "docs/rubrics.md" in str(caught.value)

    def test_unknown_key(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="unknown key 'legitimat'; did you mean 'legitimate'"):
            Rubric.load(write(tmp_path / "r.yaml", {**FIELDS, "legitimat": ["x"]}))
        values = {**FIELDS, "examples": [{"feature": "f", "verdict": "No", "why": "w", "lable": "flu"}]}
        with pytest.raises(ValueError, match=r"unknown key 'examples\.0\.lable'; did you mean 'label'"):
            Rubric.load(write(tmp_path / "r.yaml", values))

    @pytest.mark.parametrize(
        ("content", "message"),
        [("a: [", "is not YAML"), ("just words", "must hold keys and values"), (" \n", "is empty")],
    )
    def test_bad_yaml(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            Rubric.load(tmp_path / "r.yaml")

    @pytest.mark.parametrize("text", [TEXT, "Only symptoms count.", "symptoms", "Either/or is fine by the physician."])
    def test_free_text(self, text: str) -> None:
        rubric = Rubric.load(f"  {text}\n")
        assert isinstance(rubric, FreeTextRubric)
        assert rubric.text() == text
        assert not rubric.per_label

    @pytest.mark.parametrize("name", ["rubric.txt", "my rubric.MD"])
    def test_text_file(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text(f"\ufeff{TEXT}\n", encoding="utf8")
        assert Rubric.load(path).text() == Rubric.load(str(path)).text() == TEXT

    @pytest.mark.parametrize("name", ["rubric.md", "rubrics/toxic", "a rubric.yaml", Path("words")])
    def test_path_that_is_not_there(self, name: str | Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"is not there.*toxic_chat"):
            Rubric.load(name)

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "rubric.pdf").write_bytes(b"%PDF")
        with pytest.raises(ValueError, match=r"rubric\.pdf must be a file of one of the kinds"):
            Rubric.load(tmp_path / "rubric.pdf")
        (tmp_path / "rubric.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"rubric\.txt is not a text in UTF-8"):
            Rubric.load(tmp_path / "rubric.txt")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "rubric.txt").write_text(" \n")
        for empty in ("", " \n ", tmp_path / "rubric.txt"):
            with pytest.raises(ValueError, match="is empty"):
                Rubric.load(empty)

    @pytest.mark.parametrize("name", ["toxicchat", "Toxic-Chat", "reward_modeling"])
    def test_nearly_a_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="did you mean '(toxic_chat|reward_modelling)'"):
            Rubric.load(name)


class TestShipped:
    def test_names(self) -> None:
        assert SHIPPED_RUBRICS == ("diagnosis", "reward_modelling", "toxic_chat")

    @pytest.mark.parametrize("name", SHIPPED_RUBRICS)
    def test_teaches_by_examples_of_every_verdict(self, name: str) -> None:
        rubric = Rubric.load(name)
        assert 6 <= len(rubric.examples) <= 10
        assert {example.verdict for example in rubric.examples} == set(VERDICTS)
        # About 4 characters are a token: a rubric stands in every prompt.
        for label in rubric.labels if rubric.per_label else [None]:
            assert 600 < len(rubric.text(label)) < 1600

    def test_diagnosis_has_reasons_for_each_label(self) -> None:
        rubric = Rubric.load("diagnosis")
        assert rubric.per_label
        assert list(rubric.label_reasons) == list(rubric.labels)
        assert len(rubric.labels) == 5


def test_example_of_the_guide(tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "rubrics.md"
    (example,) = re.findall(r"```yaml\n(.*?)```", guide.read_text(encoding="utf8"), re.DOTALL)
    (tmp_path / "r.yaml").write_text(example, encoding="utf8")
    rubric = Rubric.load(tmp_path / "r.yaml")
    assert {example.verdict for example in rubric.examples} == set(VERDICTS)
    for field in Rubric.model_fields:
        assert f"`{field}`" in guide.read_text(encoding="utf8")

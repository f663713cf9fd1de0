import json
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from selfreg.data import _check, _check_labels, load_rows, load_task
from selfreg.recipe import DataRecipe, RecipeError, SplitRecipe

ROWS = [
    {"text": "one fever", "label": "ill", "sex": "f"},
    {"text": "two", "label": "well", "sex": None},
    {"text": "three", "label": "ill", "sex": "m"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> SplitRecipe:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SplitRecipe(path=str(path))


def recipe(tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], **kwargs: Any) -> DataRecipe:
    return DataRecipe(
        train=write(tmp_path / "train.jsonl", train), eval={"test": write(tmp_path / "test.jsonl", test)}, **kwargs
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.xz", "csv", "parquet"])
def test_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write(path, ROWS)
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    else:
        pd.DataFrame(ROWS).to_parquet(path, index=False)
    assert [row["text"] for row in load_rows(SplitRecipe(path=str(path)))] == ["one fever", "two", "three"]
    assert len(load_rows(SplitRecipe(path=str(path), split="train[:67%]"))) == 2


def test_labels_groups_and_duplicates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = [{"text": "four", "label": "well", "sex": "f"}, {"text": "two ", "label": "well", "sex": "f"}]
    data = load_task(recipe(tmp_path, [*ROWS, ROWS[0]], test, group="sex"), "sex")
    assert data.labels == ["ill", "well"]
    assert data.train.texts == ["one fever", "two", "three"]
    assert data.train.labels == [0, 1, 0]
    assert data.train.groups == data.train.attribute == ["f", None, "m"]
    assert data.eval["test"].texts == ["four"]
    assert data.eval["test"].attribute is None
    assert "train: 1 repeated texts left out" in caplog.text
    assert "test: 1 texts that stand in the training set left out" in caplog.text


def test_numeric_labels_keep_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i} for i in (10, 2, 1)]
    assert load_task(recipe(tmp_path, rows, [{"text": "x", "label": 2}]), None).labels == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("train", "test", "kwargs", "message"),
    [
        (ROWS, [{"text": "x", "label": "dead"}], {}, "data.eval.test: label 'dead' never stands in the training set"),
        ([{"text": "a", "label": 1}], ROWS, {}, "one label only"),
        ([{"text": " ", "label": 1}, *ROWS], ROWS, {}, "data 'train': row 0 has an empty text"),
        (ROWS, [{"text": None, "label": "ill"}], {}, "data 'test': row 0 has an empty text"),
        ([{"text": "a", "label": None}, *ROWS], ROWS, {}, "row 0 has no label in column 'label'"),
        (ROWS, ROWS, {"text": "body"}, "there is no column 'body'; it has text, label, sex"),
        (ROWS, ROWS, {"label": "y"}, "there is no column 'y'"),
        (ROWS, ROWS, {"group": "age"}, "there is no column 'age'"),
        (ROWS, ROWS, {}, "every text stands in the training set too"),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_task(recipe(tmp_path, train, test, **kwargs), None)


def test_missing_attribute_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data 'train': there is no column 'age'"):
        load_task(recipe(tmp_path, ROWS, [{"text": "x", "label": "ill"}]), "age")
    with pytest.raises(RecipeError, match="there is no file"):
        load_rows(SplitRecipe(path=str(tmp_path / "no.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{not json")
    with pytest.raises(RecipeError, match=r"can't read .*bad\.jsonl"):
        load_rows(SplitRecipe(path=str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "text\tlabel\n", "t.tsv is none of .jsonl, .json, .csv, .parquet"),
        ("missing.txt", None, "there is no file .*missing.txt"),
        ("broken.jsonl", '{"text": "a", "label"\n', "can't read .*broken.jsonl .*: JSON parse error"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_rows(SplitRecipe(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5, "label": "a"}, "row 1 holds 5 in column 'text', which is no text"),
        ({"text": "a", "label": ["a"]}, "row 1 has the label \\['a'\\] in column 'label': a label is one name"),
    ],
)
def test_values_of_the_wrong_kind_are_named(row: dict[str, object], message: str) -> None:
    data = DataRecipe(train=SplitRecipe(path="x"), eval={"test": SplitRecipe(path="x")})
    rows = [{"text": "a", "label": "b"}, row]

    def check() -> None:
        _check(rows, "train", data, label=True)
        _check_labels(rows, "train", "label", "single_label")

    with pytest.raises(RecipeError, match=message):
        check()


def pairs(*rows: tuple[str | None, str | None]) -> list[dict[str, Any]]:
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows]


class TestOtherTasks:
    def test_many_labels(self, tmp_path: Path) -> None:
        rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["x"]}]
        data = load_task(recipe(tmp_path, rows, [{"text": "d", "label": ["y"]}]), None, "multi_label")
        assert data.labels == ["x", "y"]
        assert data.train.labels == [[1, 1], [0, 0], [1, 0]]
        assert data.train.of_texts(data.labels)[0] == ["x + y", "none", "x"]
        with pytest.raises(RecipeError, match="data.eval.test: label 'z' is none of the training set's: x, y"):
            load_task(recipe(tmp_path, rows, [{"text": "d", "label": ["z"]}]), None, "multi_label")
        with pytest.raises(RecipeError, match="row 0 has the label 'x' .* it is a list of different names"):
            load_task(recipe(tmp_path, [{"text": "a", "label": "x"}], rows), None, "multi_label")

    def test_numbers(self, tmp_path: Path) -> None:
        rows = [{"text": str(i), "label": i / 2, "w": i} for i in range(10)]
        data = load_task(recipe(tmp_path, rows, [{"text": "x", "label": 3}], weight="w"), None, "regression")
        assert data.train.labels == [i / 2 for i in range(10)]
        assert data.train.weights == list(range(10))
        assert data.train.strata() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        with pytest.raises(RecipeError, match="with task regression it is a number"):
            load_task(recipe(tmp_path, [{"text": "a", "label": "x"}], rows), None, "regression")
        bad = [{**row, "w": -1 if i == 1 else 1} for i, row in enumerate(rows)]
        with pytest.raises(RecipeError, match="data.weight: row 1 of 'train' holds -1"):
            load_task(recipe(tmp_path, bad, rows, weight="w"), None, "regression")

    def test_pairs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train = pairs(("a", "b"), ("c", "c"), ("a", "b"), ("d", "e"))
        data = load_task(recipe(tmp_path, train, pairs(("a", "b"), ("x", "y"))), None, "preference")
        assert len(data.train) == 2
        assert "train: 1 pairs with the same text on both sides left out" in caplog.text
        assert len(data.eval["test"]) == 1
        assert data.train.prompts(lambda: None, "{text}") == ["a", "b", "d", "e"]
        assert data.train.of_texts([])[0] == ["chosen", "rejected"] * 2
        with pytest.raises(RecipeError, match="data 'train': row 1: the side 'rejected' is missing or empty"):
            load_task(recipe(tmp_path, pairs(("a", "b"), ("c", None)), train), None, "preference")
        with pytest.raises(RecipeError, match="every pair has the same text on both sides"):
            load_task(recipe(tmp_path, pairs(("a", "a")), train), None, "preference")
        with pytest.raises(RecipeError, match="there is no column 'chosen'"):
            load_task(recipe(tmp_path, ROWS, ROWS), None, "preference")

    def test_group_that_only_an_eval_set_has(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        test = [{"text": "x", "label": ROWS[0]["label"], "sex": "other"}]
        load_task(recipe(tmp_path, ROWS, test, group="sex"), None)
        assert "test: group 'other' never stands in the training set" in caplog.text

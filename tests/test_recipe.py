from pathlib import Path
from typing import Any

import pytest

from selfreg import Recipe, RegularizedTrainingArguments
from selfreg.recipe import RecipeError


def minimal(**changes: Any) -> dict[str, Any]:
    return {
        "output": "out",
        "backbone": {"model": "m", "layer": 1},
        "data": {"train": {"path": "a.jsonl"}, "eval": {"test": {"path": "b.jsonl"}}},
        "features": {"attribute": "gender"},
        **changes,
    }


def test_defaults() -> None:
    recipe = Recipe.from_dict(minimal())
    assert (recipe.seed, recipe.task) == (0, "single_label")
    assert (recipe.backbone.pooling, recipe.backbone.max_length, recipe.backbone.template) == ("mean", 128, None)
    assert (recipe.sae.num_features, recipe.sae.k, recipe.sae.activation) == (4608, 32, "topk")
    assert recipe.sae.finetune is not None
    assert recipe.sae.finetune.learning_rate == 5e-5
    classifier = recipe.classifier
    # As measured by benchmarks/demo_control.py, and those that a user of the Trainer gets.
    args = RegularizedTrainingArguments("x")
    for name in ("penalty_weight", "similarity", "dependence_weight", "weight_decay", "label_smoothing_factor"):
        assert getattr(classifier, name) == getattr(args, name), name
    for name in ("offset_weight", "logit_decay", "ridge"):
        assert getattr(classifier, name) is getattr(args, name) is None
    # None: as `from_backbone` made the model, whose default is True.
    assert classifier.remove_unintended
    assert args.remove_unintended is None
    assert (classifier.epochs, classifier.learning_rate) == (args.num_train_epochs, args.learning_rate)
    assert recipe.features.max_features is None


@pytest.mark.parametrize(
    ("features", "limit"),
    [
        ({"attribute": "g"}, 30),
        ({"attribute": "g", "max_features": None}, 30),
        ({"keywords": ["a"]}, 100),
        ({"judge": {"local": "m"}, "explainer": {"local": "m"}, "rubric": "toxic_chat"}, 100),
        ({"attribute": "g", "max_features": 200}, 200),
    ],
    ids=str,
)
def test_so_many_features_by_attribute_and_more_otherwise(features: dict[str, Any], limit: int) -> None:
    assert Recipe.from_dict({**minimal(), "features": features}).features.limit == limit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clasifier": {}}, "unknown key 'clasifier'; did you mean 'classifier'"),
        ({"classifier": {"dependance_weight": 1}}, "'classifier.dependance_weight'; did you mean 'dependence_weight'"),
        ({"data": {"train": {"path": "a"}, "eval": {"x": {"pth": "b"}}}}, "'data.eval.x.pth'; did you mean 'path'"),
        ({"sae": {"pretrain": {"epoch": 1}}}, "'sae.pretrain.epoch'; did you mean 'epochs'"),
        ({"sae": {"k": 99, "num_features": 9}}, "k=99 is over num_features=9"),
        ({"backbone": {"layer": 1}}, "'backbone.model' is missing"),
        (
            {"backbone": {"model": "m", "pooling": "max"}},
            r"backbone.pooling: .*'last', 'mean' or 'cls' \(given: 'max'\)",
        ),
        ({"classifier": {"penalty_weight": -1}}, "classifier.penalty_weight: .*greater than or equal to 0"),
        ({"features": {}}, "by one of judge, keywords, attribute, ids; given: none"),
        ({"features": {"ids": [1], "attribute": "g"}}, "given: attribute, ids"),
        ({"features": {"judge": {"local": "m"}}}, "judge needs explainer and rubric"),
        ({"features": {"judge": {"endpoint": "http://x"}}}, "endpoint needs model"),
        ({"baselines": ["plain", "magic"]}, "baseline 'magic' is not known; there are plain, l2, dropout"),
        ({"task": "ranking"}, "task: .*'single_label'"),
        ({"task": "regression", "classifier": {"logit_decay": 0.1}}, "task regression has no logits; leave it out"),
        ({"classifier": {"logit_decay": float("inf")}}, "classifier.logit_decay: .*finite"),
        ({"classifier": {"ridge": -1}}, "classifier.ridge: .*greater than or equal to 0"),
        ({"classifier": {"ridge": "auto", "lora": {"r": 8}}}, "ridge: auto needs states that stay as they are"),
        ({"classifier": {"offset_weight": 1.5}}, "classifier.offset_weight: .*less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named_with_the_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(minimal(**changes))


YAML = """
output: out
backbone: {model: m, layer: 1}
data:
  train: {path: "${WHERE}/a.jsonl"}
  eval: {test: {path: b.jsonl}}
features: {attribute: gender}
"""


def test_yaml_with_variables_overrides_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "r.yaml").write_text(YAML)
    monkeypatch.setenv("WHERE", "/data")
    recipe = Recipe.from_yaml(tmp_path / "r.yaml", ["classifier.dependence_weight=3.0", "sae.finetune=null"])
    assert recipe.data.train.path == "/data/a.jsonl"
    assert recipe.data.eval["test"].path == str((tmp_path / "b.jsonl").resolve())
    assert recipe.classifier.dependence_weight == 3.0
    assert recipe.sae.finetune is None
    monkeypatch.delenv("WHERE")
    with pytest.raises(RecipeError, match="data.train.path: the environment variable WHERE is not set"):
        Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classifier.epoch=3", "did you mean 'epochs'"),
        ("classifier", "takes key=value"),
        ("output.x=3", "output holds no keys"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str) -> None:
    monkeypatch.setenv("WHERE", "/data")
    (tmp_path / "r.yaml").write_text(YAML)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(tmp_path / "r.yaml", [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        Recipe.from_yaml(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        Recipe.from_yaml(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("just text")
    with pytest.raises(RecipeError, match="must hold keys and values"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_hash_is_of_what_decides_the_result() -> None:
    a = Recipe.from_dict(minimal())
    assert a.sha256() == Recipe.from_dict(minimal(output="elsewhere")).sha256()
    assert a.sha256() != Recipe.from_dict(minimal(seed=1)).sha256()


def test_shipped_recipes_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFREG_DATA", "/data")
    paths = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"toxic_chat", "diagnosis"}
    for path in paths:
        Recipe.from_yaml(path)

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import WORDS, tiny_backbone, word_tokenizer
from selfreg import (
    FeatureCatalog,
    Recipe,
    RegularizedSequenceClassifier,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
    adapter_head,
    evaluate_classifier,
)
from selfreg.classifier.ridge import RIDGES
from selfreg.evaluation.classifier import FIGURES
from selfreg.features.chat import Choice, Conversation
from selfreg.features.decisions import DecisionLog
from selfreg.features.records import Vote
from selfreg.recipe import BASELINES, RecipeError
from selfreg.run import run_recipe
from selfreg.sae.interop import saelens
from selfreg.utils.trainer import StepProgress

SYMPTOMS = ("fever", "cough", "rash", "nausea")


def notes(count: int, reversed_tie: bool, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows, seen = [], set()
    while len(rows) < count:
        label = draw.randrange(2)
        usual = (label == 1) != reversed_tie
        woman = usual if draw.random() < 0.85 else not usual
        words = [draw.choice(WORDS[9:25]) for _ in range(draw.randrange(3, 7))]
        text = f"{'she' if woman else 'he'} has {draw.choice(SYMPTOMS[2 * label : 2 * label + 2])} {' '.join(words)}"
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": ("a", "b")[label], "sex": "f" if woman else "m"})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tiny_backbone().save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    for name, rows in {
        "train": notes(160, False, 0),
        "test": notes(80, False, 1),
        "shifted": notes(80, True, 2),
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "backbone": {"model": str(folder / "tiny"), "layer": 1, "max_length": 32},
        "data": {
            "group": "sex",
            "train": {"path": str(folder / "train.jsonl")},
            "eval": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("test", "shifted")},
        },
        "sae": {
            "num_features": 64,
            "k": 6,
            "pretrain": {"epochs": 4, "batch_size": 128},
            "finetune": {"epochs": 1, "batch_size": 128},
        },
        "features": {"attribute": "sex", "max_features": 6},
        "classifier": {"epochs": 5, "learning_rate": 1e-2},
        **changes,
    }


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu", "relu"])
def test_any_activation_and_any_librarys_sae(activation: str, folder: Path, tmp_path: Path) -> None:
    recipe = values(folder, tmp_path / "out", baselines=["plain"])
    recipe["sae"]["activation"] = activation
    recipe["sae"]["pretrain"]["learning_rate"] = 1e-2
    metrics = run_recipe(Recipe.from_dict(recipe))
    assert metrics["features"]["unintended"] > 0
    # The same SAE in another library's format, one of two in a folder.
    sae = SAEForFeatureExtraction.from_pretrained(tmp_path / "out" / "sae")
    for name in ("first", "second"):
        saelens.write(sae, tmp_path / "published" / name)
    again = values(folder, tmp_path / "again", baselines=["plain"])
    again["sae"] = {"from_pretrained": str(tmp_path / "published"), "subfolder": "second", "finetune": None}
    found = run_recipe(Recipe.from_dict(again))
    assert found["sae"]["l0"] == pytest.approx(metrics["sae"]["l0"], rel=1e-3)
    assert found["sae"]["fvu"] == pytest.approx(metrics["sae"]["fvu"], rel=1e-3)
    assert found["methods"]["selfreg"]["test"]["accuracy"] == metrics["methods"]["selfreg"]["test"]["accuracy"]
    del again["sae"]["subfolder"]
    with pytest.raises(RecipeError, match="sae.from_pretrained: .*holds 2 SAEs"):
        run_recipe(Recipe.from_dict(again))


def test_whole_run_and_what_it_leaves(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = Recipe.from_dict(values(folder, tmp_path / "out"))
    metrics = run_recipe(recipe, tell=lines.append)
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {"selfreg_version", "recipe_sha256", "sae", "features", "methods"} <= set(metrics)
    assert {"fvu", "l0", "dead_fraction"} <= set(metrics["sae"])
    assert set(metrics["features"]) == {"total", "explained", "unintended"}
    assert metrics["features"]["unintended"] == 6
    assert list(metrics["methods"]) == ["selfreg", *BASELINES]
    assert set(metrics["ridge"]) == {"selfreg", "l2"}
    assert set(metrics["ridge"].values()) <= set(RIDGES)
    for method in metrics["methods"].values():
        assert set(method) == {"test", "shifted"}
        for figures in method.values():
            assert tuple(figures) == FIGURES
            assert all(value is not None for value in figures.values())
    plain, ours = metrics["methods"]["plain"]["shifted"], metrics["methods"]["selfreg"]["shifted"]
    assert ours["unintended_use"] < plain["unintended_use"]
    text = "\n".join(lines)
    assert "SAE pre-trained: FVU" in text
    assert "SAE fine-tuned on the task: FVU" in text
    assert "<html" in (out / "report.html").read_text()
    # Everything that is left can be used by itself.
    sae = SAEForFeatureExtraction.from_pretrained(out / "sae")
    FeatureCatalog.from_pretrained(out / "catalog").check_sae(sae)
    unintended = UnintendedFeatures.from_pretrained(out / "unintended")
    model = RegularizedSequenceClassifier.from_pretrained(out / "classifier")
    assert model.unintended.feature_ids == unintended.feature_ids
    assert model.config.label2id == {"a": 0, "b": 1}

    rows = notes(80, True, 2)
    again = evaluate_classifier(model, rows, group="sex")
    for name, value in ours.items():
        assert again[name] == pytest.approx(value, abs=1e-4), name


def test_stages_that_are_done_are_skipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_recipe(Recipe.from_dict(values(folder, tmp_path / "out")))
    monkeypatch.setattr("selfreg.run.HiddenStateExtractor.from_pretrained", None)
    monkeypatch.setattr("selfreg.sae_stages.SAETrainer", None)
    lines: list[str] = []
    assert run_recipe(Recipe.from_dict(values(folder, tmp_path / "out")), tell=lines.append) == first
    assert sum("done before" in line for line in lines) == 4 + len(BASELINES)


def test_changed_part_is_done_again_and_the_rest_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(Recipe.from_dict(values(folder, tmp_path / "out")))
    monkeypatch.setattr("selfreg.sae_stages.SAETrainer", None)
    changed = values(folder, tmp_path / "out", features={"attribute": "sex", "max_features": 3})
    metrics = run_recipe(Recipe.from_dict(changed))
    assert metrics["features"]["unintended"] == 3
    fresh = run_recipe_fresh(folder, tmp_path / "fresh", features={"attribute": "sex", "max_features": 3})
    assert metrics == fresh


def test_features_are_chosen_anew_where_what_null_stands_for_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = values(folder, tmp_path / "out", baselines=["plain"], features={"attribute": "sex"})
    told: list[str] = []

    def again(limit: int) -> int:
        monkeypatch.setattr("selfreg.recipe.MAX_ATTRIBUTE_FEATURES", limit)
        told.clear()
        number: int = run_recipe(Recipe.from_dict(recipe), tell=told.append)["features"]["unintended"]
        return number

    assert again(4) == 4
    assert again(4) == 4
    assert any("unintended features: 4" in line and "done before" in line for line in told)
    assert again(2) == 2
    recipe["features"]["max_features"] = 2
    assert again(4) == 2
    assert any("unintended features: 2" in line and "done before" in line for line in told)


def run_recipe_fresh(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """In another process, so that nothing of this one (a patch, a generator) reaches it."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values(folder, output, **changes), sort_keys=False))
    subprocess.run([sys.executable, "-m", "selfreg", "run", str(path)], check=True, capture_output=True, env=env())
    return json.loads((output / "metrics.json").read_text())


def env() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_killed_again_and_again_ends_with_the_same_metrics(folder: Path, tmp_path: Path) -> None:
    whole = run_recipe_fresh(folder, tmp_path / "whole")
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(values(folder, tmp_path / "cut"), sort_keys=False))
    command = [sys.executable, "-m", "selfreg", "run", str(path)]
    watched = [
        tmp_path / "cut" / "activations" / "test",
        tmp_path / "cut" / ".work",
        tmp_path / "cut" / "sae",
        tmp_path / "cut" / ".stages" / "method-selfreg.json",
    ]
    # Killed just after each of these appears, which is in the middle of the stage that comes next.
    for mark in watched:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env())
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "cut" / "metrics.json").exists(), f"the run was over before it was killed at {mark}"
    subprocess.run(command, check=True, capture_output=True, env=env())
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text()) == whole
    assert not list((tmp_path / "cut").glob(".partial-*"))


def test_without_groups_what_needs_them_is_null(folder: Path, tmp_path: Path) -> None:
    changed = values(folder, tmp_path / "out", features={"keywords": ["she", "he"]}, baselines=["plain", "leace"])
    changed["data"]["group"] = None
    metrics = run_recipe(Recipe.from_dict(changed))
    figures = metrics["methods"]["plain"]["test"]
    assert tuple(figures) == FIGURES
    assert figures["worst_group_accuracy"] is figures["group_gap"] is figures["leakage"] is None
    assert figures["unintended_use"] is not None
    assert all(value is None for value in metrics["methods"]["leace"]["test"].values())


@pytest.mark.parametrize("features", [{"ids": [1, 2]}, {"random": 4}])
def test_other_ways_to_choose(folder: Path, tmp_path: Path, features: dict[str, Any]) -> None:
    metrics = run_recipe(Recipe.from_dict(values(folder, tmp_path / "out", features=features, baselines=["plain"])))
    assert metrics["features"]["unintended"] == (2 if "ids" in features else 4)


def test_published_sae_is_taken_and_one_that_does_not_fit_refused(folder: Path, tmp_path: Path) -> None:
    run_recipe(Recipe.from_dict(values(folder, tmp_path / "out", baselines=["plain"])))
    changed = values(folder, tmp_path / "again", baselines=["plain"])
    changed["sae"] = {"from_pretrained": str(tmp_path / "out" / "sae"), "finetune": None}
    metrics = run_recipe(Recipe.from_dict(changed))
    assert metrics["sae"]["before_finetuning"] == metrics["sae"]["after_finetuning"]
    changed["backbone"]["layer"] = 2
    changed["output"] = str(tmp_path / "bad")
    with pytest.raises(RecipeError, match="layer is 1 in the SAE .* and 2 in the backbone"):
        run_recipe(Recipe.from_dict(changed))
    assert not (tmp_path / "bad" / "activations").exists()


def test_another_sae_at_the_same_path_is_not_taken_for_the_first(folder: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    changed = values(folder, tmp_path / "out", features={"ids": [1, 2]}, baselines=[])
    changed["sae"] = {"from_pretrained": str(published), "finetune": {"epochs": 1, "batch_size": 128}}
    figures = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=64, k=6))
        sae.set_normalization(torch.zeros(16), torch.tensor(1.0))
        sae.save_pretrained(published)
        figures.append(run_recipe(Recipe.from_dict(changed))["sae"]["fvu"])
    assert figures[0] != figures[1]


class JudgeOfWords:
    """Explains a feature by the word at its peak, and finds pronouns no reason for a diagnosis."""

    name = "words"

    def __init__(self, fails_after: int | None = None) -> None:
        self.calls, self.fails_after = 0, fails_after

    def _count(self, conversations: Sequence[Conversation]) -> None:
        self.calls += len(conversations)
        if self.fails_after is not None and self.calls > self.fails_after:
            raise ConnectionError("the server is gone")

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        self._count(conversations)
        return ["pronouns" if "she" in turns[-1]["content"].split() else "other words" for turns in conversations]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        self._count(conversations)
        answers = []
        for turns in conversations:
            about = "\n".join(turn["content"] for turn in turns)
            answer = "No" if "a rubric of symptoms" in about and "pronouns" in about else "Yes"
            answers.append(Choice(answer, {option: float(option == answer) for option in options}))
        return answers


def test_features_by_a_judge_whose_server_fails_on_the_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = JudgeOfWords(fails_after=70)
    monkeypatch.setattr("selfreg.run._chat", lambda _recipe: chat)
    local = {"local": str(folder / "tiny")}
    features = {"explainer": local, "judge": local, "rubric": "a rubric of symptoms"}
    recipe = Recipe.from_dict(values(folder, tmp_path / "out", features=features, baselines=["plain"]))
    with pytest.raises(ConnectionError):
        run_recipe(recipe)
    assert not (tmp_path / "out" / "catalog").exists()
    first = chat.calls
    chat.fails_after = None
    metrics = run_recipe(recipe)
    whole = JudgeOfWords()
    monkeypatch.setattr("selfreg.run._chat", lambda _recipe: whole)
    again = run_recipe(Recipe.from_dict({**recipe.to_dict(), "output": str(tmp_path / "whole")}))
    assert again == metrics
    assert metrics["features"]["explained"] > metrics["features"]["unintended"] > 0
    # What was answered before the failure was not asked again: only the batch that failed.
    assert first < chat.calls < whole.calls + first
    catalog = FeatureCatalog.from_pretrained(tmp_path / "out" / "catalog")
    unintended = UnintendedFeatures.from_pretrained(tmp_path / "out" / "unintended")
    assert all(catalog[feature].explanation == "pronouns" for feature in unintended.feature_ids)
    assert all(catalog[feature].decided_by == "words" for feature in unintended.feature_ids)
    assert all(record.label_shares for record in catalog)
    # What a person decides in between counts in the next run, which asks nobody else again.
    spared, calls = unintended.feature_ids[0], chat.calls
    log = DecisionLog(tmp_path / "out" / "catalog", catalog.info["sae_fingerprint"])
    log.add(spared, Vote("Ada", "Yes", person=True))
    run_recipe(recipe)
    now = UnintendedFeatures.from_pretrained(tmp_path / "out" / "unintended")
    assert set(now.feature_ids) == set(unintended.feature_ids) - {spared}
    assert chat.calls == calls


def test_missing_layer_is_told_before_any_long_work(folder: Path, tmp_path: Path) -> None:
    changed = values(folder, tmp_path / "out")
    changed["backbone"]["layer"] = 9
    with pytest.raises(ValueError, match="layer 9 is not there: .* layer is 0 to 3"):
        run_recipe(Recipe.from_dict(changed))


def test_another_backbone_at_the_same_path_is_not_taken_for_the_first(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "task"
    shutil.copytree(folder, copy)
    first = run_recipe(Recipe.from_dict(values(copy, tmp_path / "out")))
    tiny_backbone(seed=5).save_pretrained(copy / "tiny")
    second = run_recipe(Recipe.from_dict(values(copy, tmp_path / "out")))
    assert second["sae"] != first["sae"]
    fresh = run_recipe(Recipe.from_dict(values(copy, tmp_path / "fresh")))
    assert second == fresh


def test_extraction_begun_with_another_backbone_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "task"
    shutil.copytree(folder, copy)
    run_recipe(Recipe.from_dict(values(copy, tmp_path / "out")))
    manifest = tmp_path / "out" / "activations" / "train" / "manifest.json"
    shard = json.loads(manifest.read_text()) | {"complete": False}
    manifest.write_text(json.dumps(shard))
    tiny_backbone(seed=5).save_pretrained(copy / "tiny")
    second = run_recipe(Recipe.from_dict(values(copy, tmp_path / "out")))
    assert second == run_recipe(Recipe.from_dict(values(copy, tmp_path / "fresh")))


def test_checkpoints_of_finished_trainings_are_dropped(folder: Path, tmp_path: Path) -> None:
    run_recipe(Recipe.from_dict(values(folder, tmp_path / "out")))
    work = tmp_path / "out" / ".work"
    assert {path.name for path in work.iterdir() if path.is_dir()} <= {
        "sae-pretrained",
        "heads",
    }


def test_recipe_hash_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
    recipes = []
    for name in ("one", "two"):
        changed = values(tmp_path / name, tmp_path / "out")
        changed["backbone"]["model"] = "some/model"
        recipes.append(Recipe.from_dict(changed))
    assert recipes[0].sha256() == recipes[1].sha256()
    with (tmp_path / "two" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "he has a rash", "label": "a", "sex": "m"}) + "\n")
    assert recipes[0].sha256() != recipes[1].sha256()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("classifier", {"class_weights": [1.0, 2.0, 3.0]}, "class_weights has 3 weights, the data has 2 labels: a, b"),
        ("features", {"ids": [3, 999]}, "features.ids: feature 999 is not there, the SAE has 0 to 63"),
        ("features", {"keywords": [" "]}, "features.keywords: no keywords given"),
        ("features", {"keywords": ["zebra", "okapi"]}, "none of 'zebra', 'okapi' stands in a training text"),
        ("features", {"attribute": "label"}, "features.attribute: no label of the training set has texts of two"),
        ("data", {"group": "age"}, "data.group: row 0 of 'train': groups must hold names or whole numbers, .* 30.5"),
        (
            "features",
            {"judge": {"local": "/x/y"}, "explainer": {"local": "/x/y"}, "rubric": "a rubric"},
            "features.explainer.local: can't load the chat model '/x/y'",
        ),
        (
            "features",
            {
                "judge": {"endpoint": "http://x/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"},
                "explainer": {"endpoint": "http://x/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"},
                "rubric": "a rubric",
            },
            "features.explainer: the environment variable NO_SUCH_KEY .api_key_env. holds no key",
        ),
        (
            "features",
            {"judge": {"local": "/x/y"}, "explainer": {"local": "/x/y"}, "rubric": "no/such.md"},
            "features.rubric: the rubric no/such.md is not there",
        ),
    ],
)
def test_bad_input_is_told_before_any_long_work(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    for name in ("train", "test", "shifted"):
        rows = [json.loads(line) | {"age": 30.5} for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = values(folder, tmp_path / "out")
    recipe["data"] |= {
        "train": {"path": str(tmp_path / "train.jsonl")},
        "eval": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("test", "shifted")},
    }
    recipe[part] = change if part == "features" else {**recipe[part], **change}
    with pytest.raises(RecipeError, match=message):
        run_recipe(Recipe.from_dict(recipe))
    assert not (tmp_path / "out").exists()


def test_no_feature_found_is_no_success_and_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(Recipe.from_dict(values(folder, tmp_path / "out")))
    chosen = tmp_path / "out" / "unintended"
    before = {path.name: path.read_bytes() for path in chosen.iterdir()}
    # The words are there, and no feature peaks on them.
    monkeypatch.setattr("selfreg.features.selection.keyword_near_peak", lambda *given: None)
    recipe = Recipe.from_dict(values(folder, tmp_path / "out", features={"keywords": ["she", "he"]}))
    with pytest.raises(RecipeError, match="no unintended feature was found by features.keywords"):
        run_recipe(recipe)
    assert {path.name: path.read_bytes() for path in chosen.iterdir()} == before


def test_an_empty_set_that_was_asked_for_is_the_plain_classifier(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = values(folder, tmp_path / "out", features={"ids": []}, baselines=["l2", "projection"])
    metrics = run_recipe(Recipe.from_dict(recipe), tell=lines.append)
    assert any("selfreg is the plain classifier here" in line for line in lines)
    ours, l2 = (metrics["methods"][name]["test"] for name in ("selfreg", "l2"))
    assert ours["unintended_use"] is None
    # selfreg without features is the probe with selfreg's weight decay.
    assert ours["accuracy"] == l2["accuracy"]


def test_cut_texts_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = values(folder, tmp_path / "out")
    recipe["backbone"]["max_length"] = 4
    recipe["sae"]["pretrain"]["batch_size"] = 1_000
    run_recipe(Recipe.from_dict(recipe))
    assert "160 of 160 texts fill max_length=4 tokens" in caplog.text
    # 640 tokens are less than a batch, and there is a step an epoch all the same.
    assert "SAE pre-training had few steps (4): some 1,000 teach it" in caplog.text
    # Again where the extraction is skipped.
    lines: list[str] = []
    run_recipe(Recipe.from_dict(recipe), tell=lines.append)
    assert any("160 of 160 texts of train fill backbone.max_length=4 tokens" in line for line in lines)


def test_each_part_by_itself(folder: Path, tmp_path: Path) -> None:
    parts = ["plain", "removal_only", "penalty_only", "dependence_only", "offset_only", "projection"]
    long = {"epochs": 20, "learning_rate": 1e-2}  # enough steps for a line of the log
    metrics = run_recipe(Recipe.from_dict(values(folder, tmp_path / "out", baselines=parts, classifier=long)))
    figures = {name: metrics["methods"][name]["test"] for name in ("selfreg", *parts)}
    assert figures["projection"]["unintended_use"] == pytest.approx(0, abs=1e-6)
    assert figures["penalty_only"]["unintended_use"] < figures["plain"]["unintended_use"]
    histories = {}
    for name in parts:
        mark = json.loads((tmp_path / "out" / ".stages" / f"method-{name}.json").read_text())
        histories[name] = mark["result"]["history"]
    assert len({json.dumps(figures[name]) for name in figures}) == len(figures)
    assert any("dependence" in row for row in histories["dependence_only"])
    assert not any("dependence" in row for row in histories["penalty_only"])


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def _of_task(task: str, row: dict[str, Any], number: int) -> dict[str, Any]:
    ill = row["label"] == "b"
    if task == "multi_label":
        return {**row, "label": ["ill"] * ill + ["odd"] * (number % 3 == 0)}
    if task == "regression":
        return {**row, "label": 37.0 + 2 * ill + number % 2, "importance": 1 + number % 2}
    other = row["text"].replace("has", "has no")
    return {"prompt": "who is ill ?", "chosen": row["text"], "rejected": other, "sex": row["sex"]}


@pytest.mark.parametrize("task", ["multi_label", "regression", "preference"])
def test_other_tasks_from_data_to_report(task: str, folder: Path, tmp_path: Path) -> None:
    recipe = values(folder, tmp_path / "out", task=task, baselines=["plain", "focal", "leace", "tfidf"])
    parts = {"train": notes(120, False, 0), "test": notes(60, False, 1), "shifted": notes(60, True, 2)}
    files = {
        name: _write(tmp_path / f"{name}.jsonl", [_of_task(task, row, i) for i, row in enumerate(rows)])
        for name, rows in parts.items()
    }
    recipe["data"] |= {"train": files["train"], "eval": {name: files[name] for name in ("test", "shifted")}}
    if task == "regression":
        recipe["data"]["weight"] = "importance"
    if task == "preference":
        # The tiny tokenizer has no chat template.
        recipe["backbone"]["template"] = "{text}"
        recipe["features"] = {"random": 4}
    metrics = run_recipe(Recipe.from_dict(recipe))
    figures = metrics["methods"]["selfreg"]["shifted"]
    assert set(FIGURES) <= set(figures)
    wanted = {"multi_label": "auc", "regression": "r2", "preference": "accuracy"}[task]
    assert figures[wanted] is not None
    focal = metrics["methods"]["focal"]["test"]
    assert (focal[wanted] is None) == (task == "regression")
    assert set(focal) == set(figures)
    assert (tmp_path / "out" / "report.html").exists()
    assert metrics["groups"]["selfreg"]["test"]
    model = RegularizedSequenceClassifier.from_pretrained(tmp_path / "out" / "classifier")
    assert model.task == task
    lines: list[str] = []
    run_recipe(Recipe.from_dict(recipe), tell=lines.append)
    assert all("done before" in line for line in lines if line.startswith("classifier"))


def test_baselines_that_read_the_texts(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = values(folder, tmp_path / "out", baselines=["plain", "tfidf", "scrubbing", "zero_shot"])
    recipe["features"] = {"keywords": ["he", "she", "man", "woman"]}
    methods = run_recipe(Recipe.from_dict({**recipe, "instruction": "Patients."}))["methods"]
    # The tiny model has no chat template, so that it can't be prompted.
    assert set(methods["zero_shot"]["test"].values()) == {None}
    assert "zero_shot left out" in caplog.text
    assert methods["tfidf"]["test"]["accuracy"] > 0.7
    assert methods["tfidf"]["test"]["unintended_use"] is None
    assert methods["tfidf"]["test"]["unintended_dependence"] is not None
    # Without the words of the attribute there is nothing else that tells it here.
    assert methods["scrubbing"]["shifted"]["leakage"] < methods["tfidf"]["shifted"]["leakage"]
    with pytest.raises(RecipeError, match="instruction: labels a, b say nothing to a language model"):
        run_recipe(Recipe.from_dict(recipe))


def test_weights_that_the_validation_loss_chooses(folder: Path, tmp_path: Path) -> None:
    recipe = values(folder, tmp_path / "out", baselines=["plain", "dependence_only"])
    recipe["classifier"] |= {"penalty_weight": "auto", "dependence_weight": "auto", "offset_weight": 0.5}
    lines: list[str] = []
    metrics = run_recipe(Recipe.from_dict(recipe), tell=lines.append)
    assert metrics["methods"]["selfreg"]["test"]["accuracy"] > 0.6
    path = json.loads((tmp_path / "out" / "classifier" / "weight_path.json").read_text())
    assert len(path["points"]) == 10
    assert path["points"][0]["figures"]["unintended_dependence"] is not None
    assert (tmp_path / "out" / "classifier" / "weight_path.html").exists()
    assert "How strict the rule is" in (tmp_path / "out" / "report.html").read_text()
    assert run_recipe(Recipe.from_dict(recipe)) == metrics


def test_adapter_of_a_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = values(folder, tmp_path / "out", baselines=["plain"])
    recipe["classifier"] |= {"lora": {"r": 2}, "batch_size": 32, "adapter_epochs": 2, "adapter_learning_rate": 1e-2}
    metrics = run_recipe(Recipe.from_dict(recipe))
    assert metrics["methods"]["selfreg"]["shifted"]["unintended_dependence"] is not None
    assert abs(metrics["drift"]["fvu_after"] - metrics["drift"]["fvu_before"]) > 1e-4
    model = RegularizedSequenceClassifier.from_pretrained(tmp_path / "out" / "classifier")
    assert model.config.adapter
    found = evaluate_classifier(model, notes(80, True, 2), group="sex")
    for name in ("accuracy", "leakage", "worst_group_accuracy", "unintended_use", "unintended_dependence"):
        assert found[name] == pytest.approx(metrics["methods"]["selfreg"]["shifted"][name], abs=1e-4), name
    assert run_recipe(Recipe.from_dict(recipe)) == metrics
    assert not list((tmp_path / "out" / ".work").glob("adapter-*"))
    with pytest.raises(RecipeError, match="classifier.lora: lora: 'rank' is no field of peft.LoraConfig"):
        run_recipe(Recipe.from_dict({**recipe, "classifier": {"lora": {"rank": 2}}}))
    with pytest.raises(RecipeError, match="leave lora or offset_weight out"):
        Recipe.from_dict({**recipe, "classifier": {"lora": {"r": 2}, "offset_weight": 0.5}})


def test_adapter_killed_on_its_way_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_head, "_SAVE_STEPS", 2)
    seen: list[int] = []
    limit: int | None = None

    class Counted(StepProgress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            seen.append(state.global_step)
            if state.global_step == limit:
                raise KeyboardInterrupt

    monkeypatch.setattr(adapter_head, "StepProgress", Counted)
    found = {}
    for name in ("whole", "killed"):
        recipe = values(folder, tmp_path / name, baselines=["plain"])
        recipe["classifier"] |= {
            "lora": {"r": 2, "lora_dropout": 0.1},
            "batch_size": 32,
            "adapter_epochs": 2,
            "adapter_learning_rate": 1e-2,
        }
        if name == "killed":
            limit = 5
            seen.clear()
            with pytest.raises(KeyboardInterrupt):
                run_recipe(Recipe.from_dict(recipe))
            assert seen == [1, 2, 3, 4, 5]
            limit = None
            seen.clear()
        found[name] = run_recipe(Recipe.from_dict(recipe))
    assert seen[0] == 5, "the step after the last checkpoint"
    assert found["killed"]["methods"] == found["whole"]["methods"]
    weights = [load_file(tmp_path / name / "classifier" / "adapter" / "adapter_model.safetensors") for name in found]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.controllability import datasets, run
from benchmarks.controllability.bootstrap import Unit, compare, f1, value, worst_group_accuracy
from benchmarks.controllability.datasets import DATASETS
from benchmarks.controllability.figures import front, picture
from benchmarks.controllability.forms import FORMS
from benchmarks.controllability.limits import DECAYS, POWERS, RIDGES, SHARES, SHRINKAGES, aucs
from benchmarks.controllability.methods import DoesNotApply, Trial, auc_within_groups, conversations
from benchmarks.controllability.names import SELFREG
from benchmarks.controllability.pool import Cells, Corpus, Pool, Rows, cells_of, even, folded, generator, tied
from benchmarks.controllability.run import Options
from benchmarks.controllability.states import (
    Activations,
    Workshop,
    compute_activations,
    copy_store,
    scrubbed_texts,
)
from benchmarks.controllability.summary import acceptance, control, markdown, summarize, units_of
from benchmarks.controllability.tasks import gist

from helpers import make_sae
from selfreg import (
    ActivationStore,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.classifier.baselines import fit_head
from selfreg.classifier.states import PooledStates
from selfreg.evaluation.metrics import worst_group_accuracy as its_worst_group_accuracy
from selfreg.features.chat import Choice

# --- Rows ------------------------------------------------------------------------------------------------------------


def make_cells() -> Cells:
    labels = [row % 2 for row in range(400)]
    groups = [None if row % 50 == 0 else "ab"[row // 2 % 2] for row in range(400)]
    return cells_of(labels, groups, range(400))


def test_a_tie_is_as_strong_as_it_says() -> None:
    cells = make_cells()
    of_row = {row: cell for cell, rows in cells.items() for row in rows}
    rows = tied(cells, {0: "a", 1: "b"}, 160, generator("test", 0))
    counts = Counter(of_row[row] for row in rows)
    assert counts == {(0, "a"): 76, (0, "b"): 4, (1, "b"): 76, (1, "a"): 4}
    assert len(set(rows)) == 160
    assert rows == tied(cells, {0: "a", 1: "b"}, 160, generator("test", 0))
    assert rows != tied(cells, {0: "a", 1: "b"}, 160, generator("test", 1))


def test_a_tie_that_the_pool_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label 0, group 'a': 190 texts are wanted, and there are"):
        tied(make_cells(), {0: "a", 1: "b"}, 400, generator("test", 0))


def test_even_rows_leave_label_and_group_independent() -> None:
    cells = make_cells()
    cells[0, "b"] = cells[0, "b"][:7]
    of_row = {row: cell for cell, rows in cells.items() for row in rows}
    counts = Counter(of_row[row] for row in even(cells, 80, generator("test", 0)))
    assert counts == {(0, "a"): 7, (0, "b"): 7, (1, "a"): 20, (1, "b"): 20}
    del cells[0, "b"]
    with pytest.raises(ValueError, match="label 0 has no text of group 'b'"):
        even(cells, 80, generator("test", 0))


def test_folds_of_a_repeat_hold_every_row_once() -> None:
    rows, strata = list(range(10, 60)), [row % 3 for row in range(60)]
    first = [folded(rows, strata, 5, seed) for seed in range(5)]
    assert sorted(row for _, test in first for row in test) == rows
    assert all(set(train) | set(test) == set(rows) and not set(train) & set(test) for train, test in first)
    assert folded(rows, strata, 5, 5)[1] != first[0][1]


@pytest.mark.real
@pytest.mark.parametrize("name", list(DATASETS))
def test_no_text_of_a_data_set_is_both_trained_on_and_measured(
    name: str, data_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFREG_DATA", str(data_path("README.md").parent))
    datasets._read.cache_clear()
    pool = DATASETS[name]()
    texts = [" ".join(text.casefold().split()) for text in pool.corpus.texts]
    assert len(set(texts)) == len(texts)
    rows = pool.rows(1)
    measured = {row for own in rows.evals.values() for row in own}
    assert "test" in rows.evals
    assert set(rows.train) <= set(pool.pool)
    assert not measured & {*rows.train, *(rows.balanced or [])}
    assert all(pool.label[row] >= 0 for row in (*measured, *rows.train, *(rows.balanced or [])))
    if "shifted" in rows.evals and pool.folds == 1:
        with_tie, reverse = (
            Counter((pool.label[r], pool.group[r]) for r in own) for own in (rows.train, rows.evals["shifted"])
        )
        largest = {
            y: max((with_tie[cell], cell) for cell in with_tie if cell[0] == y)[1] for y in set(pool.label) - {-1}
        }
        share = sum(with_tie[cell] for cell in largest.values()) / len(rows.train)
        reversed_share = 1 - sum(reverse[cell] for cell in largest.values()) / len(rows.evals["shifted"])
        assert share >= 0.79
        assert reversed_share == pytest.approx(share, abs=0.02)


def test_the_control_has_the_settings_and_as_many_features() -> None:
    assert control("selfreg_offset_keywords") == "selfreg_offset_random_keywords"
    assert control("selfreg_keywords") == "selfreg_random_keywords"
    assert control("selfreg") == control("selfreg_features") == "selfreg_random"
    assert control("selfreg_offset") == "selfreg_offset_random"
    # A control is held against none.
    assert all(control(name) == name for name in SELFREG if "random" in name)


def test_random_features_are_as_many_as_those_that_they_are_held_against(
    sae: SAEForFeatureExtraction,
    store: ActivationStore,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.controllability.methods.MAX_ATTRIBUTE_FEATURES", 3)
    shop = FakeWorkshop(tmp_path, sae, store)
    for keywords in ([1, 2, 4, 5, 6], []):
        of_words = UnintendedFeatures.from_ids(sae, keywords)
        trial = Trial(make_pool(texts), 0, sae, compute_activations(sae, store), of_words, shop)
        assert len(trial.choices["random"]) == len(trial.choices["attribute"]) == 3
        assert len(trial.choices["random_keywords"]) == len(keywords)
        # Use is measured on more than a method was given.
        assert trial.measure.feature_ids[:3] == trial.choices["attribute"].feature_ids
        assert len(trial.measure) > 3


def test_the_question_comes_where_it_can() -> None:
    assert "reviews_domain_asked" in DATASETS
    assert "preferences_asked" not in DATASETS
    assert not any(name.endswith("_asked") for name in datasets.NOT_ASKED)


def test_texts_that_come_again_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": ["A  b", "c", "a B", ""], "test": ["C", "d"]}
    monkeypatch.setattr(datasets, "_read", lambda name, split: [{"text": text} for text in splits[split]])
    rows = datasets.read("any", "train", "test")
    assert [(row["text"], row["split"]) for row in rows] == [("A  b", "train"), ("c", "train"), ("d", "test")]
    assert datasets.where(rows, "test") == [2]


# --- Bootstrap -------------------------------------------------------------------------------------------------------


def make_unit(seed: int, gain: float = 0.0, n: int = 400) -> Unit:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    groups = ["ab"[i // 2 % 2] for i in range(n)]
    reference = rng.random(n) < 0.7
    right = np.where(rng.random(n) < gain, True, reference)
    return Unit(np.arange(n), labels, groups, right, reference)


def test_figures_are_those_of_the_package() -> None:
    from sklearn.metrics import f1_score

    unit = make_unit(0)
    ones = np.ones((1, 400))
    predicted = np.where(unit.right, unit.labels, 1 - unit.labels)
    assert f1(unit, unit.right, ones)[0] == pytest.approx(f1_score(unit.labels, predicted))
    assert worst_group_accuracy(unit, unit.right, ones)[0] == its_worst_group_accuracy(
        predicted, unit.labels, unit.groups
    )
    assert value(replace(unit, groups=[None] * 400), "worst_group_accuracy") is None


def test_the_interval_is_that_of_the_mean_of_paired_differences() -> None:
    unit = make_unit(1, gain=0.3)
    found = compare([unit], "accuracy", resamples=4_000)
    paired = unit.right.astype(float) - unit.reference
    error = paired.std() / np.sqrt(len(paired))
    assert found is not None
    assert found.difference == pytest.approx(paired.mean())
    assert found.low == pytest.approx(paired.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(paired.mean() + 1.96 * error, abs=0.1 * error)
    assert found.reference_error == pytest.approx(unit.reference.std() / np.sqrt(400), rel=0.05)


def test_seeds_with_the_same_texts_are_not_taken_for_more_texts() -> None:
    unit = make_unit(2, gain=0.2)
    one, many = (compare([unit] * count, "accuracy", resamples=4_000) for count in (1, 20))
    assert one is not None
    assert many is not None
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


def test_equal_methods_do_not_differ_and_covering_is_as_said() -> None:
    same = make_unit(3)
    found = compare([same], "worst_group_accuracy")
    assert found is not None
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        right, reference = rng.random(200) < 0.8, rng.random(200) < 0.7
        own = compare([replace(make_unit(0, n=200), right=right, reference=reference)], "accuracy", resamples=400)
        assert own is not None
        covered += own.low <= 0.1 <= own.high
    assert 88 <= covered <= 99


# --- States ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sae(extractor: HiddenStateExtractor) -> SAEForFeatureExtraction:
    return make_sae(extractor)


@pytest.fixture
def store(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> ActivationStore:
    return extractor.extract(texts, tmp_path / "store", shard_tokens=200)


class FakeWorkshop(Workshop):
    """Of a tiny backbone."""

    def __init__(self, folder: Path, sae: SAEForFeatureExtraction, store: ActivationStore) -> None:
        super().__init__(folder)
        self.its_sae, self.its_store = sae, store

    def sae(self, pools: Any) -> SAEForFeatureExtraction:
        return self.its_sae

    def store(self, corpus: Corpus) -> ActivationStore:
        return self.its_store

    def keyword_features(self, pool: Pool, sae: SAEForFeatureExtraction) -> UnintendedFeatures:
        return UnintendedFeatures.from_ids(sae, [1, 2])

    def activations(self, corpus: Corpus, sae: SAEForFeatureExtraction) -> Activations:
        return compute_activations(sae, self.its_store)


def make_pool(texts: list[str], **changes: Any) -> Pool:
    label = [int("fever" in text or "pain" in text) for text in texts]
    group = ["long" if len(text.split()) > 9 else "short" for text in texts]

    def rows(seed: int) -> Rows:
        order = generator("pool", seed).permutation(len(texts)).tolist()
        return Rows(order[:40], {"test": order[40:]}, order[:20])

    pool = Pool(
        "tiny", "tiny", Corpus("tiny", texts), ["well", "ill"], label, group, ("fever",), list(range(60)), rows, "Ill?"
    )
    return replace(pool, **changes)


def test_states_without_features_are_those_of_the_classifier(
    extractor: HiddenStateExtractor,
    sae: SAEForFeatureExtraction,
    store: ActivationStore,
    texts: list[str],
    tmp_path: Path,
) -> None:
    unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    model = RegularizedSequenceClassifier.from_backbone(extractor, sae, unintended, num_labels=2)
    pool = make_pool(texts)
    its = model.pooled_states(store, pool.label)
    shop = FakeWorkshop(tmp_path, sae, store)
    trial = Trial(pool, 0, sae, compute_activations(sae, store), UnintendedFeatures.from_ids(sae, [1]), shop)
    ours = trial.states(list(range(60)), unintended, unintended)
    torch.testing.assert_close(ours.pooled, its.pooled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.activations, its.activations, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.labels, its.labels)
    raw = trial.states([4, 2], unintended, None)
    torch.testing.assert_close(raw.pooled, store.pool("mean")[[4, 2]])
    assert raw.removed is False


@pytest.mark.parametrize("method", ["pooling_last", "removal_topk"])
def test_states_of_ablations(
    method: str, extractor: HiddenStateExtractor, sae: SAEForFeatureExtraction, texts: list[str], tmp_path: Path
) -> None:
    # One token a chunk and more: the last of a chunk is not always the last of its text.
    store = extractor.extract(texts, tmp_path / "store", shard_tokens=150)
    shop = FakeWorkshop(tmp_path, sae, store)
    unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    trial = Trial(make_pool(texts), 0, sae, compute_activations(sae, store), unintended, shop)
    found = trial.states(list(range(60)), unintended, unintended, method).pooled
    if method == "pooling_last":
        extractor = HiddenStateExtractor(
            extractor.backbone, extractor.tokenizer, layer=1, max_length=32, name="tiny", pooling="last"
        )
        model = RegularizedSequenceClassifier.from_backbone(extractor, sae, unintended, num_labels=2)
        wanted = model.pooled_states(texts, make_pool(texts).label).pooled
    else:
        shards = list(store.shards())
        states = torch.cat([shard.hidden_states for shard in shards])
        dense = sae.encode(states).to_dense().detach()[:, [3, 7, 11]]
        owner = torch.cat([shard.text_ids for shard in shards])
        left = states - dense @ unintended.decoder_directions
        wanted = torch.stack([left[owner == text].mean(dim=0) for text in range(60)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_part_of_a_store_holds_the_same_states(
    extractor: HiddenStateExtractor, store: ActivationStore, texts: list[str], tmp_path: Path
) -> None:
    rows = [0, 3, 17, 40, 59]
    prompts = [texts[row] for row in rows]
    copy_store(store, rows, tmp_path / "part", prompts)
    part = ActivationStore(tmp_path / "part")
    whole = extractor.extract(prompts, tmp_path / "whole")
    assert part.text_fingerprint == whole.text_fingerprint
    for ours, its in zip(_columns(part), _columns(whole), strict=True):
        torch.testing.assert_close(ours, its, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="sort the training pool"):
        copy_store(store, [3, 0], tmp_path / "other", prompts[:2])


def _columns(store: ActivationStore) -> list[torch.Tensor]:
    shards = list(store.shards())
    return [
        torch.cat([getattr(shard, name).float() for shard in shards])
        for name in ("hidden_states", "text_ids", "positions", "token_ids")
    ]


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(
    sae: SAEForFeatureExtraction,
    store: ActivationStore,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Options:
    shop = FakeWorkshop(tmp_path, sae, store)
    monkeypatch.setattr(run, "workshop", lambda options: shop)
    monkeypatch.setitem(DATASETS, "tiny", lambda: make_pool(texts))
    original = run.head_arguments
    monkeypatch.setattr(
        "benchmarks.controllability.methods.head_arguments",
        lambda folder, seed: replace(original(folder, seed), num_train_epochs=2),
    )
    return Options(tmp_path / "out", range(2), ("tiny",), ("plain", "selfreg_keywords", "balanced"), 1, 100, ("tiny",))


def test_a_second_call_computes_what_is_new_and_nothing_else(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[int, str]] = []
    measure = Trial.run

    def counted(self: Trial, method: str) -> dict[str, Any]:
        called.append((self.seed, method))
        return measure(self, method)

    monkeypatch.setattr(Trial, "run", counted)
    run.run_pool(options, "tiny")
    assert sorted(called) == sorted((seed, method) for seed in (0, 1) for method in options.methods)
    folder = options.output / "results" / "tiny"
    before = (folder / "seed-0" / "plain.json").read_bytes()
    called.clear()
    run.run_pool(options, "tiny")
    assert called == []
    run.run_pool(replace(options, seeds=range(3), methods=(*options.methods, "l2")), "tiny")
    assert sorted(called) == sorted([(0, "l2"), (1, "l2"), (2, "l2"), *((2, method) for method in options.methods)])
    assert (folder / "seed-0" / "plain.json").read_bytes() == before
    called.clear()
    (folder / "seed-1" / "balanced.json").unlink()
    run.run_pool(options, "tiny")
    assert called == [(1, "balanced")]


@pytest.mark.parametrize("changed", [{"max_length": 7}, {"template": "Is it so?\n{text}"}], ids=str)
def test_results_of_texts_that_are_read_otherwise_are_computed_anew(
    changed: dict[str, Any], options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = options.output / "results" / "tiny" / "seed-0" / "plain.json"
    run.run_pool(replace(options, seeds=range(1), methods=("plain",)), "tiny")
    before = json.loads(path.read_text())
    pool = make_pool(texts)
    monkeypatch.setitem(DATASETS, "tiny", lambda: replace(pool, corpus=replace(pool.corpus, **changed)))
    run.run_pool(replace(options, seeds=range(1), methods=("plain",)), "tiny")
    assert json.loads(path.read_text())["key"] != before["key"]


def test_a_question_changes_what_the_backbone_reads_and_nothing_else(texts: list[str]) -> None:
    pool, behind = make_pool(texts), datasets.asked(lambda: make_pool(texts))
    assert behind.corpus.template == f"{pool.instruction}\n\n{{text}}"
    assert behind.corpus.fingerprint != pool.corpus.fingerprint
    assert (behind.corpus.texts, behind.label, behind.group) == (pool.corpus.texts, pool.label, pool.group)
    assert behind.rows(3) == pool.rows(3)
    assert behind.name != pool.name


def test_a_question_takes_no_token_from_the_text(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.controllability.states.LAYER", 1)
    shop = Workshop(tmp_path)
    shop.__dict__["_base"] = extractor
    long = [" ".join(texts[:20])]
    corpora = [Corpus("long", long, 30), Corpus("long", long, 30, "What does the patient have?\n{text}")]
    own, behind = ([end - start for _, start, end in shop.extractor(corpus).tokenize(long)] for corpus in corpora)
    assert own == behind
    assert 0 < own[0] <= 30
    assert [len(ids) for ids, _, _ in shop.extractor(corpora[0]).tokenize(long)] == [30]


def test_results_from_before_a_change_have_no_place_in_the_tables(
    options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = options.output / "results" / "tiny"
    run.run_pool(replace(options, seeds=range(5, 6)), "tiny")
    assert list(summarize(folder)["methods"]) == ["plain", "selfreg_keywords", "balanced"]
    assert summarize(folder)["stale"] == []
    monkeypatch.setitem(DATASETS, "tiny", lambda: make_pool(texts, keywords=("cough",)))
    run.run_pool(replace(options, seeds=range(5, 6), methods=("plain", "balanced")), "tiny")
    summary = summarize(folder)
    assert list(summary["methods"]) == ["plain", "balanced"]
    assert summary["stale"] == ["selfreg_keywords of seed 5"]
    table = markdown({"tiny": summary})
    assert "of other settings than the last run's: selfreg_keywords of seed 5." in table
    assert "use and dependence are measured on " in table


def test_seeds_of_other_settings_are_in_no_mean(
    options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = options.output / "results" / "tiny"
    run.run_pool(replace(options, methods=("plain",)), "tiny")
    monkeypatch.setitem(DATASETS, "tiny", lambda: make_pool(texts, keywords=("cough",)))
    # As a run that was cut short behind its first seed.
    run.run_pool(replace(options, seeds=range(1), methods=("plain",)), "tiny")
    summary = summarize(folder)
    assert (summary["seed_numbers"], summary["stale"]) == ([0], ["seed 1"])
    assert summary["methods"]["plain"]["test"]["accuracy"]["n"] == 1
    # Nothing is missing where the settings are those of before, and the tables are as they were.
    monkeypatch.setitem(DATASETS, "tiny", lambda: make_pool(texts))
    run.run_pool(replace(options, methods=("plain",)), "tiny")
    assert (summarize(folder)["seed_numbers"], summarize(folder)["stale"]) == ([0, 1], [])
    # A folder of a version that knew no settings has nothing to show, and harms nobody.
    for path in folder.glob("seed-*/trial.json"):
        old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("settings", "key")}
        path.write_text(json.dumps(old))
    summary = summarize(folder)
    assert (summary["methods"], summary["stale"]) == ({}, ["seed 0", "seed 1"])
    assert "Left out" in markdown({"tiny": summary})


def test_a_method_that_has_become_another_is_computed_anew(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = options.output / "results" / "tiny"
    run.run_pool(replace(options, seeds=range(1)), "tiny")
    monkeypatch.setitem(SELFREG, "selfreg_keywords", ("keywords", {"offset_weight": 0.1}))
    assert summarize(folder)["stale"] == ["selfreg_keywords of seed 0"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("seed-0/*.json")}
    run.run_pool(replace(options, seeds=range(1)), "tiny")
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("seed-0/*.json")}
    assert {name for name in after if after[name] != before[name]} == {"selfreg_keywords.json", "trial.json"}
    assert summarize(folder)["stale"] == []


def test_the_backbone_is_asked_once_a_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(self: Trial, method: str) -> dict[str, Any]:
        asked.append(self.seed)
        return {"figures": {}, "right": {}, "rows": {}}

    monkeypatch.setattr(Trial, "run", measure)
    run.run_pool(replace(options, seeds=range(6, 9), methods=("zero_shot",)), "tiny")
    assert asked == [6]
    assert "asked once" in (options.output / "results" / "tiny" / "seed-7" / "zero_shot.json").read_text()


def test_parts_of_cross_validations_are_told(
    options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "workshop", lambda options: SimpleNamespace(sae=lambda pools: None))
    monkeypatch.setattr(run, "_each", lambda *given: None)
    folded_pool = replace(make_pool(texts), folds=5)
    monkeypatch.setitem(DATASETS, "tiny", lambda: folded_pool)
    run.run(replace(options, seeds=range(5, 10)))
    assert "cross-validations" not in capsys.readouterr().out
    run.run(replace(options, seeds=range(3, 8)))
    assert "tiny: seeds 3 to 7 are no whole cross-validations of 5 folds" in capsys.readouterr().out


def test_what_is_kept_is_known_by_the_dtype_of_the_backbone(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.controllability.states.LAYER", 1)
    pool = make_pool(texts, keywords=("cough",))
    for dtype in ("float32", "bfloat16"):
        shop = Workshop(tmp_path, dtype=dtype)
        shop.__dict__["_base"] = extractor
        shop.store(pool.corpus)
        shop.scrubbed(pool)
    assert len(list((tmp_path / "activations").iterdir())) == 2
    assert len(list((tmp_path / "features").glob("scrubbed-*"))) == 2


def test_copies_of_a_tweet_are_told_by_their_gist() -> None:
    one = gist("RT @somebody: BEST massage in town &#128514; http://t.co/abc")
    assert one == gist("best massage in TOWN https://t.co/xyz") == "best massage in town"
    assert one != gist("worst massage in town")


def test_results_of_other_texts_are_computed_anew(
    options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.run_pool(replace(options, seeds=range(1), methods=("plain",)), "tiny")
    path = options.output / "results" / "tiny" / "seed-0" / "plain.json"
    before = json.loads(path.read_text())
    monkeypatch.setitem(DATASETS, "tiny", lambda: make_pool(texts, keywords=("cough",)))
    run.run_pool(replace(options, seeds=range(1), methods=("plain",)), "tiny")
    assert json.loads(path.read_text())["key"] != before["key"]


def test_tables_and_pictures_of_a_run(options: Options) -> None:
    from benchmarks.controllability.summary import write_summary

    run.run_pool(options, "tiny")
    results = write_summary(options.output)
    plain = results["tiny"]["methods"]["plain"]["test"]
    seeds = [
        json.loads((options.output / "results" / "tiny" / f"seed-{seed}" / "plain.json").read_text())
        for seed in (0, 1)
    ]
    right = [result["right"]["test"] for result in seeds]
    assert plain["accuracy"]["mean"] == pytest.approx(np.mean([own.count("1") / len(own) for own in right]))
    against = results["tiny"]["methods"]["balanced"]["test"]["against_plain"]["accuracy"]
    assert against["low"] <= against["difference"] <= against["high"]
    assert "| plain |" in (options.output / "RESULTS.md").read_text()
    assert "Plotly.newPlot" in (options.output / "figures" / "tiny.html").read_text()
    assert (options.output / "figures" / "plotly.min.js").exists()


def test_a_method_that_does_not_apply_says_why_and_is_in_no_mean(
    options: Options, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = make_pool(texts)
    cut = replace(nobody, rows=lambda seed: replace(nobody.rows(seed), balanced=None))
    monkeypatch.setitem(DATASETS, "tiny", lambda: cut)
    run.run_pool(options, "tiny")
    found = summarize(options.output / "results" / "tiny")
    assert list(found["methods"]) == ["plain", "selfreg_keywords"]
    assert "too few texts" in found["does_not_apply"]["balanced"]


def test_pairs_are_compared_side_by_side(sae: SAEForFeatureExtraction, store: ActivationStore, tmp_path: Path) -> None:
    generator_ = np.random.default_rng(0)
    group = ["longer is chosen" if side else "shorter is chosen" for side in generator_.random(30) < 0.5]
    pool = Pool(
        "pairs",
        "pairs",
        Corpus("pairs", ["{}"] * 30, template="{chat}"),
        [],
        [0] * 30,
        group,
        ("fever",),
        list(range(20)),
        lambda seed: Rows(list(range(20)), {"test": list(range(20, 30))}),
        "Good?",
        task="preference",
    )
    activations = compute_activations(sae, store)
    trial = Trial(
        pool, 0, sae, activations, UnintendedFeatures.from_ids(sae, [1, 2]), FakeWorkshop(tmp_path, sae, store)
    )
    states = trial.states([4], trial.measure, None)
    assert torch.equal(states.pooled[0], activations.pooled[8:10])
    for method in ("plain", "selfreg_keywords", "leace"):
        result = trial.run(method)
        assert result["figures"]["test"]["accuracy"] == pytest.approx(result["right"]["test"].count("1") / 10)
        assert result["figures"]["test"]["f1"] is None
    with pytest.raises(DoesNotApply, match="balance"):
        trial.run("balanced")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_takes_the_place_of_the_features_and_nothing_else(
    form: str,
    options: Options,
    sae: SAEForFeatureExtraction,
    store: ActivationStore,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = Trial(
        make_pool(texts),
        0,
        sae,
        compute_activations(sae, store),
        UnintendedFeatures.from_ids(sae, [1, 2]),
        run.workshop(options),
    )
    features = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    trial.choices["attribute"] = features
    train = trial.states(trial.rows.train, features, features)
    with pytest.raises(DoesNotApply, match="the group's own offset"):
        trial._with_form(form, train, features)
    train = replace(train, offsets=torch.zeros(40, 2))
    found = trial._with_form(form, train, features)
    assert torch.equal(found.pooled, train.pooled)
    assert found.activations.shape == (40, {"dependence_means": 3, "dependence_components": 3}.get(form, 2))
    assert not torch.equal(found.activations, train.activations)
    # It is what the trainer gets.
    seen: list[torch.Tensor] = []

    def record(name: str, model: Any, args: Any, train: PooledStates, **kwargs: Any) -> Any:
        seen.append(train.activations)
        return fit_head(name, model, args, train, **kwargs)

    monkeypatch.setattr("benchmarks.controllability.methods.fit_head", record)
    trial.run(form)
    assert len(seen) == 1
    assert torch.equal(seen[0], found.activations)


def noise_states() -> tuple[PooledStates, list[str]]:
    torch.manual_seed(0)
    groups = ["ab"[row // 2 % 2] for row in range(80)]
    states = PooledStates(torch.randn(80, 4), torch.randn(80, 60), torch.arange(80) % 2)
    return states, groups


def test_a_composite_out_of_fold_does_not_know_its_texts_by_heart() -> None:
    states, groups = noise_states()
    is_b = torch.tensor([own == "b" for own in groups])
    out_of_fold, in_sample = (
        FORMS[name](states, states.activations, groups)[:, 1]
        for name in ("dependence_composite", "dependence_composite_in_sample")
    )
    by_heart, honest = (float(((odds > 0) == is_b).float().mean()) for odds in (in_sample, out_of_fold))
    assert by_heart > 0.9
    assert honest < 0.7
    unknown = FORMS["dependence_composite"](states, states.activations, [None, *groups[1:]])
    # What is unknown of a text says nothing within its label.
    torch.testing.assert_close(unknown[0], unknown[2::2].mean(dim=0))


def test_components_and_groups_as_columns() -> None:
    states, groups = noise_states()
    found = FORMS["dependence_components"](states, states.activations, groups)
    for label in (0, 1):
        torch.testing.assert_close(found[states.labels == label].mean(dim=0), torch.zeros(10).double())
    gram = found.T @ found
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-6, rtol=0.0)
    assert FORMS["dependence_group"](states, states.activations, ["a", "b", *["a"] * 78])[:3].tolist() == [
        [1.0, 0.0],
        [0.0, 1.0],
        [1.0, 0.0],
    ]


def test_what_is_known_within_a_group_is_no_matter_of_the_group() -> None:
    rng = np.random.default_rng(0)
    labels, groups = np.arange(400) % 4, ["ab"[row // 4 % 2] for row in range(400)]
    logits = rng.normal(size=(400, 4))
    logits[np.arange(400), labels] += 1
    # Far more than a float tells beside it, once it is a probability.
    of_group = {"a": [100.0, -100.0, 0.0, 50.0], "b": [-100.0, 100.0, 0.0, 7.0]}
    shifts = np.array([of_group[group] for group in groups])
    moved = logits + shifts
    known = auc_within_groups(logits, labels, groups)
    assert known is not None
    assert 0.7 < known < 0.95
    assert auc_within_groups(moved, labels, groups) == pytest.approx(known)
    assert auc_within_groups(shifts, labels, groups) == 0.5
    assert auc_within_groups(np.eye(4)[labels] + shifts, labels, groups) == 1.0
    # Labels told apart in one group only; texts of no known group count nothing.
    half = np.where(np.array(groups) == "a", 1.0, 0.0)[:, None] * np.eye(4)[labels]
    assert auc_within_groups(half, labels, groups) == 0.75
    assert auc_within_groups(half, labels, [group if group == "a" else None for group in groups]) == 1.0
    assert auc_within_groups(np.zeros((4, 2)), np.array([0, 0, 1, 1]), ["a", "a", "b", "b"]) is None


def test_an_oracle_adds_what_the_group_says_of_the_label(
    options: Options, sae: SAEForFeatureExtraction, store: ActivationStore, texts: list[str]
) -> None:
    group = ["long" if label else "short" for label in make_pool(texts).label]
    pool = make_pool(texts, group=group)
    activations, keywords = compute_activations(sae, store), UnintendedFeatures.from_ids(sae, [1, 2])
    trial = Trial(pool, 0, sae, activations, keywords, run.workshop(options))
    count = sum(pool.label[row] for row in trial.rows.train)
    of_balanced = sum(pool.label[row] for row in trial.rows.balanced or [])
    found = np.exp(trial._log_odds()["long"])
    np.testing.assert_allclose(found[1], (count + 0.5) / (count + 1) / ((of_balanced + 0.5) / 21))
    np.testing.assert_allclose(found[0], 0.5 / (count + 1) / ((20 - of_balanced + 0.5) / 21))
    np.testing.assert_array_equal(trial._log_odds()[None], [0, 0])
    # Here the group is the label: told it, nothing is wrong, whatever was learnt in two epochs; told less, more is.
    accuracies = [
        trial.run(name)["figures"]["test"]["accuracy"] for name in ("balanced_l2", "oracle_25", "oracle_100")
    ]
    assert accuracies[0] < accuracies[1] <= accuracies[2] == 1.0
    with pytest.raises(DoesNotApply, match="no tie"):
        Trial(replace(pool, kind="task"), 0, sae, activations, keywords, run.workshop(options)).run("oracle_100")


def test_limits_of_a_tie_are_told_of_every_kind_of_head(
    options: Options, sae: SAEForFeatureExtraction, store: ActivationStore, texts: list[str]
) -> None:
    # Of 36 texts four go against the tie; the group is told by a dimension, the label by a weaker one.
    label = [*([0] * 18 + [1] * 18), *([0, 0, 1, 1] * 6)]
    group = [*("a" * 16 + "bb" + "b" * 16 + "aa"), *("abab" * 6)]
    pool = make_pool(
        texts,
        label=label,
        group=group,
        rows=lambda seed: Rows(list(range(36)), {"even": list(range(36, 60))}, list(range(36, 60))),
    )
    activations = compute_activations(sae, store)
    torch.manual_seed(0)
    noise = torch.randn(60, activations.pooled.shape[1])
    signs = torch.tensor([[2.0 * y - 1, 2.0 * (own == "b") - 1] for y, own in zip(label, group, strict=True)])
    pooled = torch.cat([signs[:, :1] + noise[:, :1], 3 * signs[:, 1:] + noise[:, :1], 0.5 * noise[:, 2:]], dim=1)
    none = UnintendedFeatures.from_ids(sae, [])
    trial = Trial(pool, 0, sae, replace(activations, pooled=pooled), none, run.workshop(options))
    found: dict[str, dict[str, float]] = {}
    for kind, settings, auc in aucs(trial):
        found.setdefault(kind, {})[settings] = auc
    counts = {kind: len(tried) for kind, tried in found.items()}
    assert counts == {
        "tied, offset": len(SHARES) * len(DECAYS) * len(RIDGES),
        "tied, weighted texts": len(POWERS) * len(DECAYS) * len(RIDGES),
        "tied, linear discriminant": len(SHRINKAGES),
        "balanced": len(RIDGES),
    }
    offset = found["tied, offset"]
    nothing, everything = (offset[f"share {share}, decay 0.0, ridge 0.1"] for share in (0.0, 1.0))
    weighted = found["tied, weighted texts"]["power 1.0, decay 0.0, ridge 0.1"]
    assert everything > nothing
    assert weighted > nothing


class SaysLengths:
    """A chat model that finds long conversations likelier to be of the last option."""

    def choose(self, conversations: Any, options: Any) -> list[Choice]:
        shares = [min(len(turns[0]["content"]) / 2_000, 0.9) for turns in conversations]
        return [
            Choice(
                options[-1],
                dict(zip(options, [1 - share, *[share / (len(options) - 1)] * (len(options) - 1)], strict=True)),
            )
            for share in shares
        ]

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_methods_on_texts_are_measured_like_the_others(
    options: Options, sae: SAEForFeatureExtraction, store: ActivationStore, texts: list[str]
) -> None:
    for name in ("tfidf", "zero_shot", "scrubbing"):
        pytest.importorskip(f"selfreg.classifier.{name}")
    shop = run.workshop(options)
    shop.__dict__.update(chat=SaysLengths(), scrubbed=lambda pool: torch.zeros_like(store.pool("mean")).normal_())
    activations = compute_activations(sae, store)
    trial = Trial(make_pool(texts), 0, sae, activations, UnintendedFeatures.from_ids(sae, [1, 2]), shop)
    for method in ("tfidf", "zero_shot", "scrubbing"):
        result = trial.run(method)
        right = result["right"]["test"]
        assert result["figures"]["test"]["accuracy"] == pytest.approx(right.count("1") / len(right))
        assert (result["figures"]["test"]["unintended_use"] is None) == (method != "scrubbing")


def test_scrubbed_texts_hold_no_keyword_and_stay_pairs(texts: list[str]) -> None:
    scrub = pytest.importorskip("selfreg.classifier.scrubbing").scrub
    assert not any("fever" in text for text in scrubbed_texts(make_pool(texts), scrub))
    reply = [[{"role": "assistant", "content": text}] for text in ("a fever", "a pain fever")]
    pair = json.dumps({"prompt": "?", "chosen": reply[0], "rejected": reply[1]})
    pool = make_pool([pair], task="preference", label=[0], group=[None], keywords=("fever", "pain"))
    left = json.loads(scrubbed_texts(pool, scrub)[0])
    assert left["chosen"] != left["rejected"]
    assert left["chosen"][-1]["content"].strip() == left["rejected"][-1]["content"].strip() == "a"


def test_folds_are_measured_together() -> None:
    given = {"rows": [0, 1], "labels": [0, 1], "groups": ["a", "b"]}
    trials = {seed: {"evals": {"test": {**given, "rows": [2 * seed, 2 * seed + 1]}}} for seed in range(4)}
    ours = {seed: {"rows": {}, "right": {"test": "10"}} for seed in range(4)}
    other = {**ours, 3: {"rows": {"test": [7]}, "right": {"test": "1"}}}
    units = units_of({"folds": 2}, trials, ours, other, "test")
    assert [unit.rows.tolist() for unit in units] == [[0, 1, 2, 3], [4, 5, 7]]
    assert units[1].right.tolist() == [True, False, False]
    assert units[1].reference.tolist() == [True, False, True]


def test_acceptance_is_read_off_as_it_is_defined() -> None:
    def figures(score: float, use: float, difference: dict[str, float] | None = None) -> dict[str, Any]:
        own: dict[str, Any] = {
            "accuracy": {"mean": score},
            # Of the features that were chosen, and of all that tell the attribute.
            "unintended_use_attribute": {"mean": use},
            "unintended_use_keywords": {"mean": 0.5},
            "unintended_use": {"mean": 0.3},
            "worst_group_accuracy": None,
        }
        if difference is not None:
            own["against_plain"] = {"accuracy": difference, "worst_group_accuracy": difference}
        return own

    difference = {"difference": -0.01, "low": -0.03, "high": 0.01, "reference_error": 0.012}
    result = {
        "score": "accuracy",
        "worst_eval": "test",
        "methods": {"plain": {"test": figures(0.9, 0.2)}, "selfreg": {"test": figures(0.89, 0.01, difference)}},
    }
    found = acceptance(result)
    assert found["within_one_standard_error"]
    assert found["use_cut"] == pytest.approx(20)
    assert found["use_cut_enough"]
    assert not found["worst_group_above_plain"]
    result["methods"]["selfreg"]["test"]["against_plain"]["accuracy"] = {**difference, "difference": -0.02}
    assert not acceptance(result)["within_one_standard_error"]
    result["methods"]["selfreg_keywords"] = result["methods"].pop("selfreg")
    assert acceptance(result)["method"] == "selfreg_keywords"
    assert acceptance(result)["use_cut"] == 1


def test_the_front_holds_what_nothing_beats() -> None:
    points = [("a", 0.1, 0.8), ("b", 0.2, 0.9), ("c", 0.3, 0.85), ("d", 0.1, 0.7)]
    assert [point[0] for point in front(points, less=True)] == ["a", "b"]
    assert [point[0] for point in front(points, less=False)] == ["b", "c"]
    part = {"score": "accuracy", "worst_eval": "test", "seeds": 1, "methods": {}}
    assert picture("x", part)["data"][1]["x"] == []


def test_a_conversation_as_plain_text() -> None:
    pair = {
        "prompt": [{"role": "user", "content": "Hi?"}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert conversations(json.dumps(pair)) == ["user: Hi?\nassistant: Hello.", "user: Hi?\nassistant: No."]

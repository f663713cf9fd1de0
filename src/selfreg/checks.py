"""What is wrong with a recipe and its data, told before any long work starts."""

from collections.abc import Callable
from functools import partial

from transformers import AutoConfig

from selfreg.activations.backbone import resolve_model
from selfreg.activations.spec import HiddenStateSpec
from selfreg.classifier.lora import adapter_config
from selfreg.classifier.zero_shot import check_label_names
from selfreg.data import TaskData
from selfreg.evaluation.arrays import group_name
from selfreg.features.attribute import has_two_groups
from selfreg.features.chat import EndpointChatModel
from selfreg.features.keywords import keyword_pattern
from selfreg.features.rubric import Rubric
from selfreg.recipe import ChatRecipe, Recipe, RecipeError, SAERecipe
from selfreg.sae.configuration import SAEConfig
from selfreg.sae_stages import load_sae


def check_recipe(recipe: Recipe, data: TaskData) -> None:
    """
    Raises:
        RecipeError: names the key, the value and the mend.
    """
    features, weights = recipe.features, recipe.classifier.class_weights
    if isinstance(weights, list) and len(weights) != len(data.labels):
        raise RecipeError(
            f"classifier.class_weights has {len(weights)} weights, the data has {len(data.labels)} labels: "
            f"{', '.join(data.labels)}"
        )
    for part in (data.train, *data.eval.values()):
        for row, group in enumerate(part.groups or []):
            _of_key(f"data.group: row {row} of {part.name!r}", partial(group_name, group))
    width = recipe.sae.num_features
    if recipe.sae.from_pretrained is not None:
        width = _sae_config(recipe.sae).num_features
    for name, numbers in (("ids", features.ids or []), ("random", [(features.random or 1) - 1])):
        for number in numbers:
            if not 0 <= number < width:
                raise RecipeError(f"features.{name}: feature {number} is not there, the SAE has 0 to {width - 1}")
    if features.keywords is not None:
        _of_key("features.keywords", lambda: keyword_pattern(features.keywords or []))
        pattern = keyword_pattern(features.keywords)
        # Explanations may name what no text does. Of pairs the texts are JSON, in which a line ends in two characters.
        if features.explainer is None and not any(
            pattern.search(text.replace("\\n", " ")) for text in data.train.texts
        ):
            raise RecipeError(
                f"features.keywords: none of {', '.join(map(repr, features.keywords[:10]))} stands in a training "
                "text, so that no feature can be found by them: give words that do"
            )
    if features.attribute is not None and not has_two_groups(data.train.attribute or [], data.train.strata()):
        raise RecipeError(
            f"features.attribute: no label of the training set has texts of two values of {features.attribute!r}, so "
            "that it can't be told apart from the label; choose features by keywords or a judge, or add texts"
        )
    if recipe.classifier.lora is not None:
        _of_key("classifier.lora", lambda: adapter_config(recipe.classifier.lora or {}))
    if features.rubric is not None:
        _of_key("features.rubric", lambda: _check_rubric(Rubric.load(features.rubric or ""), data.labels))
    if "zero_shot" in recipe.baselines and recipe.task in ("single_label", "multi_label"):
        _of_key("instruction", lambda: check_label_names(data.labels, recipe.instruction))
    if features.explainer is not None:
        _check_chat("features.explainer", features.explainer)
    for judge in features.judge or []:
        _check_chat("features.judge", judge)


def check_sae_source(recipe: SAERecipe, spec: HiddenStateSpec) -> None:
    """Raises RecipeError where a published SAE can't be read, or does not fit the states of the backbone."""
    source = recipe.from_pretrained
    config = _sae_config(recipe)
    if config.hidden_size != spec.hidden_size:
        raise RecipeError(
            f"sae.from_pretrained: the SAE {source} takes states of width {config.hidden_size}, the backbone "
            f"gives {spec.hidden_size}"
        )
    found = config.hidden_state_spec()
    if found is not None:
        _of_key(
            "sae.from_pretrained",
            lambda: found.check_features_fit(spec, f"the SAE {source}", "the backbone of the recipe"),
        )


def _sae_config(recipe: SAERecipe) -> SAEConfig:
    try:
        return load_sae(recipe).config
    except (OSError, ValueError) as error:
        raise RecipeError(f"sae.from_pretrained: {error}") from error


def _check_chat(key: str, chat: ChatRecipe) -> None:
    if chat.endpoint is not None and chat.model is not None:
        endpoint, model = chat.endpoint, chat.model
        _of_key(key, lambda: EndpointChatModel(endpoint, model, api_key_env=chat.api_key_env))
    if chat.local is not None:
        try:
            source = resolve_model(chat.local)
            AutoConfig.from_pretrained(source.path, **source.kwargs())
        except (OSError, ValueError) as error:
            raise RecipeError(f"{key}.local: can't load the chat model {chat.local!r}: {error}") from error


def _check_rubric(rubric: Rubric, labels: list[str]) -> None:
    if rubric.per_label and not labels:
        raise ValueError("it gives verdicts for each label, but this task has none: leave per_label out")
    unknown = sorted(set(rubric.labels) - set(labels)) if rubric.per_label else []
    if unknown:
        raise ValueError(
            f"it gives verdicts for each label, but {unknown[0]!r} is none of the data's: {', '.join(labels)}; spell "
            "the labels as in the data"
        )


def _of_key(key: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}: {error}") from error

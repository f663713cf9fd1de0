"""Recipe: one YAML file = one whole run."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from selfreg.activations.conversation import CHAT
from selfreg.features.limits import MAX_ATTRIBUTE_FEATURES, MAX_FEATURES
from selfreg.utils.files import fingerprint_file, fingerprint_json
from selfreg.utils.validation import explain_errors

BASELINES = ("plain", "l2", "dropout", "label_smoothing", "focal", "spectral_norm", "leace")
"""What a recipe compares with where it does not say."""
MORE_BASELINES = (
    "projection",
    "removal_only",
    "penalty_only",
    "dependence_only",
    "offset_only",
    "tfidf",
    "zero_shot",
    "scrubbing",
)
"""Further ones: the span of the features projected away, selfreg's own parts each by itself, and three that see
the text and not the hidden states: TF-IDF with logistic regression, prompting the backbone, and masking keywords."""


class RecipeError(ValueError):
    """A recipe that can't be run, with the key and the mend."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class BackboneRecipe(_Part):
    """The language model whose hidden states are used."""

    model: str = Field(description="Hub id, local folder, or package:<import name> for an installed wheel.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file in the repo or folder.")
    layer: int | Literal["final"] = Field(15, description="Residual stream after this block, counted from 0.")
    pooling: Literal["last", "mean", "cls"] = Field("mean", description="How a text's states become one.")
    max_length: int = Field(128, ge=1, description="Tokens of a prompt.")
    template: str | None = Field(None, description="Prompt around each text, with {text} where it goes.")
    token_rule: Literal["text_no_sinks", "text", "all"] = Field("text_no_sinks", description="Tokens that count.")


class SplitRecipe(_Part):
    """A set of texts."""

    path: str = Field(description="Local .jsonl, .jsonl.xz, .csv or .parquet (relative to the recipe), or a Hub id.")
    split: str = Field("train", description="Split of a Hub data set, or a slice of a file: train[:80%].")


class DataRecipe(_Part):
    """What is learned from, and what is measured on."""

    text: str = Field("text", description="Column of the text. For preference: chosen, rejected and prompt, as TRL.")
    label: str = Field("label", description="Column of the label; for multi_label it holds a list of names.")
    weight: str | None = Field(None, description="Column of the weight of each training text in the loss.")
    group: str | None = Field(
        None, description="Column of the group, for gaps and leakage; the classifier never sees it."
    )
    train: SplitRecipe
    eval: dict[str, SplitRecipe] = Field(min_length=1, description="Sets to measure on, by name.")
    sae_text: SplitRecipe | None = Field(None, description="General text to pre-train the SAE on; null: train.")
    drop_duplicates: bool = Field(True, description="Drop repeated train texts, and eval texts that stand in train.")


class PretrainRecipe(_Part):
    """Pre-training of the SAE."""

    epochs: float = Field(3, gt=0, description="Passes over the hidden states.")
    learning_rate: float | None = Field(None, gt=0, description="null: chosen by the width of the SAE.")
    batch_size: int = Field(2048, ge=1, description="Hidden states of a batch.")
    max_tokens: int | None = Field(None, ge=1, description="Stop reading sae_text after about so many tokens.")


class FinetuneRecipe(_Part):
    """Fine-tuning of the SAE on the task's texts."""

    epochs: float = Field(5, gt=0)
    learning_rate: float = Field(5e-5, gt=0)
    batch_size: int = Field(2048, ge=1, description="Hidden states of a batch.")


class SAERecipe(_Part):
    """The sparse autoencoder."""

    from_pretrained: str | None = Field(
        None, description="Hub id or folder of an SAE, of selfreg or another library: skips pre-training."
    )
    subfolder: str = Field("", description="Which SAE of a repo that holds many.")
    revision: str | None = Field(None, description="Branch, tag or commit of the SAE's repo.")
    num_features: int = Field(4608, ge=1)
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = Field(
        "topk", description="How few features are chosen."
    )
    k: int = Field(32, ge=1, description="Active features of a token; on average for batch_topk.")
    pretrain: PretrainRecipe = Field(default_factory=PretrainRecipe)
    finetune: FinetuneRecipe | None = Field(default_factory=FinetuneRecipe, description="null: none.")

    @model_validator(mode="after")
    def _k_fits(self) -> "SAERecipe":
        if self.k > self.num_features:
            raise ValueError(f"k={self.k} is over num_features={self.num_features}: a state has no more features")
        return self


class ChatRecipe(_Part):
    """A chat model: {local: <model>}, or {endpoint: <url>, model: <name>, api_key_env: <VARIABLE>}."""

    local: str | None = Field(None, description="A model that transformers loads here.")
    endpoint: str | None = Field(None, description="URL of an OpenAI-compatible server.")
    model: str | None = Field(None, description="Name of the model on that server.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the key.")

    @model_validator(mode="after")
    def _one_kind(self) -> "ChatRecipe":
        if (self.local is None) == (self.endpoint is None):
            raise ValueError("name one chat model: either local or endpoint")
        if self.endpoint is not None and self.model is None:
            raise ValueError("endpoint needs model, the name of the model on that server")
        return self


class FeaturesRecipe(_Part):
    """How the unintended features are chosen: by one of judge, keywords, attribute, ids."""

    rubric: str | None = Field(
        None, description="What is a legitimate reason for a label: a file, a shipped one such as toxic_chat, or text."
    )
    explainer: ChatRecipe | None = None
    judge: list[ChatRecipe] | None = Field(None, min_length=1, description="One judge, or a list of some that vote.")
    keywords: list[str] | None = Field(None, description="Words looked for in spans and explanations.")
    attribute: str | None = Field(None, description="Column of the training data.")
    ids: list[int] | None = Field(None, description="Features by number.")
    max_features: int | None = Field(
        None,
        ge=1,
        description=f"How many at most; null: {MAX_ATTRIBUTE_FEATURES} by attribute, {MAX_FEATURES} by keywords or a "
        "judge. Ids and random features are taken as they are.",
    )
    random: int | None = Field(None, ge=1, description="So many at random: a control, not a choice.")

    @property
    def limit(self) -> int:
        """How many features are chosen at most, by attribute, keywords or a judge."""
        if self.max_features is not None:
            return self.max_features
        return MAX_ATTRIBUTE_FEATURES if self.method == "attribute" else MAX_FEATURES

    @field_validator("judge", mode="before")
    @classmethod
    def _list_of_judges(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @property
    def method(self) -> str:
        """Which of the ways is asked for."""
        return self._chosen()[0]

    def _chosen(self) -> list[str]:
        return [
            name for name in ("judge", "keywords", "attribute", "ids", "random") if getattr(self, name) is not None
        ]

    @model_validator(mode="after")
    def _one_way(self) -> "FeaturesRecipe":
        if len(self._chosen()) != 1:
            given = ", ".join(self._chosen()) or "none"
            raise ValueError(
                f"choose the unintended features by one of judge, keywords, attribute, ids; given: {given}"
            )
        if self.judge is not None and (self.explainer is None or self.rubric is None):
            raise ValueError("judge needs explainer and rubric")
        names = [judge.local or judge.model for judge in self.judge or []]
        if len(set(names)) < len(names):
            raise ValueError(f"judge: {', '.join(map(str, names))} must be different models: each has one vote")
        return self


def _weight(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("must be a number greater than or equal to 0, or auto")
    return float(value)


Weight = Annotated[float | Literal["auto"], PlainValidator(_weight, json_schema_input_type=float | Literal["auto"])]


class ClassifierRecipe(_Part):
    """Training of the classifier; the baselines get the same budget."""

    penalty_weight: Weight = Field(10.0, description="A number, or auto: as strong as the validation loss allows.")
    similarity: Literal["encoder", "dot", "cosine", "subspace"] = "dot"
    dependence_weight: Weight = Field(10.0, description="Likewise.")
    offset_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much of what the features alone say about the label is set aside in training; null: 0.6, and "
        "0 with lora, regression, label_smoothing_factor, or without both terms.",
    )
    logit_decay: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the mean squared logit in training; null: 0.1, and 0 as above.",
    )
    remove_unintended: bool = True
    ridge: Weight | None = Field(
        None,
        description="Weight of half the squared norm of the head's weights; auto: chosen by cross-validation; null: "
        "auto, and 0 with lora, with weight_decay, or without both terms. l2 has its own, the other baselines none.",
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Of selfreg's classifier; null: 0 beside a ridge, 2 without."
    )
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="Likewise. How much the targets are softened.")
    epochs: float = Field(100, gt=0)
    learning_rate: float = Field(3e-3, gt=0, description="Of the head.")
    batch_size: int = Field(64, ge=1)
    class_weights: Literal["balanced"] | list[float] | None = None
    preference_loss: Literal["bradley_terry", "pointwise"] = Field(
        "bradley_terry", description="Of pairs: both sides compared, or each judged by itself."
    )
    lora: dict[str, Any] | None = Field(
        None, description="Train an adapter of the backbone too: {r: 8, ...}, as peft's LoraConfig takes it."
    )
    adapter_epochs: float = Field(3, gt=0, description="With lora; each runs the backbone over all texts.")
    adapter_learning_rate: float = Field(2e-4, gt=0, description="With lora, of the adapter.")

    @model_validator(mode="after")
    def _of_adapter(self) -> "ClassifierRecipe":
        if self.label_smoothing_factor and self.offset_weight:
            raise ValueError("label_smoothing_factor would take back what the offset is sure of: set one of them to 0")
        if self.lora is not None and self.offset_weight:
            raise ValueError("offset_weight needs states that stay as they are: leave lora or offset_weight out")
        if self.lora is not None and self.ridge == "auto":
            raise ValueError("ridge: auto needs states that stay as they are: leave lora out, or give a number")
        return self


class CardRecipe(_Part):
    """`card:`"""

    about: str | None = Field(None, description="What the classifier is for, in a sentence or two.")
    example: str | None = Field(None, description="A text to try it with.")
    license: str | None = Field(None, description="Of the model, as the Hub names it, such as apache-2.0.")
    language: str | None = Field(None, description="Of the texts, such as en.")
    datasets: list[str] = Field(default_factory=list, description="Hub ids of the data, for filters on the Hub.")
    spans: bool = Field(True, description="Show pieces of the texts; false where those may not be published.")


class Recipe(_Part):
    """A whole run: data, SAE, unintended features, classifier, baselines and figures."""

    output: str = Field(description="Folder of the results.")
    seed: int = 0
    task: Literal["single_label", "multi_label", "regression", "preference"] = "single_label"
    backbone: BackboneRecipe
    data: DataRecipe
    sae: SAERecipe = Field(default_factory=SAERecipe)
    features: FeaturesRecipe
    classifier: ClassifierRecipe = Field(default_factory=ClassifierRecipe)
    instruction: str | None = Field(
        None,
        description="What the texts are and the labels mean, for the baseline zero_shot; null: the labels' names.",
    )
    baselines: list[str] = Field(default_factory=lambda: list(BASELINES))
    card: CardRecipe = Field(default_factory=CardRecipe, description="What only people know, for the model cards.")

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in (*BASELINES, *MORE_BASELINES):
                known = ", ".join((*BASELINES, *MORE_BASELINES))
                raise ValueError(f"baseline {name!r} is not known; there are {known}")
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _of_task(self) -> "Recipe":
        if self.task == "preference" and self.backbone.template is None:
            self.backbone.template = CHAT
        if self.task in ("regression", "preference") and self.classifier.class_weights is not None:
            raise ValueError(f"classifier.class_weights: task {self.task} has no classes; leave it out")
        if self.task == "regression" and self.classifier.logit_decay:
            raise ValueError("classifier.logit_decay: task regression has no logits; leave it out")
        if self.task != "preference" and self.classifier.preference_loss != "bradley_terry":
            raise ValueError(f"classifier.preference_loss is of task preference, not of {self.task}; leave it out")
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> "Recipe":
        """Reads a recipe.

        Args:
            path: a YAML file. `${VARIABLE}` in a value stands for an environment variable; relative paths of data are
                relative to the file.
            overrides: changes such as `classifier.dependence_weight=3.0`; values are YAML.

        Raises:
            FileNotFoundError: there is no such file.
            RecipeError: a key or a value is wrong; names the nearest key.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no recipe {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf8"))
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{path} must hold keys and values; see `selfreg run --schema`")
        for override in overrides or []:
            _set(values, override)
        return cls.from_dict(_expand(values, ""), base=path.parent)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, base: str | os.PathLike[str] = ".") -> "Recipe":
        """Checks a recipe given as a dictionary; relative data paths are relative to `base`."""
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            lines = "\n  ".join(explain_errors(error, cls))
            raise RecipeError(f"the recipe can't be run:\n  {lines}") from error
        data = recipe.data
        for split in (data.train, data.sae_text, *data.eval.values()):
            if split is not None:
                local = Path(base) / split.path
                if local.exists():
                    split.path = str(local.resolve())
        rubric = recipe.features.rubric
        if rubric is not None and len(rubric) < 256 and (Path(base) / rubric).is_file():
            recipe.features.rubric = str((Path(base) / rubric).resolve())
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The recipe with all defaults, as YAML and JSON can hold it."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Of all that decides the result: everything but where it is written, local files by what is in them."""
        values = {key: value for key, value in self.to_dict().items() if key != "output"}
        return fingerprint_json(_with_content(values))


def _with_content(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_content(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_content(inner) for inner in value]
    # Paths were made absolute when the recipe was read; another string is no path.
    return (
        fingerprint_file(value) if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value) else value
    )


def _set(values: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not name.strip():
        raise RecipeError(f"--set takes key=value, such as classifier.dependence_weight=3.0; got {override!r}")
    *parents, last = name.strip().split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override}: {parent} holds no keys")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {text!r} is not YAML") from error


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, where) for inner in value]
    if isinstance(value, str):
        expanded = os.path.expandvars(value)
        if "${" in expanded:
            name = expanded.split("${", 1)[1].split("}")[0]
            raise RecipeError(f"{where}: the environment variable {name} is not set (in {value!r})")
        return expanded
    return value

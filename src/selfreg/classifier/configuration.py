"""Configuration of a regularised classifier."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from selfreg.activations.conversation import ReplyFrame
from selfreg.activations.prompt import Pooling, PromptLayout, TokenRule, check_choice
from selfreg.activations.spec import HiddenStateSpec
from selfreg.classifier.tasks import Task
from selfreg.sae.input_norm import InputNorm
from selfreg.utils.configs import CONFIG_FORMAT, CheckedConfigMixin


@strict
class RegularizedSequenceClassifierConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`RegularizedSequenceClassifier`]. Made by
    [`RegularizedSequenceClassifier.from_backbone`]; there is seldom a reason to write one by hand.

    Args:
        hidden_size (`int`): width of a hidden state.
        base_model_name_or_path (`str`, *optional*): the backbone: a Hub id, a folder, or `package:<import name>`.
        base_model_revision (`str`, *optional*): commit of the backbone on the Hub.
        base_model_gguf_file (`str`, *optional*): GGUF file of the backbone.
        backbone_dtype (`str`, defaults to `"float32"`): dtype that the backbone was used in; the head is float32.
        backbone_saved (`bool`, defaults to `False`): whether the folder holds the backbone too, in `backbone/`.
        adapter (`bool`, defaults to `False`): whether the folder holds a peft adapter of the backbone, in `adapter/`.
        adapter_merged (`bool`, defaults to `False`): whether an adapter was merged into the backbone, which is then no
            longer the one that is named.
        layer (`int` or `"final"`): layer whose states are used, counted from 0.
        pooling (`str`, defaults to `"mean"`): `"mean"`, `"last"` or `"cls"`.
        token_rule (`str`, defaults to `"text_no_sinks"`): which tokens count.
        reference_norm (`float`, *optional*): yardstick of the sink rule.
        template (`str`, *optional*): prompt around each text.
        max_length (`int`, defaults to 128): tokens of a prompt.
        prompt_layout (`dict`): the template as tokens; see `PromptLayout`.
        pad_id (`int`): id that prompts are padded with.
        unintended_feature_ids (`list[int]`): the unintended features, as numbered in their SAE.
        unintended_reasons (`list[str]`): why each of them was chosen.
        unintended_labels (`list[list[str] | None]`, *optional*): the labels that each of them is unintended for; None:
            all.
        task (`str`, defaults to `"single_label"`): `"single_label"`, `"multi_label"`, `"regression"` or
            `"preference"`.
        sae_num_features (`int`, *optional*): width of that SAE.
        input_norm (`str`, defaults to `"none"`): how that SAE normalises each state by itself.
        remove_unintended (`bool`, defaults to `True`): whether they are removed from the hidden states.
        selfreg_version (`str`, *optional*): version that wrote the config.
        config_format (`int`): of the config; one of a newer selfreg is not read.
    """

    model_type = "regularized_sequence_classifier"

    hidden_size: int = 576
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_gguf_file: str | None = None
    backbone_dtype: str = "float32"
    backbone_saved: bool = False
    adapter: bool = False
    adapter_merged: bool = False
    layer: int | str = "final"
    pooling: str = "mean"
    token_rule: str = "text_no_sinks"
    reference_norm: float | None = None
    template: str | None = None
    max_length: int = 128
    prompt_layout: dict[str, Any] | None = None
    pad_id: int = 0
    unintended_feature_ids: list[int] | None = None
    unintended_reasons: list[str] | None = None
    unintended_labels: list[list[str] | None] | None = None
    task: str = "single_label"
    sae_num_features: int | None = None
    input_norm: InputNorm = "none"
    remove_unintended: bool = True
    selfreg_version: str | None = None
    config_format: int = CONFIG_FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("pooling", self.pooling, Pooling)
        check_choice("token_rule", self.token_rule, TokenRule)
        check_choice("task", self.task, Task)

    @property
    def num_unintended(self) -> int:
        return len(self.unintended_feature_ids or [])

    def layout(self) -> PromptLayout:
        """The prompt around each text, as tokens."""
        values = self.prompt_layout or {
            "prefix": [],
            "suffix": [],
            "num_leading": 0,
            "num_trailing": 0,
            "keep_special": True,
        }
        frame = values.get("frame")
        return PromptLayout(
            prefix=tuple(values["prefix"]),
            suffix=tuple(values["suffix"]),
            num_leading=values["num_leading"],
            num_trailing=values["num_trailing"],
            keep_special=values["keep_special"],
            max_length=self.max_length,
            frame=ReplyFrame(**{name: tuple(ids) for name, ids in frame.items()}) if frame else None,
        )

    def hidden_state_spec(self) -> HiddenStateSpec:
        """The states that the classifier reads."""
        return HiddenStateSpec(
            model=self.base_model_name_or_path or "",
            revision=self.base_model_revision,
            gguf_file=self.base_model_gguf_file,
            layer=self.layer,  # type: ignore[arg-type]
            hidden_size=self.hidden_size,
            token_rule=self.token_rule,  # type: ignore[arg-type]
            template=self.template,
            max_length=self.max_length,
        )

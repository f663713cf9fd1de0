"""Configuration of a sparse autoencoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from selfreg.activations.spec import HiddenStateSpec

ACTIVATION_NAMES = ("topk", "batch_topk")


@strict
class SAEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SAEForFeatureExtraction`].

    Args:
        hidden_size (`int`): width of the hidden states.
        num_features (`int`, defaults to 4608): number of latent features.
        activation (`str`, defaults to `"topk"`): how few features are chosen: `"topk"`, the k largest of each state;
            `"batch_topk"`, k of a state on average over a batch, and above a learned threshold in inference.
        k (`int`, defaults to 32): features that are active in a state, on average for `"batch_topk"`.
        tied (`bool`, defaults to `False`): whether the encoder directions are the decoder directions.
        normalize_decoder (`bool`, defaults to `True`): whether decoder directions are kept at unit length.
        base_model_name_or_path (`str`, *optional*): the backbone whose states it was trained on.
        base_model_revision (`str`, *optional*): commit of that backbone on the Hub.
        base_model_gguf_file (`str`, *optional*): GGUF file of that backbone.
        layer (`int` or `"final"`, *optional*): layer of that backbone, counted from 0.
        token_rule (`str`, *optional*): which tokens it was trained on; see `select_tokens`.
        template (`str`, *optional*): prompt around each text.
        max_length (`int`, *optional*): tokens of a prompt.
        selfreg_version (`str`, *optional*): version that wrote the config.

    Raises:
        ValueError: `k` is over `num_features`, or a size is not positive, or the activation is not known.
    """

    model_type = "sparse_autoencoder"

    hidden_size: int = 576
    num_features: int = 4608
    activation: str = "topk"
    k: int = 32
    tied: bool = False
    normalize_decoder: bool = True
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_gguf_file: str | None = None
    layer: int | str | None = None
    token_rule: str | None = None
    template: str | None = None
    max_length: int | None = None
    selfreg_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_features", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.k > self.num_features:
            raise ValueError(f"k={self.k} is over num_features={self.num_features}: a state has no more features")
        if self.activation not in ACTIVATION_NAMES:
            raise ValueError(
                f"activation={self.activation!r} is not known; choose one of {', '.join(ACTIVATION_NAMES)}"
            )

    def set_hidden_state_spec(self, spec: HiddenStateSpec) -> None:
        """Notes the states that the SAE is trained on.

        Raises:
            ValueError: their width is not `hidden_size`.
        """
        if spec.hidden_size != self.hidden_size:
            raise ValueError(
                f"the SAE takes states of width {self.hidden_size}, layer {spec.layer} of {spec.model!r} gives "
                f"{spec.hidden_size}: set hidden_size={spec.hidden_size}"
            )
        self.base_model_name_or_path, self.base_model_revision = spec.model, spec.revision
        self.base_model_gguf_file = spec.gguf_file
        self.layer, self.token_rule = spec.layer, spec.token_rule
        self.template, self.max_length = spec.template, spec.max_length

    def hidden_state_spec(self) -> HiddenStateSpec | None:
        """The states that the SAE was trained on; None where it does not say."""
        if self.base_model_name_or_path is None or self.layer is None:
            return None
        return HiddenStateSpec(
            model=self.base_model_name_or_path,
            revision=self.base_model_revision,
            gguf_file=self.base_model_gguf_file,
            layer=self.layer,  # type: ignore[arg-type]
            hidden_size=self.hidden_size,
            token_rule=self.token_rule or "text_no_sinks",  # type: ignore[arg-type]
            template=self.template,
            max_length=self.max_length or 128,
        )

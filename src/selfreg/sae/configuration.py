"""Configuration of a sparse autoencoder."""

from typing import Any, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from selfreg.activations.spec import HiddenStateSpec
from selfreg.sae.input_norm import InputNorm
from selfreg.utils.configs import CONFIG_FORMAT, CheckedConfigMixin

ACTIVATION_NAMES = ("topk", "batch_topk", "jumprelu", "relu")
INPUT_NORMS = get_args(InputNorm)


@strict
class SAEConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`SAEForFeatureExtraction`].

    Args:
        hidden_size (`int`): width of the hidden states.
        num_features (`int`, defaults to 4608): number of latent features.
        activation (`str`, defaults to `"topk"`): how few features are chosen: `"topk"`, the k largest of each state;
            `"batch_topk"`, k of a state on average over a batch, and above a threshold in inference; `"jumprelu"`,
            what is above a learned threshold of its own, with an L0 penalty; `"relu"`, what is above zero, with an
            L1 penalty.
        k (`int`, defaults to 32): features that are active in a state, on average but for `"topk"`. `"jumprelu"` and
            `"relu"` aim at it in training only.
        prefixes (`list[int]`, *optional*): a Matryoshka SAE: numbers of features, rising, the last `num_features`;
            each prefix of the features is trained to reconstruct by itself, so that the first ones are general. For
            `"topk"` and `"batch_topk"`.
        tied (`bool`, defaults to `False`): whether the encoder directions are the decoder directions.
        normalize_decoder (`bool`, defaults to `True`): whether decoder directions are kept at unit length.
        input_norm (`str`, defaults to `"none"`): normalisation of each state by itself before all else, as some
            published SAEs have it: `"rms"` (constant norm) or `"layer_norm"`.
        base_model_name_or_path (`str`, *optional*): the backbone whose states it was trained on.
        base_model_revision (`str`, *optional*): commit of that backbone on the Hub.
        base_model_gguf_file (`str`, *optional*): GGUF file of that backbone.
        layer (`int` or `"final"`, *optional*): layer of that backbone, counted from 0.
        token_rule (`str`, *optional*): which tokens it was trained on; see `select_tokens`.
        template (`str`, *optional*): prompt around each text.
        max_length (`int`, *optional*): tokens of a prompt.
        converted_from (`str`, *optional*): library and kind of the checkpoint that it was converted from.
        selfreg_version (`str`, *optional*): version that wrote the config.
        config_format (`int`): of the config; one of a newer selfreg is not read.

    Raises:
        ValueError: `k` is over `num_features`, or a size is not positive, the activation is not known, or the prefixes
            do not rise to `num_features`.
    """

    model_type = "sparse_autoencoder"

    hidden_size: int = 576
    num_features: int = 4608
    activation: str = "topk"
    k: int = 32
    tied: bool = False
    prefixes: list[int] | None = None
    normalize_decoder: bool = True
    input_norm: InputNorm = "none"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_gguf_file: str | None = None
    layer: int | str | None = None
    token_rule: str | None = None
    template: str | None = None
    max_length: int | None = None
    converted_from: str | None = None
    selfreg_version: str | None = None
    config_format: int = CONFIG_FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_features", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.k > self.num_features:
            raise ValueError(f"k={self.k} is over num_features={self.num_features}: a state has no more features")
        if self.input_norm not in INPUT_NORMS:
            raise ValueError(f"input_norm={self.input_norm!r} is not known; choose one of {', '.join(INPUT_NORMS)}")
        if self.activation not in ACTIVATION_NAMES:
            raise ValueError(
                f"activation={self.activation!r} is not known; choose one of {', '.join(ACTIVATION_NAMES)}"
            )

        if self.prefixes is not None:
            self._check_prefixes(self.prefixes)

    def _check_prefixes(self, prefixes: list[int]) -> None:
        if self.activation not in ("topk", "batch_topk"):
            raise ValueError(f"prefixes are for topk and batch_topk, not for activation={self.activation!r}")
        rising = all(a < b for a, b in zip([0, *prefixes], prefixes, strict=False))
        if not prefixes or not rising or prefixes[-1] != self.num_features:
            raise ValueError(f"prefixes={prefixes} must rise from above 0 to num_features={self.num_features}")

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

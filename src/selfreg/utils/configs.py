"""Configurations that are read as nothing else than what they are."""

import os
from typing import Any, ClassVar

CONFIG_FORMAT = 1
"""Raised where a reader of before would misunderstand what is written now."""


class CheckedConfigMixin:
    """A configuration that is read neither from another kind of model nor from a newer selfreg.

    transformers makes of any model's config one of this kind, and only warns.
    """

    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers.

        Raises:
            ValueError: it is of another kind of model, or in a newer format.
        """
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        check_config(found, cls.model_type, str(pretrained_model_name_or_path))
        return found, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: as `get_config_dict`.
        """
        check_config(config_dict, cls.model_type, config_dict.get("_name_or_path") or "the config")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def check_config(config: dict[str, Any], model_type: str, name: str) -> None:
    """Raises ValueError where a config is of another kind of model, or in a newer format."""
    kind = config.get("model_type", model_type)
    if kind != model_type:
        raise ValueError(
            f"{name} is a model of type {kind!r}, not of selfreg's type {model_type!r}: load it with its own class, "
            "or name a model that selfreg made"
        )
    found = config.get("config_format", CONFIG_FORMAT)
    if found > CONFIG_FORMAT:
        raise ValueError(
            f"{name} was written by selfreg {config.get('selfreg_version')} in config format {found}, and this one "
            f"reads formats up to {CONFIG_FORMAT}: pip install --upgrade selfreg"
        )

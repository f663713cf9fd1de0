"""Uploads of what transformers' own `save_pretrained` does not know of."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

UPLOAD_OPTIONS = ("repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision")
"""What `push_to_hub=True` of transformers takes beside it."""


def upload_folder(
    folder: Path, *, repo_id: str | None = None, repo_type: Literal["model", "dataset"] = "model", **options: Any
) -> str:
    """Uploads all that lies in a folder; `options` as for transformers' `push_to_hub`. Gives the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    repo = api.create_repo(repo_id or folder.name, repo_type=repo_type, exist_ok=True, private=private)
    api.upload_folder(repo_id=repo.repo_id, repo_type=repo_type, folder_path=folder, **options)
    return str(repo)


def is_repo_id(name: str) -> bool:
    """Whether a name can be that of a repo with its owner; anything else is a path."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None


def download_dataset(
    repo_id: str, files: Sequence[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder in the cache with those files of a data set on the Hub.

    Raises:
        FileNotFoundError: there is no such data set, or no way to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        found = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=list(files)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{repo_id} is no folder on this machine, and the data set of this name could not be read from the Hub "
            f"({type(error).__name__}): check its name, and HF_HUB_OFFLINE or your token"
        ) from error
    return Path(found)

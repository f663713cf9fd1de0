"""Uploads of what transformers' own `save_pretrained` does not know of."""

from pathlib import Path
from typing import Any

UPLOAD_OPTIONS = ("repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision")
"""What `push_to_hub=True` of transformers takes beside it."""


def upload_folder(folder: Path, *, repo_id: str | None = None, **options: Any) -> None:
    """Uploads all that lies in a folder; `options` as for transformers' `push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    repo = api.create_repo(repo_id or folder.name, exist_ok=True, private=options.pop("private", None))
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **options)

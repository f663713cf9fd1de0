"""Uploads to the Hub, each in one commit, and downloads from it, with errors that say what to do."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

RepoType = Literal["model", "dataset"]

UPLOAD_OPTIONS = ("repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision")
"""What `push_to_hub=True` of transformers takes beside it."""

MODEL_FILES = (
    *("adapter/*", "backbone/*"),
    *("model-*-of-*.safetensors", "model.safetensors", "model.safetensors.index.json"),
)
"""What a model may have and another version of it not: a push of a model takes out those that it has not."""
CARD = "README.md"
MARK = "<!-- written by selfreg -->"
"""In every card that no person wrote."""
SOMEBODY = "your-name/"
"""In a card, stands for the owner of a repo that is not there yet."""
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def push(save: Callable[[Path], Any], repo_id: str, *, repo_type: RepoType = "model", **options: Any) -> CommitInfo:
    """Uploads what `save` writes into an empty folder; `options` as for `upload_folder`."""
    with TemporaryDirectory() as folder:
        save(Path(folder))
        return upload_folder(Path(folder), repo_id=repo_id, repo_type=repo_type, **options)


def upload_folder(
    folder: Path,
    *,
    repo_id: str | None = None,
    repo_type: RepoType = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    ignore: Sequence[str] = (),
    replaces: Sequence[str] = (),
    keeps_card: bool = False,
) -> CommitInfo:
    """Uploads all that lies in a folder, in one commit: a repo shows either all of it or nothing.

    What was uploaded before a push was cut short is not uploaded again. A card that selfreg wrote gets the repo's
    name, and never takes the place of one that a person wrote.

    Args:
        folder: what to upload.
        repo_id: with its owner, or under the user's own name; the folder's name if None.
        repo_type, private, token, create_pr, commit_message, commit_description: as for `push_to_hub` of transformers.
        revision: branch; made where there is none.
        ignore: patterns of files that stay here.
        replaces: patterns of files that go from the repo in the same commit, where the folder has none such.
        keeps_card: leave any card that is there as it is.

    Raises:
        OSError: no token, no permission, no such repo, or no way to the Hub; says which.
    """
    api = HfApi(token=token)
    name = repo_id or folder.name
    with hub_errors(name, revision, writes=True):
        repo = api.create_repo(name, repo_type=repo_type, exist_ok=True, private=private)
        if revision is not None and not revision.startswith("refs/pr/"):
            try:
                api.create_branch(repo.repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            except HfHubHTTPError as error:
                # Who may not write there can still open a pull request against a branch that is there.
                if not (create_pr and error.response.status_code == 403):
                    raise
        names = _names(folder, ignore)
        there = api.list_repo_files(repo.repo_id, repo_type=repo_type, revision=revision)
        stale = [name for name in there if name not in names and any(fnmatch(name, own) for own in replaces)]
        card = folder / CARD

        def held() -> Path:
            return Path(api.hf_hub_download(repo.repo_id, CARD, repo_type=repo_type, revision=revision))

        if CARD in names and CARD in there and _is_made(card) and (keeps_card or not _is_made(held())):
            names.remove(CARD)
        # Not upload_folder, which makes several commits of a large folder.
        return api.create_commit(
            repo.repo_id,
            [
                *(CommitOperationAdd(name, _content(folder / name, repo.repo_id)) for name in names),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload with selfreg",
            commit_description=commit_description,
        )


def _is_made(card: Path) -> bool:
    return MARK in card.read_text(encoding="utf8", errors="replace")


def _content(path: Path, repo_id: str) -> Path | bytes:
    if path.name != CARD or not _is_made(path):
        return path
    return named_card(path.read_text(encoding="utf8", errors="replace"), repo_id).encode()


def named_card(text: str, repo_id: str) -> str:
    """A card that was written before it had a repo, with the repo's own name."""
    return re.sub(rf"{SOMEBODY}[\w.-]+", repo_id, text)


def _names(folder: Path, ignore: Sequence[str]) -> list[str]:
    everything = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in everything if not any(fnmatch(name, pattern) for pattern in ignore)]


def is_repo_id(name: str) -> bool:
    """Whether a name can be that of a repo with its owner; anything else is a path."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None


def local_folder(
    name: str,
    files: Sequence[str],
    *,
    repo_type: RepoType = "model",
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder `name`, or where there is none, that of the cache with those files of the repo of this name; of
    either the `subfolder`.

    Raises:
        OSError: there is no such repo or revision, no permission, or no way to it; says which.
    """
    if Path(name).exists() or not is_repo_id(name):
        return Path(name) / subfolder
    with hub_errors(name, revision):
        found = snapshot_download(
            name,
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[str(PurePosixPath(subfolder, file)) for file in files],
        )
    return Path(found) / subfolder


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, *, writes: bool = False) -> Iterator[None]:
    """Errors of the Hub's client as an OSError that names the repo, what is the matter, and what to do."""
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _unreachable(repo_id, revision, writes) from error
    except (LocalTokenNotFoundError, HFValidationError) as error:
        if isinstance(error, HFValidationError):
            raise OSError(f"{repo_id!r} is no folder on this machine, and no name of a repo: {error}") from error
        raise PermissionError(f"there is no token for {repo_id}: {_LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of it, or leave it out for main"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} lacks a file: {error}") from error
    except RepositoryNotFoundError as error:
        if writes and error.response.status_code == 401:
            raise PermissionError(f"there is no token to write to {repo_id}: {_LOG_IN}") from error
        raise FileNotFoundError(
            f"{repo_id} is no folder on this machine, and no repo on the Hub that this token may read: check the "
            f"name, and for a private repo {_LOG_IN}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            known = "authorization" in error.response.request.headers
            what = "the Hub does not know the token for" if known else "there is no token to write to"
            raise PermissionError(f"{what} {repo_id}: {_LOG_IN}") from error
        if status == 403:
            mend = "take a token with write permission, and a name under your own user or organisation"
            raise PermissionError(
                f"the token may not {'write to' if writes else 'read'} {repo_id}: "
                + (mend if writes else "ask its owner for access")
            ) from error
        raise


@contextmanager
def told_offline(name: str) -> Iterator[None]:
    """An error of transformers, which does not say what it did not find, does so where nothing may be downloaded."""
    try:
        yield
    except OSError as error:
        if constants.is_offline_mode() and not Path(name).exists():
            raise _unreachable(name, None, writes=False) from error
        raise


def _unreachable(repo_id: str, revision: str | None, writes: bool) -> OSError:
    offline = constants.is_offline_mode()
    if writes:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub can't be reached"
        return OSError(f"{repo_id} can't be pushed: {why}")
    at = f" at revision {revision!r}" if revision else ""
    why = (
        "HF_HUB_OFFLINE is set: unset it to download it"
        if offline
        else "the Hub can't be reached: check the connection"
    )
    return OSError(f"{repo_id}{at} is no folder on this machine and not in the Hub's cache, and {why}")


class PushMixin:
    """`push_to_hub` of a model in one commit, with all that its `save_pretrained` writes."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> CommitInfo:
        """Uploads the model, with its card.

        Args:
            repo_id, commit_message, commit_description, private, token, revision, create_pr: as in transformers.
            save_options: as for `save_pretrained`.

        Returns:
            The commit; its `oid` is what `revision=` of `from_pretrained` takes.

        Raises:
            OSError: no token, no permission, or no way to the Hub; says which.
        """
        own: Any = self

        def save(folder: Path) -> None:
            # Here, as cards know of everything, and every model can be pushed.
            from selfreg.hub.cards import plain_card, write_card

            own.save_pretrained(folder, **save_options)
            write_card(folder, plain_card(own.config, f"{SOMEBODY}{repo_id.rpartition('/')[2]}"))

        return push(
            save,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            commit_description=commit_description,
            replaces=MODEL_FILES,
            # One that is there says more.
            keeps_card=True,
        )

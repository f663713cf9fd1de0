"""Where an SAE lies: on this machine, or in a repo on the Hub."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from selfreg.sae.interop import sentence_transformers
from selfreg.sae.interop.base import read_config
from selfreg.sae.interop.formats import (
    FILE_SUFFIXES,
    FORMATS,
    OWN,
    OWN_FILES,
    find_format,
    format_of_config,
    format_of_files,
    list_saes,
    no_sae_message,
    saes_below,
)

logger = logging.getLogger(__name__)

_FILES = sorted(
    {*OWN_FILES, *(file for entry in FORMATS.values() for file in entry.files if "*" not in file)}
    | {"activation_scaler.json", "model.safetensors.index.json", sentence_transformers.OLD_WEIGHTS}
)


@dataclass(frozen=True)
class Place:
    """
    Attributes:
        path: a folder on this machine, or a file that is a whole SAE.
        name: where it comes from: repo and folder, or the path.
    """

    path: Path
    name: str

    @property
    def is_own(self) -> bool:
        """Whether the project's own format lies there."""
        return find_format(self.path, self.name) == OWN


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Place:
    """Finds an SAE of any known format, and downloads it where it is on the Hub: only its own files.

    Raises:
        ValueError: there is none; the message lists the SAEs of the repo or folder, or the known formats.
        OSError: no such folder, and no such repo or no way to it.
    """
    path = Path(name_or_path, subfolder)
    if path.exists():
        return Place(path, str(path))
    if Path(name_or_path).is_dir():
        saes = saes_below(Path(name_or_path))
        raise ValueError(f"there is no {subfolder!r}: {no_sae_message(str(name_or_path), saes)}")
    repo, folder = str(name_or_path), subfolder.strip("/")
    where = f"{repo}/{folder}".rstrip("/")
    # Without a list of its files, the names that are known: a glob would match in folders below as well.
    patterns = (
        [folder] if Path(folder).suffix in FILE_SUFFIXES else [f"{folder}/{file}".lstrip("/") for file in _FILES]
    )
    if not local_files_only and not constants.is_offline_mode():
        patterns = _files_of(repo, folder, where, revision, token) or patterns
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=patterns,
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{repo} is no folder on this machine and not in the Hub's cache, and nothing may be downloaded "
            "(HF_HUB_OFFLINE or local_files_only is set), or the Hub can't be reached"
        ) from error
    except HFValidationError as error:
        raise OSError(f"{repo} is no folder on this machine, and no name of a repo on the Hub: {error}") from error
    path = Path(snapshot, folder)
    if not path.exists():
        raise OSError(f"{where} is not in the Hub's cache, and nothing may be downloaded")
    return Place(path, where)


def _files_of(repo: str, folder: str, where: str, revision: str | None, token: Any) -> list[str]:
    """The files of the SAE in that folder of the repo; empty where they can't be listed.

    Raises:
        ValueError: there is none.
    """
    try:
        files = HfApi(token=token).list_repo_files(repo, revision=revision)
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repo} is no folder on this machine, and no repo on the Hub that this token may read: {error}"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        # What is in the cache may do.
        logger.info("the files of %s could not be listed: %s", repo, error)
        return []
    if folder in files and Path(folder).suffix in FILE_SUFFIXES:
        return [folder]
    saes = list_saes(files)
    names = {file.rpartition("/")[2]: file for file in files if file.rpartition("/")[0] == folder}
    if (folder or ".") not in saes or _is_another_model(repo, names, revision, token):
        inside = [sae for sae in saes if not folder or sae.startswith(f"{folder}/")]
        raise ValueError(no_sae_message(where, inside or saes))
    return [file for name, file in names.items() if name in _FILES or _is_weights(name)]


def _is_weights(name: str) -> bool:
    return name == "model.safetensors.index.json" or Path(name).suffix in (".safetensors", *FILE_SUFFIXES)


def _is_another_model(repo: str, names: dict[str, str], revision: str | None, token: Any) -> bool:
    """Whether a folder that has the files of any model of transformers holds no SAE."""
    if "config.json" not in names or format_of_files(names) is not None:
        return False
    config = read_config(Path(hf_hub_download(repo, names["config.json"], revision=revision, token=token)))
    return format_of_config(config) is None

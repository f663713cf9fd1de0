"""Which library wrote a folder, and which SAEs lie in it."""

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from selfreg.sae.configuration import SAEConfig
from selfreg.sae.interop import authors, dictionary_learning, gemma_scope, saelens, sentence_transformers, sparsify
from selfreg.sae.interop.base import Foreign, read_config

OWN = "selfreg"
OWN_FILES = ("config.json", "model.safetensors")

Reader = Callable[[Path, str], Foreign]
"""A folder (or a file that is a whole SAE) and where it comes from, which some formats are read from."""


class Format(NamedTuple):
    """The files by which a library's folders are known, and what reads them."""

    files: tuple[str, ...]
    read: Reader


FORMATS: dict[str, Format] = {
    "SAELens": Format((saelens.CONFIG, saelens.WEIGHTS), saelens.read),
    "sparsify": Format((sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read),
    "Gemma Scope": Format((gemma_scope.WEIGHTS,), gemma_scope.read),
    "dictionary_learning": Format((dictionary_learning.CONFIG, dictionary_learning.WEIGHTS), dictionary_learning.read),
    "sentence-transformers": Format(
        (sentence_transformers.CONFIG, sentence_transformers.WEIGHTS), sentence_transformers.read
    ),
    "the paper's authors": Format((f"*{authors.SUFFIX}",), authors.read),
}
"""By library. Two of them are told apart from our own and from any other model by what their config.json holds."""

_BY_CONFIG = ("sentence-transformers",)

FILE_SUFFIXES = (authors.SUFFIX,)
"""Of files that are a whole SAE."""

_SHOWN = 12


def find_format(path: Path, name: str | None = None) -> str:
    """The library that wrote a folder or a file; `name` is what errors call it.

    Raises:
        ValueError: none that is known; lists the SAEs in the folders below, or what would be known.
    """
    if path.is_file():
        if path.suffix == authors.SUFFIX:
            return "the paper's authors"
        if any(path.name in files for files in (OWN_FILES, *(known.files for known in FORMATS.values()))):
            return find_format(path.parent, name)
        raise ValueError(f"{path} is not a file that is known here: {_known()}")
    names = {entry.name for entry in path.iterdir()}
    kind = format_of_files(names)
    if kind is not None:
        return kind
    if "config.json" in names:
        kind = format_of_config(read_config(path / "config.json"))
        if kind is not None:
            return kind
    checkpoints = sorted(name for name in names if name.endswith(authors.SUFFIX))
    if len(checkpoints) == 1:
        return "the paper's authors"
    if checkpoints:
        raise ValueError(f"{name or path} holds several SAEs: name the file, one of {', '.join(checkpoints)}")
    below = [sae for sae in saes_below(path) if sae != "."]
    if not below and set(OWN_FILES) <= names:
        model_type = read_config(path / "config.json").get("model_type")
        raise ValueError(f"{name or path} is no SAE: its config.json is that of a model of the type {model_type!r}")
    raise ValueError(no_sae_message(name or str(path), below))


def saes_below(path: Path) -> list[str]:
    """The folders below one on this machine that hold an SAE; other models of transformers, and what lies in hidden
    folders, such as the checkpoints of a training that was cut short, are left out."""
    names = (entry.relative_to(path) for entry in path.rglob("*") if entry.is_file())
    found = list_saes(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return [
        sae
        for sae in found
        if not (path / sae / "config.json").exists()
        or format_of_files({entry.name for entry in (path / sae).iterdir()}) is not None
        or format_of_config(read_config(path / sae / "config.json")) is not None
    ]


def read_foreign(path: Path, name: str) -> Foreign:
    """
    Args:
        path: a folder, or a file where one file is a whole SAE.
        name: where it comes from (repo and folder), which some formats are read from.
    """
    kind = find_format(path, name)
    is_whole = path.suffix in FILE_SUFFIXES
    return FORMATS[kind].read(path.parent if path.is_file() and not is_whole else path, name)


def format_of_files(names: Collection[str]) -> str | None:
    """The library whose files these are, where the names alone tell."""
    known = (kind for kind, entry in FORMATS.items() if kind not in _BY_CONFIG and set(entry.files) <= set(names))
    return next(known, None)


def format_of_config(config: dict[str, Any]) -> str | None:
    """Whose SAE a config.json is of; None for that of any other model."""
    if config.get("model_type") == SAEConfig.model_type:
        return OWN
    return "sentence-transformers" if sentence_transformers.is_config(config) else None


def list_saes(files: Iterable[str]) -> list[str]:
    """The folders that hold an SAE (or the files that are one), from the paths of a repo or a folder."""
    folders: dict[str, set[str]] = {}
    single: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        folders.setdefault(str(path.parent), set()).add(path.name)
        if path.suffix in FILE_SUFFIXES:
            single.setdefault(str(path.parent), []).append(file)
    # A file by itself may be named by its folder.
    found = {name for folder, names in single.items() for name in (names if len(names) > 1 else [folder])}
    # Ours and sentence-transformers' look like any model of transformers, whose weights may lie in shards.
    models = ({"config.json", "model.safetensors"}, {"config.json", "model.safetensors.index.json"})
    found |= {
        folder
        for folder, names in folders.items()
        if format_of_files(names) is not None or any(model <= names for model in models)
    }
    return sorted(found, key=_natural)


def no_sae_message(where: str, saes: list[str]) -> str:
    """Why there is no SAE at a place, and what is there."""
    saes = [sae for sae in saes if sae != "."]
    if not saes:
        return f"there is no SAE in {where}. Known are {_known()}"
    shown = "".join(f"\n  {sae}" for sae in saes[:_SHOWN])
    more = f"\n  and {len(saes) - _SHOWN} more" if len(saes) > _SHOWN else ""
    return f"{where} holds {len(saes)} SAEs in folders below: choose one with subfolder (--subfolder){shown}{more}"


def _known() -> str:
    known = {OWN: OWN_FILES, **{name: entry.files for name, entry in FORMATS.items()}}
    return "; ".join(f"{name} ({' + '.join(files)})" for name, files in known.items())


def _natural(path: str) -> list[Any]:
    """layer_2 before layer_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)]

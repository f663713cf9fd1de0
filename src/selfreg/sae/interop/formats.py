"""Which library wrote a folder, and which SAEs lie in it."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from selfreg.sae.interop import authors, dictionary_learning, gemma_scope, saelens, sentence_transformers, sparsify
from selfreg.sae.interop.base import Foreign, read_config

OWN = "selfreg"
FORMATS: dict[str, tuple[str, ...]] = {
    OWN: ("config.json", "model.safetensors"),
    "SAELens": (saelens.CONFIG, saelens.WEIGHTS),
    "sparsify": (sparsify.CONFIG, sparsify.WEIGHTS),
    "Gemma Scope": (gemma_scope.WEIGHTS,),
    "dictionary_learning": (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
    "sentence-transformers": (sentence_transformers.CONFIG, sentence_transformers.WEIGHTS),
    "the paper's authors": (f"*{authors.SUFFIX}",),
}
"""Library -> the files by which its folders are known."""

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
        if any(path.name in files for files in FORMATS.values()):
            return find_format(path.parent, name)
        raise ValueError(f"{path} is not a file that is known here: {_known()}")
    names = {entry.name for entry in path.iterdir()}
    for kind in ("SAELens", "sparsify", "Gemma Scope", "dictionary_learning"):
        if set(FORMATS[kind]) <= names:
            return kind
    if "config.json" in names:
        config = read_config(path / "config.json")
        if config.get("model_type") == "sparse_autoencoder":
            return OWN
        if sentence_transformers.is_config(config):
            return "sentence-transformers"
    checkpoints = sorted(name for name in names if name.endswith(authors.SUFFIX))
    if len(checkpoints) == 1:
        return "the paper's authors"
    if checkpoints:
        raise ValueError(f"{name or path} holds several SAEs: name the file, one of {', '.join(checkpoints)}")
    files = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
    raise ValueError(no_sae_message(name or str(path), list_saes(files)))


def read_foreign(path: Path, name: str) -> Foreign:
    """
    Args:
        path: a folder, or a file where one file is a whole SAE.
        name: where it comes from (repo and folder), which some formats are read from.
    """
    kind = find_format(path, name)
    folder = path.parent if path.is_file() else path
    if kind == "SAELens":
        return saelens.read(folder)
    if kind == "sparsify":
        return sparsify.read(folder, name)
    if kind == "Gemma Scope":
        return gemma_scope.read(folder, name)
    if kind == "dictionary_learning":
        return dictionary_learning.read(folder)
    if kind == "sentence-transformers":
        return sentence_transformers.read(folder)
    if kind == OWN:
        raise ValueError(f"{path} is the project's own format")
    return authors.read(path if path.is_file() else next(path.glob(f"*{authors.SUFFIX}")))


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
    markers: list[Any] = [set(names) for names in FORMATS.values() if not names[0].startswith("*")]
    # Weights in shards.
    markers.append({"config.json", "model.safetensors.index.json"})
    found |= {folder for folder, names in folders.items() if any(marker <= names for marker in markers)}
    return sorted(found, key=_natural)


def no_sae_message(where: str, saes: list[str]) -> str:
    """Why there is no SAE at a place, and what is there."""
    saes = [sae for sae in saes if sae != "."]
    if not saes:
        return f"there is no SAE in {where}. Known are {_known()}"
    shown = "".join(f"\n  {sae}" for sae in saes[:_SHOWN])
    more = f"\n  and {len(saes) - _SHOWN} more" if len(saes) > _SHOWN else ""
    return f"{where} holds {len(saes)} SAEs in folders below: choose one with subfolder=…{shown}{more}"


def _known() -> str:
    return "; ".join(f"{name} ({' + '.join(files)})" for name, files in FORMATS.items())


def _natural(path: str) -> list[Any]:
    """layer_2 before layer_10."""

    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)]

"""What commands read: texts, SAEs and the backbones of these."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfreg.cli.common import say

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor
    from selfreg.features.catalog import FeatureCatalog
    from selfreg.sae.modeling import SAEForFeatureExtraction

Texts = Annotated[str, typer.Argument(help="A .jsonl, .json, .csv or .parquet (also .xz), or a data set on the Hub.")]
Column = Annotated[str, typer.Option(help="Column of the texts.")]
Split = Annotated[str, typer.Option(help="Split of a data set, or a slice of a file: train[:80%].")]
MaxTokens = Annotated[int | None, typer.Option(help="Read texts up to about so many tokens.", min=1)]
Source = Annotated[str, typer.Argument(help="A folder or a Hub id, of selfreg or any library that is known.")]
Subfolder = Annotated[str, typer.Option(help="Which SAE of a repo that holds many.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repo.")]
Model = Annotated[str | None, typer.Option(help="Backbone of the SAE, where the SAE does not say.")]
CatalogFolder = Annotated[Path, typer.Argument(metavar="CATALOG", help="Folder that `selfreg features build` wrote.")]
LayerOption = Annotated[str | None, typer.Option(help="Layer of the SAE, where the SAE does not say.")]


def check_output(output: Path) -> None:
    """An unfinished training may lie there; anything else is not overwritten."""
    unfinished = (output / ".work").is_dir()
    if output.exists() and not unfinished and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: choose another folder, or remove it")


def parse_layer(layer: str) -> Any:
    """`--layer` as an extractor takes it."""
    if layer == "final":
        return layer
    if not layer.isdigit():
        raise ValueError(f"--layer {layer}: give the number of a block, counted from 0, or final")
    return int(layer)


def read_texts(source: str, column: str, split: str, max_tokens: int | None, max_length: int) -> list[str]:
    """The texts of a column, up to about `max_tokens` tokens of them; rows without a text are told and left out."""
    return [row[column] for row in read_rows(source, [column], split, max_tokens, max_length)]


def read_rows(
    source: str, columns: Sequence[str], split: str, max_tokens: int | None, max_length: int
) -> list[dict[str, Any]]:
    """As `read_texts`, with more columns than that of the texts, which is the first one.

    Raises:
        ValueError: it can't be read, a column is not there, or no row holds a text.
    """
    from selfreg.data import first_texts, load_rows
    from selfreg.recipe import SplitRecipe

    rows = load_rows(SplitRecipe(path=source, split=split))
    for column in columns:
        if column not in rows[0]:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows[0])}")
    column = columns[0]
    found = [row for row in rows if isinstance(row[column], str) and row[column].strip()]
    if not found:
        raise ValueError(f"{source} holds no text in column {column!r}: row 0 has {rows[0][column]!r}")
    if len(found) < len(rows):
        say(f"{len(rows) - len(found)} of {len(rows)} rows hold no text in column {column!r} and are left out")
    return found[: len(first_texts([row[column] for row in found], max_tokens, max_length))]


def load_sae(
    source: str, subfolder: str, revision: str | None, model: str | None, layer: str | None
) -> "SAEForFeatureExtraction":
    """An SAE, with what it does not say of itself from `--model` and `--layer`; they may not contradict it."""
    from selfreg.sae.modeling import SAEForFeatureExtraction

    sae = SAEForFeatureExtraction.from_pretrained(source, subfolder=subfolder, revision=revision)
    given = {"base_model_name_or_path": model, "layer": None if layer is None else parse_layer(layer)}
    for name, value in given.items():
        known = getattr(sae.config, name)
        if value is not None and known not in (None, value):
            option = {"base_model_name_or_path": "--model", "layer": "--layer"}[name]
            raise ValueError(f"{source} is of {name}={known!r}, {option} says {value!r}: leave the option out")
        if value is not None:
            setattr(sae.config, name, value)
    return sae


def extractor_of(sae: "SAEForFeatureExtraction") -> "HiddenStateExtractor":
    """The extractor of the states that the SAE was trained on."""
    from selfreg.activations.extractor import HiddenStateExtractor

    config = sae.config
    missing = [
        option
        for option, value in {"--model": config.base_model_name_or_path, "--layer": config.layer}.items()
        if value is None
    ]
    if missing:
        raise ValueError(f"the SAE does not say its backbone or layer: give {' and '.join(missing)}")
    extractor = HiddenStateExtractor.from_sae(sae)
    # What the SAE left open, such as the file of a backbone that is one GGUF file, is now known.
    if config.base_model_gguf_file is None:
        config.base_model_gguf_file = extractor.spec.gguf_file
    return extractor


def open_catalog(folder: Path) -> "FeatureCatalog":
    """The catalogue in a folder, with what persons have decided."""
    from selfreg.features.catalog import FeatureCatalog

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: a catalogue is made by `selfreg features build`")
    return FeatureCatalog.from_pretrained(folder)

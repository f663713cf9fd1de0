"""`selfreg sae`: train, fine-tune, measure and convert sparse autoencoders."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selfreg.cli.common import clear_errors, say, setup_logging

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor
    from selfreg.activations.store import ActivationStore
    from selfreg.sae.modeling import SAEForFeatureExtraction

app = typer.Typer(
    help="Sparse autoencoders: train one on your backbone, or take another library's.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Texts = Annotated[str, typer.Argument(help="A .jsonl, .csv or .parquet (also .xz), or a data set on the Hub.")]
Column = Annotated[str, typer.Option(help="Column of the texts.")]
Split = Annotated[str, typer.Option(help="Split of a data set, or a slice of a file: train[:80%].")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the SAE.")]
MaxTokens = Annotated[int | None, typer.Option(help="Read texts up to about so many tokens.", min=1)]
Source = Annotated[str, typer.Argument(help="A folder or a Hub id, of selfreg or any library that is known.")]
Subfolder = Annotated[str, typer.Option(help="Which SAE of a repo that holds many.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repo.")]
Model = Annotated[str | None, typer.Option(help="Backbone of the SAE, where the SAE does not say.")]
LayerOption = Annotated[str | None, typer.Option(help="Layer of the SAE, where the SAE does not say.")]

_HELD_OUT = 20
"""One text of so many is kept out of training, for the figures at the end."""


@app.command()
def train(
    texts: Texts,
    model: Annotated[str, typer.Option(help="Backbone: a Hub id or a folder.")],
    layer: Annotated[str, typer.Option(help="After which block, counted from 0; or 'final'.")],
    output: Output,
    features: Annotated[int, typer.Option(help="Number of latent features.", min=1)] = 4608,
    k: Annotated[int, typer.Option(help="Features that are active in a state.", min=1)] = 32,
    activation: Annotated[
        Literal["topk", "batch_topk", "jumprelu", "relu"], typer.Option(help="How the active features are chosen.")
    ] = "topk",
    epochs: Annotated[float, typer.Option(help="Passes over the hidden states.", min=0.001)] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="Chosen by the width, if left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Hidden states of a batch.", min=2)] = 2048,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 128,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    split: Split = "train",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train an SAE on a backbone's hidden states of your texts.

    Started again after a kill it goes on where it was. At the end: FVU (fraction of variance unexplained), L0 (active
    features of a state) and the share of dead features, on every twentieth text, which training does not see.
    """
    from selfreg.activations.extractor import HiddenStateExtractor
    from selfreg.sae.configuration import SAEConfig
    from selfreg.sae.modeling import SAEForFeatureExtraction

    with clear_errors():
        _setup()
        # Before the hours that it takes to come to it.
        SAEConfig(num_features=features, k=k, activation=activation)
        _check_output(output)
        found = _read(texts, column, split, max_tokens, max_length)
        extractor = HiddenStateExtractor.from_pretrained(model, layer=_layer(layer), max_length=max_length)
        from transformers import set_seed

        set_seed(seed)
        config = SAEConfig(hidden_size=extractor.hidden_size, num_features=features, k=k, activation=activation)
        _train(
            SAEForFeatureExtraction(config),
            extractor,
            found,
            output,
            objective="pretrain",
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            seed=seed,
        )


@app.command()
def finetune(
    source: Source,
    texts: Texts,
    output: Output,
    epochs: Annotated[float, typer.Option(help="Passes over the hidden states.", min=0.001)] = 5,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    batch_size: Annotated[int, typer.Option(help="Hidden states of a batch.", min=2)] = 2048,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    split: Split = "train",
    subfolder: Subfolder = "",
    revision: Revision = None,
    model: Model = None,
    layer: LayerOption = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fine-tune an SAE on the texts of a task, so that features that are dead there learn what was missed."""
    with clear_errors():
        _setup()
        _check_output(output)
        sae = _load(source, subfolder, revision, model, layer)
        extractor = _extractor(sae)
        from transformers import set_seed

        set_seed(seed)
        _train(
            sae,
            extractor,
            _read(texts, column, split, max_tokens, extractor.spec.max_length),
            output,
            objective="finetune",
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            seed=seed,
        )


@app.command(name="eval")
def evaluate(
    source: Source,
    texts: Texts,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    split: Split = "train",
    subfolder: Subfolder = "",
    revision: Revision = None,
    model: Model = None,
    layer: LayerOption = None,
) -> None:
    """How well an SAE describes texts: FVU, L0, dead features."""
    import tempfile

    with clear_errors():
        _setup()
        sae = _load(source, subfolder, revision, model, layer)
        extractor = _extractor(sae)
        found = _read(texts, column, split, max_tokens, extractor.spec.max_length)
        with tempfile.TemporaryDirectory() as folder:
            _tell_figures(sae, extractor.extract(found, folder), f"{len(found):,} texts")


@app.command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Folder that is written.")],
    to: Annotated[
        Literal["selfreg", "saelens"], typer.Option(help="Format that is written: selfreg, or SAELens for its users.")
    ] = "selfreg",
    subfolder: Subfolder = "",
    revision: Revision = None,
    model: Model = None,
    layer: LayerOption = None,
) -> None:
    """Convert an SAE between libraries.

    Read are selfreg, SAELens (standard, gated, topk, jumprelu, batchtopk, matryoshka), Gemma Scope, sparsify,
    dictionary_learning, the sparse autoencoder module of sentence-transformers and the .pth files of the paper's
    authors. Normalisation and thresholds are converted; what is not known is refused by name.
    """
    with clear_errors():
        _setup()
        _check_output(output)
        sae = _load(source, subfolder, revision, model, layer)
        if to == "saelens":
            from selfreg.sae.interop.saelens import write

            write(sae, output)
        else:
            _save(sae, output)
        config = sae.config
        where = (
            ""
            if config.layer is None
            else f", layer {config.layer} of {config.base_model_name_or_path or 'an unnamed backbone'}"
        )
        say(
            f"{output}  {config.num_features} features of width {config.hidden_size}, {config.activation}"
            f"{where}, from {config.converted_from or 'selfreg'}"
        )


def _setup() -> None:
    from selfreg.utils.progress import show_only_own_bars

    setup_logging()
    show_only_own_bars()


def _check_output(output: Path) -> None:
    """An unfinished training may lie there; anything else is not overwritten."""
    unfinished = (output / ".work").is_dir()
    if output.exists() and not unfinished and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: choose another folder, or remove it")


def _layer(layer: str) -> Any:
    if layer == "final":
        return layer
    if not layer.isdigit():
        raise ValueError(f"--layer {layer}: give the number of a block, counted from 0, or final")
    return int(layer)


def _read(source: str, column: str, split: str, max_tokens: int | None, max_length: int) -> list[str]:
    from selfreg.data import first_texts, load_rows
    from selfreg.recipe import SplitRecipe

    rows = load_rows(SplitRecipe(path=source, split=split))
    if column not in rows[0]:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows[0])}")
    texts = [row[column] for row in rows if isinstance(row[column], str) and row[column].strip()]
    if not texts:
        raise ValueError(f"{source} holds no text in column {column!r}")
    return first_texts(texts, max_tokens, max_length)


def _load(
    source: str, subfolder: str, revision: str | None, model: str | None, layer: str | None
) -> "SAEForFeatureExtraction":
    from selfreg.sae.modeling import SAEForFeatureExtraction

    said: dict[str, Any] = {} if model is None else {"base_model_name_or_path": model}
    if layer is not None:
        said["layer"] = _layer(layer)
    return SAEForFeatureExtraction.from_pretrained(source, subfolder=subfolder, revision=revision, **said)


def _extractor(sae: "SAEForFeatureExtraction") -> "HiddenStateExtractor":
    from selfreg.activations.extractor import HiddenStateExtractor

    if sae.config.hidden_state_spec() is None:
        raise ValueError("the SAE does not name its backbone and layer: give --model and --layer")
    return HiddenStateExtractor.from_sae(sae)


def _train(
    sae: "SAEForFeatureExtraction", extractor: "HiddenStateExtractor", texts: list[str], output: Path, **settings: Any
) -> None:
    from selfreg.features.catalog import sae_fingerprint
    from selfreg.sae.trainer import SAETrainer
    from selfreg.sae.training_args import SAETrainingArguments
    from selfreg.utils.files import fingerprint_json
    from selfreg.utils.trainer import StepProgress, last_whole_checkpoint

    work = output / ".work"
    # Bad arguments are told before the hours that the hidden states take.
    SAETrainingArguments(str(work), report_to="none", **settings)
    held_out = texts[::_HELD_OUT]
    kept = set(range(len(texts))) - set(range(0, len(texts), _HELD_OUT))
    if not kept:
        raise ValueError("there is one text only: none is left to measure on that training did not see; give more")
    store = extractor.extract([texts[i] for i in sorted(kept)], work / "train")
    measured = extractor.extract(held_out, work / "held-out")
    say(f"{store.num_tokens:,} tokens of {len(kept):,} texts; {measured.num_tokens:,} kept out")
    # Unfinished training is found again by all that it depends on.
    key = fingerprint_json([settings, sae_fingerprint(sae), store.text_fingerprint])[:16]
    checkpoints = work / f"training-{key}"
    arguments = SAETrainingArguments(
        str(checkpoints),
        save_strategy="steps",
        save_steps=200,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    progress = StepProgress(f"SAE, {settings['objective']}")
    trainer = SAETrainer(sae, arguments, train_dataset=store, callbacks=[progress])
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(checkpoints))
    # Not atomic_folder: what a later start goes on from lies in the same folder until all is done.
    sae.save_pretrained(output)
    _tell_figures(sae, measured, "texts that it was not trained on")
    shutil.rmtree(work, ignore_errors=True)
    say(f"{output}")


def _save(sae: "SAEForFeatureExtraction", folder: Path) -> None:
    from selfreg.utils.files import atomic_folder

    with atomic_folder(folder) as temporary:
        sae.save_pretrained(temporary)


def _tell_figures(sae: "SAEForFeatureExtraction", store: "ActivationStore", what: str) -> None:
    from selfreg.sae.statistics import evaluate_sae

    figures = evaluate_sae(sae, store)
    say(f"FVU {figures.fvu:.4f}, L0 {figures.l0:.1f}, dead features {figures.dead_fraction:.2%}, on {what}")

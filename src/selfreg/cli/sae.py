"""`selfreg sae`: train, fine-tune, measure and convert sparse autoencoders."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selfreg.cli.common import clear_errors, say, setup, warn
from selfreg.cli.inputs import (
    Column,
    LayerOption,
    MaxTokens,
    Model,
    Revision,
    Source,
    Split,
    Subfolder,
    Texts,
    check_output,
    extractor_of,
    load_sae,
    parse_layer,
    read_texts,
)

if TYPE_CHECKING:
    from selfreg.activations.extractor import HiddenStateExtractor
    from selfreg.activations.store import ActivationStore
    from selfreg.sae.modeling import SAEForFeatureExtraction
    from selfreg.sae.statistics import SAEStatistics

app = typer.Typer(
    help="Sparse autoencoders: train one on your backbone, or take another library's.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the SAE.")]
BatchSize = Annotated[int, typer.Option(help="Hidden states of a batch.", min=2)]
Epochs = Annotated[float, typer.Option(help="Passes over the hidden states.", min=0.001)]
Seed = Annotated[int, typer.Option(help="Of the order of the states, and of first weights where there are new ones.")]

_SAVE_STEPS = 50
_FAR_FROM_K = 0.25
# Activations of a feature to be expected, were all alike, before its silence says something.
_TOKENS_FOR_DEAD = 100
_HELD_OUT = 20
"""One text of so many is kept out of training, for the figures at the end."""


@app.command()
def train(
    texts: Texts,
    model: Annotated[
        str, typer.Option(help="Backbone: a Hub id, a folder, or package:NAME of a Python package with model files.")
    ],
    layer: Annotated[str, typer.Option(help="After which block, counted from 0; or 'final'.")],
    output: Output,
    features: Annotated[int, typer.Option(help="Number of latent features.", min=1)] = 4608,
    k: Annotated[int, typer.Option(help="Features that are active in a state.", min=1)] = 32,
    activation: Annotated[
        Literal["topk", "batch_topk", "jumprelu", "relu"], typer.Option(help="How the active features are chosen.")
    ] = "topk",
    epochs: Epochs = 3,
    learning_rate: Annotated[float | None, typer.Option(help="Chosen by the width, if left out.")] = None,
    batch_size: BatchSize = 2048,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 128,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    split: Split = "train",
    seed: Seed = 0,
) -> None:
    """Train an SAE on a backbone's hidden states of your texts.

    Example: selfreg sae train texts.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --layer 15 -o my-sae

    Started again after a kill it goes on where it was. At the end: FVU (fraction of variance unexplained), L0 (active
    features of a state) and the share of dead features, on every twentieth text, which training does not see.
    """
    with clear_errors():
        setup()
        from transformers import set_seed

        from selfreg.activations.extractor import HiddenStateExtractor
        from selfreg.sae.configuration import SAEConfig
        from selfreg.sae.modeling import SAEForFeatureExtraction

        # Before the hours that it takes to come to it.
        SAEConfig(num_features=features, k=k, activation=activation)
        check_output(output)
        found = read_texts(texts, column, split, max_tokens, max_length)
        extractor = HiddenStateExtractor.from_pretrained(model, layer=parse_layer(layer), max_length=max_length)
        set_seed(seed)
        config = SAEConfig(hidden_size=extractor.hidden_size, num_features=features, k=k, activation=activation)
        sae = SAEForFeatureExtraction(config)
        _train(sae, extractor, found, output, "pretrain", epochs, learning_rate, batch_size, seed)


@app.command()
def finetune(
    source: Source,
    texts: Texts,
    output: Output,
    epochs: Epochs = 5,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    batch_size: BatchSize = 2048,
    max_tokens: MaxTokens = None,
    column: Column = "text",
    split: Split = "train",
    subfolder: Subfolder = "",
    revision: Revision = None,
    model: Model = None,
    layer: LayerOption = None,
    seed: Seed = 0,
) -> None:
    """Fine-tune an SAE on the texts of a task: the paper's two-part loss.

    Example: selfreg sae finetune my-sae task.csv --column text -o my-task-sae

    Features that are dead on these texts learn what the live ones leave unexplained, at a rate that disturbs those
    little. How many are alive afterwards depends on the steps: see the table in README.
    """
    with clear_errors():
        setup()
        check_output(output)
        sae = load_sae(source, subfolder, revision, model, layer)
        extractor = extractor_of(sae)
        found = read_texts(texts, column, split, max_tokens, extractor.spec.max_length)
        _train(sae, extractor, found, output, "finetune", epochs, learning_rate, batch_size, seed)


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
    """How well an SAE describes texts: FVU, L0, dead features.

    Example: selfreg sae eval my-task-sae other.jsonl --max-tokens 50000
    """
    import tempfile

    with clear_errors():
        setup()
        sae = load_sae(source, subfolder, revision, model, layer)
        extractor = extractor_of(sae)
        found = read_texts(texts, column, split, max_tokens, extractor.spec.max_length)
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

    Example: selfreg sae convert google/gemma-scope-2b-pt-res my-sae --subfolder layer_12/width_16k/average_l0_82

    Read are selfreg, SAELens (standard, gated, topk, jumprelu, batchtopk, matryoshka), Gemma Scope, sparsify,
    dictionary_learning, the sparse autoencoder module of sentence-transformers and the .pth files of the paper's
    authors. Normalisation and thresholds are converted; what is not known is refused by name.
    """
    with clear_errors():
        setup()
        check_output(output)
        sae = load_sae(source, subfolder, revision, model, layer)
        if to == "saelens":
            from selfreg.sae.interop.saelens import write

            write(sae, output)
        else:
            from selfreg.utils.files import atomic_folder

            with atomic_folder(output) as temporary:
                sae.save_pretrained(temporary)
        config = sae.config
        backbone = config.base_model_name_or_path or "an unnamed backbone"
        where = "" if config.layer is None else f", layer {config.layer} of {backbone}"
        say(
            f"{output}  {config.num_features} features of width {config.hidden_size}, {config.activation}{where}, "
            f"from {config.converted_from or 'selfreg'}"
        )
        if to == "saelens" and (config.activation == "batch_topk" or config.prefixes):
            say("written as SAELens has it in inference: batch_topk as jumprelu, and without prefixes")


def _train(
    sae: "SAEForFeatureExtraction",
    extractor: "HiddenStateExtractor",
    texts: list[str],
    output: Path,
    objective: str,
    epochs: float,
    learning_rate: float | None,
    batch_size: int,
    seed: int,
) -> None:
    from selfreg.sae.fingerprint import sae_fingerprint
    from selfreg.sae.trainer import SAETrainer
    from selfreg.sae.training_args import FEW_STEPS, SAETrainingArguments
    from selfreg.utils.files import fingerprint_json
    from selfreg.utils.trainer import StepProgress, last_whole_checkpoint

    work = output / ".work"
    settings: dict[str, Any] = {
        "objective": objective,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
    }
    # Bad arguments are told before the hours that the hidden states take.
    SAETrainingArguments(str(work), report_to="none", **settings)
    held_out = texts[::_HELD_OUT]
    kept = [text for number, text in enumerate(texts) if number % _HELD_OUT]
    if not kept:
        raise ValueError("there is one text only: none is left to measure on that training did not see; give more")
    store = extractor.extract(kept, work / "train")
    measured = extractor.extract(held_out, work / "held-out")
    say(
        f"{store.num_tokens:,} tokens of {len(kept):,} texts to train on; {measured.num_tokens:,} tokens of "
        f"{len(held_out):,} held out for the figures"
    )
    if store.num_tokens < sae.config.num_features:
        warn(f"fewer tokens than features ({sae.config.num_features:,}): give more texts, or take fewer features")
    if objective == "finetune":
        _tell_figures(sae, measured, "the held-out texts, before")
    # Unfinished training is found again by all that it depends on.
    key = fingerprint_json([settings, sae_fingerprint(sae), store.text_fingerprint])[:16]
    checkpoints = work / f"training-{key}"
    arguments = SAETrainingArguments(
        str(checkpoints),
        save_strategy="steps",
        save_steps=_SAVE_STEPS,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = SAETrainer(sae, arguments, train_dataset=store, callbacks=[StepProgress(f"SAE, {objective}")])
    steps = math.ceil(store.num_tokens / batch_size * epochs)
    say(f"about {steps:,} steps of {batch_size:,} states")
    if objective == "pretrain" and steps < FEW_STEPS:
        warn(f"an SAE learns little in so few steps: some 1,000 do; give more texts or epochs (--epochs {epochs:g})")
    unfinished = last_whole_checkpoint(checkpoints)
    if unfinished is not None:
        say(f"goes on at step {unfinished.rpartition('-')[2]}")
    elif any(work.glob("training-*/checkpoint-*")):
        say("starts anew: the unfinished training there is of other settings or texts")
    trainer.train(resume_from_checkpoint=unfinished)
    figures = _tell_figures(sae, measured, "the held-out texts")
    k = sae.config.k
    if abs(figures.l0 / k - 1) > _FAR_FROM_K:
        warn(f"{figures.l0:.1f} features are active in a state, k={k} were asked for: train for more epochs")
    # Whole in one rename a file, the one that names it an SAE last: what is gone on from lies in the same folder.
    sae.save_pretrained(work / "sae")
    for file in sorted((work / "sae").iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(output / file.name)
    shutil.rmtree(work, ignore_errors=True)
    say(f"{output}")


def _tell_figures(sae: "SAEForFeatureExtraction", store: "ActivationStore", what: str) -> "SAEStatistics":
    from selfreg.sae.statistics import evaluate_sae

    figures = evaluate_sae(sae, store)
    # Rare features need many tokens to be seen at all: on few, silent is not dead.
    few = figures.num_states * sae.config.k < _TOKENS_FOR_DEAD * sae.config.num_features
    silent = "silent (on so few tokens not the same as dead)" if few else "dead"
    say(
        f"FVU {figures.fvu:.4f}, L0 {figures.l0:.1f}, {silent} features {figures.dead_fraction:.2%}, "
        f"on {what} ({figures.num_states:,} tokens)"
    )
    return figures

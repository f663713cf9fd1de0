"""How fast are hidden states extracted? selfreg beside the two ways one would write it, on this machine.

    python benchmarks/extraction.py --texts 400

- whole model: `output_hidden_states=True`, random batches, padded to the longest text of each.
- bare loop: the truncated model over selfreg's own batches, and nothing else: no token rule, no store.
- selfreg: `HiddenStateExtractor.extract`, into a store on disk.

All three run over the same texts in every round, one after the other; the best round of each counts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from selfreg import HiddenStateExtractor
from selfreg.activations.backbone import hidden_states_at, resolve_model
from selfreg.demo.notes import load_notes
from selfreg.demo.recipe import demo_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_backbone())
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--texts", type=int, default=200, help="how many")
    parser.add_argument("--file", type=Path, help="texts, one a line; the demo's notes and halves of them if left out")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="texts of a batch of the whole model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    texts = read_texts(options.file)[: options.texts]
    source = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs())
    whole = AutoModel.from_pretrained(source.path, dtype=torch.float32, **source.kwargs()).eval()
    extractor = HiddenStateExtractor.from_pretrained(
        options.model, layer=options.layer, max_length=options.max_length, device="cpu"
    )
    prompts = extractor.tokenize(texts)
    tokens = sum(len(prompt[0]) for prompt in prompts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @torch.inference_mode()
    def whole_model() -> None:
        for start in range(0, len(order), options.batch):
            rows = [prompts[i][0] for i in order[start : start + options.batch]]
            longest = max(map(len, rows))
            ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            output = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            output.hidden_states[options.layer + 1].float()

    @torch.inference_mode()
    def bare_loop() -> None:
        for _, batch in extractor._batches(prompts):
            hidden_states_at(extractor.backbone, options.layer, batch.input_ids, batch.attention_mask)

    def selfreg() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extractor.extract(texts, Path(folder) / "store")

    ways: dict[str, Callable[[], None]] = {"whole model": whole_model, "bare loop": bare_loop, "selfreg": selfreg}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(options.rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)

    table = Table(
        title=f"{len(texts)} texts, {tokens:,} tokens, {options.model}, layer {options.layer}", title_justify="left"
    )
    for column in ("", "tokens/s", "times whole model", "times bare loop"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in best.items():
        ratios = (f"{best[other] / seconds:.2f}" for other in ("whole model", "bare loop"))
        table.add_row(name, f"{tokens / seconds:,.0f}", *ratios)
    console = Console(width=120)
    console.print(table)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def read_texts(path: Path | None) -> list[str]:
    """Texts of many lengths: as real ones are, and as no single set of notes would be."""
    if path is not None:
        return [line for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    notes = [note["text"] for note in load_notes("train")]
    return [" ".join(text.split()[: 8 + (i * 37) % 64]) for i, text in enumerate(notes)]


if __name__ == "__main__":
    main()

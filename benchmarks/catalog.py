"""What a feature catalogue costs: one pass with all that it gathers, against encoding the same states alone.

    SELFREG_DATA=/path/to/data python benchmarks/catalog.py --tokens 500000

SmolLM2-135M-Instruct, layer 15, on the general text of SELFREG_DATA (`sae_text`), states on disk; an SAE of 4,608
features trained for --steps steps on the same states. Interleaved rounds, minimum of each. Peak memory is what the
process gains over what the encoding alone took, sampled while the catalogue is built. The ten strongest texts of every
feature are compared with a brute-force reference on the first --check texts.
"""

import argparse
import threading
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from selfreg import (
    ActivationStore,
    FeatureCatalog,
    HiddenStateExtractor,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
)
from states import general_extractor, general_states, general_texts

CHUNK = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="of training of the SAE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=200, help="texts of the brute-force reference")
    parser.add_argument("--output", type=Path, default=Path("runs/catalog-benchmark"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    store = general_states(options.tokens, options.output)["train"]
    texts = general_texts(options.tokens)["train"]
    extractor = general_extractor()
    sae = trained(options, store)
    encoding, building, extra = [], [], []
    for _ in range(options.rounds):
        encoding.append(encode_alone(sae, store))
        peak = PeakMemory()
        with peak:
            started = time.perf_counter()
            catalog = FeatureCatalog.build(sae, extractor, texts, store=store)
            building.append(time.perf_counter() - started)
        extra.append(peak.gained)
    print(f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{len(store):,} tokens of {len(texts):,} texts, {options.features} features, k = {options.k}")
    print(
        f"encoding alone {min(encoding):.1f} s, catalogue {min(building):.1f} s: {min(building) / min(encoding):.2f}"
    )
    print(f"memory gained at most {max(extra) / 1e6:,.0f} MB")
    alive = [record for record in catalog if record.spans]
    print(
        f"{len(alive)} features with spans; on average {mean([len(r.spans) for r in alive]):.1f} top, "
        f"{mean([sum(map(len, r.quantile_spans)) for r in alive]):.1f} of quantiles, "
        f"{mean([len(r.near_misses) for r in alive]):.1f} near misses, "
        f"{mean([len(r.silent_spans) for r in alive]):.1f} silent"
    )
    check(sae, extractor, texts[: options.check])


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def trained(options: argparse.Namespace, store: ActivationStore) -> SAEForFeatureExtraction:
    folder = options.output / f"sae-{options.features}-{options.k}-{options.steps}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = SAEConfig(hidden_size=store.hidden_size, num_features=options.features, k=options.k)
        sae = SAEForFeatureExtraction(config)
        arguments = SAETrainingArguments(
            str(options.output / "training"), max_steps=options.steps, save_strategy="no", report_to="none"
        )
        SAETrainer(sae, arguments, train_dataset=store).train()
        sae.save_pretrained(folder)
    return SAEForFeatureExtraction.from_pretrained(folder)


@torch.inference_mode()
def encode_alone(sae: SAEForFeatureExtraction, store: ActivationStore) -> float:
    started = time.perf_counter()
    for shard in store.shards():
        for start in range(0, len(shard.hidden_states), CHUNK):
            sae.encode(shard.hidden_states[start : start + CHUNK])
    return time.perf_counter() - started


def check(sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]) -> None:
    """The strongest texts of every feature, by the largest of dense activations, sorted whole."""
    catalog = FeatureCatalog.build(sae, extractor, texts)
    dense = [next(iter(extractor.iterate([text]))).hidden_states for text in texts]
    with torch.inference_mode():
        maxima = torch.stack([sae.encode(states).to_dense().amax(0) for states in dense])
    different = 0
    for record in catalog:
        column = maxima[:, record.feature]
        wanted = column.sort(descending=True).values[:10]
        got = torch.zeros(10)
        got[: len(record.spans)] = torch.tensor([span.activation for span in record.spans])
        different += not torch.allclose(got, wanted[:10], rtol=1e-3, atol=1e-4)
    print(f"top 10 of {len(catalog)} features on {len(texts)} texts: {different} differ from brute force")


class PeakMemory:
    """The most memory that the process held beyond what it held at the start, bytes, sampled 20 times a second.

    What is mapped from the store's files does not count: it is the page cache's.
    """

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._start = self.gained = 0
        self._start = self._private()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _private(self) -> int:
        memory = self._process.memory_info()
        return memory.rss - memory.shared - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.gained = max(self.gained, self._private())


if __name__ == "__main__":
    main()

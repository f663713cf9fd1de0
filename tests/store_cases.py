"""Work on stores and catalogues that several processes share; as a script, the part of one of them.

store_cases.py write FOLDER     extraction, catalogues and training from a stream, in two processes
store_cases.py killed FOLDER N  an extraction in which process N is killed once it has written a shard
store_cases.py read FOLDER      three processes read and train from what two have written
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from conftest import WORDS, tiny_backbone, word_tokenizer
from helpers import make_sae
from sae_helpers import make_args
from selfreg import (
    ActivationStore,
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAETrainer,
    StreamingActivations,
)
from selfreg.activations.writer import StoreWriter
from selfreg.sae.statistics import evaluate_sae
from selfreg.utils.processes import gather_all, one_batch, processes

SHARD_TOKENS = 60


def make_extractor(layer: Any = 1) -> HiddenStateExtractor:
    return HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=layer, max_length=32, name="tiny")


def make_texts(count: int = 90) -> list[str]:
    """Texts of different lengths, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for _ in range(count):
        length = int(torch.randint(1, 20, (1,), generator=generator))
        texts.append(" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist()))
    return [*texts, *texts[:7]]


def build_catalogues(store: ActivationStore | None) -> FeatureCatalog:
    texts = make_texts()
    labels = [len(text) % 3 for text in texts]
    extractor = make_extractor()
    sae = make_sae(extractor)
    return FeatureCatalog.build(sae, extractor, texts, top_k=3, store=store, labels=labels)


def write(folder: Path) -> None:
    main = processes().is_main_process
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("selfreg").addHandler(handler)
    logging.getLogger("selfreg").setLevel(logging.INFO)
    extractor, texts = make_extractor(), make_texts()
    store = extractor.extract(texts, folder / "store", shard_tokens=SHARD_TOKENS)
    assert any("hidden states" in line for line in told) == main, "one process speaks for all"
    extractor.extract(texts, folder / "killed-1", shard_tokens=SHARD_TOKENS)
    write_sharded(folder, texts)
    with pytest.raises(ValueError, match="every process has to be given the same texts"):
        extractor.extract(texts[processes().process_index :], folder / "other", shard_tokens=SHARD_TOKENS)
    for name, of in {"from-store": store, "from-texts": None}.items():
        catalog = build_catalogues(of)
        if main:
            catalog.save_pretrained(folder / name)
    train_from_stream(folder / "stream")


def write_sharded(folder: Path, texts: list[str]) -> None:
    """The same with a backbone of which each process holds a part; one has more batches to run than the other."""
    for layer in (1, "final"):
        extractor = make_extractor(layer).shard()
        assert isinstance(extractor.backbone, FSDPModule)
        assert all(isinstance(weight, DTensor) for weight in extractor.backbone.parameters())
        extractor.batch_tokens = 64
        extractor.extract(texts, folder / f"sharded-{layer}", shard_tokens=SHARD_TOKENS)
        pooled = extractor.pool(texts[: 5 + 30 * processes().process_index])
        torch.testing.assert_close(pooled, make_extractor(layer).pool(texts[: len(pooled)]))
    # One of the two has nothing to do, and is not waited for afterwards.
    extractor = make_extractor().shard()
    extractor.extract(texts, folder / "one-shard")
    RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=2)


def train_from_stream(folder: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 7

    def make(name: str, *callbacks: TrainerCallback) -> SAETrainer:
        extractor = make_extractor().shard() if name == "sharded" else make_extractor()
        stream = StreamingActivations(extractor, make_texts(), buffer_tokens=150)
        settings = {"max_steps": 12, "per_device_train_batch_size": 32, "save_strategy": "steps", "save_steps": 5}
        args = make_args(folder / name, use_cpu=True, learning_rate=5e-3, **settings)
        sae = make_sae(make_extractor())
        # A new one: centring and scale come from the first buffers of both processes.
        sae.mean.zero_()
        sae.scale.fill_(1)
        return SAETrainer(sae, args, train_dataset=stream, callbacks=list(callbacks))

    whole = make("whole")
    whole.train()
    parts = gather_all(whole.train_dataset.current_states())  # type: ignore[union-attr]
    assert not torch.equal(parts[0][:20], parts[1][:20]), "both processes read the same texts"
    make("cut", Stop()).train()
    # Their buffers hold different numbers of batches, and are filled by both together.
    sharded = make("sharded")
    sharded.train()
    same = [state["W_enc"] for state in gather_all(sharded.model.state_dict())]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], make_sae(make_extractor()).W_enc)
    again = make("cut")
    again.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-5"))
    for state in gather_all(whole.model.state_dict()):
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def killed(folder: Path, which: int) -> None:
    written = StoreWriter.write

    def write_once(self: StoreWriter, number: int, shard: Any) -> None:
        written(self, number, shard)
        if processes().process_index == which:
            os.kill(os.getpid(), signal.SIGKILL)

    StoreWriter.write = write_once  # type: ignore[method-assign]
    make_extractor().extract(make_texts(), folder / f"killed-{which}", shard_tokens=SHARD_TOKENS)


def train_from_store(folder: Path, store: ActivationStore, batch: int) -> SAETrainer:
    args = make_args(folder, max_steps=5, per_device_train_batch_size=batch, use_cpu=True, learning_rate=5e-3)
    trainer = SAETrainer(make_sae(make_extractor()), args, train_dataset=store)
    trainer.train()
    return trainer


def read(folder: Path) -> None:
    store = ActivationStore(folder / "store")
    sums = gather_all(store.gather(range(len(store))).double().sum().item())
    assert sums == sums[:1] * 3, sums
    trainer = train_from_store(folder / "work", store, 20)
    with one_batch():
        figures = evaluate_sae(trainer.model, store)
    state = trainer.model.state_dict()
    for other in gather_all(state):
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    if processes().is_main_process:
        save_file({**state, "fvu": torch.tensor(figures.fvu, dtype=torch.float64)}, folder / "read.safetensors")


if __name__ == "__main__":
    work, place, *rest = sys.argv[1:]
    if work == "killed":
        killed(Path(place), int(rest[0]))
    else:
        {"write": write, "read": read}[work](Path(place))
    processes().wait_for_everyone()
    # All has held by now; a thread of gloo may still abort while the interpreter is taken down.
    os._exit(0)

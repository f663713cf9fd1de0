from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from sae_helpers import make_args, make_sae
from selfreg import HiddenStateExtractor, SAETrainer, StreamingActivations
from selfreg.utils.trainer import last_whole_checkpoint


def _sorted(states: Tensor) -> Tensor:
    return states[torch.argsort(states[:, 0])]


def test_a_pass_gives_every_state_once_in_another_order(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    store = extractor.extract(texts, tmp_path / "s")
    whole = store.gather(range(len(store)))
    for dataset in (texts, datasets.Dataset.from_dict({"text": texts}), iter(texts)):
        stream = StreamingActivations(extractor, dataset, buffer_tokens=100)
        given = torch.stack([row["hidden_states"] for row in stream])
        assert not torch.equal(given, whole)
        torch.testing.assert_close(_sorted(given), _sorted(whole), rtol=1e-4, atol=1e-5)


def test_batches_are_mixed_within_a_buffer_and_go_on_pass_after_pass(
    extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    stream = StreamingActivations(extractor, [*texts[:20], "", " "], buffer_tokens=10_000)
    batches = stream.batches(10)
    count = len(stream.current_states()) // 10
    first = [next(batches) for _ in range(count)]
    second = [next(batches) for _ in range(count)]
    assert all(batch.shape == (10, 16) for batch in (*first, *second))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert stream.state_dict() == {"passes": 1, "texts": 0, "given": count, "processes": 1}


def _streamed(texts: list[str]) -> Any:
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset().shuffle(seed=3, buffer_size=20)


@pytest.mark.parametrize("kind", ["list", "streamed"])
def test_the_place_is_kept(extractor: HiddenStateExtractor, texts: list[str], kind: str) -> None:
    def make() -> StreamingActivations:
        dataset = texts if kind == "list" else _streamed(texts)
        return StreamingActivations(extractor, dataset, buffer_tokens=150)

    stream = make()
    batches = stream.batches(30)
    place = stream.state_dict()
    while not (place["passes"] and place["texts"] and place["given"] > 1):
        next(batches)
        place = stream.state_dict()
    again = make()
    again.load_state_dict(place)
    for batch, other in zip(batches, again.batches(30), strict=False):
        assert torch.equal(batch, other)
        if stream.state_dict()["passes"] > place["passes"] + 1:
            break
    with pytest.raises(ValueError, match="a place in the texts of one of 3 processes, and there are 1"):
        again.load_state_dict({**place, "processes": 3})


def test_what_can_not_work_is_told(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'text'; it has body"):
        StreamingActivations(extractor, datasets.Dataset.from_dict({"body": texts}))
    with pytest.raises(ValueError, match="buffer_tokens=0 must be at least 1"):
        StreamingActivations(extractor, texts, buffer_tokens=0)
    with pytest.raises(ValueError, match="an iterator can be read once only"):
        list(zip(range(1000), StreamingActivations(extractor, iter(texts)).batches(8), strict=False))
    with pytest.raises(ValueError, match="gives no batch of 5000 hidden states"):
        next(StreamingActivations(extractor, texts).batches(5000))
    stream = StreamingActivations(extractor, texts)
    with pytest.raises(ValueError, match="dataloader_num_workers=2: a stream runs its backbone"):
        SAETrainer(make_sae(), make_args(tmp_path, max_steps=3, dataloader_num_workers=2), train_dataset=stream)
    with pytest.raises(ValueError, match="max_steps"):
        SAETrainer(make_sae(), make_args(tmp_path), train_dataset=stream)
    with pytest.raises(ValueError, match="width 8, the dataset holds 16"):
        SAETrainer(make_sae(width=8), make_args(tmp_path, max_steps=3), train_dataset=stream)


@pytest.mark.parametrize("objective", ["pretrain", "finetune"])
def test_training_from_a_stream_resumes_to_the_same_weights(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, objective: str
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 17:
                raise KeyboardInterrupt

    def make(folder: str, *callbacks: TrainerCallback) -> SAETrainer:
        stream = StreamingActivations(extractor, texts, buffer_tokens=200)
        args = make_args(
            tmp_path / folder,
            objective=objective,
            max_steps=30,
            per_device_train_batch_size=32,
            save_strategy="steps",
            save_steps=5,
            learning_rate=5e-3,
        )
        return SAETrainer(make_sae(), args, train_dataset=stream, callbacks=list(callbacks))

    whole = make("whole")
    whole.train()
    if objective == "pretrain":
        assert whole.model.is_normalized
        assert whole.model.config.hidden_state_spec() == extractor.spec
        losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(KeyboardInterrupt):
        make("cut", Stop()).train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-15")
    calls = _counted(extractor)
    again = make("cut")
    again.train(resume_from_checkpoint=checkpoint)
    # What came before is not run through the backbone again.
    assert next(calls) < 60
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def _counted(extractor: HiddenStateExtractor) -> Iterator[int]:
    """How many forward passes there were since."""
    forward, count = extractor.backbone.forward, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return forward(*args, **kwargs)

    extractor.backbone.forward = counting

    def told() -> Iterator[int]:
        yield count

    return told()

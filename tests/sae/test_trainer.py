import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import HfArgumentParser, TrainerCallback

from conftest import tiny_backbone, word_tokenizer
from sae_helpers import States, make_args, make_sae
from selfreg import (
    ActivationStore,
    HiddenStateExtractor,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
)
from selfreg.sae.configuration import ACTIVATION_NAMES
from selfreg.sae.data import sample_states
from selfreg.sae.statistics import evaluate_sae
from selfreg.utils.trainer import last_whole_checkpoint


def test_pretraining_learns_and_logs_its_parts(tmp_path: Path) -> None:
    sae, data = make_sae(), States()
    trainer = SAETrainer(sae, make_args(tmp_path, learning_rate=5e-3), train_dataset=data, eval_dataset=States(seed=1))
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    trainer.train()
    for name, parameter in sae.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"loss", "fvu", "l0", "aux_loss", "dead_fraction"} <= set(logged[0])
    assert logged[-1]["fvu"] < 0.5 * logged[0]["fvu"]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_fvu"] < 0.4
    assert metrics["eval_l0"] <= 4
    torch.testing.assert_close(sae.mean, data.states.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.normalize(data.states).pow(2).mean(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_keeps_unit_length(tmp_path: Path, tied: bool) -> None:
    sae = make_sae(tied=tied)
    SAETrainer(sae, make_args(tmp_path, num_train_epochs=2), train_dataset=States()).train()
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(48))
    free = make_sae(normalize_decoder=False)
    SAETrainer(free, make_args(tmp_path, num_train_epochs=2), train_dataset=States()).train()
    assert (free.decoder_weight.norm(dim=1) - 1).abs().max() > 1e-3


def test_k_is_annealed(tmp_path: Path) -> None:
    seen: list[int] = []
    sae = make_sae()
    forward = sae.forward

    def spy(states: Tensor, k: int | None = None, **kwargs: Any) -> Any:
        seen.append(k or 0)
        return forward(states, k=k, **kwargs)

    sae.forward = spy  # type: ignore[method-assign]
    SAETrainer(sae, make_args(tmp_path, max_steps=20), train_dataset=States()).train()
    assert seen[0] == 8
    assert seen[1] in (6, 7)
    assert seen[4:] == [4] * 16
    assert seen == sorted(seen, reverse=True)


def test_auxiliary_loss_revives_dead_features(tmp_path: Path) -> None:
    def dead_share(coefficient: float) -> float:
        sae = make_sae()
        with torch.no_grad():
            sae.b_enc[24:] = -3.0
        args = make_args(
            tmp_path,
            num_train_epochs=20,
            aux_coefficient=coefficient,
            dead_after_tokens=500,
            k_start=4,
            learning_rate=5e-3,
        )
        trainer = SAETrainer(sae, args, train_dataset=States())
        trainer.train()
        return trainer.evaluate(States(seed=1))["eval_dead_fraction"]

    without = dead_share(0.0)
    assert without > 0.3
    assert dead_share(0.5) < 0.5 * without


def test_counters_follow_what_fires(tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[0] = -100.0
    args = make_args(tmp_path, max_steps=3, aux_coefficient=0.0)
    SAETrainer(sae, args, train_dataset=States()).train()
    assert sae.tokens_since_fired[0] == 300
    assert (sae.tokens_since_fired == 0).any()


def test_finetuning_wakes_features_that_the_task_needs(tmp_path: Path) -> None:
    sae = make_sae()
    general, task = States(), States(seed=5, dictionary=1)
    SAETrainer(sae, make_args(tmp_path, learning_rate=5e-3), train_dataset=general).train()
    with torch.no_grad():
        sae.b_enc[24:] = -8.0
    args = make_args(tmp_path, objective="finetune", num_train_epochs=30, learning_rate=2e-2, dead_loss_weight=1.0)
    mean = sae.mean.clone()
    trainer = SAETrainer(sae, args, train_dataset=task)
    assert trainer.split_task_features()[24:].all()
    before = trainer.evaluate(task)
    trainer.train()
    after = trainer.evaluate(task)
    assert after["eval_fvu"] < before["eval_fvu"]
    assert after["eval_dead_fraction"] < before["eval_dead_fraction"]
    assert torch.equal(sae.mean, mean)
    logged = [entry for entry in trainer.state.log_history if "live_loss" in entry]
    assert logged[-1]["dead_on_task"] < logged[0]["dead_on_task"]


@pytest.mark.parametrize("objective", ["pretrain", "finetune"])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_resumed_training_is_the_undisturbed_one(tmp_path: Path, objective: str, activation: str) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    def make(folder: str, callbacks: list[TrainerCallback]) -> SAETrainer:
        args = make_args(
            tmp_path / folder,
            max_steps=15,
            objective=objective,
            learning_rate=5e-3,
            save_strategy="steps",
            save_steps=3,
            dead_after_tokens=300,
        )
        sae = make_sae(activation=activation)
        with torch.no_grad():
            sae.b_enc[30:] = -30.0
        return SAETrainer(sae, args, train_dataset=States(), callbacks=callbacks)

    whole = make("whole", [])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("cut", [Stop()]).train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-6")
    again = make("cut", [])
    again.train(resume_from_checkpoint=checkpoint)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


_TRAINING = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sae_helpers import States, make_args, make_sae
from selfreg import SAETrainer
args = make_args(Path(sys.argv[2]), max_steps=3000, save_strategy="steps", save_steps=20, learning_rate=5e-3)
SAETrainer(make_sae(activation="jumprelu"), args, train_dataset=States()).train()
"""


def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TRAINING, str(Path(__file__).parents[1]), str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_whole_checkpoint(tmp_path / "cut") is None:
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    process.wait()
    checkpoint = last_whole_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    done = int(checkpoint.rpartition("-")[2])
    assert done < 3000

    def make(folder: str) -> SAETrainer:
        # The schedule is that of the whole training; it is stopped a little after the kill.
        args = make_args(tmp_path / folder, max_steps=3000, save_strategy="steps", save_steps=5000, learning_rate=5e-3)
        stop = _StopAt(done + 15)
        return SAETrainer(make_sae(activation="jumprelu"), args, train_dataset=States(), callbacks=[stop])

    again, whole = make("cut"), make("whole")
    again.train(resume_from_checkpoint=checkpoint)
    whole.train()
    assert again.state.global_step == whole.state.global_step == done + 15
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    args = make_args(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    SAETrainer(make_sae(), args, train_dataset=States()).train()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "selfreg_checkpoint_is_whole").unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    def train(batch: int, accumulate: int) -> SAEForFeatureExtraction:
        sae = make_sae()
        # One batch is the whole set, so that the order of rows can't matter; plain SGD shows gradients as they are.
        args = make_args(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            k_start=4,
            lr_scheduler_type="constant",
        )
        data = States(count=80)
        # Equal norm in every quarter: the loss is a ratio of sums, which four quarters only share if theirs agree.
        data.states = data.states[:20].repeat(4, 1)
        SAETrainer(sae, args, train_dataset=data).train()
        return sae

    one, four = train(80, 1), train(20, 4)
    torch.testing.assert_close(one.W_enc, four.W_enc, rtol=5e-2, atol=5e-3)


def test_store_names_the_backbone_in_the_config(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    store = extractor.extract(texts, tmp_path / "s")
    sae = make_sae()
    SAETrainer(sae, make_args(tmp_path, max_steps=1), train_dataset=store).train()
    assert sae.config.hidden_state_spec() == store.spec
    sae.save_pretrained(tmp_path / "sae")
    tiny_backbone().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    again = SAEForFeatureExtraction.from_pretrained(tmp_path / "sae")
    again.config.base_model_name_or_path = str(tmp_path / "tiny")
    built = HiddenStateExtractor.from_sae(again)
    assert (built.layer, built.spec.max_length) == (1, 32)
    torch.testing.assert_close(built.pool(texts), extractor.pool(texts))


def test_what_does_not_fit_is_refused(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "s")
    with pytest.raises(ValueError, match="width 8, the dataset holds 16"):
        SAETrainer(make_sae(width=8), make_args(tmp_path), train_dataset=store)
    sae = make_sae()
    sae.config.set_hidden_state_spec(store.spec)
    sae.config.layer = 2
    with pytest.raises(ValueError, match="layer is 2 in the SAE and 1 in the store"):
        SAETrainer(sae, make_args(tmp_path), train_dataset=store)
    with pytest.raises(ValueError, match="does not name its backbone"):
        HiddenStateExtractor.from_sae(make_sae())
    with pytest.raises(ValueError, match="empty"):
        SAETrainer(make_sae(), make_args(tmp_path), train_dataset=States(count=0))
    with pytest.raises(ValueError, match="rows with 'hidden_states'; these hold text"):
        SAETrainer(make_sae(), make_args(tmp_path), train_dataset=[{"text": "a"}])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "train"}, "objective='train' is not known"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must not be negative"),
        ({"aux_coefficient": -1.0}, "aux_coefficient=-1.0 must not be negative"),
        ({"k_anneal_ratio": 2.0}, "between 0 and 1"),
        ({"k_start": -3}, "k_start=-3 must be at least 1"),
        ({"dead_after_tokens": 0}, "dead_after_tokens=0 must be at least 1"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "use version 2"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **setting)


def test_what_is_left_out_follows_objective_and_width(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    rates = []
    for num_features in (48, 16_384, 4 * 16_384):
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=num_features, k=4))
        trainer = SAETrainer(sae, args, train_dataset=States())
        rates.append(trainer.args.learning_rate)
    assert rates == pytest.approx([3e-3, 3e-3, 1.5e-3])
    # The caller's own are not touched.
    assert args.learning_rate is None
    assert args.adam_beta2 == 0.99
    args = make_args(tmp_path, objective="finetune")
    assert (args.learning_rate, args.adam_beta2, str(args.lr_scheduler_type.value)) == (5e-5, 0.999, "linear")
    args = make_args(tmp_path, learning_rate=1e-4, adam_beta2=0.9, lr_scheduler_type="cosine")
    assert SAETrainer(make_sae(), args, train_dataset=States()).args.learning_rate == 1e-4
    assert (args.adam_beta2, str(args.lr_scheduler_type.value)) == (0.9, "cosine")


def test_arguments_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    given = [
        "--output_dir",
        str(tmp_path),
        "--lr_scheduler_type",
        "cosine",
        "--learning_rate",
        "1e-4",
        "--k_start",
        "9",
    ]
    (args,) = HfArgumentParser(SAETrainingArguments).parse_args_into_dataclasses(given)
    assert (args.lr_scheduler_type.value, args.learning_rate, args.k_start) == ("cosine", 1e-4, 9)


def test_the_decay_is_that_of_each_training(tmp_path: Path) -> None:
    trainer = SAETrainer(make_sae(), make_args(tmp_path, max_steps=20), train_dataset=States())
    trainer.train()
    assert not trainer.args.lr_scheduler_kwargs


def test_the_rate_stays_and_falls_at_the_end(tmp_path: Path) -> None:
    args = make_args(tmp_path, max_steps=20, logging_steps=1)
    trainer = SAETrainer(make_sae(), args, train_dataset=States())
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates[:13] == pytest.approx([3e-3] * 13)
    assert rates[13:] == sorted(rates[13:], reverse=True)
    assert rates[-1] < 3e-4


def test_store_is_read_in_batches(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    calls: list[int] = []
    gather = ActivationStore.gather

    class Counting(ActivationStore):
        def gather(self, indices: Any) -> Tensor:
            calls.append(len(indices))
            return gather(self, indices)

    args = make_args(tmp_path, max_steps=3, per_device_train_batch_size=50)
    trainer = SAETrainer(make_sae(), args, train_dataset=Counting(store.path))
    calls.clear()
    trainer.train()
    assert calls.count(50) >= 3
    assert 1 not in calls


def test_more_pretraining_keeps_centring_and_scale(tmp_path: Path) -> None:
    sae = make_sae()
    SAETrainer(sae, make_args(tmp_path, num_train_epochs=4, learning_rate=5e-3), train_dataset=States()).train()
    mean, scale = sae.mean.clone(), sae.scale.clone()
    fvu = evaluate_sae(sae, States(seed=1)).fvu
    other = States(dictionary=1)
    other.states = 10 * other.states
    args = make_args(tmp_path, max_steps=1, learning_rate=1e-12, k_anneal_ratio=0.0)
    SAETrainer(sae, args, train_dataset=other).train()
    assert torch.equal(sae.mean, mean)
    assert torch.equal(sae.scale, scale)
    assert evaluate_sae(sae, States(seed=1)).fvu == pytest.approx(fvu, rel=1e-3)


def test_sample_is_within_the_largest_stores() -> None:
    class Rows:
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            assert 0 <= index < self.count
            return {"hidden_states": torch.tensor([float(index)], dtype=torch.float64)}

    for count in (1, 2, 7, 20_000_000, 113_000_007):
        rows = sample_states(Rows(count), 5).flatten().tolist()
        assert (rows[0], rows[-1]) == (0, count - 1)
        assert rows == sorted(rows)


def test_diverged_training_stops_with_a_word(tmp_path: Path) -> None:
    trainer = SAETrainer(make_sae(), make_args(tmp_path, learning_rate=1e38), train_dataset=States())
    with pytest.raises(ValueError, match="training diverged before step .* lower learning_rate=1e"):
        trainer.train()


def test_a_state_that_is_not_finite_is_named(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    store = extractor.extract(texts, tmp_path / "store", shard_tokens=100)
    shard = tmp_path / "store" / store.manifest["shards"][2]["file"]
    tensors = load_file(shard)
    tensors["hidden_states"][7, 3] = torch.nan
    save_file(tensors, shard)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=48, k=4))
    # Whether the SAE is new, or the state only comes in a batch.
    for normalized in (False, True):
        if normalized:
            sae.set_normalization(torch.ones(16), torch.ones(()))
        trainer = SAETrainer(sae, make_args(tmp_path), train_dataset=ActivationStore(tmp_path / "store"))
        with pytest.raises(ValueError, match=r"row 7 of .*shard-00002.safetensors \(texts \d+ to \d+\)"):
            trainer.train()
    rows = States()
    rows.states[11, 2] = torch.inf
    with pytest.raises(ValueError, match="row 11 of the dataset"):
        SAETrainer(make_sae(), make_args(tmp_path), train_dataset=rows).train()


def test_large_states_are_no_error(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "store")
    shard = tmp_path / "store" / store.manifest["shards"][0]["file"]
    tensors = load_file(shard)
    tensors["hidden_states"][:2] = 3e38
    save_file(tensors, shard)
    assert torch.isfinite(ActivationStore(tmp_path / "store").gather([0, 1, 2])).all()


def test_figures_are_of_states_of_its_own_backbone(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    sae = make_sae()
    sae.config.set_hidden_state_spec(extractor.spec)
    other = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=2, max_length=32, name="tiny")
    with pytest.raises(ValueError, match="layer is 1 in the SAE and 2 in the store"):
        evaluate_sae(sae, other.extract(texts, tmp_path / "s"))


def test_last_batch_of_one_state(tmp_path: Path) -> None:
    trainer = SAETrainer(make_sae(), make_args(tmp_path, num_train_epochs=1), train_dataset=States(count=501))
    trainer.train()
    logged = [entry["fvu"] for entry in trainer.state.log_history if "fvu" in entry]
    assert logged
    assert all(0 < value < 10 for value in logged)

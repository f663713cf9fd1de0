"""The two terms in anybody's Trainer, on stock models of several families."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    HfArgumentParser,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

from conftest import word_tokenizer
from helpers import make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizationArguments,
    RegularizationMixin,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
    head_inputs,
)
from selfreg.classifier.head import find_head
from selfreg.classifier.penalty import dependence_directions, feature_activations
from selfreg.classifier.tasks import held_constant

# peft 0.21 and TRL 1.16 call what transformers 5.24 renamed by its old names.
old_names = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")

FAMILIES = ("llama", "qwen3", "bert", "modernbert", "roberta")
DECODERS = ("llama", "qwen3")


class PluggedTrainer(RegularizationMixin, Trainer):
    pass


class OwnTrainer(Trainer):
    """As people write them: a loss of their own, and a signature of their own."""

    def __init__(self, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits / self.temperature, labels)
        return (loss, outputs) if return_outputs else loss


class RegularizedOwnTrainer(RegularizationMixin, OwnTrainer):
    pass


def make_model(family: str, *, num_labels: int = 3, seed: int = 0) -> PreTrainedModel:
    shared: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "num_labels": num_labels,
        "pad_token_id": word_tokenizer().pad_token_id,
    }
    config: Any = {
        "llama": lambda: LlamaConfig(**shared, num_key_value_heads=1),
        "qwen3": lambda: Qwen3Config(**shared, num_key_value_heads=1, head_dim=8),
        "bert": lambda: BertConfig(**shared),
        "roberta": lambda: RobertaConfig(**shared),
        "modernbert": lambda: ModernBertConfig(**shared, classifier_pooling="mean", bos_token_id=2, eos_token_id=3),
    }[family]()
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    # At the start of transformers, 0.02, a tiny head leaves nothing to shrink.
    nn.init.normal_(find_head(model).weight, std=0.5)
    return model


def make_rows(texts: list[str]) -> Dataset:
    tokenizer = word_tokenizer()
    return Dataset.from_list(
        [{**tokenizer(text), "labels": int("fever" in text) + int("pain" in text)} for text in texts]
    )


def make_args(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "num_train_epochs": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return TrainingArguments(str(folder), **{**defaults, **kwargs})


def features_of(model: PreTrainedModel, rows: Dataset, family: str) -> UnintendedFeatures:
    """On the states that the head reads: of layer="final" for decoders, of head_inputs for the others."""
    if family in DECODERS:
        sae = make_sae(HiddenStateExtractor(model.model, word_tokenizer(), layer="final", name="tiny"))
    else:
        torch.manual_seed(0)
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    states = head_inputs(model, batches_of(rows))
    sae.set_normalization(states.mean(dim=0), states.std())
    return UnintendedFeatures.from_ids(sae, [1, 2])


def batches_of(rows: Any) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=16, collate_fn=DataCollatorWithPadding(word_tokenizer()))


def freeze_all_but_the_head(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    find_head(model).requires_grad_(True)


def plugged(model: Any, args: TrainingArguments, rows: Any, unintended: Any, **kwargs: Any) -> PluggedTrainer:
    return PluggedTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        unintended=unintended,
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        **kwargs,
    )


@pytest.fixture
def rows(texts: list[str]) -> Dataset:
    return make_rows(texts)


@pytest.mark.parametrize("family", FAMILIES[:4])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "full"])
def test_both_terms_shrink_what_they_are_about(family: str, frozen: bool, rows: Dataset, tmp_path: Path) -> None:
    use = {}
    for name, weights in {"off": (0.0, 0.0), "penalty": (3.0, 0.0), "dependence": (0.0, 30.0)}.items():
        model = make_model(family)
        unintended = features_of(model, rows, family)
        if frozen:
            freeze_all_but_the_head(model)
        before = copy.deepcopy(model.state_dict())
        settings = RegularizationArguments(penalty_weight=weights[0], dependence_weight=weights[1])
        rate, epochs = (2e-2, 8) if frozen else (3e-3, 10)
        args = make_args(tmp_path, learning_rate=rate, num_train_epochs=epochs)
        trainer = plugged(model, args, rows, unintended, regularization=settings)
        trainer.train()
        head = find_head(model)
        moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert (moved == trained) if frozen else (len(moved) > 10)
        states = head_inputs(model, batches_of(rows))
        activations = feature_activations(states, unintended.encoder_directions, unintended.encoder_bias)
        directions = dependence_directions(
            states, activations, held_constant("single_label", torch.tensor(rows["labels"]))
        )
        decoder = nn.functional.normalize(unintended.decoder_directions, dim=1)
        use[name] = (
            float((head.weight @ decoder.T).abs().mean().detach()),
            float((head.weight @ directions.T).pow(2).mean().detach()),
        )
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert {"task_loss", "similarity"} <= set(logged)
        assert ("dependence" in logged) == (name == "dependence")
    # A backbone that trains finds other ways to the same logits.
    left = 0.5 if frozen else 0.8
    assert use["penalty"][0] < left * use["off"][0]
    assert use["dependence"][1] < left * use["off"][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_dependence_is_the_closed_form_over_standardised_states(
    family: str, rows: Dataset, tmp_path: Path
) -> None:
    model = make_model(family)
    unintended = features_of(model, rows, family)
    freeze_all_but_the_head(model)
    trainer = plugged(model, make_args(tmp_path, max_steps=1), rows, unintended)
    trainer.train()
    states = head_inputs(model, batches_of(rows))
    scale = (states - states.mean(dim=0)).pow(2).mean().sqrt()
    activations = feature_activations(states, unintended.encoder_directions, unintended.encoder_bias)
    constant = held_constant("single_label", torch.tensor(rows["labels"]))
    wanted = dependence_directions(states / scale, activations, constant)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(trainer.regularizer.dependence_directions, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "full"])
def test_parts_add_up_evaluation_is_the_task_loss_and_the_order_of_batches_stays(
    frozen: bool, rows: Dataset, tmp_path: Path
) -> None:
    model = make_model("llama")
    unintended = features_of(model, rows, "llama")
    if frozen:
        freeze_all_but_the_head(model)
    plain = copy.deepcopy(model)
    settings = RegularizationArguments(penalty_weight=0.7, dependence_weight=0.2)
    args = make_args(tmp_path, logging_steps=1, num_train_epochs=2)
    trainer = plugged(model, args, rows, unintended, regularization=settings, eval_dataset=rows)
    start = trainer.evaluate()["eval_loss"]
    assert start == pytest.approx(
        Trainer(plain, args, eval_dataset=rows, data_collator=trainer.data_collator).evaluate()["eval_loss"]
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries[5:]:
        total = entry["task_loss"] + 0.7 * entry["similarity"] + 0.2 * entry["dependence"]
        assert entry["loss"] == pytest.approx(total, rel=1e-3, abs=1e-4)
        assert entry["similarity"] > 0
        assert entry["dependence"] > 0
    other = Trainer(plain, args, train_dataset=rows, data_collator=trainer.data_collator)
    other.train()
    first = next(entry for entry in other.state.log_history if "loss" in entry)
    assert entries[0]["task_loss"] == pytest.approx(first["loss"], rel=1e-4)


@pytest.mark.parametrize("loss_func", [None, "own"])
def test_accumulated_micro_batches_are_one_batch(loss_func: str | None, rows: Dataset, tmp_path: Path) -> None:
    def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    weights = []
    for batch_size, accumulated in ((32, 1), (8, 4)):
        model = make_model("llama")
        unintended = features_of(model, rows, "llama")
        freeze_all_but_the_head(model)
        args = make_args(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
        )
        kwargs = {} if loss_func is None else {"compute_loss_func": own_loss}
        plugged(model, args, rows.select(range(32)), unintended, **kwargs).train()
        weights.append(find_head(model).weight.detach().clone())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_resumed_training_is_whole_training(rows: Dataset, tmp_path: Path) -> None:
    ends = []
    for resumed in (False, True):
        args = make_args(
            tmp_path / str(resumed), num_train_epochs=2, save_strategy="epoch", lr_scheduler_type="constant"
        )
        if resumed:
            first = make_args(
                tmp_path / "True", num_train_epochs=1, save_strategy="epoch", lr_scheduler_type="constant"
            )
            model = make_model("llama")
            plugged(model, first, rows, features_of(model, rows, "llama")).train()
        model = make_model("llama")
        trainer = plugged(model, args, rows, features_of(model, rows, "llama"))
        trainer.train(resume_from_checkpoint=resumed)
        ends.append((find_head(model).weight.detach(), trainer.regularizer.dependence_directions))
    assert ends[0][1].abs().max() > 0
    for resumed_part, whole_part in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(resumed_part, whole_part, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_a_stock_model(family: str, rows: Dataset, tmp_path: Path) -> None:
    model = make_model(family)
    trainer = plugged(model, make_args(tmp_path, max_steps=3), rows, features_of(model, rows, family))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert type(loaded) is type(model)
    batch = next(iter(batches_of(rows)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_regularized_trainer_takes_plain_training_arguments(rows: Dataset, tmp_path: Path) -> None:
    model = make_model("qwen3")
    trainer = RegularizedTrainer(
        model=model,
        args=make_args(tmp_path, max_steps=8),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        unintended=features_of(model, rows, "qwen3"),
    )
    trainer.train()
    assert trainer.regularization == RegularizationArguments()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"task_loss", "similarity", "dependence"} <= set(last)


def test_own_trainer_with_its_own_signature_and_loss(rows: Dataset, tmp_path: Path) -> None:
    model = make_model("bert")
    trainer = RegularizedOwnTrainer(
        2.0,
        model=model,
        args=make_args(tmp_path, max_steps=8),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        unintended=features_of(model, rows, "bert"),
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"task_loss", "similarity", "dependence"} <= set(last)
    with torch.no_grad():
        model.eval()
        losses = [
            nn.functional.cross_entropy(model(**batch).logits / 2, batch["labels"], reduction="sum")
            for batch in batches_of(rows)
        ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(losses)) / len(rows), rel=1e-3)


def test_settings_come_with_the_arguments_or_beside_them(rows: Dataset, tmp_path: Path) -> None:
    @dataclass
    class Args(RegularizationArguments, TrainingArguments):
        pass

    model = make_model("llama")
    unintended = features_of(model, rows, "llama")
    args = Args(str(tmp_path), penalty_weight=0.25, report_to="none")
    assert args.output_dir == str(tmp_path)
    assert plugged(model, args, rows, unintended).regularizer.penalty_weight == 0.25
    with pytest.raises(ValueError, match="Args carries the weights of the terms"):
        plugged(model, args, rows, unintended, regularization=RegularizationArguments())
    with pytest.raises(ValueError, match=r"dependence_weight=-2\.0 must not be negative"):
        Args(str(tmp_path), dependence_weight=-2.0)
    with pytest.raises(ValueError, match="penalty_weight=-1 must not be negative"):
        RegularizationArguments(penalty_weight=-1)
    with pytest.raises(ValueError, match="similarity='angle' is not known"):
        RegularizationArguments(similarity="angle")
    parser = HfArgumentParser((RegularizationArguments, TrainingArguments))
    line = ["--output_dir", str(tmp_path), "--similarity", "cosine", "--report_to", "none"]
    settings, training = parser.parse_args_into_dataclasses(line)
    assert (settings.similarity, training.output_dir) == ("cosine", str(tmp_path))
    (both,) = HfArgumentParser(Args).parse_args_into_dataclasses([*line, "--dependence_momentum", "0.5"])
    assert (both.similarity, both.dependence_momentum, both.output_dir) == ("cosine", 0.5, str(tmp_path))
    assert isinstance(RegularizedTrainingArguments(str(tmp_path), report_to="none"), RegularizationArguments)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_head_reads_does_not_hang_on_padding(family: str, padding: str, rows: Dataset) -> None:
    model = make_model(family)
    tokenizer = word_tokenizer()
    if family not in DECODERS and padding == "left":
        pytest.skip("encoders are padded right")
    tokenizer.padding_side = padding
    together = head_inputs(model, [DataCollatorWithPadding(tokenizer)([rows[i] for i in range(6)])])
    alone = head_inputs(model, [DataCollatorWithPadding(tokenizer)([rows[i]]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({tuple(state.tolist()) for state in alone}) == 6


@old_names
def test_the_head_is_found_through_wrappers() -> None:
    for family, path in {"llama": "score", "bert": "classifier", "roberta": "classifier.out_proj"}.items():
        model = make_model(family)
        assert find_head(model) is model.get_submodule(path)
        assert find_head(torch.nn.DataParallel(model)) is model.get_submodule(path)
        assert find_head(torch.compile(model)) is model.get_submodule(path)  # type: ignore[arg-type]
        wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
        (name,) = (n for n, p in wrapped.named_parameters() if p.requires_grad and p.shape == (3, 16))
        assert "modules_to_save.default" in name
        assert find_head(wrapped).weight is wrapped.get_parameter(name)


@old_names
def test_heads_that_cannot_be_found_are_named() -> None:
    with pytest.raises(ValueError, match="score, classifier, classifier.out_proj: none of them is there") as error:
        find_head(make_model("llama").model)
    assert "LlamaModel" in str(error.value)
    assert "embed_tokens (Embedding), layers (ModuleList)" in str(error.value)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.classifier = nn.Linear(4, 2), nn.Linear(4, 3)
            self.mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    two = Two()
    with pytest.raises(ValueError, match="Two has 2 linear layers that may be its head, score, classifier"):
        find_head(two)
    assert find_head(two, "classifier") is two.classifier
    with pytest.raises(ValueError, match="looked for mixed: mixed is a Sequential"):
        find_head(two, "mixed")
    adapted = get_peft_model(make_model("llama"), LoraConfig(target_modules=["score"], r=2))
    with pytest.raises(ValueError, match="modules_to_save"):
        find_head(adapted)


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "full"])
def test_final_states_that_the_head_does_not_read_are_refused(
    family: str, frozen: bool, rows: Dataset, tmp_path: Path
) -> None:
    model = make_model(family)
    if frozen:
        freeze_all_but_the_head(model)
    extractor = HiddenStateExtractor(model.base_model, word_tokenizer(), layer="final", name="tiny")
    unintended = UnintendedFeatures.from_ids(make_sae(extractor), [1, 2])
    model.train()
    with pytest.raises(ValueError, match=r"does not read the final hidden states.*selfreg\.head_inputs"):
        plugged(model, make_args(tmp_path), rows, unintended).train()


def test_bad_input_is_named(rows: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, args = make_model("llama"), make_args(tmp_path, max_steps=1)
    unintended = features_of(model, rows, "llama")
    with pytest.raises(ValueError, match="unintended=None must be UnintendedFeatures"):
        plugged(model, args, rows, None)
    with pytest.raises(ValueError, match="unintended='folder' must be UnintendedFeatures"):
        plugged(model, args, rows, "folder")
    wide = UnintendedFeatures.from_ids(SAEForFeatureExtraction(SAEConfig(hidden_size=8, num_features=20, k=2)), [1])
    with pytest.raises(ValueError, match="have width 8, the head reads 16"):
        plugged(model, args, rows, wide)
    inner = UnintendedFeatures.from_ids(
        make_sae(HiddenStateExtractor(model.model, word_tokenizer(), layer=0, name="tiny")), [1]
    )
    with pytest.raises(ValueError, match="are of layer 0, which the head of LlamaForSequenceClassification"):
        plugged(model, args, rows, inner)
    frozen = make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="the head of LlamaForSequenceClassification is frozen"):
        plugged(frozen, args, rows, unintended)
    removing = RegularizedTrainingArguments(str(tmp_path), remove_unintended=True, report_to="none")
    with pytest.raises(ValueError, match="remove_unintended takes features out"):
        plugged(model, removing, rows, unintended)
    for value in (0.5, "auto"):
        ridged = RegularizedTrainingArguments(str(tmp_path), ridge=value, report_to="none")
        with pytest.raises(ValueError, match=f"ridge={value!r} would have no effect in PluggedTrainer"):
            plugged(model, ridged, rows, unintended)
        with pytest.raises(ValueError, match=f"ridge={value!r} would have no effect here"):
            RegularizedTrainer(model=model, args=ridged, train_dataset=rows, unintended=unintended)
    with caplog.at_level("WARNING", logger="selfreg"):
        none = UnintendedFeatures.from_ids(
            make_sae(HiddenStateExtractor(model.model, word_tokenizer(), layer="final")), []
        )
        trainer = plugged(model, args, rows, none)
        trainer.train()
    assert "empty: this trains the plain classifier" in caplog.text
    assert not {"similarity", "dependence"} & set(trainer.state.log_history[0])


def test_features_unintended_for_some_labels_leave_the_others_alone(rows: Dataset, tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.id2label = {0: "well", 1: "ill", 2: "very ill"}
    sae = make_sae(HiddenStateExtractor(model.model, word_tokenizer(), layer="final", name="tiny"))
    unintended = UnintendedFeatures.from_ids(sae, [1, 2], labels=[["ill"], ["ill"]])
    settings = RegularizationArguments(penalty_weight=3.0, dependence_weight=0.0)
    trainer = plugged(model, make_args(tmp_path), rows, unintended, regularization=settings)
    trainer.train()
    decoder = nn.functional.normalize(unintended.decoder_directions, dim=1)
    use = (find_head(model).weight @ decoder.T).abs().mean(dim=1)
    assert use[1] < 0.5 * min(use[0], use[2])
    unknown = UnintendedFeatures.from_ids(sae, [1], labels=[["dead"]])
    with pytest.raises(ValueError, match="label 'dead', which is none of the model's: well, ill, very ill"):
        plugged(model, make_args(tmp_path), rows, unknown)


@old_names
def test_lora_on_a_stock_model(rows: Dataset, tmp_path: Path) -> None:
    model = make_model("qwen3")
    unintended = features_of(model, rows, "qwen3")
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"]))
    settings = RegularizationArguments(penalty_weight=3.0)
    trainer = plugged(wrapped, make_args(tmp_path), rows, unintended, regularization=settings)
    start = find_head(wrapped).weight.detach().clone()
    trainer.train()
    decoder = nn.functional.normalize(unintended.decoder_directions, dim=1)
    end = find_head(wrapped).weight.detach()
    assert (end @ decoder.T).abs().mean() < 0.5 * (start @ decoder.T).abs().mean()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"task_loss", "similarity", "dependence"} <= set(last)


def test_batches_of_unknown_kind_are_named(rows: Dataset, tmp_path: Path) -> None:
    model = make_model("llama")
    unintended = features_of(model, rows, "llama")
    trainer = plugged(model, make_args(tmp_path), rows.remove_columns("labels"), unintended)
    with pytest.raises(ValueError, match="PluggedTrainer has batches without 'labels' that are no pairs"):
        trainer.dependence_rows({}, torch.zeros(3, 16), torch.zeros(3, 2))


@pytest.fixture
def pairs(texts: list[str]) -> Dataset:
    """The longer of two texts is the better one."""
    halves = [sorted(two, key=len) for two in zip(texts[:30], texts[30:], strict=True)]
    return Dataset.from_list([{"chosen": longer, "rejected": shorter} for shorter, longer in halves])


def reward_setup(
    folder: Path, pairs: Dataset, *, peft_config: LoraConfig | None = None, frozen: bool = False, **settings: float
) -> tuple[Any, UnintendedFeatures]:
    """TRL's RewardTrainer with the two terms, its model by name, and the features."""
    trl = pytest.importorskip("trl")

    class RegularizedRewardTrainer(RegularizationMixin, trl.RewardTrainer):
        pass

    model = make_model("qwen3", num_labels=1)
    sae = make_sae(HiddenStateExtractor(model.model, word_tokenizer(), layer="final", name="tiny"))
    unintended = UnintendedFeatures.from_ids(sae, [1, 2])
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    given: Any = str(folder / "model")
    if frozen:
        freeze_all_but_the_head(model)
        given = model
    args = trl.RewardConfig(
        str(folder / "out"),
        bf16=False,
        gradient_checkpointing=False,
        num_train_epochs=10,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = RegularizedRewardTrainer(
        given,
        args,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        unintended=unintended,
        regularization=RegularizationArguments(**settings),  # type: ignore[arg-type]
    )
    return trainer, unintended


@old_names
@pytest.mark.parametrize("kind", ["full", "frozen", "lora"])
def test_reward_trainer_of_trl(kind: str, pairs: Dataset, tmp_path: Path) -> None:
    use = []
    for weight in (0.0, 3.0):
        peft_config = None
        if kind == "lora":
            peft_config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
        trainer, unintended = reward_setup(
            tmp_path,
            pairs,
            peft_config=peft_config,
            frozen=kind == "frozen",
            penalty_weight=weight,
            dependence_weight=0.1,
        )
        trainer.train()
        decoder = nn.functional.normalize(unintended.decoder_directions, dim=1)
        use.append(float((find_head(trainer.model).weight @ decoder.T).abs().mean().detach()))
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        # TRL's own stay beside ours.
        assert {"task_loss", "similarity", "dependence", "accuracy", "margin", "mean_reward"} <= set(entries[-1])
        for entry in entries[10:]:
            total = entry["task_loss"] + weight * entry["similarity"] + 0.1 * entry["dependence"]
            assert entry["loss"] == pytest.approx(total, rel=1e-3, abs=1e-3)
    assert use[1] < 0.5 * use[0]
    metrics = trainer.evaluate()
    with torch.no_grad():
        scores = [
            trainer.model.eval()(input_ids=torch.tensor([row[side]])).logits.squeeze()
            for row in trainer.train_dataset
            for side in ("chosen_ids", "rejected_ids")
        ]
    chosen, rejected = torch.stack(scores).view(-1, 2).unbind(dim=1)
    assert metrics["eval_loss"] == pytest.approx(float(-nn.functional.logsigmoid(chosen - rejected).mean()), rel=1e-3)


@old_names
def test_dependence_of_pairs_is_that_of_their_differences(pairs: Dataset, tmp_path: Path) -> None:
    trainer, unintended = reward_setup(tmp_path, pairs, frozen=True)
    trainer.train()
    states = [
        head_inputs(trainer.model, [{"input_ids": torch.tensor([row[side]])} for row in trainer.train_dataset])
        for side in ("chosen_ids", "rejected_ids")
    ]
    both = torch.cat(states)
    scale = (both - both.mean(dim=0)).pow(2).mean().sqrt()
    activations = [feature_activations(s, unintended.encoder_directions, unintended.encoder_bias) for s in states]
    wanted = dependence_directions(
        (states[0] - states[1]) / scale, activations[0] - activations[1], torch.ones(len(states[0]), 1)
    )
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(trainer.regularizer.dependence_directions, wanted, rtol=1e-3, atol=1e-4)


@old_names
def test_lora_that_leaves_the_head_frozen_is_refused(pairs: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head of Qwen3ForSequenceClassification is frozen.*task_type='SEQ_CLS'"):
        reward_setup(tmp_path, pairs, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


@old_names
def test_settings_beside_those_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    @dataclass
    class Args(RegularizationArguments, trl.RewardConfig):
        pass

    line = ["--output_dir", str(tmp_path), "--bf16", "false", "--report_to", "none", "--penalty_weight", "0.5"]
    (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(line)
    # Both sides' checks have run.
    assert (args.penalty_weight, args.pad_to_multiple_of, args.logging_steps) == (0.5, None, 10)
    settings, reward = trl.TrlParser((RegularizationArguments, trl.RewardConfig)).parse_args_and_config(line)
    assert (settings.penalty_weight, reward.output_dir) == (0.5, str(tmp_path))


@pytest.mark.parametrize("kind", [PluggedTrainer, RegularizedTrainer])
@pytest.mark.parametrize("given", [None, 0.5])
def test_weight_decay_of_a_stock_model(kind: Any, given: float | None, rows: Dataset, tmp_path: Path) -> None:
    model = make_model("llama")
    args = RegularizedTrainingArguments(
        str(tmp_path), weight_decay=given, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = kind(
        model=model,
        args=args,
        train_dataset=rows,
        unintended=features_of(model, rows, "llama"),
        data_collator=DataCollatorWithPadding(word_tokenizer()),
    )
    trainer.train()
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, given or 2.0}

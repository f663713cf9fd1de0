import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

from conftest import tiny_backbone, word_tokenizer
from helpers import SECOND_IS_BEST, make_sae, train_and_restore_the_second
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    UnintendedFeatures,
)
from selfreg.activations.backbone import hidden_states_at
from selfreg.classifier.penalty import dependence_directions, remove_features, similarity_penalty
from selfreg.classifier.tasks import held_constant

PEFT_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""peft's, where the tests themselves call it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_backbone().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def loaded(folder: Path) -> HiddenStateExtractor:
    return HiddenStateExtractor.from_pretrained(str(folder), layer=1, max_length=32)


def make_model(extractor: HiddenStateExtractor, lora: Any = None, **kwargs: Any) -> RegularizedSequenceClassifier:
    sae = make_sae(extractor)
    unintended = UnintendedFeatures.from_ids(sae, [3, 7, 11])
    torch.manual_seed(0)
    if kwargs.get("task", "single_label") == "single_label":
        kwargs.setdefault("id2label", {0: "well", 1: "ill", 2: "very ill"})
    return RegularizedSequenceClassifier.from_backbone(
        extractor, sae, unintended, lora=lora or {"r": 4, "lora_alpha": 8}, **kwargs
    )


def make_args(folder: Path, **kwargs: Any) -> RegularizedTrainingArguments:
    defaults: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "adapter_learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "seed": 0,
    }
    return RegularizedTrainingArguments(str(folder), **{**defaults, **kwargs})


def make_rows(texts: list[str]) -> Dataset:
    return Dataset.from_list([{"text": text, "label": int("fever" in text) + int("pain" in text)} for text in texts])


def fit(model: RegularizedSequenceClassifier, rows: Any, folder: Path, **kwargs: Any) -> RegularizedTrainer:
    trainer = RegularizedTrainer(model=model, args=make_args(folder, **kwargs), train_dataset=rows)
    trainer.train()
    return trainer


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logits_of(model: Any, texts: list[str]) -> torch.Tensor:
    encoded = word_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model.eval()(**encoded).logits


def test_adapter_and_head_move_and_nothing_else(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    plain = snapshot(loaded.backbone)
    model = make_model(loaded)
    before = snapshot(model)
    trainer = fit(model, make_rows(texts), tmp_path / "t")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable | {"pooled_mean", "pooled_scale"}
    # Two blocks, each with seven linear layers; nothing in blocks that aren't run.
    adapted = {name.split(".lora_")[0].removeprefix("backbone.base_model.model.") for name in moved if "lora_" in name}
    assert len(adapted) == 14
    assert {name.split(".")[1] for name in adapted} == {"0", "1"}
    assert {"loss", "task_loss", "similarity", "dependence"} <= set(trainer.state.log_history[0])
    # The extractor that the user still holds is what it was.
    assert isinstance(loaded.backbone, PreTrainedModel)
    assert set(loaded.backbone.state_dict()) == set(plain)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.backbone.state_dict().items())


def test_weights_of_the_backbone_are_shared_and_blocks_that_are_not_run_have_no_adapter(
    extractor: HiddenStateExtractor,
) -> None:
    assert len(extractor.backbone.layers) == 4
    model = make_model(extractor, {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert len(extractor.backbone.layers) == 4
    assert len(model.backbone.get_base_model().layers) == 2
    config = model.backbone.peft_config["default"]
    assert sorted(config.target_modules) == [f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    assert (config.base_model_name_or_path, config.task_type) == ("tiny", "FEATURE_EXTRACTION")
    own = model.backbone.get_base_model().layers[0].mlp.up_proj.weight
    assert own.data_ptr() == extractor.backbone.layers[0].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize("layer", [1, "final"])
@pytest.mark.parametrize("family", ["qwen2", "bert", "gpt2"])
def test_every_adapted_layer_gets_a_gradient(family: str, layer: Any, texts: list[str]) -> None:
    extractor = HiddenStateExtractor(tiny_backbone(family), word_tokenizer(special=True), layer=layer, name="t")
    torch.manual_seed(0)
    model = RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=2, lora={"r": 2})
    torch.nn.init.normal_(model.score.weight)
    encoded = extractor.tokenizer(texts[:8], padding=True, return_tensors="pt")
    model(encoded["input_ids"], encoded["attention_mask"], labels=torch.arange(8) % 2).loss.backward()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(parameters) > 10
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []


def test_penalty_holds(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    def similarity(weight: float) -> float:
        model = make_model(loaded, remove_unintended=False)
        fit(model, make_rows(texts), tmp_path, num_train_epochs=20, penalty_weight=weight, dependence_weight=0.0)
        return float(similarity_penalty(model.score.weight.detach(), model.decoder_directions, "dot"))

    assert similarity(3.0) < 0.5 * similarity(0.0)


def test_dependence_term_holds(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    def dependence(weight: float) -> float:
        model = make_model(loaded, remove_unintended=False)
        options = {"num_train_epochs": 20, "penalty_weight": 0.0, "adapter_learning_rate": 1e-3}
        fit(model, make_rows(texts), tmp_path, dependence_weight=weight, **options)
        # In closed form, over the states as they are at the end.
        states = model.pooled_states(texts, make_rows(texts)["label"])
        constant = held_constant("single_label", states.labels)
        directions = dependence_directions(model.standardize(states.pooled), states.activations, constant)
        return float((model.score.weight.detach() @ directions.T).pow(2).mean())

    assert dependence(100.0) < 0.3 * dependence(0.0)


def test_features_are_removed_from_the_adapted_states(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_model(loaded)
    fit(model, make_rows(texts), tmp_path)
    states = model.pooled_states(texts, [0] * len(texts))
    moved = model.extractor()
    assert (moved.pool(texts) - loaded.pool(texts)).abs().max() > 0.01
    for row, text in enumerate(texts[:10]):
        h = next(iter(moved.iterate([text]))).hidden_states
        wanted = remove_features(h, model.encoder_directions, model.encoder_bias, model.decoder_directions)
        assert (wanted - h).abs().max() > 1e-3
        torch.testing.assert_close(states.pooled[row], wanted.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save_backbone", [False, True])
def test_reloaded_gives_the_same_logits(
    save_backbone: bool, loaded: HiddenStateExtractor, folder: Path, texts: list[str], tmp_path: Path
) -> None:
    model = make_model(loaded)
    fit(model, make_rows(texts), tmp_path / "t")
    wanted = logits_of(model, texts)
    model.save_pretrained(tmp_path / "m", save_backbone=save_backbone)
    names = {str(path.relative_to(tmp_path / "m")) for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= names
    assert ("backbone/model.safetensors" in names) == save_backbone
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4000
    config = json.loads((tmp_path / "m" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    given = loaded.backbone
    if save_backbone:
        for path in folder.iterdir():
            path.unlink()
    again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m")
    assert again.backbone_is_frozen
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    by_hand = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m", backbone=given)
    for other in (again, auto, by_hand):
        torch.testing.assert_close(logits_of(other, texts), wanted, rtol=0, atol=1e-6)
    assert isinstance(loaded.backbone, PreTrainedModel)
    assert not any("lora" in name for name in loaded.backbone.state_dict())
    # Saved once more, it is still whole.
    again.save_pretrained(tmp_path / "n", save_backbone=save_backbone)
    twice = RegularizedSequenceClassifier.from_pretrained(tmp_path / "n")
    torch.testing.assert_close(logits_of(twice, texts), wanted, rtol=0, atol=1e-6)
    classify = pipeline("text-classification", model=str(tmp_path / "m"), device="cpu")
    scores = {entry["label"]: entry["score"] for entry in classify(texts[:1], top_k=None)[0]}
    probabilities = wanted[0].softmax(-1)
    for name, index in model.config.label2id.items():
        assert scores[name] == pytest.approx(probabilities[index].item(), abs=1e-5)


@pytest.mark.filterwarnings(PEFT_NAME)
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
        LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", bias="all", task_type="SEQ_CLS"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
)
def test_peft_reads_the_adapter(lora: Any, folder: Path, texts: list[str], tmp_path: Path) -> None:
    whole = tiny_backbone()
    extractor = HiddenStateExtractor(whole, word_tokenizer(), layer=1, max_length=32, name=str(folder))
    model = make_model(extractor, lora)
    fit(model, make_rows(texts), tmp_path / "t")
    model.save_pretrained(tmp_path / "m")
    # Over the whole model, which has more blocks than the classifier runs.
    theirs = PeftModel.from_pretrained(tiny_backbone(), tmp_path / "m" / "adapter").eval()
    encoded = word_tokenizer()(texts, padding=True, return_tensors="pt")
    inputs = encoded["input_ids"], encoded["attention_mask"]
    with torch.no_grad():
        ours = hidden_states_at(model.eval().backbone, 1, *inputs)
        torch.testing.assert_close(hidden_states_at(theirs, 1, *inputs), ours, rtol=0, atol=1e-6)
        assert (ours - hidden_states_at(whole, 1, *inputs)).abs().max() > 2e-5
    wanted = logits_of(model, texts)
    torch.testing.assert_close(logits_of(model.merge_adapter(), texts), wanted, rtol=0, atol=1e-5)
    fresh = tiny_backbone().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in whole.state_dict().items())


def test_merged_gives_the_same_logits_and_is_no_longer_the_named_backbone(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    plain = snapshot(loaded.backbone)
    store = loaded.extract(texts, tmp_path / "store")
    model = make_model(loaded)
    fit(model, make_rows(texts), tmp_path / "t")
    wanted = logits_of(model, texts)
    with pytest.raises(ValueError, match="holds states of the backbone as it was, and an adapter has changed"):
        model.pooled_states(store, [0] * len(texts))
    assert model.merge_adapter() is model
    torch.testing.assert_close(logits_of(model, texts), wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.backbone.state_dict().items())
    with pytest.raises(ValueError, match="holds states of the backbone as it was, and an adapter has changed"):
        model.pooled_states(store, [0] * len(texts))
    with pytest.raises(ValueError, match=r"an adapter is merged into the backbone.*save_backbone=True saves it too"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"checkpoints can't be saved \(save_strategy='no' does without\): an adapter"
    ):
        RegularizedTrainer(model=model, args=make_args(tmp_path / "t", save_strategy="epoch"))
    fit(model, make_rows(texts), tmp_path / "t", num_train_epochs=1)
    wanted = logits_of(model, texts)
    model.save_pretrained(tmp_path / "m", save_backbone=True)
    assert not (tmp_path / "m" / "adapter").exists()
    again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits_of(again, texts), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="save_backbone=True saves it too"):
        again.save_pretrained(tmp_path / "n")
    with pytest.raises(ValueError, match="no adapter to merge"):
        again.merge_adapter()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_adapter_is_an_error(name: str, loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    make_model(loaded).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "adapter" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"was trained with an adapter, but .*{name} is missing"):
        RegularizedSequenceClassifier.from_pretrained(tmp_path / "m")
    head = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m", load_backbone_weights=False)
    with pytest.raises(ValueError, match="without its adapter, which would be lost"):
        head.save_pretrained(tmp_path / "n")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_training_is_the_uninterrupted_one(
    dropout: float, loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    lora = {"r": 4, "lora_dropout": dropout}
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3}
    whole = make_model(loaded, lora)
    trainer = fit(whole, make_rows(texts), tmp_path / "t", **options)
    again = make_model(loaded, lora)
    torch.nn.init.ones_(again.score.weight)
    second = RegularizedTrainer(model=again, args=make_args(tmp_path / "t", **options), train_dataset=make_rows(texts))
    second.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-5"))
    assert trainer.state.global_step == second.state.global_step == 12
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(second.regularizer.dependence_directions, trainer.regularizer.dependence_directions)


def test_best_checkpoint_is_restored_with_its_adapter(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_model(loaded)
    args = make_args(tmp_path / "t", **SECOND_IS_BEST, adapter_learning_rate=0.1)
    trainer = train_and_restore_the_second(model, args, make_rows(texts))
    best = RegularizedSequenceClassifier.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(logits_of(best, texts), logits_of(model, texts), rtol=0, atol=1e-5)


def test_accumulated_gradients_are_those_of_one_batch(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    def train(batch: int, accumulate: int) -> dict[str, torch.Tensor]:
        model = make_model(loaded)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
        options = {"optim": "sgd", "learning_rate": 0.1, "adapter_learning_rate": 0.1, "max_grad_norm": 0.0}
        # The dependence term is left out: its estimate has seen a batch more at each micro-batch.
        fit(
            model,
            make_rows(texts),
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            dependence_weight=0.0,
            **options,
        )
        return snapshot(model)

    once, accumulated = train(60, 1), train(15, 4)
    for name, tensor in once.items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_running_estimate_is_the_closed_form_while_nothing_moves(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    model = make_model(loaded)
    trainer = fit(model, make_rows(texts), tmp_path, learning_rate=0.0, adapter_learning_rate=0.0, num_train_epochs=10)
    states = model.pooled_states(texts, make_rows(texts)["label"])
    constant = held_constant("single_label", states.labels)
    wanted = dependence_directions(model.standardize(states.pooled), states.activations, constant)
    found = trainer.regularizer.dependence_directions
    # Each text has come eleven times by then, the last ones with a little more weight.
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert not torch.equal(found, wanted)


def test_running_estimate_follows_the_states(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_model(loaded)
    trainer = RegularizedTrainer(
        model=model, args=make_args(tmp_path, num_train_epochs=20), train_dataset=make_rows(texts)
    )
    states = model.pooled_states(texts, make_rows(texts)["label"])
    constant = held_constant("single_label", states.labels)
    model.set_standardization(states.pooled)
    start = dependence_directions(model.standardize(states.pooled), states.activations, constant)
    trainer.train()
    states = model.pooled_states(texts, make_rows(texts)["label"])
    end = dependence_directions(model.standardize(states.pooled), states.activations, constant)
    found = trainer.regularizer.dependence_directions
    assert (found - end).norm() < 0.7 * (start - end).norm()


def test_pairs(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    ill, well = ([text for text in texts if ("fever" in text) == has] for has in (True, False))
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(ill, well, strict=False)]
    model = make_model(loaded, task="preference")
    before = snapshot(model)
    options = {"adapter_learning_rate": 2e-3, "num_train_epochs": 30, "per_device_train_batch_size": 4}
    trainer = fit(model, pairs, tmp_path / "t", **options)
    assert all(
        not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if "lora_B" in name
    )
    states = model.pooled_states([text for pair in pairs for text in (pair["chosen"], pair["rejected"])], None)
    scores = model.logits(states.pooled)
    assert (scores[:, 0] > scores[:, 1]).float().mean() > 0.8
    # Of the differences between the sides, with nothing but their mean held constant.
    differences, activations = states.compared
    constant = held_constant("preference", states.labels)
    end = dependence_directions(differences / model.pooled_scale, activations, constant)
    assert torch.cosine_similarity(trainer.regularizer.dependence_directions, end).median() > 0.8
    model.save_pretrained(tmp_path / "m")
    again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits_of(again, texts), logits_of(model, texts), rtol=0, atol=1e-6)


def test_head_and_adapter_have_their_own_rates_and_the_head_alone_decays(
    loaded: HiddenStateExtractor, tmp_path: Path, texts: list[str]
) -> None:
    model = make_model(loaded)
    args = make_args(tmp_path, learning_rate=3e-3, adapter_learning_rate=1e-4, weight_decay=2.0)
    optimizer = RegularizedTrainer(model=model, args=args, train_dataset=make_rows(texts)).create_optimizer()
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = (1e-4, 0.0) if "lora_" in name else (3e-3, 2.0 if name == "score.weight" else 0.0)
            assert rates.pop(id(parameter)) == wanted, name
    assert rates == {}


def test_states_that_will_change_are_neither_cached_nor_taken(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(loaded)
    rows = make_rows(texts)
    states = model.pooled_states(texts, rows["label"])
    with pytest.raises(ValueError, match="train_dataset holds pooled states, which change while the adapter is"):
        RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=states)
    with caplog.at_level(logging.INFO, logger="selfreg"):
        trainer = RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=rows)
    assert "states change with it, and are not cached" in caplog.text
    assert trainer.train_dataset is rows
    # A head over an adapter that stays is trained as over any frozen backbone.
    model.backbone.requires_grad_(False)
    before = snapshot(model.backbone)
    RegularizedTrainer(model=model, args=make_args(tmp_path), train_dataset=states).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert model.score.weight.abs().max() > 0


def test_loaded_adapter_is_trained_on_if_asked(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    make_model(loaded).save_pretrained(tmp_path / "m")
    model = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m", is_trainable=True)
    before = snapshot(model)
    fit(model, make_rows(texts), tmp_path / "t")
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_" in name)


def test_activation_checkpointing_changes_nothing(
    loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    weights = []
    for on in (False, True):
        model = make_model(loaded)
        fit(model, make_rows(texts), tmp_path, activation_checkpointing=on, num_train_epochs=1)
        weights.append(snapshot(model))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"r": 8, "lora_aplha": 16},
            r"lora: 'lora_aplha' is no field of peft.LoraConfig: did you mean 'lora_alpha'\?",
        ),
        ({"rank_of_it": 8, "zzz": 1}, "'rank_of_it' is no field of peft.LoraConfig"),
        (True, r"lora must be a mapping, such as {'r': 8}, or a peft.PeftConfig, not True"),
        ({"target_modules": ["query"]}, "the adapter does not fit LlamaModel: .*Its linear layers: down_proj, gate_p"),
        ({"r": 0}, "the adapter does not fit LlamaModel: .*r.* positive"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the backbone's own weights"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="FEATURE_EXTRACTION"), "adds tokens to the prompt"),
    ],
)
def test_bad_settings_are_named(lora: Any, message: str, extractor: HiddenStateExtractor) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(extractor, lora)


def test_backbone_that_has_an_adapter_already_is_refused(extractor: HiddenStateExtractor) -> None:
    extractor.backbone = make_model(extractor).backbone
    with pytest.raises(ValueError, match="the backbone of the extractor is a PeftModelForFeatureExtraction"):
        RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=2)


def test_parameters_outside_the_adapter_are_not_trained(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    model = make_model(loaded)
    model.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="the backbone has trainable parameters; selfreg trains the head, and an"):
        RegularizedTrainer(model=model, args=make_args(tmp_path))
    with pytest.raises(ValueError, match="only its name would be saved"):
        model.save_pretrained(tmp_path / "m")


def test_user_config_is_left_as_it_was(extractor: HiddenStateExtractor) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    make_model(extractor, config)
    assert (config.task_type, config.target_modules, config.base_model_name_or_path) == ("SEQ_CLS", {"q_proj"}, None)

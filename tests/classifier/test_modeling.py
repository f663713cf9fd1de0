from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from conftest import tiny_backbone, word_tokenizer
from helpers import make_classifier, make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedSequenceClassifierConfig,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.classifier.penalty import remove_features


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_backbone().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def loaded(folder: Path) -> HiddenStateExtractor:
    return HiddenStateExtractor.from_pretrained(str(folder), layer=1, max_length=32, template="seen today : {text} .")


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_removal_token_by_token_before_pooling(pooling: str, texts: list[str]) -> None:
    extractor = HiddenStateExtractor(
        tiny_backbone(),
        word_tokenizer(special=True),
        layer=1,
        pooling=pooling,
        max_length=32,
        name="t",  # type: ignore[arg-type]
    )
    model = make_classifier(extractor)
    states = model.pooled_states(texts, [0] * len(texts))
    for row, text in enumerate(texts[:15]):
        shard = next(iter(extractor.iterate([text])))
        h = shard.cls_states if pooling == "cls" else shard.hidden_states
        assert h is not None
        removed = remove_features(h, model.encoder_directions, model.encoder_bias, model.decoder_directions)
        wanted = {"mean": removed.mean(0), "last": removed[-1], "cls": removed[0]}[pooling]
        torch.testing.assert_close(states.pooled[row], wanted, rtol=1e-4, atol=1e-5)
        pre = shard.hidden_states @ model.encoder_directions.T + model.encoder_bias
        torch.testing.assert_close(states.activations[row], pre.relu().amax(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_removal_where_the_sae_normalises_each_state(norm: str, texts: list[str], tmp_path: Path) -> None:
    extractor = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=1, max_length=32, name="t")
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=24, k=4, input_norm=norm))
    sae.b_enc.data.normal_()
    sae.b_dec.data.normal_()
    sae.set_normalization(torch.randn(16) * 0.1, torch.tensor(1.3))
    ids = [3, 7, 20]
    unintended = UnintendedFeatures.from_ids(sae, ids)
    unintended.save_pretrained(tmp_path)
    assert UnintendedFeatures.from_pretrained(tmp_path).input_norm == norm
    model = RegularizedSequenceClassifier.from_backbone(extractor, sae, unintended, num_labels=2)
    states = model.pooled_states(texts, [0] * len(texts))
    for row, text in enumerate(texts[:15]):
        h = next(iter(extractor.iterate([text]))).hidden_states
        with torch.no_grad():
            pre = ((sae.normalize(h) - sae.b_dec) @ sae.W_enc[ids].T + sae.b_enc[ids]).relu()
            length = h.std(dim=1, keepdim=True) if norm == "layer_norm" else h.pow(2).mean(dim=1, keepdim=True).sqrt()
            removed = h - (pre * length) @ (sae.W_dec[ids] * sae.scale)
        assert (removed - h).abs().max() > 0.01
        torch.testing.assert_close(states.pooled[row], removed.mean(0), rtol=1e-4, atol=1e-4)
    # The same from the classifier alone, without the SAE.
    model.save_pretrained(tmp_path / "clf")
    plain = RegularizedSequenceClassifier.from_backbone(extractor, sae, None, num_labels=2)
    noted = plain.pooled_states(texts, [0] * len(texts), activations_of=model.unintended)
    torch.testing.assert_close(noted.activations, states.activations)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_states_from_texts_and_from_a_store_agree(pooling: str, texts: list[str], tmp_path: Path) -> None:
    extractor = HiddenStateExtractor(
        tiny_backbone(),
        word_tokenizer(special=True),
        layer=1,
        pooling=pooling,
        max_length=32,
        name="t",  # type: ignore[arg-type]
    )
    model = make_classifier(extractor)
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    labels = [0] * len(texts)
    a, b = model.pooled_states(texts, labels), model.pooled_states(store, labels)
    torch.testing.assert_close(a.pooled, b.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.activations, b.activations, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_and_pooled_states_give_the_same_logits(
    side: str, loaded: HiddenStateExtractor, texts: list[str]
) -> None:
    model = make_classifier(loaded)
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = side
    with torch.no_grad():
        from_text = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        from_states = model(pooled=model.pooled_states(texts, [0] * len(texts)).pooled).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(from_text, from_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_text, alone, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_as_in_training(loaded: HiddenStateExtractor) -> None:
    model = make_classifier(loaded)
    long = " ".join(["fever and cough"] * 40)
    with torch.no_grad():
        logits = model(**loaded.tokenizer(long, return_tensors="pt")).logits
        wanted = model(pooled=model.pooled_states([long], [0]).pooled).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save_backbone", [False, True])
def test_reloaded_gives_the_same_logits(
    save_backbone: bool, loaded: HiddenStateExtractor, folder: Path, texts: list[str], tmp_path: Path
) -> None:
    model = make_classifier(loaded)
    model.save_pretrained(tmp_path / "clf", save_backbone=save_backbone)
    files = {str(path.relative_to(tmp_path / "clf")) for path in (tmp_path / "clf").rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert ("backbone/model.safetensors" in files) == save_backbone
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert (tmp_path / "clf" / "model.safetensors").stat().st_size < 4000
    if save_backbone:
        for path in folder.iterdir():
            path.unlink()
    encoded = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**encoded).logits
        again = RegularizedSequenceClassifier.from_pretrained(tmp_path / "clf")
        auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "clf")
        for other in (again, auto):
            torch.testing.assert_close(other(**encoded).logits, wanted, rtol=0, atol=1e-6)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "clf"), RegularizedSequenceClassifierConfig)
    assert again.unintended.feature_ids == [3, 7, 11]
    assert again.unintended.reasons == ["named by id"] * 3
    assert torch.equal(again.decoder_directions, model.decoder_directions)


def test_pipeline(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(loaded)
    model.save_pretrained(tmp_path / "clf")
    classify = pipeline("text-classification", model=str(tmp_path / "clf"), device="cpu")
    out = classify(texts[:5], batch_size=2, top_k=None)
    with torch.no_grad():
        wanted = model(pooled=model.pooled_states(texts[:5], [0] * 5).pooled).logits.softmax(-1)
    for row, scores in zip(wanted, out, strict=True):
        for entry in scores:
            index = model.config.label2id[entry["label"]]
            assert entry["score"] == pytest.approx(row[index].item(), abs=1e-5)


def test_head_alone_takes_pooled_states(loaded: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    model = make_classifier(loaded)
    model.save_pretrained(tmp_path / "clf")
    head = RegularizedSequenceClassifier.from_pretrained(tmp_path / "clf", load_backbone_weights=False)
    pooled = model.pooled_states(texts, [0] * len(texts)).pooled
    torch.testing.assert_close(head(pooled=pooled).logits, model(pooled=pooled).logits)
    with pytest.raises(ValueError, match="without its backbone"):
        head(**loaded.tokenizer("a fever", return_tensors="pt"))
    with pytest.raises(ValueError, match="either input_ids or pooled"):
        head()


def test_missing_head_is_an_error(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_classifier(loaded).save_pretrained(tmp_path / "clf")
    path = tmp_path / "clf" / "model.safetensors"
    tensors = load_file(path)
    del tensors["score.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks score\.weight"):
        RegularizedSequenceClassifier.from_pretrained(tmp_path / "clf")


def test_what_does_not_belong_together_is_refused(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    sae = make_sae(extractor)
    unintended = UnintendedFeatures.from_ids(sae, [1])
    other_layer = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=2, name="tiny")
    with pytest.raises(ValueError, match="layer is 1 in the SAE and 2 in the extractor"):
        RegularizedSequenceClassifier.from_backbone(other_layer, sae, unintended, num_labels=2)
    with pytest.raises(ValueError, match="layer is 1 in the unintended features and 2"):
        RegularizedSequenceClassifier.from_backbone(other_layer, None, unintended, num_labels=2)
    wide = HiddenStateExtractor(tiny_backbone(hidden_size=32), word_tokenizer(), layer=1, name="tiny")
    with pytest.raises(ValueError, match="width 16, the extractor gives 32"):
        RegularizedSequenceClassifier.from_backbone(wide, sae, unintended, num_labels=2)
    with pytest.raises(ValueError, match="num_labels or id2label"):
        RegularizedSequenceClassifier.from_backbone(extractor, sae, unintended)
    model = RegularizedSequenceClassifier.from_backbone(extractor, sae, unintended, num_labels=2)
    with pytest.raises(ValueError, match="layer is 2 in the store .* and 1 in the classifier"):
        model.pooled_states(other_layer.extract(texts, tmp_path / "s"), [0] * len(texts))


def test_frozen_backbone_stays_in_evaluation_mode() -> None:
    backbone = tiny_backbone("bert").requires_grad_(False)
    extractor = HiddenStateExtractor(backbone, word_tokenizer(special=True), layer=1, name="t")
    model = RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=2).train()
    assert model.training
    assert not backbone.training


def test_empty_text_is_refused(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    model = make_classifier(loaded)
    model.save_pretrained(tmp_path / "m")
    classify = pipeline("text-classification", str(tmp_path / "m"))
    assert classify("a fever")
    with pytest.raises(ValueError, match="text 0 of the batch is empty"):
        classify("")


def test_upload_holds_tokenizer_and_backbone(
    loaded: HiddenStateExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **_kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def list_repo_files(self, repo_id: str, **_kwargs: Any) -> list[str]:
            return []

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> None:
            sent.update(repo_id=repo_id, names={operation.path_in_repo for operation in operations}, **kwargs)

    monkeypatch.setattr("selfreg.utils.hub.HfApi", Api)
    make_classifier(loaded).save_pretrained(
        tmp_path / "m", save_backbone=True, push_to_hub=True, token="t", commit_message="first"
    )
    assert (sent["repo_id"], sent["token"], sent["commit_message"]) == ("me/m", "t", "first")
    assert {"config.json", "model.safetensors", "tokenizer.json", "backbone/model.safetensors"} <= sent["names"]


def test_options_of_the_backbone_reach_it(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    make_classifier(loaded).save_pretrained(tmp_path / "m", save_backbone=True)
    model = RegularizedSequenceClassifier.from_pretrained(
        tmp_path / "m", attn_implementation="eager", dtype=torch.bfloat16
    )
    assert model.backbone is not None
    assert model.backbone.config._attn_implementation == "eager"
    assert (model.backbone.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)

"""The checks that transformers runs on its own models, on both of selfreg's."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from conftest import tiny_backbone, word_tokenizer
from helpers import make_classifier, make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    SAEForFeatureExtraction,
)
from selfreg.activations import backbone as backbone_module

TEXTS = ["the patient has a fever", "ill", "she was seen today with pain in chest and a cough", "he feels very well ."]


@pytest.fixture
def loaded(tmp_path: Path) -> HiddenStateExtractor:
    tiny_backbone().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    return HiddenStateExtractor.from_pretrained(str(tmp_path / "tiny"), layer=1, max_length=32)


@pytest.fixture(params=["sae", "classifier", "classifier, adapted"])
def model(request: pytest.FixtureRequest, loaded: HiddenStateExtractor) -> Any:
    if request.param == "sae":
        return make_sae(loaded).eval()
    torch.manual_seed(0)
    return make_classifier(loaded, lora={"r": 2} if "adapted" in request.param else None)


def inputs_of(model: Any, texts: list[str] = TEXTS, side: str = "right") -> dict[str, torch.Tensor]:
    if isinstance(model, SAEForFeatureExtraction):
        return {"hidden_states": torch.randn(len(texts), 7, 16, generator=torch.Generator().manual_seed(0))}
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


def output_of(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**(inputs or inputs_of(model)))
    return (outputs.reconstruction if isinstance(model, SAEForFeatureExtraction) else outputs.logits).float()


def reload(model: Any, folder: Path, **kwargs: Any) -> Any:
    return type(model).from_pretrained(folder, **kwargs)


def test_saved_and_loaded_is_the_same(model: Any, tmp_path: Path) -> None:
    wanted = output_of(model)
    model.save_pretrained(tmp_path / "m")
    loaded = reload(model, tmp_path / "m")
    assert not loaded.training
    assert torch.equal(output_of(loaded), wanted)
    # Once more: what was loaded saves the same files.
    loaded.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("m", "again")]
    assert configs[0] == configs[1]


def test_safetensors_and_nothing_that_can_run_code(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    written = {path.suffix for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert written <= {".safetensors", ".json", ".txt", ".jinja"}, written


def test_config_goes_there_and_back(model: Any, tmp_path: Path) -> None:
    config = model.config
    config.save_pretrained(tmp_path)
    for found in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(found) is type(config)
        assert {**found.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert type(config)().to_dict() == type(config).from_dict(type(config)().to_dict()).to_dict()


def test_auto_classes(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    auto: Any = AutoModel if isinstance(model, SAEForFeatureExtraction) else AutoModelForSequenceClassification
    found = auto.from_pretrained(tmp_path / "m")
    assert type(found) is type(model)
    assert torch.equal(output_of(found), output_of(model))
    fresh = auto.from_config(model.config)
    assert type(fresh) is type(model)


def test_the_same_input_gives_the_same_output(model: Any) -> None:
    assert torch.equal(output_of(model), output_of(model))
    assert torch.equal(output_of(copy.deepcopy(model)), output_of(model))


def test_a_batch_says_what_its_rows_say(model: Any) -> None:
    together = output_of(model)
    if isinstance(model, SAEForFeatureExtraction):
        states = inputs_of(model)["hidden_states"]
        alone = torch.cat([output_of(model, {"hidden_states": row.unsqueeze(0)}) for row in states])
    else:
        alone = torch.cat([output_of(model, inputs_of(model, [text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_padding_says_nothing(loaded: HiddenStateExtractor) -> None:
    model = make_classifier(loaded)
    wanted = output_of(model)
    torch.testing.assert_close(output_of(model, inputs_of(model, side="left")), wanted, atol=1e-5, rtol=1e-5)
    longer = {name: torch.nn.functional.pad(values, (0, 9)) for name, values in inputs_of(model).items()}
    # Whatever stands under the mask.
    longer["input_ids"][longer["attention_mask"] == 0] = 7
    torch.testing.assert_close(output_of(model, longer), wanted, atol=1e-5, rtol=1e-5)
    alone = inputs_of(model, TEXTS[:1])
    torch.testing.assert_close(
        output_of(model, {"input_ids": alone["input_ids"]}), output_of(model, alone), atol=0, rtol=0
    )


def test_a_tuple_where_it_is_asked_for(loaded: HiddenStateExtractor) -> None:
    for model in (make_classifier(loaded), make_sae(loaded)):
        inputs = inputs_of(model)
        named, plain = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(plain, tuple)
        for ours, theirs in zip(plain, named.to_tuple(), strict=True):
            for a, b in zip(_tensors(ours), _tensors(theirs), strict=True):
                assert torch.equal(a, b)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [part for part in value if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["cast", "loaded"])
def test_half_precision_is_close(model: Any, dtype: torch.dtype, how: str, tmp_path: Path) -> None:
    wanted = output_of(model)
    model.save_pretrained(tmp_path / "m")
    half = reload(model, tmp_path / "m", dtype=dtype) if how == "loaded" else reload(model, tmp_path / "m").to(dtype)
    inputs = inputs_of(half)
    if isinstance(half, SAEForFeatureExtraction):
        inputs = {name: values.to(dtype) for name, values in inputs.items()}
    found = output_of(half, inputs)
    assert torch.isfinite(found).all()
    # Of a TopK SAE the smallest active features may be others.
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_dtype_auto_is_as_it_was_saved(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    make_sae(loaded).to(torch.bfloat16).save_pretrained(tmp_path / "sae")
    assert SAEForFeatureExtraction.from_pretrained(tmp_path / "sae", dtype="auto").dtype == torch.bfloat16
    assert SAEForFeatureExtraction.from_pretrained(tmp_path / "sae").dtype == torch.float32
    make_classifier(loaded).save_pretrained(tmp_path / "clf")
    classifier = RegularizedSequenceClassifier.from_pretrained(tmp_path / "clf", dtype="auto")
    assert classifier.backbone.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(model: Any, device_map: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    found = reload(model, tmp_path / "m", device_map=device_map)
    assert torch.equal(output_of(found), output_of(model))


def test_what_is_of_the_backbone_reaches_it_alone(
    loaded: HiddenStateExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_classifier(loaded).save_pretrained(tmp_path / "m")
    given: list[dict[str, Any]] = []
    original: Callable[..., PreTrainedModel] = AutoModel.from_pretrained

    def seen(path: str, **kwargs: Any) -> PreTrainedModel:
        given.append(dict(kwargs))
        kwargs.pop("quantization_config", None)
        return original(path, **kwargs)

    monkeypatch.setattr(backbone_module.AutoModel, "from_pretrained", seen)
    config = object()
    options: dict[str, Any] = {"quantization_config": config, "attn_implementation": "eager"}
    model = RegularizedSequenceClassifier.from_pretrained(tmp_path / "m", **options)
    assert model.backbone.config._attn_implementation == "eager"
    name = str(loaded.spec.model)
    HiddenStateExtractor.from_pretrained(name, layer=1, model_kwargs={**options, "device_map": "cpu"})
    assert len(given) == 2
    assert all(kwargs["quantization_config"] is config for kwargs in given)
    assert given[-1]["device_map"] == "cpu"


def test_new_weights_are_started_and_loaded_ones_are_not(model: Any, tmp_path: Path) -> None:
    fresh = type(model)(model.config)
    if isinstance(model, SAEForFeatureExtraction):
        assert torch.allclose(fresh.decoder_directions.norm(dim=1), torch.ones(40) * fresh.scale, atol=1e-5)
        assert float(fresh.b_enc.detach().abs().max()) == 0
    else:
        assert float(fresh.score.weight.detach().abs().max()) == 0
    model.save_pretrained(tmp_path / "m")
    with torch.device("meta"):
        on_meta = type(model)(model.config)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_no_generation_and_no_embeddings_to_resize(loaded: HiddenStateExtractor) -> None:
    classifier, sae = make_classifier(loaded), make_sae(loaded)
    for model in (classifier, sae):
        assert not model.can_generate()
        assert model.get_output_embeddings() is None
        model.tie_weights()
    assert classifier.get_input_embeddings() is classifier.backbone.get_input_embeddings()
    with pytest.raises(ValueError, match="resize and save the backbone first"):
        classifier.resize_token_embeddings(99)
    assert sae.num_parameters() == sum(parameter.numel() for parameter in sae.parameters())


def test_pipeline_as_of_any_model(loaded: HiddenStateExtractor, tmp_path: Path) -> None:
    model = make_classifier(loaded)
    model.save_pretrained(tmp_path / "m")
    classify = pipeline("text-classification", str(tmp_path / "m"), device="cpu")
    scores = output_of(model).softmax(dim=1)
    everything = classify(TEXTS, top_k=None)
    for row, wanted in zip(everything, scores, strict=True):
        found = {entry["label"]: entry["score"] for entry in row}
        assert [found[name] for name in ("well", "ill", "very ill")] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert [entry["score"] for entry in row] == sorted(found.values(), reverse=True)
    best = classify(TEXTS)
    assert [row["label"] for row in best] == [row[0]["label"] for row in everything]
    assert [len(row) for row in classify(TEXTS, top_k=2)] == [2] * len(TEXTS)
    for size in (1, 3):
        assert [row["score"] for row in classify(TEXTS, batch_size=size)] == pytest.approx(
            [row["score"] for row in best], abs=1e-5
        )
    long = "fever " * 200
    # Cut as in training, whether the tokenizer cuts too or not.
    assert classify(long)[0]["score"] == pytest.approx(
        classify(long, truncation=True, max_length=64)[0]["score"], abs=1e-6
    )
    raw = classify(TEXTS[0], function_to_apply="none", top_k=None)
    assert {entry["label"]: entry["score"] for entry in raw} == pytest.approx(
        dict(zip(("well", "ill", "very ill"), output_of(model)[0].tolist(), strict=True)), abs=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    given = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert given(TEXTS[0])[0]["score"] == pytest.approx(best[0]["score"], abs=1e-6)

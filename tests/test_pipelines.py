"""The pipeline that tells the active features of a text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from conftest import tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import FeatureCatalog, HiddenStateExtractor, SAEForFeatureExtraction
from selfreg.pipelines import TASK


@pytest.fixture(params=["llama", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An SAE and the backbone that it names."""
    special = request.param == "bert"
    tiny_backbone(request.param).save_pretrained(tmp_path / "backbone")
    word_tokenizer(special=special).save_pretrained(tmp_path / "backbone")
    extractor = HiddenStateExtractor.from_pretrained(str(tmp_path / "backbone"), layer=1, max_length=12)
    sae = make_sae(extractor)
    with torch.no_grad():
        sae.b_enc.add_(0.5)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def expected(folder: Path, text: str) -> tuple[torch.Tensor, list[str]]:
    """Activations of all features at every token that counts, and the tokens."""
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    extractor = HiddenStateExtractor.from_sae(sae)
    shard = next(iter(extractor.iterate([text])))
    words = [extractor.tokenizer.decode([token]) for token in shard.token_ids.tolist()]
    return sae.encode(shard.hidden_states).to_dense().detach(), words


def test_features_of_a_text(folder: Path, texts: list[str]) -> None:
    features = pipeline(TASK, str(folder), device="cpu")
    for text in texts[:8]:
        dense, words = expected(folder, text)
        found = features(text, top_k=None)
        assert {row["feature"] for row in found} == set((dense > 0).any(dim=0).nonzero().flatten().tolist())
        assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
        for row in found:
            column = dense[:, row["feature"]]
            assert row["score"] == pytest.approx(float(column.max()), abs=1e-5)
            assert row["word"] == text[row["start"] : row["end"]] == words[int(column.argmax())]
            assert row["label"] == f"feature {row['feature']}"
        assert features(text, top_k=2) == found[:2]
        assert features(text) == found[:10]


def test_batches_say_the_same(folder: Path, texts: list[str]) -> None:
    alone = pipeline(TASK, str(folder), device="cpu")
    for side in ("left", "right"):
        batched = pipeline(TASK, str(folder), device="cpu", batch_size=7, top_k=3)
        batched.tokenizer.padding_side = side
        for one, many in zip(alone(texts, top_k=3), batched(texts), strict=True):
            assert [row["feature"] for row in many] == [row["feature"] for row in one]
            assert [row["score"] for row in many] == pytest.approx([row["score"] for row in one], abs=1e-5)


def test_tokenizer_without_a_pad_token(extractor: HiddenStateExtractor, texts: list[str]) -> None:
    extractor.tokenizer.pad_token = None
    features = pipeline(TASK, make_sae(extractor), extractor=extractor, batch_size=4, device="cpu")
    assert len(features(texts)) == len(texts)
    assert extractor.tokenizer.pad_token is None


def test_names_from_a_catalogue(folder: Path, texts: list[str], tmp_path: Path) -> None:
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    extractor = HiddenStateExtractor.from_sae(sae)
    catalog = FeatureCatalog.build(sae, extractor, texts)
    feature = pipeline(TASK, sae, extractor=extractor, device="cpu")(texts[0], top_k=1)[0]["feature"]
    catalog.records[feature] = replace(catalog[feature], explanation="mentions of fever")
    catalog.save_pretrained(tmp_path / "catalog")
    for given in (catalog, str(tmp_path / "catalog")):
        named: Any = pipeline(TASK, sae, extractor=extractor, catalog=given, device="cpu")
        assert named(texts[0], top_k=1)[0]["label"] == "mentions of fever"
    torch.manual_seed(1)
    other = SAEForFeatureExtraction(sae.config)
    with pytest.raises(ValueError, match="built from another SAE"):
        pipeline(TASK, other, extractor=extractor, catalog=catalog, device="cpu")


def test_bad_input(folder: Path, extractor: HiddenStateExtractor) -> None:
    features = pipeline(TASK, str(folder), device="cpu")
    with pytest.raises(ValueError, match="is empty"):
        features("  ")
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        features("fever", top_k=0)
    with pytest.raises(ValueError, match="does not know aggregation"):
        features("fever", aggregation="max")
    sae = SAEForFeatureExtraction.from_pretrained(folder)
    name = sae.config.base_model_name_or_path
    other = HiddenStateExtractor(extractor.backbone, extractor.tokenizer, layer=2, max_length=12, name=name)
    with pytest.raises(ValueError, match="layer is 1 in the SAE and 2 in the extractor"):
        pipeline(TASK, sae, extractor=other, device="cpu")
    sae.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="does not name its backbone"):
        pipeline(TASK, sae, device="cpu")

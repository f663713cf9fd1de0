import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from conftest import WORDS, tiny_backbone, word_tokenizer
from selfreg import FeatureCatalog, HiddenStateExtractor, SAEConfig, SAEForFeatureExtraction
from selfreg.activations.conversation import CHAT, render
from selfreg.activations.store import StoreShard
from selfreg.features.activations import EncodedChunk, largest_activations
from selfreg.features.chat import Choice, Conversation
from selfreg.features.collect import Evidence, TextSample
from selfreg.features.directions import promoted_tokens, unembedding_of
from selfreg.features.records import Score
from selfreg.features.spans import cut_spans
from selfreg.sae.configuration import ACTIVATION_NAMES


@pytest.fixture
def sae(extractor: HiddenStateExtractor) -> SAEForFeatureExtraction:
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.zeros(16), torch.tensor(0.1))
    return sae


def _dense(sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, text: str) -> torch.Tensor:
    shard = next(iter(extractor.iterate([text])))
    return sae.encode(shard.hidden_states).to_dense()


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_top_texts_equal_brute_force(
    activation: str,
    extractor: HiddenStateExtractor,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # States differ in how many features they have, and so do the chunks of a shard.
    monkeypatch.setattr("selfreg.features.activations._CHUNK", 7)
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4, activation=activation))
    sae.config.set_hidden_state_spec(extractor.spec)
    sae.set_normalization(torch.zeros(16), torch.tensor(0.1))
    if sae.activation.threshold != "none":
        sae.threshold.data.fill_(0.2)
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    catalog = FeatureCatalog.build(sae, extractor, texts, top_k=5, store=store)
    dense = [_dense(sae, extractor, text) for text in texts]
    maxima = torch.stack([part.amax(0) for part in dense])
    torch.testing.assert_close(largest_activations(sae, store), maxima, rtol=1e-4, atol=1e-5)
    everything = torch.cat(dense)
    for record in catalog:
        column = maxima[:, record.feature]
        wanted = column[column > 0].sort(descending=True).values[:5]
        got = torch.tensor([span.activation for span in record.spans])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert len({span.text_id for span in record.spans}) == len(record.spans)
        for span in record.spans:
            peak = dense[span.text_id][:, record.feature]
            assert peak[span.position].item() == pytest.approx(peak.max().item(), rel=1e-4)
        active = everything[:, record.feature]
        assert record.density == pytest.approx((active > 0).float().mean().item())
        if record.density:
            assert record.mean_activation == pytest.approx(active[active > 0].mean().item(), rel=1e-4)


def test_same_from_texts_and_from_a_store(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    from_store = FeatureCatalog.build(sae, extractor, texts, store=store)
    from_texts = FeatureCatalog.build(sae, extractor, texts)
    for a, b in zip(from_store, from_texts, strict=True):
        assert [span.text_id for span in a.spans] == [span.text_id for span in b.spans]


def test_duplicates_count_once(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, [*texts, *texts])
    for record in catalog:
        assert all(span.text_id < len(texts) for span in record.spans)


def test_span_is_cut_from_the_text_and_marks_its_peak(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor
) -> None:
    text = "the  patient\nhas a FEVER , and cough today with pain in chest and nausea and rash and headache"
    catalog = FeatureCatalog.build(sae, extractor, [text, "she is well"])
    words = text.split()
    spans = [span for record in catalog for span in record.spans if span.text_id == 0]
    assert spans
    for span in spans:
        assert str(span) in text
        assert span.peak == words[span.position]
        assert span.marked() == f"{span.before}<<{span.peak}>>{span.after}"


def test_multibyte_characters_stay_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    backbone = tiny_backbone()
    backbone.resize_token_embeddings(len(alphabet))
    extractor = HiddenStateExtractor(
        backbone, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!"), layer=1, max_length=64, name="b"
    )
    torch.manual_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=16, num_features=40, k=4))
    text = "naïve 患者 fièvre 🤒 élevée"
    peaks = {span.peak for record in FeatureCatalog.build(sae, extractor, [text]) for span in record.spans}
    assert peaks
    assert all(peak in text and "\ufffd" not in peak for peak in peaks)
    assert peaks & {"患", "者", "🤒", "ï", "è", "é"}


def test_saved_and_loaded(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts)
    catalog.update(3, explanation="fever", explanation_verdict="Yes", verdict="No", verdict_probabilities={"No": 0.9})
    catalog.save_pretrained(tmp_path / "c")
    again = FeatureCatalog.from_pretrained(tmp_path, subfolder="c")
    assert again.records == catalog.records
    assert (again.spec, again.info) == (catalog.spec, catalog.info)
    table = pq.read_table(tmp_path / "c" / "features.parquet")
    assert table.num_rows == 40
    again.check_sae(sae)
    with torch.no_grad():
        sae.b_enc += 0.1
    with pytest.raises(ValueError, match="another SAE"):
        again.check_sae(sae)
    with pytest.raises(FileNotFoundError, match="not a feature catalogue"):
        FeatureCatalog.from_pretrained(tmp_path)


def test_unintended_are_the_explained_and_not_legitimate(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts)
    with pytest.raises(ValueError, match="no feature has a verdict"):
        catalog.unintended()
    for feature, (explained, verdict) in enumerate(
        [("Yes", "No"), ("Probably", "Maybe"), ("Yes", "Yes"), ("Yes", "Probably"), ("Maybe", "No"), ("No", "No")]
    ):
        catalog.update(
            feature,
            explanation="x",
            explanation_verdict=explained,
            verdict=verdict,
            verdict_probabilities={"No": 0.5 + feature / 10},
            decided_by="m",
        )
    chosen = catalog.unintended()
    assert chosen.feature_ids == [1, 0]
    assert chosen.reasons[1] == "judged No by m: x"
    assert catalog.unintended(max_features=1).feature_ids == [1]


def test_what_does_not_fit_is_refused(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    store = extractor.extract(texts, tmp_path / "s")
    with pytest.raises(ValueError, match="made from other texts"):
        FeatureCatalog.build(sae, extractor, texts[1:], store=store)
    with pytest.raises(ValueError, match="text 1 is empty"):
        FeatureCatalog.build(sae, extractor, ["a", ""])
    with pytest.raises(ValueError, match="top_k=0"):
        FeatureCatalog.build(sae, extractor, texts, top_k=0)
    other = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=2, name="tiny")
    with pytest.raises(ValueError, match="layer is 1 in the SAE and 2 in the extractor"):
        FeatureCatalog.build(sae, other, texts)


def test_saving_leaves_other_files_alone_and_a_mixture_is_found_out(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("a note")
    FeatureCatalog.build(sae, extractor, texts).save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "a note"
    FeatureCatalog.build(sae, extractor, texts[:30]).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "features.parquet", tmp_path)
    with pytest.raises(ValueError, match="are of two catalogues: saving was cut short"):
        FeatureCatalog.from_pretrained(tmp_path)


def test_store_of_another_layer_is_refused(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    other = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=2, max_length=32, name="tiny")
    store = other.extract(texts, tmp_path / "s")
    with pytest.raises(ValueError, match="layer is 2 in the store .* and 1 in the extractor"):
        FeatureCatalog.build(sae, extractor, texts, store=store)


class FailingChat:
    """Answers 38 conversations, then its server is gone."""

    name = "failing"

    def __init__(self) -> None:
        self.left = 38

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        self.left -= len(conversations)
        if self.left < 0:
            raise ConnectionError("gone")
        return ["a word"] * len(conversations)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        return [Choice("Yes", {option: float(option == "Yes") for option in options}) for _ in conversations]


def test_answers_before_a_failure_are_kept_without_a_cache(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts)
    with pytest.raises(ValueError, match="no feature has an explanation that describes its spans: call explain"):
        catalog.judge(FailingChat(), "a rubric")
    with pytest.raises(ConnectionError):
        catalog.explain(FailingChat())
    assert sum(record.explained for record in catalog) == 32


def test_unknown_features_are_named(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts)
    with pytest.raises(ValueError, match=r"features \[999\] are not there: the catalogue has 0 to 39"):
        catalog.explain(FailingChat(), features=[3, 999])


def test_evidence_beyond_the_strongest_texts(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, [*texts, texts[0]], top_k=3)
    dense = torch.stack([_dense(sae, extractor, text).amax(0) for text in texts])
    words = {text_id: text.split() for text_id, text in enumerate(texts)}
    assert any(record.near_misses for record in catalog)
    for record in catalog:
        activations = dense[:, record.feature]
        assert record.num_texts == int((activations > 0).sum())
        shown = {span.text_id for span in record.spans}
        drawn = [span for part in record.quantile_spans for span in part]
        assert len({span.text_id for span in drawn} | shown) == len(drawn) + len(shown)
        assert all(len(part) <= 5 for part in record.quantile_spans)
        if record.num_texts <= 20:  # then the quarters hold all that are not shown
            assert len(drawn) == record.num_texts - len(shown)
        for span in drawn:
            assert span.activation == pytest.approx(activations[span.text_id].item(), rel=1e-4)
        parts = [[span.activation for span in part] for part in record.quantile_spans if part]
        for weaker, stronger in itertools.pairwise(parts):
            assert max(weaker) <= min(stronger)
        peaks = {words[span.text_id][span.position] for span in record.spans}
        for span in record.near_misses:
            assert activations[span.text_id] == 0
            assert span.activation == 0
            assert words[span.text_id][span.position] in peaks
        for span in record.silent_spans:
            assert activations[span.text_id] == 0
        assert not {s.text_id for s in record.near_misses} & {s.text_id for s in record.silent_spans}


def test_shares_by_label_and_group(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    labels = ["ill" if i % 3 else "well" for i in range(len(texts))]
    groups = [None if i % 5 == 0 else i % 2 for i in range(len(texts))]
    catalog = FeatureCatalog.build(sae, extractor, texts, labels=labels, groups=groups)
    active = torch.stack([_dense(sae, extractor, text).amax(0) > 0 for text in texts])
    for record in catalog:
        column = active[:, record.feature]
        for name in ("ill", "well"):
            members = [i for i, label in enumerate(labels) if label == name]
            assert record.label_shares[name] == pytest.approx(column[members].double().mean().item())
        for name in ("0", "1"):
            members = [i for i, group in enumerate(groups) if str(group) == name]
            assert record.group_shares[name] == pytest.approx(column[members].double().mean().item())
    with pytest.raises(ValueError, match="there are 1 labels for 60 texts"):
        FeatureCatalog.build(sae, extractor, texts, labels=["x"])


def test_neighbours_and_promoted_tokens(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts)
    # The tiny backbone's head is not tied and not there.
    assert all(record.promoted_tokens == [] for record in catalog)
    alive = [record.feature for record in catalog if record.spans]
    unit = torch.nn.functional.normalize(sae.decoder_directions.detach(), dim=1)
    for record in catalog:
        if not record.spans:
            continue
        others = [feature for feature in alive if feature != record.feature]
        cosines = (unit[others] @ unit[record.feature]).sort(descending=True).values[:5]
        torch.testing.assert_close(torch.tensor([near.cosine for near in record.nearest]), cosines, rtol=0, atol=1e-3)
    extractor.backbone.config.tie_word_embeddings = True
    tied = FeatureCatalog.build(sae, extractor, texts)
    embeddings = extractor.backbone.get_input_embeddings().weight
    for record in tied:
        if record.spans:
            best = int((embeddings @ sae.decoder_directions[record.feature]).argmax())
            assert record.promoted_tokens[0] == extractor.tokenizer.convert_ids_to_tokens(best)


def test_head_of_an_untied_backbone_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    found = unembedding_of(AutoModel.from_pretrained(tmp_path / "m"), 16)
    assert found is not None
    torch.testing.assert_close(found, model.lm_head.weight)
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    found = unembedding_of(AutoModel.from_pretrained(tmp_path / "shards"), 16)
    assert found is not None
    torch.testing.assert_close(found, model.lm_head.weight)
    assert unembedding_of(tiny_backbone("bert"), 16) is None


def test_memory_is_of_peaks_and_not_of_texts(
    sae: SAEForFeatureExtraction,
    extractor: HiddenStateExtractor,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("selfreg.features.collect._WAITING", 100)
    monkeypatch.setattr("selfreg.features.collect._SAMPLED_TEXTS", 20)
    held = []
    for rounds in (2, 6):
        many = [f"{text} {word}" for word in WORDS[:rounds] for text in texts]
        evidence = Evidence(40, torch.ones(len(many), dtype=torch.bool), top_k=3, mean_tokens=10)
        for shard in extractor.iterate(many, shard_tokens=200):
            evidence.update(sae, shard)
        evidence.finish()
        kept = [tensor for peaks in (evidence.top, evidence.drawn) for tensor in vars(peaks).values()]
        held.append(sum(value.numel() for value in kept if isinstance(value, torch.Tensor)))
        assert not evidence.top._waiting
        assert evidence.sample.active.shape == (5, 20)
    assert held[0] == held[1] == 5 * 40 * (3 + 3 + 4 * 5)


def test_near_misses_are_of_different_texts(extractor: HiddenStateExtractor) -> None:
    sample = TextSample(np.arange(50), 50, 8)
    for text in range(50):
        values = torch.zeros(10, 1)
        chunk = EncodedChunk(text, 1, slice(0, 10), torch.zeros(10, dtype=torch.long), values, values.long(), 8)
        tokens = torch.tensor([7] * 9 + [9 + text % 2], dtype=torch.int32)
        shard = StoreShard(text, text + 1, torch.zeros(10, 2), torch.full((10,), text), torch.arange(10), tokens)
        sample.add(chunk, shard, torch.zeros(1, 8, dtype=torch.bool), torch.tensor([10]))
    sample.finish()
    silent = sample.silent(3)
    assert silent.all()
    misses = sample.near_misses(silent, [7, 9], 8)
    assert len({text for text, _ in misses}) == 8
    assert sum(position == 9 for _, position in misses) == 4  # the tokens take turns
    assert len(sample.near_misses(silent, [10], 60)) == 25
    assert sample.near_misses(silent, [11], 8) == []


@pytest.mark.parametrize("texts_and_peaks", [3, 40])
def test_many_long_texts_are_cut_a_few_at_a_time(
    texts_and_peaks: int, extractor: HiddenStateExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfreg.features.spans._BATCH_CHARACTERS", 20)
    texts = [f"the man {WORDS[i % len(WORDS)]}" for i in range(texts_and_peaks)]
    peaks = [(text, position) for text in range(texts_and_peaks) for position in (0, 1)]
    cuts = list(cut_spans(extractor, texts, peaks))
    assert [peak for _, peak, _ in cuts] == ["the", "man"] * texts_and_peaks


def test_vocabularies_that_do_not_fit(extractor: HiddenStateExtractor, texts: list[str]) -> None:
    tokenizer = extractor.tokenizer
    padded = torch.cat([torch.eye(16)[torch.arange(len(tokenizer)) % 16], torch.full((30, 16), 9.0)])
    found = promoted_tokens(torch.eye(16), [0, 1], padded, tokenizer)
    assert all(token is not None for tokens in found.values() for token in tokens)
    assert len(promoted_tokens(torch.eye(16), [0], padded[:4], tokenizer)[0]) == 4
    backbone = tiny_backbone()
    backbone.config.tie_word_embeddings = True
    assert unembedding_of(backbone, 16) is not None
    assert unembedding_of(backbone, 12) is None


def test_shares_of_too_many_groups_are_refused(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    many = [*texts, *texts, *texts, *texts]
    with pytest.raises(ValueError, match="there are 240 different groups, such as '0': shares are kept for up to 200"):
        FeatureCatalog.build(sae, extractor, many, groups=range(240))


def test_a_folder_is_a_data_set(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts, labels=["a", "b"] * 30)
    catalog.update(
        3,
        explanation="fever",
        explanation_verdict="Yes",
        scores={"probe": Score(0.75, 0.6, 0.9, 4, 5)},
    )
    catalog.decide(3, "no", by="Ada", reason="it is the season")
    catalog.save_pretrained(tmp_path / "c")
    rows = datasets.load_dataset(str(tmp_path / "c"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 40
    assert rows[3]["explanation"] == "fever"
    assert rows[3]["probe_score"]["balanced_accuracy"] == 0.75
    assert rows[3]["votes"][0]["judge"] == "Ada"
    assert rows[3]["verdict"] == "No"
    assert FeatureCatalog.from_pretrained(tmp_path / "c").records == catalog.records
    (tmp_path / "c" / "README.md").write_text("my own")
    catalog.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "README.md").read_text() == "my own"


def test_pushed_as_a_data_set(
    sae: SAEForFeatureExtraction,
    extractor: HiddenStateExtractor,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            sent.update(kwargs)
            return SimpleNamespace(repo_id=repo_id)

        def list_repo_files(self, repo_id: str, **_kwargs: Any) -> list[str]:
            return []

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> None:
            (tmp_path / "sent").mkdir()
            for operation in operations:
                given, target = operation.path_or_fileobj, tmp_path / "sent" / operation.path_in_repo
                target.write_bytes(given if isinstance(given, bytes) else Path(given).read_bytes())
            sent.update(repo_id=repo_id, **kwargs)

    monkeypatch.setattr("selfreg.utils.hub.HfApi", Api)
    catalog = FeatureCatalog.build(sae, extractor, texts)
    catalog.push_to_hub("me/features", private=True, token="t")
    assert (sent["repo_id"], sent["repo_type"], sent["private"], sent["token"]) == (
        "me/features",
        "dataset",
        True,
        "t",
    )
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {"README.md", "catalog.json", "features.parquet"}
    assert 'from_pretrained("me/features")' in (tmp_path / "sent" / "README.md").read_text()
    assert FeatureCatalog.from_pretrained(tmp_path / "sent").records == catalog.records
    with pytest.raises(OSError, match="me/features is no folder .* and HF_HUB_OFFLINE is set"):
        FeatureCatalog.from_pretrained("me/features")


def test_a_catalogue_of_an_older_format_is_told(
    sae: SAEForFeatureExtraction, extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    catalog = FeatureCatalog.build(sae, extractor, texts[:3])
    catalog.info["format_version"] = 1  # what is in `info` goes last into the file
    catalog.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a catalogue of format 1, this selfreg reads 2: build it again"):
        FeatureCatalog.from_pretrained(tmp_path)


@pytest.mark.parametrize("max_length", [64, 9])
def test_spans_of_conversations_are_of_the_reply(max_length: int) -> None:
    tokenizer = word_tokenizer(special=True)
    tokenizer.add_tokens([":"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ' he : ' if m.role == 'user' else ' she : ' }}{{ m.content }} </s>"
        "{% endfor %}"
    )
    backbone = tiny_backbone()
    backbone.resize_token_embeddings(len(tokenizer))
    chat = HiddenStateExtractor(backbone, tokenizer, layer=1, max_length=max_length, template=CHAT, name="tiny")
    turns = [{"role": "user", "content": "pain in chest today"}, {"role": "assistant", "content": "very ill and well"}]
    text = render(tokenizer, turns)
    start, end = chat.tokenize([text])[0][1:]
    cuts = list(cut_spans(chat, [text], [(0, position) for position in range(start, end)]))
    assert [peak for _, peak, _ in cuts] == ["very", "ill", "and", "well"][: end - start]
    assert end - start >= 3
    assert all("pain" not in before for before, _, _ in cuts)

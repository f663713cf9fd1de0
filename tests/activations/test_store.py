import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import tiny_backbone, word_tokenizer
from selfreg import ActivationStore, HiddenStateExtractor
from selfreg.activations import store as store_module
from selfreg.activations.writer import StoreWriter


def test_store_holds_every_text_token_once(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    assert len(store.manifest["shards"]) > 3
    counts = torch.zeros(len(texts), dtype=torch.long)
    for shard in store.shards():
        for text_id in range(shard.first_text, shard.end_text):
            rows = shard.text_ids == text_id
            counts[text_id] = rows.sum()
            ids = extractor.tokenizer(texts[text_id])["input_ids"]
            assert shard.token_ids[rows].tolist() == ids
            assert shard.positions[rows].tolist() == list(range(len(ids)))
            single = next(iter(extractor.iterate([texts[text_id]])))
            torch.testing.assert_close(shard.hidden_states[rows], single.hidden_states, rtol=1e-5, atol=1e-6)
    assert counts.sum() == len(store)
    assert (counts > 0).all()


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooling_from_a_store_is_pooling_from_text(texts: list[str], tmp_path: Path, pooling: str) -> None:
    extractor = HiddenStateExtractor(
        tiny_backbone(),
        word_tokenizer(special=True),
        layer=1,
        max_length=32,
        pooling=pooling,  # type: ignore[arg-type]
    )
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    torch.testing.assert_close(store.pool(pooling), extractor.pool(texts), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_cls_states_need_a_store_for_cls(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cls states"):
        extractor.extract(texts, tmp_path / "s").pool("cls")


def test_rows_in_any_order(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    store = extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    whole = torch.cat([shard.hidden_states for shard in store.shards()])
    indices = torch.randperm(len(store)).tolist()
    assert torch.equal(store.gather(indices), whole[indices])
    assert torch.equal(store[-1]["hidden_states"], whole[-1])
    with pytest.raises(IndexError):
        store[len(store)]


def test_cut_short_extraction_goes_on(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extractor.extract(texts, tmp_path / "whole", shard_tokens=100)
    write = StoreWriter.write
    calls = 0

    def write_twice(self: StoreWriter, number: int, shard: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(self, number, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        extractor.extract(texts, tmp_path / "cut", shard_tokens=100)
    with pytest.raises(ValueError, match="is not whole: .* call extract"):
        ActivationStore(tmp_path / "cut")
    first = (tmp_path / "cut" / "shard-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(StoreWriter, "write", write)
    again = extractor.extract(texts, tmp_path / "cut", shard_tokens=100)
    assert (tmp_path / "cut" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert again.manifest == whole.manifest
    assert torch.equal(again.gather(range(len(again))), whole.gather(range(len(whole))))


def test_finished_store_is_only_opened(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    extractor.extract(texts, tmp_path / "s")
    extractor.backbone.forward = None  # type: ignore[assignment]
    assert extractor.extract(texts, tmp_path / "s").num_texts == len(texts)


def test_store_of_something_else_is_refused(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    extractor.extract(texts, tmp_path / "s")
    with pytest.raises(ValueError, match="other texts .*overwrite=True"):
        extractor.extract(texts[::-1], tmp_path / "s")
    other = HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=2, max_length=32, name="other")
    with pytest.raises(ValueError, match="other backbone or settings .*model: 'tiny' there, 'other' now"):
        other.extract(texts, tmp_path / "s")
    assert extractor.extract(texts[::-1], tmp_path / "s", overwrite=True).num_texts == len(texts)


@pytest.mark.parametrize(
    ("bad", "message"), [("", "text 3 is empty"), (" \n", "text 3 is empty"), (None, "text 3 is None")]
)
def test_bad_text_is_named_before_anything_is_written(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, bad: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extractor.extract([*texts[:3], bad], tmp_path / "s")  # type: ignore[list-item]
    assert not (tmp_path / "s").exists()


def _full_disk(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_a_store_that_goes_on(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., None] = store_module.save_file
    calls = 0

    def second_fails(tensors: object, path: Path, metadata: object) -> None:
        nonlocal calls
        calls += 1
        (_full_disk if calls == 2 else save)(tensors, path, metadata=metadata)

    monkeypatch.setattr(store_module, "save_file", second_fails)
    with pytest.raises(OSError, match="could not write .*shard-00001.*No space left") as error:
        extractor.extract(texts, tmp_path / "s", shard_tokens=100)
    assert error.value.errno == errno.ENOSPC
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert not json.loads((tmp_path / "s" / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(store_module, "save_file", save)
    assert extractor.extract(texts, tmp_path / "s", shard_tokens=100).num_texts == len(texts)


def test_lost_and_damaged_shards_are_named(extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path) -> None:
    extractor.extract(texts, tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    (tmp_path / "s" / "shard-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has lost shard-00000"):
        ActivationStore(tmp_path / "s").pool("mean")
    (tmp_path / "t" / "shard-00000.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="is damaged"):
        ActivationStore(tmp_path / "t").pool("mean")


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no activation store"):
        ActivationStore(tmp_path)


def test_texts_that_fill_the_prompt_are_counted_and_told(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [len(extractor.tokenizer(text)["input_ids"]) for text in texts]
    assert extractor.extract(texts, tmp_path / "whole").num_full == 0
    assert not caplog.records
    short = HiddenStateExtractor(extractor.backbone, extractor.tokenizer, layer=1, max_length=8, name="tiny")
    store = short.extract(texts, tmp_path / "cut", shard_tokens=50)
    assert store.num_full == sum(length >= 8 for length in lengths)
    assert f"{store.num_full} of 60 texts fill max_length=8 tokens" in caplog.text
    with pytest.raises(ValueError, match="texts must be a list of strings, not one string"):
        extractor.extract("a fever", tmp_path / "one")


def test_shards_have_the_permissions_of_any_new_file(
    extractor: HiddenStateExtractor, texts: list[str], tmp_path: Path
) -> None:
    extractor.extract(texts, tmp_path / "s")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode & 0o777 for path in (*(tmp_path / "s").iterdir(), tmp_path / "plain")}
    assert len(modes) == 1

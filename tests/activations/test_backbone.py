from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5Model

from conftest import tiny_backbone, word_tokenizer
from selfreg import HiddenStateExtractor
from selfreg.activations.backbone import find_blocks, hidden_states_at, resolve_model, truncate_backbone

FAMILIES = ("llama", "qwen2", "bert", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_layer_is_the_residual_stream_after_that_block(family: str, layer: int) -> None:
    backbone = tiny_backbone(family)
    ids = torch.randint(4, 30, (2, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
        assert torch.equal(hidden_states_at(backbone, layer, ids, mask), wanted)
        final = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(hidden_states_at(backbone, "final", ids, mask), final)
        truncated = truncate_backbone(backbone, layer)
        assert len(find_blocks(truncated)) == layer + 1
        assert torch.equal(hidden_states_at(truncated, layer, ids, mask), wanted)


def test_last_block_is_taken_before_the_final_norm() -> None:
    backbone = tiny_backbone("llama")
    ids = torch.randint(4, 30, (1, 5))
    with torch.no_grad():
        states = hidden_states_at(backbone, 3, ids, torch.ones_like(ids))
        torch.testing.assert_close(backbone.norm(states), backbone(input_ids=ids).last_hidden_state)


def test_no_later_block_and_no_final_norm_is_run() -> None:
    backbone = tiny_backbone("llama")
    ran: list[str] = []
    for name, module in [*((f"block {i}", block) for i, block in enumerate(backbone.layers)), ("norm", backbone.norm)]:
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    ids = torch.randint(4, 30, (1, 5))
    hidden_states_at(backbone, 1, ids, torch.ones_like(ids))
    assert ran == ["block 0", "block 1"]
    # The hook that stops the pass is gone: the model is as it was.
    backbone(input_ids=ids)
    assert ran[-1] == "norm"


def test_truncated_backbone_saves_and_loads(tmp_path: Path) -> None:
    tiny_backbone("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    extractor = HiddenStateExtractor.from_pretrained(str(tmp_path), layer=1)
    extractor.backbone.save_pretrained(tmp_path / "short")
    word_tokenizer().save_pretrained(tmp_path / "short")
    again = HiddenStateExtractor.from_pretrained(str(tmp_path / "short"), layer=1)
    assert torch.equal(again.pool(["the patient has a fever"]), extractor.pool(["the patient has a fever"]))


@pytest.mark.parametrize("layer", [4, -1, 1.5, True, "last"])
def test_missing_layer_is_named(layer: object, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="layer is 0 to 3"):
        HiddenStateExtractor(tiny_backbone(), tokenizer, layer=layer)  # type: ignore[arg-type]


def test_encoder_decoder_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        HiddenStateExtractor(T5Model(config), tokenizer, layer=0)


def test_blocks_that_cannot_be_found_are_an_error() -> None:
    backbone = tiny_backbone("llama")
    backbone.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"num_hidden_layers=7.*layers \(4\)"):
        find_blocks(backbone)


def test_missing_package_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="the package 'no_such_wheel' is not installed here .* check its spelling"
    ):
        resolve_model("package:no_such_wheel")
    with pytest.raises(FileNotFoundError, match="found neither"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)).kwargs() == {"gguf_file": "a.gguf"}
    (tmp_path / "b.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        resolve_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file 'c.gguf'"):
        resolve_model(str(tmp_path), gguf_file="c.gguf")

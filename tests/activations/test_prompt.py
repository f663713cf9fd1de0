import pytest
import torch

from conftest import tiny_backbone, word_tokenizer
from selfreg import HiddenStateExtractor
from selfreg.activations.prompt import PromptBatch, PromptLayout, pool_hidden_states, select_tokens, wrap_batch

TEXTS = ["the patient has a fever", "no", "she is very ill today , with pain in the chest"]


def test_template_surrounds_the_text_and_is_not_text() -> None:
    layout = PromptLayout.from_tokenizer(word_tokenizer(), "seen today: {text} is he well", 32)
    ids, start, end = layout.wrap(word_tokenizer()("a rash")["input_ids"])
    tokens = word_tokenizer().convert_ids_to_tokens(ids)
    assert tokens == ["seen", "today", "<unk>", "a", "rash", "is", "he", "well"]
    assert tokens[start:end] == ["a", "rash"]


@pytest.mark.parametrize("template", [None, "seen today {text}", "<s> seen today {text} </s>", "<s> {text}"])
def test_exactly_one_bos(template: str | None) -> None:
    tokenizer = word_tokenizer(special=True)
    layout = PromptLayout.from_tokenizer(tokenizer, template, 32)
    ids, start, end = layout.wrap(tokenizer("a rash")["input_ids"])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[start:end]) == ["a", "rash"]


def test_long_text_loses_its_end_and_the_template_stays() -> None:
    tokenizer = word_tokenizer(special=True)
    layout = PromptLayout.from_tokenizer(tokenizer, "seen {text} today", 8)
    ids, start, end = layout.wrap(tokenizer(" ".join(["fever"] * 3 + ["cough"] * 30))["input_ids"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "seen", *["fever"] * 3, "cough", "today", "</s>"]
    assert end - start == 4


@pytest.mark.parametrize("template", ["no place", "{text} and {text}"])
def test_template_needs_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        PromptLayout.from_tokenizer(word_tokenizer(), template, 32)


def test_template_that_takes_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        PromptLayout.from_tokenizer(word_tokenizer(), "the patient has a fever {text}", 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(side: str) -> None:
    tokenizer = word_tokenizer(special=True)
    tokenizer.padding_side = side
    layout = PromptLayout.from_tokenizer(tokenizer, "seen {text}", 32)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch = wrap_batch(layout, encoded["input_ids"], encoded["attention_mask"], 0)
    for row, text in enumerate(TEXTS):
        ids, start, end = layout.wrap(tokenizer(text)["input_ids"])
        assert batch.input_ids[row, : len(ids)].tolist() == ids
        assert batch.attention_mask[row].sum() == len(ids)
        assert batch.text_mask[row].nonzero().flatten().tolist() == list(range(start, end))


def _batch(tokens: int, text: list[int], padding: int = 0) -> PromptBatch:
    attention = torch.ones(1, tokens, dtype=torch.long)
    if padding:
        attention[0, -padding:] = 0
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, text] = True
    return PromptBatch(torch.zeros(1, tokens, dtype=torch.long), attention, mask)


def test_token_rules() -> None:
    hidden = torch.ones(1, 6, 4)
    hidden[0, 1] *= 138
    batch = _batch(6, [1, 2, 3], padding=1)
    for rule, kept in [("all", [0, 1, 2, 3, 4]), ("text", [1, 2, 3]), ("text_no_sinks", [2, 3])]:
        states, keep = select_tokens(hidden, batch, rule, 2.0)  # type: ignore[arg-type]
        assert keep[0].nonzero().flatten().tolist() == kept
        assert torch.equal(states, hidden)


def test_text_of_one_sink_keeps_it_at_ordinary_size() -> None:
    hidden = torch.ones(1, 3, 4)
    hidden[0, 0] *= 138
    states, keep = select_tokens(hidden, _batch(3, [0]), "text_no_sinks", 2.0)
    assert keep[0].tolist() == [True, False, False]
    assert states[0, 0].norm().item() == pytest.approx(2.0)
    assert hidden[0, 0].norm().item() == pytest.approx(276.0)


def test_pooling_by_hand() -> None:
    hidden = torch.arange(8.0).view(1, 4, 2)
    keep = torch.tensor([[False, True, True, False]])
    assert pool_hidden_states(hidden, keep, "mean").tolist() == [[3.0, 4.0]]
    assert pool_hidden_states(hidden, keep, "last").tolist() == [[4.0, 5.0]]
    assert pool_hidden_states(hidden, keep, "cls").tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_states_do_not_depend_on_the_batch(pooling: str, family: str) -> None:
    build = {"tokenizer": word_tokenizer(special=True), "layer": 1, "max_length": 32, "pooling": pooling}
    alone = HiddenStateExtractor(tiny_backbone(family), batch_tokens=1, **build)  # type: ignore[arg-type]
    together = HiddenStateExtractor(tiny_backbone(family), batch_tokens=10_000, **build)  # type: ignore[arg-type]
    torch.testing.assert_close(alone.pool(TEXTS), together.pool(TEXTS), rtol=1e-5, atol=1e-6)


def test_unknown_settings_are_named() -> None:
    for setting in ({"pooling": "max"}, {"token_rule": "none"}):
        with pytest.raises(ValueError, match="choose one of"):
            HiddenStateExtractor(tiny_backbone(), word_tokenizer(), layer=1, **setting)  # type: ignore[arg-type]

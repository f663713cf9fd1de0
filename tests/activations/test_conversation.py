"""Conversations: how pairs become text, and where the last reply stands in their tokens."""

from typing import Any

import pytest
import torch

from conftest import word_tokenizer
from selfreg import HiddenStateExtractor
from selfreg.activations.conversation import CHAT, ReplyFrame, check_pair, conversation, render, render_pair
from selfreg.activations.prompt import PromptLayout

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' he : ' if m.role == 'user' else ' she : ' }}{{ m.content }} </s>"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = word_tokenizer(special=True)
    tokenizer.add_tokens([":"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


PAIR = {"prompt": "pain in chest", "chosen": "very ill", "rejected": "well"}


def reply_of(tokenizer: Any, text: str, max_length: int) -> tuple[str, str]:
    """The whole prompt, and the part of it that counts."""
    layout = PromptLayout.from_tokenizer(tokenizer, CHAT, max_length)
    ids, start, end = layout.wrap(tokenizer(text)["input_ids"])
    assert len(ids) <= max_length
    return tokenizer.decode(ids), tokenizer.decode(ids[start:end])


def test_strings_and_messages_are_the_same_conversation(tokenizer: Any) -> None:
    user = {"role": "user", "content": "pain in chest"}
    as_messages = {
        "prompt": [user],
        "chosen": [{"role": "assistant", "content": "very ill"}],
        "rejected": [{"role": "assistant", "content": "well"}],
    }
    whole = {side: [user, {"role": "assistant", "content": PAIR[side]}] for side in ("chosen", "rejected")}
    wanted = render_pair(tokenizer, PAIR, CHAT)
    assert wanted == (" he : pain in chest </s> she : very ill </s>", " he : pain in chest </s> she : well </s>")
    assert render_pair(tokenizer, as_messages, CHAT) == wanted
    assert render_pair(tokenizer, whole, CHAT) == wanted


def test_one_beginning_of_sequence(tokenizer: Any) -> None:
    text = render(tokenizer, [{"role": "user", "content": "fever"}])
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1
    without = word_tokenizer()
    without.chat_template = TEMPLATE
    assert without(render(without, [{"role": "user", "content": "fever"}]))["input_ids"].count(2) == 1


def test_the_reply_counts_and_the_prompt_gives_way(tokenizer: Any) -> None:
    text = render_pair(tokenizer, PAIR, CHAT)[0]
    whole, reply = reply_of(tokenizer, text, 64)
    assert reply == "very ill"
    assert "pain in chest" in whole
    cut, reply = reply_of(tokenizer, text, 9)
    assert reply == "very ill"
    assert "pain" not in cut
    assert "chest" in cut
    # The reply itself is too long: its beginning stays, and so does the header before it.
    cut, reply = reply_of(tokenizer, text, 6)
    assert reply == "very"
    assert "she" in cut


def test_the_last_reply_of_many(tokenizer: Any) -> None:
    turns = [("user", "fever"), ("assistant", "ill"), ("user", "and cough"), ("assistant", "very ill")]
    text = render(tokenizer, [{"role": role, "content": content} for role, content in turns])
    assert reply_of(tokenizer, text, 64)[1] == "very ill"


def test_text_without_a_header_counts_as_a_whole(tokenizer: Any) -> None:
    assert reply_of(tokenizer, "the patient has fever", 64)[1] == "the patient has fever"


def test_states_of_a_reply_do_not_hold_the_prompt(tokenizer: Any, extractor: HiddenStateExtractor) -> None:
    backbone = extractor.backbone
    backbone.resize_token_embeddings(len(tokenizer))
    chat = HiddenStateExtractor(backbone, tokenizer, layer=1, template=CHAT, token_rule="text")
    prompt, start, end = chat.tokenize([render_pair(tokenizer, PAIR, CHAT)[0]])[0]
    states = backbone(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, start:end]
    torch.testing.assert_close(chat.pool([render_pair(tokenizer, PAIR, CHAT)[0]])[0], states.mean(dim=0))


def test_plain_text_without_a_chat_template(tokenizer: Any) -> None:
    assert render_pair(tokenizer, PAIR, "{text}") == ("pain in chestvery ill", "pain in chestwell")
    with pytest.raises(ValueError, match="'chosen' is a list of messages, which the template '{text}' can't write"):
        render_pair(tokenizer, {**PAIR, "chosen": [{"role": "assistant", "content": "a"}]}, "{text}")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        ReplyFrame.from_tokenizer(tokenizer)


def test_a_template_that_drops_replies_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="does not write a reply"):
        ReplyFrame.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": " "}, "'rejected' is missing or empty"),
        ({"chosen": "a", "rejected": [{"content": "b"}]}, "is no message"),
        ({"chosen": "a", "rejected": [{"role": "assistant", "content": None}]}, "is no message"),
    ],
)
def test_bad_pairs(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(row, "rejected")


def test_the_same_on_both_sides() -> None:
    with pytest.raises(ValueError, match="are the same"):
        check_pair({"chosen": "a", "rejected": "a"})


def test_a_template_that_marks_no_reply_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="puts nothing before a reply"):
        ReplyFrame.from_tokenizer(tokenizer)

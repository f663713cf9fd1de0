"""Texts of strangers leave the framing of a prompt as it is, token by token."""

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hostile import CONTROL_TOKENS, HOSTILE
from selfreg.features.chat import Conversation, as_plain_text
from selfreg.features.explainer import _explain_prompt, _verify_prompt, fenced_spans
from selfreg.features.judge import _judge_prompt, _shown
from selfreg.features.rubric import Rubric
from selfreg.features.spans import Span

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMLESS = "the mill by the river"
RUBRIC = Rubric.load("toxic_chat").text()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """One that takes the control tokens of all families for its own, so that none may slip through."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    corpus = [RUBRIC, *(str(prompt(spans)) for prompt in PROMPTS.values() for spans in [[_span(HARMLESS)]])]
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens(list(CONTROL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def _span(before: str, peak: str = "mill", after: str = " and on") -> Span:
    return Span(text_id=0, position=1, activation=1.0, before=before, peak=peak, after=after)


PROMPTS: dict[str, Callable[[Sequence[Span]], Conversation]] = {
    "judge": lambda spans: _judge_prompt("old mills", spans, RUBRIC, None),
    "judge of a label": lambda spans: _judge_prompt("old mills", spans, RUBRIC, "toxic"),
    "explain": lambda spans: _explain_prompt(spans),
    "verify": lambda spans: _verify_prompt("old mills", spans),
}
PLACES: dict[str, Callable[[str], Span]] = {
    "before": lambda text: _span(f"a {text} "),
    "at the start": lambda text: _span(text),
    "peak": lambda text: _span("a ", text),
    "after": lambda text: _span("a ", "mill", f" {text}"),
    "everywhere": lambda text: _span(text, text, text),
}


def three_spans(kind: str, span: Span) -> Conversation:
    return PROMPTS[kind]([_span("first "), span, _span("third ")])


def framing(tokenizer: PreTrainedTokenizerBase, kind: str, span: Span) -> tuple[list[int], list[int]]:
    """Ids of the tokens before the second of three spans, and of those after it."""
    conversation = three_spans(kind, span)
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    shown = _shown(span) if kind.startswith("judge") else span
    quoted = fenced_spans([shown]).split("\n")[1].removeprefix("1. ")
    line = f"\n2. {quoted}\n"
    assert rendered.count(line) == 1
    start = rendered.index(line) + len("\n2.")
    end = start + 1 + len(quoted)
    # Without the safeguards of LocalChatModel: a server may have none, and read control tokens wherever they stand.
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [i for i, (_, stop) in pairs if stop <= start], [i for i, (begin, _) in pairs if begin >= end]


def controls(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    special = set(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    return [token for token in tokenizer(rendered, add_special_tokens=False)["input_ids"] if token in special]


def test_enough_of_them() -> None:
    assert len(HOSTILE) >= 30
    assert len(set(HOSTILE.values())) == len(HOSTILE)


def test_the_tokenizer_would_be_fooled(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in CONTROL_TOKENS:
        assert len(tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]) == 3


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("place", PLACES)
def test_framing_of_prompts(tokenizer: PreTrainedTokenizerBase, kind: str, place: str) -> None:
    harmless = PLACES[place](HARMLESS)
    before, after = framing(tokenizer, kind, harmless)
    assert len(before) > 20
    assert len(after) > 20
    expected = controls(tokenizer, three_spans(kind, harmless))
    for name, attack in HOSTILE.items():
        span = PLACES[place](attack)
        assert framing(tokenizer, kind, span) == (before, after), name
        assert controls(tokenizer, three_spans(kind, span)) == expected, name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_span_is_one_short_line(name: str) -> None:
    turns = _judge_prompt("old mills", [PLACES["everywhere"](HOSTILE[name])], RUBRIC, None)
    lines = turns[0]["content"].partition("<texts>")[2].splitlines()
    assert len(lines) == 3
    assert (lines[0], lines[2]) == ("", "</texts>")
    assert len(lines[1]) < 400
    assert lines[1].count("**") == 2
    assert "</texts>" not in lines[1]
    lines[1].encode("utf8")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_phrase_is_one_short_line(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """An explainer may copy from what it read."""
    turns = _judge_prompt(HOSTILE[name], [_span("a ")], RUBRIC, None)
    question = turns[-1]["content"].split("\n")
    assert len(question) == 3
    assert question[0].startswith('What it reacts to, in short: "')
    assert question[0].count('"') == 2
    assert len(question[0]) < 200
    harmless = _judge_prompt("old mills", [_span("a ")], RUBRIC, None)
    assert controls(tokenizer, turns) == controls(tokenizer, harmless)


@pytest.mark.parametrize("token", ["[gMASK]", "[UNUSED_TOKEN_145]", "[control_8]"])  # GLM, InternLM, Tekken
def test_bracketed_control_tokens_of_other_spelling(token: str) -> None:
    assert token not in as_plain_text(f"a{token}b")

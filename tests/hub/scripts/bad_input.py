"""Started by test_errors.py, after push_all.py: what a user gets wrong, and what moves under him."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from push_all import logits_of
from safetensors.torch import load_file
from transformers import AutoModel

from conftest import tiny_backbone
from selfreg import (
    FeatureCatalog,
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    RegularizedSequenceClassifierConfig,
    SAEConfig,
    SAEForFeatureExtraction,
    UnintendedFeatures,
)
from selfreg.hub.folders import push_folder


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def pushes(unintended: Any) -> None:
    with pytest.raises(PermissionError, match="there is no token to write to me/new: log in with `hf auth login`"):
        unintended.push_to_hub("me/new", token=False)
    for name in ("me/new", "me/sae"):
        with pytest.raises(PermissionError, match=f"the token may not write to {name}: take a token with write"):
            unintended.push_to_hub(name, token="hf_other")
    with pytest.raises(PermissionError, match="the Hub does not know the token for me/new"):
        unintended.push_to_hub("me/new", token="hf_wrong")
    with pytest.raises(OSError, match="no name of a repo"):
        unintended.push_to_hub("me/a/b")
    # Somebody else may still propose it.
    assert unintended.push_to_hub("me/sae", token="hf_other", create_pr=True).pr_num is not None


def private() -> None:
    """Before anything of them is in the cache."""
    for token in (False, "hf_other"):
        with pytest.raises(OSError, match=r"me/unintended is .* no repo on the Hub that this token may read"):
            UnintendedFeatures.from_pretrained("me/unintended", token=token)
        with pytest.raises(OSError, match="me/whole"):
            RegularizedSequenceClassifier.from_pretrained("me/whole", token=token)


def loads() -> None:
    kinds = (SAEForFeatureExtraction, RegularizedSequenceClassifier, UnintendedFeatures, FeatureCatalog)
    for kind in kinds:
        with pytest.raises(OSError, match="me/nowhere"):
            kind.from_pretrained("me/nowhere")
    for kind, name in zip(kinds, ("sae", "classifier", "unintended", "catalog"), strict=True):
        with pytest.raises(OSError, match="v9"):
            kind.from_pretrained(f"me/{name}", revision="v9")
    with pytest.raises(ValueError, match="me/backbone is a model of type 'llama', not of selfreg's type"):
        RegularizedSequenceClassifier.from_pretrained("me/backbone")
    with pytest.raises(ValueError, match="me/sae is a model of type 'sparse_autoencoder', not of"):
        RegularizedSequenceClassifierConfig.from_pretrained("me/sae")
    with pytest.raises(ValueError, match="me/backbone"):
        SAEForFeatureExtraction.from_pretrained("me/backbone")
    with pytest.raises(FileNotFoundError, match="holds no unintended_features.json"):
        UnintendedFeatures.from_pretrained("me/sae")
    with pytest.raises(OSError, match="me/sae is .* no repo"):
        FeatureCatalog.from_pretrained("me/sae")


def torn(folder: Path) -> None:
    """A folder that lacks a part is not pushed, and takes nothing out of the repo."""
    for missing, match in (
        ("adapter/adapter_model.safetensors", "is not whole: adapter/adapter_model.safetensors is missing"),
        ("tokenizer.json", "has no tokenizer"),
    ):
        own = folder / f"torn-{Path(missing).stem}"
        RegularizedSequenceClassifier.from_pretrained("me/adapted").save_pretrained(own)
        (own / missing).unlink()
        if missing.startswith("tokenizer"):
            (own / "tokenizer_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=match):
            push_folder(own, "me/adapted")


def newer(folder: Path) -> None:
    for kind, name in ((SAEForFeatureExtraction, "sae"), (RegularizedSequenceClassifier, "classifier")):
        own = folder / f"newer-{name}"
        loaded = kind.from_pretrained(f"me/{name}")
        loaded.save_pretrained(own)
        config = json.loads((own / "config.json").read_text())
        assert config["config_format"] == 1
        (own / "config.json").write_text(json.dumps({**config, "config_format": 7, "selfreg_version": "9.1"}))
        for load in (kind.from_pretrained, (SAEConfig if name == "sae" else AutoModel).from_pretrained):
            with pytest.raises(ValueError, match=r"written by selfreg 9.1 in config format 7, .* up to 1: pip"):
                load(own)


def moved(folder: Path) -> None:
    """The backbone's repo goes on after the classifier was trained on it."""
    heard = Lines()
    logging.getLogger("selfreg").addHandler(heard)
    expected = load_file(folder / "expected.safetensors")["moved"]
    old = RegularizedSequenceClassifierConfig.from_pretrained("me/classifier").base_model_revision
    new = tiny_backbone(seed=5).push_to_hub("me/backbone").oid
    # The commit is pinned: nothing changes, and both are named.
    model = RegularizedSequenceClassifier.from_pretrained("me/classifier")
    assert (logits_of(model) - expected).abs().max() < 1e-6
    sae = SAEForFeatureExtraction.from_pretrained("me/sae")
    assert HiddenStateExtractor.from_sae(sae).spec.revision == old
    assert [line.split(" was trained")[0].split(" since ")[1] for line in heard.lines] == ["me/classifier", "the SAE"]
    for line in heard.lines:
        assert (
            f"revision {old}, which is loaded, is no longer that of any branch or tag; main is at revision {new}"
            in line
        )
    # Whoever has given it a name is told nothing.
    HfApi().create_branch("me/backbone", branch="as-trained", revision=old)
    heard.lines.clear()
    HiddenStateExtractor.from_sae(sae)
    assert heard.lines == []
    assert HiddenStateExtractor.from_sae(sae, revision="main").spec.revision == new
    # The commit is gone, as after a squash of the history.
    sae.config.base_model_revision = "0" * 40
    assert HiddenStateExtractor.from_sae(sae).spec.revision == new
    model.config.base_model_revision = "0" * 40
    model.save_pretrained(folder / "squashed")
    RegularizedSequenceClassifier.from_pretrained(folder / "squashed")
    assert len(heard.lines) == 3
    for line, trained_on in zip(heard.lines, (old, "0" * 40, "0" * 40), strict=True):
        assert f"trained on the backbone me/backbone at revision {trained_on}, and this is its revision {new}" in line


def main(folder: Path) -> None:
    private()
    pushes(UnintendedFeatures.from_pretrained("me/unintended"))
    pushes(SAEForFeatureExtraction.from_pretrained("me/sae"))
    torn(folder)
    loads()
    newer(folder)
    moved(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

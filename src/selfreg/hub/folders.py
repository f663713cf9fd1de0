"""What a folder holds, and how it goes to the Hub."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from selfreg.classifier.checkpoint import BACKBONE_FOLDER
from selfreg.classifier.configuration import RegularizedSequenceClassifierConfig
from selfreg.classifier.lora import ADAPTER_FILES, ADAPTER_FOLDER
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.features.catalog import CONFIG_NAME as CATALOG_NAME
from selfreg.features.catalog import FeatureCatalog
from selfreg.features.selection import CONFIG_NAME as FEATURES_NAME
from selfreg.features.selection import UnintendedFeatures
from selfreg.sae.configuration import SAEConfig
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import read_json
from selfreg.utils.hub import MODEL_FILES, RepoType, upload_folder
from selfreg.utils.trainer import WHOLE

# What training leaves beside a model, and what is not for others' eyes.
_LEFT_OUT = (
    *("checkpoint-*/*", "runs/*", "optimizer.*", "scheduler.*", "rng_state*", "trainer_state.json", WHOLE),
    *("training_args.bin", "pytorch_model_fsdp*", ".*", "*/.*"),
)


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        name (`str`): for people.
        repo_type (`str`): what it is on the Hub.
        check (`Callable`): raises where it is not whole.
        replaces (`Sequence[str]`): see `upload_folder`.
    """

    name: str
    repo_type: RepoType
    check: Callable[[Path], Any]
    replaces: Sequence[str] = ()


def _check_classifier(folder: Path) -> None:
    model = RegularizedSequenceClassifier.from_pretrained(folder, load_backbone_weights=False)
    config = model.config
    parts = [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES] if config.adapter else []
    if config.backbone_saved:
        parts.append(f"{BACKBONE_FOLDER}/config.json")
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is not whole: {', '.join(missing)} is missing; save the classifier again")
    if model.tokenizer is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer, without which nobody can run it on texts: "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


_MODELS = {
    SAEConfig.model_type: Kind("sparse autoencoder", "model", SAEForFeatureExtraction.from_pretrained, MODEL_FILES),
    RegularizedSequenceClassifierConfig.model_type: Kind("classifier", "model", _check_classifier, MODEL_FILES),
}
_FEATURES = Kind("set of unintended features", "model", UnintendedFeatures.from_pretrained)
_CATALOG = Kind("feature catalogue", "dataset", FeatureCatalog.from_pretrained)
_PARTS = ("classifier", "sae", "unintended", "catalog")


def kind_of(folder: Path) -> Kind:
    """What a folder holds.

    Raises:
        ValueError: nothing that selfreg knows, or several things, as the output of a recipe does; names them.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / CATALOG_NAME).exists():
        return _CATALOG
    if (folder / FEATURES_NAME).exists():
        return _FEATURES
    inside = [name for name in _PARTS if (folder / name).is_dir()]
    if not (folder / "config.json").exists():
        if inside:
            raise ValueError(
                f"{folder} holds several things: push one of {', '.join(str(folder / name) for name in inside)}"
            )
        raise ValueError(
            f"{folder} holds neither a sparse autoencoder, a classifier, a set of unintended features nor a feature "
            "catalogue: name a folder that save_pretrained wrote, or one in the output of a recipe"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in _MODELS:
        raise ValueError(f"{folder} is a model of type {kind!r}, not one of selfreg's ({', '.join(_MODELS)})")
    return _MODELS[kind]


def push_folder(folder: Path, repo_id: str, **hub: Any) -> tuple[Kind, CommitInfo]:
    """Uploads a folder that `save_pretrained` wrote, or a Trainer's output, in one commit; what can't be loaded is not
    uploaded.

    Args:
        folder: the folder.
        repo_id, hub: as for `utils.hub.upload_folder`.

    Raises:
        ValueError: as `kind_of`, or it is not whole.
        OSError: as `upload_folder`.
    """
    kind = kind_of(folder)
    kind.check(folder)
    hub.setdefault("commit_message", f"Upload {kind.name}")
    options: dict[str, Any] = {"repo_type": kind.repo_type, "ignore": _LEFT_OUT, "replaces": kind.replaces}
    return kind, upload_folder(folder, repo_id=repo_id, **options, **hub)

"""RegularizedTrainer: trains a classifier that stays off the unintended features."""

import copy
import logging
import shutil
from collections.abc import Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers.trainer_utils import HubStrategy

from selfreg.classifier.arguments import AUTO
from selfreg.classifier.checkpoint import BACKBONE_PREFIX, check_saved_whole
from selfreg.classifier.collator import ClassifierCollator, pooled_dataset
from selfreg.classifier.inputs import (
    check_dataset,
    check_logits,
    check_margins,
    check_removal,
    label_weights,
    mean_weight,
)
from selfreg.classifier.lora import ADAPTER_FOLDER, restore_adapter, unsaved_parameters
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.offset import with_offsets
from selfreg.classifier.path import WeightPath
from selfreg.classifier.penalty import dependence_directions
from selfreg.classifier.preparation import (
    OFFSET,
    OWN_UNUSED,
    STOCK_UNUSED,
    RowsWithOffsets,
    beside_offsets,
    check_offset,
    chosen_ridge,
    chosen_weights,
    knows_features,
    refuse_unused,
    stacked,
)
from selfreg.classifier.regularizer import RegularizationMixin
from selfreg.classifier.ridge import RidgeChoice
from selfreg.classifier.running import batch_constant
from selfreg.classifier.shares import COUNTS, counts_of_last
from selfreg.classifier.states import PooledStates
from selfreg.classifier.statistics import HeadStatistics
from selfreg.classifier.tasks import Task, held_constant, squared_logits, task_loss, text_weights, weighted_mean
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.utils.sharding import fsdp_asked, is_sharded

logger = logging.getLogger(__name__)


class RegularizedTrainer(RegularizationMixin):
    """Trains a [`RegularizedSequenceClassifier`]: its head, and the adapter in its backbone, where there is one.

    With an adapter the states move while the head learns them. Their standardisation stays as it was before the first
    step, and the dependence term follows a running estimate. No gradient of the term goes into the adapter: it holds
    the head's weights off what the features carry now. The adapter could also lower it by moving the states to where
    the features no longer describe them, which `selfreg.evaluation.drift` tells.

    Args:
        model: the classifier; or a stock `AutoModelForSequenceClassification` model, with `unintended`.
        args: a [`RegularizedTrainingArguments`]; for stock models any [`~transformers.TrainingArguments`].
        train_dataset: a [`PooledStates`]; or rows with `text` (or `input_ids`, as the tokenizer gives them for the
            bare text) and `label` (or `labels`); or rows with `pooled` and `labels`, which is enough where
            `dependence_weight` is 0. For `preference` rows with `chosen`, `rejected` and, where there are, `prompt`
            and `margin`: strings or lists of messages, as TRL has them. A column `weight` weighs texts in the loss.
        eval_dataset: likewise.
        unintended: for stock models only.
        kwargs: as for [`RegularizationMixin`] and [`~transformers.Trainer`].

    Raises:
        ValueError: a column is missing, a text is empty, a label is out of range or there is only one.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        unintended: Any = None,
        **kwargs: Any,
    ) -> None:
        own = isinstance(model, RegularizedSequenceClassifier)
        if own and not isinstance(args, RegularizedTrainingArguments):
            raise ValueError(
                f"args must be RegularizedTrainingArguments, not {type(args).__name__}: TrainingArguments with the "
                "weights of the two terms"
            )
        self._label_weights: Tensor | None = None
        # What the unintended features say of each training text, weighted; worked out when training starts.
        self.offsets: Tensor | None = None
        self.weight_path: WeightPath | None = None
        self.ridge_choice: RidgeChoice | None = None
        # Of the texts of the training set: with it a text counts the same whatever else is in its batch.
        self.mean_weight = 1.0
        if own:
            if unsaved_parameters(model.backbone):
                raise ValueError(
                    "the backbone has trainable parameters; selfreg trains the head, and an adapter "
                    "(from_backbone(..., lora={'r': 8})): model.backbone.requires_grad_(False)"
                )
            if args.save_strategy != "no":
                # Now, not when the first checkpoint is due.
                try:
                    check_saved_whole(model.config, model.backbone, save_backbone=False)
                except ValueError as error:
                    raise ValueError(
                        f"checkpoints can't be saved (save_strategy='no' does without): {error}"
                    ) from error
            cached = args.cache_states and model.backbone_is_frozen
            if args.remove_unintended is not None:
                model.config.remove_unintended = args.remove_unintended
            kwargs.setdefault("data_collator", ClassifierCollator.of(model))
            labels = check_dataset(train_dataset, model, "train_dataset", training=True)
            parts = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, part in parts.items():
                check_dataset(part, model, name, training=False)
            for name, part in {"train_dataset": train_dataset, **parts}.items():
                check_removal(part, model, name)
                check_margins(part, args, name)
                _check_states_stay(part, model, name)
            refuse_unused(args, kwargs, OWN_UNUSED)
            can_offset = model.backbone_is_frozen and knows_features(train_dataset)
            args = args.resolve_defaults(model.task, model.config.num_unintended, can_offset=can_offset)
            check_offset(args, model, train_dataset)
            names = ("offset_weight", "logit_decay", "ridge", "weight_decay")
            logger.info(", ".join(f"{name}={getattr(args, name)}" for name in names))
            self._label_weights = label_weights(args, labels, model)
            check_logits(args, model)
            if labels is not None:
                self.mean_weight = mean_weight(train_dataset, labels, self._label_weights, model)
            if is_sharded(model) and (fsdp_asked(args) or not cached):
                raise ValueError(
                    "the extractor was sharded, which is for states that are cached (cache_states=True, no adapter, "
                    "fsdp=False): to train with fsdp=True leave .shard() out"
                )
            if args.cache_states and not cached:
                logger.info("an adapter is trained: states change with it, and are not cached")
            if cached:
                # The batches are then of pooled states, whatever the rows were.
                kwargs["data_collator"] = ClassifierCollator.of(model)
                train_dataset = _cached(model, train_dataset)
                if isinstance(eval_dataset, dict):
                    eval_dataset = {name: _cached(model, part) for name, part in eval_dataset.items()}
                else:
                    eval_dataset = _cached(model, eval_dataset)
            args, self.weight_path = chosen_weights(model, args, train_dataset)
            # Of a frozen backbone nothing is to be sent: every process has loaded it, or holds its part of it.
            own_names = (name for name, _ in model.named_parameters() if name.startswith(BACKBONE_PREFIX))
            ignored = list(own_names) if model.backbone_is_frozen else []
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
            smoothing, args = args.label_smoothing_factor, copy.copy(args)
            # transformers has a loss of its own for it.
            args.label_smoothing_factor = 0.0
        else:
            refuse_unused(args, kwargs, STOCK_UNUSED)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            unintended=unintended,
            **kwargs,
        )
        if own:
            self.args.label_smoothing_factor = smoothing
        self.label_names = ["labels"]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and isinstance(self.model, RegularizedSequenceClassifier):
            # Before the first pass over the texts, as the backbone may not fit one device.
            self._shard()
        if isinstance(self.model, RegularizedSequenceClassifier) and self.train_dataset is not None:
            self._fit(self.model, self.train_dataset)
            if self.weight_path is not None and self.args.should_save:
                self.weight_path.save(str(self.args.output_dir))
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; of an epoch's last batch, what it was filled up with counts nothing."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        own, world = isinstance(self.model, RegularizedSequenceClassifier), self.args.world_size
        if own and batches and world > 1 and self.accelerator.gradient_state.end_of_dataloader:
            labels = batches[-1]["labels"]
            # Not accelerate's own remainder, which is not known where an epoch is taken up in its middle.
            whole = self._train_batch_size * (1 if self.accelerator.split_batches else world)
            left = len(cast("Sized", self.train_dataset)) % whole
            if left and not self.args.dataloader_drop_last:
                counts = counts_of_last(len(labels), left, self.args.process_index, world)
                batches[-1] = {**batches[-1], COUNTS: counts.to(labels.device)}
        return batches, num_items

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers, with the offsets, which the data set itself never carries."""
        given, collator = self.train_dataset, self.data_collator
        if self.offsets is None or getattr(given, "offsets", None) is not None:
            return super().get_train_dataloader()
        self.train_dataset, self.data_collator = beside_offsets(given, collator, self.offsets)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = given, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = train_dataset.rows if isinstance(train_dataset, RowsWithOffsets) else train_dataset
        return super()._get_train_sampler(rows)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if columns is not None and OFFSET not in columns:
            columns.append(OFFSET)

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        own = self.model
        if not isinstance(own, RegularizedSequenceClassifier) or "labels" not in inputs:
            return super().task_loss(model, inputs)
        inputs = dict(inputs)
        columns = ("labels", "weight", "margin", "offset", COUNTS)
        labels, weights, margins, offsets, counts = (inputs.pop(name, None) for name in columns)
        if counts is not None:
            weights = counts if weights is None else weights * counts
        # Asked for in training only: in evaluation a Trainer gathers all that a model gives.
        statistics = self.statistics if model.training else None
        outputs = model(**inputs, output_pooled=True) if statistics is not None else model(**inputs)
        if statistics is not None:
            self._follow_adapter(statistics, own, outputs, labels, counts)
        if own.task == "preference" and outputs.logits.shape[-1] == 1:
            # All chosen sides, then all rejected ones.
            outputs.logits = torch.stack(outputs.logits.squeeze(-1).chunk(2), dim=1)
        # The offset takes part in learning only: what it explains the head need not learn.
        logits = outputs.logits if offsets is None or not model.training else outputs.logits + offsets
        loss = self.loss_of(logits, labels, own, sample_weights=weights, margins=margins)
        if self.args.logit_decay and model.training:
            squares = squared_logits(own.task, outputs.logits, preference_loss=self.args.preference_loss)
            counted = self.weights_of(labels, own.task, weights).to(squares)
            loss = loss + self.args.logit_decay * weighted_mean(squares, counted, self.mean_weight)
        return loss, outputs

    def loss_of(
        self, logits: Tensor, labels: Tensor, model: RegularizedSequenceClassifier, **columns: Tensor | None
    ) -> Tensor:
        """The task loss of `logits`; `columns` are `sample_weights` and `margins` of the batch."""
        return task_loss(
            model.task,
            logits,
            labels,
            label_weights=self._label_weights,
            target_scale=model.loss_scale,
            preference_loss=self.args.preference_loss,
            mean_weight=self.mean_weight,
            # What is evaluated is the loss itself.
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
            **columns,
        )

    def weights_of(self, labels: Tensor, task: Task, sample_weights: Tensor | None) -> Tensor:
        """What each text of a batch counts, `[N]`; see `mean_weight`."""
        label_weights = None if self._label_weights is None else self._label_weights.to(labels.device)
        return text_weights(task, labels, sample_weights, label_weights)

    def _follow_adapter(
        self,
        statistics: HeadStatistics,
        model: RegularizedSequenceClassifier,
        outputs: Any,
        labels: Tensor,
        counts: Tensor | None,
    ) -> None:
        """Takes the batch into the running estimate, which this step's dependence term then uses."""
        states, activations = outputs.pooled.detach(), outputs.unintended_activations.detach()
        if model.task == "preference":
            states, activations = (chosen - rejected for chosen, rejected in (states.chunk(2), activations.chunk(2)))
        if counts is not None:
            states, activations, labels = (values[counts > 0] for values in (states, activations, labels))
        constant = batch_constant(model.task, labels.cpu(), model.score.out_features)
        reduce = self.accelerator.reduce if self.args.world_size > 1 else None
        dependence = statistics.dependence_of(constant.shape[1])
        dependence.update(states / model.pooled_scale, activations, constant, reduce)
        self._set_directions(statistics)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As in transformers, with the adapter in a group of its own: it has another learning rate than the head, and
        no weight decay, which is meant for the head."""
        is_new = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(model)
        if not (is_new and isinstance(self.model, RegularizedSequenceClassifier) and self.model.config.adapter):
            return optimizer
        own = {id(parameter) for parameter in self.model.backbone.parameters()}
        adapter = []
        for group in optimizer.param_groups:
            adapter += [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if adapter:
            rate = self.args.adapter_learning_rate
            optimizer.add_param_group({"params": adapter, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        """The card of selfreg for its own classifiers; that of transformers for stock models."""
        if not isinstance(self.model, RegularizedSequenceClassifier):
            super().create_model_card(language, license, **kwargs)
        elif self.is_world_process_zero():
            from selfreg.hub.cards import write_trainer_card

            write_trainer_card(self, language=language, license=license, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        model, pushes = self.model, self.args.hub_strategy != HubStrategy.END
        if pushes and self.is_world_process_zero() and isinstance(model, RegularizedSequenceClassifier):
            # The Trainer knows of the head and the config: with nothing else, what it pushes could not be loaded.
            if model.config.adapter:
                adapter = Path(checkpoint_folder) / ADAPTER_FOLDER
                shutil.copytree(adapter, Path(str(self.args.output_dir)) / ADAPTER_FOLDER, dirs_exist_ok=True)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore(Path(str(self.state.best_model_checkpoint)))

    def _shard(self) -> None:
        from accelerate.utils import fsdp2_prepare_model  # type: ignore[import-untyped]
        from torch.distributed.fsdp import register_fsdp_forward_method

        if not is_sharded(self.model):
            self.model = self.model_wrapped = fsdp2_prepare_model(self.accelerator, self.model)
            register_fsdp_forward_method(self.model, "run_backbone")

    def _restore(self, checkpoint: Path) -> None:
        """The adapter, which the Trainer does not know of."""
        if self.is_fsdp_enabled:
            # It knows of all weights.
            return
        if isinstance(self.model, RegularizedSequenceClassifier) and self.model.config.adapter:
            restore_adapter(self.model.backbone, checkpoint / ADAPTER_FOLDER)

    def _fit(self, model: RegularizedSequenceClassifier, dataset: Any) -> None:
        """Standardisation and dependence directions, in closed form over the training set as it is now."""
        states = dataset if isinstance(dataset, PooledStates) else None
        if states is None and "pooled" in dataset[0]:
            needed = bool(self.args.dependence_weight or self.args.offset_weight)
            states = stacked(model, dataset, needs_activations=needed)
        if states is None:
            # cache_states is off: the backbone runs at every step, and once before for what the head is fitted to.
            states = pooled_dataset(model, dataset)
        self.offsets = with_offsets(model, self.args, states).offsets
        model.set_standardization(states.pooled, states.labels)
        if self.args.ridge != AUTO:
            self.ridge = self.args.ridge
        else:
            self.ridge_choice = chosen_ridge(model, self.args, replace(states, offsets=self.offsets))
            self.ridge = self.ridge_choice.ridge
        if self.args.dependence_weight and model.config.num_unintended:
            differences, activations = states.compared
            # The mean of the standardisation is held constant anyway.
            differences = differences / model.pooled_scale.cpu()
            constant = held_constant(model.task, states.labels)
            self.regularizer.dependence_directions = dependence_directions(differences, activations, constant)
            self.statistics = None
            if not model.backbone_is_frozen:
                constant = batch_constant(model.task, states.labels, model.score.out_features)
                sizes, momentum = (activations.shape[1], differences.shape[1]), self.args.dependence_momentum
                self.statistics = HeadStatistics(*sizes, momentum, follows_scale=False)
                dependence = self.statistics.dependence_of(constant.shape[1])
                dependence.update(differences, activations, constant)
                # The whole set would outweigh the batches for as long as it is larger than what is remembered.
                remembered = self.args.per_device_train_batch_size / max(1 - momentum, 1e-6)
                dependence.scale(min(1.0, remembered / len(differences)))


def _check_states_stay(dataset: Any, model: RegularizedSequenceClassifier, name: str) -> None:
    if model.backbone_is_frozen or dataset is None:
        return
    if isinstance(dataset, PooledStates) or "pooled" in dataset[0]:
        raise ValueError(
            f"{name} holds pooled states, which change while the adapter is trained: give texts, or freeze the "
            "adapter (model.backbone.requires_grad_(False)) and train the head alone"
        )


def _cached(model: RegularizedSequenceClassifier, dataset: Any) -> Any:
    if dataset is None or isinstance(dataset, PooledStates) or "pooled" in dataset[0]:
        return dataset
    return pooled_dataset(model, dataset)

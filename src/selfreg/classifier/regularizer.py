"""RegularizationMixin: the two extra terms of the loss in anybody's Trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint, has_length

from selfreg.classifier.arguments import RegularizationArguments
from selfreg.classifier.assembly import label_mask
from selfreg.classifier.head import HeadRead, find_head, read_batch, reading, text_states, unwrapped
from selfreg.classifier.modeling import RegularizedSequenceClassifier
from selfreg.classifier.penalty import feature_activations
from selfreg.classifier.running import batch_constant
from selfreg.classifier.statistics import HeadStatistics, SavesStatistics
from selfreg.classifier.tasks import Task
from selfreg.classifier.terms import Regularizer
from selfreg.classifier.training_args import RegularizedTrainingArguments
from selfreg.features.selection import UnintendedFeatures
from selfreg.utils.progress import progress
from selfreg.utils.quantized import keep_unpacked
from selfreg.utils.sharding import whole_tensor
from selfreg.utils.trainer import PartsTrainer, WholeCheckpoints


class RegularizationMixin(PartsTrainer):
    """Keeps the head of a classifier off the unintended features, in any `Trainer`.

        class RegularizedRewardTrainer(RegularizationMixin, RewardTrainer): ...

        RegularizedRewardTrainer(model, args, train_dataset=pairs, unintended=unintended)

    The model's head must be one linear layer. Its weights are measured over standardised states: they are multiplied
    with the spread of the states that it reads, so that the weights of the terms mean the same whatever the model.

    The dependence term needs the features' activations in those states. Where nothing but the head trains, one pass
    over the training set before training measures them exactly; else they are a running estimate, which is saved with
    each checkpoint.

    The features must be of the states that the head reads. For decoders those are of `layer="final"`; for heads with a
    pooler or a dense layer before them see [`head_inputs`]. Training that moves the backbone moves the states away
    from the features, too: they say most of a frozen backbone, or of a model that was already fine-tuned.

    Args:
        args, kwargs: those of the Trainer that this is mixed into.
        unintended: what the head must not use. A [`RegularizedSequenceClassifier`] brings its own.
        regularization: weights of the terms; None: those of the training arguments, where they are
            [`RegularizationArguments`] too, else the defaults.
        head: name of the head's layer, where it is none of `score`, `classifier` and `classifier.out_proj`.

    Raises:
        ValueError: no head is found, it doesn't train, or the features are none of the states that it reads.
    """

    model: Any
    args: Any

    ridge: float = 0.0
    """Weight of half the squared norm of the head's weights, in the training of selfreg's own classifiers."""

    def __init__(
        self,
        *args: Any,
        unintended: UnintendedFeatures | None = None,
        regularization: RegularizationArguments | None = None,
        head: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = kwargs["model"] if "model" in kwargs else next(iter(args), None)
        own = isinstance(given, RegularizedSequenceClassifier)
        # Before a Trainer loads a model or tokenises a data set.
        if own and unintended is not None:
            raise ValueError("a RegularizedSequenceClassifier brings its own unintended features: leave them out here")
        if not own and not isinstance(unintended, UnintendedFeatures):
            raise ValueError(
                f"unintended={unintended!r} must be UnintendedFeatures, those that the head must not use: "
                "UnintendedFeatures.from_pretrained(folder), or one of its other from_... methods"
            )
        super().__init__(*args, **kwargs)
        if isinstance(self.args, RegularizedTrainingArguments) and self.args.weight_decay is None:
            # Still open for a stock model, and for any other Trainer than a RegularizedTrainer: none has a ridge.
            self.args = self.args.resolve_defaults("single_label", 0, can_offset=False)
        keep_unpacked(self.model)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if is_deepspeed_zero3_enabled() or (plugin is not None and plugin.fsdp_version != 2):
            raise ValueError(
                "FSDP version 1 and DeepSpeed's stage 3 hold the head in pieces, of which the terms on its weights "
                "can't be worked out: use FSDP version 2 (fsdp_config={'version': 2}, which is the default) or DDP"
            )
        if isinstance(self.args, RegularizationArguments):
            if regularization is not None:
                raise ValueError(
                    f"{type(self.args).__name__} carries the weights of the terms: leave regularization= out"
                )
            regularization = self.args
        self.regularization = regularization or RegularizationArguments()
        self.head_name = head
        features: Any = self.model.unintended if own else unintended
        self.unintended: UnintendedFeatures = features
        mask = self.model.unintended_mask if own else self._check_stock()
        self.regularizer = Regularizer(self.unintended, self.regularization, mask)
        # A classifier of selfreg standardises its states itself, and its Trainer measures them.
        self._measures = not own and not self.regularizer.empty
        self._checked = False
        self._step_head: tuple[Any, nn.Linear] | None = None
        self._num_items: Tensor | int | None = None
        self.statistics: HeadStatistics | None = None
        if not self.regularizer.empty:
            self.add_callback(SavesStatistics(self))
            # A checkpoint is marked as whole after all that lies in it.
            self.remove_callback(WholeCheckpoints)
            self.add_callback(WholeCheckpoints)

    def _check_stock(self) -> Tensor | None:
        """For which labels the features are unintended; raises where they don't fit a stock model's head."""
        model, head = unwrapped(self.model), find_head(self.model, self.head_name)
        kind = type(model).__name__
        if isinstance(self.args, RegularizedTrainingArguments) and self.args.remove_unintended:
            raise ValueError(
                f"remove_unintended takes features out of the states inside the model, which selfreg can't do in "
                f"{kind}: leave it out, or use RegularizedSequenceClassifier.from_backbone"
            )
        if isinstance(self.args, RegularizedTrainingArguments) and self.args.ridge:
            raise ValueError(
                f"ridge={self.args.ridge!r} would have no effect in {type(self).__name__} with {kind}: it is for a "
                "RegularizedSequenceClassifier in a RegularizedTrainer; use weight_decay"
            )
        if not head.weight.requires_grad:
            raise ValueError(
                f"the head of {kind} is frozen, so that nothing keeps it off the features: train it; with peft "
                "task_type='SEQ_CLS', or the head's name in modules_to_save"
            )
        if self.unintended.hidden_size != head.in_features:
            raise ValueError(
                f"the unintended features have width {self.unintended.hidden_size}, the head reads {head.in_features}"
            )
        spec = self.unintended.spec
        if spec is not None and spec.layer != "final":
            raise ValueError(
                f"the unintended features are of layer {spec.layer}, which the head of {kind} does not read: find "
                "them on layer='final', or on selfreg.head_inputs(model, batches)"
            )
        if self.args.n_gpu > 1:
            raise ValueError("start one process for each GPU: accelerate launch, or CUDA_VISIBLE_DEVICES=0")
        if self.unintended.labels is None:
            return None
        names = _label_names(model, head.out_features)
        unknown = sorted({name for own in self.unintended.labels for name in own or []} - set(names))
        if unknown:
            raise ValueError(
                f"a feature is unintended for the label {unknown[0]!r}, which is none of the model's: "
                f"{', '.join(names)} (config.id2label)"
            )
        mask = label_mask(self.unintended.labels, names)
        return None if mask is None else torch.from_numpy(mask)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._step_head = None
        if self._measures:
            # Once more with each training: what was frozen in the last one may train in this.
            # With FSDP the model runs within a training step only.
            exact = self._only_the_head_trains() and has_length(self.train_dataset) and not self.is_fsdp_enabled
            momentum = 1.0 if exact else self.regularization.dependence_momentum
            self.statistics = HeadStatistics(len(self.unintended), self.unintended.hidden_size, momentum)
            if exact:
                self._measure_all(self.statistics)
        if self.statistics is not None and not self.statistics.is_exact and resume_from_checkpoint:
            resumed = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed
            self.statistics.load(Path(str(folder)))
            self._set_directions(self.statistics)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss plus both terms; in evaluation the task loss alone."""
        self._num_items = num_items_in_batch
        if not model.training:
            loss, outputs = self.task_loss(model, inputs)
            return (loss, outputs) if return_outputs else loss
        # From the model that this step was given: a wrapper may hold the weights in another form. Looked for once a
        # training, as it takes a tenth of a step on cached states.
        if self._step_head is None or self._step_head[0] is not model:
            self._step_head = (model, find_head(model, self.head_name))
        head = self._step_head[1]
        batch = dict(inputs)
        with reading(head) as read:
            task_loss, outputs = self.task_loss(model, inputs)
        weight = whole_tensor(head.weight)
        if self._measures:
            assert self.statistics is not None
            if not self.statistics.is_exact:
                self._follow(self.statistics, model, batch, read)
            weight = self.statistics.scaled(weight)
        similarity, dependence = self.regularizer(weight)
        terms = self.regularizer.penalty_weight * similarity + self.regularizer.dependence_weight * dependence
        self.parts.add(task_loss=task_loss)
        if self.ridge:
            squared_norm = weight.pow(2).sum()
            terms = terms + self.ridge / 2 * squared_norm
            self.parts.add(squared_norm=squared_norm)
        # A zero that stands for "not measured" would read as "perfect".
        if not self.regularizer.empty:
            self.parts.add(similarity=similarity)
        if len(self.regularizer.dependence_directions):
            self.parts.add(dependence=dependence)
        if self._task_loss_is_scaled():
            terms = terms / self.current_gradient_accumulation_steps
        loss = task_loss + terms
        return (loss, outputs) if return_outputs else loss

    def task_loss(self, model: Any, inputs: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
        """The loss without the two terms, and the outputs of the model: that of the Trainer this is mixed into."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=self._num_items)
        return loss, outputs

    def dependence_rows(
        self, inputs: Mapping[str, Any], states: Tensor, activations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the dependence is measured on, of a batch; for a Trainer with another kind of batch to override.

        `labels` are held constant. A batch without labels, and a head of one logit, are pairs as TRL's RewardTrainer
        has them: all chosen sides, then all rejected ones.

        Args:
            inputs: the batch.
            states (`[B, D]`): what the head read.
            activations (`[B, U]`): of the unintended features in them.

        Returns:
            states `[N, D]` and activations `[N, U]` (for pairs chosen less rejected), and what is held constant
            `[N, P]`; see [`RunningDependence`].

        Raises:
            ValueError: there are neither labels nor pairs.
        """
        labels, num_logits = inputs.get("labels"), find_head(self.model, self.head_name).out_features
        if labels is None:
            if num_logits != 1 or len(states) % 2:
                raise ValueError(
                    f"{type(self).__name__} has batches without 'labels' that are no pairs either: override "
                    "dependence_rows, or set dependence_weight=0"
                )
            states, activations = (chosen - rejected for chosen, rejected in _halves(states, activations))
            return states, activations, states.new_ones(len(states), 1)
        task: Task = "single_label"
        if num_logits == 1:
            task, labels = "regression", labels.reshape(-1)
        elif labels.ndim == 2:
            task = "multi_label"
        return states, activations, batch_constant(task, labels, num_logits)

    def _only_the_head_trains(self) -> bool:
        own = {id(parameter) for parameter in find_head(self.model, self.head_name).parameters()}
        return all(id(parameter) in own for parameter in self.model.parameters() if parameter.requires_grad)

    def _measure_all(self, statistics: HeadStatistics) -> None:
        """Scale and dependence over the whole training set: without forgetting, they are the closed form."""
        # The order of the training's batches must not hang on this pass.
        with torch.random.fork_rng(devices=[]):
            # Not get_eval_dataloader, whose workers may be kept for the next evaluation.
            dataset: Any = self.train_dataset
            loader = self.get_test_dataloader(dataset)
            with progress("what the head reads", len(loader), "batches") as advance:
                for batch in loader:
                    inputs = self._prepare_inputs(batch)
                    self._take_in(statistics, inputs, self._checked_read(self.model, inputs).states)
                    advance(1)
        self._set_directions(statistics)

    def _follow(self, statistics: HeadStatistics, model: Any, inputs: dict[str, Any], read: list[Tensor]) -> None:
        """The running estimates, with what the head read in this step."""
        if not self._checked:
            self._checked_read(self.accelerator.unwrap_model(model), inputs)
        if len(read) != 1:
            raise ValueError(
                f"the head ran {len(read)} times in one loss of {type(self).__name__}: selfreg needs one forward pass "
                "a batch"
            )
        states = text_states(read[0], unwrapped(model), inputs)
        self._take_in(statistics, inputs, states)
        self._set_directions(statistics)

    def _checked_read(self, model: Any, inputs: Mapping[str, Any]) -> HeadRead:
        read = read_batch(model, inputs, self.head_name)
        self._checked = True
        if self.unintended.spec is not None and not read.are_final:
            raise ValueError(
                f"the head of {type(unwrapped(model)).__name__} does not read the final hidden states that the "
                "unintended features are of, but what a pooler or a dense layer makes of them: find features on "
                "selfreg.head_inputs(model, batches)"
            )
        return read

    @torch.no_grad()
    def _take_in(self, statistics: HeadStatistics, inputs: Mapping[str, Any], states: Tensor) -> None:
        states = states.float()
        assert statistics.scale is not None
        statistics.scale.update(states, self.accelerator.reduce)
        if not self.regularizer.dependence_weight:
            return
        features = self.unintended
        activations = feature_activations(
            states,
            features.encoder_directions.to(states),
            features.encoder_bias.to(states),
            features.input_norm,
        )
        states, activations, constant = self.dependence_rows(inputs, states, activations)
        dependence = statistics.dependence_of(constant.shape[1])
        dependence.update(states, activations, constant, self.accelerator.reduce)

    def _set_directions(self, statistics: HeadStatistics) -> None:
        directions = statistics.directions
        if directions is not None and self.regularizer.dependence_weight:
            self.regularizer.dependence_directions = directions

    def _task_loss_is_scaled(self) -> bool:
        """Whether the Trainer takes the loss for one that is already divided by the number of micro-batches."""
        # Trainers of transformers before 5.24 have no such attribute.
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        return self.compute_loss_func is not None if said is None else said


def _label_names(model: nn.Module, num_logits: int) -> list[str]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"features that are unintended for some labels only need config.id2label: {type(model)}")
    names: dict[Any, str] = dict(model.config.id2label or {})
    return [names[i] for i in range(num_logits)]


def _halves(*tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(half[0], half[1]) for half in (tensor.chunk(2) for tensor in tensors)]

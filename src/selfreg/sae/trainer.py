"""SAETrainer: pre-training and task fine-tuning of a sparse autoencoder, on transformers' Trainer."""

import copy
import logging
from collections.abc import Iterator, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from selfreg import __version__
from selfreg.activations.store import ActivationStore
from selfreg.activations.streaming import StreamingActivations
from selfreg.sae.data import StatesDataset, check_states, collate_states, iterate_states, sample_of
from selfreg.sae.input_norm import standardize
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.sae.sampling import WindowSampler
from selfreg.sae.statistics import evaluate_sae
from selfreg.sae.streams import StreamBatches, StreamPlace, load_place
from selfreg.sae.training_args import FSDP1_REFUSED, SAETrainingArguments
from selfreg.utils.processes import largest_over, one_batch, own_part, together
from selfreg.utils.sharding import whole_weights
from selfreg.utils.trainer import PartsTrainer

_LEARNING_RATE = 3e-3
_LEARNING_RATE_WIDTH = 16_384
_DECAY_SHARE = 0.3
_THRESHOLD_RATE = 10
"""Of thresholds, in learning rates: they are fifty times as large as an element of a unit row."""

logger = logging.getLogger(__name__)

_NORMALIZATION_STATES = 65_536
_THRESHOLD_STATES = 2_048
_CHUNK = 8_192


class SAETrainer(PartsTrainer):
    """Trains a [`SAEForFeatureExtraction`].

    `objective="pretrain"`: k annealing, input centring and scale from the data before the first step of a new SAE, an
    auxiliary loss that revives dead features, unit-norm decoder. `objective="finetune"`: features are split into live
    and dead on the training states at the start of every epoch; see [`SAEForFeatureExtraction.task_loss`].

    Args:
        model: the SAE.
        args: a [`SAETrainingArguments`].
        train_dataset: an [`ActivationStore`], any map-style dataset whose rows hold `hidden_states`, or a
            [`StreamingActivations`], which needs `max_steps`.
        eval_dataset: a store or a map-style dataset; `evaluate` gives FVU, L0 and dead share over the whole of it.

    Raises:
        ValueError: the dataset is empty, its states have another width, or the SAE is of another backbone.
    """

    args: SAETrainingArguments
    model: SAEForFeatureExtraction

    def __init__(
        self,
        model: SAEForFeatureExtraction,
        args: SAETrainingArguments,
        train_dataset: StatesDataset | StreamingActivations | None = None,
        eval_dataset: StatesDataset | dict[str, StatesDataset] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(train_dataset, StreamingActivations):
            kwargs["callbacks"] = [StreamPlace(train_dataset), *(kwargs.get("callbacks") or [])]
            if args.dataloader_num_workers:
                raise ValueError(
                    f"dataloader_num_workers={args.dataloader_num_workers}: a stream runs its backbone in the process "
                    "that trains; leave it at 0"
                )
        eval_datasets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *eval_datasets):
            if dataset is not None:
                check_states(model.config, dataset)
        kwargs.setdefault("data_collator", collate_states)
        # Not in the caller's: they may be used for an SAE of another width.
        args = copy.copy(args)
        batch = args.per_device_train_batch_size * args.world_size
        if isinstance(train_dataset, Sized) and len(train_dataset) < batch:
            # The short batch is all there is.
            args.dataloader_drop_last = False
        if args.learning_rate is None:
            args.learning_rate = learning_rate_for(model.config.num_features)
        if args.n_gpu > 1:
            logger.warning(
                "one of %d accelerators is used: start with `accelerate launch` or `torchrun` to use all", args.n_gpu
            )
            # DataParallel would scatter masks over features as if they were batches of states.
            args._n_gpu = 1
        # Every weight gets a gradient at every step, and the buffers, counted over all processes, are the same
        # everywhere: what torch would search for and send at every step to no end, unless it is asked for.
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(FSDP1_REFUSED)
        self.can_return_loss = True
        self.add_callback(_UnitNormDecoder())
        if args.objective == "finetune":
            self.add_callback(_TaskSplit(self))
        model.config.selfreg_version = __version__
        if model.config.base_model_name_or_path is None and isinstance(
            train_dataset, ActivationStore | StreamingActivations
        ):
            model.config.set_hidden_state_spec(train_dataset.spec)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        # An SAE that has been trained keeps the centring and scale that its weights are made for.
        if self.train_dataset is not None and not self.model.is_normalized:
            if self.model.config.converted_from:
                # When resuming too: what it is resumed from was saved after it.
                self._adopt()
            elif self.args.objective == "pretrain" and not resume_from_checkpoint:
                self._start_from_data()
        if isinstance(self.train_dataset, StreamingActivations) and resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            # The stream goes to its place by itself; the Trainer would run the backbone over all that came before.
            self.args.ignore_data_skip = load_place(self.train_dataset, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        """The card of selfreg, with the figures that were evaluated last."""
        if self.is_world_process_zero():
            from selfreg.hub.cards import write_trainer_card

            write_trainer_card(self, language=language, license=license, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if isinstance(self.train_dataset, StreamingActivations):
            # Not prepared by accelerate: the stream has dealt out the texts already, and gives whole batches.
            return DataLoader(StreamBatches(self.train_dataset, self._train_batch_size), batch_size=None)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ActivationStore) and self.args.train_sampling_strategy == "random":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return WindowSampler(dataset, seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # The batches of all processes are one: what is chosen, counted and divided by is taken over all of them.
        with one_batch() if model.training else nullcontext():
            return self._loss(model, inputs["hidden_states"], return_outputs)

    def _loss(self, model: Any, states: Tensor, return_outputs: bool) -> Any:
        sae = self.accelerator.unwrap_model(model)
        if self.args.objective == "finetune" and model.training:
            # Through the wrapper's own forward, or the gradients of the processes would never meet.
            output = model(
                states,
                dead=sae.dead_on_task,
                dead_loss_weight=self.args.dead_loss_weight,
                sparsity_coefficient=self.args.sparsity_coefficient,
            )
            self.parts.add(
                live_loss=output.live_loss, dead_loss=output.aux_loss, dead_on_task=sae.dead_on_task.float().mean()
            )
            if output.sparsity is not None:
                self.parts.add(sparsity=output.sparsity)
            return (output.loss, output) if return_outputs else output.loss
        dead_mask = sae.tokens_since_fired >= self._dead_after()
        output = model(
            states,
            k=self._current_k(),
            dead=dead_mask,
            aux_coefficient=self.args.aux_coefficient,
            sparsity_coefficient=self.args.sparsity_coefficient,
        )
        if model.training:
            sae.count_fired(output.features)
            if output.sparsity is not None:
                self.parts.add(sparsity=output.sparsity)
            aux = output.aux_loss if output.aux_loss is not None else 0.0
            self.parts.add(l0=output.l0, aux_loss=aux, dead_fraction=dead_mask.float().mean())
            # One state, as the last batch of an epoch may be, has no variance to leave unexplained.
            if states.shape[:-1].numel() * together() > 1:
                self.parts.add(fvu=output.fvu)
        return (output.loss, output) if return_outputs else output.loss

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: StatesDataset | dict[str, StatesDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """FVU, L0 and dead share over the whole dataset, as `eval_fvu`, `eval_l0`, `eval_dead_fraction`, `eval_loss`.

        The loss is the FVU.
        """
        dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("SAETrainer.evaluate needs an eval_dataset")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        check_states(self.model.config, dataset)
        sae = self.accelerator.unwrap_model(self.model)
        with one_batch(), whole_weights(sae):
            figures = evaluate_sae(sae, dataset).to_dict()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_loss"] = figures["fvu"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def split_task_features(self) -> Tensor:
        """Which features are never active on the training states, `[num_features]`, bool.

        Their pre-activation is never above zero, or above the threshold where there is one.
        """
        sae = self.accelerator.unwrap_model(self.model)
        maxima = torch.full((sae.config.num_features,), -torch.inf, device=sae.device)
        with one_batch(), whole_weights(sae):
            for chunk in self._own_states():
                maxima = torch.maximum(maxima, sae.max_preactivations(chunk.to(sae.device)))
            maxima = largest_over(maxima)
            return maxima <= (0 if sae.activation.threshold == "none" else sae.threshold.clamp_min(0))

    def _own_states(self) -> Iterator[Tensor]:
        """This process's part of the training states, a chunk at a time; of a stream, those of its buffer."""
        if isinstance(self.train_dataset, StreamingActivations):
            return iter(self.train_dataset.current_states().split(_CHUNK))
        return iterate_states(self.train_dataset, _CHUNK, own_part())  # type: ignore[arg-type]

    def _current_k(self) -> int:
        k = self.model.config.k
        if not self.model.training:
            return k
        start = self._first_k()
        anneal_steps = self.args.k_anneal_ratio * self.state.max_steps
        if self.state.global_step >= anneal_steps:
            return k
        return round(start + (k - start) * self.state.global_step / anneal_steps)

    def create_optimizer(self, model: Any = None) -> Any:
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        sae = self.accelerator.unwrap_model(self.model if model is None else model)
        # What a caller made has the groups that the caller wanted.
        if not given and sae.activation.threshold == "learned":
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not sae.threshold]
            rate = _THRESHOLD_RATE * optimizer.param_groups[0]["lr"]
            optimizer.add_param_group({"params": [sae.threshold], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            given: Any = self.args.lr_scheduler_kwargs
            # For this training alone: another may be of other steps.
            self.args.lr_scheduler_kwargs = {
                "num_decay_steps": round(_DECAY_SHARE * num_training_steps),
                **(given or {}),
            }
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            finally:
                self.args.lr_scheduler_kwargs = given
        return super().create_scheduler(num_training_steps, optimizer)

    def _first_k(self) -> int:
        # A width of fewer features than the first k would be asked for more than there are.
        return min(self.args.k_start or 2 * self.model.config.k, self.model.config.num_features)

    def _dead_after(self) -> int:
        if self.args.dead_after_tokens is not None:
            return self.args.dead_after_tokens
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seen = self.state.max_steps * a_step
        return min(10_000_000, max(1, seen // 40))

    def _normalization(self) -> tuple[Tensor, Tensor, Tensor]:
        """Up to 65,536 states, their mean, and the scale that gives them a mean squared norm of hidden_size."""
        sae = self.accelerator.unwrap_model(self.model)
        states = sample_of(self.train_dataset, _NORMALIZATION_STATES)  # type: ignore[arg-type]
        # A chunk at a time: in float64 all at once, these would be the most memory that training ever takes.
        mean, squares = states.new_zeros(states.shape[1], dtype=torch.float64), 0.0
        for chunk in states.split(_CHUNK):
            mean += standardize(chunk.double(), sae.config.input_norm).states.sum(dim=0) / len(states)
        for chunk in states.split(_CHUNK):
            centred = standardize(chunk.double(), sae.config.input_norm).states - mean
            squares += float(centred.pow(2).sum())
        scale = torch.tensor(squares / states.numel(), dtype=torch.float64).sqrt()
        return states, mean.to(sae.mean), scale.to(sae.scale)

    def _adopt(self) -> None:
        """An SAE of another library, which takes raw states, is written in the terms that training is made for."""
        sae = self.accelerator.unwrap_model(self.model)
        states, mean, scale = self._normalization()
        if sae.activation.penalty != "none":
            # Its files don't say how many features should be active: as many as are.
            some = states[:: max(1, len(states) // _THRESHOLD_STATES)].to(sae.device)
            with torch.no_grad():
                active = (sae.encode(some).values > 0).sum(dim=1).float().mean()
            sae.config.k = max(1, round(float(active)))
            logger.info("%s: %d features are active in a state, and will be", sae.config.converted_from, sae.config.k)
        sae.rescale(mean, scale)

    def _start_from_data(self) -> None:
        """Centring, scale and thresholds of a new SAE."""
        sae = self.accelerator.unwrap_model(self.model)
        states, mean, scale = self._normalization()
        sae.set_normalization(mean, scale)
        sae.start_from(states[:: max(1, len(states) // _THRESHOLD_STATES)].to(sae.device), self._first_k())


def learning_rate_for(num_features: int) -> float:
    """The learning rate of pre-training: beyond 16,384 features it falls with the square root of the width."""
    return _LEARNING_RATE * (_LEARNING_RATE_WIDTH / max(num_features, _LEARNING_RATE_WIDTH)) ** 0.5


class _UnitNormDecoder(TrainerCallback):
    """Keeps decoder directions at unit length: no gradient along them, and renormalised after each step."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].project_decoder_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].project()


class _TaskSplit(TrainerCallback):
    """Splits features into live and dead at the start of each epoch of fine-tuning."""

    def __init__(self, trainer: SAETrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = state.epoch or 0.0
        # Resumed within an epoch: the split that this epoch began with came back with the checkpoint.
        if abs(epoch - round(epoch)) < 1e-6:
            self.trainer.model.dead_on_task.copy_(self.trainer.split_task_features())

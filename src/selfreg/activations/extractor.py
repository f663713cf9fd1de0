"""HiddenStateExtractor: texts -> hidden states of one layer of a backbone."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfreg.activations.backbone import (
    Layer,
    ModelSource,
    cached_commit,
    check_layer,
    find_blocks,
    hidden_states_at,
    load_backbone,
    load_tokenizer,
    resolve_model,
    tell_moved,
    with_revision_there,
)
from selfreg.activations.dealing import own_shards
from selfreg.activations.prompt import (
    REFERENCE_TEXT,
    Pooling,
    Prompt,
    PromptBatch,
    PromptLayout,
    TokenRule,
    batches_of,
    check_choice,
    check_texts,
    collate_prompts,
    pool_hidden_states,
    select_tokens,
)
from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import ActivationStore, StoreShard
from selfreg.activations.writer import StoreWriter
from selfreg.utils.devices import default_device
from selfreg.utils.files import fingerprint_strings
from selfreg.utils.processes import is_main_process
from selfreg.utils.progress import Advance, progress
from selfreg.utils.quantized import keep_unpacked
from selfreg.utils.sharding import InStep, shard, without_gradient

logger = logging.getLogger(__name__)


class HiddenStateExtractor:
    """Runs texts through a backbone up to one layer and stops there.

    Args:
        backbone: a model that `AutoModel` gives. Put into evaluation mode; never changed otherwise.
        tokenizer: its tokenizer, a fast one.
        layer: the residual stream after block `layer`, counted from 0 (`hidden_states[layer + 1]` of transformers);
            `"final"`: what a stock classification head sees, after the final norm.
        pooling: how the states of a text become one: `"mean"`, `"last"` or `"cls"`.
        max_length: tokens of a prompt; longer texts lose their end.
        template: prompt around each text, with `{text}` where it goes. The two sides are tokenised by themselves: end
            the first with a line break rather than a space. `"{chat}"`: texts are conversations as the tokenizer's
            chat template writes them (see `conversation.render`), and the tokens that count are those of the last
            reply.
        token_rule: which tokens count: `"text_no_sinks"`, `"text"` or `"all"`; see `select_tokens`.
        name: what to call the backbone in stores, SAEs and classifiers, so that it is found again.
        revision, gguf_file: likewise.
        batch_tokens: most tokens of one forward pass, padding included.

    Raises:
        ValueError: an unknown setting, or a layer that is not there; or see `keep_unpacked`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: Layer,
        pooling: Pooling = "mean",
        max_length: int = 128,
        template: str | None = None,
        token_rule: TokenRule = "text_no_sinks",
        name: str | None = None,
        revision: str | None = None,
        gguf_file: str | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        check_choice("pooling", pooling, Pooling)
        check_choice("token_rule", token_rule, TokenRule)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: selfreg needs a fast one, for offsets")
        name = name or backbone.config.name_or_path or type(backbone).__name__
        if layer != "final":
            check_layer(layer, len(find_blocks(backbone)), name)
        keep_unpacked(backbone)
        self.backbone = backbone.eval()
        self.tokenizer = tokenizer
        self.layer = layer
        self.pooling: Pooling = pooling
        self.batch_tokens = batch_tokens
        self.layout = PromptLayout.from_tokenizer(tokenizer, template, max_length)
        self.spec = HiddenStateSpec(
            model=name,
            revision=revision,
            gguf_file=gguf_file,
            layer=layer,
            hidden_size=backbone.config.get_text_config().hidden_size,
            token_rule=token_rule,
            template=template,
            max_length=max_length,
        )
        self._reference_norm: float | None = None
        # A classifier that FSDP has sharded puts itself there: its backbone runs within it only.
        self.run: Callable[[Tensor, Tensor], Tensor] = partial(hidden_states_at, backbone, layer)
        self.in_step = InStep(backbone, self._idle)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        layer: Layer,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "HiddenStateExtractor":
        """Loads a backbone, without the blocks that are not needed, and its tokenizer.

        Args:
            model: a Hub id, a local folder, or `package:<import name>` for model files in an installed package.
            layer, kwargs: as for the class.
            revision, gguf_file: see `resolve_model`.
            dtype: of the backbone. Hidden states are handed on as float32.
            device: where to put it; None: the accelerator if there is one.
            model_kwargs: what else `AutoModel.from_pretrained` gets: `attn_implementation`, `quantization_config`,
                `device_map` (instead of `device`), …
        """
        model_kwargs = dict(model_kwargs or {})
        source = resolve_model(model, revision=revision, gguf_file=gguf_file)
        tokenizer = load_tokenizer(source)
        if not {"device_map", "quantization_config"} & model_kwargs.keys():
            device = device or default_device()
        backbone = load_backbone(source, layer=layer, dtype=dtype, device=device, **model_kwargs)
        return cls(
            backbone,
            tokenizer,
            layer=layer,
            name=model,
            revision=cached_commit(source) or revision,
            gguf_file=source.gguf_file,
            **kwargs,
        )

    @classmethod
    def from_sae(cls, sae: Any, **kwargs: Any) -> "HiddenStateExtractor":
        """The extractor that an SAE was trained with, from the SAE's config.

        Args:
            sae: a `SAEForFeatureExtraction`.
            kwargs: as for `from_pretrained`; they go before what the SAE names.

        Raises:
            ValueError: the SAE does not say which backbone it was trained on.
        """
        spec: HiddenStateSpec | None = sae.config.hidden_state_spec()
        if spec is None:
            raise ValueError(
                "the SAE does not name its backbone and layer (base_model_name_or_path, layer): build the extractor "
                "with HiddenStateExtractor.from_pretrained"
            )
        settings, given = spec.to_dict(), kwargs.get("model_kwargs") or {}
        model, hidden_size = settings.pop("model"), settings.pop("hidden_size")
        if "revision" in kwargs:
            extractor = cls.from_pretrained(model, **{**settings, **kwargs})
            tell_moved("the SAE", model, spec.revision, extractor.spec.revision)
        else:
            extractor = with_revision_there(
                "the SAE",
                ModelSource(model, settings["gguf_file"], spec.revision),
                lambda source: cls.from_pretrained(model, **{**settings, **kwargs, "revision": source.revision}),
                **{name: given[name] for name in ("token", "local_files_only") if name in given},
            )
        if extractor.hidden_size != hidden_size:
            raise ValueError(
                f"the SAE takes states of width {hidden_size}, but the backbone {model!r} gives "
                f"{extractor.hidden_size}"
            )
        return extractor

    def shard(self) -> "HiddenStateExtractor":
        """Freezes the backbone and deals its weights out to the processes (FSDP2), each of which then holds its part
        of every block and gathers one at a time: for a backbone that does not fit one device.

        Every process has to call it, and then every method that runs texts. Blocks behind the layer are run too, where
        a model was given with them; `from_pretrained` leaves them out. Load with `device="cpu"` what fits no device,
        or with `model_kwargs={"device_map": "auto"}` into one process what fits all of them together.

        Returns:
            itself. In one process nothing is dealt out.
        """
        try:
            blocks = list(find_blocks(self.backbone))
        except ValueError:
            if self.layer != "final":
                raise
            # Gathered as a whole.
            blocks = []
        shard(self.backbone.requires_grad_(False), blocks)
        # Now, with all processes: later one may need it that has no texts of its own.
        self._reference_norm = self.reference_norm
        return self

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        # Padding is masked, so that any id that has an embedding will do.
        return pad if pad is not None else 0

    @property
    def reference_norm(self) -> float:
        """Median norm of a token's hidden state in plain prose: the yardstick of the sink rule."""
        if self._reference_norm is None:
            prompt = self.layout.wrap(self.tokenizer(REFERENCE_TEXT)["input_ids"])
            batch = PromptBatch(*(t.to(self.device) for t in collate_prompts([prompt], self.pad_id)))
            norms = torch.linalg.vector_norm(self._hidden_states(batch)[0][batch.text_mask[0]], dim=-1)
            self._reference_norm = float(norms.median())
        return self._reference_norm

    def tokenize(self, texts: Sequence[str]) -> list[Prompt]:
        """Prompts of `texts`: token ids, first and one past the last token of the text.

        Raises:
            ValueError: a text is empty, or not a string.
        """
        check_texts(texts)
        encoded = self.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
        prompts = [self.layout.wrap(ids) for ids in encoded]
        for index, (_, start, end) in enumerate(prompts):
            if start == end:
                raise ValueError(
                    f"text {index} ({texts[index]!r}) has no token that the tokenizer knows: leave it out"
                )
        return prompts

    def extract(
        self,
        texts: Sequence[str],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        shard_tokens: int = 65_536,
        overwrite: bool = False,
        description: str = "hidden states",
    ) -> ActivationStore:
        """Writes the hidden states of every token that counts to a folder, shard by shard.

        Called again after it was cut short, it goes on with the shards that are missing; called on a finished store of
        the same texts and settings, it only opens it.

        Under `accelerate launch` or `torchrun` every process has to call it, with the same texts and a folder that all
        share. Each then writes some of the shards, and all get the store, which is the one that a single process would
        have written: give `shard_tokens` so that there are several shards for each.

        Args:
            texts: the texts; none empty.
            path: the folder.
            dtype: of the states on disk.
            shard_tokens: tokens of a shard, about.
            overwrite: replace a store of other texts or settings.

        Raises:
            ValueError: an empty text, a folder that holds another store, or processes that do not agree.
            OSError: the disk is full; what was written before stays whole, and the next call goes on from there.
        """
        check_texts(texts)
        texts = list(texts)
        writer = StoreWriter(
            path,
            self.spec,
            text_fingerprint=fingerprint_strings(texts),
            num_texts=len(texts),
            dtype=dtype,
            pooling=self.pooling,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
        )
        if not writer.complete:
            there = writer.held_end
            for number, shard in own_shards(self, texts, description, shard_tokens=shard_tokens, held_end=there):
                writer.write(number, shard)
            writer.finish()
        store = ActivationStore(path)
        if store.num_full and is_main_process():
            self._tell_cut(store.num_full, store.num_texts)
        return store

    def _tell_cut(self, cut: int, total: int) -> None:
        beyond = "what they have beyond is left out"
        if self.layout.frame is not None:
            beyond = "what is beyond is left out, first of what was said before the reply"
        logger.warning("%d of %d texts fill max_length=%d tokens: %s", cut, total, self.spec.max_length, beyond)

    def iterate(
        self, texts: Sequence[str], *, shard_tokens: int = 65_536, start: int = 0, advance: Advance | None = None
    ) -> Iterator[StoreShard]:
        """Hidden states of runs of texts, in order, as shards that were never on disk.

        Texts of like length share a forward pass; within a shard only, so that a shard is the same whichever was the
        first to be computed.
        """
        first = start
        while first < len(texts):
            prompts = self.prompts_of_shard(texts, first, shard_tokens)
            yield self.shard_of(prompts, first, advance)
            first += len(prompts)

    def prompts_of_shard(self, texts: Sequence[str], first: int, shard_tokens: int) -> list[Prompt]:
        """The prompts of the shard that begins with text `first`: as many as come to `shard_tokens` tokens."""
        prompts: list[Prompt] = []
        tokens = 0
        while tokens < shard_tokens and first + len(prompts) < len(texts):
            begin = first + len(prompts)
            more = self.tokenize(texts[begin : begin + 64])
            for prompt in more:
                prompts.append(prompt)
                tokens += len(prompt[0])
                if tokens >= shard_tokens:
                    break
        return prompts

    def pool(self, texts: Sequence[str]) -> Tensor:
        """One state a text, `[len(texts), hidden_size]`, float32, on the CPU."""
        texts = list(texts)
        out = torch.empty(len(texts), self.hidden_size)
        with progress("pooled states", len(texts), "texts") as advance:
            for rows, batch, raw in self.forward_batches(texts):
                hidden, keep = select_tokens(raw, batch, self.spec.token_rule, self._yardstick())
                pooled = raw[:, 0] if self.pooling == "cls" else pool_hidden_states(hidden, keep, self.pooling)
                out[rows] = pooled.cpu()
                advance(len(rows))
        return out

    def forward_batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, PromptBatch, Tensor]]:
        """Runs all texts in batches of like length.

        Yields:
            which texts a batch holds `[B]`, the batch, and the hidden states of all its tokens `[B, T, D]`, float32.
        """
        prompts = self.tokenize(texts)
        cut = sum(len(ids) >= self.layout.max_length for ids, _, _ in prompts)
        if cut:
            self._tell_cut(cut, len(prompts))
        with self.in_step.together():
            for rows, batch in batches_of(prompts, self.batch_tokens, self.pad_id):
                on_device = PromptBatch(*(tensor.to(self.device) for tensor in batch))
                yield torch.tensor(rows), on_device, self._hidden_states(on_device)

    def shard_of(self, prompts: list[Prompt], first_text: int, advance: Advance | None = None) -> StoreShard:
        """Runs the prompts of a shard, whose first is that of text `first_text`, in batches of like length."""
        states: list[Tensor | None] = [None] * len(prompts)
        positions: list[Tensor | None] = [None] * len(prompts)
        cls_states: list[Tensor | None] = [None] * len(prompts)
        for rows, cpu_batch in batches_of(prompts, self.batch_tokens, self.pad_id):
            batch = PromptBatch(*(tensor.to(self.device) for tensor in cpu_batch))
            raw = self._hidden_states(batch)
            hidden, keep = select_tokens(raw, batch, self.spec.token_rule, self._yardstick())
            for index, row in enumerate(rows):
                kept = keep[index].nonzero().flatten()
                states[row] = hidden[index][kept].cpu()
                positions[row] = kept.cpu()
                cls_states[row] = raw[index, 0].cpu()
            if advance is not None:
                advance(len(rows))
        counts = torch.tensor([len(p) for p in positions if p is not None])
        position_list = [p for p in positions if p is not None]
        token_ids = [torch.tensor(ids)[kept] for (ids, _, _), kept in zip(prompts, position_list, strict=True)]
        return StoreShard(
            first_text=first_text,
            end_text=first_text + len(prompts),
            hidden_states=torch.cat([s for s in states if s is not None]),
            text_ids=torch.repeat_interleave(torch.arange(len(prompts)) + first_text, counts).int(),
            positions=torch.cat(position_list).int(),
            token_ids=torch.cat(token_ids).int(),
            cls_states=torch.stack([c for c in cls_states if c is not None]) if self.pooling == "cls" else None,
            full_texts=sum(len(ids) >= self.layout.max_length for ids, _, _ in prompts),
        )

    def _hidden_states(self, batch: PromptBatch) -> Tensor:
        self.in_step.announce()
        with without_gradient(self.backbone):
            return self.run(batch.input_ids, batch.attention_mask).float()

    def _idle(self) -> None:
        one = torch.full((1, 1), self.pad_id, device=self.device)
        with without_gradient(self.backbone):
            self.run(one, torch.ones_like(one))

    def _yardstick(self) -> float:
        return self.reference_norm if self.spec.token_rule == "text_no_sinks" else float("inf")

